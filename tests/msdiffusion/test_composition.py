"""Subjects beside every feature of diffusers: nothing is lost on either side.

For each feature: with scale 0, or without a condition, the picture is the plain pipeline's with that feature, bit for
bit; subjects change it; and with subjects the feature still does what it does.
"""

import copy
import shutil

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.embeddings import ImageProjection
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from msdiffusion import MSDiffusion
from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.attention.control import Control
from msdiffusion.attention.rows import Rows
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.own_memory import give_own_memory
from msdiffusion.places import DEFAULT_MODEL

PROMPT = "a dog and a teapot on the beach"
LEFT, RIGHT = [0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]
DOG = Image.new("RGB", (40, 30), (220, 40, 40))
TEAPOT = Image.new("RGBA", (30, 50), (40, 40, 220, 255))
TWO = {"images": [DOG, TEAPOT], "boxes": [LEFT, RIGHT], "phrases": ["dog", "teapot"]}
LAYOUT = {"auto_layout": True, "auto_layout_start": 2}
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of numpy, in diffusers' schedulers
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


def freeze(pipeline):
    """As our backbone has it: other kernels, and so other last bits, come for weights that may train, and on some
    processors for weights that still lie in their file.
    """
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            give_own_memory(part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def model(new_model):
    """A new one for each test: features change it."""
    return new_model()


@pytest.fixture(scope="module")
def new_bare(tiny_model_dir, copier):
    return copier(freeze(StableDiffusionXLPipeline.from_pretrained(tiny_model_dir / "base", add_watermarker=False)))


@pytest.fixture
def bare(new_bare):
    """The plain pipeline, which our code has never touched; a new one for each test."""
    return new_bare()


@pytest.fixture(scope="module")
def unchanged(new_model):
    """Pictures without any feature: without and with subjects."""
    model = new_model()
    return ours(model, 0), ours(model)


@pytest.fixture(scope="module")
def unchanged_layout(new_model):
    """The same with auto layout."""
    return ours(new_model(), **LAYOUT)


def ours(model, scale=0.8, **changes):
    options = {"prompt": PROMPT, "steps": 3, "guidance_scale": 3.0, "seed": 0, "output_type": "pt", "progress": False}
    return model.generate(**{**TWO, **options, "scale": scale, **changes})


def theirs(pipeline, *, steps=3, seed=0, num_images=1, **changes):
    options = {"guidance_scale": 3.0, "output_type": "pt", "num_images_per_prompt": num_images}
    generators = [torch.Generator().manual_seed(seed + number) for number in range(num_images)]
    texts = {} if "prompt_embeds" in changes else {"prompt": PROMPT}
    return pipeline(**{**texts, **options, "num_inference_steps": steps, "generator": generators, **changes}).images


def compose(model, bare, unchanged, **options):
    """The three promises; ``model`` and ``bare`` have the feature. Returns the pictures without and with subjects."""
    plain, subjects = theirs(bare, **options), ours(model, **options)
    assert torch.equal(ours(model, 0, **options), plain), "scale 0 is not the plain pipeline with this feature"
    assert not torch.equal(subjects, plain), "subjects have no effect beside this feature"
    if unchanged is not None:
        assert not torch.equal(plain, unchanged[0]), "the test's feature does nothing in the plain pipeline"
        assert not torch.equal(subjects, unchanged[1]), "the feature does nothing where there are subjects"
    assert subjects.isfinite().all()
    return plain, subjects


def on_pipeline(model, pipeline):
    """The same model, drawing with another pipeline."""
    return MSDiffusion(Backbone(pipeline, model.backbone.image_encoder, model.backbone.image_processor), model.adapter)


def condition_of(model, **changes):
    return model.condition(**{**TWO, "scale": 0.8, **changes})


def redraw(pipeline, condition=None, **options):
    """A call of any pipeline, with or without a condition."""
    subjects = {} if condition is None else {"cross_attention_kwargs": {"subjects": condition}}
    return theirs(pipeline, **subjects, **options)


def compose_with_condition(model, pipeline, bare, **options):
    """The promises for a pipeline of another kind, as (plain, with subjects)."""
    freeze(pipeline)
    freeze(bare)
    plain, subjects = redraw(bare, **options), redraw(pipeline, condition_of(model), **options)
    assert torch.equal(redraw(pipeline, **options), plain)
    assert torch.equal(redraw(pipeline, condition_of(model, scale=0), **options), plain)
    assert not torch.equal(subjects, plain)
    assert subjects.isfinite().all()
    return plain, subjects


# ------------------------------------------------------------------------------------------------------- samplers


SCHEDULERS = {
    "DDIM": {"eta": 0.7},
    "DDPM": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "DPMSolverMultistep": {},
    "DPMSolverMultistep karras": {"use_karras_sigmas": True},
    "DPMSolverMultistep sde": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestep": {},
    "DEISMultistep": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
    "KDPM2AncestralDiscrete": {},
    "LMSDiscrete": {},
    "PNDM": {},
    "UniPCMultistep": {},
    "LCM": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(model, bare, unchanged, name):
    settings = dict(SCHEDULERS[name])
    options = {"eta": settings.pop("eta")} if "eta" in settings else {}
    for pipeline in (model.pipeline, bare):
        kind = getattr(diffusers, f"{name.split()[0]}Scheduler")
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    compose(model, bare, unchanged, steps=4, **options)
    # Auto layout counts the UNet's calls, of which some samplers make several per step, and finds the first one itself.
    condition = condition_of(model, prompt=PROMPT, **LAYOUT)
    first = redraw(model.pipeline, condition, steps=4, **options)
    assert condition._maps.steps == model.pipeline.num_timesteps
    assert torch.equal(redraw(model.pipeline, condition, steps=4, **options), first)
    assert condition._maps.steps == model.pipeline.num_timesteps


def test_own_timesteps_sigmas_and_guidance_rescale(model, bare, unchanged):
    compose(model, bare, unchanged, guidance_rescale=0.7)
    for pipeline in (model.pipeline, bare):
        pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    compose(model, bare, unchanged, sigmas=[10.0, 3.0, 0.5])
    compose(model, bare, unchanged, timesteps=[900, 500, 100])


# ----------------------------------------------------------------------------------------------------------- LoRA


LORA = "pytorch_lora_weights.safetensors"
"""Without the name older releases of diffusers ask the hub, where they must not."""


def random_lora(unet, folder, seed=0, strength=1.0):
    """A LoRA in the usual file format, with an effect."""
    unet = copy.deepcopy(unet)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            weight.data = strength * torch.randn(weight.shape, generator=generator)
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


def test_lora(model, bare, unchanged, tmp_path):
    random_lora(bare.unet, tmp_path)
    for pipeline in (model.pipeline, bare):
        pipeline.load_lora_weights(tmp_path, weight_name=LORA, adapter_name="one")
    whole = compose(model, bare, unchanged)
    weaker = compose(model, bare, unchanged, cross_attention_kwargs={"scale": 0.3})
    assert not torch.equal(weaker[1], whole[1])
    for pipeline in (model.pipeline, bare):
        pipeline.set_adapters("one", 0.3)
    reset = compose(model, bare, unchanged)
    torch.testing.assert_close(reset, weaker, rtol=0, atol=1e-5)
    with pytest.raises(WeightsError, match="a LoRA is in the unet"):  # which a base's files can't hold
        model.save_pretrained(tmp_path / "whole", include_backbone=True)
    for pipeline in (model.pipeline, bare):
        pipeline.unload_lora_weights()
    assert torch.equal(ours(model), unchanged[1])


def test_two_loras_fused(model, bare, unchanged, tmp_path):
    for seed, name in enumerate(["one", "two"]):
        folder = random_lora(bare.unet, tmp_path / name, seed)
        for pipeline in (model.pipeline, bare):
            pipeline.load_lora_weights(folder, weight_name=LORA, adapter_name=name)
    for pipeline in (model.pipeline, bare):
        pipeline.set_adapters(["one", "two"], [0.2, 0.3])
    apart = compose(model, bare, unchanged)
    for pipeline in (model.pipeline, bare):
        pipeline.fuse_lora()
    torch.testing.assert_close(compose(model, bare, unchanged), apart, rtol=0, atol=1e-4)


def test_a_lora_changed_midway(model, bare, tmp_path):
    """The keys of the text, which we keep over the steps of a run, must follow."""
    random_lora(bare.unet, tmp_path)
    for pipeline in (model.pipeline, bare):
        pipeline.load_lora_weights(tmp_path, weight_name=LORA, adapter_name="one")

    def draw(function, *arguments, midway):
        def switch(pipeline, step, _, kwargs):
            if step == 0:
                pipeline.set_adapters("one", midway)
            return kwargs

        for pipeline in (model.pipeline, bare):
            pipeline.set_adapters("one", 1.0)
        return function(*arguments, callback_on_step_end=switch)

    assert torch.equal(draw(ours, model, 0, midway=0.1), draw(theirs, bare, midway=0.1))
    # As subjects keep the text's keys, they must change as they do in a run that keeps none: with empty boxes.
    empty = {"boxes": [[0, 0, 0, 0]] * 2}
    with pytest.warns(UserWarning, match="no area"):
        cached = draw(lambda **options: ours(model, **empty, **options), midway=0.1)
    torch.testing.assert_close(cached, draw(theirs, bare, midway=0.1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_few_steps_with_a_distilled_lora(model, bare, unchanged, tmp_path, steps):
    random_lora(bare.unet, tmp_path, strength=0.3)
    for pipeline in (model.pipeline, bare):
        pipeline.load_lora_weights(tmp_path, weight_name=LORA)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    plain, subjects = compose(model, bare, unchanged, steps=steps, guidance_scale=1.0)
    two = ours(model, steps=steps, guidance_scale=1.0, num_images=2)
    torch.testing.assert_close(two[:1], subjects, rtol=0, atol=1e-5)
    assert not torch.equal(plain, subjects)


def test_a_distilled_unet_that_takes_the_guidance_as_input(model, bare):
    """LCM: ``time_cond_proj_dim``; guidance is an embedding, and the batch has no unconditional half."""
    torch.manual_seed(0)
    distilled = UNet2DConditionModel.from_config({**bare.unet.config, "time_cond_proj_dim": 8})
    distilled.load_state_dict(bare.unet.state_dict(), strict=False)
    torch.nn.init.normal_(distilled.time_embedding.cond_proj.weight)
    bare.register_modules(unet=copy.deepcopy(distilled), scheduler=LCMScheduler.from_config(bare.scheduler.config))
    model.pipeline.register_modules(unet=distilled, scheduler=copy.deepcopy(bare.scheduler))
    freeze(bare)
    model = on_pipeline(model, freeze(model.pipeline))
    _, weak = compose(model, bare, None, steps=2, guidance_scale=2.0)
    _, strong = compose(model, bare, None, steps=2, guidance_scale=9.0)
    assert not torch.equal(weak, strong)


# ------------------------------------------------------------------------------------- ControlNet, image to image


def random_controlnet(unet, seed=0):
    """ControlNet of the tiny UNet, whose zero convolutions have an effect."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(convolution.weight, std=0.5)
    return net


def hints(count):
    return [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("count", [1, 2])
def test_controlnet(model, bare, unchanged, count):
    nets = [random_controlnet(bare.unet, seed) for seed in range(count)]
    nets = nets[0] if count == 1 else nets
    controlled, ours_controlled = (
        StableDiffusionXLControlNetPipeline(
            **pipeline.components, controlnet=copy.deepcopy(nets), add_watermarker=False
        )
        for pipeline in (bare, model.pipeline)
    )
    freeze(controlled), freeze(ours_controlled)
    images = hints(count)
    options = {"image": images[0] if count == 1 else images}
    model = on_pipeline(model, ours_controlled)
    whole = compose(model, controlled, unchanged, **options)
    weak = [0.2] * count if count > 1 else 0.2
    weaker = compose(model, controlled, unchanged, controlnet_conditioning_scale=weak, **options)
    assert not torch.equal(weaker[1], whole[1])
    off = [0.0] * count if count > 1 else 0.0
    assert torch.equal(ours(model, controlnet_conditioning_scale=off, **options), unchanged[1])
    guessed = compose(model, controlled, unchanged, guess_mode=True, **options)
    assert not torch.equal(guessed[1], whole[1])


def start_picture(seed=0):
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_image_to_image(model, bare, strength):
    """Also with little noise: then the first call of the UNet is late in the schedule."""
    parts = (model.pipeline.components, bare.components)
    pipeline, plain = (StableDiffusionXLImg2ImgPipeline(**each, add_watermarker=False) for each in parts)
    options = {"image": start_picture(), "strength": strength, "steps": 5}
    _, subjects = compose_with_condition(model, pipeline, plain, **options)
    other = redraw(pipeline, condition_of(model), **{**options, "image": start_picture(1)})
    assert not torch.equal(other, subjects)
    two = redraw(pipeline, condition_of(model, num_images=2), num_images=2, **options)
    torch.testing.assert_close(two[:1], subjects, rtol=0, atol=1e-5)


def test_inpainting(model, bare):
    parts = (model.pipeline.components, bare.components)
    pipeline, plain = (StableDiffusionXLInpaintPipeline(**each, add_watermarker=False) for each in parts)
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 16:48, :32] = 1
    options = {"image": start_picture(), "mask_image": hole, "strength": 0.9, "steps": 4, "height": 64, "width": 64}
    before, subjects = compose_with_condition(model, pipeline, plain, **options, output_type="latent")
    changed = (before != subjects).any(dim=1)[0]
    assert changed[8:24, :16].all()
    assert not changed[:, 16:].any()  # what is kept, is kept with subjects too
    assert not changed[:8].any()


# ------------------------------------------------------------------------------------------------------------ text


def test_textual_inversion(model, bare, unchanged, tmp_path, monkeypatch):
    """One vector, and several, for which diffusers makes more tokens of the prompt than are written in it."""
    torch.manual_seed(0)
    save_file({"<toy>": torch.randn(16)}, tmp_path / "one.safetensors")
    save_file({"<toy>": torch.randn(32)}, tmp_path / "one_2.safetensors")
    save_file({"<many>": torch.randn(3, 16)}, tmp_path / "many.safetensors")
    save_file({"<many>": torch.randn(3, 32)}, tmp_path / "many_2.safetensors")
    for pipeline in (model.pipeline, bare):
        for name in ("one", "many"):
            pipeline.load_textual_inversion(tmp_path / f"{name}.safetensors")
            pipeline.load_textual_inversion(
                tmp_path / f"{name}_2.safetensors", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
            )
    for token in ("<toy>", "<many>"):
        prompt = f"a {token} and a teapot on the beach"
        _, subjects = compose(model, bare, unchanged, prompt=prompt)
        assert not torch.equal(ours(model, prompt=prompt, phrases=[token, "teapot"]), subjects)
    # The phrase means all vectors of its token, and phrases behind it are still found where they are.
    condition = condition_of(model, phrases=["<many>", "teapot"], prompt=prompt, auto_layout=True)
    assert condition.auto_layout.spans.tolist() == [[[2, 5], [7, 8]]]  # start, a, three vectors, and, a, teapot
    with pytest.warns(UserWarning, match="longer than the 40 tokens"):  # 20 words, but 60 tokens
        ours(model, prompt=prompt + " <many>" * 20, steps=1)
    plural = ours(model, prompt=prompt, phrases=["<many>", "teapot"])
    monkeypatch.setattr(model.pipeline, "maybe_convert_prompt", lambda text, _: text)
    assert not torch.equal(ours(model, prompt=prompt, phrases=["<many>", "teapot"]), plural)


def embeddings_of(pipeline, prompt=PROMPT, weight=1.5):
    """Prompt embeddings with the first word after the article weighted, as prompt weighting tools make them."""
    prompt_embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt, negative_prompt="a red clock")
    prompt_embeds = prompt_embeds.clone()
    prompt_embeds[:, 2] *= weight
    return {
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


@torch.no_grad()
def test_prompt_embeddings(model, bare, unchanged):
    embeddings = {**embeddings_of(bare), "negative_prompt": None}
    _, subjects = compose(model, bare, unchanged, **embeddings)
    two = ours(model, num_images=2, **embeddings)
    torch.testing.assert_close(two[:1], subjects, rtol=0, atol=1e-5)
    # Through the pipeline it is the same picture.
    assert torch.equal(redraw(model.pipeline, condition_of(model), **embeddings), subjects)
    # Weight 1 is the prompt itself.
    same = ours(model, **embeddings_of(bare, weight=1.0))
    assert torch.equal(same, ours(model, negative_prompt="a red clock"))


def test_second_prompts_and_skipped_layers(model, bare, unchanged):
    compose(model, bare, unchanged, prompt_2="a cat", negative_prompt_2="a hat")
    compose(model, bare, unchanged, clip_skip=1)


# ---------------------------------------------------------------------------------------- callbacks, latents, stages


def test_callbacks_see_and_change_every_step(model, bare, unchanged):
    seen = []

    def darken(pipeline, step, timestep, kwargs):
        seen.append((step, int(timestep), tuple(kwargs["latents"].shape)))
        return {"latents": kwargs["latents"] * 0.9}

    compose(model, bare, unchanged, callback_on_step_end=darken)
    assert len(seen) == 9  # three runs of three steps
    assert seen[:3] == seen[3:6] == seen[6:]


def guidance_off(pipeline, step, _, kwargs):
    """The callback of diffusers' documentation: no guidance from here on, so the batch is halved."""
    if step == 1:
        for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
            kwargs[name] = kwargs[name].chunk(2)[-1]
        pipeline._guidance_scale = 0.0
    return kwargs


@pytest.mark.parametrize("layout", [{}, LAYOUT])
def test_guidance_switched_off_midway(model, bare, unchanged, layout):
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    options = {"callback_on_step_end": guidance_off, "callback_on_step_end_tensor_inputs": names, "steps": 5}
    _, subjects = compose(model, bare, unchanged, **options)
    if layout:
        subjects = ours(model, **options, **layout)
    # Two pictures: a batch of four, then one of two, which must not be taken for one picture with guidance.
    two = ours(model, num_images=2, **options, **layout)
    torch.testing.assert_close(two[:1], subjects, rtol=0, atol=1e-5)
    torch.testing.assert_close(two[1:], ours(model, seed=1, **options, **layout), rtol=0, atol=1e-5)


def test_interrupting(model, bare, unchanged):
    def stop(pipeline, step, _, kwargs):
        pipeline._interrupt = step == 1
        return kwargs

    compose(model, bare, unchanged, steps=6, callback_on_step_end=stop)
    assert torch.equal(ours(model), unchanged[1])  # the next call runs to its end


def test_latents_in_and_out(model, bare, unchanged):
    latents = ours(model, output_type="latent")
    again = model.pipeline.vae.decode(latents / model.pipeline.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.equal((again / 2 + 0.5).clamp(0, 1), unchanged[1])
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))  # what the seed gives
    assert torch.equal(ours(model, latents=noise, seed=7), unchanged[1])
    assert torch.equal(ours(model, 0, latents=noise, seed=7), theirs(bare, latents=noise, seed=7))
    assert not torch.equal(ours(model, latents=noise.flip(-1)), unchanged[1])


def test_two_stages_share_the_way_from_noise_to_picture(model, bare):
    """Base, then refiner: here the same UNet, so both stages together must be one undivided run."""
    refiner, plain_refiner = (
        freeze(StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False))
        for pipeline in (model.pipeline, bare)
    )
    first = {"steps": 4, "denoising_end": 0.5, "output_type": "latent"}
    second = {"steps": 4, "denoising_start": 0.5}
    plain = theirs(plain_refiner, image=theirs(bare, **first), **second)
    assert torch.equal(plain, theirs(bare, steps=4))
    assert torch.equal(redraw(refiner, image=ours(model, 0, **first), **second), plain)
    latents = ours(model, **first)
    whole = redraw(refiner, condition_of(model), image=latents, **second)
    torch.testing.assert_close(whole, ours(model, steps=4), rtol=0, atol=1e-5)
    only_first = redraw(refiner, image=latents, **second)
    # A window measures the same way: a subject of the first half needs no condition in the second stage.
    window = {"subject_windows": [(0, 0.5)] * 2}
    torch.testing.assert_close(only_first, ours(model, steps=4, **window), rtol=0, atol=1e-5)
    assert not torch.equal(only_first, whole)


# ----------------------------------------------------------------------------------------------------- IP-Adapter


def write_ip_adapter(unet, image_encoder, folder, seed=0):
    """Random weights in the layout of the IP-Adapter repository, for the tiny UNet, with an image encoder."""
    torch.manual_seed(seed)
    width = unet.config.cross_attention_dim
    weights, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        size = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        parts = IPAdapterAttnProcessor2_0(size, width).state_dict()
        weights |= {f"ip_adapter.{number}.to_{part}_ip.weight": parts[f"to_{part}_ip.0.weight"] for part in "kv"}
        number += 2
    projection = ImageProjection(cross_attention_dim=width, image_embed_dim=16, num_image_text_embeds=4).state_dict()
    weights |= {f"image_proj.{name.replace('image_embeds', 'proj')}": value for name, value in projection.items()}
    (folder / "models").mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "models" / f"ip{seed}.safetensors"
    )
    shutil.copytree(image_encoder, folder / "models" / "image_encoder", dirs_exist_ok=True)
    return folder


@pytest.fixture
def ip_adapter(tiny_model_dir, bare, tmp_path):
    for seed in range(2):
        write_ip_adapter(bare.unet, tiny_model_dir / "image_encoder", tmp_path / "ip", seed)
    return tmp_path / "ip"


def load_ip(pipeline, folder, *seeds):
    names = [f"ip{seed}.safetensors" for seed in seeds]
    pipeline.load_ip_adapter(
        [str(folder)] * len(names),
        subfolder=["models"] * len(names),
        weight_name=names,
        image_encoder_folder="image_encoder",
    )
    freeze(pipeline)


STYLE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_ip_adapter_beside_ours(model, bare, unchanged, ip_adapter):
    for pipeline in (model.pipeline, bare):
        load_ip(pipeline, ip_adapter, 0)
    style = {"ip_adapter_image": STYLE}
    whole = compose(model, bare, unchanged, **style)
    for scale in (0.4, {"up": {"block_0": [1.0]}}):
        for pipeline in (model.pipeline, bare):
            pipeline.set_ip_adapter_scale(scale)
        weaker = compose(model, bare, unchanged, **style)
        assert not torch.equal(weaker[1], whole[1])
    for pipeline in (model.pipeline, bare):
        pipeline.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(ours(model, **style), unchanged[1], rtol=0, atol=1e-5)
    for pipeline in (model.pipeline, bare):
        pipeline.unload_ip_adapter()
    assert torch.equal(theirs(bare), unchanged[0])
    assert torch.equal(theirs(model.pipeline), unchanged[0])
    assert torch.equal(ours(model), unchanged[1])


def test_ip_adapters_with_masks(model, bare, unchanged, ip_adapter):
    for pipeline in (model.pipeline, bare):
        load_ip(pipeline, ip_adapter, 0, 1)
    left = torch.zeros(2, 1, 64, 64)
    left[0, :, :, :32] = left[1, :, :, 32:] = 1
    masks = IPAdapterMaskProcessor().preprocess(left, height=64, width=64)
    style = {"ip_adapter_image": [STYLE, STYLE.rotate(90)]}
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [masks[:1], masks[1:]]}}
    everywhere = compose(model, bare, unchanged, **style)
    halves = compose(model, bare, unchanged, **style, **masked)
    assert not torch.equal(halves[1], everywhere[1])
    nowhere = {"cross_attention_kwargs": {"ip_adapter_masks": [masks[:1] * 0, masks[1:] * 0]}}
    torch.testing.assert_close(ours(model, **style, **nowhere), unchanged[1], rtol=0, atol=1e-5)


