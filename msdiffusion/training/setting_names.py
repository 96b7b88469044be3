"""Names of settings in configs and on the command line, and numbers of the data, checked before torch is imported.

LightningCLI finds a wrong name, too, after half a minute of imports on a slow machine, and says it under a screen of
usage. Here the classes that a config names are looked up in their sources, which are read and not run. What cannot be
found out so is left to LightningCLI.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from msdiffusion.errors import RequestError, shown
from msdiffusion.places import config_names, find_config

Group = TypeVar("Group")
TRAINER = "pytorch_lightning.trainer.trainer.Trainer"
PAIRS = "msdiffusion.training.datamodule.PairsDataModule"
COMMANDS = ("fit", "validate", "test", "predict")
CLASSES = ("model", "data", "optimizer", "lr_scheduler")
"""Parts of a config that are objects: a ``class_path`` and its ``init_args``."""
_OBJECT_KEYS = {"class_path", "init_args", "dict_kwargs"}
_BARE_OPTIONS = ("help", "print_config")
_ELSEWHERE = {
    "resume": "ckpt_path", "resume_from_checkpoint": "ckpt_path", "checkpoint": "ckpt_path", "gpus": "devices",
    "epochs": "max_epochs", "steps": "max_steps", "max_train_steps": "max_steps", "output_dir": "default_root_dir",
    "out": "default_root_dir", "lr": "learning_rate", "bs": "batch_size", "train_batch_size": "batch_size",
    "workers": "num_workers", "dataloader_num_workers": "num_workers", "mixed_precision": "precision",
    "gradient_accumulation_steps": "accumulate_grad_batches", "max_grad_norm": "gradient_clip_val",
    "seed": "seed_everything",
}  # fmt: skip
"""What other trainers call these settings."""
_LEAST = {
    "batch_size": 1, "max_subjects": 1, "lanes": 1, "shuffle_buffer": 1, "resolution": 8, "bucket_step": 0,
    "num_workers": 0, "cache_megabytes": 0, "seed": 0,
}  # fmt: skip
"""The least whole number that a setting of the pairs may be."""
_GIVEN_BY_LIGHTNING = {"self", "model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}


@dataclass(frozen=True)
class _Setting:
    """One setting, by the names on its way, as somebody wrote it."""

    names: tuple[str, ...]
    place: str | None
    """The config's file; None: on the command line."""

    def written(self, names: Sequence[str] | None = None) -> str:
        """As it is written there, with other names if given."""
        path = ".".join(self.names if names is None else names)
        return path if self.place else f"--{path}"


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse a `lightning` command line with a command, a config or the name of a setting that does not exist.

    Args:
        arguments: without the program's name.

    Raises:
        RequestError: names the first one, and the nearest right name.
    """
    if {"-h", "--help"} & set(arguments):
        return
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        if command.startswith("-"):
            return  # options before the command are LightningCLI's
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"unknown command {shown(command)}" + (f": did you mean {near[0]}?" if near else ":") if command else (
            "a command is missing:")  # fmt: skip
        raise RequestError(f"{meant} lightning {'|'.join(COMMANDS)} -c CONFIG, for instance -c configs/msd.yaml")
    found = list(_settings(arguments[1:]))
    classes: dict[str, str] = {}
    for setting, value in found:  # the last one holds
        if setting.names[0] in CLASSES and setting.names[1:] in ((), ("class_path",)) and isinstance(value, str):
            classes[setting.names[0]] = value
    for part, name in classes.items():
        if name.count("."):
            parameters(name, part)
    for setting, value in found:
        _check(setting, value, command, classes)
    if classes.get("data") == PAIRS:
        numbers = {setting.names[-1]: value for setting, value in found if setting.names[0] == "data"}
        for name, value in numbers.items():
            check_number(name, int(value) if re.fullmatch(r"-?\d{1,9}", str(value)) else None)


def pairs_of(arguments: Sequence[str]) -> str | None:
    """The pairs that a `lightning` command line, checked by ``check_arguments``, is about to read.

    Returns:
        The last that was said of them; None where nothing is, or nothing will be read.
    """
    if not {"-h", "--help"}.isdisjoint(arguments) or any(each.startswith("--print_config") for each in arguments):
        return None
    if not arguments or arguments[0] not in COMMANDS:
        return None
    said = [value for at, value in _settings(arguments[1:]) if at.names[0] == "data" and at.names[-1] == "pairs"]
    return said[-1] if said and isinstance(said[-1], str) else None


def check_number(name: str, number: int | None) -> None:
    """Refuse a whole number that a setting of the pairs cannot be; others pass, and so does None.

    Raises:
        RequestError: says what it must be.
    """
    if number is None:
        return
    if number < (least := _LEAST.get(name, number)):
        raise RequestError(f"{name} must be at least {least}, got {number}")
    if name in ("resolution", "bucket_step") and number % 8:
        squares = ", or 0 for squares" if name == "bucket_step" else ""
        raise RequestError(f"{name} must be a multiple of 8{squares}, got {number}")


def grouped(kind: type[Group], settings: Mapping[str, Any], **others: Any) -> Group:
    """A dataclass of settings, its fields taken by name from settings that lie side by side; or given."""
    return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name not in others}, **others)


def check_choices(settings: Any, listed: bool = False) -> None:
    """Refuse what the ``Literal`` of a field does not have.

    Args:
        listed: whether the message names the choices as a list, not as a sentence.

    Raises:
        RequestError: names the field, what it was and what it may be.
    """
    for name, kind in get_type_hints(type(settings)).items():
        choices = get_args(kind)
        if get_origin(kind) is Literal and getattr(settings, name) not in choices:
            *rest, last = map(repr, choices)
            may = f"one of {choices}" if listed else f"{', '.join(rest)} or {last}"
            raise RequestError(f"{name} must be {may}, got {getattr(settings, name)!r}")


def with_configs(arguments: Sequence[str]) -> list[str]:
    """A `lightning` command line with the files of the configs that come along in place of their names."""
    found = list(arguments)
    for place, argument in enumerate(found):
        name = re.fullmatch(r"(-c=?|--config=)(.+)", argument, re.DOTALL)
        if place and found[place - 1] in ("-c", "--config"):
            found[place] = find_config(argument)
        elif name:
            found[place] = name[1] + find_config(name[2])
    return found


def _settings(arguments: Sequence[str]) -> Iterator[tuple[_Setting, Any]]:
    """Every setting of the command line and of the configs that it names, with its value, in their order."""
    waiting: str | None = None  # an option that may have a value yet
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument) and waiting not in ("c", "config"):
            name, equals, value = argument.lstrip("-").partition("=")
            if argument.startswith("-c") and len(argument) > 2 and not equals:
                name, equals, value = "c", "=", argument[2:]
            elif not argument.startswith("--") and name != "c":
                raise RequestError(f"unknown option {argument}: names of settings begin with two hyphens, --{name}")
            waiting = name if not equals and name not in _BARE_OPTIONS else None
            if name in ("c", "config"):
                yield from _of_config(value) if equals else ()
            elif name not in _BARE_OPTIONS:
                yield _Setting(tuple(name.rstrip("+").split(".")), None), value if equals else None
        elif waiting in ("c", "config"):
            yield from _of_config(argument)
            waiting = None
        elif waiting is not None:
            # the class of an object may be said so: --model.class_path NAME
            yield _Setting(tuple(waiting.rstrip("+").split(".")), None), argument
            waiting = None
        else:
            advice = f"a config is given with -c {argument}" if Path(argument).is_file() else "see --help"
            raise RequestError(f"nothing is expected at {shown(argument)} on the command line: {advice}")
    if waiting in ("c", "config"):
        raise RequestError("-c needs a config, for instance -c configs/msd.yaml")


def _of_config(name: str) -> Iterator[tuple[_Setting, Any]]:
    import yaml

    path = Path(find_config(name))
    text = name
    if not re.search(r"[\n{]|: |://", name):  # else an address, or the config itself
        if not path.is_file():
            there = sorted(str(file) for file in Path("configs").glob("*.yaml")) or config_names()
            near = difflib.get_close_matches(name, there, n=1)
            advice = (
                f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}" if there else "give its path"
            )
            raise RequestError(f"there is no config {name}: {advice}")
        text = path.read_text(encoding="utf-8")
    elif "://" in name:
        return
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or "it cannot be read"
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise RequestError(f"the config {shown(name)} is not YAML{where}: {said}") from None
    if not isinstance(record, Mapping):
        raise RequestError(
            f"the config {shown(name)} holds no settings: it must be names with values, as configs/msd.yaml"
        )
    for key, value in record.items():
        if not isinstance(value, Mapping):
            yield _Setting((str(key),), name), value
            continue
        for inner, content in value.items():
            if key in CLASSES and inner == "init_args" and isinstance(content, Mapping):
                for argument, given in content.items():
                    yield _Setting((str(key), "init_args", str(argument)), name), given
            else:
                yield _Setting((str(key), str(inner)), name), content


def _check(setting: _Setting, value: Any, command: str, classes: Mapping[str, str]) -> None:
    names = setting.names
    top = {"seed_everything", "trainer", *CLASSES} | parameters(TRAINER, "trainer", command)
    known: set[str] | None = top
    depth = 0
    if names[0] == "trainer" and len(names) > 1:
        known, depth = parameters(TRAINER, "trainer"), 1
    elif names[0] in CLASSES and len(names) > 1:
        depth = 2 if names[1] in _OBJECT_KEYS and len(names) > 2 else 1
        known = parameters(classes[names[0]], names[0]) if classes.get(names[0], "").count(".") else None
        if names[1] in ("dict_kwargs", "help"):
            known = None
        elif known is not None and depth == 1:
            known = known | _OBJECT_KEYS
    if known is not None and names[depth] not in known:
        raise RequestError(_unknown(setting, depth, known, _all(top, classes)))
    for content in value if isinstance(value, list) else [value]:
        if isinstance(content, Mapping) and isinstance(content.get("class_path"), str):
            _check_object(setting, content)


def _check_object(setting: _Setting, record: Mapping[str, Any]) -> None:
    """One of the callbacks, plugins, loggers, ... of a config."""
    name = record["class_path"]
    inside = _Setting((*setting.names, name.rpartition(".")[2]), setting.place)
    if wrong := [str(key) for key in record if key not in _OBJECT_KEYS]:
        raise RequestError(
            _unknown(_Setting((*inside.names, wrong[0]), setting.place), len(inside.names), _OBJECT_KEYS)
        )
    known = parameters(name, setting.written()) if "." in name else None
    for key in record.get("init_args") or ():
        if known is not None and key not in known:
            raise RequestError(_unknown(_Setting((*inside.names, str(key)), setting.place), len(inside.names), known))


def _all(top: set[str], classes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Last name of every setting there is to its names."""
    found = {name: (name,) for name in top}
    found |= {name: ("trainer", name) for name in parameters(TRAINER, "trainer") or ()}
    for part, name in classes.items():
        inside = parameters(name, part) if "." in name else None
        found |= {argument: (part, "init_args", argument) for argument in inside or ()}
    return found


