import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.errors import InputError
from data_pipeline.models.detector import Question
from data_pipeline.models.grounding import Preprocessing
from data_pipeline.models.grounding_dino import (
    GroundingDino,
    build_from_config,
    load_grounding_dino,
    read_package_config,
    read_weights,
)
from data_pipeline.records import box_iou
from data_pipeline.steps.detect_boxes import DetectBoxes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
TEXTS = ["dog .", "red ball . cat . a dog .", "a cat ."]


@pytest.fixture(scope="module")
def model(dino_files):
    return load_grounding_dino(dino_files.config, dino_files.weights, str(dino_files.bert), "cpu")


@pytest.fixture(scope="module")
def detector(model):
    return GroundingDino(model, box_threshold=0.05, nms_iou=0.5, image_size=96, batch_size=4)


@pytest.fixture
def pixels(detector, dino_frames):
    return torch.stack([detector.preprocessing(frame.image) for frame in dino_frames[:3]])


def test_boxes_of_all_phrases_in_one_question(detector, dino_frames, make_entity):
    entities = (make_entity("dog"), make_entity("red ball"))
    [found] = detector.detect([Question(video=None, frame=dino_frames[0], entities=entities)])
    assert found
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.entity in entities
        assert 0.05 <= one.score <= 1
        assert 0 <= one.box[0] < one.box[2] <= 1
        assert 0 <= one.box[1] < one.box[3] <= 1
    for entity in entities:
        boxes = [one.box for one in found if one.entity == entity]
        assert all(box_iou(a, b) <= 0.5 for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_batch_of_different_captions_equals_single_ones(detector, pixels):
    with torch.inference_mode():
        logits, boxes = detector.forward(pixels, TEXTS)
        for row, text in enumerate(TEXTS):
            alone, alone_boxes = detector.forward(pixels[row : row + 1], [text])
            tokens = torch.isfinite(alone[0, 0])
            assert (logits[row][:, tokens].sigmoid() - alone[0][:, tokens].sigmoid()).abs().max() < 1e-5
            assert (boxes[row] - alone_boxes[0]).abs().max() < 1e-5


def test_without_the_mended_masks_captions_disturb_each_other(model, detector, pixels):
    """What the package does by itself: this test fails when it no longer needs mending."""
    from groundingdino.models.GroundingDINO.transformer_vanilla import TransformerEncoderLayer

    layers = [layer for layer in model.modules() if isinstance(layer, TransformerEncoderLayer)]
    assert len(layers) == 2
    hooks = [(layer, dict(layer._forward_pre_hooks)) for layer in layers]
    with torch.inference_mode():
        _, right = detector.forward(pixels, TEXTS)
        for layer in layers:
            layer._forward_pre_hooks.clear()
        try:
            _, wrong = detector.forward(pixels, TEXTS)
        finally:
            for layer, kept in hooks:
                layer._forward_pre_hooks.update(kept)
    assert (right - wrong).abs().max() > 1e-3


def test_the_shim_equals_masked_attention_by_hand(model):
    """A phrase's text features must not depend on the other phrases: the block mask has reached BERT."""
    features = []
    handle = model.feat_map.register_forward_hook(lambda module, args, output: features.append(output))
    blank = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        model(blank, captions=["dog ."])
        model(blank, captions=["dog . red ball ."])
    handle.remove()
    torch.testing.assert_close(features[0][0, 1], features[1][0, 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (96, 96), (640, 360), (1000, 90), (96, 700), (33, 97)])
def test_preprocessing_is_the_package_s(size):
    import groundingdino.datasets.transforms as transforms

    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    package = transforms.Compose(
        [
            transforms.RandomResize([96], max_size=160),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    expected, _ = package(Image.fromarray(image), None)
    preprocessing = Preprocessing().resized_to(96)
    assert preprocessing.longest == 160
    prepared = preprocessing(image)
    assert prepared.shape == expected.shape == (3, *preprocessing.size(*size)[::-1])
    assert torch.equal(prepared, expected)


def test_the_step_loads_it_and_leaves_the_package_as_it_was(dino_files):
    from groundingdino.models.GroundingDINO import bertwarper, groundingdino, transformer_vanilla
    from groundingdino.util import get_tokenlizer

    before = transformer_vanilla.TransformerEncoderLayer.forward, get_tokenlizer.get_pretrained_language_model
    step = DetectBoxes(
        detector="groundingdino",
        config=dino_files.config,
        checkpoint=dino_files.weights,
        text_encoder=str(dino_files.bert),
    )
    step.setup()
    assert isinstance(step._network, GroundingDino)
    assert groundingdino.BertModelWarper is bertwarper.BertModelWarper
    after = transformer_vanilla.TransformerEncoderLayer.forward, get_tokenlizer.get_pretrained_language_model
    assert after == before


def test_weights_from_safetensors_and_from_the_hub(dino_files, small_hub):
    from safetensors.torch import save

    weights = save({name: tensor.clone() for name, tensor in read_weights(dino_files.weights).items()})
    configurations = {"model.cfg.py": dino_files.config.read_bytes(), "other.cfg.py": b""}
    small_hub.repositories["owner/dino"] = {"w.safetensors": weights, **configurations}
    settings = {"detector": "groundingdino", "model": "owner/dino", "text_encoder": str(dino_files.bert)}
    with pytest.raises(InputError, match="several files for its configuration: name one of model.cfg.py, other.cfg.py"):
        DetectBoxes(**settings).setup()
    step = DetectBoxes(**settings, config="model.cfg.py")
    step.setup()
    assert sorted(small_hub.asked) == ["model.cfg.py", "w.safetensors"]
    original = load_grounding_dino(dino_files.config, dino_files.weights, str(dino_files.bert), "cpu").state_dict()
    for name, tensor in step._network.model.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def test_a_configuration_is_read_and_never_run(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f'"""Sizes."""\nnheads = 8\n__import__("pathlib").Path({str(tmp_path / "ran")!r}).touch()\n')
    with pytest.raises(InputError, match="it must hold plain assignments, as GroundingDINO_SwinT_OGC.py does"):
        read_package_config(path)
    assert not (tmp_path / "ran").exists()
    path.write_text('"""Sizes."""\nnheads = 8\nindices = [1, 2]\nnothing = None\n')
    assert read_package_config(path) == {"nheads": 8, "indices": [1, 2], "nothing": None}
    for broken in ("backbone = (", "a = b = 1", "a, b = 1, 2", "n = dict(a=1)", "import os"):
        path.write_text(broken)
        with pytest.raises(InputError, match="cannot read the Grounding DINO configuration"):
            read_package_config(path)


def test_the_released_configurations_can_be_read():
    from pathlib import Path

    import groundingdino

    for name in ("GroundingDINO_SwinT_OGC.py", "GroundingDINO_SwinB_cfg.py"):
        settings = read_package_config(Path(groundingdino.__file__).parent / "config" / name)
        assert settings["hidden_dim"] == 256


def test_files_that_do_not_serve(dino_files, tmp_path):
    config, weights, bert = dino_files.config, dino_files.weights, str(dino_files.bert)
    with pytest.raises(InputError, match=r"text encoder '.*no-bert'[\s\S]*--detector-text-encoder DIR"):
        load_grounding_dino(config, weights, str(tmp_path / "no-bert"), "cpu")
    with pytest.raises(InputError, match="the configuration does not describe a Grounding DINO"):
        build_from_config({"modelname": "groundingdino"}, bert)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot read Grounding DINO weights from"):
        load_grounding_dino(config, bad, bert, "cpu")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights either")
    with pytest.raises(InputError, match="cannot read Grounding DINO weights from"):
        load_grounding_dino(config, tmp_path / "bad.safetensors", bert, "cpu")
    torch.save({"model": {}}, bad)
    with pytest.raises(InputError, match=r"bad\.pth is incomplete: its files lack"):
        load_grounding_dino(config, bad, bert, "cpu")
    torch.save({"model": {"feat_map.bias": torch.zeros(3)}}, bad)
    with pytest.raises(InputError, match=r"bad\.pth is incomplete"):
        load_grounding_dino(config, bad, bert, "cpu")


def test_strange_weights_and_sizes_are_refused_before_they_are_built(dino_files, tmp_path):
    config, bert, bad = dino_files.config, str(dino_files.bert), tmp_path / "bad.safetensors"
    weights = {name: tensor.clone() for name, tensor in read_weights(dino_files.weights).items()}
    for name, change, message in (
        ("feat_map.bias", lambda tensor: tensor / 0, "feat_map.bias holds .* numbers that are NaN or infinite"),
        ("feat_map.bias", lambda tensor: tensor.int(), "feat_map.bias is int32"),
        ("strange.weight", lambda tensor: torch.zeros(1), "no place in this network: strange.weight"),
    ):
        save_file({**weights, name: change(weights.get(name))}, bad)
        with pytest.raises(InputError, match=rf"bad\.safetensors:? .*{message}|{message}"):
            load_grounding_dino(config, bad, bert, "cpu")
    text = config.read_text()
    for setting, message in (
        ("hidden_dim = 65536", "has shape"),
        ("hidden_dim = 10**9", "it must hold plain assignments"),
        ("num_queries = 10_000_000", "num_queries is 10000000: at most 65536"),
        ("enc_layers = 5_000", "enc_layers is 5000: at most 200"),
    ):
        (tmp_path / "config.py").write_text(f"{text}\n{setting}\n")
        with pytest.raises(InputError, match=message):
            load_grounding_dino(tmp_path / "config.py", dino_files.weights, bert, "cpu")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="is of model_type 'gpt2': needed is bert"):
        load_grounding_dino(config, dino_files.weights, str(tmp_path / "gpt"), "cpu")