def test_a_condition_made_before_an_ip_adapter_is_refused_and_never_ignored(model, ip_adapter):
    style = {"ip_adapter_image": STYLE}
    before = condition_of(model)
    load_ip(model.pipeline, ip_adapter, 0)
    with pytest.raises(RequestError, match=r"model.install\(\)"):
        redraw(model.pipeline, before, **style)
    after = redraw(model.pipeline, condition_of(model), **style)
    assert torch.equal(redraw(model.pipeline, before, **style), after)  # making one has installed ours again
    assert not torch.equal(after, redraw(model.pipeline, **style))
    model.pipeline.unload_ip_adapter()
    with pytest.raises(RequestError, match=r"model.install\(\)"):
        redraw(model.pipeline, before)
    model.install()
    assert torch.equal(redraw(model.pipeline, before), ours(model))


def test_ip_adapter_with_auto_layout(model, unchanged_layout, ip_adapter):
    """The text's attention is read from the text alone, whose keys the IP-Adapter gets as a pair with its own."""
    load_ip(model.pipeline, ip_adapter, 0)
    model.pipeline.set_ip_adapter_scale(0.0)
    styled = ours(model, ip_adapter_image=STYLE, **LAYOUT)
    torch.testing.assert_close(styled, unchanged_layout, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- memory, speed, formats


def test_freeu(model, bare, unchanged):
    for pipeline in (model.pipeline, bare):
        pipeline.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    compose(model, bare, unchanged)
    model.pipeline.disable_freeu()
    assert torch.equal(ours(model), unchanged[1])


def test_attention_slicing(model, bare, unchanged, unchanged_layout):
    for pipeline in (model.pipeline, bare):
        pipeline.enable_attention_slicing(1)
    plain, subjects = compose(model, bare, None)
    processors = model.pipeline.unet.attn_processors.values()
    assert all(isinstance(processor.base, SlicedAttnProcessor) for processor in processors)
    torch.testing.assert_close((plain, subjects), unchanged, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(model, **LAYOUT), unchanged_layout, rtol=0, atol=1e-5)
    model.pipeline.disable_attention_slicing()
    assert torch.equal(ours(model), unchanged[1])


def test_fused_projections(model, bare, unchanged, unchanged_layout):
    for pipeline in (model.pipeline, bare):
        pipeline.fuse_qkv_projections()
    plain, subjects = compose(model, bare, None)
    processors = model.pipeline.unet.attn_processors.values()
    assert all("Fused" in type(processor.base).__name__ for processor in processors)
    torch.testing.assert_close((plain, subjects), unchanged, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(model, **LAYOUT), unchanged_layout, rtol=0, atol=1e-5)
    model.pipeline.unfuse_qkv_projections()
    assert torch.equal(ours(model), unchanged[1])


def test_vae_slicing_and_tiling(model, bare, unchanged):
    for pipeline in (model.pipeline, bare):
        pipeline.vae.enable_slicing()
    plain, subjects = compose(model, bare, None, num_images=2)
    torch.testing.assert_close((plain[:1], subjects[:1]), unchanged, rtol=0, atol=1e-5)
    for pipeline in (model.pipeline, bare):
        pipeline.vae.enable_tiling()
        pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 16, 32
    compose(model, bare, unchanged)


@pytest.mark.exact
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloading(model, bare, unchanged, unchanged_layout, monkeypatch, way):
    """To the CPU from the CPU: the hooks and the empty weights in between are those of a GPU."""
    # diffusers would say "cpu:0", to which a weight on "cpu" is copied, and then it is no parameter to accelerate.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, _, **options: offload(part, "cpu", **options))
    for owner in (model, bare):
        getattr(owner, f"enable_{way}_cpu_offload")(device="cpu")
    assert model.backbone.unet._hf_hook is not None
    if way == "sequential":
        assert {weight.device.type for weight in model.backbone.unet.parameters()} == {"meta"}
    plain, subjects = compose(model, bare, None)
    assert torch.equal(plain, unchanged[0])
    assert torch.equal(subjects, unchanged[1])
    assert torch.equal(redraw(model.pipeline, condition_of(model)), unchanged[1])
    assert torch.equal(ours(model, **LAYOUT), unchanged_layout)
    if way == "sequential":
        assert {weight.device.type for weight in model.backbone.unet.parameters()} == {"meta"}
    assert model.adapter.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_model_dir, unchanged, dtype):
    model = MSDiffusion.from_pretrained(tiny_model_dir, torch_dtype=dtype, device="cpu")
    bare = freeze(StableDiffusionXLPipeline.from_pretrained(tiny_model_dir / "base", add_watermarker=False).to(dtype))
    plain, subjects = compose(model, bare, None)
    assert plain.dtype == subjects.dtype == dtype
    seeded = [
        torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=each) for each in (dtype, torch.float32)
    ]
    if torch.allclose(seeded[0].float(), seeded[1], atol=0.02):  # older torch draws other noise in half precision
        assert (subjects - unchanged[1]).abs().mean() < (plain - unchanged[1]).abs().mean()
    compose(model, bare, None, guidance_scale=1.0)
    assert ours(model, **LAYOUT, subject_windows=[(0, 0.9), None]).isfinite().all()


