"""Fixtures shared by all tests: where things are, golden tensors, and a miniature of the whole model stack."""

import json
import os
from pathlib import Path

import pytest

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared material (real videos, the official golden files); the test skips without it."""
    place = Path(os.environ.get("MSD_SHARED", Path(__file__).parents[2] / "shared"))
    if not place.is_dir():
        pytest.skip(f"needs the shared material: no {place} (set MSD_SHARED)")
    return place


@pytest.fixture(scope="session")
def golden_tensors():
    """Function: name -> (tensors, config) computed by the official implementation."""
    from safetensors import safe_open

    def read(name):
        with safe_open(ASSETS / "golden" / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = {key: json.loads(value) for key, value in metadata.items() if key.endswith("config") or value[:1] in "[0"}
        return tensors, config.get("config", config)

    return read


@pytest.fixture(scope="session")
def official_adapter_file() -> Path:
    """A small ms_adapter.bin written by the official code, for the UNet of the golden file."""
    return ASSETS / "golden" / "ms_adapter.bin"
