"""Pairs datasets that a stranger made: every door refuses them in one sentence, at once and without the memory that
they ask for. The doors are the report and ``inspect`` of mining, and the catalogue that training reads.

A row of ``HOSTILE`` changes a small dataset that all doors take; it says which door refuses it, and how.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline import inspect, report
from data_pipeline.assemble import index_row
from data_pipeline.pairs_format import BLANK_REFERENCE, tar_member
from data_pipeline.records import encode_mask
from msdiffusion.errors import DataError
from msdiffusion.training.catalogue import main as look_for_damage
from msdiffusion.training.catalogue import read_catalogue

SIZE = (48, 32)
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e"
TAGS = "<script>alert(1)</script>"
SECONDS = 5.0


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def make_sample(key: str, phrases: tuple[str, ...]) -> dict[str, Any]:
    """suffix -> content, the json as a dict."""
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[4:20, 8:30] = True
    subject = {
        "mention": "a thing",
        "kind": "thing",
        "target_box": [0.1, 0.1, 0.7, 0.7],
        "reference_box": [0.1, 0.1, 0.7, 0.7],
        "target_mask_rle": encode_mask(mask),
        "reference_mask_rle": encode_mask(mask),
        "detection_score": 1.0,
        "match_similarity": 0.9,
        "area": 0.2,
        "attributes": {"color": "red"},
    }
    source = {"video": f"{key}.mp4", "sha256": "0" * 64, "pair": 0, "frame_reference": 1, "frame_target": 5}
    metadata = {
        "schema": "msdiffusion.pairs/1",
        "key": key,
        "caption": "a dog and a cat",
        "width": SIZE[0],
        "height": SIZE[1],
        "subjects": [{"phrase": phrase, **copy.deepcopy(subject)} for phrase in phrases],
        "source": {**source, "t_reference": 0.1, "t_target": 0.5, "shot": [0.0, 2.0]},
        "pipeline": {"version": "1"},
    }
    members: dict[str, Any] = {"target.jpg": encoded(Image.new("RGB", SIZE, "green"), "JPEG")}
    members |= {f"reference_{i}.png": encoded(Image.new("RGBA", (20, 10), "red"), "PNG") for i in range(len(phrases))}
    return {**members, "json": metadata}


@dataclass
class Dataset:
    """All that lies in the folder of a dataset, before it is written."""

    samples: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"a": make_sample("a", ("dog", "cat")), "b": make_sample("b", ("dog",))}
    )
    build: dict[str, Any] = field(default_factory=dict)
    """Changes of build.json."""
    rows: Callable[[list[dict[str, Any]]], Any] = lambda rows: rows
    """Rows of the index -> other rows, or a table of pyarrow."""
    rejected: list[Any] = field(default_factory=list)
    notes: dict[str, Any] | None = None
    raw: dict[str, bytes] = field(default_factory=dict)
    """Files that replace what would be written."""

    @property
    def first(self) -> dict[str, Any]:
        """The json of the first sample."""
        return self.samples["a"]["json"]

    def shard(self) -> bytes:
        blocks = b""
        for key, members in self.samples.items():
            for suffix, content in members.items():
                data = json.dumps(content).encode() if suffix == "json" else content
                blocks += tar_member(f"{key}.{suffix}", data)
        return blocks + bytes(2 * tarfile.BLOCKSIZE)

    def write(self, out: Path) -> Path:
        out.mkdir()
        shard = self.raw.get("pairs-000000.tar", None) or self.shard()
        (out / "pairs-000000.tar").write_bytes(shard)
        good = [make_sample("a", ("dog", "cat")), make_sample("b", ("dog",))]
        rows = self.rows([index_row(sample["json"], "pairs-000000.tar") for sample in good])
        table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, out / "index.parquet")
        entry = {
            "name": "pairs-000000.tar",
            "samples": 2,
            "bytes": len(shard),
            "sha256": hashlib.sha256(shard).hexdigest(),
        }
        build = {"schema": "data_pipeline.build/1", "settings": {"filter_pairs": {}}, "versions": {"numpy": "2"}}
        build |= {"counts": {"samples": 2}, "shards": [entry]} | self.build
        (out / "build.json").write_text(json.dumps(build))
        (out / "rejected.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in self.rejected))
        if self.notes is not None:
            (out / "report").mkdir()
            (out / "report" / "notes.json").write_text(json.dumps({"schema": "data_pipeline.report/1"} | self.notes))
        for name, content in self.raw.items():
            (out / name).write_bytes(content)
        return out


def read_all(out: Path) -> None:
    """As training reads it."""
    catalogue = read_catalogue(str(out), progress=False)
    for number in range(len(catalogue)):
        catalogue.read(number)
        catalogue.read(number, "target")


def through(door: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a door says: "" if it takes the dataset."""
    if door == "train":
        try:
            read_all(out)
        except DataError as error:
            return f"error: {error}"
        return ""
    if door == "report":
        status = report.main([str(out)])
    else:
        status = inspect.main([str(out / "pairs-000000.tar"), "--out", str(out / "shown.png")])
    told = capsys.readouterr().err
    assert (status == 0) is (told == ""), told
    return told


