"""Pictures of a batch, drawn with the adapter as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.training.samples.batch import PairsBatch


@torch.no_grad()
def draw_batch(
    backbone: Backbone,
    condition: SubjectCondition,
    batch: PairsBatch,
    *,
    num_steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
) -> list[Image.Image]:
    """Pictures for the captions, references and boxes of a batch, by the base's own diffusers pipeline.

    Args:
        batch: on the device of the networks.
        seeds: of the noise, drawn on the CPU, one per picture.

    Returns:
        B RGB pictures of the size of the targets.
    """
    height, width = batch.size
    backbone.pipeline.set_progress_bar_config(disable=True)
    latents = backbone.pipeline(
        prompt=batch.captions,
        # no negative prompt, as generation without one: the pipeline decides what stands in for it
        height=height,
        width=width,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        cross_attention_kwargs={"subjects": condition},
        output_type="latent",
    ).images
    return backbone.decode_latents(latents)
