import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.generation.safety import FLAGGED, SafetyChecker, Watermark, read_watermark
from msdiffusion.places import REPOSITORY

SCENE = REPOSITORY / "docs" / "pictures" / "world_scenes.png"


@pytest.fixture(scope="module")
def checker_dir(tmp_path_factory):
    """A random miniature of the safety checker, in the layout of its hub repository. Read it, don't write to it."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = tmp_path_factory.mktemp("checker")
    config = CLIPConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16,
        },
        projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        StableDiffusionSafetyChecker(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


def checker_with(folder, threshold):
    """No cosine is above 1 or below -1, so these thresholds flag nothing and everything."""
    checker = SafetyChecker.from_pretrained(folder)
    checker.checker.concept_embeds_weights.fill_(threshold)
    checker.checker.special_care_embeds_weights.fill_(2.0)
    return checker


def pictures():
    return [Image.new("RGB", (48, 40), color) for color in ("red", "green", "blue")]


def test_nothing_is_flagged_above_every_threshold(checker_dir, recwarn):
    given = pictures()
    assert checker_with(checker_dir, 1.5)(given) == given
    assert not [warning for warning in recwarn if "safety checker" in str(warning.message)]


def test_what_is_flagged_becomes_black_and_is_told(checker_dir):
    checker = checker_with(checker_dir, -1.5)
    with pytest.warns(UserWarning, match=r"flagged 3 of 3 pictures \(number 0, 1, 2, from 0\): they are black now"):
        found = checker(pictures())
    for picture in found:
        assert picture.size == (48, 40)
        assert picture.getextrema() == ((0, 0),) * 3
        assert picture.info[FLAGGED] is True


def test_only_the_picture_of_the_concept_is_flagged(checker_dir):
    """A concept that is the embedding of one picture, and a threshold that only it passes."""
    checker = checker_with(checker_dir, 2.0)
    given = pictures()
    pixels = checker.processor(given, return_tensors="pt").pixel_values
    embeds = checker.checker.visual_projection(checker.checker.vision_model(pixels)[1])
    likeness = torch.nn.functional.cosine_similarity(embeds[1:2], embeds).tolist()
    checker.checker.concept_embeds[4] = embeds[1]
    checker.checker.concept_embeds_weights[4] = (1 + max(likeness[0], likeness[2])) / 2
    with pytest.warns(UserWarning, match=r"flagged 1 of 3 pictures \(number 1, from 0\)"):
        assert [picture.info.get(FLAGGED, False) for picture in checker(given)] == [False, True, False]


def test_no_pictures_no_flags(checker_dir):
    assert checker_with(checker_dir, -1.5)([]) == []


def test_the_folder_of_a_pipeline_has_both(checker_dir, tmp_path):
    shutil.copytree(checker_dir, tmp_path / "safety_checker")
    shutil.copytree(checker_dir, tmp_path / "feature_extractor")
    ours = SafetyChecker.from_pretrained(tmp_path).checker.state_dict()
    theirs = SafetyChecker.from_pretrained(checker_dir, "cpu").checker.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_layout_of_the_released_file_is_read(checker_dir, tmp_path):
    """The release calls the tower's weights vision_model.vision_model; libraries have renamed them since."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checker_dir, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("vision_model.", "vision_model.vision_model.", 1)
        if name.count("vision_model.") == 1
        else name: value
        for name, value in weights.items()
    }
    assert any(name.startswith("vision_model.vision_model.") for name in old)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    SafetyChecker.from_pretrained(tmp_path)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_checkers_that_cannot_be_relied_on(checker_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(WeightsError, match="no safety checker can be read from"):
        SafetyChecker.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no safety checker can be read from nowhere/there/is"):
        SafetyChecker.from_pretrained("nowhere/there/is")
    shutil.copytree(checker_dir, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["concept_embeds"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="is incomplete: its files lack concept_embeds"):
        SafetyChecker.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Malice(tmp_path / "it_ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="it is a pickle of more than tensors, which could run code"):
        SafetyChecker.from_pretrained(tmp_path)
    assert not (tmp_path / "it_ran").exists()
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="no safety checker can be read from"):
        SafetyChecker.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------- the watermark


def scene(width, height):
    return Image.open(SCENE).convert("RGB").resize((width, height))


@pytest.mark.parametrize("text", ["x", "msdiffusion", "0123456789abcdef", "dög"])
@pytest.mark.parametrize("size", [(192, 192), (256, 256), (515, 301)])
def test_a_watermark_is_read_and_not_seen(text, size):
    picture = scene(*size)
    picture.info["note"] = "kept"
    [marked] = Watermark(text)([picture])
    assert (marked.size, marked.mode, marked.info["note"]) == (size, "RGB", "kept")
    assert read_watermark(marked) == text
    change = abs(np.asarray(marked).astype(int) - np.asarray(picture))
    assert change.max() <= 12
    assert change.mean() < 1.5


@pytest.mark.parametrize("color", ["black", "white", "red", "blue", "yellow", (0, 255, 255)])
def test_plain_and_saturated_colours_carry_it(color):
    assert read_watermark(Watermark("text")([Image.new("RGB", (256, 256), color)])[0]) == "text"


def test_pictures_without_one_give_none(tmp_path):
    assert read_watermark(scene(256, 256)) is None
    assert read_watermark(Image.new("RGB", (256, 256))) is None
    scene(256, 256).save(tmp_path / "scene.png")
    assert read_watermark(tmp_path / "scene.png") is None


@pytest.mark.parametrize(("name", "quality"), [("jpeg", 95), ("jpeg", 85), ("webp", 90), ("png", None)])
def test_it_outlasts_compression(name, quality):
    [marked] = Watermark("msdiffusion")([scene(512, 512)])
    file = io.BytesIO()
    marked.save(file, name, **({"quality": quality} if quality else {}))
    assert read_watermark(Image.open(file)) == "msdiffusion"


def test_the_format_of_invisible_watermark():
    """Decoded as that package's "dwtDctSvd" does: Haar transform, cosine transform, largest singular value.

    Checked against invisible-watermark 0.2.0 itself when this was written: it reads our pictures without an error.
    """
    from scipy.fft import dctn

    watermark = Watermark("msdiffusion")
    pixels = np.asarray(watermark([scene(256, 256)])[0]).astype(float)
    chroma = 0.492 * (pixels[..., 2] - pixels @ [0.299, 0.587, 0.114]) + 128
    band = (chroma[0::2, 0::2] + chroma[0::2, 1::2] + chroma[1::2, 0::2] + chroma[1::2, 1::2]) / 2
    votes = [[] for _ in watermark.bits]
    for number, (row, column) in enumerate(np.ndindex(32, 32)):
        block = dctn(band[4 * row : 4 * row + 4, 4 * column : 4 * column + 4], norm="ortho")
        votes[number % len(votes)].append(np.linalg.svd(block, compute_uv=False)[0] % 36 > 18)
    assert [np.mean(found) > 0.5 for found in votes] == watermark.bits.tolist()


@pytest.mark.parametrize("text", ["", "x" * 17, "ö" * 9, "a\0b", None, 3])
def test_texts_that_cannot_be_one(text):
    with pytest.raises(RequestError, match="a watermark is text of 1 to 16 bytes"):
        Watermark(text)


@pytest.mark.parametrize("size", [(64, 64), (184, 192), (4000, 7)])
def test_pictures_too_small_for_one(size):
    message = rf"{size[0]} x {size[1]} pixels is too small for a watermark: it needs 576 blocks"
    for attempt in (
        lambda: Watermark("x")([Image.new("RGB", size)]),
        lambda: Watermark("x").check_size(*size),
        lambda: read_watermark(Image.new("RGB", size)),
    ):
        with pytest.raises(RequestError, match=message):
            attempt()


def test_reading_what_is_no_picture(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_watermark(tmp_path / "nothing.png")
