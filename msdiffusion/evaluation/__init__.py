"""Scoring pictures: pure statistics, a judge for the procedural world, frozen benchmark sets, reports.

The rooms in here take pictures and callables, never a generator class, so a folder of pictures from anywhere can be scored.
Nothing is imported eagerly: `scores` needs numpy only, `judge` needs torch.
"""
