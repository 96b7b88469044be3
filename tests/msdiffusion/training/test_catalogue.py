import hashlib
import io
import multiprocessing
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training import catalogue as catalogue_module
from msdiffusion.training.catalogue import Catalogue, main, read_catalogue, split_by_key
from msdiffusion.training.pairs import shards as shards_module
from msdiffusion.training.pairs.columns import Columns
from msdiffusion.training.pairs.damage import verify
from msdiffusion.training.pairs.remote import ShardCache
from msdiffusion.training.pairs.sources import Shard
from msdiffusion.training.pairs.tar_index import KeyColumn

BOX = (0.25, 0.25, 0.75, 0.75)


def catalogue_of(keys):
    """A catalogue that knows its keys and nothing else."""
    N = len(keys)
    columns = Columns((Shard("a.tar", "a.tar"),), np.zeros(N, np.int32), np.arange(N, dtype=np.int32),
                      KeyColumn.of(keys), None)  # fmt: skip
    return Catalogue(columns)


def content_of(pair):
    """A pair as something that can be compared."""
    pictures = [np.asarray(picture) for picture in (pair.target, *pair.references)]
    return (
        pair.key, pair.caption, pair.phrases, pair.boxes.tolist(),
        [(picture.shape, hashlib.sha256(picture.tobytes()).hexdigest()) for picture in pictures],
    )  # fmt: skip


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def contents_of(catalogue):
    return [content_of(catalogue.read(i)) for i in range(len(catalogue))]


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", first_wait=0.01)


@pytest.mark.parametrize("finished", [False, True])
def test_every_pair_has_a_number(pairs_dir, finished_dir, finished):
    catalogue = read_catalogue(str(finished_dir if finished else pairs_dir))
    assert len(catalogue) == 24
    assert list(catalogue.keys) == [f"clip_{i:06d}" for i in range(24)]
    assert catalogue.shard_sizes.tolist() == [10, 10, 4]
    assert (catalogue.shard.dtype, catalogue.place.dtype) == (np.int32, np.int32)
    assert catalogue.sizes.dtype == np.int32
    assert catalogue.sizes.tolist() == [[96, 64]] * 24
    for i in np.random.default_rng(0).permutation(24):
        assert catalogue.read(i).key == catalogue.record(i)["key"] == f"clip_{i:06d}"
    assert [shard.samples for shard in catalogue.shards] == [10, 10, 4]
    assert catalogue.skipped == ()


def test_with_and_without_an_index_the_pairs_are_the_same(pairs_dir, finished_dir):
    assert contents_of(read_catalogue(str(pairs_dir))) == contents_of(read_catalogue(str(finished_dir)))


@pytest.mark.parametrize("number", [-1, 24])
def test_there_is_an_end_to_the_pairs(pairs_dir, number):
    with pytest.raises(IndexError, match="there are 24 pairs"):
        read_catalogue(str(pairs_dir)).read(number)


def test_a_pattern_gives_some_of_the_shards(finished_dir):
    catalogue = read_catalogue(f"{finished_dir}/pairs-00000{{2,0}}.tar")
    assert catalogue.shard_sizes.tolist() == [4, 10]
    assert [catalogue.read(i).key for i in (0, 4)] == ["clip_000020", "clip_000000"]
    assert list(catalogue.keys) == [f"clip_{i:06d}" for i in (*range(20, 24), *range(10))]


def test_few_files_stay_open(pairs_dir, monkeypatch):
    monkeypatch.setattr(catalogue_module, "OPEN_FILES", 1)
    monkeypatch.setattr(catalogue_module, "KEPT_TABLES", 2)
    catalogue = read_catalogue(str(pairs_dir))
    before = open_files()
    for i in (0, 10, 20, 1, 11, 21, 2):
        assert catalogue.read(i).key == f"clip_{i:06d}"
        assert open_files() == before + 1
    assert len(catalogue._tables) == 2
    catalogue.close()
    assert open_files() == before
    assert catalogue.read(3).key == "clip_000003"
    catalogue.close()


