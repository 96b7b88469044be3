"""How alike two cut-outs of one subject are, and two of different subjects, by an embedder's measure: where to put
--min-similarity.

    python benchmarks/similarity.py --videos ../shared/media/videos --embedder timm:tf_efficientnet_lite2 \
        --checkpoint ../shared/media/weights/encoder/tf_efficientnet_lite2_timm.pth
    python benchmarks/similarity.py --world 60 --embedder histogram

Counts pairs of cut-outs out of different frames. "same": one clip, one name (of instances of one name in a clip, whose
truth the annotations don't tell, the best assignment). "same name": other clips, or in the world other identities. A
threshold is good if it keeps the first and drops the second. With --world the clips are drawn, not read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from data_pipeline.models.embedder import load_embedder
from data_pipeline.records import cut_out, mask_box
from data_pipeline.steps.match_subjects import MIN_SIMILARITY, assign

Cutout = tuple[str, int, str, np.ndarray]
"""Clip, frame, name of the subject, RGBA."""


def from_videos(folder: Path, table: str) -> list[Cutout]:
    """Every annotated object of the clips in a corpus file (docs/data_format.md)."""
    import av
    from PIL import Image

    found = []
    for clip, facts in json.loads((folder / table).read_text()).get("videos", {}).items():
        wanted = {entry["frame"]: entry for entry in facts.get("annotations", ())}
        if not wanted:
            continue
        with av.open(str(folder / facts["file"])) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    picture = frame.to_ndarray(format="rgb24")
                    numbers = np.asarray(Image.open(folder / wanted[index]["mask_png"]))
                    for one in wanted[index]["objects"]:
                        mask = numbers == one["id"]
                        found.append((clip, index, one["name"], cut_out(picture, mask, mask_box(mask))))
    return found


def from_world(clips: int, size: int) -> list[Cutout]:
    """Subjects of drawn clips in two frames; a clip's number is part of no name, so identities differ by clip."""
    from data_pipeline.world.clips import sample_clip

    found = []
    rng = np.random.default_rng(0)
    for number in range(clips):
        clip = sample_clip(rng, size=size)
        for index in (3, 8):
            for subject, mask in zip(clip.subjects, clip.masks[index], strict=True):
                if mask.sum() >= 200:
                    picture = cut_out(clip.frames[index], mask, mask_box(mask))
                    found.append((str(number), index, subject.category, picture))
    return found


def split(cutouts: list[Cutout], similarity: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Similarities of one subject's cut-outs, of other subjects of its name, and of other names."""
    groups: dict[tuple[str, str], dict[int, list[int]]] = {}
    for place, (clip, frame, name, _) in enumerate(cutouts):
        groups.setdefault((clip, name), {}).setdefault(frame, []).append(place)
    same = []
    for frames in groups.values():
        if len(frames) == 2:
            rows, columns = frames.values()
            part = similarity[np.ix_(rows, columns)]
            same += [float(part[pair]) for pair in assign(part)]
    near, other = [], []
    for i, (clip, _, name, _) in enumerate(cutouts):
        for j, (clip_j, _, name_j, _) in enumerate(cutouts[:i]):
            if clip != clip_j:
                (near if name == name_j else other).append(float(similarity[i, j]))
    return same, near, other


def main() -> None:
    """Prints a Markdown table of the three distributions, and what the default threshold does to them."""
    parser = argparse.ArgumentParser(description="similarity of one subject's cut-outs and of different subjects'")
    parser.add_argument("--videos", type=Path, help="folder of videos")
    parser.add_argument("--annotations", default="captions_and_boxes.json", help="corpus file in it")
    parser.add_argument("--world", type=int, default=0, metavar="CLIPS", help="clips of the procedural world instead")
    parser.add_argument("--size", type=int, default=128, help="of the world's frames (default 128)")
    parser.add_argument("--embedder", default="histogram")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    cutouts = (
        from_world(options.world, options.size) if options.world else from_videos(options.videos, options.annotations)
    )
    vectors = load_embedder(options.embedder, options.checkpoint, "cpu").embed([picture for *_, picture in cutouts])
    threshold = MIN_SIMILARITY[options.embedder.partition(":")[0]]
    print(f"{len(cutouts)} cut-outs, {options.embedder}, threshold {threshold}")
    print("| pairs | number | least | 5 % | median | 95 % | most | kept |\n|---|---|---|---|---|---|---|---|")
    for kind, values in zip(("same", "same name", "other name"), split(cutouts, vectors @ vectors.T), strict=True):
        if values:
            marks = " | ".join(f"{mark:.2f}" for mark in np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))
            kept = np.mean(np.asarray(values) >= threshold)
            print(f"| {kind} | {len(values)} | {marks} | {kept:.0%} |")


if __name__ == "__main__":
    main()