# -------------------------------------------------------------------------------------------------- torch.compile


COMPILERS = {
    "whole": lambda pipeline, **options: pipeline.unet.compile(**options),
    "wrapped": lambda pipeline, **options: setattr(pipeline, "unet", torch.compile(pipeline.unet, **options)),
    "blocks": lambda pipeline, **options: pipeline.unet.compile_repeated_blocks(**options),
}
MASK = np.zeros((20, 30), dtype=bool)
MASK[3:12, 4:20] = True
TIMED_MASK = {"masks": [MASK, None], "subject_windows": [(0, 0.5), (0.2, 1)]}
KINDS = {"boxes": {}, "masks and windows": TIMED_MASK, "all at once": {**TIMED_MASK, **LAYOUT, "boxes": [LEFT, None]}}
CALLS = (
    {},
    {"images": [TEAPOT, DOG], "seed": 3},
    {"scale": 0.3, "subject_scales": [0.2, 2.0]},
    {"prompt": "a red dog and a blue teapot in the room", "steps": 4},
    {"negative_prompt": "a clock", "guidance_scale": 5.0},
)


@pytest.fixture(scope="module")
def new_small(new_model, copier):
    """Function: () -> the tiny model with two levels and four cross attentions instead of three and seven, for pictures
    of 32 px.

    Compiling takes time by the layer, and what it compiles is the same in each. Maps are of two sizes here too.
    """
    torch.manual_seed(0)
    model = new_model()
    unet = UNet2DConditionModel.from_config(
        {
            **model.backbone.unet.config,
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "attention_head_dim": (2, 4),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    )
    pipeline = model.pipeline
    pipeline.register_modules(unet=unet)
    settings = dict(vars(model.adapter.config))
    adapter = MSAdapter.from_unet(unet, settings.pop("resampler"), **settings)
    backbone = Backbone(freeze(pipeline), model.backbone.image_encoder, model.backbone.image_processor)
    return copier(MSDiffusion(backbone, adapter))


@pytest.fixture
def small(new_small):
    """A new one for each test."""
    return new_small()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("whole", "boxes"),
        ("whole", "all at once"),
        ("wrapped", "boxes"),
        ("blocks", "boxes"),
        ("blocks", "masks and windows"),
    ],
)
@pytest.mark.slow
def test_compiled_without_breaks_and_once_for_all_calls(small, new_small, fresh_compiler, way, kind):
    """fullgraph fails at a break; from the second call on, anything to compile fails."""
    eager = new_small()
    COMPILERS[way](small.pipeline, fullgraph=True, backend="eager")
    calls = [{**KINDS[kind], **call} for call in CALLS]
    if "boxes" not in KINDS[kind]:
        calls.append({**KINDS[kind], "boxes": [[0, 0, 0.3, 0.4], [0.2, 0.3, 0.9, 1]]})
    for number, call in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            drawn = ours(small, **call)
        torch.testing.assert_close(drawn, ours(eager, **call), rtol=0, atol=1e-5)
    assert not counters["graph_break"]
    # Blocks: once for each of the two sizes of their maps. "all at once": the hook, which works out the windows; the
    # UNet; and the UNet in the first step, where auto layout has nothing to go by yet.
    expected = {"blocks": 2, "wrapped": 1, "whole": 1 if kind == "boxes" else 3}
    assert counters["stats"]["unique_graphs"] == expected[way]


