"""Promises about the whole repository: documented code, true links, pinned versions, weights that are what they say."""

from __future__ import annotations

import ast
import configparser
import functools
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import data_pipeline
import msdiffusion

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"
MEGABYTE = 1_000_000

# Methods whose meaning and signature a framework fixes; a docstring there would repeat the framework's manual.
FRAMEWORK_HOOKS = frozenset(
    {"configure_optimizers", "train_dataloader", "val_dataloader", "prepare_data", "setup", "state_dict"}
    | {"training_step", "validation_step", "load_state_dict", "add_arguments_to_parser"}
)
HOOK = re.compile(r"on_(fit|train|validation|save|load|before|after)_\w+")


@functools.cache
def tracked_files() -> list[Path]:
    """Files that git knows or would add; skips the test where the code is not a git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout: nobody can say which files belong to it")
    return sorted(path for line in listing.stdout.splitlines() if (path := ROOT / line).is_file())


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sources() -> list[Path]:
    return [path for package in ("msdiffusion", "data_pipeline") for path in sorted((ROOT / package).rglob("*.py"))]


# ---------------------------------------------------------------------------------------------------------- the code


def public_functions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods without a leading underscore, in the module and in its public classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield owner + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{owner}{node.name}.")


def is_hook(name: str) -> bool:
    return name in FRAMEWORK_HOOKS or HOOK.fullmatch(name) is not None


def missing_in(function: ast.FunctionDef, is_method: bool) -> list[str]:
    """What a public function lacks: a docstring, a parameter's type, the type of the result."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in function.decorator_list)
    named = positional[1:] if is_method and not static else positional
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    untyped = [a.arg for a in [*named, *arguments.kwonlyargs, *extra] if a.annotation is None]
    missing = [f"the type of {name}" for name in untyped]
    if function.returns is None:
        missing.append("the type of the result")
    if ast.get_docstring(function) is None and not (is_method and is_hook(function.name)):
        missing.append("a docstring")
    return missing


@pytest.mark.parametrize("path", sources(), ids=short)
def test_public_functions_are_documented_and_typed(path: Path) -> None:
    found = [
        f"line {function.lineno}: {name} lacks {', '.join(missing)}"
        for name, function in public_functions(ast.parse(path.read_text()).body)
        if (missing := missing_in(function, is_method="." in name))
    ]
    assert found == []


def test_the_check_of_signatures_finds_what_is_missing() -> None:
    [(name, function)] = public_functions(ast.parse("class A:\n    def f(self, x, *, y: int, **z): pass").body)
    assert name == "A.f"
    assert missing_in(function, is_method=True) == [
        "the type of x",
        "the type of z",
        "the type of the result",
        "a docstring",
    ]


def test_every_file_under_tests_holds_tests() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name in ("conftest.py", "forked_python.py", "mutations.py"):  # parts of what stands beside them
            continue
        assert path.name.startswith("test_"), f"{short(path)}: pytest does not collect this name"
        names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        assert any(name.startswith("test_") for name in names), f"{short(path)} holds no test"


def test_no_tracked_file_names_this_machine_or_a_registry() -> None:
    # Spelled in two halves, so that this file does not find itself.
    hosts = [
        ".".join(parts)
        for parts in (("pypi", "org"), ("python" + "hosted", "org"), ("npmjs", "org"), ("debian", "org"))
    ]
    places = ["/work" + folder for folder in ("/main", "/shared", "/.library")] + ["/root" + "/", "/opt" + "/"]
    needles = [needle.encode() for needle in hosts + places]
    found = [
        f"{short(path)}: {needle.decode()}"
        for path in tracked_files()
        for content in [path.read_bytes()]
        for needle in needles
        if needle in content
    ]
    assert found == []


# ------------------------------------------------------------------------------------------------------ the packaging


