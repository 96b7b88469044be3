"""Where the things lie that come along: trained models and configs. Paths only: nothing is read here."""

from pathlib import Path

_PACKAGES = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGES / "msdiffusion" / "shipped"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _PACKAGES
"""Holds ``checkpoints`` and ``configs``: the repository, or the folder that setup.py makes of them in a wheel."""
EMBEDDED = SHIPPED / "checkpoints" / "tiny" / "mining"
EMBEDDED_DETECTOR = EMBEDDED / "detector"
EMBEDDED_SEGMENTER = EMBEDDED / "segmenter"
SEGMENTER_SIZES, SEGMENTER_WEIGHTS = EMBEDDED_SEGMENTER / "config.json", EMBEDDED_SEGMENTER / "model.safetensors"
