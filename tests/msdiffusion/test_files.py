import argparse
import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from msdiffusion import cli
from msdiffusion.commands import evaluate
from msdiffusion.errors import RequestError
from msdiffusion.files import check_file, check_folder, place_of, share, write_weights, written


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    assert check_folder(tmp_path / "a" / "b", "--out") == tmp_path / "a" / "b"
    assert check_folder(str(tmp_path), "--out") == tmp_path
    assert check_file(tmp_path / "a" / "b.png", "--out") == tmp_path / "a" / "b.png"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("file", "--out must be a folder, but '.*file' is a file: give another place"),
        ("file/a/b", "--out must be a folder, but '.*file' is a file"),
        ("nowhere", "--out must be a folder, but '.*nowhere' is no folder"),
        ("a\0b", "--out must be the path of a place to write to"),
        ("x" * 300, "cannot be written: File name too long"),
        ("a/" + "x" * 300, "cannot be written: File name too long"),
    ],
)
def test_places_that_are_none(place, told, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(RequestError, match=told):
        check_folder(tmp_path / place, "--out")


@pytest.mark.parametrize(("number", "told"), [(errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file")])
def test_what_the_system_refuses(number, told, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(RequestError, match=f"--out '.*' cannot be written: {told}"):
        check_folder(tmp_path / "a", "--out")
    with pytest.raises(RequestError, match=f"--out '.*' cannot be written: {told}"):
        check_file(tmp_path / "a.png", "--out")


def test_an_empty_path_is_no_place():
    assert place_of("a/b") == Path("a/b")
    with pytest.raises(argparse.ArgumentTypeError, match="'' is no path: was a variable of the shell empty"):
        place_of("")


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with written(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    with (
        pytest.raises(RequestError, match="a.txt' cannot be written: No space left on device"),
        written(path) as partial,
    ):
        partial.write_text("ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), written(path) as partial:
        partial.write_text("ha")
        raise ZeroDivisionError
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(picture, place, *_, **__):
    Path(place).write_bytes(b"half")
    full()


def test_a_full_disk_leaves_nothing_of_a_picture(tmp_path, monkeypatch):
    from msdiffusion.request.provenance import save_png

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(RequestError, match="x.png' cannot be written: No space left on device"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_of_weights(tmp_path, monkeypatch):
    from msdiffusion.adapter.official import write_record

    def save(weights, place, **_):
        Path(place).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", save)
    with pytest.raises(RequestError, match="a.safetensors' cannot be written: .*No space left on device"):
        write_weights({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(torch, "save", lambda record, place: half(record, place))
    with pytest.raises(RequestError, match="a.bin' cannot be written: No space left on device"):
        write_record({"a": torch.ones(2)}, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_what_a_system_refuses_of_any_command_is_one_sentence(tmp_path, monkeypatch, capsys):
    def run(error):
        def fail(_):
            raise error

        monkeypatch.setattr(evaluate, "run", fail)
        return cli.main(["evaluate", "--out", str(tmp_path)])

    assert run(OSError(errno.ENOSPC, "No space left on device", "/a/b")) == 2
    assert capsys.readouterr().err == "msdiffusion: error: '/a/b' cannot be written or read: No space left on device\n"
    assert run(PermissionError(errno.EACCES, "Permission denied")) == 2
    assert "a file cannot be written or read: Permission denied" in capsys.readouterr().err
    with pytest.raises(ConnectionError):
        run(ConnectionResetError(errno.ECONNRESET, "Connection reset"))
    monkeypatch.setenv("MSD_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space"):
        run(OSError(errno.ENOSPC, "No space left on device"))


def test_a_full_disk_leaves_nothing_of_a_base_model(new_model, tmp_path, monkeypatch):
    model = new_model()

    def save(place, **_):
        Path(place).mkdir()
        (place / "half").write_bytes(b"half")
        full()

    monkeypatch.setattr(model.pipeline, "save_pretrained", save)
    with pytest.raises(RequestError, match="cannot be written: .*No space left on device"):
        model.save_pretrained(tmp_path, include_backbone=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_weights({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
        (tmp_path / "a.safetensors").chmod(0o400)
        share(tmp_path)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
        write_weights({"weight": torch.ones(2)}, tmp_path / "a.safetensors", {"schema": "x"})
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_behind_links_keep_their_mode(tmp_path):
    theirs = tmp_path / "theirs.safetensors"
    theirs.touch(0o600)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "link.safetensors").symlink_to(theirs)
    share(tmp_path / "ours")
    assert theirs.stat().st_mode & 0o777 == 0o600


def test_who_has_a_file_open_keeps_it(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights({"weight": torch.ones(1000)}, path)
    mapped = load_file(path)
    write_weights({"weight": torch.zeros(3)}, path)
    assert mapped["weight"].sum() == 1000
    assert load_file(path)["weight"].shape == (3,)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights({"weight": torch.ones(2)}, path)
    shared = torch.ones(2)
    with pytest.raises(RuntimeError):
        write_weights({"one": shared, "two": shared}, path)
    assert load_file(path).keys() == {"weight"}
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
