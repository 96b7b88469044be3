import hashlib
import json
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.inspect import main
from data_pipeline.records import TrainingPair
from data_pipeline.steps.write_shards import WriteShards

MASK = np.zeros((40, 60), dtype=bool)
MASK[10:30, 20:50] = True


@pytest.fixture
def shard(tmp_path, make_pair, make_match):
    """A shard of the samples clip and other, and the build.json beside it."""
    rng = np.random.default_rng(0)
    content = b""
    for key in ("clip", "other"):
        frames = make_pair(*(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(2)))
        frames = replace(frames, video=replace(frames.video, file=replace(frames.video.file, key=key)))
        pair = TrainingPair(frames=frames, matches=(make_match(MASK, MASK), make_match(MASK, MASK, "cat")))
        content += WriteShards(pipeline={"version": "1"}).process(pair).blocks
    content += bytes(2 * tarfile.BLOCKSIZE)
    path = tmp_path / "pairs-000000.tar"
    path.write_bytes(content)
    entry = {"name": path.name, "samples": 2, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    build = {"schema": "data_pipeline.build/1", "settings": {}, "versions": {}, "counts": {"samples": 2}}
    (tmp_path / "build.json").write_text(json.dumps({**build, "shards": [entry]}))
    return path


def test_inspect_prints_and_draws_a_sample(shard, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert main([str(shard), "--key", "other", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("other in", "a dog on the beach", "60 x 40", "clip.mp4", "frame 3, at 0.375 s", "version 1"):
        assert text in shown
    rows = [line for line in shown.splitlines() if line.startswith(("0  ", "1  "))]
    assert [row.split()[1:3] for row in rows] == [["dog", "thing"], ["cat", "thing"]]
    assert "0.333 0.250 0.833 0.750" in rows[0]
    assert Image.open(out).width >= 600


def test_inspect_takes_a_dataset_a_number_and_its_own_place(shard, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path), "--number", "1"]) == 0
    assert "other in" in capsys.readouterr().out
    assert (tmp_path / "other.png").is_file()
    assert main([str(tmp_path), "--number", "1"]) == 2
    assert capsys.readouterr().err == "error: other.png is already there: choose another place with --out\n"


def test_inspect_lists_the_keys_and_writes_nothing(shard, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main([str(shard), "--list"]) == 0
    assert capsys.readouterr().out == "clip\nother\n"
    assert sorted(tmp_path.iterdir()) == before


def test_a_shard_alone_needs_no_build_file(shard, tmp_path):
    (tmp_path / "build.json").unlink()
    assert main([str(shard), "--out", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--key", "nope"], "no sample 'nope' in .*; its 2 keys are clip, other"),
        (["--number", "2"], "no sample 2 in .*: it has 2, counted from 0"),
        (["--number", "-1"], "--number counts from 0, got -1"),
        (["--out", "no/folder/a.png"], "--out: cannot write no/folder/a.png"),
        (["--out", "a.unknown"], "give a name like picture.png"),
    ],
)
def test_inspect_refuses_with_one_line(shard, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(shard), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_inspect_notices_a_changed_shard(shard, capsys):
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert main([str(shard)]) == 2
    assert "has changed since it was built" in capsys.readouterr().err


def test_inspect_of_a_broken_mask(shard, tmp_path, capsys):
    (tmp_path / "build.json").unlink()
    # The same number of digits, so that every member keeps its place.
    content = shard.read_bytes()
    place = content.index(b'"target_mask_rle":{"size":[40,60],"counts":[') + 44
    assert content[place : place + 1].isdigit()
    wrong = b"9" if content[place : place + 1] != b"9" else b"1"
    shard.write_bytes(content[:place] + wrong + content[place + 1 :])
    assert main([str(shard), "--out", str(tmp_path / "a.png")]) == 2
    assert "subject 0 of clip.json: unreadable mask in the annotations" in capsys.readouterr().err


def test_inspect_of_a_dataset_without_samples(tmp_path, capsys):
    build = {"schema": "data_pipeline.build/1"}
    (tmp_path / "build.json").write_text(json.dumps(build))
    assert main([str(tmp_path)]) == 2
    assert "build.json lacks settings, versions, counts, shards" in capsys.readouterr().err
    build |= {"settings": {}, "versions": {}, "counts": {"samples": 0}, "shards": []}
    (tmp_path / "build.json").write_text(json.dumps(build))
    assert main([str(tmp_path)]) == 2
    assert "has no samples: rejected.jsonl and report.html say why" in capsys.readouterr().err
