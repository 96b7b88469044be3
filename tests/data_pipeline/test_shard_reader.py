import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.pairs_format import tar_member
from data_pipeline.records import TrainingPair
from data_pipeline.shard_reader import Shard, index_rows, read_build, rejected_videos
from data_pipeline.steps.write_shards import WriteShards

MASK = np.zeros((40, 60), dtype=bool)
MASK[10:30, 20:50] = True
END = bytes(2 * tarfile.BLOCKSIZE)


@pytest.fixture
def encoded(make_pair, make_match):
    """Function: key -> the tar blocks of a sample with two subjects."""
    rng = np.random.default_rng(0)
    frames = make_pair(*(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(2)))

    def encode(key="clip"):
        pair = TrainingPair(frames=frames, matches=(make_match(MASK, MASK), make_match(MASK, MASK, "cat")))
        return retar(WriteShards(pipeline={"version": "1"}).process(pair).blocks, key)

    return encode


def retar(blocks, key="clip", change=lambda members: members):
    """The same members under another key and changed: {suffix: content} -> {suffix: content}."""
    with tarfile.open(fileobj=io.BytesIO(blocks + END)) as archive:
        members = {member.name.split(".", 1)[1]: archive.extractfile(member).read() for member in archive}
    metadata = {**json.loads(members["json"]), "key": key}
    members["json"] = json.dumps(metadata).encode()
    return b"".join(tar_member(f"{key}.{suffix}", content) for suffix, content in change(members).items())


@pytest.fixture
def shard(tmp_path, encoded):
    """A shard of two samples, and the build.json beside it."""
    path = tmp_path / "pairs-000000.tar"
    content = encoded("clip") + encoded("other") + END
    path.write_bytes(content)
    entry = {"name": path.name, "samples": 2, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    build = {"schema": "data_pipeline.build/1", "settings": {}, "versions": {}, "counts": {"samples": 2}}
    (tmp_path / "build.json").write_text(json.dumps({**build, "shards": [entry]}))
    return path


def test_samples_come_back_as_they_were_written(shard):
    opened = Shard(shard)
    assert opened.keys == ["clip", "other"]
    sample = opened.read("other")
    assert sample.key == "other"
    assert [subject["phrase"] for subject in sample.metadata["subjects"]] == ["dog", "cat"]
    assert sample.target.size == (60, 40)
    assert [(cutout.mode, cutout.size) for cutout in sample.references] == [("RGBA", (30, 20))] * 2
    opened.check_hash(read_build(shard.parent))


def without(name):
    return lambda members: {suffix: content for suffix, content in members.items() if suffix != name}


def edited(**changes):
    def change(members):
        return {**members, "json": json.dumps({**json.loads(members["json"]), **changes}).encode()}

    return change


# What is done to the members of a sample, and what is said of it.
FAULTS = {
    "no json": (without("json"), "the sample clip has no clip.json"),
    "no target": (without("target.jpg"), "clip has 2 subjects, but target.jpg is missing"),
    "no reference": (without("reference_1.png"), "clip has 2 subjects, but reference_1.png is missing"),
    "one reference too many": (
        lambda members: {**members, "reference_2.png": members["reference_0.png"]},
        "reference_2.png belongs to no subject",
    ),
    "another schema": (edited(schema="msdiffusion.pairs/9"), "schema 'msdiffusion.pairs/9'; .* 'msdiffusion.pairs/1'"),
    "another key": (edited(key="else"), "clip.json says that its key is 'else'"),
    "no caption": (
        lambda members: {
            **members,
            "json": json.dumps(
                {name: value for name, value in json.loads(members["json"]).items() if name != "caption"}
            ).encode(),
        },
        "clip.json lacks caption",
    ),
    "subjects that are no list": (edited(subjects=3), "lacks a list of subjects"),
    "another size": (edited(width=61), r"clip.target.jpg has \(60, 40\) pixels, but its json says \(61, 40\)"),
    "no json at all": (lambda members: {**members, "json": b"{"}, "clip.json is no json"),
    "a json without end": (lambda members: {**members, "json": b"[" * 100_000}, "clip.json is no json"),
    "a json that is a list": (lambda members: {**members, "json": b"[]"}, "has the schema None"),
    "a broken picture": (lambda members: {**members, "target.jpg": b"\xff\xd8\xff"}, "clip.target.jpg does not open"),
    "half a picture": (
        lambda members: {**members, "reference_0.png": members["reference_0.png"][:60]},
        "clip.reference_0.png does not open",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_a_sample_is_named(tmp_path, encoded, name):
    change, message = FAULTS[name]
    path = tmp_path / "pairs-000000.tar"
    path.write_bytes(retar(encoded(), change=change) + END)
    with pytest.raises(InputError, match=message):
        Shard(path).read("clip")


@pytest.mark.parametrize(
    "name", ["../clip.json", "/clip.json", "clip.txt", "a/b.json", "clip", "clip.reference_01.png"]
)
def test_members_of_other_names_are_refused(tmp_path, encoded, name):
    path = tmp_path / "pairs-000000.tar"
    path.write_bytes(encoded() + tar_member(name, b"x") + END)
    with pytest.raises(InputError, match="is no shard of pairs"):
        Shard(path)


def test_links_are_refused(tmp_path, encoded):
    link = tarfile.TarInfo("clip2.json")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret"
    path = tmp_path / "pairs-000000.tar"
    path.write_bytes(encoded() + link.tobuf(tarfile.USTAR_FORMAT) + END)
    with pytest.raises(InputError, match="is no shard of pairs"):
        Shard(path)


def test_a_member_that_is_there_twice(tmp_path, encoded):
    path = tmp_path / "pairs-000000.tar"
    path.write_bytes(encoded() + encoded() + END)
    with pytest.raises(InputError, match="holds 'clip.target.jpg' twice"):
        Shard(path)


def test_a_shard_that_is_cut_short_anywhere(shard):
    content = shard.read_bytes()
    for length in range(512, len(content), 512):
        shard.write_bytes(content[: length + 100])
        with pytest.raises(InputError, match="cut short"):
            Shard(shard)
    shard.write_bytes(content)
    assert len(Shard(shard).keys) == 2


@pytest.mark.parametrize("content", [b"", b"not a tar", bytes(100), b"\x1f\x8b" + bytes(2000), b"x" * 5000])
def test_what_is_no_tar(tmp_path, content):
    path = tmp_path / "pairs-000000.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no tar file|is cut short"):
        Shard(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.tar", tmp_path):
        with pytest.raises(InputError, match="no file at"):
            Shard(path)


def test_unknown_key(shard):
    with pytest.raises(InputError, match=r"no sample 'nope' in .*; its 2 keys are clip, other"):
        Shard(shard).read("nope")


def test_a_changed_shard(shard):
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"has changed since it was built: .* bytes and sha256"):
        Shard(shard).check_hash(read_build(shard.parent))
    other = shard.with_name("pairs-000007.tar")
    shard.rename(other)
    with pytest.raises(InputError, match=r"is not listed in the build.json"):
        Shard(other).check_hash(read_build(shard.parent))


def test_build_files(tmp_path):
    with pytest.raises(InputError, match="it is no folder"):
        read_build(tmp_path / "none")
    with pytest.raises(InputError, match="no finished dataset: give the --out of a mining run"):
        read_build(tmp_path)
    (tmp_path / ".mining").mkdir()
    with pytest.raises(InputError, match="run the same mining command again"):
        read_build(tmp_path)
    for content in ("{", "", "[" * 100_000):
        (tmp_path / "build.json").write_text(content)
        with pytest.raises(InputError, match="is no json .*: mine or copy the dataset again"):
            read_build(tmp_path)
    (tmp_path / "build.json").write_text('{"schema": "data_pipeline.build/7"}')
    with pytest.raises(InputError, match=r"schema 'data_pipeline.build/7'; this program reads 'data_pipeline.build/1'"):
        read_build(tmp_path)


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"settings": None}, "settings"),
        ({"versions": [], "counts": {}}, "versions, counts"),
        ({"counts": {"samples": "2"}}, "counts"),
        ({"shards": {}}, "shards"),
        ({"shards": [{"name": "pairs-000000.tar"}]}, "shards"),
        ({"shards": [{"name": "../a.tar", "samples": 1, "bytes": 1, "sha256": "0"}]}, "shards"),
    ],
)
def test_a_build_file_that_is_not_whole(shard, changes, lacks):
    path = shard.parent / "build.json"
    path.write_text(json.dumps({**read_build(shard.parent), **changes}))
    with pytest.raises(InputError, match=f"build.json lacks {lacks}, or what it has there is no such thing"):
        read_build(shard.parent)


