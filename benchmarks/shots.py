"""How well cuts are found: sequences with known cuts, made of the frames of real clips.

    python benchmarks/shots.py --videos ../shared/media/videos
    python benchmarks/shots.py --videos ../shared/media/videos --world 200

Every clip is joined to every other one at eight places (cuts), by fades through black and white, and by dissolves. Cut
out of the middle it has a jump cut. And there are sequences without a cut: the clips themselves, at up to eight times
their speed, with noise, with a lamp switched on, with fast pans, with flashes, with something that passes in front.
Each row is a kind of sequence: how many there are, of how many the cut was found (at its frame; for fades and dissolves
anywhere within), and how many cuts were invented, for the settings of ``cut_shots`` and for PySceneDetect's detectors
with their own defaults.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.models.shots import find_cuts
from data_pipeline.models.video_reader import open_reader, probe
from data_pipeline.steps.cut_shots import CutShots

Made = tuple[str, np.ndarray, tuple[int, int] | None]
"""Kind, uint8 pictures (frames, side, side, 3), and the first and last frame where the cut may be; None for no cut."""


def thumbnails(folder: Path, side: int) -> dict[str, np.ndarray]:
    """All frames of the videos of a folder, small."""
    found = {}
    for path in sorted(folder.glob("*.mp4")):
        found[path.stem] = open_reader("pyav", path, probe(path)).thumbnails(side, 3000)
        open_reader.cache_clear()
    return found


def pans(folder: Path, side: int) -> Iterator[Made]:
    """A window that stands still, moves over the middle frame of a video for 20 frames, and stands still."""
    for path in sorted(folder.glob("*.mp4")):
        facts = probe(path)
        [picture] = open_reader("pyav", path, facts).frames((len(facts.stamps) // 2,))
        open_reader.cache_clear()
        height, width = picture.shape[:2]
        wide, high = int(0.4 * width), int(0.6 * height)
        for speed in (0.02, 0.05, 0.1):
            place, step, pictures = 0.0, speed * wide, []
            for frame in range(50):
                if 15 <= frame < 35:
                    step = -step if not 0 <= place + step <= width - wide else step
                    place += step
                window = picture[(height - high) // 2 :][:high, int(place) : int(place) + wide]
                pictures.append(np.asarray(Image.fromarray(window).resize((side, side), Image.Resampling.BOX)))
            yield f"pan, {speed:g} widths a frame", np.stack(pictures), None


def whole(pictures: np.ndarray) -> np.ndarray:
    """Any numbers as uint8."""
    return pictures.round().clip(0, 255).astype(np.uint8)


def single(pictures: np.ndarray) -> Iterator[Made]:
    """Sequences of one clip."""
    rng, third, short = np.random.default_rng(0), len(pictures) // 3, pictures[:60].astype(float)
    yield "no cut", pictures, None
    yield "jump cut", np.concatenate((pictures[:third], pictures[-third:])), (third, third)
    for speed in (4, 8):
        yield f"no cut, {speed} times as fast", pictures[::speed], None
    yield "noise of 12 grey levels", whole(pictures + rng.normal(0, 12, pictures.shape)), None
    yield "slowly brighter", whole(pictures * np.linspace(0.5, 1.3, len(pictures))[:, None, None, None]), None
    for amount in (25, 50):
        yield f"a lamp, {amount} grey levels", whole(np.concatenate((short[:30], short[30:] + amount))), None
    for frames in (1, 2):
        flash = short.copy()
        flash[25 : 25 + frames] = 0.2 * flash[25 : 25 + frames] + 204
        yield f"flash of {frames} frame{'s' * (frames > 1)}", whole(flash), None
    passing = short.copy()
    passing[25:30, :, : int(0.6 * short.shape[2])] = (60, 50, 40)
    yield "something passes in front", whole(passing), None


def joined(first: np.ndarray, second: np.ndarray) -> Iterator[Made]:
    """Sequences of two clips."""
    for place in range(8):
        start, end = int((len(first) - 24) * place / 7), int((len(second) - 24) * (7 - place) / 7)
        yield "cut", np.concatenate((first[start : start + 24], second[end : end + 24])), (24, 24)
    before, after = first[:36].astype(float), second[:36].astype(float)
    for frames in (6, 12, 24):
        share = ((np.arange(frames) + 1) / (frames + 1))[:, None, None, None]
        mixed = before[12 : 12 + frames] * (1 - share) + after[:frames] * share
        pictures = whole(np.concatenate((before[:12], mixed, after[frames:])))
        yield f"dissolve of {frames} frames", pictures, (12, 12 + frames)
    for name, level in (("black", 0), ("white", 255)):
        for frames in (6, 12):
            share = ((np.arange(frames) + 1) / frames)[:, None, None, None]
            out = before[12 : 12 + frames] * (1 - share) + level * share
            back = level * (1 - share) + after[:frames] * share
            pictures = whole(np.concatenate((before[:12], out, back, after[frames:])))
            yield f"fade through {name}, 2 x {frames}", pictures, (12, 12 + 2 * frames)


def library(name: str) -> Callable[[np.ndarray], list[int]]:
    """One of PySceneDetect's detectors with its defaults, but for the least length of a scene."""
    import scenedetect

    def find(pictures: np.ndarray) -> list[int]:
        detector, found = getattr(scenedetect, name)(min_scene_len=2), set()
        for number, picture in enumerate(pictures):
            time = scenedetect.FrameTimecode(number, 25.0)
            found |= {cut.frame_num for cut in detector.process_frame(time, np.ascontiguousarray(picture[..., ::-1]))}
        return sorted(found)

    return find


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, required=True, help="folder of clips without a cut, 60 frames and more")
    parser.add_argument("--world", type=int, default=0, help="also so many clips of the procedural world")
    arguments = parser.parse_args()
    step = CutShots()
    own = partial(find_cuts, cut_ratio=step.cut_ratio, min_content=step.min_content, fade_level=step.fade_level)
    finders = {"cut_shots": own} | {
        name: library(name) for name in ("AdaptiveDetector", "ContentDetector", "HistogramDetector", "HashDetector")
    }
    clips = thumbnails(arguments.videos, step.thumbnail)
    sequences = [each for pictures in clips.values() for each in single(pictures)]
    sequences += [each for pair in permutations(clips.values(), 2) for each in joined(*pair)]
    sequences += list(pans(arguments.videos, step.thumbnail))
    if arguments.world:
        from data_pipeline.world.clips import write_clips

        with tempfile.TemporaryDirectory() as folder:
            write_clips(folder, arguments.world)
            sequences += [
                ("clips of the world", each, None) for each in thumbnails(Path(folder), step.thumbnail).values()
            ]
    counts = Counter(kind for kind, _, _ in sequences)
    found: Counter[tuple[str, str]] = Counter()
    invented: Counter[tuple[str, str]] = Counter()
    for kind, pictures, window in sequences:
        for name, find in finders.items():
            inside = [window is not None and window[0] <= cut <= window[1] for cut in find(pictures)]
            found[kind, name] += any(inside)
            invented[kind, name] += inside.count(False)
    print(f"| sequences | number | {' | '.join(finders)} |\n|---|---|{'---|' * len(finders)}")
    has_cut = {kind for kind, _, window in sequences if window is not None}
    for kind, count in sorted(counts.items(), key=lambda item: item[0] not in has_cut):
        cells = []
        for name in finders:
            extra = f"{invented[kind, name]} invented" if invented[kind, name] else ""
            hits = f"{found[kind, name]} found" if kind in has_cut else ""
            cells.append(", ".join(part for part in (hits, extra) if part) or "none")
        print(f"| {kind} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
