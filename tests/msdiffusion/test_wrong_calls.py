"""Wrong calls of the model in Python, one table per door: each is told in one sentence, nothing is computed for it."""

import copy
import inspect
import io
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from msdiffusion import MSDiffusion
from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.errors import LayoutError, MSDiffusionError, RequestError
from msdiffusion.request.request import DEFAULTS

DOG = Image.new("RGB", (64, 64), "red")
GOOD = {
    "images": [DOG], "boxes": [(0, 0, 1, 1)], "prompt": "a dog on the beach", "phrases": ["dog"], "steps": 1, "seed": 0,
    "progress": False,
}  # fmt: skip
REQUEST = {name: value for name, value in GOOD.items() if name != "progress"}


@pytest.fixture(scope="module")
def model(new_model):
    """Its UNet must not be called."""
    model = new_model()
    model.pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("something was computed"))
    return model


def test_the_signature_says_what_is_taken_where_an_argument_is_left_out():
    signature = inspect.signature(MSDiffusion.generate).parameters
    assert {name: signature[name].default for name in DEFAULTS} == DEFAULTS
    others = {"self", "images", "boxes", "prompt", "phrases", "progress", "batch_size", "pipeline_options"}
    assert signature.keys() == DEFAULTS.keys() | others


class Odd:
    """Something else."""

    def __repr__(self):
        return "<odd>"


