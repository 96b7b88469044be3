"""Real pairs with masks, mined from a few world clips."""

import subprocess

import pytest


@pytest.fixture(scope="session")
def masked_pairs_dir(tmp_path_factory, forked_python):
    folder = tmp_path_factory.mktemp("mined")
    for arguments in (
        ["data_pipeline.world", "--out", str(folder / "clips"), "--count", "10"],
        ["data_pipeline.build", "--videos", str(folder / "clips"), "--out", str(folder / "pairs")],
    ):
        subprocess.run([forked_python, "-m", *arguments], check=True, capture_output=True)
    return folder / "pairs"
