"""Held-out cases drawn by a model, in batches of equally many subjects: the one file here that knows the generator."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msdiffusion.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from msdiffusion.evaluation.world import PictureMaker, WorldCase
    from msdiffusion.generation.generate import MSDiffusion


def picture_maker(
    model: MSDiffusion,
    *,
    batch_size: int,
    label: str,
    scale: float | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    precision: str = "float32",
    regions: str = "boxes",
) -> PictureMaker:
    """A callable that draws one picture per case with one scale of the adapter, several cases at a time.

    The noise of a case depends on its own seed only: the same for every scale, batch size and order. Cases are drawn
    together with others of as many subjects, so that nothing is padded.

    Args:
        model: the generator.
        batch_size: cases drawn at once at most.
        label: of the progress bar.
        scale: of the adapter; 0 switches it off. This and the next two: None for the adapter's default.
        steps: denoising steps.
        guidance_scale: weight against the empty prompt.
        precision: "float32", or "bfloat16" for matrix products and convolutions in bfloat16, all else in float32.
        regions: where subjects are shown: in their "boxes"; in the "masks" of the true render; or, from the fifth step
            on, where the text's attention is: "auto_layout".

    Raises:
        RequestError: unknown regions.
    """
    if regions not in ("boxes", "masks", "auto_layout"):
        raise RequestError(f'regions must be "boxes", "masks" or "auto_layout", got {regions!r}')
    settings = model.adapter.config.drawing(scale=scale, steps=steps, guidance_scale=guidance_scale)

    def make(cases: Sequence[WorldCase]) -> list[Image.Image]:
        from tqdm import tqdm

        pictures: dict[int, Image.Image] = {}
        with tqdm(total=len(cases), desc=label, unit="picture") as bar:
            for batch in _batches(cases, batch_size):
                drawn = _draw([cases[index] for index in batch], model, precision, regions, **settings)
                pictures.update(zip(batch, drawn, strict=True))
                bar.update(len(batch))
        return [pictures[index] for index in range(len(cases))]

    return make


def picture_side(model: MSDiffusion) -> int:
    """Side in pixels of the pictures that the base model was made for."""
    return model.backbone.unet.config.sample_size * model.backbone.latent_factor


def _by_count(cases: Sequence[WorldCase]) -> dict[int, list[int]]:
    """Numbers of subjects, as they come up, to the indices of the cases that have them."""
    found: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        found.setdefault(len(case.subjects), []).append(index)
    return found


def _batches(cases: Sequence[WorldCase], batch_size: int) -> list[list[int]]:
    """Indices of the cases in batches of one number of subjects."""
    return [
        indices[first : first + batch_size]
        for _, indices in sorted(_by_count(cases).items())
        for first in range(0, len(indices), batch_size)
    ]


def _draw(
    cases: Sequence[WorldCase], model: MSDiffusion, precision: str, regions: str, **settings: float
) -> list[Image.Image]:
    """One batch of the denoiser with another prompt, layout and seed for every picture."""
    import torch

    from msdiffusion.request.request import check_request

    requests = [
        check_request(
            case.references,
            case.boxes,
            case.prompt,
            case.phrases,
            masks=list(case.masks) if regions == "masks" else None,
            auto_layout=regions == "auto_layout",
            seed=case.seed,
            **settings,
        )
        for case in cases
    ]
    with torch.autocast(model.adapter.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="these weights ")  # what they can't do is measured on purpose
            results = model.generate_batch(requests, progress=False, batch_size=len(requests))
    return [result.pictures[0] for result in results]


def varied(cases: Sequence[WorldCase], count: int) -> list[int]:
    """Indices of up to `count` cases, as evenly over the numbers of subjects as there are cases, in their order."""
    rounds = itertools.zip_longest(*_by_count(cases).values())
    chosen = [index for each in rounds for index in each if index is not None][:count]
    return sorted(chosen, key=lambda index: (len(cases[index].subjects), index))
