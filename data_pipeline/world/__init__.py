"""The procedural world: captioned clips and scenes with exact truth for boxes, masks and identities."""

from data_pipeline.world.palette import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS
from data_pipeline.world.scenes import Scene, render_background, sample_scene, write_caption
from data_pipeline.world.subjects import Identity, render_subject, sample_identity

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "PATTERNS",
    "Identity",
    "Scene",
    "render_background",
    "render_subject",
    "sample_identity",
    "sample_scene",
    "write_caption",
]
