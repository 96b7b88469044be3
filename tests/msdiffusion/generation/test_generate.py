import functools
import io
import json
import logging
import math
import re
import shutil
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

import msdiffusion.adapter.loading
import msdiffusion.generation.pipeline_call
import msdiffusion.generation.saving
from msdiffusion import MSDiffusion
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.errors import LayoutError, PhraseError, RequestError, WeightsError
from msdiffusion.own_memory import give_own_memory
from msdiffusion.request.request import check_request

PROMPT = "a dog and a teapot on the beach"
LEFT, RIGHT = [0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]
DOG = Image.new("RGB", (40, 30), (220, 40, 40))
TEAPOT = Image.new("RGBA", (30, 50), (40, 40, 220, 255))
TWO = {"images": [DOG, TEAPOT], "boxes": [LEFT, RIGHT], "prompt": PROMPT, "phrases": ["dog", "teapot"]}
QUICK = {"steps": 3, "seed": 0, "output_type": "pt", "progress": False}


def profiled(profile):
    """A picture with the bytes of a colour profile."""
    picture = DOG.copy()
    picture.info["icc_profile"] = profile
    return picture


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def bare(tiny_model_dir):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model_dir / "base", add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.requires_grad_(False)  # torch picks other kernels, and so other last bits, for weights that may train
    # and MKL others on some processors for weights that still lie in their file
    give_own_memory(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    return pipeline


def draw(model, **changes):
    return model.generate(**{**TWO, **QUICK, **changes})


def test_the_call_of_the_readme(model):
    pictures = model.generate(images=[DOG, TEAPOT], boxes=[LEFT, RIGHT], prompt=PROMPT, seed=0, progress=False)
    assert [(picture.size, picture.mode) for picture in pictures] == [((64, 64), "RGB")]


def test_same_seed_same_picture_and_another_seed_another(model):
    assert torch.equal(draw(model), draw(model))
    assert not torch.equal(draw(model), draw(model, seed=1))
    assert not torch.equal(draw(model, seed=None), draw(model, seed=None))


def test_references_phrases_boxes_and_prompt_all_matter(model):
    plain = draw(model)
    assert not torch.equal(plain, draw(model, images=[TEAPOT, DOG]))
    assert not torch.equal(plain, draw(model, phrases=["dog", "cat"]))
    assert not torch.equal(plain, draw(model, boxes=[LEFT, [0.5, 0.5, 1, 1]]))
    assert not torch.equal(plain, draw(model, prompt="a dog and a teapot in a room"))
    assert not torch.equal(plain, draw(model, negative_prompt="a red clock"))


@pytest.mark.exact
@pytest.mark.parametrize("changes", [{"scale": 0}, {"subject_scales": [0, 0]}])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_scale_zero_is_the_bare_pipeline_bit_for_bit(model, bare, changes, guidance_scale):
    ours = draw(model, num_images=2, guidance_scale=guidance_scale, height=48, width=80, **changes)
    theirs = bare(
        PROMPT, num_inference_steps=3, guidance_scale=guidance_scale, height=48, width=80,
        num_images_per_prompt=2, generator=[torch.Generator().manual_seed(k) for k in range(2)], output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, draw(model, num_images=2, guidance_scale=guidance_scale, height=48, width=80))


def test_the_pipeline_without_subjects_stays_the_bare_one(model, bare):
    draw(model)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    model.pipeline.set_progress_bar_config(disable=True)
    ours = model.pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(ours, bare(PROMPT, generator=torch.Generator().manual_seed(0), **options).images)
    assert model.pipeline._cross_attention_kwargs is None


def test_picture_k_is_the_one_that_its_seed_gives_alone(model):
    three = draw(model, num_images=3, seed=5)
    for k in range(3):
        torch.testing.assert_close(three[k], draw(model, seed=5 + k)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(draw(model, num_images=3, seed=5, batch_size=2), three, rtol=0, atol=1e-4)


def test_order_of_subjects_does_not_matter(model):
    turned = draw(model, images=[TEAPOT, DOG], boxes=[RIGHT, LEFT], phrases=["teapot", "dog"], subject_scales=[0.5, 1])
    torch.testing.assert_close(turned, draw(model, subject_scales=[1, 0.5]), rtol=0, atol=1e-4)


def test_scales_compose_and_scale_zero_removes_a_subject(model):
    halves = draw(model, scale=0.8, subject_scales=[0.5, 0.5])
    torch.testing.assert_close(halves, draw(model, scale=0.4), rtol=0, atol=1e-4)
    overlapping = [[0, 0, 0.7, 1], [0.3, 0, 1, 1]]
    without = draw(model, boxes=overlapping, subject_scales=[1, 0])
    alone = draw(model, images=[DOG], boxes=overlapping[:1], phrases=["dog"])
    torch.testing.assert_close(without, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_calls_do_not_leak_into_one_another(model, tiny_model_dir, guidance_scale):
    layout = {"auto_layout": True, "auto_layout_start": 2, "guidance_scale": guidance_scale}
    boxes_first, text_first = draw(model, guidance_scale=guidance_scale), draw(model, **layout)
    assert not torch.equal(boxes_first, text_first)
    assert torch.equal(draw(model, guidance_scale=guidance_scale), boxes_first)
    assert torch.equal(draw(model, **layout), text_first)
    fresh = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    assert torch.equal(draw(fresh, **layout), text_first)


def test_auto_layout_starts_where_it_is_told(model):
    late = draw(model, auto_layout=True, auto_layout_start=3, steps=3)
    with pytest.warns(UserWarning, match="no effect"):
        never = draw(model, auto_layout=True, auto_layout_start=4, steps=3)
    assert torch.equal(never, draw(model))
    assert not torch.equal(late, never)


def test_auto_layout_of_several_pictures_keeps_them_apart(model):
    layout = {"auto_layout": True, "auto_layout_start": 1}
    both = draw(model, num_images=2, **layout)
    torch.testing.assert_close(both[1], draw(model, seed=1, **layout)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(48, 96), (104, 40), (72, 72)])
def test_any_multiple_of_eight(model, height, width):
    assert draw(model, height=height, width=width).shape == (1, 3, height, width)


def test_output_types(model):
    pictures = draw(model, output_type="pil", num_images=2)
    array = draw(model, output_type="np", num_images=2)
    tensor = draw(model, num_images=2)
    latents = draw(model, output_type="latent", num_images=2)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert (array.shape, latents.shape) == ((2, 64, 64, 3), (2, 4, 32, 32))
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(pictures[1]), array[1] * 255, atol=0.51)
    again = model.backbone.decode_latents(latents)
    np.testing.assert_allclose(np.asarray(again[1], dtype=int), np.asarray(pictures[1], dtype=int), atol=1)


def test_transparent_references_stand_on_the_adapters_background(model):
    cut_out = Image.new("RGBA", (32, 32), (9, 9, 9, 0))
    cut_out.paste((200, 30, 30, 255), (8, 8, 24, 24))
    opaque = Image.new("RGB", (32, 32), (255, 255, 255))
    opaque.paste((200, 30, 30), (8, 8, 24, 24))
    assert torch.equal(draw(model, images=[cut_out, TEAPOT]), draw(model, images=[opaque, TEAPOT]))


def test_references_may_be_files(model, tmp_path):
    DOG.save(tmp_path / "dog.png")
    TEAPOT.save(tmp_path / "teapot.png")
    assert torch.equal(draw(model, images=[tmp_path / "dog.png", str(tmp_path / "teapot.png")]), draw(model))


def test_progress_is_shown_or_not(model, capfd):
    draw(model)
    assert "3/3" not in capfd.readouterr().err
    draw(model, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_a_prompt_beyond_the_limit_is_said(model):
    long = PROMPT + " and" * 40
    with pytest.warns(UserWarning, match="the prompt is longer than the 40 tokens.*ignored: 'and and"):
        draw(model, prompt=long, steps=1)
    with pytest.warns(UserWarning, match="the negative_prompt is longer"):
        draw(model, negative_prompt=long, steps=1)
    with pytest.raises(PhraseError, match="beyond the 40 tokens"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw(model, prompt="and " * 40 + PROMPT, auto_layout=True, auto_layout_start=1)


def test_a_prompt_beyond_the_limit_is_said_once(tiny_model_dir, caplog, recwarn):
    """Of transformers and diffusers there would be four more notices."""
    model = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    for library in ("transformers", "diffusers"):  # which hand nothing on to the root
        logging.getLogger(library).addHandler(caplog.handler)
    draw(model, prompt=PROMPT + " and" * 400, steps=1)
    assert [str(each.message).partition(" tokens")[0] for each in recwarn] == ["the prompt is longer than the 40"]
    assert len(str(recwarn[0].message)) < 300
    told = " ".join(caplog.messages)
    for library in ("transformers", "diffusers"):
        logging.getLogger(library).removeHandler(caplog.handler)
    assert "longer" not in told
    assert "truncated" not in told
    with pytest.warns(UserWarning, match="the prompt_2 is longer"):
        draw(model, prompt_2=PROMPT + " and" * 40, steps=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 10)])
def test_a_reference_without_anything_in_it_is_told_once(model, size):
    with pytest.warns(UserWarning, match=rf"a reference of {size[0]} x {size[1]} pixels .* give a larger") as told:
        draw(model, images=[DOG.resize(size)] * 2, steps=1)
    assert len(told) == 1


def test_only_diffusers_itself_asks_where_the_pipeline_computes(model, monkeypatch):
    """The answer takes a walk through every layer of every network."""
    kind, asked = type(model.pipeline), []
    answer = kind._execution_device.fget
    monkeypatch.setattr(kind, "_execution_device", property(lambda self: asked.append(self) or answer(self)))
    draw(model)
    assert len(asked) == 1  # in its own call


def test_a_callback_that_returns_nothing_changes_nothing(model):
    seen = []
    callback = functools.partial(lambda to, *told: to.append(told[1]), seen)  # not a function: any callable will do
    [plain], [watched] = draw(model), draw(model, callback_on_step_end=callback)
    assert seen == list(range(len(seen))) and len(seen) > 1
    assert np.array_equal(np.asarray(plain), np.asarray(watched))


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscrete", "RePaint", "DDIMInverse"])
def test_schedulers_that_do_not_draw_are_refused(model, monkeypatch, kind):
    import diffusers

    scheduler = getattr(diffusers, f"{kind}Scheduler")
    monkeypatch.setattr(model.pipeline, "scheduler", scheduler.from_config(model.pipeline.scheduler.config))
    with pytest.raises(RequestError, match=f"{kind}Scheduler is not made for drawing"):
        draw(model)


def test_a_model_is_not_saved_over_a_file(model, tmp_path):
    (tmp_path / "cat.png").touch()
    with pytest.raises(RequestError, match="directory must be a folder, but '.*cat.png' is a file: give another place"):
        model.save_pretrained(tmp_path / "cat.png")


def test_parts_of_different_types_are_named(tiny_model_dir):
    model = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    model.pipeline.text_encoder_2.to(torch.bfloat16)
    with pytest.raises(RequestError, match="text_encoder in float32, text_encoder_2 in bfloat16, unet in float32"):
        draw(model)


def test_bad_input_is_refused_before_anything_runs(model, monkeypatch):
    def started(*_, **__):
        pytest.fail("heavy work began")

    for name in ("encode_references", "encode_phrases", "encode_prompts"):
        monkeypatch.setattr(model.backbone, name, started)
    for changes, error in (
        ({"images": [DOG]}, RequestError),
        ({"boxes": [LEFT, [0, 0, 2, 1]]}, LayoutError),
        ({"prompt": ""}, RequestError),
        ({"height": 100}, RequestError),
        ({"images": [DOG, "nowhere.png"]}, RequestError),
        ({"phrases": ["dog", "cat"], "auto_layout": True}, PhraseError),
        ({"phrases": None, "images": [DOG] * 4, "boxes": [LEFT] * 4}, PhraseError),
    ):
        with pytest.raises(error):
            draw(model, **changes)


def test_another_pipeline_on_the_same_unet_takes_the_condition(model):
    """Image to image, with the call that docs/inference.md shows."""
    pipeline = StableDiffusionXLImg2ImgPipeline(**model.pipeline.components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)

    def redraw(scale):
        condition = model.condition([DOG, TEAPOT], [LEFT, RIGHT], ["dog", "teapot"], scale=scale or 0.0)
        subjects = {} if scale is None else {"cross_attention_kwargs": {"subjects": condition}}
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0, "output_type": "pt"}
        return pipeline(PROMPT, image=torch.zeros(1, 3, 64, 64), generator=generator, **options, **subjects).images

    assert torch.equal(redraw(0.0), redraw(None))
    assert not torch.equal(redraw(1.0), redraw(None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject_scale": 1}, "takes no 'subject_scale'.*did you mean subject_scales"),
        ({"num_inference_steps": 3}, "takes no 'num_inference_steps'"),
        ({"prompt_embeds": torch.zeros(2, 4, 48)}, r"prompt_embeds must be of one prompt.*got \(2, 4, 48\)"),
        ({"negative_prompt_embeds": [1]}, "negative_prompt_embeds must be of one prompt.*got list"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must be a tensor of \(1, 4, 32, 32\)"),
        ({"latents": np.zeros((1, 4, 32, 32))}, "got ndarray"),
        ({"batch_size": 0}, "batch_size"),
        ({"boxes": None, "auto_layout_start": 4}, "starts at step 4, but there are 3 steps"),
        ({"boxes": None, "auto_layout_start": 4, "steps": None}, "starts at step 4, but there are 3 steps"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_runs(model, changes, message, monkeypatch):
    monkeypatch.setattr(Backbone, "encode_references", lambda *_: pytest.fail("computed before the checks"))
    with pytest.raises(RequestError, match=message):
        draw(model, **changes)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"images": [DOG]}, r"requests\[1\] has no prompt"),
        ({}, r"requests\[1\] has no images and no prompt"),
        ({**TWO, "progress": False}, "progress are of the whole call"),
        ({**TWO, "batch_size": 1}, "batch_size are of the whole call"),
    ],
)
def test_incomplete_requests_of_a_batch_are_named(model, request_, message):
    with pytest.raises(RequestError, match=message):
        model.generate_batch([TWO, request_], progress=False)
    with pytest.raises(RequestError, match="no requests"):
        model.generate_batch([])


