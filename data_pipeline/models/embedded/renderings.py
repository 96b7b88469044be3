"""Frames of the procedural world rendered ahead of time, with boxes, masks and identities: what both models learn from.

Most frames are frames of clips, as the pipeline decodes them; the others are scenes with two subjects of one category,
which clips never show. Frames pass through JPEG with halved colour planes, which leaves traces much like H.264's.
"""

import hashlib
import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.errors import SettingsError
from data_pipeline.picture_formats import open_listed
from data_pipeline.world.clips import sample_clip
from data_pipeline.world.palette import CATEGORIES, COLORS, PATTERNS
from data_pipeline.world.renderings import make_once
from data_pipeline.world.scenes import MAX_SUBJECTS, sample_scene, tight_boxes
from data_pipeline.world.subjects import Identity, sample_identity

VERSION = 1
"""Raised when frames change, so that old caches are not read."""
CHUNK = 240
FRAMES_OF_A_CLIP = 4
MIN_PIXELS = 16
"""Of a subject that hides behind another, fewer visible pixels are not worth a box."""


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """What to render.

    frames: how many. size: their side in pixels, even. split: identities, "train", "held_out" or "all". twins: share
    of the draws that give one frame with two subjects of one category; any other draw gives a clip, of which four
    frames are kept, so 0.2 makes 6 % of the frames and 0.75 makes 43 %. crowded: share of the clips with four
    subjects. jpeg: share of the frames that pass through JPEG. seed: an equal seed gives equal frames, whatever the
    workers.
    """

    frames: int = 24_000
    size: int = 128
    split: str = "train"
    twins: float = 0.2
    crowded: float = 0.08
    jpeg: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise SettingsError(f"frames must be at least 1, got {self.frames}")
        if self.size < 32 or self.size % 2:
            raise SettingsError(f"size must be even and at least 32 pixels, got {self.size}")
        if not 0 <= self.twins <= 1:
            raise SettingsError(f"twins is a share, in [0, 1], got {self.twins}")
        if self.split not in ("train", "held_out", "all"):
            raise SettingsError(f"split must be train, held_out or all, got {self.split!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Renderings:
    """Rendered frames, N of them.

    images: uint8 (N, size, size, 3). boxes: float32 (N, 4, 4) normalised xyxy, zero where a frame has fewer subjects.
    masks: uint8 (N, 4, size * size / 8), bits of the visible pixels, see ``mask``. traits: int8 (N, 4, 3), numbers of
    category, main colour and pattern in the world's palette, -1 where absent.
    """

    images: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    traits: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def mask(self, frames: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Bool (K, size, size): the masks of subject ``slots[k]`` of frame ``frames[k]``."""
        size = self.images.shape[1]
        return np.unpackbits(self.masks[frames, slots], axis=-1).reshape(-1, size, size).astype(bool)


def render(settings: RenderSettings, cache: Path, workers: int = 2) -> Renderings:
    """Renders what ``settings`` says, or reads it back from the folder ``cache``. The arrays are memory maps."""
    key = hashlib.sha256(json.dumps([VERSION, asdict(settings)]).encode()).hexdigest()[:12]
    folder = cache / f"frames-{settings.split}-{key}"
    make_once(folder, lambda partial: _render_into(settings, partial, workers))
    names = ("images", "boxes", "masks", "traits")
    return Renderings(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})


def _render_into(settings: RenderSettings, folder: Path, workers: int) -> None:
    count, size = settings.frames, settings.size
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count, *shape))
        for name, dtype, shape in (
            ("images", np.uint8, (size, size, 3)),
            ("boxes", np.float32, (MAX_SUBJECTS, 4)),
            ("masks", np.uint8, (MAX_SUBJECTS, size * size // 8)),
            ("traits", np.int8, (MAX_SUBJECTS, 3)),
        )
    }
    starts = range(0, count, CHUNK)
    jobs = [(settings, start, min(CHUNK, count - start)) for start in starts]
    bar = {"total": len(jobs), "desc": f"rendering {count} frames ({settings.split})", "mininterval": 5.0}
    if workers == 0:
        chunks = (_render_chunk(job) for job in jobs)
        _fill(arrays, starts, tqdm(chunks, **bar))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            _fill(arrays, starts, tqdm(pool.map(_render_chunk, jobs), **bar))
    for array in arrays.values():
        array.flush()


def _fill(arrays: dict[str, np.ndarray], starts: range, chunks: tqdm) -> None:
    for start, chunk in zip(starts, chunks, strict=True):
        for name, values in chunk.items():
            arrays[name][start : start + len(values)] = values


def _render_chunk(job: tuple[RenderSettings, int, int]) -> dict[str, np.ndarray]:
    """The frames from number ``start`` on."""
    settings, start, count = job
    rng = np.random.default_rng([settings.seed, start])
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    subjects: list[list[Identity]] = []
    while len(images) < count:
        if rng.random() < settings.twins:
            chosen = sample_twins(rng, settings.split)
            scene = sample_scene(rng, size=settings.size, subjects=chosen)
            shown = [(scene.image, scene.masks)]
        else:
            number = MAX_SUBJECTS if rng.random() < settings.crowded else None
            clip = sample_clip(
                rng, split=settings.split, num_subjects=number, size=settings.size, num_frames=FRAMES_OF_A_CLIP
            )
            chosen, shown = clip.subjects, list(zip(clip.frames, clip.masks, strict=True))
        for image, visible in shown:
            images.append(_through_jpeg(image, rng) if rng.random() < settings.jpeg else image)
            masks.append(visible)
            subjects.append(chosen)
    return _as_arrays(images[:count], masks[:count], subjects[:count])


def sample_twins(rng: np.random.Generator, split: str) -> list[Identity]:
    """Draws two subjects of one category, half of the time with a third subject of another one."""
    first, second = (str(name) for name in rng.choice(CATEGORIES, 2, replace=False))
    names = [first, first, second][: 2 + int(rng.random() < 0.5)]
    return [sample_identity(rng, split, names[index]) for index in rng.permutation(len(names))]


def _through_jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(60, 96)), subsampling="4:2:0")
    return np.asarray(open_listed(file))


def _as_arrays(
    images: list[np.ndarray], masks: list[np.ndarray], subjects: list[list[Identity]]
) -> dict[str, np.ndarray]:
    count, size = len(images), images[0].shape[0]
    boxes = np.zeros((count, MAX_SUBJECTS, 4), np.float32)
    bits = np.zeros((count, MAX_SUBJECTS, size * size // 8), np.uint8)
    traits = np.full((count, MAX_SUBJECTS, 3), -1, np.int8)
    for row, (visible, identities) in enumerate(zip(masks, subjects, strict=True)):
        seen = [index for index in range(len(identities)) if visible[index].sum() >= MIN_PIXELS]
        boxes[row, : len(seen)] = tight_boxes(visible[seen])
        bits[row, : len(seen)] = np.packbits(visible[seen].reshape(len(seen), size * size), axis=1)
        for slot, index in enumerate(seen):
            identity = identities[index]
            traits[row, slot] = (
                CATEGORIES.index(identity.category),
                tuple(COLORS).index(identity.main_color),
                PATTERNS.index(identity.pattern),
            )
    return {"images": np.stack(images), "boxes": boxes, "masks": bits, "traits": traits}