def _unknown(
    setting: _Setting, depth: int, known: set[str], anywhere: Mapping[str, tuple[str, ...]] | None = None
) -> str:
    wrong, before = setting.names[depth], setting.names[:depth]
    told = setting.written(setting.names[: depth + 1])
    where = f" in {shown(setting.place)}" if setting.place else ""
    here = difflib.get_close_matches(wrong, sorted(known), n=1, cutoff=0.75)
    last = setting.names[-1]
    last = last if last in (anywhere or known) else _ELSEWHERE.get(last, last)
    if last in (anywhere or {}):
        right: tuple[str, ...] | None = anywhere[last]
    elif here:
        right = (*before, here[0])
    else:
        near = difflib.get_close_matches(last, sorted(anywhere or known), n=1)
        right = None if not near else anywhere[near[0]] if anywhere else (*before, near[0])
    advice = f"did you mean {setting.written(right)}?" if right else "--print_config shows every setting there is"
    return f"unknown setting {told}{where}: {advice}"


@functools.cache
def parameters(name: str, what: str, method: str = "__init__") -> set[str] | None:
    """Names of the parameters of a class's method, from its source.

    Args:
        name: module and class.
        what: whose class it is, for the message.

    Returns:
        None where it cannot be found out.

    Raises:
        RequestError: the class is one of this package, and there is none of that name.
    """
    module, _, wanted = name.rpartition(".")
    found = _class(module, wanted)
    if found is None:
        _check_ours(module, wanted, what)
        return None
    home, node = found
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == method:
            arguments = item.args
            names = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)} - {"self"}
            if method != "__init__":
                return names - _GIVEN_BY_LIGHTNING
            return None if arguments.kwarg else names
    for base in node.bases:
        if isinstance(base, ast.Name) and _class(home, base.id):
            return parameters(f"{home}.{base.id}", what, method)
    return None


def _check_ours(module: str, wanted: str, what: str) -> None:
    if module.split(".")[0] != __name__.split(".")[0]:
        return
    tree = _tree(module)
    if tree is None:
        folder = Path(__file__).parents[1]
        there = [
            ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts)) for path in folder.rglob("*.py")
        ]
        near = difflib.get_close_matches(module, there, n=1)
        right = f"{near[0]}.{wanted}" if near else None
    else:
        names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        names += [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
        near = difflib.get_close_matches(wanted, names, n=1)
        right = f"{module}.{near[0]}" if near else None
    advice = f"did you mean {right}?" if right else "see configs/msd.yaml for those there are"
    raise RequestError(f"{what}: there is no class {module}.{wanted}: {advice}")


@functools.cache
def _class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """(module that defines it, its source) of a class that can be imported from a module."""
    tree = _tree(module)
    for node in () if tree is None else tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and not node.level and node.module not in (None, module):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class(node.module, alias.name)
    return None


@functools.cache
def _tree(module: str) -> ast.Module | None:
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)  # of a top-level name: that imports nothing
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        path = Path(place, *rest)
        for file in (path / "__init__.py", path.with_suffix(".py") if rest else path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None