def check(call, told):
    """One sentence of ours, which holds the words."""
    with pytest.raises(MSDiffusionError, match=re.escape(told)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


SCHEDULER = "DDIMScheduler takes no {}: take another scheduler, for instance EulerDiscreteScheduler"
GENERATE = [
    # true or false
    *(("auto_layout", value, "auto_layout must be true or false, got ") for value in ("no", "True", 1, None, [],
     Odd())),
    *(("progress", value, "progress must be true or false, got ") for value in ("no", 0, None)),
    # functions
    *(("callback_on_step_end", value, "callback_on_step_end must be a function of") for value in ("x", 3, [1], Odd())),
    *(("callback_on_step_end_tensor_inputs", value, "must be a list of latents, prompt_embeds") for value in ("x", [1],
     3)),
    # numbers
    *(("guidance_scale", value, f"guidance_scale must be a number in [0, 1000], got {value!r}")
      for value in (1e30, 1001, "7", True, -1)),
    *(("scale", value, f"scale must be a number in [0, 1000], got {value!r}") for value in (1e38, 1000.5, [1])),
    ("subject_scales", [1e10], "subject_scales[0] must be a number in [0, 1000], got 10000000000.0"),
    ("num_images", 100_000, "num_images must be at most 1000, got 100000"),
    ("num_images", 1e5, "num_images must be a whole number of at least 1, got 100000.0"),
    ("steps", 2000, "steps must be at most 1000, got 2000"),
    ("steps", "30", "steps must be a whole number of at least 1, got '30'"),
    *(("batch_size", value, told) for value, told in (
        ("x", "batch_size must be a whole number"), (0, "of at least 1, got 0"), (True, "got True"),
        (10**6, "batch_size must be at most 256, got 1000000"), (2**70, "batch_size must be at most 256"),
    )),
    ("auto_layout_start", 2001, "auto_layout_start must be at most 2000"),
    ("auto_layout_threshold", None, "auto_layout_threshold must be a number in [0, 1], got None"),
    ("height", 8200, "height must be at most 8192"),
    *((name, value, f"{name} must be a number in [0, 1], got {value!r}")
      for name in ("guidance_rescale", "eta") for value in ("x", -3, 5, [1, 2], math.nan)),
    *(("denoising_end", value, "denoising_end must be a number in [1e-06, 1], got") for value in ("x", -3, 2.0, 0.0,
     [1])),
    *((name, value, f"{name} must be two whole numbers, of rows and of columns, got")
      for name in ("original_size", "target_size", "crops_coords_top_left", "negative_original_size")
      for value in ("x", 5, (1,), (1, 2, 3))),
    ("original_size", {1, 2}, "original_size must be two whole numbers"),
    ("output_type", np.zeros(3), "output_type must be one of pil, np, pt, latent, got array([0., 0., 0.])"),
    ("original_size", (0, 64), "each must be a whole number of at least 1, got 0"),
    ("original_size", ("a", "b"), "each must be a whole number of at least 1, got 'a'"),
    ("target_size", (1e9, 1e9), "each must be a whole number of at least 1, got 1000000000.0"),
    ("crops_coords_top_left", (-1, 0), "each must be a whole number of at least 0, got -1"),
    # schedules
    *(("timesteps", value, SCHEDULER.format("timesteps")) for value in ("x", [999], 5)),
    ("sigmas", [1.0], SCHEDULER.format("sigmas")),
    # text
    *((name, value, f"{name} must be text, got") for name in ("prompt_2", "negative_prompt_2")
      for value in (3, b"x", {}, ["a", "b"])),
    ("negative_prompt", ["a"], "negative_prompt must be text, got ['a']"),
    ("prompt_2", "x" * 20_000, "prompt_2 has 20000 characters; 10000 are read at most"),
    # what other methods need
    *(("cross_attention_kwargs", value, "cross_attention_kwargs must be a mapping of names to values, without subjects")
      for value in ("x", 3, ["subjects"], {"subjects": 3})),
    *(("ip_adapter_image", value, "ip_adapter_image is for an IP-Adapter, and none is loaded") for value in ("x", 3,
     DOG)),
    ("ip_adapter_image_embeds", [1], "none is loaded: model.pipeline.load_ip_adapter(...) first"),
    ("prompt_embeds", torch.zeros(1, 40, 48), "prompt_embeds needs pooled_prompt_embeds beside it"),
    ("negative_prompt_embeds", torch.zeros(1, 40, 48), "negative_prompt_embeds needs negative_pooled_prompt_embeds"),
    ("pooled_prompt_embeds", "x", "pooled_prompt_embeds must be of one prompt, with 1 as first size, got str"),
    # pictures
    ("masks", [np.ones((8193, 8193), bool)],
     "masks[0] has 8193 x 8193 pixels, with which the masks have more than 67,108,864 "
     "together, the most that are read: make them smaller"),
    ("images", (DOG for _ in range(2)), "images must be a list with one item per subject, got generator"),
    ("boxes", {0: 1}, "boxes must be a list of boxes"),
    ("latents", [1], "latents must be (1, channels, rows, columns) for 1 pictures: list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "told"), GENERATE, ids=range(len(GENERATE)))
def test_generate(name, value, told, model):
    check(lambda: model.generate(**{**GOOD, name: value}), told)


SCHEDULES = ["x", 5, [], ["a"], [999, "x"], [-3], [1, 999], [math.nan], np.zeros((2, 2)), [1.0] * 1001]


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, value) for name in ("timesteps", "sigmas") for value in SCHEDULES), ("timesteps", [1000])],
)
def test_schedules(name, value, model, monkeypatch):
    scheduler = EulerDiscreteScheduler.from_config(model.pipeline.scheduler.config)
    monkeypatch.setattr(model.pipeline, "scheduler", scheduler)
    check(
        lambda: model.generate(**GOOD, **{name: value}),
        f"{name} must be 1 to 1000 numbers from high to low, at least 0",
    )