def test_a_request_of_a_batch_may_leave_its_boxes_out(model):
    free = {"images": [DOG], "prompt": "a dog on the beach", "phrases": ["dog"], "seed": 0, "output_type": "pt"}
    result = model.generate_batch([free], progress=False)[0]
    assert torch.equal(result.pictures, model.generate(**free, boxes=None, progress=False))
    assert result.seeds == (0,)


def test_what_the_subjects_were_called_is_told(model, caplog):
    read = {"images": [[DOG, DOG], TEAPOT], "boxes": [LEFT, RIGHT], "prompt": PROMPT}
    with caplog.at_level("INFO", "msdiffusion"):
        result = model.generate_batch([{**read, "steps": 1}], progress=False)[0]
    assert result.phrases == ("dog", "teapot")
    assert result.pictures[0].info["phrases"] == ("dog", "teapot")
    assert caplog.messages == ["phrases taken from the prompt: 'dog', 'teapot'"]
    assert model.condition(read["images"], read["boxes"], prompt=PROMPT).phrases == ("dog", "teapot")


@pytest.fixture
def trained_for_little(model, monkeypatch):
    config = replace(model.adapter.config, largest_side=64, most_subjects=2, closed_vocabulary=True)
    monkeypatch.setattr(model.adapter, "config", config)
    return model


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"height": 128, "width": 128}, "64 x 64 pixels; at 128 x 128 .width x height. they draw the same things many"),
        ({"height": 96, "width": 96}, "at 96 x 96"),
        ({"height": 24, "width": 40}, "at 40 x 24 .width x height. they draw things that cannot be made out"),
        (
            {"images": [DOG] * 3, "boxes": [LEFT] * 3, "phrases": ["dog"] * 3},
            "pictures of 2 subjects at most; of 3 some are drawn as something else",
        ),
        ({"prompt": "a dog and a teapot on the Eiffel tower"}, "know few words, .*: 'eiffel', 'tower'; something else"),
        ({"phrases": ["dog", "Zebra"], "prompt": "a dog and a zebra on the beach"}, "none of them: 'zebra'"),
    ],
)
def test_what_the_weights_were_not_trained_for_is_told_once(trained_for_little, changes, told):
    request = {**TWO, **QUICK, "steps": 1, **changes}
    with pytest.warns(UserWarning) as warned:
        trained_for_little.generate(**request)
    assert len(warned) == 1
    assert re.search(told, str(warned[0].message))
    assert warned[0].filename == __file__
    if "height" not in changes:
        with pytest.warns(UserWarning, match=told):
            trained_for_little.condition(
                request["images"], request["boxes"], request["phrases"], prompt=request["prompt"]
            )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"boxes": [LEFT, [0.5, 0.5, 0.5, 0.5]]}, "has no area"),
        ({"images": [profiled(b"no profile"), TEAPOT]}, "colour profile cannot be used"),
        ({"phrases": None, "prompt": "a (dog:1.2) and a teapot"}, "reads weights in the prompt"),
        ({"phrases": None, "prompt": "a dog in a teapot"}, "does not tell surely"),
        ({"images": [Image.new("RGB", (1, 1)), TEAPOT]}, "shows next to nothing"),
        ({"auto_layout": True, "auto_layout_start": 3}, "auto_layout has no effect"),
        ({"prompt": "a dog and a teapot" + " and a dog" * 80}, "the prompt is longer"),
    ],
)
def test_warnings_name_the_line_of_whoever_called(model, changes, told):
    request = {**TWO, "steps": 1, "seed": 0, "output_type": "pt", **changes}
    calls = [
        lambda: model.generate(**request, progress=False),
        lambda: model.generate_batch([request], progress=False),
        lambda: model.generate_batch([check_request(**request)], progress=False),
    ]
    if "auto_layout" not in changes and "longer" not in told:
        subjects = {name: request[name] for name in ("images", "boxes", "phrases", "prompt")}
        calls.append(lambda: model.condition(**subjects))
    for call in calls:
        with pytest.warns(UserWarning, match=told) as warned:
            call()
        assert [each.filename for each in warned] == [__file__]


