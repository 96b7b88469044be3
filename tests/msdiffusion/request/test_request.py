import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from msdiffusion.errors import LayoutError, PhraseError, RequestError
from msdiffusion.request.request import check_auto_layout_start, check_request
from msdiffusion.request.subjects import WHOLE, check_subjects

PROMPT = "a dog and a teapot on the beach"
DOG, TEAPOT = Image.new("RGB", (8, 6), "red"), Image.new("RGBA", (6, 8), "blue")
LEFT, RIGHT = (0, 0.25, 0.5, 0.75), (0.5, 0.25, 1, 0.75)
GOOD = {"images": [DOG, TEAPOT], "boxes": [LEFT, RIGHT], "prompt": PROMPT, "phrases": ["dog", "teapot"]}


def test_a_good_request():
    request = check_request(**GOOD, num_images=2, height=64, width=128, scale=0, subject_scales=[1, 0.5], seed=0)
    assert request.subjects.boxes == (LEFT, RIGHT)
    assert [image.mode for image in request.subjects.images] == ["RGB", "RGBA"]
    assert (request.scale, request.subjects.scales) == (0, (1.0, 0.5))
    assert request.steps is None


def test_phrases_come_from_the_prompt():
    assert check_request(**{**GOOD, "phrases": None}).subjects.phrases == ("dog", "teapot")
    with pytest.raises(PhraseError, match="'dog', 'teapot', 'beach'"):
        check_request([DOG] * 5, [LEFT] * 5, PROMPT)