REQUESTS = [
    *((value, "requests must be a list with a mapping of generate's arguments for each request, got")
      for value in ("x", b"x", None, 3, REQUEST, Odd())),
    *(([value], "requests[0] must be a mapping of generate's arguments") for value in (3, "a", None, [1], {1: 2})),
    ([REQUEST, {"images": [DOG]}], "requests[1] has no prompt"),
    ([{}], "requests[0] has no images and no prompt"),
    ([], "no requests: there is nothing to draw"),
    ([{**REQUEST, "batch_size": 2}], "requests[0]: batch_size are of the whole call"),
    ([{**REQUEST, "auto_layout": "no"}], "auto_layout must be true or false, got 'no'"),
    ([{**REQUEST, "self": 1}], "generate takes no 'self'"),
    ([{**REQUEST, "height": 4096, "width": 4096}] * 8,
     "8 pictures of 4096 x 4096 (width x height) have 134,217,728 pixels; "
     "67,108,864 are drawn at once at most: 4 such pictures, which the batch size says"),
]  # fmt: skip


@pytest.mark.parametrize(("requests", "told"), REQUESTS, ids=range(len(REQUESTS)))
def test_generate_batch(requests, told, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(lambda: model.generate_batch(requests, progress=False), told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *(({"on_result": value}, "on_result must be a function of (index, result), got") for value in ("x", 3, [1])),
        ({"batch_size": 257}, "batch_size must be at most 256, got 257"),
        ({"progress": "no"}, "progress must be true or false, got 'no'"),
    ],
)
def test_generate_batch_options(options, told, model):
    check(lambda: model.generate_batch([REQUEST], **options), told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *(({"guidance": value}, "guidance must be true or false, got") for value in ("x", 3, "yes", 0)),
        *(({"num_images": value}, "num_images must be") for value in ("x", 0, 1.5, None, 10**6, True)),
        *(({"scale": value}, "scale must be a number in [0, 1000], got") for value in ("x", -1, 1e38, True)),
        ({"auto_layout": "no", "prompt": "a dog"}, "auto_layout must be true or false, got 'no'"),
        ({"auto_layout": True}, "auto_layout follows the text's attention to the phrases: give the prompt"),
        *(({"prompt": value}, "the prompt must be text, got") for value in (3, ["a"], b"")),
        *(({"images": value}, "images must be a list with one item per subject") for value in ("x", None, 3)),
        ({"boxes": "x"}, "boxes must be a list of boxes"),
        ({"phrases": None}, "give one phrase per subject, or the prompt to read them from"),
        ({"subject_windows": "x"}, "subject_windows must be a list with one item per subject"),
    ],
)
def test_condition(changes, told, model):
    good = {"images": [DOG], "boxes": [(0, 0, 1, 1)], "phrases": ["dog"]}
    check(lambda: model.condition(**{**good, **changes}), told)


