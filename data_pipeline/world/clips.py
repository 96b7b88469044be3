"""Clips of the procedural world: H.264 files with a caption and exact annotations beside them.

Subjects move, grow or shrink, change pose, may turn round, and are lit anew over a still or slowly panning background.
So two frames of one clip show the same subjects differently: one pair for training.
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.errors import OutputError
from data_pipeline.outputs import check_folder
from data_pipeline.pairs_format import ANNOTATIONS_SCHEMA
from data_pipeline.records import encode_mask
from data_pipeline.safe_text import visible
from data_pipeline.world.palette import BACKGROUNDS
from data_pipeline.world.scenes import (
    compose,
    render_background,
    sample_count,
    sample_placement,
    sample_subjects,
    write_caption,
)
from data_pipeline.world.subjects import Identity, render_subject

MAX_SIZE, MAX_FPS, MAX_CLIP_PIXELS = 2048, 240, 2**28
"""Side of a frame, frames per second, and pixels of all frames of a clip: 1.9 GB with masks of four subjects."""
MAX_CLIPS, MAX_WORKERS = 1_000_000, 256
RATE_FACTOR = 14
"""x264's; lower is better, and this is close to lossless to the eye."""
POSES = 3
"""Pictures drawn of each subject of a clip; frames reuse them, resized."""


@dataclass(frozen=True)
class Clip:
    """A clip in memory, with its truth.

    frames: (T, size, size, 3) uint8 RGB. masks: (T, S, size, size) bool, visible pixels. subjects: the S identities, in
    the order of the caption. background: a key of BACKGROUNDS. caption: MS-Bench template. fps: frames per second.
    """

    frames: np.ndarray
    masks: np.ndarray
    subjects: list[Identity]
    background: str
    caption: str
    fps: int


