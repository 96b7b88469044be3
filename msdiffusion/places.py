"""Where the things lie that come along, what they are called, and how paths are shown. Nothing is read or made here."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.places import SHIPPED

REPOSITORY = Path(__file__).resolve().parents[1]
"""For tests and documents: where pip has installed the package, this is no repository."""
DEFAULT_MODEL = SHIPPED / "checkpoints" / "tiny"
"""The embedded default: an adapter's folder with its base model, its image encoder and the judge beside it."""
CONFIGS = SHIPPED / "configs"
EMBEDDED = "embedded"
"""What the embedded default is called where a model is asked for."""


def find_model(place: str | Path) -> str:
    """A model's folder as somebody names it, in an argument or a config, to where it is.

    Args:
        place: "embedded" is the embedded default, "embedded/base" its base model, and so on; "checkpoints/tiny/base" is
            the same in words of the repository, as the configs have it.

    Returns:
        The place as it was given where something of that name lies in the working directory, or nothing came along
        that is called so.
    """
    first, slash, rest = str(place).partition("/")
    if (first == EMBEDDED and bool(rest) == bool(slash)) or (first == "checkpoints" and rest):
        shipped = DEFAULT_MODEL / rest if first == EMBEDDED else SHIPPED / place
        if ".." not in shipped.parts and shipped.is_dir() and not Path(place).exists():
            return str(shipped)
    return str(place)


def config_names() -> list[str]:
    """The configs that come along, as paths inside their folder: ``msd.yaml``, ``strategies/sharded.yaml``, ..."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def find_config(name: str) -> str:
    """The file of a config: the one of that name in the working directory, else the one that comes along.

    Args:
        name: a path; or, for one that comes along, ``msd.yaml`` or ``configs/msd.yaml``.

    Returns:
        The name as it was given where it is neither.
    """
    inside = name.removeprefix("configs/")
    return str(CONFIGS / inside) if inside in config_names() and not Path(name).is_file() else name


def shown(path: str | Path) -> str:
    """A path for people and for files that travel: relative to the working directory, or as the repository has it."""
    place = Path(path).resolve()
    for root in (Path.cwd(), SHIPPED):
        if place.is_relative_to(root):
            return str(place.relative_to(root))
    return str(path)


def from_here(path: Path) -> str:
    """A path for a command that is started here: relative if it lies inside the working directory, else absolute."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
