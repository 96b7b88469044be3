import numpy as np
import pytest

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.records import Rejected
from data_pipeline.steps.write_captions import WriteCaptions

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "red", "ball", "on", "grass", "two", "cups"]


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BLIP with random weights, that nevertheless looks at its picture."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    place = tmp_path_factory.mktemp("blip")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**sizes, **special, "vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    model = BlipForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():  # words rather than marks
        model.text_decoder.get_output_embeddings().bias[:5] = -1000
    model.save_pretrained(place)
    (place / "words.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(place / "words.txt"))
    (place / "words.txt").unlink()
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def step(folder):
    step = WriteCaptions(captioner="blip", model=str(folder), max_tokens=8, frames_per_batch=2)
    step.setup()
    return step


def test_a_clip_without_a_caption_gets_one(step, make_pair):
    pair = make_pair(picture(0), picture(1), caption="")
    captioned = step.process(pair)
    caption = captioned.video.caption
    assert 0 < len(caption.split()) <= 9
    assert set(caption.split()) <= set(WORDS)
    assert caption == " ".join(caption.split())
    assert captioned.target is pair.target
    assert captioned.video.file is pair.video.file
    assert pair.video.caption == ""
    assert step.process(make_pair(picture(7), picture(1), caption=" \n")).video.caption == caption  # the target decides


def test_captions_that_came_with_the_videos_stay(step, make_pair):
    pairs = [
        make_pair(picture(seed), picture(seed), caption=caption)
        for seed, caption in enumerate(["", "a dog", "", "", "cats"])
    ]
    together = step.process_many(pairs)
    assert together[1] is pairs[1]
    assert together[4] is pairs[4]
    alone = [step.process(pair).video.caption for pair in pairs]
    assert [pair.video.caption for pair in together] == alone
    assert len({alone[0], alone[2], alone[3]}) > 1  # it does look at the pictures
    assert step.process_many([]) == []


class Silent:
    def caption(self, images):
        return ["" if image.max() == 0 else "a dog" for image in images]


def test_a_captioner_that_says_nothing(make_pair):
    step = WriteCaptions()
    step._captioner = Silent()
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    lost, kept = step.process_many([make_pair(black, black, caption=""), make_pair(black, picture(0), caption="")])
    assert isinstance(lost, Rejected)
    assert (lost.reason, lost.evidence) == ("the captioner wrote nothing", {"frame": 8})
    assert kept.video.caption == "a dog"


def test_without_a_captioner_a_clip_without_a_caption_is_rejected(make_pair):
    step = WriteCaptions()
    step.setup()
    lost, kept = step.process_many(
        [make_pair(picture(0), picture(0), caption=caption) for caption in (" ", "a dog on the beach")]
    )
    assert (lost.reason, lost.evidence) == ("no caption", {"captioner": "files"})
    assert kept.video.caption == "a dog on the beach"


def test_wrong_settings(tmp_path):
    with pytest.raises(SettingsError, match="captioner must be one of files, blip, got 'gpt'"):
        WriteCaptions(captioner="gpt")
    with pytest.raises(SettingsError, match="max_tokens and frames_per_batch must be at least 1, got 0 and 1"):
        WriteCaptions(max_tokens=0)
    with pytest.raises(SettingsError, match="--caption-model is for --caption blip"):
        WriteCaptions(model="some/model")
    assert WriteCaptions(captioner="blip").model == "Salesforce/blip-image-captioning-large"
    with pytest.raises(InputError, match="--caption-model: no directory at"):
        WriteCaptions(captioner="blip", model=str(tmp_path / "no/blip"))
    with pytest.raises(InputError, match=r"--caption-model: the directory .* lacks its configuration \(config.json\)"):
        WriteCaptions(captioner="blip", model=str(tmp_path))
    WriteCaptions(captioner="blip", model="owner/blip")  # the hub is asked when the model is needed


def test_files_that_do_not_serve(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="--caption-model: cannot load a BLIP from"):
        WriteCaptions(captioner="blip", model=str(tmp_path)).setup()
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.startswith("vision_model") and name.endswith("weight"))
    weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"BLIP .* is incomplete: its files lack {lost}"):
        WriteCaptions(captioner="blip", model=str(tmp_path)).setup()