def test_auto_layout_with_blocks_compiled_one_by_one_is_refused(model, fresh_compiler):
    model.pipeline.unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(RequestError, match=r"compile the whole UNet, pipeline.unet.compile\(\)"):
        ours(model, **LAYOUT)


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.slow
def test_compiled_code_never_ignores_a_condition(small, tiny_model_dir, tmp_path, fresh_compiler, way):
    ip_adapter = write_ip_adapter(small.backbone.unet, tiny_model_dir / "image_encoder", tmp_path)
    before = condition_of(small)
    COMPILERS[way](small.pipeline, backend="eager")
    redraw(small.pipeline, before)
    load_ip(small.pipeline, ip_adapter, 0)
    with pytest.raises(RequestError, match=r"model.install\(\)"):
        redraw(small.pipeline, before, ip_adapter_image=STYLE)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_compiled_to_machine_code(small, new_small, fresh_compiler):
    """Block by block only: on one core the whole tiny UNet takes two minutes, and gives the same."""
    eager = new_small()
    subjects, plain = ours(eager), ours(eager, 0)
    assert (subjects - plain).abs().max() > 0.01
    small.pipeline.unet.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(ours(small), subjects, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(small, 0), plain, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- other bases


def test_stable_diffusion_1(tiny_sd1_model_dir, tmp_path):
    """One text encoder, no size conditions; with img2img, LoRA, and the callback that ends guidance."""
    model = MSDiffusion.from_pretrained(tiny_sd1_model_dir, device="cpu")
    bare = freeze(StableDiffusionPipeline.from_pretrained(tiny_sd1_model_dir / "base", safety_checker=None))
    unchanged = compose(model, bare, None)
    compose(model, bare, None, guidance_scale=1.0, num_images=2)
    parts = (model.pipeline.components, bare.components)
    pipeline, plain = (
        diffusers.StableDiffusionImg2ImgPipeline(**each, requires_safety_checker=False) for each in parts
    )
    compose_with_condition(model, pipeline, plain, image=start_picture(), strength=0.6, steps=5)

    def halve(pipeline, step, _, kwargs):
        if step == 1:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
            pipeline._guidance_scale = 0.0
        return kwargs

    options = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 5}
    compose(model, bare, unchanged, **options)
    assert not torch.equal(ours(model, **LAYOUT), unchanged[1])
    random_lora(bare.unet, tmp_path)
    for each in (model.pipeline, bare):
        each.load_lora_weights(tmp_path, weight_name=LORA)
    compose(model, bare, unchanged)


