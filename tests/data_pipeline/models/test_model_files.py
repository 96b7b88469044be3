from pathlib import Path

import pytest

from data_pipeline.models.model_files import check_model_directory, find_files, is_hub_id
from data_pipeline.records import InputError

NEEDED = {"weights": ("*.safetensors", "*.pth"), "configuration": ("*.py",)}


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert [is_hub_id(name) for name in ("owner/dino", "dino")] == [True, True]
    local = ("here", "./dino", "../owner/dino", "/models/dino", "~/dino", "a/b/c", "a\\b", "")
    assert [is_hub_id(name) for name in local] == [False] * len(local)


def test_a_file_is_found_by_the_first_pattern_that_fits(tmp_path):
    for name in ("config.py", "old.pth", "older.pth", "new.safetensors"):
        (tmp_path / name).touch()
    found = find_files(str(tmp_path), "--model", NEEDED)
    assert found == {"weights": tmp_path / "new.safetensors", "configuration": tmp_path / "config.py"}
    assert find_files(str(tmp_path), "--model", {"weights": ("old.pth",)}) == {"weights": tmp_path / "old.pth"}
    (tmp_path / "new.safetensors").unlink()
    with pytest.raises(InputError, match="--model: .* several files for its weights: name one of old.pth, older.pth"):
        find_files(str(tmp_path), "--model", NEEDED)
    with pytest.raises(InputError, match=r"--model: .* has no tokenizer \(vocab.txt\)"):
        find_files(str(tmp_path), "--model", {"tokenizer": ("vocab.txt",)})
    with pytest.raises(
        InputError, match="--model: no directory at .*/nothing; give a model's directory, or its hub id"
    ):
        find_files(str(tmp_path / "nothing"), "--model", NEEDED)


def test_a_directory_is_checked_without_reading_it(tmp_path):
    with pytest.raises(InputError, match=r"lacks its weights \(\*.safetensors or \*.pth\), configuration \(\*.py\);"):
        check_model_directory(str(tmp_path), "--model", NEEDED)
    (tmp_path / "a.pth").touch()
    with pytest.raises(InputError, match=r"lacks its configuration \(\*.py\); save a model there"):
        check_model_directory(str(tmp_path), "--model", NEEDED)
    (tmp_path / "a.py").touch()
    check_model_directory(str(tmp_path), "--model", NEEDED)
    check_model_directory("owner/dino", "--model", NEEDED)


def test_a_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    def fail(*names):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(InputError, match=r"--model: cannot get a/b from the hub \(no route to host\); download it"):
        find_files("a/b", "--model", NEEDED)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["x.py", "x.pth"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match="--model: cannot get a/b/x.pth from the hub"):
        find_files("a/b", "--model", NEEDED)
