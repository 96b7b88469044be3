"""Where the things lie that come along, what they are called, and how paths are shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msdiffusion.places import (
    CONFIGS,
    DEFAULT_MODEL,
    REPOSITORY,
    config_names,
    find_config,
    find_model,
    from_here,
    shown,
)


def test_in_the_repository_its_own_folders_are_taken():
    assert (REPOSITORY / "msdiffusion" / "places.py").is_file()
    assert REPOSITORY / "checkpoints" / "tiny" == DEFAULT_MODEL
    assert REPOSITORY / "configs" == CONFIGS


def test_paths_are_shown_from_where_one_stands(tmp_path, monkeypatch):
    assert shown(DEFAULT_MODEL / "config.json") == "checkpoints/tiny/config.json"
    assert shown(tmp_path / "a") == str(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "a") == "a"
    assert shown("owner/hub-name") == "owner/hub-name"
    # what a command is given must be there: not the repository's name of it
    assert (from_here(tmp_path / "a"), from_here(DEFAULT_MODEL)) == ("a", str(DEFAULT_MODEL))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("embedded", "."),
        ("embedded/base", "base"),
        ("embedded/mining/detector", "mining/detector"),
        ("checkpoints/tiny", "."),
        ("checkpoints/tiny/image_encoder", "image_encoder"),
    ],
)
def test_models_that_come_along_have_names_everywhere(name, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_model(name)) == DEFAULT_MODEL / inside
    (tmp_path / name).mkdir(parents=True)  # what lies here is meant
    assert find_model(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "/",
            "embedde",
            "Embedded",
            "embedded/",
            "embedded/nothing",
            "embedded/../..",
            "embedded/config.json",
        ),
        *("checkpoints", "checkpoints/", "checkpoints/../configs", "configs", "owner/embedded", "open_clip:ViT-H-14"),
        *("a\0b", "x" * 5000, "https://huggingface.co/embedded"),
    ],
)
def test_other_names_stay_as_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(name) == name


def test_configs_that_come_along_have_names_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"msd.yaml", "msd_sdxl.yaml", "strategies/sharded.yaml"} <= set(config_names())
    assert find_config("msd.yaml") == find_config("configs/msd.yaml") == str(CONFIGS / "msd.yaml")
    assert find_config("strategies/sharded.yaml") == str(CONFIGS / "strategies" / "sharded.yaml")
    for name in ("", "msd", "../msd.yaml", "strategies", "other/msd.yaml", "{trainer: {max_steps: 1}}", "x" * 5000):
        assert find_config(name) == name
    (tmp_path / "msd.yaml").write_text("seed_everything: 1\n")  # what lies here is meant
    assert find_config("msd.yaml") == "msd.yaml"


def test_a_folder_called_like_the_packages_checkpoints_is_none_of_ours(tmp_path):
    """Other packages leave ``checkpoints`` and ``configs`` in site-packages: in a wheel ours lie inside the package."""
    for package in ("msdiffusion", "data_pipeline"):
        (tmp_path / package).mkdir()
        for name in ("__init__.py", "places.py"):
            (tmp_path / package / name).write_bytes((REPOSITORY / package / name).read_bytes())
    (tmp_path / "msdiffusion" / "errors.py").write_bytes((REPOSITORY / "msdiffusion" / "errors.py").read_bytes())
    for place in (tmp_path, tmp_path / "msdiffusion" / "shipped"):
        (place / "checkpoints" / "tiny" / "base").mkdir(parents=True)
    code = "from msdiffusion.places import *; print(DEFAULT_MODEL, find_model('checkpoints/tiny/base'), sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "msdiffusion", env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tiny = tmp_path / "msdiffusion" / "shipped" / "checkpoints" / "tiny"
    assert found.stdout.splitlines() == [str(tiny), str(tiny / "base")]