def test_what_the_weights_were_trained_for_warns_of_nothing(trained_for_little, model, recwarn):
    for changes in ({}, {"height": 64, "width": 128}, {"images": [[DOG] * 3, TEAPOT]}, {"height": 32, "width": 32}):
        draw(trained_for_little, steps=1, **changes)
    monkey = replace(model.adapter.config, largest_side=None, most_subjects=None, closed_vocabulary=None)
    model.adapter.config = monkey  # an old config tells nothing
    draw(model, steps=1, prompt="a zebra and a dog and a teapot", height=128, width=128)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_inference_steps": 3}, "generate takes no 'num_inference_steps'; here it is steps=$"),
        (
            {"generator": torch.Generator()},
            r"takes no 'generator'; here it is seed=, a whole number; .*initial_seed\(\)",
        ),
        ({"image": DOG}, "takes no 'image', and neither does StableDiffusionXLPipeline; here it is images="),
        ({"num_images_per_prompt": 2}, "here it is num_images="),
        ({"cfg_scale": 3}, "here it is guidance_scale="),
        ({"bboxes": []}, "here it is boxes="),
        ({"stepz": 3}, "did you mean steps?"),
        ({"prompt": ["a dog", "a teapot"]}, "prompt is one text, got .*generate_batch"),
        ({"images": "https://example.org/dog.png"}, "images must be a list"),
        ({"images": ["https://example.org/dog.png", TEAPOT]}, r"images\[0\] is the address"),
    ],
)
def test_names_of_other_libraries_get_the_right_hint(model, changes, told):
    with pytest.raises(RequestError, match=told):
        draw(model, **changes)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"image": DOG, "boxes": [LEFT], "prompt": PROMPT},
            "needs images, and it takes no 'image': here it is images=",
        ),
        ({"images": [DOG], "bbox": LEFT, "prompt": PROMPT}, "needs boxes, and it takes no 'bbox': here it is boxes="),
        ({"images": [DOG], "prompt": PROMPT}, "needs boxes; boxes=None leaves every subject's place to the text"),
        ({"images": [DOG], "boxes": [LEFT], "prompts": [PROMPT]}, "needs prompt, and it takes no 'prompts'"),
        ({}, "generate needs images$"),
    ],
)
def test_what_is_left_out_is_told(model, arguments, told):
    with pytest.raises(RequestError, match=told):
        model.generate(**arguments)


