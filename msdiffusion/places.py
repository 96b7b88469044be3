"""Where the repository keeps what it ships. Paths only: nothing is read or made here."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = REPOSITORY / "checkpoints" / "tiny"
"""The embedded default: an adapter's folder with its base model, its image encoder and the judge beside it."""


def shown(path: str | Path) -> str:
    """A path for people and for files that travel: relative to the repository or to the working directory if inside."""
    place = Path(path).resolve()
    for root in (Path.cwd(), REPOSITORY):
        if place.is_relative_to(root):
            return str(place.relative_to(root))
    return str(path)
