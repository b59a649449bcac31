"""Stable Diffusion on Apple's MLX: any checkpoint file in, pictures out."""

from mlx_maple import _openblas

# Before anything imports mlx.core, or MLX on Linux CPU stays with its slow BLAS.
_OPENBLAS = _openblas.preload()

__version__ = "0.1.0"
