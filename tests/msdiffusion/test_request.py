import subprocess
import sys

import pytest
from PIL import Image

from msdiffusion.errors import LayoutError, PhraseError, RequestError
from msdiffusion.request import check_request, open_reference

PROMPT = "a dog and a teapot on the beach"
DOG, TEAPOT = Image.new("RGB", (8, 6), "red"), Image.new("RGBA", (6, 8))
LEFT, RIGHT = (0, 0.25, 0.5, 0.75), (0.5, 0.25, 1, 0.75)
GOOD = {"images": [DOG, TEAPOT], "boxes": [LEFT, RIGHT], "prompt": PROMPT, "phrases": ["dog", "teapot"]}


def test_a_good_request():
    request = check_request(**GOOD, num_images=2, height=64, width=128, scale=0, subject_scales=[1, 0.5], seed=0)
    assert request.boxes == (LEFT, RIGHT)
    assert [image.mode for image in request.images] == ["RGB", "RGBA"]
    assert (request.scale, request.subject_scales) == (0, (1.0, 0.5))
    assert request.steps is None


def test_phrases_come_from_the_prompt():
    assert check_request(**{**GOOD, "phrases": None}).phrases == ("dog", "teapot")
    with pytest.raises(PhraseError, match="'dog', 'teapot', 'beach'"):
        check_request([DOG] * 5, [LEFT] * 5, PROMPT)


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        # numbers of images, boxes and phrases
        ({"images": [DOG]}, RequestError, "1 images, 2 boxes, 2 phrases"),
        ({"boxes": [LEFT]}, RequestError, "2 images, 1 boxes, 2 phrases"),
        ({"phrases": ["dog"]}, RequestError, "2 images, 2 boxes, 1 phrases"),
        ({"images": [DOG], "phrases": None}, RequestError, "1 images, 2 boxes$"),
        ({"images": [], "boxes": [], "phrases": []}, RequestError, "no images"),
        ({"images": DOG}, RequestError, "images must be a list"),
        ({"phrases": "dog"}, RequestError, "phrases must be a list"),
        # boxes
        ({"boxes": [LEFT, (0, 0, 1.5, 1)]}, LayoutError, r"boxes\[1\].*leaves the picture"),
        ({"boxes": [LEFT, (0.9, 0, 0.1, 1)]}, LayoutError, r"boxes\[1\].*reversed"),
        ({"boxes": [LEFT, (0.5, 0, 0.5, 1)]}, LayoutError, r"boxes\[1\].*empty"),
        ({"boxes": [LEFT, (0, 0, 1)]}, LayoutError, r"boxes\[1\].*four numbers"),
        ({"boxes": [LEFT, (0, 0, NAN, 1)]}, LayoutError, r"boxes\[1\].*not finite"),
        # text
        ({"prompt": ""}, RequestError, "prompt is empty"),
        ({"prompt": " \n"}, RequestError, "prompt is empty"),
        ({"prompt": None}, RequestError, "prompt is empty"),
        ({"phrases": ["dog", " "]}, PhraseError, r"phrases\[1\]"),
        ({"phrases": ["dog", 3]}, PhraseError, r"phrases\[1\]"),
        ({"phrases": ["dog", "cat"], "auto_layout": True}, PhraseError, "'cat' is needed in the prompt"),
        ({"phrases": ["dog", "dog"], "auto_layout": True}, PhraseError, "needed 2 times"),
        ({"negative_prompt": 3}, RequestError, "negative_prompt"),
        # sizes
        ({"height": 100}, RequestError, "height is 100.*multiple of 8.*for example 96|for example 104"),
        ({"width": 1001}, RequestError, "width is 1001.*multiple of 8: for example 1000"),
        ({"width": 0}, RequestError, "width must be a whole number of at least 8"),
        ({"width": 64.0}, RequestError, "width must be a whole number"),
        # other numbers
        ({"num_images": 0}, RequestError, "num_images"),
        ({"steps": 0}, RequestError, "steps"),
        ({"steps": True}, RequestError, "steps"),
        ({"seed": -1}, RequestError, "seed"),
        ({"batch_size": 0}, RequestError, "batch_size"),
        ({"scale": NAN}, RequestError, "scale must be a number of at least 0"),
        ({"scale": -1}, RequestError, "scale must be"),
        ({"scale": "0.6"}, RequestError, "scale must be"),
        ({"guidance_scale": float("inf")}, RequestError, "guidance_scale"),
        ({"subject_scales": [1]}, RequestError, r"one number per image \(2\), got 1"),
        ({"subject_scales": [1, -1]}, RequestError, r"subject_scales\[1\]"),
        ({"auto_layout_threshold": 1.5}, RequestError, r"auto_layout_threshold must be a number in \[0, 1\]"),
        ({"auto_layout_start": 0}, RequestError, "auto_layout_start"),
        ({"output_type": "jpeg"}, RequestError, "output_type must be one of pil, np, pt, latent"),
        # references
        ({"images": [DOG, "nowhere.png"]}, RequestError, r"images\[1\]: no such file: nowhere.png"),
        ({"images": [DOG, 3]}, RequestError, r"images\[1\] must be a PIL image"),
        ({"images": [DOG, Image.new("RGB", (0, 5))]}, RequestError, r"images\[1\] has no pixels"),
    ],
)
def test_bad_requests(changes, error, message):
    with pytest.raises(error, match=message):
        check_request(**{**GOOD, **changes})