NAN = float("nan")
ONES = np.ones((3, 4), dtype=bool)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        # numbers of images, boxes and phrases
        ({"images": [DOG]}, RequestError, "1 images, 2 boxes, 2 phrases"),
        ({"boxes": [LEFT]}, RequestError, "2 images, 1 boxes, 2 phrases"),
        ({"phrases": ["dog"]}, RequestError, "2 images, 2 boxes, 1 phrases"),
        ({"images": [DOG], "phrases": None}, RequestError, "1 images, 2 boxes$"),
        ({"images": [DOG], "boxes": None}, RequestError, "1 images, 2 phrases$"),
        ({"images": [DOG, []]}, RequestError, r"images\[1\] is an empty list"),
        ({"images": [DOG, [TEAPOT, 3]]}, RequestError, r"images\[1\]\[1\] must be a PIL image"),
        ({"images": [], "boxes": [], "phrases": []}, RequestError, "no images"),
        ({"images": DOG}, RequestError, "images must be a list"),
        ({"phrases": "dog"}, RequestError, "phrases must be a list"),
        # boxes
        ({"boxes": [LEFT, (0, 0, 1.5, 1)]}, LayoutError, r"boxes\[1\].*leaves the picture"),
        ({"boxes": [LEFT, (0.9, 0, 0.1, 1)]}, LayoutError, r"boxes\[1\].*reversed"),
        ({"boxes": [0, 0, 1, 1]}, LayoutError, r"one for each image, got \[0, 0, 1, 1\]: \[\[0, 0, 1, 1\]\] is a list"),
        ({"boxes": 3}, LayoutError, "boxes must be a list of boxes"),
        ({"boxes": [LEFT, (0, 0, 1)]}, LayoutError, r"boxes\[1\].*four numbers"),
        ({"boxes": [LEFT, (0, 0, NAN, 1)]}, LayoutError, r"boxes\[1\].*not finite"),
        # masks
        ({"masks": [ONES]}, LayoutError, r"one mask, or None, per subject \(2\), got 1"),
        ({"masks": ONES}, RequestError, "masks must be a list"),
        ({"masks": [None, ~ONES]}, LayoutError, r"masks\[1\] is empty"),
        ({"masks": [None, ONES[None]]}, LayoutError, r"masks\[1\] is bool of shape \(1, 3, 4\)"),
        ({"masks": [None, ONES.astype(float)]}, LayoutError, r"masks\[1\] is float64"),
        ({"masks": [None, Image.new("L", (4, 4), 128)]}, LayoutError, "other colours than black and white"),
        ({"masks": [None, Image.new("RGB", (4, 4), "red")]}, LayoutError, "other colours than black and white"),
        ({"masks": [None, Image.new("RGBA", (4, 4))]}, LayoutError, "transparency"),
        ({"masks": [None, "nowhere.png"]}, RequestError, r"masks\[1\]: no such file"),
        # windows
        ({"subject_windows": [(0, 1)]}, RequestError, r"per subject \(2\), got 1"),
        ({"subject_windows": [None, (0.5, 0.5)]}, RequestError, r"subject_windows\[1\] must be.*start < end"),
        ({"subject_windows": [None, (0, 2)]}, RequestError, r"subject_windows\[1\] must be a number in \[0, 1\]"),
        ({"subject_windows": [None, 0.5]}, RequestError, r"subject_windows\[1\] must be \(start, end\)"),
        # without a layout
        ({"boxes": None, "phrases": ["dog", "cat"]}, PhraseError, "'cat' is needed in the prompt"),
        ({"latents": np.zeros((2, 4, 8, 8))}, RequestError, r"latents must be \(1, channels, rows, columns\)"),
        # text
        ({"prompt": ""}, RequestError, "prompt is empty"),
        ({"prompt": " \n"}, RequestError, "prompt is empty"),
        ({"prompt": None}, RequestError, "prompt is empty"),
        ({"phrases": ["dog", " "]}, PhraseError, r"phrases\[1\]"),
        ({"phrases": ["dog", 3]}, PhraseError, r"phrases\[1\]"),
        ({"phrases": ["dog", "cat"], "auto_layout": True}, PhraseError, "'cat' is needed in the prompt"),
        ({"phrases": ["dog", "dog"], "auto_layout": True}, PhraseError, "needed 2 times"),
        ({"negative_prompt": 3}, RequestError, "negative_prompt"),
        ({"prompt": ["a dog", "a cat"]}, RequestError, r"prompt is one text, got \['a dog', 'a cat'\].*generate_batch"),
        ({"prompt": (PROMPT,)}, RequestError, "prompt is one text"),
        ({"images": PROMPT, "prompt": [[0, 0, 1, 1]]}, RequestError, "the order is images, boxes, prompt"),
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
        ({"scale": NAN}, RequestError, "scale must be a number in \\[0, 1000\\]"),
        ({"scale": -1}, RequestError, "scale must be"),
        ({"scale": "0.6"}, RequestError, "scale must be"),
        ({"guidance_scale": float("inf")}, RequestError, "guidance_scale"),
        ({"subject_scales": [1]}, RequestError, r"one number per subject \(2\), got 1"),
        ({"subject_scales": [1, -1]}, RequestError, r"subject_scales\[1\]"),
        ({"auto_layout_threshold": 1.5}, RequestError, r"auto_layout_threshold must be a number in \[0, 1\]"),
        ({"auto_layout_start": 0}, RequestError, "auto_layout_start"),
        # numbers that no float, and no Python text, can hold
        ({"scale": 10**400}, RequestError, "scale must be a number in \\[0, 1000\\]"),
        ({"scale": 10**5000}, RequestError, "scale must be.*got int of more digits"),
        ({"steps": 10**5000}, RequestError, "steps must be at most 1000, got int of more digits"),
        ({"seed": 10**5000}, RequestError, "seed must be at most"),
        ({"boxes": [LEFT, (0, 0, 10**400, 1)]}, LayoutError, r"boxes\[1\].*four numbers"),
        ({"subject_windows": [None, (0, 10**400)]}, RequestError, r"subject_windows\[1\] must be a number"),
        ({"auto_layout_start": 10**9}, RequestError, "auto_layout_start must be at most 2000"),
        # no numbers
        ({"boxes": [LEFT, ("0", "0", "1", "1")]}, LayoutError, r"boxes\[1\].*four numbers"),
        ({"boxes": [LEFT, (False, 0, 1, 1)]}, LayoutError, r"boxes\[1\].*four numbers"),
        ({"boxes": [LEFT, np.array([0, 0, 1, 1], dtype=bool)]}, LayoutError, r"boxes\[1\].*four numbers"),
        ({"scale": np.True_}, RequestError, "scale must be a number"),
        ({"subject_scales": np.ones(2, dtype=bool)}, RequestError, r"subject_scales\[0\] must be a number"),
        ({"num_images": np.True_}, RequestError, "num_images must be a whole number"),
        ({"num_images": np.float64(2)}, RequestError, "num_images must be a whole number"),
        # more than there can be
        ({"height": 80_000_000}, RequestError, "height must be at most 8192, got 80000000"),
        ({"width": 8200}, RequestError, "width must be at most 8192"),
        ({"images": [DOG] * 257, "boxes": None, "phrases": None}, RequestError, "257 references.*256 at most"),
        ({"images": [DOG, [TEAPOT] * 256]}, RequestError, "257 references.*256 at most"),
        # text that no tokenizer reads
        ({"prompt": PROMPT + "x" * 10_000}, RequestError, "the prompt has 10031 characters; 10000 are read"),
        ({"prompt": PROMPT + "\ud800"}, RequestError, r"the prompt holds '\\ud800', half of a character"),
        ({"negative_prompt": "\udfff"}, RequestError, "negative_prompt holds"),
        ({"phrases": ["dog", "\ud83d"]}, PhraseError, r"phrases\[1\] holds"),
        ({"phrases": ["dog", "x" * 10_001]}, PhraseError, r"phrases\[1\] has 10001 characters"),
        ({"images": [DOG, "x" * 5000]}, RequestError, r"images\[1\]: 'x+\.\.\. is not a picture"),
        ({"images": [DOG, "a\0b"]}, RequestError, r"images\[1\]"),
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


