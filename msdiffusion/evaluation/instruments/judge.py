"""The judge: small conv nets that read what a picture shows, so that generated pictures can be marked right or wrong.

It is trained on renders of the procedural world only (`judge_training.py`), never on a generated picture, and shares
nothing with the image encoder of the model it judges. From a box it reads category, main colour and pattern; from the
whole picture it reads the background.

Letters: B pictures, N boxes of all pictures together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from data_pipeline.models.model_claims import check_network, read_json
from data_pipeline.models.weights import fill, read_tensors
from data_pipeline.records import InputError
from msdiffusion.errors import DataError, WeightsError
from msdiffusion.files import write_weights
from msdiffusion.own_memory import give_own_memory

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
QUESTIONS = ("category", "color", "pattern", "background")
"""What the judge answers: the first three per box, the last per picture."""


@dataclass(frozen=True)
class JudgeParams:
    """Everything that shapes the networks; saved beside the weights."""

    categories: tuple[str, ...]
    colors: tuple[str, ...]
    patterns: tuple[str, ...]
    backgrounds: tuple[str, ...]
    crop_size: int = 48
    """Side in pixels that every box is resampled to."""
    picture_size: int = 48
    """Side in pixels that the whole picture is resampled to."""
    margin: float = 0.08
    """Share of the box side that is added on every side before the crop, so that outlines survive a tight box."""
    widths: tuple[int, ...] = (32, 64, 128, 192)
    """Channels of the stem and of each halving stage of the box network; the picture network has half of each."""

    def __post_init__(self) -> None:
        for name in ("categories", "colors", "patterns", "backgrounds"):
            names = getattr(self, name)
            if len(names) < 2 or len(set(names)) != len(names):
                raise DataError(f"{name} must be at least two different names, got {names!r}")
        if len(self.widths) < 2 or min(self.widths) < 2:
            raise DataError(f"widths must be at least two numbers above 1, got {self.widths!r}")
        if not 0 <= self.margin < 1:
            raise DataError(f"margin is a share of the box side in [0, 1), got {self.margin}")
        smallest = 2 ** (len(self.widths) - 1)
        for name in ("crop_size", "picture_size"):
            if getattr(self, name) < smallest:
                raise DataError(f"{name} must be at least {smallest} for {len(self.widths)} widths")

    def names(self, question: str) -> tuple[str, ...]:
        """Possible answers to one of `QUESTIONS`, in the order of the classes."""
        answers = dict(zip(QUESTIONS, (self.categories, self.colors, self.patterns, self.backgrounds), strict=True))
        return answers[question]


@dataclass(frozen=True)
class BoxReading:
    """What the judge sees in one box. Confidences are the network's own probabilities, in [0, 1]."""

    category: str
    color: str
    pattern: str
    confidence: dict[str, float]


@dataclass(frozen=True)
class PictureReading:
    """What the judge sees in one picture: the background, and each box in the order given."""

    background: str
    background_confidence: float
    boxes: tuple[BoxReading, ...]


