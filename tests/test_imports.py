"""Who may import whom, read from the syntax trees, and what stays unloaded at the front doors.

The rules are those of docs/architecture.md. Each one is also shown to catch a breach: see ``BREACHES``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("msdiffusion", "data_pipeline")

# A room of msdiffusion may import rooms of a lower rank, and itself. Equal ranks don't know each other.
RANKS = {
    **dict.fromkeys(("errors", "places", "environment", "own_memory", "pixel_autoencoder"), 0),
    **dict.fromkeys(("files", "figures", "attention"), 1),
    **dict.fromkeys(("request", "backbone"), 2),
    "adapter": 3,
    "generation": 4,
    "evaluation": 5,
    "training": 6,
    "bench": 7,
    "commands": 8,
    "cli": 9,
    "__main__": 10,
}
# The same inside training/, whose files at the top are what configs and commands name.
TRAINING_RANKS = {
    **dict.fromkeys(("processes", "setting_names", "precision", "curves"), 0),
    "pairs": 1,
    "catalogue": 2,
    "samples": 3,
    "encodings": 4,
    "learning": 5,
    "run": 6,
    **dict.fromkeys(("embedded", "strategies", "local_sgd", "datamodule"), 7),
    **dict.fromkeys(("module", "callbacks", "pretrain"), 8),
    **dict.fromkeys(("cli", "precompute"), 9),
    **dict.fromkeys(("ray_train", "__main__"), 10),
}
# What a room must not know although its rank would allow it.
STRANGERS = {("training", "generation")}
# The only parts of data_pipeline that msdiffusion may know.
SHARED_WITH_MSDIFFUSION = (
    *("data_pipeline.errors", "data_pipeline.records", "data_pipeline.reasons", "data_pipeline.world"),
    *("data_pipeline.pairs_format", "data_pipeline.picture_formats", "data_pipeline.safe_text", "data_pipeline.places"),
    *("data_pipeline.extras", "data_pipeline.outputs"),
    *("data_pipeline.models.model_claims", "data_pipeline.models.weights"),
)
# What a step may know of data_pipeline: records, the base class, lists of words, and the wrappers round the libraries.
KNOWN_TO_STEPS = (
    *("data_pipeline.errors", "data_pipeline.records", "data_pipeline.step", "data_pipeline.places"),
    *("data_pipeline.languages", "data_pipeline.models", "data_pipeline.pairs_format"),
)
# Libraries that cost seconds to import or need weights: inside data_pipeline they appear in models/ only.
HEAVY = frozenset(
    {"torch", "torchvision", "cv2", "decord", "spacy", "transformers", "diffusers", "groundingdino", "segment_anything"}
    | {"open_clip", "pytorch_lightning", "scenedetect"}
)
# What the front doors must leave unloaded.
UNLOADED = sorted(HEAVY | {"av", "ray", "webdataset", "pyarrow", "pandas", "scipy", "matplotlib", "jsonargparse"})


@dataclass(frozen=True)
class Import:
    """One imported module: its full dotted name, its line, and whether importing the file loads it."""

    module: str
    line: int
    loads: bool


def module_name(path: Path) -> str:
    """Dotted name of a source file: ``data_pipeline/steps/cut_shots.py`` -> ``data_pipeline.steps.cut_shots``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


MODULES = frozenset(module_name(path) for path in source_files(*PACKAGES))


def names_of_package(package: str) -> dict[str, str]:
    """Names that ``package/__init__.py`` hands on, each with the module that it comes from."""
    init = ROOT / package / "__init__.py"
    if not init.is_file():
        return {}
    found = {}
    for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {alias.asname or alias.name: node.module for alias in node.names}
    return found


HANDED_ON = {package: names_of_package(package) for package in PACKAGES}


def is_type_checking(node: ast.AST) -> bool:
    """True for ``if TYPE_CHECKING:`` and ``if typing.TYPE_CHECKING:``."""
    test = getattr(node, "test", None)
    return isinstance(node, ast.If) and "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def imports_of(source: str, name: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, also those inside functions, under TYPE_CHECKING and through import_module("...")."""

    def resolve(node: ast.ImportFrom) -> list[str]:
        base = node.module or ""
        if node.level:
            parts = name.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        full = []
        for alias in node.names:
            candidate = f"{base}.{alias.name}"
            full.append(candidate if candidate in MODULES else HANDED_ON.get(base, {}).get(alias.name, base))
        return full

    def walk(node: ast.AST, loads: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, loads) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(module, node.lineno, loads) for module in resolve(node))
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield Import(str(first.value), node.lineno, loads)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, loads and not inside)

    yield from walk(ast.parse(source), True)