def rle(height: Any, width: Any, counts: Any) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        dataset.first["subjects"][0]["target_mask_rle"] = {"size": [height, width], "counts": counts}

    return change


def set_in(*path: Any, value: Any) -> Callable[[Dataset], None]:
    """Sets a value in the json of the first sample."""

    def change(dataset: Dataset) -> None:
        place = dataset.first
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


def member(suffix: str, content: bytes) -> Callable[[Dataset], None]:
    return lambda dataset: dataset.samples["a"].__setitem__(suffix, content)


def in_index(name: str, value: Any) -> Callable[[Dataset], None]:
    return lambda dataset: setattr(dataset, "rows", lambda rows: [{**rows[0], name: value}, *rows[1:]])


def column(name: str, values: Any) -> Callable[[Dataset], None]:
    def rows(found: list[dict[str, Any]]) -> pyarrow.Table:
        table = pyarrow.Table.from_pylist(found)
        return table.set_column(table.column_names.index(name), name, pyarrow.array(values))

    return lambda dataset: setattr(dataset, "rows", rows)


def many_rows(count: int) -> Callable[[Dataset], None]:
    """So many rows in a file of a few hundred kilobytes, as they are all the same."""

    def rows(found: list[dict[str, Any]]) -> pyarrow.Table:
        return pyarrow.Table.from_pylist(found[:1]).take(np.zeros(count, dtype=np.int64))

    return lambda dataset: setattr(dataset, "rows", rows)


def of(**changes: Any) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for name, value in changes.items():
            setattr(dataset, name, value)

    return change


def entry_of(**changes: Any) -> Callable[[Dataset], None]:
    entry = {"name": "pairs-000000.tar", "samples": 2, "bytes": 1 << 40, "sha256": ""}
    return lambda dataset: dataset.build.update(shards=[{**entry, **changes}])


def renamed(key: str) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        dataset.samples = {key: dataset.samples["a"], "b": dataset.samples["b"]}
        dataset.samples[key]["json"]["key"] = key

    return change


def header(name: str, **changes: Any) -> bytes:
    info = tarfile.TarInfo(name)
    for attribute, value in changes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def shard_of(*headers: bytes) -> Callable[[Dataset], None]:
    return lambda dataset: dataset.raw.update({"pairs-000000.tar": b"".join(headers) + bytes(8192)})


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


PPM = b"P6 48 32 255\n" + bytes(48 * 32 * 3)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\n"
BIG = encoded(Image.new("1", (20_000, 14_000)), "PNG")
LISTED = "none of the formats that are read: JPEG, PNG, WebP, AVIF, GIF, BMP and TIFF"
SUBJECT = ("subjects", 0)
LINE = {"video": "v.mp4", "key": "v", "stage": "filter_pairs", "reason": "none", "evidence": {}}

