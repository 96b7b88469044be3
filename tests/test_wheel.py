"""What pip installs: a wheel, built from a copy of this repository, in an empty environment and an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1_000_000
PARTS = (
    *("msdiffusion", "data_pipeline", "checkpoints", "configs"),
    *("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"),
)

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; the test fails with its message if it does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, from a copy: a build leaves files where it runs."""
    copy, out = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("dist")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    run(sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})", cwd=copy)
    [found] = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel, and with what else this one has."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = next(path for path in environment.glob("*/python*") if path.stem == "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, wheel, cwd=environment)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands: there is nothing."""
    return tmp_path_factory.mktemp("anywhere")


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 100 * MEGABYTE


def test_it_draws_by_name(scripts: Path, folder: Path) -> None:
    code = """
import msdiffusion
from PIL import Image
model = msdiffusion.MSDiffusion.from_pretrained("embedded")
dog = Image.new("RGB", (64, 64), "brown")
[picture] = model.generate([dog], [[0, 0.3, 0.5, 0.9]], "a dog on the beach", seed=1, steps=1)
picture.save("picture.png")
print(msdiffusion.__file__)
"""
    place = run(scripts / "python", "-c", code, cwd=folder).splitlines()[-1]
    assert Path(place).is_relative_to(scripts.parent), "the repository was imported, not the wheel"
    assert (folder / "picture.png").is_file()


@pytest.fixture(scope="module")
def demo(scripts: Path, folder: Path) -> Path:
    """What a small demo leaves: it mines by the embedded detector, trains, draws and scores."""
    numbers = ("--clips", "3", "--train-steps", "1", "--subjects", "1")
    run(scripts / "msdiffusion", "demo", "--out", "demo", *numbers, cwd=folder)
    return folder / "demo"


def test_it_plays_the_demo(demo: Path) -> None:
    for name in ("index.html", "pairs/index.parquet", "fine_tuning/adapter/adapter.safetensors"):
        assert (demo / name).is_file(), name
    built = json.loads((demo / "pairs" / "build.json").read_text())
    assert built["settings"]["detect_boxes"]["detector"] == "embedded"
    assert built["counts"]["samples"] > 0


def test_configs_have_names(demo: Path, scripts: Path, folder: Path) -> None:
    """And so have the models in them."""
    assert "msd.yaml" in run(scripts / "msdiffusion", "configs", cwd=folder)
    run(scripts / "msdiffusion", "configs", "msd.yaml", "--out", "mine", cwd=folder)
    assert (folder / "mine" / "msd.yaml").read_bytes() == (ROOT / "configs" / "msd.yaml").read_bytes()
    arguments = ("--data.init_args.pairs", demo / "pairs", "--data.init_args.batch_size", "1")
    run(scripts / "lightning", "fit", "-c", "msd.yaml", *arguments, "--trainer.fast_dev_run", "1", cwd=folder)
    assert not (folder / "msd.yaml").exists()
