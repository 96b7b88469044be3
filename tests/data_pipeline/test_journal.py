import errno
import io
import json
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, OutputError
from data_pipeline.journal import Journal, atomic_file, write_atomically
from data_pipeline.records import VideoFile

SETTINGS = {"filter_pairs": {"min_area": 0.01, "words": ("a",)}, "cut_shots": {"max_frames": 10}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"12345")
    return VideoFile(name="clip.mp4", key="clip", path=path, caption="a dog")


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start(SETTINGS)
    return journal


def test_the_same_settings_go_on(journal):
    journal.start(SETTINGS)


def test_other_settings_are_named(journal):
    changed = {"filter_pairs": {"min_area": 0.05, "words": ("a",)}, "cut_shots": {"max_frames": 10}}
    with pytest.raises(InputError, match=r"filter_pairs.min_area: 0.01 then, 0.05 now") as error:
        journal.start(changed)
    assert "max_frames" not in str(error.value)


def test_a_setting_that_did_not_exist_is_named(journal):
    with pytest.raises(InputError, match=r"cut_shots.thumbnail: 'absent' then, 8 now"):
        journal.start({**SETTINGS, "cut_shots": {"max_frames": 10, "thumbnail": 8}})


def test_other_settings_on_a_complete_dataset_are_named(journal):
    content = {"settings": {"a": {"b": 1}}, "files": {}, "version": "1"}
    write_atomically(journal.out / "build.json", json.dumps(content).encode())
    journal.close()
    with pytest.raises(InputError, match=r"a.b: 1 then, 2 now"):
        journal.start({"a": {"b": 2}}, version="1")


def test_another_version_says_so_before_it_speaks_of_its_other_settings(journal):
    with pytest.raises(InputError, match=r"was started by version  of the pipeline, this is 2: finish it with that"):
        journal.start({**SETTINGS, "new_step": {"a": 1}}, version="2")
    content = {"settings": {"a": {"b": 1}}, "files": {}, "version": "1"}
    write_atomically(journal.out / "build.json", json.dumps(content).encode())
    journal.close()
    with pytest.raises(InputError, match=r"was made by version 1 of the pipeline, this is 2: use it as it is, or choo"):
        journal.start({"a": {"b": 1}, "new_step": {"a": 1}}, version="2")


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and no earlier run"):
        Journal(tmp_path).start(SETTINGS)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="needs a folder"):
        Journal(tmp_path / "out").start(SETTINGS)


def test_a_committed_clip_is_finished(journal, file):
    assert journal.read(file) is None
    journal.commit(file, {"kept": True}, blocks=b"blocks", preview=b"picture")
    assert journal.read(file)["kept"]
    assert journal.blocks("clip") == b"blocks"
    assert journal.preview("clip") == b"picture"
    assert not list(journal.folder.rglob("*.tmp"))


@pytest.mark.parametrize("change", ["bytes", "caption", "sidecar"])
def test_a_clip_that_changed_is_not_finished(journal, file, change):
    journal.commit(file, {"kept": False})
    if change == "bytes":
        file.path.write_bytes(b"123456")
    elif change == "sidecar":
        file.path.with_name("clip.annotations.json").write_text("{}")
    else:
        file = VideoFile(name=file.name, key=file.key, path=file.path, caption="a cat")
    assert journal.read(file) is None
    with pytest.raises(InputError, match=r"clip.mp4 changed while the dataset was being written"):
        list(journal.markers([file]))


def test_a_torn_marker_is_not_finished(journal, file):
    journal.commit(file, {"kept": False})
    [marker] = journal.folder.rglob("clip.json")
    marker.write_text('{"kept": tr')
    assert journal.read(file) is None


def test_no_preview_is_none(journal):
    assert journal.preview("clip") is None


def test_a_marker_whose_samples_are_not_all_there_does_not_count(tmp_path, file):
    journal = Journal(tmp_path / "out")
    journal.start({})
    journal.commit(file, {"kept": True, "samples": []}, blocks=b"abc")
    assert journal.read(file)["kept"]
    next(journal.folder.rglob("*.tar")).write_bytes(b"ab")  # the power went
    assert journal.read(file) is None
    next(journal.folder.rglob("*.tar")).unlink()
    assert journal.read(file) is None


def test_a_clip_mined_again_leaves_nothing_of_its_first_time(tmp_path, file):
    journal = Journal(tmp_path / "out")
    journal.start({})
    journal.commit(file, {"kept": False, "reason": "r"}, preview=b"old")
    journal.commit(file, {"kept": False, "reason": "r"})
    assert journal.preview(file.key) is None
    journal.commit(file, {"kept": True, "samples": []}, blocks=b"abc")
    journal.commit(file, {"kept": False, "reason": "r"})
    with pytest.raises(InputError, match=r"cannot read .*clip.tar"):
        journal.blocks(file.key)


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}'])
def test_a_damaged_record_of_settings(tmp_path, content):
    journal = Journal(tmp_path / "out")
    journal.start({})
    (journal.folder / "settings.json").write_text(content)
    with pytest.raises(InputError, match="settings.json is damaged .*choose a new --out"):
        journal.start({})


def test_a_lock_that_cannot_be_made(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    (journal.folder / "lock").mkdir()
    with pytest.raises(OutputError, match="cannot write in"), journal.lock():
        pass


def test_a_folder_in_which_nothing_was_finished_can_be_forgotten(tmp_path, file):
    journal = Journal(tmp_path / "out")
    journal.start({})
    with journal.lock():
        journal.forget_if_empty()
    assert not (tmp_path / "out").exists()
    journal.start({})
    journal.commit(file, {"kept": False, "reason": "r"})
    with journal.lock():
        journal.forget_if_empty()
    assert journal.read(file) is not None


def test_two_runs_in_one_folder(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    with journal.lock():
        with pytest.raises(InputError, match="another run is at work in"), Journal(tmp_path / "out").lock():
            pass
    with journal.lock():  # the first one has ended
        pass


def test_a_disk_that_is_full_is_one_clear_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.BytesIO):
        write = full

    monkeypatch.setattr(Path, "open", lambda path, mode: Full())
    with pytest.raises(OutputError, match="cannot write .*a.json: No space left on device.*run the same command again"):
        write_atomically(tmp_path / "a.json", b"content")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_the_block_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