class _Stage(nn.Module):
    """Halves the picture and widens the features: a strided convolution, then one residual convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(width_out)
        self.refine = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(width_out)

    def forward(self, features: Tensor) -> Tensor:
        features = torch.relu(self.down_norm(self.down(features)))
        return torch.relu(features + self.refine_norm(self.refine(features)))


class _Reader(nn.Module):
    """Conv net with one linear head per question. Mean and maximum are both pooled: how much, and whether at all."""

    def __init__(self, widths: Sequence[int], classes: dict[str, int]) -> None:
        super().__init__()
        stages = [_Stage(before, after) for before, after in pairwise(widths)]
        self.trunk = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU(), *stages)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], count) for name, count in classes.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pictures)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}


class Judge(nn.Module):
    """Reads category, main colour and pattern from boxes, and the background from the whole picture."""

    def __init__(self, params: JudgeParams) -> None:
        super().__init__()
        self.params = params
        counts = {question: len(params.names(question)) for question in QUESTIONS}
        self.box_reader = _Reader(params.widths, {question: counts[question] for question in QUESTIONS[:3]})
        halved = [max(2, width // 2) for width in params.widths]
        self.picture_reader = _Reader(halved, {"background": counts["background"]})

    def crop(self, pictures: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
        """Crops (N, 3, crop_size, crop_size) as the box network sees them, see `crop_boxes`."""
        return crop_boxes(pictures, boxes, owners, self.params.margin, self.params.crop_size)

    def forward(self, pictures: Tensor, boxes: Tensor, owners: Tensor) -> dict[str, Tensor]:
        """Logits of every question.

        Args:
            pictures: (B, 3, H, W) RGB in [0, 1].
            boxes: (N, 4) normalised xyxy.
            owners: (N,) int64, the picture of each box.

        Returns:
            "category", "color", "pattern": (N, classes); "background": (B, classes).
        """
        side = self.params.picture_size
        whole = nn.functional.interpolate(pictures, (side, side), mode="bilinear", antialias=True, align_corners=False)
        crops = self.crop(pictures, boxes, owners)
        return self.box_reader(crops * 2 - 1) | self.picture_reader(whole * 2 - 1)

    @torch.inference_mode()
    def read(
        self, pictures: Sequence[Image | np.ndarray], boxes: Sequence[Sequence[Sequence[float]]]
    ) -> list[PictureReading]:
        """Reads pictures of any sizes.

        Args:
            pictures: PIL pictures or uint8 (H, W, 3) arrays.
            boxes: per picture its boxes, normalised xyxy; the list of a picture may be empty.

        Raises:
            DataError: other numbers of pictures and box lists, or a box that isn't an ordered xyxy inside the picture.
        """
        if len(pictures) != len(boxes):
            raise DataError(f"every picture needs its list of boxes: {len(pictures)} pictures, {len(boxes)} lists")
        for picture_boxes in boxes:
            for box in picture_boxes:
                if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                    raise DataError(f"a box is x1, y1, x2, y2 in [0, 1] with x1 < x2 and y1 < y2, got {list(box)}")
        was_training = self.training
        self.eval()
        try:
            return [self._read_one(picture, own) for picture, own in zip(pictures, boxes, strict=True)]
        finally:
            self.train(was_training)

    def _read_one(self, picture: Image | np.ndarray, boxes: Sequence[Sequence[float]]) -> PictureReading:
        device = next(self.parameters()).device
        pixels = as_pixels(picture).to(device)[None]
        frames = torch.tensor([list(map(float, box)) for box in boxes], device=device).reshape(-1, 4)
        owners = torch.zeros(len(frames), dtype=torch.int64, device=device)
        best = {name: logits.softmax(1).max(1) for name, logits in self(pixels, frames, owners).items()}
        answers = {
            name: [(self.params.names(name)[int(index)], float(value)) for value, index in zip(*found, strict=True)]
            for name, found in best.items()
        }
        background, confidence = answers["background"][0]
        readings = tuple(
            BoxReading(
                **{question: answers[question][index][0] for question in QUESTIONS[:3]},
                confidence={question: answers[question][index][1] for question in QUESTIONS[:3]},
            )
            for index in range(len(frames))
        )
        return PictureReading(background, confidence, readings)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors; the directory is made if need be."""
        save_instrument(self, "msdiffusion.judge", directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Judge:
        """Loads a judge in evaluation mode.

        Raises:
            WeightsError: a file is missing, the directory holds something else, or the weights don't fit the config.
        """
        return load_instrument(cls, JudgeParams, "msdiffusion.judge", directory)


def save_instrument(network: nn.Module, model_type: str, directory: str | Path) -> None:
    """Writes a network with `params` (a dataclass) as config.json and model.safetensors."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, **dataclasses.asdict(network.params)}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_weights(weights, folder / WEIGHTS_NAME)


def load_instrument(network_type: type, params_type: type, model_type: str, directory: str | Path) -> nn.Module:
    """Loads what `save_instrument` wrote, in evaluation mode.

    Raises:
        WeightsError: a file is missing, the directory holds something else, or the weights don't fit the config, or
            are no finite numbers.
    """
    folder = Path(directory)
    kind = model_type.removeprefix("msdiffusion.")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise WeightsError(
                f"no {kind} at {folder}: {name} is missing; lightning fit -c configs/embedded/{kind}.yaml trains one"
            )
    try:
        check_network(folder)
        config = read_json(folder / CONFIG_NAME)
        if config.pop("model_type", None) != model_type:
            raise InputError(f"{folder / CONFIG_NAME} doesn't describe a {kind} (its model_type isn't {model_type})")
        params = params_type(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        )
        with torch.device("meta"):
            network = network_type(params)
        fill(network, read_tensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, assign=True)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise WeightsError(f"the {kind} at {folder} can't be loaded: {error}") from error
    give_own_memory(network)
    return network.eval()


def crop_boxes(pictures: Tensor, boxes: Tensor, owners: Tensor, margin: float, size: int) -> Tensor:
    """Boxes as square crops: widened by the margin, cut at the picture's edge, resampled without aliasing.

    Args:
        pictures: (B, 3, H, W) floats of any range.
        boxes: (N, 4) normalised xyxy.
        owners: (N,) int64, the picture of each box.
        margin: share of the box side that is added on every side.
        size: side of the crops in pixels.

    Returns:
        (N, 3, size, size) in the range of `pictures`.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    wide = torch.cat([boxes[:, :2] - margin * sides, boxes[:, 2:] + margin * sides], 1)
    pixels = wide.clamp(0, 1) * boxes.new_tensor([pictures.shape[3], pictures.shape[2]]).repeat(2)
    regions = torch.cat([owners[:, None].to(pixels), pixels], 1).to(pictures)
    return roi_align(pictures, regions, size, sampling_ratio=-1, aligned=True)


def as_pixels(picture: Image | np.ndarray) -> Tensor:
    """A PIL picture or a uint8 (H, W, 3) array as float32 (3, H, W) RGB in [0, 1].

    Raises:
        DataError: an array of another shape or type.
    """
    import numpy as np

    if not isinstance(picture, np.ndarray):
        picture = np.asarray(picture.convert("RGB"))
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DataError(f"a picture must be uint8 of shape (height, width, 3), got {picture.dtype} {picture.shape}")
    return torch.tensor(picture).permute(2, 0, 1).float() / 255
