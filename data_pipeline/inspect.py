"""Looks at one sample of a dataset: ``python -m data_pipeline.inspect SHARD_OR_DATASET [--key KEY | --number N]``.

Prints what is known of the sample and draws it; checks the shard on the way (docs/data_format.md). Members are read in
memory and never extracted to the disk.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.command_line import Parser, path_of
from data_pipeline.drawing import contact_sheet, draw_cut_out, draw_frame
from data_pipeline.errors import InputError, MiningError
from data_pipeline.extras import need_extras
from data_pipeline.outputs import check_file
from data_pipeline.records import Box, box_in_pixels
from data_pipeline.safe_text import nobody_reads, printable, visible, visible_line
from data_pipeline.shard_reader import Sample, Shard, read_build

HEIGHT = 360


def open_shards(path: Path) -> Iterator[Shard]:
    """The shard itself, or those that the build.json of a dataset lists, in its order."""
    names = [path] if not path.is_dir() else [path / entry["name"] for entry in read_build(path)["shards"]]
    if not names:
        raise InputError(f"the dataset {path} has no samples: rejected.jsonl and report.html say why")
    return (Shard(name) for name in names)


def find_sample(path: Path, key: str | None, number: int) -> tuple[Shard, Sample]:
    """The sample with this key, else the one with this number, counted from 0 over all shards. The shard that it is in
    is checked against the build.json beside it, if there is one.
    """
    if number < 0:
        raise InputError(f"--number counts from 0, got {number}")
    seen, some = 0, []
    for shard in open_shards(path):
        wanted = key if key is not None else "".join(shard.keys[number - seen : number - seen + 1])
        if wanted in shard.keys:
            if (shard.path.parent / "build.json").is_file():
                shard.check_hash(read_build(shard.path.parent))
            return shard, shard.read(wanted)
        seen += len(shard.keys)
        some = (some + shard.keys)[:5]
    if key is None:
        raise InputError(f"no sample {number} in {path}: it has {seen}, counted from 0")
    few = ", ".join(some) + (", ..." if seen > len(some) else "")
    raise InputError(f"no sample {key!r} in {path}; its {seen} keys are {few} (--list shows them all)")


def describe(shard: Shard, sample: Sample) -> str:
    """A sample as text: facts, then a table of its subjects."""
    metadata = sample.metadata
    source = metadata["source"]
    facts = [
        ("sample", f"{sample.key} in {shard.path}"),
        ("caption", metadata["caption"]),
        ("picture", f"{metadata['width']} x {metadata['height']} pixels"),
        ("video", f"{source['video']}, sha256 {source['sha256'][:12]}..."),
    ]
    if "importer" in source:
        facts += _imported(source)
    else:
        facts += [
            ("reference", f"frame {source['frame_reference']}, at {source['t_reference']:.3f} s"),
            ("target", f"frame {source['frame_target']}, at {source['t_target']:.3f} s"),
            ("shot", f"{source['shot'][0]:.3f} to {source['shot'][1]:.3f} s"),
        ]
    if "pair" in source:
        facts.append(("pair", f"{source['pair']} of its clip (0 is the best)"))
    if "pipeline" in metadata:
        facts.append(("mined by", ", ".join(f"{name} {value}" for name, value in metadata["pipeline"].items())))
    rows = [["", "phrase", "kind", "mention", "target box", "reference box", "area", "detection", "similarity"]]
    for number, subject in enumerate(metadata["subjects"]):
        words = (subject["phrase"], subject.get("kind", ""), subject["mention"])
        boxes = (" ".join(f"{value:.3f}" for value in subject[name]) for name in ("target_box", "reference_box"))
        similarity = subject.get("match_similarity")
        measured = (f"{subject['area']:.3f}", f"{subject['detection_score']:.2f}")
        rows.append([str(number), *words, *boxes, *measured, "" if similarity is None else f"{similarity:.3f}"])
    rows = [[visible_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{name:<10} {visible_line(value)}" for name, value in facts]
    lines.append("")
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for number, subject in enumerate(metadata["subjects"]):
        if subject.get("attributes"):
            attributes = ", ".join(f"{name} {value}" for name, value in subject["attributes"].items())
            lines.append(f"{number}: {visible_line(attributes)}")
    return "\n".join(lines)


def _imported(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a pair that was imported, not mined."""
    facts = [("importer", source["importer"])]
    for number, reference in enumerate(source.get("references", ())):
        facts.append((f"subject {number}", f"from {reference['picture']}, {' x '.join(map(str, reference['size']))}"))
    if source.get("single_frame"):
        facts.append(("note", "single frame: cut out of the target picture itself"))
    return facts


