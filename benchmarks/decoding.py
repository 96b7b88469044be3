"""What two exact frames of a clip cost: the reader ``auto`` against plain decord and plain PyAV for the same frames.

    python benchmarks/decoding.py --videos ../shared/media/videos
    python benchmarks/decoding.py --videos clips/ --repeats 9 --as-they-are

Plain decord opens the file and asks for the frames at 25 and 75 % by number. Plain PyAV opens it, seeks to their times
and decodes forward: it has to be told the times, since it does not know which frame is the 17th, and on some files it
gives wrong ones. ``auto`` opens the file, lists its packets to know number and time of every frame, and decodes.
All use one thread; CPU time, median of interleaved repeats. Each video is encoded anew with x264 in several sizes,
lengths and distances of key frames, or taken as it is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_pipeline.models.video_index import close_last, open_container, open_video
from data_pipeline.models.video_reader import PyAVReader, probe
from data_pipeline.steps.read_videos import hash_file

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")


def encode(source: Path, path: Path, height: int, seconds: float, gop: int, fps: int = 30) -> Path:
    """The source forwards and backwards, again and again, in the wanted size and length."""
    with av.open(str(source)) as old:
        aspect = old.streams.video[0].width / old.streams.video[0].height
        width = round(height * aspect / 2) * 2
        pictures = []
        for frame in old.decode(video=0):
            pictures.append(frame.reformat(width, height, "yuv420p").to_ndarray())
            if len(pictures) == 90:
                break
    pictures += pictures[-2:0:-1]
    with av.open(str(path), "w") as new:
        stream = new.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "x264-params": f"keyint={gop}"}
        for number in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(pictures[number % len(pictures)], format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            new.mux(stream.encode(frame))
        new.mux(stream.encode())
    return path


def plain_decord(path: Path, indices: tuple[int, int], stamps: tuple[int, int]) -> list[np.ndarray]:
    """Opens and asks by number."""
    import decord

    return list(decord.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy())


def plain_pyav(path: Path, indices: tuple[int, int], stamps: tuple[int, int]) -> list[np.ndarray]:
    """Opens, seeks to a time, decodes up to it; twice."""
    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for stamp in stamps:
            container.seek(stamp, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= stamp)
            pictures.append(frame.to_ndarray(format="rgb24"))
    return pictures


def auto(path: Path, indices: tuple[int, int], stamps: tuple[int, int]) -> list[np.ndarray]:
    """Index and exact frames."""
    close_last()
    return PyAVReader(path, probe(path)).frames(indices)


def milliseconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def measure(path: Path, repeats: int) -> dict[str, float]:
    """Medians in milliseconds; "ratio" is that of auto to the faster of the others, median over the repeats."""
    facts = probe(path)
    indices = (len(facts.stamps) // 4, len(facts.stamps) * 3 // 4)
    stamps = (facts.stamps[indices[0]], facts.stamps[indices[1]])
    wanted = auto(path, indices, stamps)
    readers = {"decord": plain_decord, "PyAV": plain_pyav, "auto": auto}
    times: dict[str, list[float]] = {name: [] for name in (*readers, "ratio", "open", "list", "hash", "all frames")}
    exact = {}
    for name, read in list(readers.items()):
        try:
            found = read(path, indices, stamps)
            exact[name] = all(map(np.array_equal, found, wanted))
        except Exception:  # decord's errors have no other parent
            del readers[name]
    # A long time, and to be compared with nothing: once is enough.
    times["all frames"].append(milliseconds(lambda: PyAVReader(path, facts).thumbnails(32, len(facts.stamps))))
    for _ in range(repeats):
        now = {name: milliseconds(lambda read=read: read(path, indices, stamps)) for name, read in readers.items()}
        now["ratio"] = now["auto"] / min(now[name] for name in readers if name != "auto")
        now["open"] = milliseconds(lambda: open_container(path).close())
        close_last()
        now["list"] = milliseconds(lambda: open_video(path)) - now["open"]
        now["hash"] = milliseconds(lambda: hash_file(path))
        for name, value in now.items():
            times[name].append(value)
    result = {name: statistics.median(values) for name, values in times.items() if values}
    wrong = [name for name, right in exact.items() if not right]
    return result | {f"{name} wrong": 1.0 for name in wrong}


def row(name: str, found: dict[str, float]) -> str:
    """One line of the table."""

    def cell(reader: str) -> str:
        if reader not in found:
            return "cannot open"
        return f"{found[reader]:.1f}{' (other pixels)' if f'{reader} wrong' in found else ''}"

    cells = [cell("decord"), cell("PyAV"), cell("auto"), f"**{found['ratio']:.2f}**"]
    parts = [f"{found[part]:.1f}" for part in ("open", "list", "hash", "all frames")]
    return f"| {name} | {' | '.join(cells + parts)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Two exact frames of a clip: what they cost.")
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos, or one of them")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--as-they-are", action="store_true", help="do not encode anew")
    parser.add_argument("--heights", type=int, nargs="+", default=[360, 720])
    parser.add_argument("--seconds", type=int, nargs="+", default=[4, 30])
    arguments = parser.parse_args()
    found = [arguments.videos] if arguments.videos.is_file() else sorted(arguments.videos.iterdir())
    sources = [path for path in found if path.suffix in VIDEO_SUFFIXES]
    print("| clip | decord | PyAV | auto | ratio | open | list packets | sha256 | thumbnails of all frames |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.as_they_are:
            clips = {path.name: path for path in sources}
        else:
            clips = {}
            for height in arguments.heights:
                for seconds in arguments.seconds:
                    for gop in (30, 250):
                        clips[f"{height}p, {seconds} s, keys every {gop}"] = (height, seconds, gop)
        for name, clip in clips.items():
            per_source = []
            for number, source in enumerate(sources if not arguments.as_they_are else [clip]):
                path = source
                if not arguments.as_they_are:
                    path = encode(source, Path(scratch) / f"{number}.mp4", *clip)
                per_source.append(measure(path, arguments.repeats))
            names = dict.fromkeys(name for found in per_source for name in found)
            middle = {part: statistics.median(found[part] for found in per_source if part in found) for part in names}
            ratios.append(middle["ratio"])
            print(row(name, middle), flush=True)
    print(f"\nlargest ratio {max(ratios):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
