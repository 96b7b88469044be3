"""MS-Diffusion: pictures of your own subjects, each in its own box, in the scene that the prompt names.

``from msdiffusion import MSDiffusion`` is the door. Importing the package itself loads no heavy library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline import __version__
from msdiffusion.errors import (
    DataError,
    LayoutError,
    MSDiffusionError,
    PhraseError,
    RequestError,
    TrainingError,
    WeightsError,
)

if TYPE_CHECKING:
    from msdiffusion.generation.generate import MSDiffusion

__all__ = [
    "DataError",
    "LayoutError",
    "MSDiffusion",
    "MSDiffusionError",
    "PhraseError",
    "RequestError",
    "TrainingError",
    "WeightsError",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Load the generator, and with it torch and diffusers, only when it is asked for."""
    if name == "MSDiffusion":
        from msdiffusion.generation.generate import MSDiffusion

        return MSDiffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
