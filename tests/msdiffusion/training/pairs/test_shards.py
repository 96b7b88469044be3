import io
import os
import struct
import tarfile
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.records import encode_mask
from msdiffusion.errors import DataError
from msdiffusion.training.pairs.shards import OpenShard, read_pair, read_record

BOX = (0.25, 0.25, 0.75, 0.75)


@pytest.fixture
def opened():
    """path -> OpenShard, closed after the test."""
    shards = []

    def open_it(path):
        shards.append(OpenShard(path.open("rb"), str(path)))
        return shards[-1]

    yield open_it
    for shard in shards:
        shard.close()


def test_reads_what_was_written(pairs_dir, opened):
    shard = opened(pairs_dir / "pairs-000001.tar")
    assert list(shard.table.keys) == [f"clip_{i:06d}" for i in range(10, 20)]
    pair = read_pair(shard.location(3))
    assert pair.key == "clip_000013"
    assert pair.caption == "a dog and a cat on the beach"
    assert pair.phrases == ("dog", "cat")
    assert pair.target.size == (96, 64)
    assert pair.boxes.dtype == np.float32
    np.testing.assert_allclose(pair.boxes, [(0.05, 0.25, 0.45, 0.75), (0.55, 0.25, 0.95, 0.75)], atol=1e-6)
    assert [reference.mode for reference in pair.references] == ["RGBA", "RGBA"]
    assert [reference.size for reference in pair.references] == [(30, 20), (30, 21)]
    # the fixture paints box and cut-out in one colour: right picture with the right references
    inside = np.asarray(pair.target)[20:44, 8:40].mean((0, 1))
    np.testing.assert_allclose(inside, np.asarray(pair.references[0])[0, 0, :3], atol=6)


def test_unknown_schema_is_refused(tmp_path, shard_writer, opened):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64), schema="msdiffusion.pairs/9"))])
    with pytest.raises(DataError, match=r"msdiffusion\.pairs/9.*reads 'msdiffusion\.pairs/1'"):
        read_record(opened(tmp_path / "p.tar").location(0))


def test_missing_reference_is_refused(tmp_path, shard_writer, opened):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX, BOX], (96, 64)))], leave_out=["reference_1.png"])
    with pytest.raises(DataError, match=r"2 subjects, but no reference_1\.png"):
        read_record(opened(tmp_path / "p.tar").location(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": []}, "has no subject"),
        ({"subjects": [{"phrase": "dog"}]}, r"subject 0 lacks \['target_box'\]"),
        ({"schema": None}, "schema None"),
        ({"subjects": {"phrase": "dog"}}, "has no subject"),
        ({"subjects": ["dog"]}, r"subject 0 lacks \['phrase', 'target_box'\]"),
        ({"subjects": [{"phrase": 7, "target_box": BOX}]}, "its phrase 7 is no text"),
        ({"caption": None}, "its caption None is no text"),
        *(
            ({"subjects": [{"phrase": "dog", "target_box": box}]}, "not a normalised xyxy box")
            for box in (
                [0.5, 0.2, 0.5, 0.8],
                [0.8, 0.2, 0.5, 0.8],
                [-0.1, 0.2, 0.5, 0.8],
                [0.1, 0.2, 0.5],
                [0.1, 0.2, 0.5, float("nan")],
                [0.5, 0.2, 0.5 + 1e-9, 0.8],  # of no width in float32, which training has
                [0.1, 0.0, 0.5, 1e-60],
                [0.1, 0.2, 0.5, 10**400],
                "box!",
                7,
            )
        ),
    ],
)
def test_record_that_breaks_the_schema_is_refused(tmp_path, shard_writer, changes, message, opened):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], **changes)
    with pytest.raises(DataError, match=message):
        read_record(opened(tmp_path / "p.tar").location(0))


def test_record_without_caption_is_refused(tmp_path, shard_writer, opened):
    write_shard, make_record = shard_writer
    record = make_record("a", [BOX], (96, 64))
    del record["caption"]
    write_shard(tmp_path / "p.tar", [("a", record)])
    with pytest.raises(DataError, match=r"lacks \['caption'\]"):
        read_record(opened(tmp_path / "p.tar").location(0))


def test_json_that_is_none_is_refused(tmp_path, pairs_dir, opened):
    shard = tmp_path / "p.tar"
    content = (pairs_dir / "pairs-000000.tar").read_bytes()
    shard.write_bytes(content.replace(b'{"schema"', b'*"schema"'))
    with pytest.raises(DataError, match="its json cannot be read"):
        read_record(opened(shard).location(0))


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"width": ' + b"1" * 5001 + b"}"])
def test_json_that_is_too_much_for_python_is_refused(tmp_path, opened, content):
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for name in ("a.json", "a.target.jpg", "a.reference_0.png"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="pair 'a': its json cannot be read"):
        read_record(opened(tmp_path / "p.tar").location(0))


@pytest.mark.parametrize("suffix", ["target.jpg", "reference_0.png"])
def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, opened, suffix, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))])
    content = (tmp_path / "p.tar").read_bytes()
    # the headers of 96 x 64 and 30 x 20 pixels say 50,000 x 50,000
    side = 50_000
    if suffix == "target.jpg":
        changed = content.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", side, side))
    else:
        header = b"IHDR" + struct.pack(">II", side, side) + bytes([8, 6, 0, 0, 0])
        start = content.index(b"IHDR")
        checked = header + struct.pack(">I", zlib.crc32(header))
        changed = content[:start] + checked + content[start + len(checked) :]
    assert changed != content
    (tmp_path / "p.tar").write_bytes(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"a' has 50,000 x 50,000 pixels, more than the 67,108,864 .* smaller"):
            read_pair(opened(tmp_path / "p.tar").location(0))


