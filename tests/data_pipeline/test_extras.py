"""What a slim install says at every door that it has no packages for."""

import builtins
import configparser
import importlib
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from data_pipeline import build, convert, cutout, embedded, extras, import_pairs, inspect, report
from data_pipeline.errors import InputError
from data_pipeline.extras import MODULES, missing_extras, need_extras
from data_pipeline.world import __main__ as world

ROOT = Path(__file__).parents[2]
MINING = 'error: av, cv2, fontTools and 5 more are not installed: pip install ".[mining]", in a checkout'


@pytest.fixture
def slim(monkeypatch):
    """An environment with nothing of any extra."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


def test_every_module_is_of_a_package_of_its_extra():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    providers = packages_distributions()
    for extra, modules in MODULES.items():
        lines = config["options.extras_require"][extra].strip().splitlines()
        declared = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
        declared |= {"opencv-python", "opencv-python-headless"} if extra == "mining" else set()
        for name in modules:
            assert declared & {canonicalize_name(found) for found in providers[name]}, f"{name} is not of {extra}"


def test_nothing_is_said_where_all_is_there():
    assert missing_extras() is missing_extras(*MODULES) is None
    need_extras(*MODULES)


def test_several_extras_are_one_command(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("ray", "av") else name)
    assert missing_extras("mining", "training", "ray") == (
        'av, ray are not installed: pip install ".[mining,ray]", in a checkout of msdiffusion'
    )
    with pytest.raises(InputError, match=r'^ray is not installed: pip install "\.\[ray\]", in a checkout'):
        need_extras("ray")


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        (build, ["--videos", "nowhere"]),
        (convert, ["groundingdino", "--to", "hf", "nowhere", "x"]),
        (embedded, ["train", "detector"]),
        (import_pairs, ["--from", "official", "nowhere", "--out", "x"]),
        (inspect, ["nowhere"]),
        (report, ["nowhere"]),
        (world, ["--out", "x"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.usefixtures("slim")
def test_a_door_of_mining_says_one_sentence_first(door, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert door.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(MINING) and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("slim")
def test_cutting_out_says_it_too(tmp_path, capsys):
    assert cutout.main(["nowhere.jpg", "--out", str(tmp_path / "x"), "--box", "0,0,1,1"]) == 2
    assert MINING in capsys.readouterr().err


def test_opencv_without_libgl_is_told(monkeypatch):
    def refuse(name, *arguments, **options):
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
        return import_module(name, *arguments, **options)

    import_module = builtins.__import__
    monkeypatch.delitem(sys.modules, "data_pipeline.models.shots", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        InputError, match=r"\(libGL.so.1: .*\): on a machine without libGL, pip uninstall opencv-python"
    ):
        importlib.import_module("data_pipeline.models.shots")