# ------------------------------------------------------------------------------- other parts of a batch, other controls


def drawn_by(pipeline, condition=None, *, rows=None, **options):
    """A picture; ``rows`` for batches of other parts than guidance makes."""
    given = {} if condition is None else {"cross_attention_kwargs": {"subjects": condition, "rows": rows}}
    settings = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0, **given, **options}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images


def test_perturbed_attention_guidance(model, tiny_model_dir):
    parts = {"pag_applied_layers": ["mid"], "add_watermarker": False}
    pipeline = diffusers.StableDiffusionXLPAGPipeline(**model.pipeline.components, **parts)
    bare = diffusers.StableDiffusionXLPAGPipeline.from_pretrained(tiny_model_dir / "base", **parts)
    freeze(bare)
    pipeline.set_progress_bar_config(disable=True)
    rows = Rows(("unconditional", "conditional", "perturbed"), 1)
    expected = drawn_by(bare, pag_scale=3.0)
    assert torch.equal(drawn_by(pipeline, condition_of(model, scale=0), rows=rows, pag_scale=3.0), expected)
    assert not torch.equal(drawn_by(pipeline, condition_of(model), rows=rows, pag_scale=3.0), expected)
    rows = Rows(("conditional", "perturbed"), 1)
    alone = drawn_by(pipeline, condition_of(model), rows=rows, pag_scale=3.0, guidance_scale=1.0)
    assert not torch.equal(alone, drawn_by(bare, pag_scale=3.0, guidance_scale=1.0))