def test_windows_need_timesteps_that_say_how_far_a_run_is(model):
    own = model.pipeline.scheduler
    options = {"subject_windows": [None, (0, 0.5)]}
    try:
        model.pipeline.scheduler = EulerDiscreteScheduler.from_config(own.config, timestep_type="continuous")
        with pytest.raises(RequestError, match="EulerDiscreteScheduler counts in logarithms"):
            draw(model, **options)
        with pytest.raises(RequestError, match="counts in logarithms"):
            model.condition([DOG, TEAPOT], [LEFT, RIGHT], ["dog", "teapot"], **options)
    finally:
        model.pipeline.scheduler = own


def test_samplers_of_second_order_have_more_calls_than_steps(model):
    own = model.pipeline.scheduler
    try:
        model.pipeline.scheduler = HeunDiscreteScheduler.from_config(own.config)
        automatic = draw(model, auto_layout=True)  # starts at the fifth call, in the third step: no warning
        assert not torch.equal(automatic, draw(model))
    finally:
        model.pipeline.scheduler = own


def test_hooks_see_every_picture_in_order_and_may_refuse_a_size(model):
    seen = []

    class Hook:
        def __init__(self, name):
            self.name = name

        def __call__(self, pictures):
            seen.append((self.name, len(pictures)))
            return [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]

        def check_size(self, width, height):
            if width < 64:
                raise RequestError("too small")

    plain = draw(model, output_type="pil")[0]
    model.picture_hooks = [Hook("first")]
    try:
        assert draw(model, output_type="pil")[0].tobytes() == plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
        model.picture_hooks.append(Hook("second"))
        assert draw(model, output_type="pil")[0].tobytes() == plain.tobytes()
        assert seen == [("first", 1), ("first", 1), ("second", 1)]
        with pytest.raises(RequestError, match="picture_hooks take PIL pictures"):
            draw(model)
        with pytest.raises(RequestError, match="too small"):
            draw(model, output_type="pil", width=56)
        model.picture_hooks = [lambda pictures: []]
        with pytest.raises(RequestError, match="returned 0 pictures for 1"):
            draw(model, output_type="pil")
    finally:
        model.picture_hooks = []


def test_the_pipelines_own_bar_is_left_as_it_was(model):
    model.pipeline.set_progress_bar_config(desc="mine", disable=True)
    draw(model)
    assert model.pipeline._progress_bar_config == {"desc": "mine", "disable": True}


def test_many_references_are_encoded_in_parts(model, monkeypatch):
    sizes = []
    encode = model.backbone.encode_references  # of the object: older releases of pytest leave one there after a patch
    monkeypatch.setattr(
        model.backbone, "encode_references", lambda pixels, *a: sizes.append(len(pixels)) or encode(pixels, *a)
    )
    model.condition([DOG] * 20, [LEFT] * 20, ["dog"] * 20)
    assert sizes == [16, 4]


def test_a_batch_that_is_not_what_it_seems_is_refused(model):
    """Two pictures without guidance for a condition of one: half of them would lose their subjects."""
    condition = model.condition([DOG], [LEFT], ["dog"])
    options = {"num_inference_steps": 1, "output_type": "latent", "cross_attention_kwargs": {"subjects": condition}}
    model.pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(RequestError, match="2 samples, different latents, as without guidance"):
        model.pipeline(PROMPT, num_images_per_prompt=2, guidance_scale=1.0, **options)
    model.pipeline(PROMPT, guidance_scale=3.0, **options)
    model.pipeline._cross_attention_kwargs = None
    same = {"images": [DOG], "boxes": [LEFT], "prompt": PROMPT, "phrases": ["dog"], "seed": 0, "guidance_scale": 1.0}
    model.generate_batch([same, same], progress=False)  # equal latents, and rightly so


