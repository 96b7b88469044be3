import json
import os
import tarfile

import numpy as np
import pytest

from data_pipeline.records import encode_mask
from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.catalogue import read_catalogue
from msdiffusion.training.pairs.damage import known_damage, verify, write_damage
from msdiffusion.training.pairs.remote import ShardCache
from msdiffusion.training.pairs.sources import locate

BOX = (0.25, 0.25, 0.75, 0.75)


def overwrite(path, name, content):
    """Other bytes at the beginning of a member; the tar file stays whole."""
    with tarfile.open(path) as archive:
        offset = archive.getmember(name).offset_data
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def unfinish(folder):
    for name in ("build.json", "index.parquet"):
        (folder / name).unlink()


def what(found):
    return [(damage.shard, damage.key, damage.pairs) for damage in found.damaged]


@pytest.mark.parametrize("deep", [False, True])
def test_nothing_is_wrong_with_what_was_written(finished_dir, deep):
    found = verify(str(finished_dir), deep=deep)
    assert (found.pairs, found.damaged, found.deep) == (24, (), deep)
    assert found.shards == {path.name: path.stat().st_size for path in finished_dir.glob("*.tar")}


def test_every_kind_of_damage_is_found(finished_dir):
    unfinish(finished_dir)
    first, second, third = sorted(finished_dir.glob("*.tar"))
    overwrite(first, "clip_000002.json", b"#")
    overwrite(first, "clip_000004.json", b'{"schema": "msdiffusion.pairs/7"')
    second.write_bytes(second.read_bytes()[:5000])
    third.write_bytes(b"no tar")
    found = verify(str(finished_dir))
    assert what(found) == [
        (first.name, "clip_000002", 1),
        (first.name, "clip_000004", 1),
        (second.name, None, None),
        (third.name, None, None),
    ]
    reasons = [damage.reason for damage in found.damaged]
    assert all(str(finished_dir) in reason for reason in reasons)
    for reason, words in zip(reasons, ("cannot be read", "", "cut off", "not a complete tar file"), strict=True):
        assert words in reason
    assert found.pairs == 8


