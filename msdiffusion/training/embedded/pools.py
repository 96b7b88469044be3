"""What the embedded base is trained on: scenes with captions, and views of identities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data_pipeline.world import BACKGROUNDS, write_caption
from data_pipeline.world.renderings import Renderings, identity_labels
from msdiffusion.training.embedded.networks import build_tokenizer

CAPTION_SHARES = {"full": 0.5, "color": 0.2, "plain": 0.3}
"""How often a training caption names the whole identity, the main colour only, or the category only."""


class SceneCaptions(Dataset):
    """Scenes with tokenised captions; a batch is drawn at once, so there is no per-sample collation."""

    def __init__(self, renderings: Renderings, seed: int = 0) -> None:
        self.renderings = renderings
        tokenizer = build_tokenizer()
        names = tuple(BACKGROUNDS)
        columns = []
        for detail in CAPTION_SHARES:
            captions = [
                write_caption([renderings.identities[i] for i in row if i >= 0], names[b], detail)
                for row, b in zip(renderings.members, renderings.backgrounds, strict=True)
            ]
            rows = tokenizer(captions, padding="max_length", truncation=True).input_ids
            columns.append(np.asarray(rows, np.int16))
        self.tokens = np.stack(columns, axis=1)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.renderings.images)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = np.sort(np.asarray(indices))
        rng = np.random.default_rng([self.seed, *rows[:4].tolist()])
        detail = rng.choice(len(CAPTION_SHARES), len(rows), p=list(CAPTION_SHARES.values()))
        images, boxes = self.renderings.images[rows], self.renderings.boxes[rows]
        flip = rng.random(len(rows)) < 0.5
        images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
        present = boxes[..., 2:3] > 0
        mirrored = np.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], -1) * present
        return {
            "images": torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2),
            "boxes": torch.from_numpy(np.where(flip[:, None, None], mirrored, boxes)),
            "tokens": torch.from_numpy(self.tokens[rows, detail].astype(np.int64)),
        }


class IdentityViews(Dataset):
    """Two views of each identity with its labels, for the image encoder."""

    def __init__(self, renderings: Renderings, views: int) -> None:
        self.views = renderings.views.reshape(-1, views, *renderings.views.shape[1:])
        self.labels = identity_labels(renderings.identities)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = np.sort(np.asarray(indices))
        return {"views": torch.from_numpy(self.views[rows][:, :2]), "labels": torch.from_numpy(self.labels[rows])}


def prepare_views(views: Tensor, augment: bool) -> Tensor:
    """RGBA views (B, H, W, 4) uint8 on white, normalised as CLIP does, to (B, 3, H, W) float.

    With `augment` they are mirrored, shrunk and stretched by up to a quarter, shifted, and re-lit.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = views.permute(0, 3, 1, 2).float() / 255
    alpha = pixels[:, 3:]
    pixels = pixels[:, :3] * alpha + 1 - alpha
    if augment:
        count = len(pixels)
        zoom = 1 / torch.empty(count, 2, device=pixels.device).uniform_(0.75, 1.0)
        zoom[:, 0] *= torch.where(torch.rand(count, device=pixels.device) < 0.5, -1.0, 1.0)
        theta = torch.zeros(count, 2, 3, device=pixels.device)
        theta[:, [0, 1], [0, 1]] = zoom
        theta[:, :, 2] = (torch.rand(count, 2, device=pixels.device) * 2 - 1) * (zoom.abs() - 1)
        grid = nn.functional.affine_grid(theta, list(pixels.shape), align_corners=False)
        # Outside is white, so sample the distance from white, for which zero padding is right.
        pixels = 1 - nn.functional.grid_sample(1 - pixels, grid, align_corners=False)
        pixels = (pixels * torch.empty(count, 1, 1, 1, device=pixels.device).uniform_(0.85, 1.12)).clamp(0, 1)
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std
