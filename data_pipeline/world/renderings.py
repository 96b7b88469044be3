"""Many scenes and reference views rendered ahead of time into arrays: the training data of the embedded base.

Drawing a subject costs 5 ms and placing it 0.3 ms, so a pool of drawn identities is reused in many scenes. Results are
kept in a cache folder named by a hash of the settings; a second call reads them back.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.world.palette import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS
from data_pipeline.world.scenes import (
    compose,
    fit_sprites,
    render_background,
    sample_count,
    sample_placement,
    tight_boxes,
)
from data_pipeline.world.subjects import Identity, render_subject, sample_identity

VERSION = 1
"""Raised when the drawings change, so that old caches are not read."""
MAX_SLOTS = 3
CHUNK = 500


@dataclass(frozen=True)
class RenderingSettings:
    """What to render: numbers of scenes and of identities in the pool.

    views: pictures of each identity, in different poses. split: "train", "held_out" or "all". size: side of a scene and
    long side of a view, in pixels. shares: probabilities of one, two and three subjects in a scene. seed: an equal seed
    gives equal renderings, whatever the number of workers.
    """

    scenes: int = 40_000
    identities: int = 5_000
    views: int = 2
    split: str = "train"
    size: int = 64
    shares: tuple[float, ...] = (0.6, 0.3, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenes < 0 or self.identities < 1 or self.views < 1:
            raise ValueError(f"need scenes >= 0, identities >= 1 and views >= 1, got {self}")
        if not 1 <= len(self.shares) <= MAX_SLOTS:
            raise ValueError(f"shares must name 1 to {MAX_SLOTS} probabilities, got {self.shares}")


@dataclass(frozen=True)
class Renderings:
    """Rendered arrays, read lazily from disk (numpy memory maps).

    images: (N, size, size, 3) uint8 scenes. boxes: (N, 3, 4) float32 normalised xyxy, zero where a scene has fewer
    subjects. members: (N, 3) int32 index into the I `identities`, -1 where absent. backgrounds: (N,) uint8 index into
    BACKGROUNDS. views: (I * views, size, size, 4) uint8 RGBA; view k of identity i stands at i * views + k, centred.
    """

    images: np.ndarray
    boxes: np.ndarray
    members: np.ndarray
    backgrounds: np.ndarray
    views: np.ndarray
    identities: list[Identity]


def load_or_render(settings: RenderingSettings, cache: Path | str, workers: int = 2) -> Renderings:
    """Memory maps of what `settings` says, rendered, or read back from a subfolder of `cache`. workers: processes."""
    key = hashlib.sha256(json.dumps([VERSION, asdict(settings)]).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{settings.split}-{key}"
    make_once(folder, lambda partial: _render_all(settings, partial, workers))
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("images", "boxes", "members", "backgrounds", "views")
    }
    identities = [Identity(**fields) for fields in json.loads((folder / "identities.json").read_text())]
    return Renderings(**arrays, identities=identities)


def make_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all, filled if it is not: two runs side by side may want the same one."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    fill(partial)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():
            raise


def _render_all(settings: RenderingSettings, folder: Path, workers: int) -> None:
    rng = np.random.default_rng([settings.seed, 1])
    identities = [
        sample_identity(rng, settings.split, CATEGORIES[i % len(CATEGORIES)]) for i in range(settings.identities)
    ]
    size, count = settings.size, settings.scenes
    shape = (settings.identities * settings.views, size, size, 4)
    views = np.lib.format.open_memmap(folder / "views.npy", "w+", np.uint8, shape)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, size, size, 3))
    boxes = np.zeros((count, MAX_SLOTS, 4), np.float32)
    members = np.full((count, MAX_SLOTS), -1, np.int32)
    backgrounds = np.zeros(count, np.uint8)

    def store_views(start: int, part: np.ndarray) -> None:
        views[start * settings.views : start * settings.views + len(part)] = part

    jobs = [(settings, identities[a : a + CHUNK], a) for a in range(0, len(identities), CHUNK)]
    _run(_render_views, jobs, workers, "drawing subjects", store_views)
    views.flush()

    def store(start: int, result: tuple[np.ndarray, ...]) -> None:
        for array, part in zip((images, boxes, members, backgrounds), result, strict=True):
            array[start : start + len(part)] = part

    jobs = [(settings, identities, str(folder / "views.npy"), a, min(a + CHUNK, count)) for a in range(0, count, CHUNK)]
    _run(_render_scenes, jobs, workers, "drawing scenes", store)
    images.flush()
    np.save(folder / "boxes.npy", boxes)
    np.save(folder / "members.npy", members)
    np.save(folder / "backgrounds.npy", backgrounds)
    (folder / "identities.json").write_text(json.dumps([i.as_dict() for i in identities]))


def _run(work: Callable, jobs: list[tuple], workers: int, title: str, store: Callable) -> None:
    """Runs `work(job) -> (start, result)` over processes and stores each result, with a progress bar."""
    # spawn: a fork after torch started its threads can deadlock.
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        for start, result in tqdm(pool.map(work, jobs), total=len(jobs), desc=title, unit="chunk"):
            store(start, result)


def center_view(sprite: np.ndarray, size: int) -> np.ndarray:
    """Centres an RGBA sprite (h, w, 4) uint8 on a transparent (size, size, 4) square; it must fit."""
    view = np.zeros((size, size, 4), np.uint8)
    y, x = (size - sprite.shape[0]) // 2, (size - sprite.shape[1]) // 2
    view[y : y + sprite.shape[0], x : x + sprite.shape[1]] = sprite
    return view


def _render_views(job: tuple[RenderingSettings, list[Identity], int]) -> tuple[int, np.ndarray]:
    settings, identities, start = job
    rng = np.random.default_rng([settings.seed, 2, start])
    views = [
        center_view(render_subject(identity, settings.size, pose=rng.random(), supersample=2), settings.size)
        for identity in identities
        for _ in range(settings.views)
    ]
    return start, np.stack(views)


def _render_scenes(job: tuple[RenderingSettings, list[Identity], str, int, int]) -> tuple[int, tuple[np.ndarray, ...]]:
    settings, identities, views_path, start, stop = job
    views = np.load(views_path, mmap_mode="r")
    rng = np.random.default_rng([settings.seed, 3, start])
    size, count = settings.size, stop - start
    images = np.zeros((count, size, size, 3), np.uint8)
    boxes = np.zeros((count, MAX_SLOTS, 4), np.float32)
    members = np.full((count, MAX_SLOTS), -1, np.int32)
    backgrounds = rng.integers(len(BACKGROUNDS), size=count).astype(np.uint8)
    for row in range(count):
        chosen = _draw_members(rng, identities, sample_count(rng, settings.shares))
        masters = [_crop(views[i * settings.views + rng.integers(settings.views)], rng.random() < 0.5) for i in chosen]
        placed = sample_placement(rng, len(chosen), [m.shape[1] / m.shape[0] for m in masters])
        ground = render_background(tuple(BACKGROUNDS)[backgrounds[row]], rng, size)
        image, masks = compose(ground, *fit_sprites(masters, placed, size))
        images[row] = np.clip(image * rng.uniform(0.92, 1.08), 0, 255)
        boxes[row, : len(chosen)] = tight_boxes(masks)
        members[row, : len(chosen)] = chosen
    return start, (images, boxes, members, backgrounds)


def _draw_members(rng: np.random.Generator, identities: list[Identity], count: int) -> list[int]:
    """Indices of `count` identities of different categories."""
    chosen: list[int] = []
    while len(chosen) < count:
        index = int(rng.integers(len(identities)))
        if all(identities[index].category != identities[i].category for i in chosen):
            chosen.append(index)
    return chosen


def _crop(view: np.ndarray, flip: bool) -> np.ndarray:
    """The tight sprite of a centred view."""
    alpha = view[..., 3] > 0
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    sprite = view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return sprite[:, ::-1] if flip else sprite


def identity_labels(identities: list[Identity]) -> np.ndarray:
    """(I, 6) int64: index of category, main, second and accent colour, pattern, shape."""
    rows = []
    for one in identities:
        colors = (list(COLORS).index(color) for color in (one.main_color, one.second_color, one.accent_color))
        rows.append((CATEGORIES.index(one.category), *colors, PATTERNS.index(one.pattern), one.shape))
    return np.array(rows, np.int64)