@functools.cache
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirement_lines(text: str) -> list[Requirement]:
    lines = [line.strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared(*extras: str) -> list[Requirement]:
    """Requirements of setup.cfg: the ordinary ones, and those of extras, which may hold each other."""
    config = setup_cfg()
    found = requirement_lines(config["options"]["install_requires"])
    for extra in extras:
        for requirement in requirement_lines(config["options.extras_require"][extra]):
            found += declared(*requirement.extras) if requirement.name == "msdiffusion" else [requirement]
    return list(dict.fromkeys(found))


@functools.cache
def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for pin in requirement_lines((ROOT / "constraints.txt").read_text()):
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def test_packages_of_the_design_are_ordinary_parts_of_all() -> None:
    named = {"torch", "diffusers", "transformers", "open-clip-torch", "groundingdino-py", "segment-anything"}
    named |= {"decord", "spacy", "pytorch-lightning"}
    assert named <= {canonicalize_name(requirement.name) for requirement in declared("all")}
    assert '--editable ".[all,test]"' in (ROOT / "Makefile").read_text()


def test_what_only_draws_brings_nothing_else() -> None:
    """Sizes are in the README."""
    others = {"pytorch-lightning", "groundingdino-py", "decord", "ray", "pyarrow", "tensorboard", "matplotlib", "av"}
    assert not others & {canonicalize_name(requirement.name) for requirement in declared()}
    assert "decord" in {requirement.name for requirement in declared("mining")}


def test_one_floor_for_a_package_that_several_extras_need() -> None:
    floors: dict[str, set[str]] = {}
    for requirement in declared("all", "test"):
        name = f"{canonicalize_name(requirement.name)} {requirement.marker or ''}"
        floors.setdefault(name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in floors.items() if len(found) > 1} == {}


def test_constraints_pin_one_version_inside_every_range() -> None:
    for requirement in declared("all", "test"):
        available = pins().get(canonicalize_name(requirement.name), [])
        for minor in (11, 12, 13):
            python = {"python_full_version": f"3.{minor}.0", "python_version": f"3.{minor}"}
            if requirement.marker is not None and not requirement.marker.evaluate(python):
                continue
            valid = [pin for pin in available if pin.marker is None or pin.marker.evaluate(python)]
            assert len(valid) == 1, f"{requirement.name} has {len(valid)} pins for Python 3.{minor}"
            [exact] = valid[0].specifier
            assert exact.operator == "==", f"{valid[0]} is not an exact version"
            assert requirement.specifier.contains(exact.version), f"{valid[0]} is outside of {requirement}"


def imported_distributions(folder: str) -> dict[str, str]:
    """Distributions that the code of a folder imports, each with one file that does so."""
    providers = importlib.metadata.packages_distributions()
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names}:
                if top not in sys.stdlib_module_names:
                    found |= {canonicalize_name(name): short(path) for name in providers.get(top, [])}
    return found


def test_every_imported_package_is_declared() -> None:
    def names(*extras: str) -> set[str]:
        return {canonicalize_name(requirement.name) for requirement in declared(*extras)} | {"msdiffusion"}

    # Both opencv packages provide cv2; groundingdino-py asks for one, overrides.txt says why the other is installed.
    mining = names("mining", "ray") | {"opencv-python", "opencv-python-headless"}
    training = names("training", "evaluation", "ray", "bitsandbytes")
    folders = {"msdiffusion": training, "data_pipeline": mining, "tests": mining | training | names("test")}
    for folder, allowed in folders.items():
        undeclared = {name: path for name, path in imported_distributions(folder).items() if name not in allowed}
        assert undeclared == {}, f"{folder} imports what setup.cfg does not declare"


def test_every_dependency_has_its_row() -> None:
    """docs/dependencies.md: licence, reason, replacement."""
    lines = (ROOT / "docs" / "dependencies.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [a-z]", line)]
    assert all(len(row) == 4 and all(row) for row in rows)
    named = [canonicalize_name(row[0]) for row in rows if row[0] != "package"]
    direct = {canonicalize_name(requirement.name) for requirement in declared("all", "test", "wandb", "bitsandbytes")}
    assert sorted(named) == sorted(direct)  # a set: av has a floor for each Python


def test_one_version_everywhere() -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: data_pipeline.__version__"
    assert msdiffusion.__version__ == data_pipeline.__version__


def test_the_changelog_has_dated_versions_the_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", heading) for heading in headings]
    released = [(Version(match[1]), match[2]) for match in found if match]
    assert headings[0] == "Unreleased" and len(released) == len(headings) - 1
    assert released == sorted(released, reverse=True)
    assert str(released[0][0]) == msdiffusion.__version__


# --------------------------------------------------------------------------------------------------- the entry points


