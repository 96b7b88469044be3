"""Commands of a slim install that need more than it has say so in one sentence, before anything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import extras
from msdiffusion.cli import main
from msdiffusion.training import cli, precompute, ray_train


@pytest.fixture
def slim(monkeypatch):
    """An environment with nothing of any extra."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("evaluate", 'matplotlib, scipy are not installed: pip install ".[evaluation]"'),
        ("bench world", '5 more are not installed: pip install ".[training,evaluation]"'),
        ("bench explore", 'pip install ".[training,evaluation]"'),
        ("demo", 'pip install ".[mining,training,evaluation]", in a checkout'),
    ],
)
@pytest.mark.usefixtures("slim")
def test_commands(command, told, tmp_path, capsys):
    assert main([*command.split(), "--out", str(tmp_path / "x")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("msdiffusion: error: ") and told in line
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("slim")
def test_drawing_needs_no_extra(tmp_path, capsys):
    """It is refused for what it lacks, not for a package."""
    assert main(["generate", "--image", "nowhere.png", "--prompt", "a dog", "--out", str(tmp_path / "x.png")]) == 2
    assert "not installed" not in capsys.readouterr().err


@pytest.mark.usefixtures("slim")
def test_training(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "-c", "nowhere.yaml"])
    assert end.value.code == 2
    assert precompute.main(["-c", "nowhere.yaml"]) == 2
    assert ray_train.main(["fit", "-c", "nowhere.yaml"]) == 2
    one, two, three = capsys.readouterr().err.splitlines()
    assert one == two and one.startswith("error: aiohttp, fsspec, jsonargparse and 5 more are not installed: ")
    assert 'pip install ".[ray,training]"' in three


@pytest.mark.parametrize("module", ["msdiffusion.training", "msdiffusion.training.local_sgd"])
def test_training_where_lightning_is_missing(module, tmp_path):
    """As a module, in an environment where its packages cannot be imported at all."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find, missing = PathFinder.find_spec, ('pytorch_lightning', 'lightning_fabric', 'torch')\n"
        "def found(name, *rest): return None if name in missing else find(name, *rest)\n"
        "PathFinder.find_spec = found\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", module, "fit", "-c", "msd.yaml"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith('error: pytorch_lightning is not installed: pip install ".[training]"')