@pytest.mark.parametrize(
    ("place", "options", "told"),
    [
        *((value, {}, "is given by its folder, file or hub name, got") for value in (None, Odd(), 3, "",
         b"x", [], "\n")),
        ("a\0b", {}, "nothing can have the name"),
        ("x" * 5000, {}, "nothing can have the name 'xxx"),
        *((None, {name: value}, f"{name}= is given by its folder, file or hub name, got")
          for name in ("base_model", "image_encoder", "base_config") for value in (3, "", b"x", [], {}, Odd())),
        *((None, {name: "x" * 5000}, f"{name}=: nothing can have the name 'xxx")
          for name in ("base_model", "image_encoder", "base_config")),
        *((None, {"device": value}, f"device {value!r} cannot be used here (")
          for value in ("tpu", "hpu", "xla", "mps", "", b"cpu", [], "cuda:-1", "meta", {})),
        *((None, {"torch_dtype": value}, "torch_dtype must be torch.float32") for value in (3, "", "int8", b"float16",
         float)),
    ],
)  # fmt: skip
def test_from_pretrained(place, options, told, tiny_model_dir):
    model = tiny_model_dir if place is None and options else place
    check(lambda: MSDiffusion.from_pretrained(model, **{"device": "cpu", **options}), told)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        *(
            (value, "directory must be the path of a place to write to, got")
            for value in (None, 3, b"x", [], "", "a\0b")
        ),
        ("/dev/null", "directory must be a folder, but '/dev/null' is no folder"),
        ("/dev/null/x", "directory must be a folder, but '/dev/null' is no folder"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_save_pretrained(place, told, model):
    check(lambda: model.save_pretrained(place), told)
    check(lambda: model.save_pretrained(place, include_backbone=True), told)


def test_save_pretrained_takes_no_word_for_true(model, tmp_path):
    check(
        lambda: model.save_pretrained(tmp_path / "x", include_backbone="yes"), "include_backbone must be true or false"
    )
    assert not (tmp_path / "x").exists()


def condition(**changes):
    tensors = {"keys": {"a": torch.zeros(1, 4, 8)}, "values": {"a": torch.zeros(1, 4, 8)}, "boxes": torch.rand(1, 2, 4)}
    return SubjectCondition(**{**tensors, **changes})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: condition(masks=torch.ones(1, 3, 8, 8, dtype=torch.bool)), "masks must be (1, 2, height, width)"),
        (lambda: condition(masks=[[None] * 3]), "masks must be (1, 2, height, width) for these boxes, got [3]"),
        (lambda: condition(windows=torch.zeros(1, 3, 2)), "windows must be (1, 2, 2) for these boxes"),
        (lambda: condition(boxes=torch.rand(1, 3, 4)), "1 x 3 boxes do not fit keys of shape (1, 4, 8) in layer a"),
        (lambda: condition(boxes=torch.rand(4)), "boxes must be (pictures, subjects, 4), got (4,)"),
        (lambda: condition(boxes=torch.rand(1, 2, 5)), "boxes must be (pictures, subjects, 4), got (1, 2, 5)"),
        (lambda: condition(boxes=[[0, 0, 1, 1]]), "boxes must be (pictures, subjects, 4), got list"),
        (lambda: condition(boxes=torch.zeros(1, 0, 4)), "boxes must be (pictures, subjects, 4), got (1, 0, 4)"),
        (lambda: condition(num_images="x"), "num_images must be a whole number of at least 1, got 'x'"),
        (lambda: condition(num_images=0), "num_images must be a whole number of at least 1, got 0"),
        (lambda: condition(guidance="yes"), "guidance must be true or false, got 'yes'"),
        (lambda: condition(boxes=torch.rand(2, 2, 4), keys={}, values={}, num_images=3),
         "layouts for 2 pictures do not fit"),
        (lambda: condition(auto_layout=AutoLayout(torch.zeros(1, 3, 2), 0.5, 5)),
         "spans must be (1, 2, 2) for these boxes"),
        (lambda: condition().layout_maps(), "there are no layout maps: they are gathered by a run with auto_layout"),
        (lambda: condition().rows(3),
         "the UNet's batch should be 1, or 2 with guidance, but it is 3"),
    ],
)  # fmt: skip
def test_subject_condition(call, told):
    check(call, told)


def test_the_tables_are_long():
    assert len(GENERATE) + len(REQUESTS) > 110


# ---- what is right stays right


def test_what_is_like_true_of_other_libraries_is_true(model):
    check(lambda: model.generate(**{**GOOD, "auto_layout": np.True_, "phrases": ["cat"]}), "the phrase 'cat' is needed")


def test_a_copy_draws_on_its_own_and_a_pickle_is_refused(new_model):
    model = new_model()
    expected = model.generate(**GOOD, output_type="pt")
    other = copy.deepcopy(model)
    next(other.pipeline.unet.parameters()).data.zero_()
    assert torch.equal(model.generate(**GOOD, output_type="pt"), expected)
    assert torch.equal(copy.copy(model).generate(**GOOD, output_type="pt"), expected)
    for pickled in (lambda: pickle.dumps(model), lambda: torch.save(model, io.BytesIO())):
        check(pickled, "a model is not pickled: for a file, save_pretrained(folder) and from_pretrained(folder)")


