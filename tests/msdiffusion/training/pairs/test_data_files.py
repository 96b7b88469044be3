import errno
import http.server
import os
import subprocess
import sys

import fsspec
import pytest

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.pairs.data_files import (
    DataFile,
    attempt,
    described,
    filesystem,
    is_remote,
    joined,
    listed,
    local_path,
    parent_of,
    read_bytes,
)


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been slept."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("/data/pairs", "/data/pairs/a.tar"),
        ("file:///data/pairs", "/data/pairs/a.tar"),
        ("https://x.y/pairs/", "https://x.y/pairs/a.tar"),
        ("https://x.y/pairs?token=a/b#c", "https://x.y/pairs/a.tar?token=a/b#c"),
        ("s3://bucket", "s3://bucket/a.tar"),
    ],
)
def test_places_are_put_together_and_taken_apart(folder, place):
    assert joined(folder, "a.tar") == place
    assert DataFile(place).name == "a.tar"
    assert parent_of(place) == local_path(folder).replace("/?", "?").removesuffix("/")
    assert is_remote(place) == DataFile(place).is_remote == place.startswith(("https", "s3"))


def test_an_action_is_tried_again_with_longer_waits(waits):
    failures = [OSError("first"), TimeoutError("second")]

    def action():
        if failures:
            raise failures.pop(0)
        return "done"

    assert attempt("it", action, attempts=3, first_wait=0.5) == "done"
    assert waits == [0.5, 1.0]


def test_waits_have_a_limit_and_attempts_an_end(waits):
    def action():
        raise OSError("still tired")

    with pytest.raises(DataError, match=r"it could not be read in 9 attempts; the last one: OSError: still tired"):
        attempt("it", action, attempts=9, first_wait=1.0)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), RequestError("nonsense")])
def test_what_another_attempt_cannot_help_is_told_at_once(waits, error):
    def action():
        raise error

    with pytest.raises(type(error)):
        attempt("it", action)
    assert waits == []


def test_a_full_disk_is_told_at_once(waits):
    def action():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="it does not fit on the disk"):
        attempt("it", action)
    assert waits == []


def test_attempts_must_be_some():
    with pytest.raises(RequestError, match="attempts must be at least 1"):
        attempt("it", lambda: 1, attempts=0)


def test_local_and_remote_files_read_the_same(tmp_path, serve):
    (tmp_path / "a.json").write_bytes(b"content")
    server = serve(tmp_path)
    for place in (str(tmp_path / "a.json"), f"file://{tmp_path}/a.json", f"{server.url}/a.json"):
        assert read_bytes(place, 7) == b"content"
        with pytest.raises(DataError, match="more than the 6 bytes"):
            read_bytes(place, 6)
        assert described(place).bytes == 7
    for place in (str(tmp_path / "b.json"), f"{server.url}/b.json", "memory://b.json"):
        with pytest.raises(FileNotFoundError):
            read_bytes(place, 7)
        with pytest.raises(FileNotFoundError):
            described(place)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(str(tmp_path), 9)


def test_a_tired_server_is_not_taken_for_one_without_the_file(tmp_path, serve, waits):
    (tmp_path / "a.json").write_bytes(b"content")
    server = serve(tmp_path)
    server.headless = True  # answers HEAD with an error, and GET twice too
    server.failures["a.json"] = 3
    assert described(f"{server.url}/a.json").bytes == 7
    assert len(waits) >= 1


def test_only_shards_are_listed(tmp_path, serve):
    for name in ("b.tar", "a.tar", "c.json"):
        (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "d.tar").mkdir()
    assert [(file.name, file.bytes) for file in listed(str(tmp_path))] == [("a.tar", 4), ("b.tar", 4)]
    assert [file.name for file in listed(serve(tmp_path).url)] == ["a.tar", "b.tar"]
    with pytest.raises(DataError, match="cannot be read"):
        listed(str(tmp_path / "a.tar"))
    for folder in (str(tmp_path / "none"), "memory://none"):
        with pytest.raises(FileNotFoundError):
            listed(folder)


def test_the_stamp_changes_with_the_content():
    system = fsspec.filesystem("memory")
    system.pipe_file("/stamped", b"one")
    first = described("memory://stamped")
    system.pipe_file("/stamped", b"two")
    second = described("memory://stamped")
    assert first.bytes == second.bytes
    assert first.stamp != second.stamp


@pytest.fixture
def without_headers(monkeypatch):
    """Function: names of headers that no server here sends from now on."""

    def leave_out(*names):
        usual = http.server.SimpleHTTPRequestHandler.send_header

        def send(self, name, value):
            if name not in names:
                usual(self, name, value)

        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "send_header", send)

    return leave_out


@pytest.mark.parametrize("fsspec_tells", [True, False])
@pytest.mark.parametrize("headless", [True, False])
def test_the_stamp_of_a_web_server_is_its_time_of_change(tmp_path, serve, monkeypatch, fsspec_tells, headless, waits):
    if not fsspec_tells:  # as older ones
        from fsspec.implementations import http as implementation

        usual = implementation._file_info

        async def info_of(*arguments, **options):
            return {k: v for k, v in (await usual(*arguments, **options)).items() if k != "Last-Modified"}

        monkeypatch.setattr(implementation, "_file_info", info_of)
    path = tmp_path / "a.tar"
    path.write_bytes(b"one")
    os.utime(path, (1e9, 1e9))
    server = serve(tmp_path)
    server.headless = headless
    first, again = described(f"{server.url}/a.tar"), described(f"{server.url}/a.tar")
    path.write_bytes(b"two")
    os.utime(path, (2e9, 2e9))
    second = described(f"{server.url}/a.tar")
    assert first == again != second
    assert (first.bytes, first.stamp, second.stamp[:16]) == (3, "Sun, 09 Sep 2001 01:46:40 GMT", "Wed, 18 May 2033")


def test_where_a_server_says_nothing_of_the_content_the_stamp_is_of_the_run(tmp_path, serve, without_headers):
    (tmp_path / "a.tar").write_bytes(b"one")
    without_headers("Last-Modified")
    place = f"{serve(tmp_path).url}/a.tar"
    mine = described(place)
    assert mine == described(place)
    program = f"from msdiffusion.training.pairs.data_files import described; print(described({place!r}).stamp)"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert mine.stamp.startswith("run ") and other.startswith("run ") and mine.stamp != other


def test_downloads_may_take_longer_than_five_minutes():
    system, _ = filesystem("http://127.0.0.1:1/a.tar")
    assert system.client_kwargs["timeout"].total is None
    assert system.client_kwargs["timeout"].sock_read > 0
