"""The procedural world: captioned clips and scenes with exact truth for boxes, masks and identities."""

from data_pipeline.world.clips import Clip, sample_clip, write_clips
from data_pipeline.world.palette import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS
from data_pipeline.world.scenes import Scene, render_background, sample_scene, write_caption
from data_pipeline.world.subjects import Identity, render_subject, sample_identity

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "PATTERNS",
    "Clip",
    "Identity",
    "Scene",
    "render_background",
    "render_subject",
    "sample_clip",
    "sample_identity",
    "sample_scene",
    "write_caption",
    "write_clips",
]
