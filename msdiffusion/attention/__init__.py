"""Attention of the denoiser, and what takes part in it."""
