"""What `pip install msdiffusion` leaves out because it only draws: the extras of setup.cfg, and how one gets them."""

from importlib.util import find_spec

from data_pipeline.errors import InputError

MODULES = {
    "mining": ("av", "cv2", "fontTools", "pyarrow", "scenedetect", "scipy", "segment_anything", "timm"),
    "training": ("aiohttp", "fsspec", "jsonargparse", "matplotlib", "pyarrow", "pytorch_lightning", "scipy",
                 "tensorboard"),
    "evaluation": ("matplotlib", "scipy"),
    "ray": ("ray",),
}  # fmt: skip
"""Top-level modules that every use of an extra needs; what only a choice needs is told by the choice."""


def missing_extras(*extras: str) -> str | None:
    """One sentence with the command that installs what is missing; nothing is imported. None where all is there.

    extras: names in ``MODULES`` of what is about to be used.
    """
    lacking = {extra: [name for name in MODULES[extra] if find_spec(name) is None] for extra in extras}
    short = [extra for extra in extras if lacking[extra]]
    if not short:
        return None
    names = sorted({name for extra in short for name in lacking[extra]})
    some = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    asked = f"[{','.join(short)}]"
    are = "is" if len(names) == 1 else "are"
    return f'{some} {are} not installed: pip install ".{asked}", in a checkout of msdiffusion'


def need_extras(*extras: str) -> None:
    """InputError where something of these extras is missing; the first thing that a command of this package does."""
    if told := missing_extras(*extras):
        raise InputError(told)
