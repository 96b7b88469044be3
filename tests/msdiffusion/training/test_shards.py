import tarfile

import numpy as np
import pytest

from data_pipeline.records import encode_mask
from msdiffusion.errors import DataError
from msdiffusion.training.shards import PairLocation, find_shards, index_shards, read_pair, split_by_key

BOX = (0.25, 0.25, 0.75, 0.75)


def locations_of(keys):
    return [PairLocation(key, None, {}) for key in keys]


def test_reads_what_was_written(pairs_dir):
    locations = index_shards(find_shards(pairs_dir))
    assert [location.key for location in locations] == [f"clip_{i:06d}" for i in range(24)]
    pair = read_pair(locations[13])
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


@pytest.mark.parametrize("make_directory", [False, True])
def test_missing_dataset_says_which_command_makes_one(tmp_path, make_directory):
    directory = tmp_path / "pairs"
    if make_directory:
        directory.mkdir()
    with pytest.raises(
        DataError, match=r"(?s)no pairs dataset.*data_pipeline\.world.*data_pipeline\.build.*--out"
    ) as error:
        find_shards(directory)
    assert str(directory) in str(error.value)


def test_unknown_schema_is_refused(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "pairs-000000.tar", [("a", make_record("a", [BOX], (96, 64), schema="msdiffusion.pairs/9"))])
    with pytest.raises(DataError, match=r"msdiffusion\.pairs/9.*reads 'msdiffusion\.pairs/1'"):
        index_shards(find_shards(tmp_path))


@pytest.mark.parametrize("left_out", ["json", "target.jpg"])
def test_pair_without_a_member_is_refused(tmp_path, shard_writer, left_out):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], leave_out=[left_out])
    with pytest.raises(DataError, match=f"pair 'a' has no {left_out}"):
        index_shards(find_shards(tmp_path))


def test_missing_reference_is_refused(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX, BOX], (96, 64)))], leave_out=["reference_1.png"])
    with pytest.raises(DataError, match=r"2 subjects, but no reference_1\.png"):
        index_shards(find_shards(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": []}, "has no subject"),
        ({"subjects": [{"phrase": "dog"}]}, r"subject 0 lacks \['target_box'\]"),
        ({"schema": None}, "schema None"),
        *(
            ({"subjects": [{"phrase": "dog", "target_box": box}]}, "not a normalised xyxy box")
            for box in ([0.5, 0.2, 0.5, 0.8], [0.8, 0.2, 0.5, 0.8], [-0.1, 0.2, 0.5, 0.8], [0.1, 0.2, 0.5])
        ),
    ],
)
def test_record_that_breaks_the_schema_is_refused(tmp_path, shard_writer, changes, message):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], **changes)
    with pytest.raises(DataError, match=message):
        index_shards(find_shards(tmp_path))