def test_instruct_pix2pix(tiny_sd1_model_dir):
    """Its batch begins with the conditional part; a subject leaves the two others alone."""
    model = MSDiffusion.from_pretrained(tiny_sd1_model_dir, device="cpu")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**model.pipeline.unet.config, "in_channels": 8}).requires_grad_(False)
    parts = {**model.pipeline.components, "unet": unet}
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    rows, start = Rows(("conditional", "image", "unconditional"), 1), {"image": start_picture()}
    expected = drawn_by(pipeline, **start)
    model.adapter.install(unet)
    assert torch.equal(drawn_by(pipeline, **start), expected)
    assert torch.equal(drawn_by(pipeline, condition_of(model, scale=0), rows=rows, **start), expected)
    predictions = []
    unet.register_forward_hook(lambda _, __, output: predictions.append(output[0]))
    drawn_by(pipeline, **start)
    assert not torch.equal(drawn_by(pipeline, condition_of(model), rows=rows, **start), expected)
    differs = [not torch.equal(*pair) for pair in zip(predictions[0], predictions[2], strict=True)]
    assert differs == [True, False, False]
    with pytest.raises(RequestError, match="say which"):
        drawn_by(pipeline, condition_of(model), **start)


def test_controls_beside_the_subjects(model):
    """They come through generate, and reach attention, text and latents."""

    class Everything(Control):
        def __init__(self):
            self.seen = []

        def wants(self, layer):
            return ("result",) if layer.kind == "self" else ()

        def text(self, step, states):
            self.seen.append(("text", step.number))
            return states

        def result(self, call, hidden):
            self.seen.append(("result", call.layer.kind))
            return hidden

        def latents(self, step, latents):
            self.seen.append(("latents", step.number))
            return latents + 1

    plain = ours(model)
    control = Everything()
    shifted = ours(model, cross_attention_kwargs={"controls": [control]}, steps=3)
    assert [each for each in control.seen if each[0] != "result"] == [
        (name, step) for step in range(3) for name in ("text", "latents")
    ]
    assert ("result", "self") in control.seen
    assert not torch.equal(shifted, plain)

    def add_one(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] + 1}

    assert torch.equal(shifted, ours(model, callback_on_step_end=add_one))
    assert torch.equal(ours(model), plain)
    named = {"callback_on_step_end": add_one, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(KeyError, match="latents"):  # which the callback itself does not get
        ours(model, **named)
    ours(model, cross_attention_kwargs={"controls": [control]}, **named)
    cut_off = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)  # needs tensors of its own
    both = ours(model, cross_attention_kwargs={"controls": [control]}, callback_on_step_end=cut_off)
    assert not torch.equal(both, shifted)
    assert not torch.equal(both, ours(model, callback_on_step_end=cut_off))
    for wrong in (control, [3], "control"):
        with pytest.raises(RequestError, match="controls must be"):
            ours(model, cross_attention_kwargs={"controls": wrong})


def test_the_embedded_model_keeps_its_promises_too():
    """Trained weights instead of random ones, in which an effect is what a user sees."""
    model = MSDiffusion.from_pretrained(DEFAULT_MODEL, device="cpu")
    bare = freeze(StableDiffusionXLPipeline.from_pretrained(DEFAULT_MODEL / "base", add_watermarker=False))
    plain, subjects = compose(model, bare, None, steps=2)
    changed = (plain - subjects).abs().amax(dim=1)[0]
    assert changed[16:48].mean() > changed[:8].mean()