def test_a_file_that_is_no_picture(tmp_path):
    for name, content in (("text.png", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match="not a picture"):
            open_reference(tmp_path / name)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("RGB", "RGB"), ("RGBA", "RGBA"), ("L", "RGB"), ("LA", "RGBA"), ("1", "RGB"), ("CMYK", "RGB")],
)
def test_references_of_any_mode(tmp_path, mode, expected):
    assert open_reference(Image.new(mode, (4, 4))).mode == expected


def test_a_photo_taken_upright_stands_upright(tmp_path):
    sideways = Image.new("RGB", (8, 4), "white")
    sideways.paste("black", (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    for name in ("photo.png", "photo.webp", "photo.tiff"):
        sideways.save(tmp_path / name, exif=exif, lossless=True)
        for picture in (tmp_path / name, Image.open(tmp_path / name)):
            opened = open_reference(picture)
            assert opened.size == (4, 8)
            assert opened.getpixel((1, 0)) == (0, 0, 0)
            assert opened.getpixel((1, 7)) == (255, 255, 255)


def test_references_from_files_keep_their_transparency(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "cut_out.png")
    opened = open_reference(tmp_path / "cut_out.png")
    assert opened.mode == "RGBA"
    assert opened.getpixel((0, 0)) == (1, 2, 3, 4)
    assert open_reference(str(tmp_path / "cut_out.png")).mode == "RGBA"


def test_repeated_phrases_mean_later_occurrences_unless_the_box_is_the_same():
    prompt = "a dog beside a dog"
    three = {"images": [DOG] * 3, "prompt": prompt, "phrases": ["dog", "Dog", "dog"]}
    assert check_request(**three, boxes=[LEFT, RIGHT, LEFT], auto_layout=True).occurrences == (0, 1, 0)


def test_auto_layout_that_starts_too_late_is_said():
    with pytest.warns(UserWarning, match="no effect.*step 5, but there are 3"):
        check_request(**GOOD, auto_layout=True, steps=3)


def test_checking_loads_no_torch():
    code = (
        "import sys; from PIL import Image; from msdiffusion.request import check_request\n"
        "check_request([Image.new('RGB', (4, 4))], [(0, 0, 1, 1)], 'a dog', ['dog'])\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(RequestError, match="at most 9223372036854775807"):
        check_request([Image.new("RGB", (8, 8))], [[0, 0, 1, 1]], "a dog", ["dog"], seed=2**70)
