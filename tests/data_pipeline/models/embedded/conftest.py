from pathlib import Path

import pytest

from data_pipeline.models.embedded.renderings import RenderSettings, render


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """48 frames of 64 pixels."""
    return render(RenderSettings(frames=48, size=64, twins=0.5), tmp_path_factory.mktemp("frames"), workers=0)


@pytest.fixture(scope="session")
def mining_models():
    """The folder of the shipped detector and segmenter."""
    return Path(__file__).resolve().parents[4] / "checkpoints/tiny/mining"