def test_record_without_caption_is_refused(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    record = make_record("a", [BOX], (96, 64))
    del record["caption"]
    write_shard(tmp_path / "p.tar", [("a", record)])
    with pytest.raises(DataError, match=r"lacks \['caption'\]"):
        index_shards(find_shards(tmp_path))


def test_json_that_is_none_is_refused(tmp_path, pairs_dir):
    shard = tmp_path / "p.tar"
    content = find_shards(pairs_dir)[0].read_bytes()
    shard.write_bytes(content.replace(b'{"schema"', b'*"schema"'))
    with pytest.raises(DataError, match="its json cannot be read"):
        index_shards([shard])


def test_picture_that_is_none_is_refused(tmp_path, pairs_dir):
    shard = tmp_path / "p.tar"
    content = find_shards(pairs_dir)[0].read_bytes()
    shard.write_bytes(content.replace(b"\x89PNG", b"\x89GNP", 1))
    with pytest.raises(DataError, match=r"reference_0\.png of pair 'clip_000000' cannot be decoded"):
        read_pair(index_shards([shard])[0])


def test_shard_that_vanished_is_told(tmp_path, pairs_dir):
    shard = tmp_path / "p.tar"
    shard.write_bytes(find_shards(pairs_dir)[0].read_bytes())
    locations = index_shards([shard])
    shard.unlink()
    with pytest.raises(DataError, match="but no longer"):
        read_pair(locations[0])


@pytest.mark.parametrize("content", [b"no tar file", b""])
def test_file_that_is_no_shard_is_refused(tmp_path, content):
    shard = tmp_path / "p.tar"
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.tar is not a complete tar file"):
        index_shards([shard])


def test_empty_shard_is_refused(tmp_path):
    shard = tmp_path / "p.tar"
    tarfile.open(shard, "w").close()
    with pytest.raises(DataError, match="holds no pair"):
        index_shards([shard])


def test_cut_off_shard_is_refused(tmp_path, pairs_dir):
    shard = tmp_path / "p.tar"
    content = find_shards(pairs_dir)[0].read_bytes()
    locations = index_shards(find_shards(pairs_dir)[:1])
    offset, size = locations[-1].members["target.jpg"]
    shard.write_bytes(content[: offset + size // 2])
    with pytest.raises(DataError, match=r"no json|cut off|not a complete tar file"):
        index_shards([shard])


def test_key_in_two_shards_is_refused(tmp_path, pairs_dir):
    content = find_shards(pairs_dir)[0].read_bytes()
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"'clip_000000' is both in .*a\.tar and in .*b\.tar"):
        index_shards(find_shards(tmp_path))


def test_split_depends_on_the_key_alone():
    keys = [f"clip_{i}" for i in range(1000)]
    training, validation = split_by_key(locations_of(keys), 0.1)
    assert len(training) + len(validation) == 1000
    assert 60 < len(validation) < 140
    held_out = {location.key for location in validation}
    _, later = split_by_key(locations_of([*reversed(keys), *(f"new_{i}" for i in range(500))]), 0.1)
    assert {location.key for location in later if location.key in keys} == held_out


def test_a_pair_and_its_swap_are_on_one_side():
    keys = [f"clip_{i}" for i in range(200)]
    training, validation = split_by_key(locations_of([*keys, *(f"{key}-swapped" for key in keys)]), 0.3)
    for side in (training, validation):
        assert {f"{location.key}-swapped" for location in side if location.key in keys} == {
            location.key for location in side if location.key not in keys
        }


def test_small_dataset_still_has_a_validation_pair():
    training, validation = split_by_key(locations_of("abc"), 0.001)
    assert (len(training), len(validation)) == (2, 1)


def test_no_fraction_no_validation():
    training, validation = split_by_key(locations_of("a"), 0.0)
    assert (len(training), len(validation)) == (1, 0)


def test_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="leave none to train on"):
        split_by_key(locations_of("a"), 0.5)


def write_masked(path, shard_writer, mask=None, **subject):
    """One pair whose subject's mask is the middle of its box."""
    write_shard, make_record = shard_writer
    record = make_record("a", [BOX], (96, 64))
    if mask is None:
        mask = np.zeros((64, 96), bool)
        mask[20:40, 30:60] = True
    record["subjects"][0] |= {"target_mask_rle": encode_mask(mask)} | subject
    write_shard(path, [("a", record)])
    return index_shards([path])[0]


def test_references_can_be_cut_out_of_the_target_itself(tmp_path, shard_writer):
    location = write_masked(tmp_path / "p.tar", shard_writer)
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


def test_cut_outs_are_empty_outside_the_mask(tmp_path, shard_writer):
    mask = np.zeros((64, 96), bool)
    mask[20, 30] = mask[21, 31] = True
    (reference,) = read_pair(write_masked(tmp_path / "p.tar", shard_writer, mask), "target").references
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
def test_masks_that_do_not_fit_the_target_are_refused(tmp_path, shard_writer, mask, subject, message):
    location = write_masked(tmp_path / "p.tar", shard_writer, mask, **subject)
    with pytest.raises(DataError, match=message):
        read_pair(location, "target")


def test_a_pair_without_masks_cannot_be_cut_from_its_target(pairs_dir):
    with pytest.raises(DataError, match="no target_mask_rle"):
        read_pair(index_shards(find_shards(pairs_dir))[0], "target")