def test_numbers_of_any_library_are_numbers():
    import torch

    arguments = {
        **GOOD, "num_images": np.int64(3), "steps": torch.tensor(7), "height": np.int32(64), "seed": np.uint8(5),
        "scale": np.float32(0.5), "subject_scales": np.array([1.0, 0.5]),
        "boxes": torch.tensor([LEFT, RIGHT]), "subject_windows": [np.array([0, 0.5]), None],
        "masks": np.stack([ONES, ONES]),
    }  # fmt: skip
    request = check_request(**arguments)
    numbers = (request.num_images, request.steps, request.height, request.seed)
    assert numbers == (3, 7, 64, 5)
    assert {type(number) for number in numbers} == {int}
    subjects = request.subjects
    assert (subjects.scales, subjects.boxes, subjects.windows) == ((1.0, 0.5), (LEFT, RIGHT), ((0, 0.5), (0, 1)))
    assert all(np.array_equal(mask, ONES) for mask in subjects.masks)
    both = check_request(**{**arguments, "subject_windows": np.array([[0, 0.5], [0.5, 1]])})
    assert both.subjects.windows == ((0, 0.5), (0.5, 1))


def test_repeated_phrases_mean_later_occurrences_unless_the_box_is_the_same():
    prompt = "a dog beside a dog"
    three = {"images": [DOG] * 3, "prompt": prompt, "phrases": ["dog", "Dog", "dog"]}
    assert check_request(**three, boxes=[LEFT, RIGHT, LEFT], auto_layout=True).subjects.occurrences == (0, 1, 0)