def test_index_and_rejected_must_be_there_and_whole(tmp_path):
    build = {"shards": []}
    for read, name in ((rejected_videos, "rejected.jsonl"), (lambda path: index_rows(path, build), "index.parquet")):
        with pytest.raises(InputError, match=f"no .*{name}: the dataset is not complete"):
            list(read(tmp_path))
    entry = {"video": "a.mp4", "key": "a", "stage": "cut_shots", "reason": "a single frame", "evidence": {}}
    for line, message in (
        ("{", "line 2, is no json"),
        ("[" * 100_000, "line 2, is no json"),
        ("[]", "line 2, is no rejected video"),
        (json.dumps({**entry, "key": 1}), "line 2, is no rejected video"),
        (json.dumps({**entry, "stage": ["cut_shots"]}), "line 2, is no rejected video"),
        (json.dumps({**entry, "key": "../a"}), "line 2, is no rejected video"),
        (json.dumps({name: value for name, value in entry.items() if name != "stage"}), "line 2, is no rejected video"),
    ):
        (tmp_path / "rejected.jsonl").write_text(f"{json.dumps(entry)}\n{line}")
        with pytest.raises(InputError, match=message):
            list(rejected_videos(tmp_path))
    (tmp_path / "rejected.jsonl").write_bytes(b'{"video": "\xff"}')
    with pytest.raises(InputError, match="line 1, is no json"):
        list(rejected_videos(tmp_path))
    (tmp_path / "index.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="does not open"):
        list(index_rows(tmp_path, build))
