"""The embedded detector and segmenter: a tiny Grounding DINO and a tiny SAM, trained on the procedural world."""