# Loading and saving


def heavy_loading_fails(monkeypatch):
    def started(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(Backbone, "from_pretrained", started)


def edit_config(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_things_are_named_before_weights_are_loaded(tiny_model_dir, tmp_path, monkeypatch):
    heavy_loading_fails(monkeypatch)
    monkeypatch.setattr(
        msdiffusion.adapter.loading,
        "snapshot_download",
        lambda name, **options: (_ for _ in ()).throw(OSError("offline")),
    )
    with pytest.raises(WeightsError, match=r"no such folder: nobody/nothing; .*offline"):
        MSDiffusion.from_pretrained("nobody/nothing")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        MSDiffusion.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"no such file or folder: .*\.bin"):
        MSDiffusion.from_pretrained(tmp_path / "ms_adapter.bin")
    with pytest.raises(WeightsError, match="cannot load the UNet"):
        MSDiffusion.from_pretrained(tiny_model_dir, base_model=tmp_path)
    with pytest.raises(WeightsError, match="cannot load the image encoder"):
        MSDiffusion.from_pretrained(tiny_model_dir, image_encoder=tmp_path)


def test_another_architecture_is_named_with_both_shapes_before_weights_are_loaded(
    tiny_model_dir, tmp_path, monkeypatch
):
    heavy_loading_fails(monkeypatch)
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    for name, changes, message in (
        ("base/unet", {"block_out_channels": [8, 16, 32]}, r"shape \(16, 48\), the UNet's \(32, 48\)"),
        ("base/unet", {"cross_attention_dim": 64}, "7 cross-attention layers that read text 48 .* 7 that read text 64"),
        ("base/text_encoder", {"hidden_size": 32}, "phrase embeddings 16 wide, but this text encoder gives 32"),
        ("image_encoder", {"hidden_size": 32}, "image tokens 24 wide, but this image encoder gives 32"),
    ):
        path = tmp_path / name / "config.json"
        before = path.read_text()
        edit_config(path, **changes)
        with pytest.raises(WeightsError, match=message):
            MSDiffusion.from_pretrained(tmp_path)
        path.write_text(before)


def test_saving_with_the_backbone_gives_the_same_model_anywhere(model, tmp_path):
    theirs = tmp_path / "whole" / "private" / "theirs.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.touch(0o600)
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert theirs.stat().st_mode & 0o777 == 0o600
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "whole").rglob("*.safetensors") if path != theirs}
    assert modes == {
        (tmp_path / "plain").stat().st_mode
    }  # as the umask says; safetensors would let the owner alone read
    moved = shutil.move(tmp_path / "whole", tmp_path / "moved")
    assert torch.equal(draw(MSDiffusion.from_pretrained(moved, device="cpu")), draw(model))


def test_saving_the_adapter_alone_points_to_the_backbone(model, tiny_model_dir, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "adapter.safetensors", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text())["base_model"] == str((tiny_model_dir / "base").resolve())
    assert torch.equal(draw(MSDiffusion.from_pretrained(tmp_path, device="cpu")), draw(model))