def inside(module: str, packages: tuple[str, ...]) -> bool:
    """True if ``module`` is one of ``packages`` or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def breach_in_msdiffusion(name: str, found: Import) -> str | None:
    """Why a module of msdiffusion must not have this import, or None."""
    if inside(found.module, ("data_pipeline",)):
        # the package itself: the version of both
        allowed = found.module == "data_pipeline" or inside(found.module, SHARED_WITH_MSDIFFUSION)
        return None if allowed else f"msdiffusion may know only {' and '.join(SHARED_WITH_MSDIFFUSION)}"
    if name == "msdiffusion" or not inside(found.module, ("msdiffusion",)):
        return None
    if found.module == "msdiffusion":  # the package itself: its version, say, but nothing that __init__ hands on
        return None
    here, there = name.split(".")[1:], found.module.split(".")[1:]
    if (here[0], there[0]) in STRANGERS:
        return f"{here[0]} must not know {there[0]}, whatever their ranks"
    if here[0] == there[0] == "training":
        return None if len(here) == 1 else breach_of_ranks(here[1], (there[1:] or here[1:])[0], TRAINING_RANKS)
    return breach_of_ranks(here[0], there[0], RANKS)


def breach_of_ranks(here: str, there: str, ranks: Mapping[str, int]) -> str | None:
    """Why a room must not know another by this table, or None."""
    for room in (here, there):
        if room not in ranks:
            return f"room {room!r} has no rank: decide its place in RANKS and in docs/architecture.md"
    if here != there and ranks[there] >= ranks[here]:
        return f"{here} (rank {ranks[here]}) must not know {there} (rank {ranks[there]})"
    return None


def breach_in_data_pipeline(name: str, found: Import) -> str | None:
    """Why a module of data_pipeline must not have this import, or None."""
    if inside(found.module, ("msdiffusion",)):
        return "data_pipeline never knows msdiffusion"
    in_models = inside(name, ("data_pipeline.models",))
    if found.module.split(".")[0] in HEAVY and not in_models:
        return "heavy libraries appear in data_pipeline/models only"
    if inside(found.module, ("data_pipeline.models",)) and found.loads and not in_models:
        return "models/ is imported inside functions only"
    if inside(name, ("data_pipeline.steps",)) and inside(found.module, ("data_pipeline",)):
        if not inside(found.module, (*KNOWN_TO_STEPS, name)):
            return f"a step may know only {', '.join(KNOWN_TO_STEPS)}"
    elif inside(found.module, ("data_pipeline.steps",)) and name != "data_pipeline.options":
        return "only options.py knows the steps"
    return None


def breaches(source: str, name: str, is_package: bool = False) -> list[str]:
    """All breaches of one module, each as ``line: import: reason``."""
    check = breach_in_msdiffusion if inside(name, ("msdiffusion",)) else breach_in_data_pipeline
    lines = []
    for found in imports_of(source, name, is_package):
        reason = check(name, found)
        if reason is not None:
            lines.append(f"line {found.line}: {found.module}: {reason}")
    return lines


@pytest.mark.parametrize("path", source_files(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_import_rules(path: Path) -> None:
    assert breaches(path.read_text(), module_name(path), path.name == "__init__.py") == []


def test_every_room_of_the_tables_exists() -> None:
    for package, ranks in (("msdiffusion.", RANKS), ("msdiffusion.training.", TRAINING_RANKS)):
        assert set(ranks) == {name.removeprefix(package).split(".")[0] for name in MODULES if name.startswith(package)}


def known_by(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, but a package that it lies in."""
    name = module_name(path)
    found = imports_of(path.read_text(), name, path.name == "__init__.py")
    return {each.module for each in found if each.module in MODULES and not inside(name, (each.module,))}


