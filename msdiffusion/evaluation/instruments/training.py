"""What the trainings of all instruments share: renders that are degraded, and how a network learns and is written.

Letters: B scenes of a batch, N subjects of all of them together.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from msdiffusion.errors import DataError
from msdiffusion.evaluation.instruments.networks import Instrument

Batch = dict[str, Tensor]
"""pictures (B, 3, H, W) in [0, 1]; boxes (N, 4) normalised xyxy; owners (N,) int64; and what a training asks for."""


class InstrumentTraining(pl.LightningModule):
    """A one-cycle AdamW, and the network written to `output` when training ends."""

    network: Instrument

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Any]] = defaultdict(list)
        """What the validation that is running has found so far."""

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self.seen.clear()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a one-cycle learning rate over the whole run."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay
        )
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.learning_rate, steps, pct_start=0.15)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        """Writes the network."""
        if self.trainer.is_global_zero:
            self.network.save_pretrained(Path(self.hparams.output))


def check_counts(**counts: int) -> None:
    """Raise DataError unless each number is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def degrade(batch: Batch, *, generator: torch.Generator | None = None) -> Batch:
    """A copy of the batch with pictures bent, blurred, re-lit and noisy, and with boxes that are a little off.

    It runs in float32 even inside mixed precision: these are pictures, not features.

    Args:
        batch: see Batch.
        generator: source of randomness on the CPU; None takes torch's global one.
    """
    pictures, boxes = batch["pictures"], batch["boxes"]
    count, device = len(pictures), pictures.device

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    # Bend: a smooth random displacement of up to a few per cent of the side.
    coarse = normal(count, 2, 5, 5) * uniform(count, 1, 1, 1, low=0.0, high=0.06)
    field = nn.functional.interpolate(coarse, pictures.shape[2:], mode="bicubic", align_corners=True)
    identity = torch.eye(2, 3, device=device).expand(count, 2, 3)
    grid = nn.functional.affine_grid(identity, list(pictures.shape), align_corners=False) + field.permute(0, 2, 3, 1)
    shown = nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    # Blur: a random mixture of the picture and its 5 x 5 binomial smoothing; negative weights would sharpen.
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=device) / 16
    kernel = (taps[:, None] * taps[None]).expand(3, 1, 5, 5)
    padded = nn.functional.pad(shown, (2, 2, 2, 2), mode="replicate")
    smooth = nn.functional.conv2d(padded, kernel, groups=3)
    shown = torch.lerp(shown, smooth, uniform(count, 1, 1, 1, low=-0.5, high=1.0).clamp_min(0))
    # Light: gain and offset of the picture, and a far smaller one per channel, since colour is a question.
    gain = uniform(count, 1, 1, 1, low=0.85, high=1.15) * uniform(count, 3, 1, 1, low=0.96, high=1.04)
    shown = shown * gain + uniform(count, 1, 1, 1, low=-0.06, high=0.06)
    # Noise, fine and coarse: the second is what half-denoised latents leave behind.
    shown = shown + normal(*shown.shape) * uniform(count, 1, 1, 1, low=0.0, high=0.06)
    blotches = normal(count, 3, pictures.shape[2] // 4, pictures.shape[3] // 4)
    blotches = nn.functional.interpolate(blotches, pictures.shape[2:], mode="bilinear", align_corners=False)
    shown = (shown + blotches * uniform(count, 1, 1, 1, low=0.0, high=0.05)).clamp(0, 1)
    # Boxes: every edge off by up to a tenth of the side, as when a subject doesn't fill its box exactly.
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = (boxes + sides * uniform(len(boxes), 4, low=-0.1, high=0.1)).clamp(0, 1)
    return batch | {"pictures": shown, "boxes": moved}
