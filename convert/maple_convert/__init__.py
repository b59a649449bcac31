"""Stable Diffusion checkpoints read, recognised, renamed and written, without torch."""
