"""References made square and handed to the image encoder's preprocessing, without the networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from msdiffusion.errors import RequestError

SQUASH_SIDE = 512
"""Pixels of the square that the official scripts squash a reference to before CLIP's own resizing."""


LONG_SIDE, SHORT_SIDE = 8192, 2048
"""Pixels: a reference with a side above the first is reduced to about the second before it is padded to a square."""


@dataclass(frozen=True)
class ReferencePreparation:
    """``Backbone.prepare_references`` without the networks: small enough to be handed to loading processes."""

    image_processor: CLIPImageProcessor
    background: tuple[int, ...]
    """RGB, 0-255."""
    fit: str
    """"pad" or "squash"."""

    def __call__(self, references: Sequence[Image.Image]) -> Tensor:
        """PIL pictures -> (N, 3, h, w) float32 on the CPU; RequestError for an unknown ``fit``."""
        squares = [_square(flatten(reference, self.background), self.background, self.fit) for reference in references]
        return self.image_processor(images=squares, return_tensors="pt").pixel_values


def flatten(reference: Image.Image, background: Sequence[int]) -> Image.Image:
    """The picture as RGB, with ``background`` (RGB, 0-255) where it is transparent."""
    if not reference.has_transparency_data:
        return reference.convert("RGB")
    canvas = Image.new("RGBA", reference.size, (*background, 255))
    return Image.alpha_composite(canvas, reference.convert("RGBA")).convert("RGB")


def _square(picture: Image.Image, background: Sequence[int], fit: str) -> Image.Image:
    if fit == "squash":
        return picture.resize((SQUASH_SIDE, SQUASH_SIDE), Image.Resampling.BICUBIC)
    if fit == "pad":
        if max(picture.size) > LONG_SIDE:  # the square of a panorama takes gigabytes
            picture = picture.reduce(max(picture.size) // SHORT_SIDE)
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), tuple(background))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return canvas
    raise RequestError(f'fit must be "pad" or "squash", got {fit!r}')
