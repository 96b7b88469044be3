"""What must hold exactly, whatever the weights: seen from outside, through whole calls of the tiny random model."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from msdiffusion import MSDiffusion

PROMPT = "a dog and a teapot on the beach"
LEFT, RIGHT = [0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]
OVERLAPPING = [[0, 0, 0.7, 1], [0.3, 0, 1, 1]]
NOISE = np.random.default_rng(0)
PICTURES = [Image.fromarray(NOISE.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(13)]
DOG, TEAPOT, CLOCK = PICTURES[:3]
TWO = {"images": [DOG, TEAPOT], "boxes": [LEFT, RIGHT], "prompt": PROMPT, "phrases": ["dog", "teapot"]}
QUICK = {"steps": 3, "seed": 0, "guidance_scale": 3.0, "output_type": "pt"}
LAYOUT = {"auto_layout": True, "auto_layout_start": 2}
FREE = {"boxes": [LEFT, None]}
WINDOWS = {"subject_windows": [(0, 0.5), (0.4, 1)]}
MASK = np.zeros((20, 30), dtype=bool)
MASK[3:12, 4:20] = True
MASKS = {"masks": [MASK, None]}
KINDS = {"boxes": {}, "auto layout": LAYOUT, "free": FREE, "windows": WINDOWS, "masks": MASKS}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    loaded = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    loaded.pipeline.set_progress_bar_config(disable=True)
    return loaded


def draw(model, **changes):
    return model.generate(**{**TWO, **QUICK, "progress": False, **changes})


def batch(model, *requests, **options):
    """Pictures of several requests, drawn together."""
    return model.generate_batch([{**TWO, **QUICK, **request} for request in requests], progress=False, **options)


def condition_of(model, **changes):
    return model.condition(**{**TWO, **changes})


def run(pipeline, condition=None, *, steps=3, seed=0, **options):
    """A call of a pipeline."""
    subjects = {} if condition is None else {"cross_attention_kwargs": {"subjects": condition}}
    settings = {"prompt": PROMPT, "guidance_scale": 3.0, "output_type": "pt", **subjects}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**{**settings, "num_inference_steps": steps, "generator": generator, **options}).images


def close(one, other):
    """Equal but for the order of sums."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# A box whose edges are exact in float32, at least one 64th wide and high.
spans = st.tuples(st.integers(0, 63), st.integers(1, 64)).map(lambda edge: (edge[0] / 64, min(64, sum(edge)) / 64))
any_boxes = st.tuples(spans, spans).map(lambda pair: [pair[0][0], pair[1][0], pair[0][1], pair[1][1]])


# ----------------------------------------------------------------------------------------------- subjects and scales


@pytest.mark.exact
@settings(max_examples=8)
@given(boxes=st.lists(any_boxes, min_size=3, max_size=3), order=st.permutations(range(3)))
def test_order_of_subjects_does_not_matter(model, boxes, order):
    """Also where boxes overlap, with every setting a subject has."""
    images, phrases, scales = PICTURES[:3], ["dog", "teapot", "cat"], [1.0, 0.5, 2.0]
    windows = [(0, 1), (0, 0.6), (0.3, 1)]
    straight = draw(model, images=images, boxes=boxes, phrases=phrases, subject_scales=scales, subject_windows=windows)
    turned = draw(
        model,
        images=[images[i] for i in order],
        boxes=[boxes[i] for i in order],
        phrases=[phrases[i] for i in order],
        subject_scales=[scales[i] for i in order],
        subject_windows=[windows[i] for i in order],
    )
    close(straight, turned)


