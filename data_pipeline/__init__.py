"""From captioned videos to a training set of multi-subject pairs; and the procedural world."""

__version__ = "0.2.0"
