import json

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.models.detector import Question
from data_pipeline.models.grounding import Preprocessing
from data_pipeline.models.grounding_dino_hf import GroundingDinoHF, load_grounding_dino_hf
from data_pipeline.steps.detect_boxes import DetectBoxes

WORDS = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "dog", ".", "cat", "red", "ball", "a", "##s"]
SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Grounding DINO of half a million random weights, with a vocabulary and picture size of its own."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
    )

    place = tmp_path_factory.mktemp("dino-hf")
    swin = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            **sizes,
            backbone_config={**swin, "out_indices": [2, 3, 4]},
            text_config={"model_type": "bert", "vocab_size": len(WORDS), **SMALL_BERT},
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_queries=12,
            max_text_len=40,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(place)
    (place / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    (place / "vocab.txt").unlink(missing_ok=True)
    size = {"shortest_edge": 64, "longest_edge": 100}
    GroundingDinoImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    return load_grounding_dino_hf(str(folder), "cpu")


def questions_about(frames, make_entity):
    phrases = (["dog"], ["red ball", "a cat"], ["cats", "ball", "dog"], ["a dog"])
    return [
        Question(video=None, frame=frame, entities=tuple(make_entity(phrase) for phrase in names))
        for frame, names in zip(frames, phrases, strict=True)
    ]


def test_it_says_its_own_picture_size(loaded):
    model, _, preprocessing = loaded
    assert preprocessing == Preprocessing(64, 100, (0.5,) * 3, (0.25,) * 3)
    settings = {"box_threshold": 0.3, "nms_iou": 0.7}
    assert GroundingDinoHF(*loaded, **settings).preprocessing.shortest == 64
    other = GroundingDinoHF(*loaded, **settings, image_size=96).preprocessing
    assert (other.shortest, other.longest, other.mean) == (96, 160, (0.5,) * 3)
    assert model.config.disable_custom_kernels


def test_a_batch_equals_single_questions(loaded, dino_frames, make_entity):
    questions = questions_about(dino_frames, make_entity)
    settings = {"box_threshold": 0.05, "nms_iou": 0.7}
    together = GroundingDinoHF(*loaded, **settings, batch_size=4).detect(questions)
    alone = [GroundingDinoHF(*loaded, **settings, batch_size=1).detect([question])[0] for question in questions]
    assert [len(found) for found in together] == [len(found) for found in alone]
    assert min(len(found) for found in alone) > 0
    for one, other in zip(sum(together, ()), sum(alone, ()), strict=True):
        assert one.entity == other.entity
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.box == pytest.approx(other.box, abs=1e-5)


def test_a_pair_gets_the_same_bits_whatever_is_asked_beside_it(loaded, dino_frames, make_entity):
    entities, others = ((make_entity("dog"), make_entity("red ball")), (make_entity("a cat"),))
    one, two, three, tall = dino_frames
    pair, beside = (
        [Question(video=None, frame=frame, entities=asked) for frame in frames]
        for frames, asked in (((one, two), entities), ((three, one), others))
    )
    lone = Question(video=None, frame=tall, entities=others)
    detector = GroundingDinoHF(*loaded, box_threshold=0.05, nms_iou=0.7)
    alone, among = detector.detect(pair), detector.detect([lone, lone, *beside, *pair])[-2:]
    as_numbers = [[[(found.score, found.box) for found in answer] for answer in both] for both in (alone, among)]
    assert as_numbers[0] == as_numbers[1]
    assert sum(len(answer) for answer in alone) > 0


def test_phrases_over_the_text_s_length_are_all_asked_for(loaded, dino_frames, make_entity):
    """This text holds 40 tokens: 30 phrases need two."""
    entities = tuple(make_entity(f"{'red ' * (i % 3)}dog") for i in range(30))
    detector = GroundingDinoHF(*loaded, box_threshold=1e-6, nms_iou=1.0)
    texts = []
    detector.forward, forward = lambda pixels, asked: (texts.append(asked), forward(pixels, asked))[1], detector.forward
    detector.detect([Question(video=None, frame=dino_frames[0], entities=entities)])
    lengths = [len(detector.tokenizer(text)["input_ids"]) for asked in texts for text in asked]
    assert len(lengths) > 1
    assert max(lengths) <= 40
    assert sum(text.count(".") for asked in texts for text in asked) == 30


def test_phrases_are_kept_apart_by_the_vocabulary_s_own_marks(loaded):
    """transformers knows [CLS] [SEP] . ? by their numbers in another vocabulary only. With those, phrases would see
    each other.
    """
    model = loaded[0]
    assert model.model.special_tokens.tolist() == [3, 2, 5, 5]
    features = []
    hook = model.model.text_projection.register_forward_hook(lambda module, args, output: features.append(output))
    detector = GroundingDinoHF(*loaded, box_threshold=0.3, nms_iou=0.7)
    with torch.inference_mode():
        for text in ("dog .", "dog . red ball ."):
            detector.forward(torch.zeros(1, 3, 64, 64), [text])
    hook.remove()
    torch.testing.assert_close(features[0][0, 1], features[1][0, 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (150, 100), (640, 360), (100, 300)])
def test_preprocessing_is_the_pil_processor_s(folder, loaded, size):
    """Where the long side is the limit, transformers rounds it up by a pixel at times; we do as the package does."""
    from transformers import GroundingDinoImageProcessorPil

    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = GroundingDinoImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
    prepared = loaded[2](image)
    if max(size) / min(size) * 64 > 100:
        assert max(abs(a - b) for a, b in zip(prepared.shape, expected.shape, strict=True)) <= 1
        assert max(prepared.shape) in (99, 100)
    else:
        torch.testing.assert_close(prepared, expected, atol=1e-6, rtol=0)


def test_the_step(folder, dino_frames, make_pair, make_entity):
    from data_pipeline.records import DetectedPair, NamedPair, Rejected

    step = DetectBoxes(detector="groundingdino-hf", model=str(folder), box_threshold=0.05)
    step.setup()
    frames = make_pair(dino_frames[0].image, dino_frames[1].image)
    pair, lost = step.process_many(
        [
            NamedPair(frames=frames, entities=(make_entity("dog"),)),
            NamedPair(frames=frames, entities=(make_entity("dog " * 50),)),
        ]
    )
    assert isinstance(pair, DetectedPair)
    assert isinstance(lost, Rejected)
    assert lost.reason == "phrase too long for the detector"
    assert lost.evidence["most"] == 37


def test_directories_that_do_not_serve(folder, tmp_path):
    with pytest.raises(InputError, match="lacks its configuration"):
        load_grounding_dino_hf(str(tmp_path), "cpu")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot load a Grounding DINO from"):
        load_grounding_dino_hf(str(tmp_path), "cpu")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    unused = [name for name in weights if ".swin.layernorm." in name]
    assert len(unused) == 2
    for name in unused:
        weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_grounding_dino_hf(str(tmp_path), "cpu")  # as released weights are
    weights.pop("model.level_embed")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="Grounding DINO .* is incomplete: its files lack model.level_embed"):
        load_grounding_dino_hf(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="cannot load a Grounding DINO from|lacks .* tensors of a Grounding DINO"):
        load_grounding_dino_hf(str(tmp_path), "cpu")