@pytest.mark.parametrize("returns", [True, False])
def test_numbers_that_a_callback_spoils_are_its_own_fault(new_model, returns):
    def spoil(pipeline, step, timestep, tensors):
        tensors["latents"].fill_(math.nan)
        return tensors if returns else None

    with pytest.raises(RequestError, match="callback_on_step_end gave latents that are no numbers .* after step 0"):
        new_model().generate(**GOOD, callback_on_step_end=spoil)


def test_a_callback_returns_a_mapping_or_nothing(new_model):
    with pytest.raises(RequestError, match="callback_on_step_end returned 3: it must return the mapping of tensors"):
        new_model().generate(**GOOD, callback_on_step_end=lambda *_: 3)


def test_what_the_pipeline_refuses_itself_is_told_with_the_options(new_model):
    wide = {"pooled_prompt_embeds": torch.zeros(1, 2), "prompt_embeds": torch.zeros(1, 40, 48)}
    with pytest.raises(
        RequestError, match="StableDiffusionXLPipeline cannot be called with pooled_prompt_embeds, prompt_e"
    ):
        new_model().generate(**GOOD, **wide)

    def fail(*_):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$") as caught:
        new_model().generate(**GOOD, callback_on_step_end=fail)
    assert not isinstance(caught.value, MSDiffusionError), "what a callback raises is not ours"


def test_none_is_as_good_as_left_out(new_model):
    model = new_model()
    expected = model.generate(**GOOD, output_type="pt")
    also = ("eta", "guidance_rescale", "callback_on_step_end_tensor_inputs", "original_size", "clip_skip")
    nothing = dict.fromkeys(also) | dict.fromkeys(
        ("prompt_embeds", "callback_on_step_end", "ip_adapter_image", "cross_attention_kwargs", "sigmas")
    )
    assert torch.equal(model.generate(**GOOD, **nothing, output_type="pt"), expected)


def test_more_steps_than_the_scheduler_has_are_told(model, monkeypatch):
    scheduler = EulerDiscreteScheduler.from_config(model.pipeline.scheduler.config, num_train_timesteps=20)
    monkeypatch.setattr(model.pipeline, "scheduler", scheduler)
    check(
        lambda: model.generate(**{**GOOD, "steps": 30}),
        "steps must be at most 20, the timesteps of EulerDiscreteScheduler",
    )


def test_phrases_that_the_prompt_does_not_hold_are_told_and_their_order_is_free(model):
    two = {"images": [DOG, DOG], "boxes": [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]}
    prompt = "a dog and a teapot on the beach"
    with pytest.warns(
        UserWarning, match="the prompt does not hold 'cat', so the base model is not told of it: name every"
    ):
        model.condition(**two, phrases=["dog", "cat"], prompt=prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.condition(**two, phrases=["teapot", "Dog"], prompt=prompt)


def test_a_picture_of_several_is_told(tmp_path):
    from msdiffusion.request.pictures import open_reference

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp", "pages.tiff", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match=f"{name}' holds several pictures, of which the first is taken"):
            found = open_reference(tmp_path / name, "images[0]")
        assert found.getpixel((0, 0))[0] > 200
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_reference(tmp_path / "still.gif")
        open_reference(tmp_path / "phone.jpg")


def test_references_have_so_many_pixels_together(monkeypatch):
    monkeypatch.setattr("msdiffusion.request.subjects.MAX_REFERENCE_PIXELS", 3 * 64 * 64)
    from msdiffusion.request.subjects import check_subjects

    assert len(check_subjects([[DOG] * 3], [(0, 0, 1, 1)], ["dog"]).images) == 3
    told = r"images\[0\]\[3\] has 64 x 64 pixels, with which the references have more than 12,288 together"
    with pytest.raises(RequestError, match=told):
        check_subjects([[DOG] * 4], [(0, 0, 1, 1)], ["dog"])
    with pytest.raises(LayoutError):
        check_subjects([DOG], [(0, 0, 2, 1)], ["dog"])