@settings(max_examples=8)
@given(place=st.integers(0, 2), kind=st.sampled_from(sorted(KINDS)))
def test_a_subject_of_scale_zero_is_as_if_never_given(model, place, kind):
    """Beside any other subjects, wherever it stands in the list, although its box covers everything."""

    def with_third(values, third):
        return [*values[:place], third, *values[place:]]

    others = {**TWO, **KINDS[kind]}
    more = {name: with_third(others[name], third) for name, third in (("boxes", [0, 0, 1, 1]), ("images", CLOCK))}
    more |= {name: with_third(others[name], None) for name in ("masks", "subject_windows") if name in others}
    more["phrases"] = with_third(others["phrases"], "beach")
    alone = draw(model, **KINDS[kind])
    close(draw(model, **{**KINDS[kind], **more}, subject_scales=with_third([1, 1], 0)), alone)
    assert not torch.allclose(draw(model, **{**KINDS[kind], **more}), alone, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no area.*:UserWarning")
@pytest.mark.parametrize("empty", [[0, 0, 0, 0], [0.3, 0.2, 0.3, 0.9], [0.1, 1, 0.8, 1]])
def test_a_box_without_area_removes_its_subject(model, empty):
    one = {"images": [DOG], "boxes": [OVERLAPPING[0]], "phrases": ["dog"]}
    close(draw(model, boxes=[OVERLAPPING[0], empty]), draw(model, **one))
    nobody = draw(model, boxes=[empty, empty])
    assert torch.equal(nobody, draw(model, scale=0))


@pytest.mark.exact
@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_the_bare_pipeline_bit_for_bit(model, kind):
    bare = run(model.pipeline)
    assert torch.equal(draw(model, scale=0, **KINDS[kind]), bare)
    assert torch.equal(draw(model, subject_scales=[0, 0], **KINDS[kind]), bare)
    assert not torch.equal(draw(model, **KINDS[kind]), bare)
    mixed = batch(model, {"scale": 0, **KINDS[kind]}, {"seed": 1, **KINDS[kind]})
    close(mixed[0].pictures, bare)
    close(mixed[1].pictures, draw(model, seed=1, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_unconditional_half_carries_no_subjects(model, kind):
    """At the first step, whose input is the same with and without them."""

    def prediction(**changes):
        seen = []
        watching = model.backbone.unet.register_forward_hook(lambda _, __, output: seen.append(output[0].clone()))
        draw(model, num_images=2, **changes)
        watching.remove()
        return seen[0]

    bare, subjects = prediction(scale=0), prediction(**KINDS[kind])
    assert torch.equal(subjects[:2], bare[:2])
    assert (subjects[2:] != bare[2:]).flatten(1).any(dim=1).all()


@settings(max_examples=6)
@given(scale=st.floats(0.1, 2), first=st.floats(0, 2), second=st.floats(0, 2))
def test_scales_compose(model, scale, first, second):
    product = draw(model, scale=1.0, subject_scales=[scale * first, scale * second])
    close(draw(model, scale=scale, subject_scales=[first, second]), product)


@pytest.mark.parametrize("count", [8, 12])
def test_many_subjects(model, count):
    """Every one of them matters, whether there are few or many, and their order still does not."""
    columns = count // 2
    boxes = [[c / columns, r / 2, (c + 1) / columns, (r + 1) / 2] for r in range(2) for c in range(columns)]
    subjects = {"images": PICTURES[:count], "boxes": boxes, "phrases": ["dog"] * count}
    whole = draw(model, **subjects)
    turned = {name: values[::-1] for name, values in subjects.items()}
    close(draw(model, **turned), whole)
    for place in range(count):
        images = [*PICTURES[:count]]
        images[place] = PICTURES[-1]
        assert not torch.allclose(draw(model, **{**subjects, "images": images}), whole, rtol=0, atol=1e-5), place


def test_several_views_of_a_subject(model):
    listed = draw(model, images=[[DOG, CLOCK], TEAPOT])
    spelled = {"images": [DOG, CLOCK, TEAPOT], "boxes": [LEFT, LEFT, RIGHT], "phrases": ["dog", "dog", "teapot"]}
    assert torch.equal(listed, draw(model, **spelled))
    assert not torch.equal(listed, draw(model))
    close(draw(model, images=[[CLOCK, DOG], TEAPOT]), listed)
    # With auto layout views share their region too.
    close(draw(model, images=[[CLOCK, DOG], TEAPOT], **LAYOUT), draw(model, images=[[DOG, CLOCK], TEAPOT], **LAYOUT))


def test_the_same_view_twice_is_the_view_once(model):
    """A softmax over every token twice is the softmax; where boxes overlap, though, the subject counts twice."""
    twice = {"images": [[DOG, DOG], TEAPOT]}
    close(draw(model, **twice), draw(model))
    alone = {"images": [DOG], "boxes": None, "phrases": ["dog"]}
    close(draw(model, **{**alone, "images": [[DOG, DOG]]}), draw(model, **alone))
    overlapping = draw(model, boxes=OVERLAPPING, **twice)
    assert not torch.allclose(overlapping, draw(model, boxes=OVERLAPPING), rtol=0, atol=1e-5)
    close(draw(model, boxes=OVERLAPPING, images=[[DOG, DOG], [TEAPOT, TEAPOT]]), draw(model, boxes=OVERLAPPING))


# ------------------------------------------------------------------------------------------------- pictures, batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_picture_k_is_the_one_that_its_seed_gives_alone(model, kind, guidance_scale):
    options = {**KINDS[kind], "guidance_scale": guidance_scale}
    three = draw(model, num_images=3, seed=5, **options)
    for k in range(3):
        close(three[k], draw(model, seed=5 + k, **options)[0])
    close(draw(model, num_images=3, seed=5, batch_size=2, **options), three)


ONE = {"images": [CLOCK], "boxes": [[0.1, 0.1, 0.9, 0.4]], "phrases": ["clock"], "prompt": "a clock on the beach"}
THREE = {
    "images": PICTURES[3:6],
    "boxes": [LEFT, RIGHT, [0.2, 0, 0.8, 1]],
    "phrases": ["dog", "teapot", "hat"],
    "prompt": "a dog and a teapot with a hat",
    "negative_prompt": "a room",
    "seed": 4,
}


@pytest.mark.exact
def test_an_item_of_a_batch_does_not_change_another(model):
    first, _ = batch(model, {}, THREE)
    for other in ({**THREE, "images": PICTURES[6:9]}, {**THREE, "scale": 0.1, "seed": 9}, {**THREE, "prompt": "a hat"}):
        again, changed = batch(model, {}, other)
        assert torch.equal(again.pictures, first.pictures)
        assert not torch.equal(changed.pictures, batch(model, {}, THREE)[1].pictures)


@pytest.mark.parametrize(
    "options",
    [{}, LAYOUT, {"auto_layout": True, "auto_layout_start": 1, "guidance_scale": 1.0}],
    ids=["boxes", "auto layout", "auto layout alone"],
)
def test_a_batch_of_different_layouts_equals_single_calls(model, options):
    """Different numbers of subjects, masks, windows, free subjects, scales: all in one batch of the UNet."""
    requests = [
        ONE,
        {},
        {**THREE, "subject_windows": [None, (0, 0.5), (0.2, 1)], "scale": 0.5},
        {**MASKS, "seed": 7, "subject_scales": [0.3, 1]},
        {**ONE, "seed": 8, "num_images": 2, "images": [[CLOCK, DOG]]},
    ]
    # Requests with a negative prompt don't share a batch with those without.
    requests = [{"negative_prompt": "", **options, **request} for request in requests]
    calls = []
    counting = model.backbone.unet.register_forward_hook(lambda *_: calls.append(1))
    together = batch(model, *requests)
    counting.remove()
    assert len(calls) == QUICK["steps"]
    for request, result in zip(requests, together, strict=True):
        close(result.pictures, draw(model, **request))
        assert result.seeds == tuple(request.get("seed", 0) + k for k in range(request.get("num_images", 1)))
    for result, alone in zip(together, (batch(model, request)[0] for request in requests), strict=True):
        if options:
            close(result.layout_maps, alone.layout_maps)
        else:
            assert result.layout_maps is None


def test_layouts_found_and_layouts_given_in_one_batch(model):
    requests = [{}, {**FREE, "seed": 1}, {"boxes": None, "seed": 2}, {**LAYOUT, "seed": 3}]
    for request, result in zip(requests, batch(model, *requests), strict=True):
        close(result.pictures, draw(model, **request))
        assert (result.layout_maps is None) == (request == {})


# ------------------------------------------------------------------------------------------------ nothing is kept


SEQUENCE = ["boxes", "auto layout", "windows", "free", "masks", "auto layout", "boxes", "free", "masks", "windows"]


def fresh_process_results(model_dir, out):
    """Per kind one process that draws nothing else: each is forked from this one, which has drawn nothing at all."""
    for number, kind in enumerate(KINDS):
        child = os.fork()
        if child == 0:
            loaded = MSDiffusion.from_pretrained(model_dir, device="cpu")
            save_file({"picture": draw(loaded, **KINDS[kind])}, Path(out) / f"{number}.safetensors")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, kind


@pytest.mark.exact
@pytest.mark.usefixtures("forked_processes")
def test_calls_in_any_order_equal_fresh_processes_bit_for_bit(tiny_model_dir, model, tmp_path):
    command = [sys.executable, __file__, str(tiny_model_dir), str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, capture_output=True)
    fresh = {kind: load_file(tmp_path / f"{number}.safetensors")["picture"] for number, kind in enumerate(KINDS)}
    assert len({picture.sum().item() for picture in fresh.values()}) == len(KINDS)
    for kind in SEQUENCE:
        assert torch.equal(draw(model, **KINDS[kind]), fresh[kind]), kind
        draw(model, seed=3, height=48, num_images=2, guidance_scale=1.0, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_one_condition_serves_any_runs_sizes_and_seeds(model, kind):
    """What a run leaves in a condition changes no other one."""
    used = condition_of(model, **KINDS[kind])
    square, wide = {"height": 64, "width": 64}, {"height": 48, "width": 88}
    for seed, size, guidance_scale in ((0, square, 3.0), (1, wide, 3.0), (0, square, 3.0), (2, square, 1.0)):
        options = {"seed": seed, "guidance_scale": guidance_scale, **size}
        drawn = run(model.pipeline, used, **options)
        assert torch.equal(drawn, run(model.pipeline, condition_of(model, **KINDS[kind]), **options))
        assert torch.equal(drawn, draw(model, **options, **KINDS[kind]))


def test_runs_of_one_step_do_not_add_up(tiny_model_dir):
    """Every run begins at the same timestep then, so no rise tells them apart."""
    model = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    model.pipeline.scheduler = LCMScheduler.from_config(model.pipeline.scheduler.config)
    model.pipeline.set_progress_bar_config(disable=True)
    layout = {"auto_layout": True, "auto_layout_start": 1}
    used = condition_of(model, **layout)
    for seed in (0, 1, 2, 0):
        alone = run(model.pipeline, condition_of(model, **layout), steps=1, seed=seed)
        assert torch.equal(run(model.pipeline, used, steps=1, seed=seed), alone)


# --------------------------------------------------------------------------------------------- places on the picture


def cells_inside(box, rows, columns):
    """By definition: the cells of a grid over the picture whose inside the box touches."""
    x1, y1, x2, y2 = box
    return np.array(
        [
            [c < x2 * columns and c + 1 > x1 * columns and r < y2 * rows and r + 1 > y1 * rows for c in range(columns)]
            for r in range(rows)
        ]
    )


@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(3, 14), st.integers(3, 14)),
    boxes=st.lists(any_boxes, min_size=2, max_size=2),
)
def test_boxes_are_at_their_rows_and_columns_at_every_level(model, size, boxes):
    height, width = (8 * value for value in size)
    condition = condition_of(model, boxes=boxes)
    run(model.pipeline, condition, steps=1, height=height, width=width, output_type="latent")
    tokens = model.adapter.tokens_per_subject
    rows, columns = height // 2, width // 2  # of the latents
    levels = []
    for _ in range(2):  # the tiny UNet attends in its two lower levels
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        levels.append((rows, columns))
    masks = {patches: mask for (_, _, patches), mask in condition._attention_masks.items()}
    assert masks.keys() == {rows * columns for rows, columns in levels}
    for rows, columns in levels:
        mask = masks[rows * columns][0, 0].unflatten(0, (rows, columns)).numpy()
        expected = [cells_inside(box, rows, columns) for box in boxes]
        for subject, inside in enumerate(expected):
            part = mask[..., subject * tokens : (subject + 1) * tokens]
            assert (part == inside[..., None]).all()
        assert (mask[..., 2 * tokens :] == ~(expected[0] | expected[1])[..., None]).all()


@settings(max_examples=6)
@given(
    x=st.tuples(st.integers(0, 7), st.integers(1, 8)),
    y=st.tuples(st.integers(0, 7), st.integers(1, 8)),
    finer=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_a_rectangular_mask_is_its_box(model, x, y, finer):
    """On the grid of the coarsest attention, 8 x 8 patches, and for masks of any resolution that shows it."""
    (x1, x2), (y1, y2) = ((first, min(8, first + length)) for first, length in (x, y))
    mask = np.zeros((8, 8), dtype=bool)
    mask[y1:y2, x1:x2] = True
    mask = mask.repeat(finer[0], axis=0).repeat(finer[1], axis=1)
    box = [x1 / 8, y1 / 8, x2 / 8, y2 / 8]
    with_box = draw(model, boxes=[box, RIGHT])
    assert torch.equal(draw(model, boxes=[box, RIGHT], masks=[mask, None]), with_box)
    assert torch.equal(draw(model, boxes=[None, RIGHT], masks=[mask, None]), with_box)


def test_a_mask_that_is_no_rectangle(model):
    corner = np.ones((8, 8), dtype=bool)
    corner[4:, 4:] = False
    masked = draw(model, boxes=[[0, 0, 1, 1], RIGHT], masks=[corner, None])
    assert not torch.equal(masked, draw(model, boxes=[[0, 0, 1, 1], RIGHT]))
    for finer in (corner.repeat(3, 0).repeat(3, 1), corner.repeat(100, 0).repeat(64, 1)):
        assert torch.equal(draw(model, boxes=[[0, 0, 1, 1], RIGHT], masks=[finer, None]), masked)
    picture = Image.fromarray(corner.repeat(8, 0).repeat(8, 1).astype(np.uint8) * 255)
    assert torch.equal(draw(model, boxes=[[0, 0, 1, 1], RIGHT], masks=[picture, None]), masked)


def test_without_boxes_the_references_are_used_and_their_places_shown(model):
    free = {**TWO, "boxes": None}
    [result] = batch(model, free)
    assert result.layout_maps.shape == (1, 2, 32, 32)
    assert result.layout_maps.amin() >= 0
    assert result.layout_maps.amax() <= 1
    assert not torch.equal(result.layout_maps[:, 0], result.layout_maps[:, 1])
    assert not torch.equal(draw(model, boxes=None, images=[TEAPOT, DOG]), result.pictures)
    assert not torch.equal(draw(model, scale=0), result.pictures)
    assert torch.equal(draw(model, boxes=[None, None]), result.pictures)
    two = batch(model, {**free, "num_images": 2, "height": 48})[0]
    assert two.layout_maps.shape == (2, 2, 24, 32)


def test_a_free_subject_beside_one_with_a_box(model):
    """The box stays, exactly; what is free is not where auto layout with a box would put it."""
    mixed = draw(model, **FREE)
    for other in ({}, {"boxes": None}, LAYOUT, {"boxes": [LEFT, [0, 0, 1, 1]]}, {"boxes": [RIGHT, None]}):
        assert not torch.equal(mixed, draw(model, **other))
    silent = {"subject_scales": [1, 0]}
    close(draw(model, **FREE, **silent), draw(model, images=[DOG], boxes=[LEFT], phrases=["dog"]))


# ----------------------------------------------------------------------------------------------------- step windows


def latents_of_steps(model, **changes):
    """The latents after each step."""
    seen = []

    def keep(pipeline, step, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        return {}

    draw(model, steps=4, callback_on_step_end=keep, **changes)
    return seen


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_windows(model, guidance_scale):
    """Four steps at timesteps 999, 749, 499, 249 of 1000: two in each half."""

    def of(**changes):
        return latents_of_steps(model, guidance_scale=guidance_scale, **changes)

    always, never = of(), of(scale=0)
    for step, whole in enumerate(of(subject_windows=[(0, 1), None])):
        assert torch.equal(whole, always[step])
    early, late = of(subject_windows=[(0, 0.5)] * 2), of(subject_windows=[(0.5, 1)] * 2)
    for step in range(2):
        assert torch.equal(early[step], always[step])
        assert torch.equal(late[step], never[step])
        assert not torch.equal(early[step + 2], always[step + 2])
        assert not torch.equal(late[step + 2], never[step + 2])
    # From the middle on, the early one goes as if there were no subjects, and the late one as if there were no window.
    second_half = StableDiffusionXLImg2ImgPipeline(**model.pipeline.components, add_watermarker=False)
    second_half.set_progress_bar_config(disable=True)
    rest = {"steps": 4, "denoising_start": 0.5, "output_type": "latent", "guidance_scale": guidance_scale}
    close(run(second_half, image=early[1], **rest), early[3])
    close(run(second_half, condition_of(model), image=never[1], **rest), late[3])


def test_windows_are_each_subjects_own(model):
    def of(**changes):
        return latents_of_steps(model, **changes)

    alone = of(images=[DOG], boxes=[LEFT], phrases=["dog"])
    handed_over = of(subject_windows=[None, (0.5, 1)])
    both = of()
    for step in range(2):
        close(handed_over[step], alone[step])
        assert not torch.allclose(handed_over[step + 2], alone[step + 2], rtol=0, atol=1e-5)
    assert not torch.allclose(handed_over[3], both[3], rtol=0, atol=1e-5)
    # A window between two steps shows its subject in none.
    nowhere = of(subject_windows=[None, (0.3, 0.4)])
    for step in range(4):
        close(nowhere[step], alone[step])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    fresh_process_results(*sys.argv[1:3])


def test_requests_without_a_negative_prompt_get_the_pipelines_own(model):
    """Zeros in place of an empty text, where the base model says so; never mixed up in a batch."""
    requests = [{}, {"negative_prompt": ""}, {"seed": 1}, {"seed": 1, "negative_prompt": "a red clock"}]
    together = [result.pictures for result in batch(model, *requests)]
    for request, pictures in zip(requests, together, strict=True):
        close(pictures, draw(model, **request))
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_mask_does_not_depend_on_the_masks_beside_it(model):
    """Masks of other resolutions, in the same request and in the same batch."""
    rows, columns = np.mgrid[0:3, 0:3]
    coarse, fine = rows + columns < 3, np.random.default_rng(0).random((16, 17)) < 0.3
    first = {"boxes": None, "masks": [coarse, None], "subject_scales": [1, 0], "auto_layout_start": 3}
    alone = draw(model, **first)
    close(draw(model, **{**first, "masks": [coarse, fine]}), alone)
    other = {"boxes": None, "masks": [fine, fine[:7]], "auto_layout_start": 3}
    close(batch(model, first, other)[0].pictures, alone)


def test_a_subject_that_is_left_out_stays_out_when_auto_layout_comes(model):
    alone = draw(model, images=[DOG], boxes=[LEFT], phrases=["dog"], auto_layout=True, auto_layout_start=1)
    with pytest.warns(UserWarning, match="no area"):
        empty = draw(model, boxes=[LEFT, [0.5, 0.5, 0.5, 0.9]], auto_layout=True, auto_layout_start=1)
    close(empty, alone)
    close(draw(model, subject_scales=[1, 0], auto_layout=True, auto_layout_start=1), alone)