def test_saving_after_the_working_directory_has_changed(tiny_model_dir, tmp_path, monkeypatch):
    """The base used to be named as it was given, which is a hub's name from elsewhere."""
    monkeypatch.chdir(tiny_model_dir)
    loaded = MSDiffusion.from_pretrained(".", base_model="base", image_encoder="image_encoder", device="cpu")
    monkeypatch.chdir(tmp_path)
    loaded.save_pretrained("saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["base_model"] == str((tiny_model_dir / "base").resolve())
    assert config["image_encoder"] == str((tiny_model_dir / "image_encoder").resolve())
    assert str(tiny_model_dir.parent) not in (tmp_path / "saved" / "README.md").read_text()


def test_a_base_with_something_put_into_it_is_not_saved(model, tmp_path, monkeypatch):
    folder = tmp_path / "whole"
    weights = model.pipeline.unet.state_dict()
    weights["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight"] = torch.ones(1)
    with monkeypatch.context() as patched:
        patched.setattr(model.pipeline.unet, "state_dict", lambda: weights)
        with pytest.raises(WeightsError, match=r"a LoRA is in the unet, .*unload_lora_weights\(\), after .*fuse_lora"):
            model.save_pretrained(folder, include_backbone=True)
        patched.setattr(model.pipeline.unet, "state_dict", lambda: {"conv_in.weight": torch.ones(1, device="meta")})
        with pytest.raises(WeightsError, match="offloading keeps weights of the unet elsewhere"):
            model.save_pretrained(folder, include_backbone=True)
    monkeypatch.setattr(model.pipeline.unet, "encoder_hid_proj", torch.nn.Linear(1, 1))
    with pytest.raises(WeightsError, match=r"an IP-Adapter is in the UNet, .*unload_ip_adapter\(\)"):
        model.save_pretrained(folder, include_backbone=True)
    assert not folder.exists()


def test_a_model_built_in_memory_must_be_saved_whole(model, tmp_path):
    built = MSDiffusion(model.backbone, model.adapter)
    with pytest.raises(WeightsError, match="include_backbone=True"):
        built.save_pretrained(tmp_path)
    built.save_pretrained(tmp_path, include_backbone=True)
    assert (tmp_path / "base" / "model_index.json").is_file()


def test_push_to_hub_uploads_what_is_saved(model, tmp_path, monkeypatch):
    uploads = {}
    card = tmp_path / "README.md"  # as it stands in the repository

    class FakeApi:
        def __init__(self, token):
            uploads["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            uploads["repo"] = (repo_id, private, exist_ok)
            return "https://hub/owner/name"

        def file_exists(self, repo_id, filename):
            return card.exists()

        def hf_hub_download(self, repo_id, filename):
            return str(card)

        def upload_folder(self, *, repo_id, folder_path):
            config = json.loads((Path(folder_path) / "config.json").read_text())
            uploads["config"] = (repo_id, config["base_model"])
            path = Path(folder_path) / "README.md"
            uploads["card"] = path.read_text() if path.exists() else None

    monkeypatch.setattr(msdiffusion.generation.saving, "HfApi", FakeApi)
    url = model.push_to_hub("owner/name", include_backbone=True, private=True, token="secret")
    assert url == "https://hub/owner/name"
    card.write_text(uploads.pop("card"))
    assert 'MSDiffusion.from_pretrained("owner/name")' in card.read_text()
    assert uploads == {"token": "secret", "repo": ("owner/name", True, True), "config": ("owner/name", "base")}
    model.push_to_hub("owner/name", include_backbone=True)
    assert uploads["card"] == card.read_text()
    card.write_text("my own words")
    model.push_to_hub("owner/name", include_backbone=True)
    assert uploads["card"] is None, "a card that somebody wrote is kept"
    with pytest.raises(WeightsError, match="this machine only"):
        model.push_to_hub("owner/name")


def test_a_hub_repository_is_downloaded(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(msdiffusion.adapter.loading, "snapshot_download", lambda name, **options: str(tiny_model_dir))
    assert MSDiffusion.from_pretrained("owner/name", device="cpu").adapter.tokens_per_subject == 16


def test_moving_takes_the_adapter_along(model):
    model.to("cpu")
    assert model.adapter.device == model.backbone.device


def test_half_precision(tiny_model_dir):
    half = MSDiffusion.from_pretrained(tiny_model_dir, torch_dtype=torch.bfloat16, device="cpu")
    assert half.adapter.dtype == torch.bfloat16
    assert draw(half).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_picture(tiny_model_dir, model):
    on_gpu = MSDiffusion.from_pretrained(tiny_model_dir, device="cuda")
    torch.testing.assert_close(draw(on_gpu).cpu(), draw(model), rtol=0, atol=2e-2)


# ---- threads: as a web server calls one model


def test_threads_get_what_calls_in_a_row_get(model, in_threads):
    """Four threads with other steps, sizes, subjects and seeds; both used to get wrong pictures, without a word."""
    requests = [
        {"steps": 3, "height": 64, "width": 64},
        {"steps": 5, "height": 48, "width": 96, "seed": 1, "guidance_scale": 1.0},
        {"steps": 4, "auto_layout": True, "auto_layout_start": 2, "num_images": 2, "batch_size": 1},
        {
            "steps": 2,
            "height": 96,
            "width": 64,
            "prompt": "a dog",
            "images": [DOG],
            "boxes": [LEFT],
            "phrases": ["dog"],
        },
    ]
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        own = model.pipeline.scheduler
        try:
            model.pipeline.scheduler = kind.from_config(own.config)
            alone = [draw(model, **request) for request in requests]
            calls = [functools.partial(draw, model, **request) for request in requests]
            together = in_threads(*calls)
        finally:
            model.pipeline.scheduler = own
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours, theirs), kind.__name__


def test_four_schedulers_on_one_set_of_networks_in_threads(model, in_threads):
    """Several models may share a UNet: the turns are the UNet's."""
    kinds = (DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler)
    calls = []
    for kind in kinds:
        parts = {**model.pipeline.components, "scheduler": kind.from_config(model.pipeline.scheduler.config)}
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        backbone = Backbone(pipeline, model.backbone.image_encoder, model.backbone.image_processor)
        calls.append(functools.partial(draw, MSDiffusion(backbone, model.adapter), steps=4))
    alone = [call() for call in calls]
    assert len({tuple(picture.flatten().tolist()) for picture in alone}) == len(kinds)
    for ours, theirs in zip(in_threads(*calls), alone, strict=True):
        assert torch.equal(ours, theirs)


def test_a_call_keeps_the_scheduler_that_the_model_had_when_it_came(model):
    own = model.pipeline.scheduler
    expected, begun, replaced = draw(model, steps=3), threading.Event(), threading.Event()
    waits = threading.Event()

    def hold(pipeline, step, timestep, tensors):
        begun.set()
        assert replaced.wait(30)
        return tensors

    results = {}
    first = threading.Thread(target=lambda: results.update(first=draw(model, callback_on_step_end=hold)))
    second = threading.Thread(target=lambda: (waits.set(), results.update(second=draw(model))))
    first.start()
    assert begun.wait(30)
    second.start()
    assert waits.wait(30)
    while len(model._turns._line) < 2:
        time.sleep(0.001)
    try:
        model.pipeline.scheduler = EulerDiscreteScheduler.from_config(own.config)
        replaced.set()
        first.join(60)
        second.join(60)
        assert not torch.equal(draw(model), expected)
    finally:
        model.pipeline.scheduler = own
    assert torch.equal(results["first"], expected)
    assert torch.equal(results["second"], expected)


def test_conditions_and_batches_in_threads(model, in_threads):
    def condition():
        made = model.condition(**{name: TWO[name] for name in ("images", "boxes", "phrases")})
        return torch.cat([key.flatten() for key in made.keys.values()])

    def batch():
        requests = [{**TWO, "steps": steps, "seed": steps, "output_type": "pt"} for steps in (2, 3)]
        return torch.cat([each.pictures for each in model.generate_batch(requests, progress=False)])

    def read_late():  # a picture that is read from its file only when it is needed
        return draw(model, images=[late, TEAPOT])

    content = io.BytesIO()
    DOG.resize((400, 300)).save(content, "JPEG")
    late = Image.open(content)
    calls = [condition, batch, lambda: draw(model, phrases=None, prompt="a dog and a teapot"), read_late, read_late]
    together = in_threads(*calls)
    for ours, call in zip(together, calls, strict=True):
        assert torch.equal(ours, call())


def test_the_tokenizer_is_only_asked_by_whose_turn_it_is(trained_for_little, in_threads, monkeypatch):
    """Every call sets the padding of a fast tokenizer: between two calls of one thread another would get it wrong."""
    model, asked = trained_for_little, []
    kind = type(model.pipeline.tokenizer)
    ask = kind.__call__

    def watched(tokenizer, *arguments, **options):
        asked.append(list(model._turns._line)[:1] == [threading.get_ident()])
        time.sleep(0)
        return ask(tokenizer, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", watched)
    subject = {name: TWO[name] for name in ("images", "boxes", "phrases", "prompt")}
    drawn = functools.partial(draw, model, steps=1)
    in_threads(drawn, *[functools.partial(model.condition, **subject)] * 2, functools.partial(drawn, phrases=None))
    assert len(asked) > 4
    assert all(asked)


def test_an_interrupt_just_as_a_run_begins_leaves_the_model_usable(model, monkeypatch):
    class Interrupted(type(msdiffusion.generation.pipeline_call._DENOISING)):
        def add(self, item):
            super().add(item)
            raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        at_work = Interrupted()
        changed.setattr(msdiffusion.generation.pipeline_call, "_DENOISING", at_work)
        with pytest.raises(KeyboardInterrupt):
            draw(model, steps=1)
        assert not at_work
    draw(model, steps=1)


def test_a_call_that_fails_does_not_hold_up_the_others(model, in_threads):
    def fail(*_):
        raise ZeroDivisionError

    def broken():
        with pytest.raises(ZeroDivisionError):
            draw(model, callback_on_step_end=fail)
        return draw(model)

    assert torch.equal(*in_threads(broken, broken))


def test_generate_inside_a_run_is_refused_and_after_it_is_not(model):
    """The pipeline would go on without subjects, and with the other call's guidance."""

    def inside(pipeline, step, timestep, tensors):
        with pytest.raises(RequestError, match="called by a callback of a run of the same model: draw after the run"):
            draw(model)
        return tensors

    expected, more = draw(model), []
    assert torch.equal(draw(model, callback_on_step_end=inside), expected)
    request = {**TWO, "steps": 3, "seed": 0, "output_type": "pt"}
    model.generate_batch([request], progress=False, on_result=lambda *_: more.append(draw(model)))
    assert torch.equal(more[0], expected)


def test_the_models_scheduler_is_left_as_it_was_and_a_run_can_be_interrupted_from_outside(model):
    own = model.pipeline.scheduler
    before, steps = own.num_inference_steps, []
    draw(model, steps=7)
    assert model.pipeline.scheduler is own
    assert own.num_inference_steps == before

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        model.pipeline._interrupt = True  # as a server's button does
        assert isinstance(pipeline, StableDiffusionXLPipeline)
        return tensors

    draw(model, steps=6, callback_on_step_end=stop)
    assert steps == [0]


# ---- values that are no numbers: a black picture otherwise


BROKEN = {
    "image encoder": (lambda model: model.backbone.image_encoder, "embeddings.class_embedding"),
    "text encoder": (lambda model: model.pipeline.text_encoder, "final_layer_norm.weight"),
    "second text encoder": (lambda model: model.pipeline.text_encoder_2, "text_projection.weight"),
    "adapter": (lambda model: model.adapter, "to_v.weight"),
    "UNet": (lambda model: model.pipeline.unet, "conv_out.bias"),
    "VAE": (lambda model: model.pipeline.vae, "decoder.conv_out.bias"),
}


@pytest.mark.parametrize("part", BROKEN)
def test_weights_that_are_no_numbers_are_told_and_whose(part, model):
    network, name = BROKEN[part]
    weight = next(weight for key, weight in network(model).state_dict().items() if key.endswith(name))
    kept = weight.clone()
    weight.view(-1)[0] = math.nan
    calls = []
    counting = model.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(WeightsError, match=rf"^the {part} has weights that are no numbers .*{name}: its file is"):
            draw(model, output_type="pil")
        assert len(calls) == {"image encoder": 0, "text encoder": 0, "VAE": 3}.get(part, 1)  # told at the first step
        if part != "VAE":
            with pytest.raises(WeightsError, match=f"^the {part} "):
                draw(model, output_type="latent", steps=1, callback_on_step_end=lambda *arguments: arguments[3])
    finally:
        weight.copy_(kept)
        counting.remove()


def test_an_overflow_names_the_part_and_the_way_out(model):
    overflow = model.pipeline.unet.register_forward_hook(lambda _, __, output: (output[0] * math.inf,))
    try:
        with pytest.raises(WeightsError, match="the UNet gives values that are no numbers .* in float32, though its"):
            draw(model)
    finally:
        overflow.remove()


def test_given_tensors_must_be_numbers(model):
    noise = torch.full((1, 4, 32, 32), math.nan)
    with pytest.raises(RequestError, match="latents hold values that are no numbers"):
        draw(model, latents=noise)
    with pytest.raises(RequestError, match="prompt_embeds holds values that are no numbers"):
        draw(model, prompt_embeds=torch.full((1, 40, 48), math.inf))


def test_a_pipelines_own_safety_checker_is_told(tiny_sd1_model_dir, monkeypatch):
    model = MSDiffusion.from_pretrained(tiny_sd1_model_dir, device="cpu")
    black = lambda image, device, dtype: (torch.full_like(image, -1.0), [False, True])  # noqa: E731
    monkeypatch.setattr(model.pipeline, "run_safety_checker", black)
    with pytest.warns(UserWarning, match="own safety checker flagged picture 1"):
        pictures = draw(model, num_images=2, output_type="pil")
    assert [picture.info.get("flagged") for picture in pictures] == [None, True]


# ---- what people say


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_dtype": "half16"}, r"torch_dtype must be torch.float32, .*, or the name of one, got 'half16'"),
        ({"torch_dtype": torch.int8}, "torch_dtype must be .*, got torch.int8"),
        ({"torch_dtype": "auto"}, "torch_dtype must be .*, got 'auto'"),
        ({"dtype": torch.float16}, "from_pretrained takes no 'dtype': it is called torch_dtype"),
        ({"variant": "fp16"}, "takes no 'variant': in half precision"),
        ({"scheduler": None}, "set model.pipeline.scheduler after loading"),
        ({"basemodel": "x"}, "did you mean base_model"),
        ({"revision_of_something": 1}, "it takes model, base_model, "),
        ({"device": "gpu"}, r"device 'gpu' cannot be used here \(cpu.*an NVIDIA GPU is called cuda"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
        ({"device": 1.5}, "device 1.5 cannot be used here"),
    ],
)
def test_dtypes_devices_and_names_are_checked_before_anything_is_loaded(options, message, tmp_path):
    with pytest.raises(RequestError, match=message) as caught:
        MSDiffusion.from_pretrained(tmp_path / "nowhere", **options)
    assert len(str(caught.value)) < 400


def test_a_dtype_may_be_named(tiny_model_dir):
    for name in ("float16", "torch.bfloat16"):
        loaded = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", name, "cpu")
        assert str(loaded.dtype) == str(loaded.vae.dtype) == f"torch.{name.removeprefix('torch.')}"


def test_a_device_that_is_not_there_moves_nothing(model):
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(RequestError, match="cannot be used here"):
            model.to(wrong)
    assert model.backbone.device.type == model.adapter.device.type == "cpu"


@pytest.fixture
def config_of_unet(model):
    """Function: sets a field of the UNet's config for the test."""
    kept = dict(model.pipeline.unet.config)
    yield lambda **changes: model.pipeline.unet.register_to_config(**changes)
    model.pipeline.unet.register_to_config(**kept)


def test_a_base_may_draw_oblong_pictures(model, config_of_unet):
    config_of_unet(sample_size=[32, 48])
    assert draw(model).shape == (1, 3, 64, 96)
    assert draw(model, height=48).shape == (1, 3, 48, 96)
    for unknown in (None, "large", [32]):
        config_of_unet(sample_size=unknown)
        with pytest.raises(RequestError, match="does not say how large pictures are .* give height= and width="):
            draw(model)
        assert draw(model, height=64, width=64).shape == (1, 3, 64, 64)


def test_masks_may_be_tensors_wherever_they_are(model):
    class Elsewhere:
        """A tensor on a GPU: numpy can't read it before it is brought here."""

        def __array__(self, *_, **__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def cpu(self):
            return torch.ones(8, 8, dtype=torch.bool)

    expected = draw(model, masks=[np.ones((8, 8), bool), None])
    assert torch.equal(draw(model, masks=[Elsewhere(), None]), expected)
    with pytest.raises(LayoutError, match=r"masks\[0\] cannot be read .*: a mask is a bool array"):
        draw(model, masks=[torch.ones(8, 8, dtype=torch.bool, device="meta"), None])


def test_a_refused_run_with_pag_leaves_nothing_behind(model):
    expected = draw(model)
    pag = StableDiffusionXLPAGPipeline(**model.pipeline.components, add_watermarker=False, pag_applied_layers=["mid"])
    pag.set_progress_bar_config(disable=True)
    condition = model.condition(TWO["images"], TWO["boxes"], TWO["phrases"])
    before = {name: type(each) for name, each in model.pipeline.unet.attn_processors.items()}
    with pytest.raises(RequestError, match="batches of other parts, as of PAG"):
        pag(PROMPT, num_inference_steps=2, pag_scale=3.0, cross_attention_kwargs={"subjects": condition})
    assert {name: type(each) for name, each in model.pipeline.unet.attn_processors.items()} == before
    assert torch.equal(draw(model), expected)

    def stop(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # a run of its own that breaks off leaves its processors
        pag(PROMPT, num_inference_steps=2, pag_scale=3.0, callback_on_step_end=stop)
    assert torch.equal(draw(model), expected)
    other = MSDiffusion(Backbone(pag, model.backbone.image_encoder, model.backbone.image_processor), model.adapter)
    with pytest.raises(RequestError, match="PAG gives the UNet batches of three parts.*pag_scale=0"):
        draw(other)
    assert torch.equal(draw(other, pag_scale=0), expected)


def test_layers_of_the_text_encoder_may_be_skipped(tiny_sd1_model_dir, model):
    """With transformers 5, diffusers looks for the encoder's last norm where it no longer is."""
    sd1 = MSDiffusion.from_pretrained(tiny_sd1_model_dir, device="cpu")
    encoder, tokenizer = sd1.pipeline.text_encoder, sd1.pipeline.tokenizer
    ids = tokenizer([PROMPT, ""], padding="max_length", max_length=40, return_tensors="pt").input_ids
    inner = getattr(encoder, "text_model", encoder)
    with torch.no_grad():
        states = inner.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-2])
    expected = draw(sd1, prompt_embeds=states[:1], negative_prompt_embeds=encoder(ids[1:])[0])
    skipped = draw(sd1, clip_skip=1, negative_prompt_embeds=encoder(ids[1:])[0])
    torch.testing.assert_close(skipped, expected, rtol=0, atol=1e-5)
    assert not torch.equal(skipped, draw(sd1, negative_prompt_embeds=encoder(ids[1:])[0]))
    assert "text_model" not in encoder.__dict__
    for loaded, most in ((sd1, 2), (model, 1)):
        draw(loaded, clip_skip=most, steps=1)
        with pytest.raises(RequestError, match=f"clip_skip must be at most {most}, got 9"):
            draw(loaded, clip_skip=9)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "L", "array", "list"])
def test_a_start_picture_must_be_rgb(model, kind):
    """Four channels would be taken for latents, without a word."""
    pipeline = StableDiffusionXLImg2ImgPipeline(**model.pipeline.components, add_watermarker=False)
    other = MSDiffusion(Backbone(pipeline, model.backbone.image_encoder, model.backbone.image_processor), model.adapter)
    start = {"array": np.zeros((64, 64, 4), np.uint8), "list": [Image.new("RGBA", (64, 64))]}
    image = start[kind] if kind in start else Image.new(kind, (64, 64))
    with pytest.raises(RequestError, match=r"image is .*, but the pipeline wants RGB .*: image.convert\(\"RGB\"\)"):
        draw(other, image=image, strength=0.9)
    with pytest.raises(RequestError, match="image must be a picture, got the path 'start.png': open it with PIL"):
        draw(other, image="start.png", strength=0.9)
