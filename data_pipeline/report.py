"""report.html: what came out, what fell out where and why, charts, and pictures of both to look at.

``python -m data_pipeline.report DATASET`` writes the report of a finished dataset anew, from the dataset alone; a build
writes it with the same code, so both give the same bytes. What only the run itself knows (times, subjects and pairs
that were left out, pictures of rejected clips) it leaves in ``report/notes.json`` and ``report/rejected/``.
"""

import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.command_line import Parser, path_of
from data_pipeline.drawing import HEIGHT, Tile, beside, contact_sheet, draw_cut_out, draw_frame
from data_pipeline.errors import InputError, MiningError, OutputError
from data_pipeline.extras import need_extras
from data_pipeline.journal import Journal, write_atomically
from data_pipeline.picture_formats import open_listed
from data_pipeline.records import VideoFile
from data_pipeline.report_page import Tally, in_words, page
from data_pipeline.safe_text import nobody_reads, printable, visible
from data_pipeline.sample_checks import is_seconds
from data_pipeline.shard_reader import Sample, Shard, index_rows, read_build, read_json, rejected_videos

NOTES_SCHEMA = "data_pipeline.report/1"
KEPT_SHOWN = 48
REJECTED_SHOWN = 24
# Characters of one thing measured, under the picture of a rejected clip.
SHOWN_OF_A_VALUE = 100
# Rejected videos of one reason that are listed, and whose pictures are stored.
EXAMPLES = 8
# Rejected videos of one reason that are asked for a picture: where the first ones have none, hardly any has.
ASKED = 64


def write_report(
    journal: Journal, files: Sequence[VideoFile], stages: Sequence[str], build: Mapping[str, Any]
) -> Tally:
    """The report of a run that has just been assembled: keeps what the journal alone knows, then renders.

    stages: names of the steps, in order. build: what build.json will say, with "counts", "settings", "shards" and
    "versions". Returns the counts.
    """
    keep_notes(journal, files)
    return render_report(journal.out, build, stages)


def keep_notes(journal: Journal, files: Sequence[VideoFile]) -> None:
    """Writes report/notes.json, and report/rejected/KEY.jpg for a few clips of every reason."""
    seconds, clips = Counter[str](), Counter[str]()
    dropped, lost, asked, stored = (Counter[tuple[str, str]]() for _ in range(4))
    folder = journal.out / "report"
    shutil.rmtree(folder / "rejected", ignore_errors=True)  # of an interrupted run
    _make_folder(folder / "rejected")
    for marker in journal.markers(files):
        seconds.update(marker["seconds"])
        clips.update(marker.get("notes", ()))
        if marker["kept"]:
            dropped.update((each["stage"], each["reason"]) for each in marker["dropped"])
            lost.update((each["stage"], each["reason"]) for each in marker.get("lost_pairs", ()))
            continue
        kind = (marker["stage"], marker["reason"])
        if stored[kind] < EXAMPLES and asked[kind] < ASKED:
            asked[kind] += 1
            preview = journal.preview(marker["key"])
            if preview:
                stored[kind] += 1
                write_atomically(folder / "rejected" / f"{marker['key']}.jpg", preview)
    notes = {
        "schema": NOTES_SCHEMA,
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
        "dropped": _by_count(dropped),
        "lost_pairs": _by_count(lost),
        "clips": sorted(clips.items(), key=lambda item: (-item[1], item[0])),
    }
    write_atomically(folder / "notes.json", json.dumps(notes, indent=1).encode())


def _make_folder(path: Path) -> None:
    if path.is_symlink():  # in a dataset of a stranger it may lead anywhere
        raise OutputError(f"{path} is a link to another folder, in which nothing is written: remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {path}: {error.strerror or error}. Move away the file that has its name, or give "
            "permission, and run the same command again"
        ) from error


def _by_count(counts: Counter[tuple[str, str]]) -> list[list[Any]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[stage, reason, count] for (stage, reason), count in ordered]


def read_notes(out: Path) -> dict[str, Any]:
    """report/notes.json, or nothing if there is none; InputError if it is of another kind."""
    path = out / "report" / "notes.json"
    if not path.is_file():
        return {}
    notes = read_json(path, "delete it for a report without times")
    schema = notes.get("schema") if isinstance(notes, dict) else None
    if schema != NOTES_SCHEMA:
        raise InputError(f"{path} has the schema {schema!r}; this program reads {NOTES_SCHEMA!r}")
    if odd := [name for name, fits in NOTES_FIELDS.items() if name in notes and not fits(notes[name])]:
        raise InputError(f"{path}: {', '.join(odd)} is not what it should be: delete it for a report without times")
    return notes


def _is_counted(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is a list of lists of values of these kinds, whole numbers being 0 or more."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(row, list)
            and [type(each) for each in row] == list(kinds)
            and all(0 <= each < 1 << 63 for each in row if isinstance(each, int))
            for row in value
        )

    return fits


NOTES_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "seconds": lambda value: isinstance(value, dict) and all(map(is_seconds, value.values())),
    "dropped": _is_counted(str, str, int),
    "lost_pairs": _is_counted(str, str, int),
    "clips": _is_counted(str, int),
}


