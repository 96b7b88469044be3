import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.pairs_format import SAMPLE_BYTES
from msdiffusion.errors import DataError
from msdiffusion.training.pairs.columns import Columns, check_shard, from_headers, from_index, open_file, open_shard
from msdiffusion.training.pairs.data_files import DataFile
from msdiffusion.training.pairs.sources import Shard, locate
from msdiffusion.training.pairs.tar_index import KeyColumn


def rewrite_index(folder, change):
    """change: table -> table."""
    path = folder / "index.parquet"
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)


def same(first, second):
    assert first.shards == second.shards
    for name in ("shard", "place"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert list(first.keys) == list(second.keys)


def test_index_and_headers_say_the_same(finished_dir):
    source = locate(str(finished_dir))
    by_index, by_headers = from_index(source, None), from_headers(source.shards, None, progress=False)
    same(by_index, by_headers)
    assert by_index.sizes.tolist() == [[96, 64]] * 24
    assert by_headers.sizes is None


def test_no_shard_is_opened_where_there_is_an_index(finished_dir):
    source = locate(str(finished_dir))
    for path in finished_dir.glob("*.tar"):
        path.unlink()
    assert len(from_index(source, None)) == 24


def test_without_build_json_the_index_is_not_trusted(finished_dir):
    (finished_dir / "build.json").unlink()
    assert from_index(locate(str(finished_dir)), None) is None


def test_without_an_index_there_are_no_columns_of_it(finished_dir):
    (finished_dir / "index.parquet").unlink()
    assert from_index(locate(str(finished_dir)), None) is None


def test_rows_of_the_index_may_stand_in_any_order_of_shards(finished_dir):
    source = locate(str(finished_dir))
    before = from_index(source, None)
    order = [*range(20, 24), *range(10), *range(10, 20)]
    rewrite_index(finished_dir, lambda table: table.take(pyarrow.array(order)))
    same(from_index(source, None), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 23), r"has 3 rows of pairs-000002\.tar, and build\.json says 4"),
        (lambda t: t.slice(0, 0), r"has 0 rows of pairs-000000\.tar, and build\.json says 10"),
        (lambda t: t.drop_columns(["width"]), "has no complete column 'width'"),
        (lambda t: t.set_column(t.column_names.index("key"), "key", pyarrow.array([None] * 24, pyarrow.string())),
         "has no complete column 'key'"),
        (lambda t: t.set_column(t.column_names.index("shard"), "shard", pyarrow.array(["x.tar"] * 24)),
         r"names the shard x\.tar, which build\.json does not list"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_build_json_is_refused(finished_dir, change, message):
    rewrite_index(finished_dir, change)
    with pytest.raises(DataError, match=message):
        from_index(locate(str(finished_dir)), None)


def test_an_index_that_is_none_is_refused(finished_dir):
    (finished_dir / "index.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"index\.parquet cannot be read \(.*copy it again"):
        from_index(locate(str(finished_dir)), None)


def test_an_index_of_many_keys_makes_no_python_object_of_each(tmp_path, monkeypatch):
    """At full size that would be gigabytes in every process."""
    N = 30_000
    names = ["a.tar", "b.tar", "c.tar"]
    table = pyarrow.table(
        {"key": [f"key_{i:06d}" for i in range(N)], "shard": [names[i * 3 // N] for i in range(N)],
         "width": pyarrow.array(np.arange(1, N + 1), pyarrow.int32()),
         "height": pyarrow.array(np.ones(N), pyarrow.int32())}
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "index.parquet", row_group_size=1000)
    shards = []
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.truncate(tmp_path / name, N // 3 * SAMPLE_BYTES)  # no byte on the disk
        shards.append({"name": name, "samples": N // 3, "bytes": N // 3 * SAMPLE_BYTES, "sha256": ""})
    (tmp_path / "build.json").write_text(json.dumps({"schema": "data_pipeline.build/1", "shards": shards}))
    asked = []
    monkeypatch.setattr(KeyColumn, "__getitem__", lambda self, index: asked.append(index))
    columns = from_index(locate(str(tmp_path)), None)
    assert columns.keys.first_repeated() is None
    assert asked == []
    assert columns.sizes[:, 0].tolist() == list(range(1, N + 1))
    assert np.bincount(columns.shard).tolist() == [N // 3] * 3
    assert columns.place.max() == N // 3 - 1


def test_some_pairs_of_columns(finished_dir):
    columns = from_index(locate(str(finished_dir)), None)
    wanted = np.zeros(24, dtype=bool)
    wanted[[1, 2, 22]] = True
    some = columns.of(wanted)
    assert list(some.keys) == ["clip_000001", "clip_000002", "clip_000022"]
    assert [shard.name for shard in some.shards] == ["pairs-000000.tar", "pairs-000002.tar"]
    assert (some.shard.tolist(), some.place.tolist(), len(some.sizes)) == ([0, 0, 1], [1, 2, 2], 3)
    assert some.shard.dtype == np.int32
    assert len(columns.of(np.zeros(24, dtype=bool))) == 0


def test_no_pairs_are_columns_too():
    nothing = Columns((), np.zeros(0, np.int32), np.zeros(0, np.int32), KeyColumn.of([]), None)
    assert len(nothing.of(np.zeros(0, dtype=bool))) == 0


def test_every_shard_is_checked_once(pairs_dir):
    seen = []
    shards = locate(str(pairs_dir)).shards
    from_headers(shards, None, progress=False, check=lambda opened: seen.append(opened.name))
    assert seen == [shard.place for shard in shards]


def test_a_remote_file_needs_a_cache():
    with pytest.raises(DataError, match="is remote, and there is no cache"):
        open_file(DataFile("memory://a.tar"), None)


def test_a_shard_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        open_shard(Shard("a.tar", str(tmp_path / "a.tar")), None)


def test_a_refused_shard_is_closed(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(DataError, match="is not a complete tar file"):
        open_shard(Shard("a.tar", str(tmp_path / "a.tar")), None)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_pair_without_its_members_is_named(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "a.tar", [("x", make_record("x", [(0, 0, 1, 1)], (96, 64)))], leave_out=["target.jpg"])
    with open_shard(Shard("a.tar", str(tmp_path / "a.tar")), None) as opened:
        with pytest.raises(DataError, match=r"a\.tar: pair 'x' has no target\.jpg"):
            check_shard(opened)
