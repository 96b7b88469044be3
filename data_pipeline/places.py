"""Where the repository keeps the models that mining needs no download for. Paths only: nothing is read here."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny" / "mining"
EMBEDDED_DETECTOR = EMBEDDED / "detector"
EMBEDDED_SEGMENTER = EMBEDDED / "segmenter"
SEGMENTER_SIZES, SEGMENTER_WEIGHTS = EMBEDDED_SEGMENTER / "config.json", EMBEDDED_SEGMENTER / "model.safetensors"
