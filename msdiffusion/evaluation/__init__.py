"""Scoring pictures: pure statistics, a judge for the procedural world, frozen benchmark sets, reports.

The files in here take pictures and callables, never a generator class, so pictures from anywhere can be scored. Nothing
is imported eagerly: `scores` needs numpy only, `judge` needs torch.
"""
