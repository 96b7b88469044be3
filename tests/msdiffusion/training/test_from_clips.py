"""From clips to an adapter of one's own, by the commands of the README: what a stranger does."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiffusion.generation.generate import MSDiffusion
from msdiffusion.training.catalogue import read_catalogue

ROOT = Path(__file__).resolve().parents[3]


def run(python: str, *command: str | Path) -> str:
    """A module in the repository, which must succeed; returns what it prints."""
    done = subprocess.run([python, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forked_python) -> Path:
    """20 clips, their pairs, and the run of two steps on them."""
    folder = tmp_path_factory.mktemp("stranger")
    clips, pairs = folder / "clips", folder / "pairs"
    run(forked_python, "data_pipeline.world", "--out", clips, "--count", "20")
    said = run(
        forked_python, "data_pipeline.build", "--videos", clips, "--out", pairs, "--workers", "0", "--quiet"
    )  # fmt: skip
    assert "20 videos" in said
    run(
        forked_python, "msdiffusion.training", "fit", "-c", "configs/msd.yaml", "--data.init_args.pairs", pairs,
        "--trainer.default_root_dir", folder / "run", "--trainer.max_steps", "2", "--data.init_args.batch_size", "4",
    )  # fmt: skip
    return folder


def test_clips_become_pairs_that_training_takes(folder):
    catalogue = read_catalogue(folder / "pairs")
    assert len(catalogue) >= 15
    assert catalogue.single_frame() == 0
    pair = catalogue.read(0)
    assert len(pair.phrases) == len(pair.boxes) == len(pair.references)


def test_the_run_leaves_what_the_page_promises(folder):
    left = {path.relative_to(folder / "run").as_posix() for path in (folder / "run").rglob("*") if path.is_file()}
    promised = {
        "adapter/adapter.safetensors",
        "adapter/config.json",
        "checkpoints/last.ckpt",
        "pictures/step_000002.png",
    }
    assert promised <= left
    assert any(name.startswith("lightning_logs/version_0/events") for name in left)
    assert "config.yaml" in {Path(name).name for name in left}
    assert Image.open(folder / "run" / "pictures" / "step_000002.png").width > 64
    assert json.loads((folder / "run" / "adapter" / "config.json").read_text())["defaults"]["guidance_scale"] == 3.0


def test_the_adapter_draws_and_its_scale_matters(folder):
    pair = read_catalogue(folder / "pairs").read(0)
    model = MSDiffusion.from_pretrained(folder / "run" / "adapter", device="cpu")
    drawn = {}
    for scale in (0.0, 1.0):
        [picture] = model.generate(
            list(pair.references), pair.boxes.tolist(), pair.caption, list(pair.phrases), seed=0, steps=2, scale=scale,
            progress=False,
        )  # fmt: skip
        drawn[scale] = np.asarray(picture).astype(float)
    assert drawn[1.0].shape == (64, 64, 3)
    assert drawn[1.0].std() > 0
    assert np.abs(drawn[1.0] - drawn[0.0]).max() > 0