def test_headers_are_walked_once(finished_dir, monkeypatch):
    monkeypatch.setattr(catalogue_module, "OPEN_FILES", 1)
    walked = []
    walk = shards_module.walk_shard
    monkeypatch.setattr(shards_module, "walk_shard", lambda fd, name: walked.append(name) or walk(fd, name))
    catalogue = read_catalogue(str(finished_dir))
    for i in (0, 10, 1, 11):
        assert catalogue.read(i).key == f"clip_{i:06d}"
    assert len(walked) == 2
    with (finished_dir / "pairs-000000.tar").open("ab") as file:
        file.write(bytes(512))
    before = open_files()
    with pytest.raises(DataError, match=r"pairs-000000\.tar was changed while it was being read"):
        catalogue.read(2)
    assert open_files() == before


def test_shards_stay_readable_by_webdataset(pairs_dir):
    dataset = webdataset.WebDataset(sorted(map(str, pairs_dir.glob("*.tar"))), shardshuffle=False)
    found = {sample["__key__"]: sample for sample in dataset}
    catalogue = read_catalogue(str(pairs_dir))
    assert list(found) == list(catalogue.keys)
    location = catalogue._location(13)
    for suffix, (offset, size) in location.members.items():
        assert found["clip_000013"][suffix] == os.pread(location.descriptor, size, offset)


# -------------------------------------------------------------------------------------------- damage, disagreement


def test_a_key_in_two_shards_is_refused(tmp_path, pairs_dir):
    content = (pairs_dir / "pairs-000000.tar").read_bytes()
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"'clip_000000' is both in .*a\.tar and in .*b\.tar"):
        read_catalogue(str(tmp_path))


def test_a_pair_without_a_member_is_an_error_that_names_it(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], leave_out=["target.jpg"])
    with pytest.raises(DataError, match=r"p\.tar: pair 'a' has no target\.jpg"):
        read_catalogue(str(tmp_path))


def test_another_schema_is_found_before_training(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], schema="msdiffusion.pairs/9")
    with pytest.raises(DataError, match=r"msdiffusion\.pairs/9.*reads 'msdiffusion\.pairs/1'"):
        read_catalogue(str(tmp_path))


def test_schema_of_every_record_is_checked(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    records = [("a", make_record("a", [BOX], (96, 64))), ("b", make_record("b", [BOX], (96, 64), schema="x"))]
    write_shard(tmp_path / "p.tar", records)
    catalogue = read_catalogue(str(tmp_path))
    assert catalogue.read(0).key == "a"
    with pytest.raises(DataError, match="pair 'b' has schema 'x'"):
        catalogue.read(1)


def test_a_missing_shard_is_an_error(finished_dir):
    (finished_dir / "pairs-000001.tar").unlink()
    with pytest.raises(DataError, match=r"pairs-000001\.tar does not exist"):
        read_catalogue(str(finished_dir))


def test_a_shard_with_another_number_of_samples_is_told(finished_dir):
    build = finished_dir / "build.json"
    build.write_text(build.read_text().replace('"samples": 4', '"samples": 5'))
    (finished_dir / "index.parquet").unlink()
    with pytest.raises(DataError, match=r"pairs-000002\.tar holds 4 samples, and build\.json says 5"):
        read_catalogue(str(finished_dir))


def swap_shards(folder):
    """Two shards of one size change places; nothing but their content tells."""
    first, second = (folder / f"pairs-00000{i}.tar" for i in (0, 1))
    content = [path.read_bytes() for path in (first, second)]
    size = max(map(len, content))
    for path, other in ((first, content[1]), (second, content[0])):
        path.write_bytes(other + bytes(size - len(other)))


def test_shards_that_the_index_does_not_describe_are_told(pairs_dir, tmp_path, finisher):
    for path in pairs_dir.glob("*.tar"):  # of one size, so that only the content can tell
        (tmp_path / path.name).write_bytes(path.read_bytes() + bytes(200_000 - path.stat().st_size))
    finisher(tmp_path)
    swap_shards(tmp_path)
    catalogue = read_catalogue(str(tmp_path))
    with pytest.raises(
        DataError, match=r"pairs-000000\.tar holds 'clip_000013' where index\.parquet says 'clip_000003'"
    ):
        catalogue.read(3)


def test_a_file_that_vanished_is_told(finished_dir):
    catalogue = read_catalogue(str(finished_dir))
    (finished_dir / "pairs-000001.tar").unlink()
    assert catalogue.read(0).key == "clip_000000"
    with pytest.raises(DataError, match=r"pairs-000001\.tar cannot be read"):
        catalogue.read(10)


def break_dataset(folder):
    """The second shard loses its end, and the picture header of clip_000003 its first bytes."""
    path = folder / "pairs-000001.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    break_member(folder / "pairs-000000.tar", "clip_000003.json")


def break_member(path, name):
    with tarfile.open(path) as archive:
        member = archive.getmember(name)
    with path.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(b"#" * min(member.size, 64))


@pytest.mark.parametrize("finished", [False, True])
def test_damage_is_left_out_only_if_asked(pairs_dir, finished_dir, finished):
    if not finished:
        (finished_dir / "build.json").unlink()
        (finished_dir / "index.parquet").unlink()
    break_dataset(finished_dir)
    with pytest.raises(DataError, match=r"pairs-000001\.tar (is cut off|has 20000 bytes)"):
        read_catalogue(str(finished_dir))
    with pytest.warns(UserWarning) as told:
        catalogue = read_catalogue(str(finished_dir), skip_damaged=True)
    messages = sorted(str(warning.message) for warning in told)
    assert len(messages) == 2
    assert messages[0].startswith("left out 1 pairs of pairs-000000.tar: ")
    assert "pair 'clip_000003': its json cannot be read" in messages[0]
    lost = "10" if finished else "an unknown number of"
    assert messages[1].startswith(f"left out {lost} pairs of pairs-000001.tar: ")
    assert [(damage.shard, damage.key) for damage in catalogue.skipped] in (
        [("pairs-000000.tar", "clip_000003"), ("pairs-000001.tar", None)],
        [("pairs-000001.tar", None), ("pairs-000000.tar", "clip_000003")],
    )
    left = [i for i in (*range(10), *range(20, 24)) if i != 3]
    assert list(catalogue.keys) == [f"clip_{i:06d}" for i in left]
    assert catalogue.shard_sizes.tolist() == [9, 4]
    assert [content[0] for content in contents_of(catalogue)] == list(catalogue.keys)
    assert len(catalogue.sizes) == 13


def test_nothing_is_said_where_nothing_is_damaged(finished_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_catalogue(str(finished_dir), skip_damaged=True)) == 24


def test_a_dataset_with_nothing_left_is_refused(tmp_path):
    (tmp_path / "p.tar").write_bytes(b"no tar")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match=r"no shard of .* can be used"):
        read_catalogue(str(tmp_path), skip_damaged=True)


