import hashlib
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import fsspec
import pytest

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.pairs.data_files import DataFile
from msdiffusion.training.pairs.remote import ShardCache, default_cache_folder


@pytest.fixture
def folder(tmp_path):
    """Five files of 100 kB to serve."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.tar").write_bytes(os.urandom(100_000))
    return folder


def file_of(server, folder, name, **changes):
    content = (folder / name).read_bytes()
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} | changes
    return DataFile(f"{server.url}/{name}", **known)


def read(cache, file):
    with cache.open(file) as opened:
        return opened.read()


def kept(cache):
    """Names of the files that the cache shows, as they were served."""
    return sorted(p.name.split("-", 1)[1] for p in cache.folder.iterdir() if not p.name.startswith("."))


def parts(cache):
    return [path for path in cache.folder.iterdir() if path.name.endswith(".part")]


def test_a_file_is_fetched_once(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache")
    file = file_of(server, folder, "1.tar")
    assert not cache.has(file)
    for _ in range(3):
        assert read(cache, file) == (folder / "1.tar").read_bytes()
    assert cache.has(file)
    assert server.gets("1.tar") == 1
    assert parts(cache) == []


def test_other_content_at_the_same_place_is_another_file(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache")
    read(cache, file_of(server, folder, "1.tar"))
    (folder / "1.tar").write_bytes(b"new" * 1000)
    assert read(cache, file_of(server, folder, "1.tar")) == b"new" * 1000
    stamps = [cache.path_of(DataFile("http://x/1.tar", 5, stamp=stamp)) for stamp in ("monday", "tuesday")]
    assert stamps[0] != stamps[1]


def test_a_server_that_fails_twice_then_answers(folder, serve, tmp_path):
    server = serve(folder)
    server.failures["2.tar"] = 2
    cache = ShardCache(tmp_path / "cache", first_wait=0.01)
    assert read(cache, file_of(server, folder, "2.tar")) == (folder / "2.tar").read_bytes()
    assert server.gets("2.tar") == 3


def test_a_server_that_fails_for_good_is_told(folder, serve, tmp_path):
    server = serve(folder)
    server.failures["2.tar"] = 99
    cache = ShardCache(tmp_path / "cache", attempts=3, first_wait=0.01)
    with pytest.raises(DataError, match=r"2\.tar could not be read in 3 attempts; the last one: .*503"):
        cache.open(file_of(server, folder, "2.tar"))
    assert server.gets("2.tar") == 3
    assert (kept(cache), parts(cache)) == ([], [])


def test_a_file_that_is_not_there_is_told_at_once(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(DataError, match=r"9\.tar does not exist: the dataset names it"):
        cache.open(DataFile(f"{server.url}/9.tar", 5))
    assert server.gets("9.tar") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sha256": "0" * 64}, r"its sha256 is .*build\.json says 000000000000"),
     ({"bytes": 99_999}, "100000 bytes came, and there should be 99999")],
)  # fmt: skip
def test_a_file_that_differs_from_build_json_is_refused(folder, serve, tmp_path, changes, message):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", attempts=2, first_wait=0.01)
    with pytest.raises(DataError, match=rf"0\.tar could not be read in 2 attempts.*{message}"):
        cache.open(file_of(server, folder, "0.tar", **changes))
    assert (kept(cache), parts(cache)) == ([], [])


def test_the_longest_unused_go_first(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", max_bytes=300_000)
    files = [file_of(server, folder, f"{number}.tar") for number in range(5)]
    for number in (0, 1, 2, 0):
        read(cache, files[number])
    assert kept(cache) == ["0.tar", "1.tar", "2.tar"]
    read(cache, files[3])
    assert kept(cache) == ["0.tar", "2.tar", "3.tar"]
    read(cache, files[4])
    assert kept(cache) == ["0.tar", "3.tar", "4.tar"]
    read(cache, files[1])
    assert server.gets("1.tar") == 2


def test_the_bound_holds_where_sizes_are_unknown_too(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", max_bytes=250_000)
    for number in range(5):
        read(cache, DataFile(f"{server.url}/{number}.tar"))
    assert kept(cache) == ["3.tar", "4.tar"]


def test_what_vanishes_while_room_is_made_does_no_harm(folder, serve, tmp_path):
    cache = ShardCache(tmp_path / "cache", max_bytes=150_000)
    cache.folder.mkdir()
    (cache.folder / "gone.tar").symlink_to("nowhere")
    server = serve(folder)
    for name in ("0.tar", "1.tar"):
        assert read(cache, file_of(server, folder, name)) == (folder / name).read_bytes()
    assert not cache.has(file_of(server, folder, "0.tar"))


def test_what_is_removed_can_be_read_to_its_end(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", max_bytes=150_000)
    with cache.open(file_of(server, folder, "0.tar")) as opened:
        read(cache, file_of(server, folder, "1.tar"))
        assert kept(cache) == ["1.tar"]
        assert opened.read() == (folder / "0.tar").read_bytes()


def test_a_file_larger_than_the_cache_is_refused(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", max_bytes=99_999)
    with pytest.raises(DataError, match=r"0\.tar has 100,000 bytes, more than the whole cache .*allow the cache more"):
        cache.open(file_of(server, folder, "0.tar"))
    assert server.requests == []


def test_a_folder_that_cannot_be_written_is_told(folder, serve, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/cache cannot be used as a cache: .*choose another folder"):
        ShardCache(tmp_path / "file" / "cache").open(file_of(serve(folder), folder, "0.tar"))


def test_a_copy_of_another_size_is_fetched_again(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache")
    file = file_of(server, folder, "0.tar")
    read(cache, file)
    os.truncate(cache.path_of(file), 10)
    assert not cache.has(file)
    assert read(cache, file) == (folder / "0.tar").read_bytes()


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"attempts": 0}, {"first_wait": -1}])
def test_numbers_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(RequestError, match="a cache needs"):
        ShardCache(tmp_path, **wrong)


def test_the_usual_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().folder == default_cache_folder() == tmp_path / "msdiffusion" / "shards"


# ------------------------------------------------------------------------------------------------- in the background


def test_files_are_fetched_ahead(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache")
    files = [file_of(server, folder, f"{number}.tar") for number in (3, 1, 4)]
    cache.prefetch(files)
    cache.prefetch(files[1:])  # what waits already is not asked for twice
    cache.wait()
    assert kept(cache) == ["1.tar", "3.tar", "4.tar"]
    assert [name for method, name in server.requests if method == "GET"] == ["3.tar", "1.tar", "4.tar"]
    cache.prefetch(files)
    cache.wait()
    assert sum(method == "GET" for method, _ in server.requests) == 3


def test_no_more_is_fetched_ahead_than_half_of_the_cache(folder, serve, tmp_path):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", max_bytes=400_000)
    cache.prefetch([file_of(server, folder, f"{number}.tar") for number in range(5)])
    cache.wait()
    assert kept(cache) == ["0.tar", "1.tar"]


def test_a_failure_ahead_is_told_when_the_file_is_opened(folder, serve, tmp_path, caplog):
    server = serve(folder)
    cache = ShardCache(tmp_path / "cache", attempts=1)
    bad = file_of(server, folder, "0.tar", sha256="0" * 64)
    cache.prefetch([bad, file_of(server, folder, "1.tar")])
    cache.wait()
    assert kept(cache) == ["1.tar"]
    assert "not fetched ahead" in caplog.text
    with pytest.raises(DataError, match="its sha256 is"):
        cache.open(bad)


def test_a_reader_waits_for_what_is_being_fetched_ahead(folder, serve, tmp_path):
    server = serve(folder)
    server.slow = 0.01
    cache = ShardCache(tmp_path / "cache")
    file = file_of(server, folder, "0.tar")
    cache.prefetch([file])
    assert read(cache, file) == (folder / "0.tar").read_bytes()
    cache.wait()
    assert server.gets("0.tar") == 1


# ------------------------------------------------------------------------------------------------- several processes


def read_all(cache, files):
    return [hashlib.sha256(read(cache, file)).hexdigest() for file in files]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_fetch_each_file_once(folder, serve, tmp_path, start):
    server = serve(folder)
    server.slow = 0.002
    cache = ShardCache(tmp_path / "cache")
    files = [file_of(server, folder, f"{number}.tar") for number in range(5)]
    cache.prefetch(files[:1])
    cache.wait()  # so that a forked process inherits a file system and a thread that has run
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(start)) as pool:
        first = pool.submit(read_all, cache, files)
        second = pool.submit(read_all, cache, files[::-1])
        assert first.result() == second.result()[::-1] == [file.sha256 for file in files]
    assert [server.gets(f"{number}.tar") for number in range(5)] == [1] * 5
    assert kept(cache) == [f"{number}.tar" for number in range(5)]


def fetch_ahead_in_a_child(cache, files):
    cache.prefetch(files)
    cache.wait()


def test_a_forked_process_fetches_ahead_by_itself(folder, serve, tmp_path):
    server = serve(folder)
    server.slow = 0.005
    cache = ShardCache(tmp_path / "cache")
    files = [file_of(server, folder, f"{number}.tar") for number in range(3)]
    cache.prefetch(files)  # the fork happens while the parent's thread is at work
    child = multiprocessing.get_context("fork").Process(target=fetch_ahead_in_a_child, args=(cache, files[2:]))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert cache.has(files[2])
    cache.wait()
    assert [server.gets(f"{number}.tar") for number in range(3)] == [1, 1, 1]


def test_a_process_forked_under_a_lock_does_not_keep_it(tmp_path):
    cache = ShardCache(tmp_path)
    context = multiprocessing.get_context("fork")
    end = context.Event()
    with cache._locked(tmp_path / "0.tar"):
        child = context.Process(target=end.wait, args=(60,))
        child.start()
        with cache._locked(tmp_path / "0.tar", wait=False) as free:
            assert not free
    with cache._locked(tmp_path / "0.tar", wait=False) as free:
        assert child.is_alive()
        assert free
    end.set()
    child.join()


def test_a_killed_process_leaves_a_partial_file_that_the_next_one_removes(folder, serve, tmp_path):
    server = serve(folder)
    server.slow = 0.05
    cache = ShardCache(tmp_path / "cache")
    first, other = (file_of(server, folder, name) for name in ("0.tar", "1.tar"))
    child = multiprocessing.get_context("fork").Process(target=read_all, args=(cache, [first]))
    child.start()
    until = time.monotonic() + 60
    while not (cache.folder.exists() and parts(cache)) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(parts(cache)) == 1
    assert kept(cache) == []
    server.slow = 0.0
    read(cache, other)  # any process that makes room removes it
    assert parts(cache) == []
    assert read(cache, first) == (folder / "0.tar").read_bytes()


def test_a_partial_file_that_is_being_written_stays(folder, serve, tmp_path):
    server = serve(folder)
    server.slow = 0.02
    cache = ShardCache(tmp_path / "cache")
    child = multiprocessing.get_context("fork").Process(
        target=read_all, args=(cache, [file_of(server, folder, "0.tar")])
    )
    child.start()
    until = time.monotonic() + 60
    while not (cache.folder.exists() and parts(cache)) and time.monotonic() < until:
        time.sleep(0.01)
    read(cache, file_of(server, folder, "1.tar"))
    child.join(60)
    assert child.exitcode == 0
    assert kept(cache) == ["0.tar", "1.tar"]
    assert server.gets("0.tar") == 1


def test_a_cache_can_be_sent_to_another_process(tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe_file("/sent.tar", b"sent")
    cache = ShardCache(tmp_path / "cache", max_bytes=1000)
    cache.prefetch([DataFile("memory://sent.tar", 4)])
    cache.wait()
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.max_bytes) == (cache.folder, 1000)
    assert read(copy, DataFile("memory://sent.tar", 4)) == b"sent"