def sample_clip(
    rng: np.random.Generator,
    *,
    split: str = "train",
    num_subjects: int | None = None,
    size: int = 128,
    num_frames: int = 12,
    fps: int = 8,
) -> Clip:
    """Draws a clip; `rng` is the only source of randomness.

    split: identities to draw from, see `sample_identity`. num_subjects: 1 to 4; None draws one to three. size: side of
    the square frames in pixels, even. num_frames: at least 1. fps: frames per second. ValueError for an odd size (H.264
    halves the colour planes), no frames, or more than fit in memory.
    """
    if not 16 <= size <= MAX_SIZE or size % 2:
        raise ValueError(f"size must be even, at least 16 and at most {MAX_SIZE} pixels, got {size}")
    if num_frames < 1 or not 1 <= fps <= MAX_FPS:
        raise ValueError(
            f"need at least one frame and one frame per second, {MAX_FPS} at most, got {num_frames} frames at {fps} fps"
        )
    if num_frames * size**2 > MAX_CLIP_PIXELS:
        raise ValueError(
            f"{num_frames} frames of {size} x {size} have {num_frames * size**2:,} pixels; a clip is drawn in memory "
            f"and may have {MAX_CLIP_PIXELS:,}: ask for fewer or smaller frames"
        )
    subjects = sample_subjects(rng, sample_count(rng) if num_subjects is None else num_subjects, split)
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    ground = render_background(background, rng, size, size + size // 6)
    pan = rng.choice([-1, 0, 1]) * rng.random() * (size // 6)
    start, stop = (_plan(rng, subjects) for _ in range(2))
    # Between two poses drawn at random the subjects travel part of the way only, so that they stay mostly apart.
    travel = rng.uniform(0.3, 0.9)
    masters = [
        [render_subject(s, round(size * 0.6), pose=rng.random(), supersample=2) for _ in range(POSES)] for s in subjects
    ]
    facing, turn = rng.random(len(subjects)) < 0.5, rng.random(len(subjects)) < 0.35
    light = 1 + rng.uniform(-0.10, 0.10, 2)
    frames, masks = [], []
    for t in range(num_frames):
        share = t / max(1, num_frames - 1)
        boxes = start + (stop - start) * travel * (0.5 - 0.5 * math.cos(math.pi * share))
        sprites, corners = [], []
        for index, views in enumerate(masters):
            view = views[min(POSES - 1, int(share * POSES))]
            mirrored = facing[index] ^ (turn[index] and share > 0.5)
            sprite, corner = _fit(view[:, ::-1] if mirrored else view, boxes[index], size)
            sprites.append(sprite)
            corners.append(corner)
        offset = size // 12 + round(pan * (share - 0.5))
        image, visible = compose(ground[:, offset : offset + size], sprites, corners)
        frames.append(np.clip(image * (light[0] + (light[1] - light[0]) * share), 0, 255).astype(np.uint8))
        masks.append(visible)
    caption = write_caption(subjects, background)
    return Clip(np.stack(frames), np.stack(masks), subjects, background, caption, fps)


def _plan(rng: np.random.Generator, subjects: Sequence[Identity]) -> np.ndarray:
    """Centre and side of each subject at one end of the clip: (S, 3) fractions of the frame."""
    placed = sample_placement(rng, len(subjects), [1.0] * len(subjects))
    if len(placed) > 1 and len(subjects) > 1:
        placed = sorted(placed)  # left stays left: tracks cross less often
    return np.array([((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1) for x1, y1, x2, y2 in placed])


def _fit(view: np.ndarray, plan: np.ndarray, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes an RGBA view to its planned long side and returns it with its top left corner, kept in the frame."""
    factor = plan[2] * size / max(view.shape[:2])
    shape = (max(2, round(view.shape[1] * factor)), max(2, round(view.shape[0] * factor)))
    sprite = np.asarray(
        Image.fromarray(np.ascontiguousarray(view)).convert("RGBa").resize(shape, Image.Resampling.BOX).convert("RGBA")
    )
    x = min(max(round(plan[0] * size - shape[0] / 2), 1), size - shape[0] - 1)
    y = min(max(round(plan[1] * size - shape[1] / 2), 1), size - shape[1] - 1)
    return sprite, (x, y)


def annotate(clip: Clip) -> dict:
    """The annotations sidecar of a clip (docs/data_format.md): boxes in pixels xyxy, masks as run lengths.

    A subject that is hidden completely in a frame is absent from that frame.
    """
    frames = []
    for index, masks in enumerate(clip.masks):
        objects = []
        for identifier, mask in enumerate(masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
                objects.append({"id": identifier, "box": box, "mask_rle": encode_mask(mask)})
        frames.append({"index": index, "time": index / clip.fps, "objects": objects})
    return {
        "schema": ANNOTATIONS_SCHEMA,
        "width": clip.frames.shape[2],
        "height": clip.frames.shape[1],
        "fps": clip.fps,
        "num_frames": len(clip.frames),
        "background": clip.background,
        "objects": [{"id": i, "name": s.category, "attributes": s.as_dict()} for i, s in enumerate(clip.subjects)],
        "frames": frames,
    }


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes (T, H, W, 3) uint8 RGB frames as H.264 in mp4, closed groups of pictures, readable by every player.
    Height and width must be even.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        # With mbtree, x264 sometimes wrote other bytes for the same frames: an equal seed has to give an equal file.
        stream.options = {"crf": str(RATE_FACTOR), "preset": "veryfast", "x264-params": "open-gop=0:mbtree=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_one(job: tuple[Path, int, int, dict]) -> str:
    folder, seed, index, settings = job
    name = f"clip_{index:06d}"
    path = folder / f"{name}.mp4"
    if path.exists():
        return name
    write_clip(path, sample_clip(np.random.default_rng([seed, index]), **settings))
    return name


def write_clip(path: Path, clip: Clip) -> None:
    """Writes a video with its caption and annotations beside it; OutputError, with nothing left, if that cannot be."""
    partial, caption = path.with_name(f".{path.name}"), path.with_suffix(".txt")
    sidecar = path.with_suffix(".annotations.json")
    try:
        write_video(partial, clip.frames, clip.fps)
        caption.write_text(clip.caption + "\n")
        sidecar.write_text(json.dumps(annotate(clip), separators=(",", ":")))
        partial.rename(path)
    except OSError as error:
        for file in (partial, caption, sidecar):
            file.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}. The clips before it are kept") from error


def write_clips(
    out_dir: Path | str,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    num_subjects: int | None = None,
    size: int = 128,
    num_frames: int = 12,
    fps: int = 8,
    workers: int = 2,
) -> list[Path]:
    """Writes clips with their caption and annotations; clips that are there already are kept, so a rerun resumes.

    Clip i depends on (seed, i) and the settings only, not on `count` or `workers`. Returns the paths of the mp4 files.

    split, num_subjects, size, num_frames, fps: see `sample_clip`. seed: of the whole set. workers: processes; 0 works
    in this one. ValueError for a count under 1 or over a million, or settings that `sample_clip` refuses;
    FileExistsError if the folder holds clips made with other settings; MiningError if nothing can be written there, as
    on a full disk.
    """
    for name, value, least, most in (
        ("count", count, 1, MAX_CLIPS),
        ("workers", workers, 0, MAX_WORKERS),
        ("seed", seed, 0, 2**63),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be at least {least} and at most {most}, got {value}")
    settings = {"split": split, "num_subjects": num_subjects, "size": size, "num_frames": num_frames, "fps": fps}
    if num_frames * size**2 <= MAX_CLIP_PIXELS:
        settings["num_frames"] = min(num_frames, 1)
    sample_clip(np.random.default_rng(0), **settings)  # refuses bad settings now
    settings["num_frames"] = num_frames
    folder = Path(out_dir)
    check_folder(folder, "out")
    folder.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"seed": seed, **settings}, sort_keys=True)
    marker = folder / "world.settings"
    if marker.exists() and marker.read_text() != record:
        raise FileExistsError(
            f"{folder} holds clips of other settings ({marker.read_text()}), asked for {record}; take another folder"
        )
    marker.write_text(record)
    jobs = [(folder, seed, index, settings) for index in range(count)]
    bar = {"total": count, "desc": f"clips -> {visible(folder)}", "unit": "clip"}
    if workers == 0:
        names = [_write_one(job) for job in tqdm(jobs, **bar)]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            names = list(tqdm(pool.map(_write_one, jobs, chunksize=8), **bar))
    return [folder / f"{name}.mp4" for name in names]