def test_pairs_without_a_member_are_found(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    for name, left_out in (("a", "target.jpg"), ("b", "json"), ("c", "reference_0.png"), ("d", "reference_1.png")):
        write_shard(tmp_path / f"{name}.tar", [(name, make_record(name, [BOX, BOX], (96, 64)))], leave_out=[left_out])
    found = verify(str(tmp_path))
    assert what(found) == [(f"{name}.tar", name, 1) for name in "abcd"]
    for damage, words in zip(found.damaged, ("no target.jpg", "no json", "1 references in all", "no reference_1.png"),
                             strict=True):  # fmt: skip
        assert words in damage.reason
    assert found.pairs == 0


def test_only_depth_looks_at_pictures(finished_dir):
    unfinish(finished_dir)
    shard = finished_dir / "pairs-000000.tar"
    overwrite(shard, "clip_000001.reference_1.png", b"\x89PNG\r\n\x1a\nnonsense")
    overwrite(shard, "clip_000005.target.jpg", b"nonsense")
    assert verify(str(finished_dir)).damaged == ()
    assert what(verify(str(finished_dir), deep=True)) == [
        ("pairs-000000.tar", "clip_000001", 1),
        ("pairs-000000.tar", "clip_000005", 1),
    ]


def test_only_depth_looks_at_masks(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    record = make_record("a", [BOX], (96, 64))
    record["subjects"][0]["target_mask_rle"] = encode_mask(np.ones((10, 10), bool))
    write_shard(tmp_path / "a.tar", [("a", record)])
    assert verify(str(tmp_path)).damaged == ()
    [damage] = verify(str(tmp_path), deep=True).damaged
    assert "its mask is (10, 10)" in damage.reason


def test_only_depth_hashes_local_shards(finished_dir):
    with (finished_dir / "pairs-000001.tar").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")  # behind the end mark, where no reader of tar files looks
    assert verify(str(finished_dir)).damaged == ()
    found = verify(str(finished_dir), deep=True)
    assert what(found) == [("pairs-000001.tar", None, 10)]
    assert "has sha256" in found.damaged[0].reason
    assert found.pairs == 14


def test_keys_are_compared_with_the_index(pairs_dir, tmp_path, finisher, shard_writer):
    write_shard, make_record = shard_writer
    path = tmp_path / "a.tar"
    write_shard(path, [("one", make_record("one", [BOX], (96, 64)))])
    finisher(tmp_path)
    size = path.stat().st_size
    write_shard(path, [("two", make_record("two", [BOX], (96, 64)))])
    assert path.stat().st_size == size
    found = verify(str(tmp_path))
    assert what(found) == [("a.tar", None, 1)]
    assert "holds other keys than index.parquet says" in found.damaged[0].reason


def test_missing_shards_are_in_the_list(finished_dir):
    (finished_dir / "pairs-000001.tar").unlink()
    found = verify(str(finished_dir))
    assert what(found) == [("pairs-000001.tar", None, 10)]
    assert found.shards["pairs-000001.tar"] is None


def test_two_processes_find_the_same(finished_dir):
    unfinish(finished_dir)
    overwrite(finished_dir / "pairs-000000.tar", "clip_000002.json", b"#")
    assert verify(str(finished_dir), workers=2) == verify(str(finished_dir))


def test_there_is_at_least_one_process(finished_dir):
    with pytest.raises(RequestError, match="workers must be at least 1"):
        verify(str(finished_dir), workers=0)


# ---------------------------------------------------------------------------------------------------- the written list


def damaged_in_depth(folder):
    unfinish(folder)
    overwrite(folder / "pairs-000000.tar", "clip_000005.target.jpg", b"nonsense")
    return verify(str(folder), deep=True)


def test_the_list_that_was_written_is_believed(finished_dir):
    found = damaged_in_depth(finished_dir)
    assert known_damage(locate(str(finished_dir)), None) is None
    assert write_damage(found, None) == finished_dir / "damaged.json"
    assert known_damage(locate(str(finished_dir)), None) == found.damaged
    with pytest.warns(UserWarning, match=r"left out 1 pairs of pairs-000000\.tar.*cannot be decoded"):
        catalogue = read_catalogue(str(finished_dir), skip_damaged=True)
    assert "clip_000005" not in list(catalogue.keys)
    assert len(read_catalogue(str(finished_dir))) == 24  # nothing is left out unasked


def test_the_list_serves_a_part_of_the_shards(finished_dir):
    write_damage(damaged_in_depth(finished_dir), None)
    assert known_damage(locate(f"{finished_dir}/pairs-00000{{1,2}}.tar"), None) == ()


def test_a_list_of_other_shards_is_refused(finished_dir):
    write_damage(damaged_in_depth(finished_dir), None)
    with (finished_dir / "pairs-000002.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"damaged\.json was written before pairs-000002\.tar became.*1 shards differ"):
        read_catalogue(str(finished_dir), skip_damaged=True)


def test_a_list_of_shards_that_were_changed_in_place_is_refused(finished_dir):
    write_damage(damaged_in_depth(finished_dir), None)
    shard = finished_dir / "pairs-000001.tar"
    before = shard.stat().st_mtime_ns
    overwrite(shard, "clip_000012.json", b"#")  # the size stays
    os.utime(shard, ns=(before + 1, before + 1))
    with pytest.raises(DataError, match=r"damaged\.json was written before pairs-000001\.tar became.*1 shards differ"):
        read_catalogue(str(finished_dir), skip_damaged=True)


def test_a_list_of_remote_shards_that_were_changed_is_refused(finished_dir, serve, tmp_path):
    unfinish(finished_dir)
    server, cache = serve(finished_dir), ShardCache(tmp_path / "cache")
    write_damage(verify(server.url, cache=cache), cache)
    assert known_damage(locate(server.url), cache) == ()
    overwrite(finished_dir / "pairs-000001.tar", "clip_000012.json", b"#")
    os.utime(finished_dir / "pairs-000001.tar", (2e9, 2e9))
    with pytest.raises(DataError, match=r"was written before pairs-000001\.tar became"):
        known_damage(locate(server.url), cache)


def listed(damage):
    """A list with this damage, as json."""
    return json.dumps({"schema": "msdiffusion.damaged/1", "shards": {}, "states": {}, "damaged": [damage]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": "msdiffusion.damaged/1", "shards": {}, "damaged": []}', "is not complete"),  # an older version's
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (listed({"shard": "a", "key": None, "reason": "r", "pairs": "3"}), "is not complete"),
        (listed({"shard": ["a"], "key": None, "reason": "r", "pairs": 3}), "is not complete"),
        (listed({"shard": "a", "key": 3, "reason": "r", "pairs": 3}), "is not complete"),
        (listed({"shard": "a", "key": None, "reason": None, "pairs": 3}), "is not complete"),
        ("[]", "schema None"),
        ('{"schema": "msdiffusion.damaged/2"}', "msdiffusion.damaged/2"),
        ('{"schema": "msdiffusion.damaged/1"}', "is not complete"),
        ('{"schema": "msdiffusion.damaged/1", "shards": {}, "damaged": [{"shard": "a"}]}', "is not complete"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(finished_dir, content, message):
    (finished_dir / "damaged.json").write_text(content)
    with pytest.raises(DataError, match=message):
        known_damage(locate(str(finished_dir)), None)


def test_the_list_of_a_remote_dataset_lies_in_the_cache(finished_dir, serve, tmp_path):
    unfinish(finished_dir)
    server = serve(finished_dir)
    cache = ShardCache(tmp_path / "cache")
    overwrite(finished_dir / "pairs-000000.tar", "clip_000005.target.jpg", b"nonsense")
    found = verify(server.url, deep=True, cache=cache)
    assert what(found) == [("pairs-000000.tar", "clip_000005", 1)]
    path = write_damage(found, cache)
    assert path.parent == cache.folder
    assert known_damage(locate(server.url), cache) == found.damaged
    assert json.loads(path.read_text())["source"] == server.url


def test_a_shard_that_differs_from_build_json_is_found_remotely_too(finished_dir, serve, tmp_path):
    overwrite(finished_dir / "pairs-000002.tar", "clip_000021.target.jpg", b"nonsense")
    cache = ShardCache(tmp_path / "cache", attempts=1)
    found = verify(serve(finished_dir).url, cache=cache)
    assert what(found) == [("pairs-000002.tar", None, 4)]
    assert "its sha256 is" in found.damaged[0].reason


def test_shards_of_several_folders_have_no_place_for_a_list(pairs_dir, tmp_path):
    for name in "ab":
        (tmp_path / name).symlink_to(pairs_dir)
    pattern = f"{tmp_path}/{{a,b}}/pairs-000000.tar"
    assert known_damage(locate(pattern), None) is None
    with pytest.raises(RequestError, match="several folders"):
        write_damage(verify(pattern), None)


def test_a_folder_that_cannot_be_written_is_told(finished_dir):
    found = verify(str(finished_dir))
    (finished_dir / ".damaged.json.part").mkdir()
    with pytest.raises(DataError, match=r"damaged\.json cannot be written"):
        write_damage(found, None)