def test_shards_without_a_usable_pair_are_refused(tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "p.tar", [("a", make_record("a", [BOX], (96, 64)))], leave_out=["json"])
    with pytest.warns(UserWarning, match="left out 1"), pytest.raises(DataError, match=r"no pair of .* can be used"):
        read_catalogue(str(tmp_path), skip_damaged=True)


# ------------------------------------------------------------------------------------------------------------ remote


def test_without_a_cache_the_users_own_is_taken(finished_dir, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    server = serve(finished_dir)
    assert read_catalogue(server.url).read(23).key == "clip_000023"
    assert verify(server.url).pairs == 24
    assert server.gets("pairs-000002.tar") == 1
    assert len(list((tmp_path / "own" / "msdiffusion" / "shards").glob("*.tar"))) == 3


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("pattern", ["", "/pairs-{000000..000002}.tar"])
def test_over_http_the_pairs_are_the_same(finished_dir, serve, cache, finished, pattern):
    expected = contents_of(read_catalogue(str(finished_dir)))
    if not finished:
        (finished_dir / "build.json").unlink()
        (finished_dir / "index.parquet").unlink()
    server = serve(finished_dir)
    catalogue = read_catalogue(server.url + pattern, cache=cache)
    assert [server.gets(f"pairs-00000{i}.tar") for i in range(3)] == [0 if finished else 1] * 3
    assert contents_of(catalogue) == expected
    assert catalogue.sizes.tolist() == [[96, 64]] * 24
    assert [server.gets(f"pairs-00000{i}.tar") for i in range(3)] == [1] * 3


@pytest.mark.parametrize("finished", [False, True])
def test_what_changed_on_the_server_is_read_anew(finished_dir, serve, cache, finisher, finished):
    if not finished:
        (finished_dir / "build.json").unlink()
        (finished_dir / "index.parquet").unlink()
    server = serve(finished_dir)
    before = read_catalogue(server.url, cache=cache)
    assert before.record(0)["caption"] == "a dog on the beach" and before.keys[0] == "clip_000000"
    sizes = {path.name: path.stat().st_size for path in finished_dir.glob("*.tar")}
    for path in finished_dir.glob("*.tar"):  # other keys and words, the same sizes
        content = path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(path, "w") as new:
            for member in old:
                text = old.extractfile(member).read().replace(b"on the beach", b"in the city!")
                member.name = member.name.replace("clip_", "film_")
                new.addfile(member, io.BytesIO(text.replace(b"clip_", b"film_")))
        assert path.stat().st_size == sizes[path.name]
    if finished:
        finisher(finished_dir)
    for path in finished_dir.iterdir():
        os.utime(path, (2e9, 2e9))
    after = read_catalogue(server.url, cache=ShardCache(cache.folder))
    assert after.record(0)["caption"] == "a dog in the city!" and after.keys[0] == "film_000000"


def test_prefetch_fetches_in_the_order_of_need(finished_dir, serve, cache):
    server = serve(finished_dir)
    catalogue = read_catalogue(server.url, cache=cache)
    catalogue.prefetch(np.array([21, 3, 22, 4]))
    cache.wait()
    fetched = [name for method, name in server.requests if method == "GET" and name.endswith(".tar")]
    assert fetched == ["pairs-000002.tar", "pairs-000000.tar"]
    catalogue.prefetch([])
    read_catalogue(str(finished_dir)).prefetch([0])  # local shards need none


def test_a_small_cache_gives_the_same_pairs(finished_dir, serve, tmp_path):
    largest = max(path.stat().st_size for path in finished_dir.glob("*.tar"))
    small = ShardCache(tmp_path / "cache", max_bytes=largest + 50_000)
    catalogue = read_catalogue(serve(finished_dir).url, cache=small)
    for i in np.random.default_rng(0).permutation(24):
        assert catalogue.read(i).key == f"clip_{i:06d}"
    assert sum(p.stat().st_size for p in small.folder.iterdir()) <= largest + 50_000


def test_what_is_read_stays_in_the_cache(finished_dir, serve, cache, monkeypatch):
    monkeypatch.setattr("msdiffusion.training.pairs.shards.STAY_SECONDS", -1.0)
    catalogue = read_catalogue(serve(finished_dir).url, cache=cache)
    catalogue.read(0)
    path = cache.path_of(catalogue.shards[0].file)
    os.utime(path, (1, 1))
    catalogue.read(1)
    assert path.stat().st_mtime > 1


def test_a_remote_shard_that_differs_from_build_json_is_told_when_it_comes(finished_dir, serve, cache):
    break_member(finished_dir / "pairs-000001.tar", "clip_000012.target.jpg")
    catalogue = read_catalogue(serve(finished_dir).url, cache=cache)
    assert catalogue.read(0).key == "clip_000000"
    with pytest.raises(DataError, match=r"pairs-000001\.tar could not be read.*its sha256 is .* build\.json says"):
        catalogue.read(12)


def test_remote_damage_is_left_out_if_asked(finished_dir, serve, cache):
    break_member(finished_dir / "pairs-000001.tar", "clip_000012.target.jpg")
    with pytest.warns(UserWarning, match=r"left out 10 pairs of pairs-000001\.tar: .*sha256"):
        catalogue = read_catalogue(serve(finished_dir).url, cache=cache, skip_damaged=True)
    assert len(contents_of(catalogue)) == 14


class Keys:
    """What a loading process is given: a catalogue and numbers."""

    def __init__(self, catalogue):
        self.catalogue = catalogue

    def __len__(self):
        return len(self.catalogue)

    def __getitem__(self, i):
        return repr(content_of(self.catalogue.read(i)))  # a loader turns tuples into lists, text it leaves alone


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loading_processes_read_remote_shards(finished_dir, serve, cache, start):
    expected = contents_of(read_catalogue(str(finished_dir)))
    server = serve(finished_dir)
    catalogue = read_catalogue(server.url, cache=cache)
    catalogue.read(0)  # an open file before the fork
    context = multiprocessing.get_context(start)
    loader = DataLoader(Keys(catalogue), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert list(loader) == list(map(repr, expected))
    assert [server.gets(f"pairs-00000{i}.tar") for i in range(3)] == [1] * 3


def test_a_catalogue_that_was_sent_reads_the_same(finished_dir):
    catalogue = read_catalogue(str(finished_dir))
    catalogue.read(0)
    assert contents_of(pickle.loads(pickle.dumps(catalogue))) == contents_of(catalogue)


# ------------------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(("limit", "share"), [(100, 0.5), (2, 0.5), (1, 0.0)])
def test_share_of_pairs_from_a_single_frame(tmp_path, shard_writer, limit, share):
    write_shard, make_record = shard_writer
    records = [make_record(str(i), [BOX], (96, 64), source={"single_frame": i >= 5}) for i in range(10)]
    write_shard(tmp_path / "p.tar", [(str(i), record) for i, record in enumerate(records)])
    assert read_catalogue(str(tmp_path)).single_frame(limit) == share


def test_the_share_needs_a_record(pairs_dir):
    with pytest.raises(RequestError, match="limit must be at least 1"):
        read_catalogue(str(pairs_dir)).single_frame(0)


def test_mined_pairs_are_not_from_a_single_frame(pairs_dir, finished_dir, serve, cache):
    assert read_catalogue(str(pairs_dir)).single_frame() == 0.0
    server = serve(finished_dir)
    assert read_catalogue(server.url, cache=cache).single_frame() == 0.0
    assert server.gets("pairs-000001.tar") == 0


def test_split_depends_on_the_key_alone():
    keys = [f"clip_{i}" for i in range(1000)]
    training, validation = split_by_key(catalogue_of(keys), 0.1)
    assert (training.dtype, validation.dtype) == (np.int64, np.int64)
    assert sorted([*training, *validation]) == list(range(1000))
    assert 60 < len(validation) < 140
    held_out = {keys[i] for i in validation}
    more = [*reversed(keys), *(f"new_{i}" for i in range(500))]
    _, later = split_by_key(catalogue_of(more), 0.1)
    assert {more[i] for i in later if more[i] in keys} == held_out


def test_the_split_is_the_one_it_always_was():
    """A change would mix what older adapters have seen with what they are validated on."""
    _, validation = split_by_key(catalogue_of([f"clip_{i:06d}" for i in range(100)]), 0.05)
    assert validation.tolist() == [10, 28, 54, 74, 87]


def test_a_pair_and_its_swap_are_on_one_side():
    keys = [f"clip_{i}" for i in range(200)]
    keys += [f"{key}-swapped" for key in keys]
    for side in split_by_key(catalogue_of(keys), 0.3):
        plain = {int(i) for i in side if i < 200}
        assert {int(i) - 200 for i in side if i >= 200} == plain
        assert plain


def test_small_dataset_still_has_a_validation_pair():
    training, validation = split_by_key(catalogue_of("abc"), 0.001)
    assert (len(training), len(validation)) == (2, 1)


def test_no_fraction_no_validation():
    training, validation = split_by_key(catalogue_of("a"), 0.0)
    assert (training.tolist(), validation.tolist()) == ([0], [])


def test_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="leave none to train on"):
        split_by_key(catalogue_of("a"), 0.5)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_finds_nothing_where_nothing_is_wrong(finished_dir, capsys):
    assert main([str(finished_dir), "--deep"]) == 0
    assert capsys.readouterr().out == "24 pairs in 3 shards, 0 damages\n"


def test_the_command_lists_damage_and_keeps_the_list(finished_dir, capsys):
    break_member(finished_dir / "pairs-000000.tar", "clip_000003.reference_0.png")
    assert main([str(finished_dir)]) == 0  # pictures are looked at only in depth
    (finished_dir / "build.json").unlink()
    (finished_dir / "index.parquet").unlink()
    capsys.readouterr()
    assert main([str(finished_dir), "--deep", "--write"]) == 1
    out = capsys.readouterr().out
    assert "reference_0.png of pair 'clip_000003' cannot be decoded" in out
    assert "23 pairs in 3 shards, 1 damages" in out
    assert str(finished_dir / "damaged.json") in out
    with pytest.warns(UserWarning, match=r"left out 1 pairs of pairs-000000\.tar"):
        catalogue = read_catalogue(str(finished_dir), skip_damaged=True)
    assert "clip_000003" not in list(catalogue.keys)
    assert len(contents_of(catalogue)) == 23


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "no pairs dataset" in capsys.readouterr().err