# name: (change, {door: what it says})
HOSTILE: dict[str, tuple[Callable[[Dataset], None], dict[str, str]]] = {
    # keys that lead somewhere else
    **{
        f"key {key!r}": (renamed(key), {"train": "but keys are 1 to 200 letters", "inspect": "is no shard of pairs"})
        for key in ("../up", "/abs", "x/../../y", "a b", "-\u202e", "x\\y", "n\nl", "\x1b[2J", "c:x", "é", "..", "")
    },
    # masks
    "mask of 37 GiB": (rle(200_000, 200_000, [40_000_000_000]), dict.fromkeys(("report", "inspect", "train"), "mask")),
    "mask of 10^400 pixels": (rle(10**200, 10**200, [1]), dict.fromkeys(("report", "inspect", "train"), "mask")),
    "mask of counts beyond 64 bits": (
        rle(32, 48, [10**30]),
        {"inspect": "unreadable mask", "train": "unreadable mask"},
    ),
    "mask of infinite size": (rle(float("inf"), 48, [1536]), {"inspect": "no size", "train": "no size"}),
    "mask of negative size": (rle(-32, -48, [1536]), {"inspect": "a mask of", "train": "its mask is"}),
    "mask of negative counts": (rle(32, 48, [-1, 1537]), {"inspect": "unreadable mask", "train": "unreadable mask"}),
    "mask of ragged counts": (rle(32, 48, [[1], 2]), {"inspect": "unreadable mask", "train": "unreadable mask"}),
    "mask that is a text": (
        set_in(*SUBJECT, "target_mask_rle", value="1536"),
        {"inspect": "target_mask_rle is '1536'", "train": "no size"},
    ),
    "mask without counts": (
        set_in(*SUBJECT, "target_mask_rle", value={"size": [32, 48]}),
        {"inspect": "unreadable mask", "train": "unreadable mask"},
    ),
    # texts
    "caption of a megabyte": (
        set_in("caption", value="a" * 1_000_000),
        dict.fromkeys(("report", "inspect", "train"), "1,000,000 characters, more than the 10,000"),
    ),
    "caption that is a number": (set_in("caption", value=7), {"inspect": "caption is no text", "train": "is no text"}),
    "phrase of a megabyte": (
        set_in(*SUBJECT, "phrase", value="dog" * 400_000),
        {"inspect": "phrase is 'dogdog", "train": "1,200,000 characters, more than the 1,000"},
    ),
    # numbers of subjects
    "300 subjects": (
        lambda dataset: dataset.first.update(subjects=dataset.first["subjects"] * 150),
        {"inspect": "300 subjects, needed are 1 to 256", "train": "300 subjects, more than the 256"},
    ),
    "no subject": (set_in("subjects", value=[]), {"inspect": "0 subjects, needed are 1 to 256", "train": "no subject"}),
    "a reference too many": (
        member("reference_2.png", encoded(Image.new("RGBA", (2, 2)), "PNG")),
        {"inspect": "reference_2.png belongs to no subject"},
    ),
    # wrong types in a sample
    "width of a text": (set_in("width", value="48"), {"inspect": "no picture has '48' x 32", "train": "its json says"}),
    "width of 10^18": (set_in("width", value=10**18), {"inspect": "no picture has", "train": "its json says"}),
    "width that is true": (set_in("width", value=True), {"inspect": "no picture has True", "train": "its json says"}),
    "a subject that is a number": (set_in(*SUBJECT, value=3), {"inspect": "subject 0: no object", "train": "lacks"}),
    "box of texts": (
        set_in(*SUBJECT, "target_box", value=["a"] * 4),
        {"inspect": "target_box is", "train": "is not a"},
    ),
    "box of NaN": (
        set_in(*SUBJECT, "target_box", value=[float("nan")] * 4),
        {"inspect": "target_box is", "train": "is not a normalised xyxy box"},
    ),
    "box far away": (
        set_in(*SUBJECT, "target_box", value=[0, 0, 10**12, 10**12]),
        {"inspect": "target_box is", "train": "is not a normalised xyxy box"},
    ),
    "reference box of two numbers": (set_in(*SUBJECT, "reference_box", value=[0, 1]), {"inspect": "reference_box is"}),
    "area of a text": (set_in(*SUBJECT, "area", value="0.1"), {"inspect": "area is '0.1'"}),
    "area of NaN": (set_in(*SUBJECT, "area", value=float("nan")), {"inspect": "area is nan"}),
    "similarity of a list": (set_in(*SUBJECT, "match_similarity", value=[1]), {"inspect": "match_similarity is [1]"}),
    "score of 10^400": (set_in(*SUBJECT, "detection_score", value=10**400), {"inspect": "detection_score is 1000"}),
    "mention that is null": (set_in(*SUBJECT, "mention", value=None), {"inspect": "mention is None"}),
    "attributes of a text": (set_in(*SUBJECT, "attributes", value="red"), {"inspect": "attributes is 'red'"}),
    "source of a list": (set_in("source", value=[]), {"inspect": "source is no object"}),
    "source without a video": (set_in("source", value={}), {"inspect": "source: without video"}),
    "frame number of a text": (set_in("source", "frame_target", value="5"), {"inspect": "frame_target is '5'"}),
    "frame number below 0": (set_in("source", "frame_target", value=-5), {"inspect": "frame_target is -5"}),
    "frame number of 10^400": (set_in("source", "frame_target", value=10**400), {"inspect": "frame_target is 1000"}),
    "time of a text": (set_in("source", "t_target", value="x"), {"inspect": "t_target is 'x'"}),
    "time of infinity": (set_in("source", "t_target", value=float("inf")), {"inspect": "t_target is inf"}),
    "shot of one number": (set_in("source", "shot", value=[1]), {"inspect": "shot is [1]"}),
    "pair of a list": (set_in("source", "pair", value=[1]), {"inspect": "pair is [1]"}),
    "references of numbers": (
        lambda dataset: dataset.first["source"].update(importer="images", references=[1, 2]),
        {"inspect": "references is [1, 2]"},
    ),
    "pipeline of a text": (set_in("pipeline", value="1"), {"inspect": "pipeline is no object"}),
    "sha256 of a number": (set_in("source", "sha256", value=1), {"inspect": "sha256 is 1"}),
    # pictures
    **{
        f"{suffix} is {kind}": (
            member(suffix, content),
            {"report": LISTED, "inspect": LISTED, "train": LISTED},
        )
        for suffix in ("target.jpg", "reference_0.png")
        for kind, content in (("PPM", PPM), ("EPS", EPS), ("text", b"hello"), ("nothing", b""))
    },
    "280 million pixels in 40 kB": (
        member("target.jpg", BIG),
        {"report": "too many pixels", "inspect": "too many pixels", "train": "20,000 x 14,000 pixels"},
    ),
    # the tar file
    "member of 10^18 bytes": (
        shard_of(header("a.target.jpg", size=10**18)),
        {"inspect": "cut short", "train": "is cut off"},
    ),
    "name of a gigabyte": (
        shard_of(header("././@LongLink", size=1 << 30, type=tarfile.GNUTYPE_LONGNAME)),
        {"inspect": "1,073,741,824 bytes, more than", "train": "damaged"},
    ),
    "extended header of a gigabyte": (
        shard_of(header("x", size=1 << 30, type=tarfile.XHDTYPE)),
        {"inspect": "1,073,741,824 bytes, more than", "train": "damaged"},
    ),
    "a link": (
        shard_of(header("a.json", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        {"inspect": "is no shard of pairs", "train": "is damaged"},
    ),
    "a device": (shard_of(header("a.json", type=tarfile.CHRTYPE)), {"inspect": "no shard", "train": "is damaged"}),
    "a member of another name": (shard_of(header("a.exe")), {"inspect": "no shard of pairs", "train": "says 2"}),
    # the index
    **{
        f"{name} of {value!r} in the index": (in_index(name, value), {"report": f"{said}"})
        for name, value, said in (
            ("areas", [1e300, 0.1], "row 1: area 1e+300 is not in 0 to 1"),
            ("areas", [-1e18, 0.1], "row 1: area -1e+18"),
            ("areas", [float("nan"), 0.1], "row 1: area nan"),
            ("areas", [float("inf"), 0.1], "row 1: area inf"),
            ("areas", [0.1], "num_subjects 2 is not the number of its phrases and areas"),
            ("areas", None, "num_subjects 2 is not the number"),
            ("phrases", ["dog", None], "row 1: phrase is no text"),
            ("phrases", ["d" * 3_000, "x"], "row 1: phrase has 3,000 characters"),
            ("num_subjects", -3, "num_subjects -3 is not the number"),
            ("num_subjects", 10**9, "num_subjects 1000000000 is not the number"),
            ("min_detection_score", 1e30, "min_detection_score 1e+30"),
            ("min_detection_score", None, "min_detection_score None"),
            ("min_match_similarity", float("nan"), "min_match_similarity nan"),
            ("frame_gap_seconds", -1.0, "frame_gap_seconds -1.0"),
            ("frame_gap_seconds", 1e300, "frame_gap_seconds 1e+300"),
            ("caption", "a" * 1_000_000, "a text of 1,000,000 bytes in the column 'caption'"),
            ("caption", None, "caption is no text"),
            ("video", "v" * 1_000_000, "a text of 1,000,000 bytes"),
        )
    },
    "key of the index that leads out": (
        in_index("key", "../a"),
        {"report": "key '../a' is none", "train": "has the key '../a'"},
    ),
    "empty key of the index": (in_index("key", ""), {"report": "key '' is none", "train": "has the key ''"}),
    "width of the index below 0": (
        in_index("width", -5),
        {"report": "width and height -5 and 32", "train": "has -5 x 32 pixels"},
    ),
    "width of the index above all": (
        in_index("width", 2**40),
        {"report": "width and height 1099511627776", "train": "has 1099511627776 x 32 pixels"},
    ),
    "widths that are texts": (
        column("width", ["48", "48"]),
        {"report": "column 'width' of the type string", "train": "column 'width' of the type string"},
    ),
    "widths that are lists": (
        column("width", [[48], [48]]),
        {"report": "column 'width' of the type list", "train": "column 'width' of the type list"},
    ),
    "keys that are numbers": (
        column("key", [1, 2]),
        {"report": "column 'key' of the type int64", "train": "column 'key' of the type int64"},
    ),
    "shards that are numbers": (column("shard", [1, 2]), {"report": "column 'shard'", "train": "column 'shard'"}),
    "areas that are numbers": (column("areas", [1.0, 2.0]), {"report": "column 'areas' of the type double"}),
    "areas that are texts": (column("areas", [["x"], ["y"]]), {"report": "column 'areas'"}),
    "phrases that are one text": (column("phrases", ["dog", "cat"]), {"report": "column 'phrases'"}),
    "a million areas in a row": (in_index("areas", [0.1] * 1_000_000), {"report": "values of areas"}),
    "half a million rows": (
        many_rows(500_000),
        {"report": "500,000 rows, and build.json says 2", "train": "500,000 rows, and build.json says 2"},
    ),
    "an index that is none": (of(raw={"index.parquet": b"PAR1 no"}), {"report": "does not open", "train": "cannot be"}),
    # build.json
    "a trillion samples": (
        entry_of(samples=10**12),
        {"report": "for which it is too small", "train": "does not list the shards"},
    ),
    "samples of a text": (entry_of(samples="2"), {"report": "lacks shards", "train": "does not list the shards"}),
    "samples below 0": (entry_of(samples=-1), {"report": "lacks shards", "train": "does not list the shards"}),
    "samples that are true": (entry_of(samples=True), {"report": "lacks shards", "train": "does not list the shards"}),
    "a shard elsewhere": (entry_of(name="../x.tar"), {"report": "lacks shards", "train": "does not list the shards"}),
    "counts of a list": (of(build={"counts": []}), {"report": "lacks counts"}),
    "samples of NaN": (of(build={"counts": {"samples": float("nan")}}), {"report": "lacks counts"}),
    "settings of a list": (of(build={"settings": []}), {"report": "lacks settings"}),
    "a json of brackets": (of(raw={"build.json": b"[" * 100_000}), {"report": "is no json", "train": "is no json"}),
    "a json of bytes": (of(raw={"build.json": b"\xff\xfe"}), {"report": "is no json", "train": "is no json"}),
    # notes.json and rejected.jsonl
    **{
        f"notes with {name} {value!r}": (of(notes={name: value}), {"report": f"notes.json: {name} is not what it"})
        for name, value in (
            ("seconds", [1]),
            ("seconds", {"a": "x"}),
            ("seconds", {"a": float("nan")}),
            ("seconds", {"a": 10**400}),
            ("dropped", 5),
            ("dropped", [["a", "b"]]),
            ("dropped", [["a", "b", "3"]]),
            ("dropped", [["a", 3, 3]]),
            ("lost_pairs", [["a", "b", -1]]),
            ("lost_pairs", [["a", "b", True]]),
            ("lost_pairs", {"a": 1}),
            ("clips", [["a", 10**30]]),
            ("clips", [[3, "a"]]),
            ("clips", ["ab"]),
            ("clips", None),
        )
    },
    "a rejected key that leads out": (of(rejected=[{**LINE, "key": "../x"}]), {"report": "is no rejected video"}),
    "a rejected line of 2 MB": (
        of(rejected=[{**LINE, "evidence": "x" * 2_000_000}]),
        {"report": "line 1, has more than the 1,048,576 bytes"},
    ),
    "a rejected line that is a number": (of(rejected=[7]), {"report": "is no rejected video"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_door_refuses_in_one_sentence(name, tmp_path, capsys):
    change, doors = HOSTILE[name]
    dataset = Dataset()
    change(dataset)
    out = dataset.write(tmp_path / "pairs")
    before = sorted(tmp_path.rglob("*"))
    for door, said in doors.items():
        start = time.monotonic()
        told = through(door, out, capsys)
        assert time.monotonic() - start < SECONDS, door
        assert told.startswith("error: "), (door, told)
        assert said in told, (door, told)
        assert told.count("\n") <= 2 and len(told) < 1000, told
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told), (door, told)
    # nothing beside the dataset, and in it only what the report writes
    assert {path for path in tmp_path.rglob("*") if path.parent == tmp_path} == {out}
    new = {path.relative_to(out).parts[0] for path in set(tmp_path.rglob("*")) - set(before)}
    assert new <= {"report", "report.html"}


@pytest.mark.parametrize(("suffix", "most"), [("json", "33,554,432"), ("target.jpg", "268,435,456")])
def test_a_member_of_a_gigabyte_is_not_read(tmp_path, capsys, suffix, most):
    """Though the file is as long as it says."""
    dataset = Dataset(raw={"pairs-000000.tar": header(f"a.{suffix}", size=1 << 30)})
    out = dataset.write(tmp_path / "pairs")
    (out / "build.json").unlink()
    with (out / "pairs-000000.tar").open("r+b") as file:
        file.truncate((1 << 30) + 3 * 512)  # no byte on the disk
    for door in ("inspect", "train"):
        assert f"1,073,741,824 bytes, more than the {most} that are read" in through(door, out, capsys)


def test_every_door_takes_the_dataset_that_the_table_changes(tmp_path, capsys):
    out = Dataset(rejected=[LINE], notes={"seconds": {"filter_pairs": 0.5}, "clips": [["HDR", 2]]}).write(
        tmp_path / "pairs"
    )
    assert [through(door, out, capsys) for door in ("report", "inspect", "train")] == ["", "", ""]
    assert look_for_damage([str(out)]) == 0


def test_tags_reach_no_page(tmp_path, capsys):
    """Wherever a file has text that the report shows."""
    dataset = Dataset(
        build={"settings": {TAGS: {TAGS: TAGS}, "filter_pairs": {}}, "versions": {TAGS: TAGS}, "version": TAGS},
        rejected=[{**LINE, "video": TAGS, "reason": TAGS, "evidence": {TAGS: TAGS, "traceback": TAGS}, "template": 1}],
        notes={
            "seconds": {TAGS: 1},
            "dropped": [[TAGS, TAGS, 1]],
            "lost_pairs": [[TAGS, TAGS, 1]],
            "clips": [[TAGS, 1]],
        },
        rows=lambda rows: [{**rows[0], "phrases": [TAGS, TAGS + "2"], "caption": TAGS, "video": TAGS}, *rows[1:]],
    )
    out = dataset.write(tmp_path / "pairs")
    assert through("report", out, capsys) == ""
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 12


def test_evidence_in_a_thousand_brackets_is_shown_somehow(tmp_path, capsys):
    out = Dataset(rejected=[{**LINE, "evidence": {"a": deep(900)}}]).write(tmp_path / "pairs")
    assert through("report", out, capsys) == ""


def test_escape_sequences_reach_no_terminal(tmp_path, capsys):
    """Of a sample's texts, and of the names of files in errors, warnings and lists."""
    dataset = Dataset()
    dataset.first.update(caption=f"a dog{ESCAPES}\nb", pipeline={ESCAPES: ESCAPES})
    dataset.first["source"].update(video=ESCAPES, sha256=ESCAPES)
    dataset.first["subjects"][0].update(phrase=ESCAPES, mention=ESCAPES, kind=ESCAPES, attributes={ESCAPES: ESCAPES})
    out = dataset.write(tmp_path / f"pairs{ESCAPES}")
    assert inspect.main([str(out), "--out", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert r"caption    a dog\x1b[2J\x1b]0;owned\x07\u202e\nb" in shown
    (out / "index.parquet").unlink()
    assert report.main([str(out)]) == 2
    (out / "pairs-000000.tar").write_bytes(b"")
    assert look_for_damage([str(out)]) == 1
    everything = shown + "".join(capsys.readouterr())
    assert r"pairs\x1b[2J" in everything
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", everything)


def test_a_negative_number_is_no_pair(tmp_path):
    out = Dataset().write(tmp_path / "pairs")
    catalogue = read_catalogue(str(out), progress=False)
    for number in (-1, 2):
        with pytest.raises(IndexError, match=f"there are 2 pairs, so no number {number}"):
            catalogue.read(number)
        with pytest.raises(IndexError, match=f"holds 2 pairs, so no number {number}"):
            catalogue._opened(0).location(number)
    assert inspect.main([str(out), "--number", "-1"]) == 2


def test_blank_references_stand_for_nothing(tmp_path, capsys):
    """Both kinds of shards load: those of version 0.1.0, without blanks, and those in which all samples have the same
    members.
    """
    dataset = Dataset()
    old = dataset.write(tmp_path / "old")
    dataset.samples["b"] = {
        **{suffix: content for suffix, content in dataset.samples["b"].items() if suffix != "json"},
        "reference_1.png": BLANK_REFERENCE,
        "json": dataset.samples["b"]["json"],
    }
    new = dataset.write(tmp_path / "new")
    pairs = [read_catalogue(str(out), progress=False).read(1) for out in (old, new)]
    assert [len(pair.references) for pair in pairs] == [1, 1]
    for out in (old, new):
        assert [through(door, out, capsys) for door in ("report", "inspect", "train")] == ["", "", ""]
        assert inspect.main([str(out), "--key", "b", "--out", str(out / "b.png")]) == 0
        assert "b in " in capsys.readouterr().out
    assert (old / "b.png").read_bytes() == (new / "b.png").read_bytes()
