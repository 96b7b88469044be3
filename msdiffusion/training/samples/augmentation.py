"""What chance may change about a training sample, each by a setting of its own; all of it is off by default.

Every function takes the numbers that were drawn for it, uniform in [0, 1), so that one sample's changes depend on
nothing but its number, and on no other setting.

Boxes are (s, 4) normalised xyxy, s subjects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from msdiffusion.errors import RequestError
from msdiffusion.training.samples.draws import AUGMENTATION, generator_for
from msdiffusion.training.setting_names import check_choices

ROTATION, SHRINK, LIGHT = 15.0, 0.25, 0.3
"""What full strength of the references' augmentation means: degrees to either side, the part of the side that is lost,
and the change of brightness and contrast to either side."""


@dataclass(frozen=True)
class Augmentation:
    """What is changed about the samples of training; each setting is explained at ``PairsDataModule``.

    Raises:
        RequestError: if a number is out of range.
    """

    crop: Literal["random", "center"] = "center"
    flip_probability: float = 0.0
    subject_dropout: float = 0.0
    box_jitter: float = 0.0
    reference_augmentation: float = 0.0
    reference_flip_probability: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("flip_probability", "subject_dropout", "reference_augmentation", "reference_flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.box_jitter < 0.5:
            raise RequestError(f"box_jitter must be in [0, 0.5), so that no box gets lost, got {self.box_jitter}")

    @property
    def changes_references(self) -> bool:
        """Whether a reference is another picture each time."""
        return self.reference_augmentation > 0 or self.reference_flip_probability > 0


@dataclass(frozen=True)
class SampleChances:
    """All the numbers of one sample, uniform in [0, 1), drawn whether a setting needs them or not."""

    crop: np.ndarray
    """(2,) down and to the right."""
    flip: float
    order: np.ndarray
    """(s,) by which the subjects are sorted."""
    dropout: np.ndarray
    """(s,)."""
    jitter: np.ndarray
    """(s, 4)."""
    references: np.ndarray
    """(s, 5): flip, rotation, shrink, brightness, contrast."""

    @classmethod
    def draw(cls, seed: int, number: int, num_subjects: int) -> SampleChances:
        """Those of sample ``number`` of a run, for a pair with so many subjects."""
        generator = generator_for(seed, AUGMENTATION, number)
        s = num_subjects
        return cls(generator.random(2), generator.random(), *(generator.random(n) for n in (s, s, (s, 4), (s, 5))))


def drop_subjects(kept: np.ndarray, rate: float, uniforms: np.ndarray) -> np.ndarray:
    """Which subjects stay.

    Args:
        kept: int (k,) indices of subjects, k >= 1.
        rate: probability in [0, 1] of being left out.
        uniforms: (s,) of all subjects, in [0, 1).

    Returns:
        The indices that stay, in their order; where all would go, the one with the largest number.
    """
    staying = kept[uniforms[kept] >= rate]
    return staying if len(staying) else kept[[np.argmax(uniforms[kept])]]


def jitter_boxes(boxes: np.ndarray, share: float, uniforms: np.ndarray) -> np.ndarray:
    """Every edge moved by up to ``share`` of the box's side, in or out, uniformly, but never out of the picture.

    So the adapter learns from boxes as loose as people draw them.

    Args:
        boxes: (s, 4), none empty.
        share: in [0, 0.5): below a half, opposite edges cannot meet.
        uniforms: (s, 4) in [0, 1).

    Returns:
        float32 (s, 4), none empty.
    """
    if share == 0:
        return boxes
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moved = np.clip(boxes + (2 * uniforms - 1) * share * sides, 0, 1).astype(np.float32)
    # a box as thin as the spacing of float32 might be rounded to nothing
    empty = (moved[:, 2:] <= moved[:, :2]).any(axis=1)
    return np.where(empty[:, None], boxes, moved).astype(np.float32)


def change_reference(picture: Image.Image, strength: float, flip: bool, uniforms: np.ndarray) -> Image.Image:
    """A cut-out as another photograph might show it.

    It is rotated by up to 15 degrees to either side about its middle and cut to what is visible again; shrunk by up to
    a quarter within its frame, which leaves a transparent margin; and its brightness and its contrast change by up to
    30 % each, all of this uniformly and times ``strength``. The outline turns with the picture; transparent stays
    transparent. Shapes and hues stay as they are.

    Args:
        picture: RGBA.
        strength: in [0, 1]; 0 changes nothing of this.
        flip: mirror it left to right first.
        uniforms: (4,) in [0, 1): rotation, shrink, brightness, contrast.

    Returns:
        RGBA, about as large.
    """
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if strength == 0:
        return picture
    rotation, shrink, brightness, contrast = uniforms.tolist()
    picture = _light(picture, 1 + (2 * brightness - 1) * LIGHT * strength, 1 + (2 * contrast - 1) * LIGHT * strength)
    # Pillow weights the colours by alpha here, so that what lies under transparent pixels is not drawn in
    turned = picture.rotate((2 * rotation - 1) * ROTATION * strength, Image.Resampling.BICUBIC, expand=True)
    # the resampling spreads a trace of alpha over some pixels more
    visible = turned.getchannel("A").point([0] * 8 + [255] * 248).getbbox()
    turned = picture if visible is None else turned.crop(visible)
    factor = 1 / (1 - shrink * SHRINK * strength)
    width, height = (math.ceil(side * factor) for side in turned.size)
    framed = Image.new("RGBA", (width, height))
    framed.paste(turned, ((width - turned.width) // 2, (height - turned.height) // 2))
    return framed


def _light(picture: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Colours times ``brightness``, then away from or towards the mean grey of what is visible; alpha stays."""
    alpha = picture.getchannel("A")
    colors = ImageEnhance.Brightness(picture.convert("RGB")).enhance(brightness)
    grey = np.asarray(colors.convert("L"))[np.asarray(alpha) > 0]
    mean = round(float(grey.mean())) if grey.size else 0
    colors = Image.blend(Image.new("RGB", colors.size, (mean,) * 3), colors, contrast)
    colors.putalpha(alpha)
    return colors