def test_picture_that_is_none_is_refused(tmp_path, pairs_dir, opened):
    shard = tmp_path / "p.tar"
    content = (pairs_dir / "pairs-000000.tar").read_bytes()
    shard.write_bytes(content.replace(b"\x89PNG", b"\x89GNP", 1))
    with pytest.raises(DataError, match=r"reference_0\.png of pair 'clip_000000' cannot be decoded"):
        read_pair(opened(shard).location(0))


def write_masked(path, shard_writer, mask=None, **subject):
    """One pair whose subject's mask is the middle of its box."""
    write_shard, make_record = shard_writer
    record = make_record("a", [BOX], (96, 64))
    if mask is None:
        mask = np.zeros((64, 96), bool)
        mask[20:40, 30:60] = True
    record["subjects"][0] |= {"target_mask_rle": encode_mask(mask)} | subject
    write_shard(path, [("a", record)])
    return path


def test_references_can_be_cut_out_of_the_target_itself(tmp_path, shard_writer, opened):
    location = opened(write_masked(tmp_path / "p.tar", shard_writer)).location(0)
    pair, usual = read_pair(location, "target"), read_pair(location)
    target = np.asarray(pair.target)
    (reference,) = pair.references
    assert reference.size == (30, 20)
    pixels = np.asarray(reference)
    assert (pixels[..., 3] == 255).all()
    np.testing.assert_array_equal(pixels[..., :3], target[20:40, 30:60])
    assert (pair.key, pair.caption, pair.phrases) == (usual.key, usual.caption, usual.phrases)
    assert usual.references[0].size == (30, 20)
    assert not np.array_equal(np.asarray(usual.references[0]), pixels)


def test_cut_outs_are_empty_outside_the_mask(tmp_path, shard_writer, opened):
    mask = np.zeros((64, 96), bool)
    mask[20, 30] = mask[21, 31] = True
    shard = opened(write_masked(tmp_path / "p.tar", shard_writer, mask))
    (reference,) = read_pair(shard.location(0), "target").references
    assert np.asarray(reference)[..., 3].tolist() == [[255, 0], [0, 255]]
    assert (np.asarray(reference)[0, 1] == 0).all()


@pytest.mark.parametrize(
    ("mask", "subject", "message"),
    [
        (np.ones((32, 96), bool), {}, r"its mask is \(32, 96\).*target is \(64, 96\)"),
        (np.zeros((64, 96), bool), {}, "0 pixels set"),
        (None, {"target_mask_rle": {"size": [64, 96], "counts": [3]}}, "unreadable mask"),
    ],
)
def test_masks_that_do_not_fit_the_target_are_refused(tmp_path, shard_writer, mask, subject, message, opened):
    location = opened(write_masked(tmp_path / "p.tar", shard_writer, mask, **subject)).location(0)
    with pytest.raises(DataError, match=message):
        read_pair(location, "target")


def test_a_pair_without_masks_cannot_be_cut_from_its_target(pairs_dir, opened):
    with pytest.raises(DataError, match="no target_mask_rle"):
        read_pair(opened(pairs_dir / "pairs-000000.tar").location(0), "target")


def test_picture_of_another_size_than_its_record_is_told(tmp_path, shard_writer, opened):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], width=97)
    with pytest.raises(DataError, match=r"target of pair 'a' has \(96, 64\) pixels, and its json says \(97, 64\)"):
        read_pair(opened(tmp_path / "p.tar").location(0))


def test_sizes_come_from_the_header_of_the_picture(pairs_dir, tmp_path, opened):
    assert opened(pairs_dir / "pairs-000000.tar").size_of_target(2) == (96, 64)
    shard = tmp_path / "p.tar"
    shard.write_bytes(
        (pairs_dir / "pairs-000000.tar").read_bytes().replace(b"JFIF", b"none").replace(b"\xff\xd8", b"  ")
    )
    with pytest.raises(DataError, match=r"target\.jpg of pair 'clip_000000' cannot be decoded"):
        opened(shard).size_of_target(0)


def test_shard_that_shrinks_while_it_is_read_is_told(tmp_path, pairs_dir, opened):
    path = tmp_path / "p.tar"
    path.write_bytes((pairs_dir / "pairs-000000.tar").read_bytes())
    shard = opened(path)
    location = shard.location(9)
    os.truncate(path, location.members["target.jpg"][0] + 10)
    with pytest.raises(DataError, match=r"p\.tar became shorter.*'clip_000009'"):
        read_pair(location)


def test_a_disk_that_fails_is_told(pairs_dir, opened):
    location = replace(opened(pairs_dir / "pairs-000000.tar").location(0), descriptor=-1)
    with pytest.raises(DataError, match=r"pairs-000000\.tar: json of pair 'clip_000000' cannot be read"):
        read_record(location)


def test_known_table_of_another_file_is_refused(pairs_dir, opened):
    table = opened(pairs_dir / "pairs-000000.tar").table
    with (pairs_dir / "pairs-000002.tar").open("rb") as file, pytest.raises(DataError, match="was changed while"):
        OpenShard(file, "pairs-000002.tar", table)


def test_use_is_marked_on_the_file_now_and_then(tmp_path, pairs_dir, opened, monkeypatch):
    path = tmp_path / "p.tar"
    path.write_bytes((pairs_dir / "pairs-000000.tar").read_bytes())
    os.utime(path, (1, 1))
    shard = opened(path)
    shard.stay()
    assert path.stat().st_mtime == 1
    monkeypatch.setattr("msdiffusion.training.pairs.shards.STAY_SECONDS", -1.0)
    shard.stay()
    assert path.stat().st_mtime > 1
