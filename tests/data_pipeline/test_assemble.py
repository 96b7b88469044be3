import io
import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.assemble import (
    ShardPlanner,
    assemble,
    file_hashes,
    installed_versions,
    settings_hash,
    with_blanks,
    write_shard,
)
from data_pipeline.journal import Journal
from data_pipeline.pairs_format import BLANK_REFERENCE, tar_member
from data_pipeline.records import TrainingPair, VideoFile
from data_pipeline.shard_reader import Shard
from data_pipeline.step import Step
from data_pipeline.steps.write_shards import WriteShards


@dataclass(kw_only=True)
class Loader(Step):
    path_settings: ClassVar[tuple[str, ...]] = ("folder", "name_of_nothing")

    checkpoint: Path | None = None
    other: str = "."
    folder: str = ""
    name_of_nothing: str = "histogram"


def sample(key):
    subject = {"phrase": "dog", "area": 0.2, "detection_score": 0.8, "match_similarity": 0.7}
    source = {"video": f"{key}.mp4", "t_reference": 1.0, "t_target": 0.25}
    return {"key": key, "caption": "a dog", "width": 8, "height": 6, "subjects": [subject], "source": source}


@pytest.fixture
def mined(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    files = []
    for i in range(7):
        path = tmp_path / f"clip_{i}.mp4"
        path.write_bytes(b"x")
        files.append(VideoFile(name=path.name, key=path.stem, path=path, caption="a dog"))
    for file in reversed(files):  # the order of finishing must not matter
        if file.key == "clip_3":
            journal.commit(
                file, {"kept": False, "stage": "cut_shots", "reason": "a single frame", "evidence": {"n": 1}}
            )
        else:
            blocks = tar_member(f"{file.key}.json", json.dumps(sample(file.key)).encode())
            journal.commit(file, {"kept": True, "samples": [sample(file.key)], "dropped": []}, blocks=blocks)
    return journal, files


def test_shards_hold_the_samples_in_the_order_of_the_names(mined):
    journal, files = mined
    content = assemble(journal, files, per_shard=4)
    names = []
    for shard in content["shards"]:
        with tarfile.open(journal.out / shard["name"]) as archive:
            names.append([name for name in archive.getnames() if name.endswith(".json")])
    assert names == [["clip_0.json", "clip_1.json", "clip_2.json", "clip_4.json"], ["clip_5.json", "clip_6.json"]]
    assert [shard["samples"] for shard in content["shards"]] == [4, 2]
    assert content["counts"] == {"videos": 7, "rejected": 1, "samples": 6, "subjects": 6}
    assert all((journal.out / shard["name"]).stat().st_size % tarfile.RECORDSIZE == 0 for shard in content["shards"])


def test_rejected_clips(mined):
    journal, files = mined
    assemble(journal, files, per_shard=4)
    [line] = (journal.out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "video": "clip_3.mp4",
        "key": "clip_3",
        "stage": "cut_shots",
        "reason": "a single frame",
        "evidence": {"n": 1},
    }


def test_index(mined):
    journal, files = mined
    assemble(journal, files, per_shard=4)
    rows = pyarrow.parquet.read_table(journal.out / "index.parquet").to_pylist()
    assert [row["shard"] for row in rows] == ["pairs-000000.tar"] * 4 + ["pairs-000001.tar"] * 2
    assert rows[0] == {
        "key": "clip_0",
        "shard": "pairs-000000.tar",
        "video": "clip_0.mp4",
        "caption": "a dog",
        "width": 8,
        "height": 6,
        "num_subjects": 1,
        "phrases": ["dog"],
        "areas": [0.2],
        "min_detection_score": 0.8,
        "min_match_similarity": 0.7,
        "frame_gap_seconds": 0.75,
    }


def test_a_second_assembly_leaves_the_same_files(mined):
    journal, files = mined
    first = assemble(journal, files, per_shard=4)
    (journal.out / "pairs-000009.tar").write_bytes(b"of an interrupted assembly")
    (journal.out / ".pairs-000000.tar.99.tmp").write_bytes(b"torn")
    assert assemble(journal, files, per_shard=4) == first
    assert sorted(path.name for path in journal.out.glob("*.tar")) == ["pairs-000000.tar", "pairs-000001.tar"]
    assert not list(journal.out.glob(".*.tmp"))


def test_samples_of_one_clip_stay_together():
    planner = ShardPlanner(per_shard=3)
    assert [planner.add(f"clip_{i}", 2) for i in range(3)] == [f"pairs-{i:06d}.tar" for i in range(3)]
    assert planner.add("clip_3", 1) == "pairs-000002.tar"
    planner.flush()
    assert [plan.keys for plan in planner.plans] == [("clip_0",), ("clip_1",), ("clip_2", "clip_3")]
    assert [plan.samples for plan in planner.plans] == [2, 2, 3]


def test_shards_may_be_written_elsewhere_in_any_order(mined):
    journal, files = mined
    first = assemble(journal, files, per_shard=2)
    content = {path.name: path.read_bytes() for path in journal.out.glob("pairs-*")}

    def backwards(journal, plans):
        return reversed([write_shard(journal, plan) for plan in reversed(plans)])

    assert assemble(journal, files, per_shard=2, write=backwards) == first
    assert {path.name: path.read_bytes() for path in journal.out.glob("pairs-*")} == content


def test_a_name_that_is_no_utf8_does_not_stop_the_assembly(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"x")
    file = VideoFile(name="clip.mp4", key="clip", path=path, caption="a dog")
    evidence = {"error": "cannot open \udcff.mp4"}
    journal.commit(file, {"kept": False, "stage": "s", "reason": "r", "evidence": evidence})
    assemble(journal, [file], per_shard=4)
    [line] = (journal.out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["evidence"] == evidence


def test_nothing_kept_leaves_an_empty_index(mined):
    journal, files = mined
    content = assemble(journal, [files[3]], per_shard=4)
    assert content["shards"] == []
    assert pyarrow.parquet.read_table(journal.out / "index.parquet").num_rows == 0


def test_settings_hash_changes_with_settings_and_version():
    hashes = {settings_hash({"a": {"b": value}}, version) for value in (1, 2) for version in ("1", "2")}
    assert len(hashes) == 4
    assert settings_hash({"a": {"b": 1, "c": 2}}, "1") == settings_hash({"a": {"c": 2, "b": 1}}, "1")


def test_files_that_settings_name_are_hashed(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hashes([Loader(checkpoint=path)]) == {"loader.checkpoint": sha256}


def test_of_a_folder_names_and_contents_are_hashed(tmp_path):
    (tmp_path / "model/inner").mkdir(parents=True)
    (tmp_path / "model/inner/a.json").write_text("1")
    steps = [Loader(folder=str(tmp_path / "model"))]
    first = file_hashes(steps)
    assert list(first) == ["loader.folder"]
    (tmp_path / "model/inner/a.json").write_text("2")
    second = file_hashes(steps)
    (tmp_path / "model/inner/a.json").rename(tmp_path / "model/inner/b.json")
    assert len({first["loader.folder"], second["loader.folder"], file_hashes(steps)["loader.folder"]}) == 3


def test_versions():
    assert {"python", "numpy", "av", "spacy"} <= set(installed_versions())


def test_shards_are_plain_tar(mined):
    journal, files = mined
    assemble(journal, files, per_shard=10)
    content = (journal.out / "pairs-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        assert len(archive.getmembers()) == 12  # a json and a blank reference each


def test_the_index_takes_any_text_and_number_without_pandas():
    code = """
import io, sys
import pyarrow.parquet
from data_pipeline.assemble import IndexWriter
row = dict(key="k", shard="s", video="v", caption='"a"\\\\n\\U0001f600 \\0', width=1, height=2, num_subjects=2,
    phrases=["2020-01-01", "null"], areas=[0.1, 1 / 3], min_detection_score=1e-9, min_match_similarity=None,
    frame_gap_seconds=0)
file = io.BytesIO()
with IndexWriter(file) as index:
    index.add([row])
assert "pandas" not in sys.modules
# pyarrow's threads may abort a process that ends at once
assert pyarrow.parquet.ParquetFile(file).read(use_threads=False).to_pylist() == [row]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def of_many_subjects(tmp_path, make_pair, make_match):
    """A dataset whose clips have 1, 3, 2, 1, 1, 1, 3 subjects; the second one gave two samples. Returns the folder."""
    mask = np.zeros((24, 24), dtype=bool)
    mask[4:16, 8:20] = True
    rng = np.random.default_rng(0)
    journal, files = Journal(tmp_path / "out"), []
    journal.start({})
    for number, count in enumerate((1, 3, 2, 1, 1, 1, 3)):
        path = tmp_path / f"clip_{number}.mp4"
        path.write_bytes(b"x")
        files.append(VideoFile(name=path.name, key=path.stem, path=path, caption="a dog"))
        pictures = rng.integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
        frames = make_pair(*pictures, file=files[-1])
        pair = TrainingPair(frames=frames, matches=tuple(make_match(mask, mask) for _ in range(count)))
        encoded = WriteShards(both_directions=number == 1).process(pair)
        journal.commit(files[-1], {"kept": True, "samples": list(encoded.samples), "dropped": []}, encoded.blocks)
    assemble(journal, files, per_shard=4)
    return journal.out


def members_of(shard):
    """key -> names of the sample's members, as they stand in the file."""
    found = {}
    with tarfile.open(shard) as archive:
        for name in archive.getnames():
            key, _, suffix = name.partition(".")
            found.setdefault(key, []).append(suffix)
    return found


def test_all_samples_have_the_same_members(of_many_subjects):
    shards = sorted(of_many_subjects.glob("*.tar"))
    members = {key: names for shard in shards for key, names in members_of(shard).items()}
    assert len(shards) == 2
    assert list(members) == ["clip_0", "clip_1", "clip_1-swapped", *(f"clip_{i}" for i in range(2, 7))]
    expected = ["target.jpg", "reference_0.png", "reference_1.png", "reference_2.png", "json"]
    assert all(names == expected for names in members.values())
    opened = Shard(shards[0])
    for key, count in (("clip_0", 1), ("clip_1", 3), ("clip_1-swapped", 3), ("clip_2", 2)):
        assert [each.size for each in opened.read(key).references] == [(12, 12)] * count
    with Image.open(io.BytesIO(BLANK_REFERENCE)) as blank:
        assert (blank.format, blank.mode, blank.size, blank.getpixel((0, 0))) == ("PNG", "RGBA", (1, 1), (0, 0, 0, 0))


def test_samples_of_equal_numbers_of_subjects_get_nothing_more():
    content = b"".join(tar_member(f"a.{suffix}", b"x") for suffix in ("target.jpg", "reference_0.png", "json"))
    assert b"".join(with_blanks(content, 1)) == content
    assert len(b"".join(with_blanks(content, 2))) == len(content) + 2 * tarfile.BLOCKSIZE


def test_datasets_of_hugging_face_reads_our_shards(of_many_subjects, tmp_path):
    """It takes only shards whose first samples have the same members: that test is above."""
    import datasets

    files = sorted(map(str, of_many_subjects.glob("*.tar")))
    found = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["__key__"] == ["clip_0", "clip_1", "clip_1-swapped", *(f"clip_{i}" for i in range(2, 7))]
    assert [len(record["subjects"]) for record in found["json"]] == [1, 3, 3, 2, 1, 1, 1, 3]
    assert [picture.size for picture in found["reference_1.png"]][:4] == [(1, 1), (12, 12), (12, 12), (12, 12)]