def test_console_scripts_are_ours() -> None:
    """lightning-sdk installs a script of the same name, and the last one installed wins without a word."""
    scripts = Path(sysconfig.get_path("scripts"))
    for line in setup_cfg()["options.entry_points"]["console_scripts"].strip().splitlines():
        name, target = (part.strip() for part in line.split("="))
        assert f"from {target.split(':')[0]} import" in (scripts / name).read_text(), f"{name} is another package's"


def test_lightning_help_is_ours() -> None:
    lightning = Path(sysconfig.get_path("scripts")) / "lightning"
    done = subprocess.run([lightning, "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout


# --------------------------------------------------------------------------------------------------------- the weights


def test_shipped_weights_are_safetensors_and_small() -> None:
    weights = [path for path in tracked_files() if ROOT / "checkpoints" in path.parents]
    pickled = [short(path) for path in weights if path.suffix in {".bin", ".ckpt", ".pt", ".pth", ".pkl"}]
    assert pickled == []
    size = sum(path.stat().st_size for path in weights if TINY in path.parents)
    assert size <= 120 * MEGABYTE, f"checkpoints/tiny has {size / MEGABYTE:.0f} MB"


def test_checksums_of_the_weights() -> None:
    """checkpoints/README.md has a table with a row per file: its path in backticks, and its sha256."""
    readme = ROOT / "checkpoints" / "README.md"
    rows = re.findall(r"^\|.*?`([^`|]+)`.*?\b([0-9a-f]{64})\b", readme.read_text(), flags=re.MULTILINE)
    listed = {(readme.parent / name): digest for name, digest in rows}
    shipped = {path for path in tracked_files() if readme.parent in path.parents and path.suffix == ".safetensors"}
    assert TINY / "adapter.safetensors" in shipped
    assert shipped <= set(listed), f"without a checksum: {sorted(short(path) for path in shipped - set(listed))}"
    for path, digest in listed.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, f"{short(path)} is not the file of the table"


# ------------------------------------------------------------------------------------------------------- the documents


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("checkpoints/*.md"))]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    """The anchors that a forge gives the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=short)
def test_docs_links_point_at_something(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"", without_code(path.read_text())):
        target, _, anchor = next(filter(None, link)).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target) if target else path
        assert file.exists(), f"{short(path)} points at {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{short(path)} points at #{anchor}, no heading of {short(file)}"


def commands(text: str) -> list[str]:
    """Lines of the shell code blocks, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in joined.splitlines() if line.strip()]


def broken_parts(command: str) -> list[str]:
    """Parts of a shell command that name a file, module, script or make target of ours that does not exist."""
    scripts = re.findall(r"^(\w+) =", setup_cfg()["options.entry_points"]["console_scripts"], flags=re.MULTILINE)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    folders = "configs|benchmarks|docs|tests|checkpoints|msdiffusion|data_pipeline"
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]+)", command)
    broken = [name for name in paths if not (ROOT / name).exists()]
    for module in re.findall(r"-m ((?:msdiffusion|data_pipeline)[\w.]*)", command):
        file = ROOT / module.replace(".", "/")
        if not (file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()):
            broken.append(f"-m {module}")
    broken += [f"make {name}" for name in re.findall(r"\bmake ([a-z]+)", command) if name not in targets]
    first = command.split()[0]
    if first in ("lightning", "msdiffusion") and first not in scripts:
        broken.append(first)
    return broken


@pytest.mark.parametrize("path", documents(), ids=short)
def test_docs_commands_name_things_that_exist(path: Path) -> None:
    found = {command: broken for command in commands(path.read_text()) if (broken := broken_parts(command))}
    assert found == {}


def test_the_check_of_commands_finds_what_is_broken() -> None:
    lines = [
        "lightning fit \\\n  -c configs/nowhere.yaml",
        "python -m msdiffusion.nowhere",
        "make nothing",
        "make test",
    ]
    text = "\n".join(["```bash", *lines, "```"])
    assert [broken_parts(command) for command in commands(text)] == [
        ["configs/nowhere.yaml"],
        ["-m msdiffusion.nowhere"],
        ["make nothing"],
        [],
    ]


def test_readme_is_there() -> None:
    assert commands((ROOT / "README.md").read_text()), "the README shows no command in a ```bash block"


def test_the_readme_names_what_the_world_draws() -> None:
    from data_pipeline.world import BACKGROUNDS, CATEGORIES

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"({', '.join(CATEGORIES)}) in six places" in text
    assert ", ".join(f'"{phrase}"' for phrase in BACKGROUNDS.values()) in text