def render_report(out: Path, build: Mapping[str, Any], stages: Sequence[str] | None = None) -> Tally:
    """Writes report.html and the contact sheets in report/, from the shards, index.parquet, rejected.jsonl and what
    ``keep_notes`` left. The same dataset always gives the same bytes.

    build: the content of build.json. stages: names of the steps, in order; by default those of the settings. Returns
    the counts. InputError if something of the dataset is missing or damaged.
    """
    tally = Tally(list(build["settings"]) if stages is None else stages)
    shards = {entry["name"] for entry in build["shards"]}
    every = max(1, -(-build["counts"]["samples"] // KEPT_SHOWN))
    shown: list[tuple[str, str]] = []
    last_video: object = None
    for row in index_rows(out, build):
        if row["shard"] not in shards:
            raise InputError(f"index.parquet names a shard {row['shard']!r} that build.json does not list")
        if tally.samples % every == 0:
            shown.append((row["shard"], row["key"]))
        tally.add_sample(row)
        if row["video"] != last_video:
            tally.keep_video()
            last_video = row["video"]
    examples: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    pictured: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in rejected_videos(out):
        kind = (entry["stage"], entry["reason"])
        if kind[0] not in tally.rejected:
            raise InputError(
                f"rejected.jsonl names a step {kind[0]!r} that build.json does not know: they don't belong together"
            )
        tally.reject(*kind)
        if len(examples[kind]) < EXAMPLES:
            examples[kind].append(entry)
        if len(pictured[kind]) < EXAMPLES and tally.rejected[kind[0]][kind[1]] <= ASKED and _preview(out, entry):
            pictured[kind].append(entry)
    order = {stage: place for place, stage in enumerate(tally.stages)}
    examples = dict(sorted(examples.items(), key=lambda item: (order[item[0][0]], item[0][1])))
    pictured = {kind: pictured[kind] for kind in examples if pictured[kind]}

    _make_folder(out / "report")
    sheets = {}
    if shown:
        sheets["kept"] = _save_sheet(out, "kept", _kept_tiles(out, shown))
    if pictured:
        sheets["rejected"] = _save_sheet(out, "rejected", _rejected_tiles(out, pictured, tally))
    html = page(tally, build, read_notes(out), sheets, examples)
    write_atomically(out / "report.html", html.encode())
    return tally


def _preview(out: Path, entry: Mapping[str, Any]) -> Path | None:
    path = out / "report" / "rejected" / f"{entry['key']}.jpg"
    return path if path.is_file() else None


def _kept_tiles(out: Path, shown: Sequence[tuple[str, str]]) -> list[Tile]:
    tiles: list[Tile] = []
    shard: Shard | None = None
    for name, key in shown:
        if shard is None or shard.path.name != name:
            shard = Shard(out / name)
        tiles.append(draw_sample(shard.read(key)))
    return tiles


def _rejected_tiles(
    out: Path, pictured: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], tally: Tally
) -> list[Tile | str]:
    tiles: list[Tile | str] = []
    each = max(1, REJECTED_SHOWN // len(pictured))
    for (stage, reason), entries in pictured.items():
        tiles.append(f"{stage}: {reason} ({tally.rejected[stage][reason]:,})")
        for entry in entries[:each]:
            path = _preview(out, entry)
            try:
                picture = open_listed(io.BytesIO(path.read_bytes())).convert("RGB")
            except Exception as error:  # decoders raise many things at broken files
                raise InputError(f"{path} does not open ({error}): delete it for a report without it") from error
            tiles.append((picture, printable(f"{in_words(entry['evidence'], SHOWN_OF_A_VALUE)}\n[{entry['video']}]")))
    return tiles


def draw_sample(sample: Sample) -> Tile:
    """Cut-outs, then the target with its boxes and masks; and the caption."""
    metadata = sample.metadata
    subjects = [
        (subject["phrase"], tuple(subject["target_box"]), mask)
        for subject, mask in zip(metadata["subjects"], sample.masks, strict=True)
    ]
    cutouts = [draw_cut_out(picture, HEIGHT // 2) for picture in sample.references]
    similarities = [subject.get("match_similarity") for subject in metadata["subjects"]]
    known = ", ".join(f"{value:.2f}" for value in similarities if value is not None)
    source = metadata["source"]
    more = [f"similarity {known}"] if known else []
    more += [f"{what} by {source[what]}" for what in ("boxes", "masks") if what in source]
    text = printable(f"{metadata['caption']}\n[{'; '.join([sample.key, *more])}]")
    return beside([*cutouts, draw_frame(np.asarray(sample.target), subjects)]), text


def _save_sheet(out: Path, name: str, tiles: Sequence[Tile | str]) -> str:
    buffer = io.BytesIO()
    contact_sheet(tiles).save(buffer, "PNG")
    write_atomically(out / "report" / f"{name}.png", buffer.getvalue())
    return f"report/{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 the report was written, 2 wrong input."""
    parser = Parser(
        prog="python -m data_pipeline.report",
        description="Writes report.html and report/*.png of a finished dataset anew, from the dataset alone.",
    )
    parser.add_argument("dataset", type=path_of, metavar="DATASET", help="folder that data_pipeline.build wrote")
    arguments = parser.parse_args(argv)
    try:
        need_extras("mining")
        tally = render_report(arguments.dataset, read_build(arguments.dataset))
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        print(  # noqa: T201
            f"{visible(arguments.dataset / 'report.html')}: {tally.samples} samples with {tally.subjects} subjects "
            f"from {tally.videos} videos",
            flush=True,
        )
    except BrokenPipeError:
        return nobody_reads()
    return 0


if __name__ == "__main__":
    sys.exit(main())
