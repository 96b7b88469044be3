from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.models.model_files import TRANSFORMERS_MODEL, check_model_directory, is_hub_id, missing_parts

NEEDED = {"weights": ("*.safetensors", "*.pth"), "configuration": ("*.py",)}


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert [is_hub_id(name) for name in ("owner/dino", "dino")] == [True, True]
    local = ("here", "./dino", "../owner/dino", "/models/dino", "~/dino", "a/b/c", "a\\b", "")
    assert [is_hub_id(name) for name in local] == [False] * len(local)


def test_a_directory_is_checked_without_reading_it(tmp_path):
    with pytest.raises(InputError, match=r"lacks its weights \(\*.safetensors or \*.pth\), configuration \(\*.py\);"):
        check_model_directory(str(tmp_path), "--model", NEEDED)
    (tmp_path / "a.pth").touch()
    with pytest.raises(InputError, match=r"lacks its configuration \(\*.py\); save a model there"):
        check_model_directory(str(tmp_path), "--model", NEEDED)
    (tmp_path / "a.py").touch()
    check_model_directory(str(tmp_path), "--model", NEEDED)
    check_model_directory("owner/dino", "--model", NEEDED)


def test_a_name_that_is_too_long_for_a_file_is_no_directory():
    assert is_hub_id("x" * 300)
    with pytest.raises(InputError, match="--model: no directory at ./xxx"):
        check_model_directory("./" + "x" * 300, "--model", {})


def test_parts_of_the_weights_that_are_missing(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "two"}}')
    (tmp_path / "one.safetensors").touch()
    assert missing_parts(tmp_path) == ["two"]
    with pytest.raises(InputError, match="lacks its part two; save a model there"):
        check_model_directory(str(tmp_path), "--model", TRANSFORMERS_MODEL)
    (tmp_path / "model.safetensors.index.json").write_text("[")
    assert missing_parts(tmp_path) == []
