"""The helpers of tests/data_pipeline/conftest.py as fixtures, for tests that make clips of their own."""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

_spec = spec_from_file_location("mining_conftest", Path(__file__).parents[1] / "conftest.py")
_helpers = module_from_spec(_spec)
_spec.loader.exec_module(_helpers)


@pytest.fixture
def draw_clip() -> Callable:
    return _helpers.draw_clip


@pytest.fixture
def write_video() -> Callable:
    return _helpers.write_video


@pytest.fixture
def annotate() -> Callable:
    return _helpers.annotate