def test_no_module_knows_itself_through_others() -> None:
    graph = {module_name(path): known_by(path) for path in source_files(*PACKAGES)}
    TopologicalSorter(graph).prepare()
    graph["msdiffusion.errors"] = {"msdiffusion.generation.generate"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_architecture_page_lists_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = [line.split("|")[1].strip().strip("`/") for line in page.splitlines() if line.startswith("| `")]
    assert [room for room in rows if room in RANKS] == sorted(RANKS, key=rows.index), "a row per room, none twice"
    order = [RANKS[room] for room in rows if room in RANKS]
    assert order == sorted(order), "rooms stand below those that they may know"


BREACHES = [
    ("msdiffusion.files", "from msdiffusion.adapter.adapter import MSAdapter", "files (rank 1) must not know adapter"),
    ("msdiffusion.files", "from msdiffusion import figures", "must not know figures"),
    ("msdiffusion.files", "from . import adapter", "must not know adapter"),
    ("msdiffusion.request.layout", "from ..adapter.adapter import MSAdapter", "must not know adapter"),
    (
        "msdiffusion.request.layout",
        "def late():\n    import msdiffusion.generation.generate",
        "must not know generation",
    ),
    (
        "msdiffusion.backbone.backbone",
        "if TYPE_CHECKING:\n    from msdiffusion.generation.generate import MSDiffusion",
        "must not know generation",
    ),
    ("msdiffusion.attention.unet", "from msdiffusion import MSDiffusion", "must not know generation"),
    (
        "msdiffusion.attention.unet",
        "import importlib\nimportlib.import_module('msdiffusion.cli')",
        "must not know cli",
    ),
    ("msdiffusion.training.module", "from ..generation.generate import MSDiffusion", "must not know generation"),
    (
        "msdiffusion.training.run.pictures",
        "from msdiffusion.training.module import MSDiffusionModule",
        "not know module",
    ),
    ("msdiffusion.training.pairs.shards", "from msdiffusion.training import catalogue", "must not know catalogue"),
    ("msdiffusion.generation.generate", "from msdiffusion.training.samples import dataset", "must not know training"),
    ("msdiffusion.training.cellar", "from msdiffusion.training import module", "room 'cellar' has no rank"),
    ("msdiffusion.cli", "from data_pipeline.build import main", "msdiffusion may know only"),
    ("msdiffusion.cellar", "from msdiffusion import errors", "room 'cellar' has no rank"),
    ("data_pipeline.records", "from msdiffusion.errors import DataError", "never knows msdiffusion"),
    ("data_pipeline.records", "import torch", "data_pipeline/models only"),
    ("data_pipeline.world.clips", "def late():\n    import cv2", "data_pipeline/models only"),
    ("data_pipeline.steps.detect_boxes", "from data_pipeline.models import detector", "inside functions only"),
    ("data_pipeline.steps.detect_boxes", "from data_pipeline.steps import cut_shots", "a step may know only"),
    ("data_pipeline.steps.detect_boxes", "from .cut_shots import CutShots", "a step may know only"),
    ("data_pipeline.steps.detect_boxes", "from data_pipeline import run", "a step may know only"),
    ("data_pipeline.run", "from data_pipeline.steps.cut_shots import CutShots", "only options.py knows the steps"),
]
LAWFUL = [
    (
        "msdiffusion.adapter.adapter",
        "from .resampler import GroundingResampler\nfrom msdiffusion.attention import unet",
    ),
    ("msdiffusion.cli", "def late():\n    from msdiffusion import MSDiffusion, __version__"),
    ("msdiffusion", "from data_pipeline import __version__"),
    ("msdiffusion.training.module", "import torch\nfrom msdiffusion.training.samples.batch import PairsBatch"),
    ("msdiffusion.evaluation.world", "from data_pipeline.world import CATEGORIES"),
    ("data_pipeline.models.detector", "import torch\nfrom data_pipeline.records import Detection"),
    ("data_pipeline.steps.detect_boxes", "def setup():\n    from data_pipeline.models.detector import load"),
    ("data_pipeline.options", "from data_pipeline.steps.cut_shots import CutShots"),
]


@pytest.mark.parametrize(("name", "source", "reason"), BREACHES)
def test_checker_catches(name: str, source: str, reason: str) -> None:
    [breach] = breaches(source, name)
    assert reason in breach


@pytest.mark.parametrize(("name", "source"), LAWFUL)
def test_checker_lets_pass(name: str, source: str) -> None:
    assert breaches(source, name) == []


FRONT_DOORS = {
    "import msdiffusion": "import msdiffusion",
    "import data_pipeline.records": "import data_pipeline.records",
    "msdiffusion --help": "from msdiffusion.cli import main; main(['--help'])",
    "data_pipeline.build --help": (
        "import runpy; sys.argv = ['build', '--help']; runpy.run_module('data_pipeline.build', run_name='__main__')"
    ),
}


@pytest.mark.parametrize("door", FRONT_DOORS)
def test_front_door_loads_no_heavy_library(door: str) -> None:
    """Modules are counted, not seconds: a busy machine must not fail it (benchmarks/imports.py has the seconds)."""
    code = f"""
import sys
try:
    {FRONT_DOORS[door]}
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
print("loaded:", *sorted(set({UNLOADED!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