def test_auto_layout_that_starts_too_late_is_said():
    automatic = check_request(**GOOD, auto_layout=True).subjects
    with pytest.warns(UserWarning, match="no effect.*step 5, but there are 3"):
        check_auto_layout_start(automatic, 3)
    free = check_request(**{**GOOD, "boxes": [LEFT, None]}).subjects
    with pytest.raises(RequestError, match="without a box needs auto layout, which starts at step 2, but there are 1"):
        check_auto_layout_start(free, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_auto_layout_start(automatic, 5)
        check_auto_layout_start(free, 2)
        check_auto_layout_start(check_request(**GOOD).subjects, 1)


def test_checking_loads_no_torch():
    code = (
        "import sys; from PIL import Image; from msdiffusion.request.request import check_request\n"
        "check_request([Image.new('RGB', (4, 4))], [(0, 0, 1, 1)], 'a dog', ['dog'])\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(RequestError, match="at most 9223372036854775807"):
        check_request([Image.new("RGB", (8, 8))], [[0, 0, 1, 1]], "a dog", ["dog"], seed=2**70)


def test_a_box_without_area_leaves_its_subject_out_and_says_so():
    with pytest.warns(UserWarning, match=r"boxes\[1\] has no area, so that subject is left out"):
        request = check_request(**{**GOOD, "boxes": [LEFT, (0.5, 0, 0.5, 1)]})
    assert request.subjects.boxes[1] == (0.5, 0, 0.5, 1)


def test_views_of_a_subject_share_what_it_is_called_and_where_it_goes():
    request = check_request(
        [[DOG, TEAPOT, DOG], TEAPOT], [LEFT, None], PROMPT, ["dog", "teapot"],
        subject_scales=[0.5, 1], subject_windows=[(0, 0.5), None],
    )  # fmt: skip
    subjects = request.subjects
    assert len(subjects.images) == 4
    assert subjects.numbers == (0, 0, 0, 1)
    assert subjects.phrases == ("dog",) * 3 + ("teapot",)
    assert subjects.boxes == (LEFT,) * 3 + (None,)
    assert subjects.scales == (0.5,) * 3 + (1,)
    assert subjects.windows == ((0, 0.5),) * 3 + ((0, 1),)


def test_without_boxes_subjects_find_their_place_by_the_text_from_the_start():
    free = check_request(**{**GOOD, "boxes": None}).subjects
    assert free.boxes == (None, None)
    assert (free.auto_layout, free.auto_layout_starts) == ((True, True), (2, 2))
    mixed = check_request(**{**GOOD, "boxes": [LEFT, None]}).subjects
    assert (mixed.auto_layout, mixed.auto_layout_starts) == ((False, True), (5, 2))
    assert check_request(**GOOD, auto_layout=True, auto_layout_start=3).subjects.auto_layout_starts == (3, 3)


def test_masks_of_any_kind_bring_their_box_along(tmp_path):
    mask = np.zeros((4, 8), dtype=bool)
    mask[1:3, 2:4] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for given in (mask, Image.fromarray(mask), Image.fromarray(mask).convert("L"), tmp_path / "mask.png"):
        subjects = check_request(**{**GOOD, "boxes": None, "masks": [given, None]}).subjects
        assert np.array_equal(subjects.masks[0], mask)
        assert subjects.boxes == ((0.25, 0.25, 0.5, 0.75), None)
        assert subjects.auto_layout == (False, True)
    assert check_request(**{**GOOD, "masks": [mask, None]}).subjects.boxes == (LEFT, RIGHT)


def test_subjects_alone_need_phrases_or_a_prompt():
    assert check_subjects([DOG], [WHOLE], ["dog"]).phrases == ("dog",)
    with pytest.raises(TypeError, match=r"MSDiffusion.condition\(\) got an unexpected keyword argument 'mask'"):
        check_subjects([DOG], [WHOLE], ["dog"], mask=None)
    assert check_subjects([DOG], [WHOLE], None, prompt="a dog").phrases == ("dog",)
    with pytest.raises(RequestError, match="one phrase per subject, or the prompt"):
        check_subjects([DOG], [WHOLE], None)
    with pytest.raises(RequestError, match="auto_layout follows the text's attention.*give the prompt"):
        check_subjects([DOG], [WHOLE], ["dog"], auto_layout=True)
    with pytest.raises(RequestError, match="subject 0 has no box, so its place follows"):
        check_subjects([DOG], None, ["dog"])