def draw(sample: Sample) -> Image.Image:
    """The cut-outs; below them the reference cut-outs at their places in the reference frame, with their boxes, the
    target as it is, and the target with its boxes and masks.
    """
    metadata = sample.metadata
    boxes = {
        side: [tuple(map(float, subject[f"{side}_box"])) for subject in metadata["subjects"]]
        for side in ("reference", "target")
    }
    phrases = [subject["phrase"] for subject in metadata["subjects"]]
    target = np.asarray(sample.target)
    places = draw_frame(
        _references_in_place(sample, boxes["reference"]),
        list(zip(phrases, boxes["reference"], [None] * len(phrases), strict=True)),
        HEIGHT,
    )
    found = draw_frame(target, list(zip(phrases, boxes["target"], sample.masks, strict=True)), HEIGHT)
    return contact_sheet(
        [
            *(
                (draw_cut_out(cutout, HEIGHT // 2), phrase)
                for cutout, phrase in zip(sample.references, phrases, strict=True)
            ),
            "",
            (places, "references at their places in their frame"),
            (draw_frame(target, [], HEIGHT), printable(metadata["caption"])),
            (found, "target with boxes and masks"),
        ],
        width=max(600, 3 * places.width + 40),
    )


def _references_in_place(sample: Sample, boxes: Sequence[Box]) -> np.ndarray:
    width, height = sample.target.size
    canvas = Image.new("RGB", (width, height), (225, 225, 225))
    for cutout, box in zip(sample.references, boxes, strict=True):
        x1, y1, x2, y2 = box_in_pixels(box, width, height)
        if cutout.size != (x2 - x1, y2 - y1):  # of a reference picture of another size
            cutout = cutout.resize((max(1, x2 - x1), max(1, y2 - y1)))
        canvas.paste(cutout, (x1, y1), cutout)
    return np.asarray(canvas)


def save(picture: Image.Image, out: Path) -> None:
    """Writes a picture; the suffix chooses the format. InputError if that is unknown or the folder is missing."""
    there = out.exists()
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        if not there:  # half a picture, of a full disk
            out.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or f"{error}; give a name like picture.png"
        raise InputError(f"--out: cannot write {out}: {why}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 the sample was shown, 2 wrong input or a damaged shard."""
    parser = Parser(
        prog="python -m data_pipeline.inspect",
        description="Prints and draws one sample of a pairs dataset, and checks its shard (docs/data_format.md).",
    )
    parser.add_argument("path", type=path_of, metavar="SHARD_OR_DATASET", help="a tar file, or the folder of a dataset")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--key", help="key of the sample")
    which.add_argument("--number", type=int, default=0, help="number of the sample, from 0 (default: 0)")
    which.add_argument("--list", action="store_true", help="print the keys of all samples instead")
    parser.add_argument("--out", type=path_of, metavar="FILE", help="where the picture goes (default: KEY.png, here)")
    arguments = parser.parse_args(argv)
    try:
        need_extras("mining")
        if arguments.out is not None:
            check_file(arguments.out)
        if arguments.list:
            for shard in open_shards(arguments.path):
                print("\n".join(shard.keys))  # noqa: T201
            return 0
        shard, sample = find_sample(arguments.path, arguments.key, arguments.number)
        out = arguments.out or Path(f"{sample.key}.png")
        if arguments.out is None and out.exists():
            raise InputError(f"{out} is already there: choose another place with --out")
        save(draw(sample), out)
        print(describe(shard, sample))  # noqa: T201
        print(f"picture    {visible(out)}", flush=True)  # noqa: T201
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BrokenPipeError:  # --list | head
        return nobody_reads()
    return 0


if __name__ == "__main__":
    sys.exit(main())
