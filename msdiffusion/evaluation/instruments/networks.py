"""What the instruments share: the layers they are made of, how they see pictures, and how they are saved and loaded.

Letters: B pictures, N boxes of all pictures together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from data_pipeline.errors import InputError
from data_pipeline.models.model_claims import check_network, read_json
from data_pipeline.models.weights import fill, read_tensors
from msdiffusion.errors import DataError, WeightsError
from msdiffusion.files import write_weights
from msdiffusion.own_memory import give_own_memory

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class Instrument(nn.Module):
    """A network that looks at pictures, shaped by a dataclass of parameters that is saved beside its weights."""

    kind: ClassVar[str]
    """What it is called: in its config, in messages, and by the config that trains it."""
    params_type: ClassVar[type]

    def __init__(self, params: Any) -> None:
        super().__init__()
        self.params = params

    @contextmanager
    def looking(self) -> Iterator[torch.device]:
        """In evaluation mode for a while; gives the device of the weights."""
        was_training = self.training
        self.eval()
        try:
            yield next(self.parameters()).device
        finally:
            self.train(was_training)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors; the directory is made if need be."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": f"msdiffusion.{self.kind}", **dataclasses.asdict(self.params)}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_weights(weights, folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads what `save_pretrained` wrote, in evaluation mode.

        Raises:
            WeightsError: a file is missing, the directory holds something else, or the weights don't fit the config,
                or are no finite numbers.
        """
        folder = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise WeightsError(
                    f"no {cls.kind} at {folder}: {name} is missing; lightning fit -c configs/embedded/{cls.kind}.yaml "
                    "trains one"
                )
        try:
            check_network(folder)
            config = read_json(folder / CONFIG_NAME)
            model_type = f"msdiffusion.{cls.kind}"
            if config.pop("model_type", None) != model_type:
                raise InputError(
                    f"{folder / CONFIG_NAME} doesn't describe a {cls.kind} (its model_type isn't {model_type})"
                )
            params = cls.params_type(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
            )
            with torch.device("meta"):
                network = cls(params)
            fill(network, read_tensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, assign=True)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise WeightsError(f"the {cls.kind} at {folder} can't be loaded: {error}") from error
        give_own_memory(network)
        return network.eval()


class HalvingStage(nn.Module):
    """Halves the picture and widens the features: a strided convolution, then one residual convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(width_out)
        self.refine = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(width_out)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to half the side."""
        features = torch.relu(self.down_norm(self.down(features)))
        return torch.relu(features + self.refine_norm(self.refine(features)))


class PooledReader(nn.Module):
    """Conv net with one linear head per question. Mean and maximum are both pooled: how much, and whether at all."""

    def __init__(self, widths: Sequence[int], classes: dict[str, int]) -> None:
        super().__init__()
        stages = [HalvingStage(before, after) for before, after in pairwise(widths)]
        self.trunk = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU(), *stages)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], count) for name, count in classes.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(N, 3, h, w) to the answers of every head."""
        features = self.trunk(pictures)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}


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
    if not isinstance(picture, np.ndarray):
        picture = np.asarray(picture.convert("RGB"))
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DataError(f"a picture must be uint8 of shape (height, width, 3), got {picture.dtype} {picture.shape}")
    return torch.tensor(picture).permute(2, 0, 1).float() / 255


def as_batch(
    picture: Image | np.ndarray, boxes: Sequence[Sequence[float]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """One picture and its boxes (normalised xyxy) as `crop_boxes` takes them: (1, 3, H, W), (N, 4) and owners (N,)."""
    frames = torch.tensor([list(map(float, box)) for box in boxes], device=device).reshape(-1, 4)
    return as_pixels(picture)[None].to(device), frames, torch.zeros(len(boxes), dtype=torch.int64, device=device)


def resample(pictures: Tensor, side: int) -> Tensor:
    """Pictures (B, C, H, W) as squares (B, C, side, side), without aliasing."""
    return nn.functional.interpolate(pictures, (side, side), mode="bilinear", antialias=True, align_corners=False)


def check_box_lists(pictures: Sequence[Any], boxes: Sequence[Any]) -> None:
    """Raise DataError unless there is a list of boxes for every picture."""
    if len(pictures) != len(boxes):
        raise DataError(f"every picture needs its list of boxes: {len(pictures)} pictures, {len(boxes)} lists")
