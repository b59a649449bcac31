"""Stable Diffusion on Apple's MLX: any checkpoint file in, pictures out."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from mlx_maple import _openblas

# Before anything imports mlx.core, or MLX on Linux CPU stays with its slow BLAS.
_OPENBLAS = _openblas.preload()

# MLX reads this once, at its first work on a GPU. On CUDA its host side is what bounds a network of
# this size, and building a graph of every hundred kernels costs it more than launching them does:
# 12.4 ms a guided step against 8.0, before anything else was done for speed (MLX 0.32.4).
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
# There MLX gives buffers back when a batch of operations is done: of 20, not 100. Drawing in 1 GB
# beside the networks then takes no longer than in 3 GB: 141 ms a picture on an H200, before 149.
if sys.platform != "darwin":
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlx_maple.hub import HubError as HubError
    from mlx_maple.loading import NoModel as NoModel
    from mlx_maple.loading import load as load
    from mlx_maple.pipeline import Info as Info
    from mlx_maple.pipeline import Progress as Progress
    from mlx_maple.pipeline import Result as Result
    from mlx_maple.pipeline import StableDiffusion as StableDiffusion

# Each public name and the module that holds it, imported when it is first asked for: `maple --help`
# and the converter's verbs need no MLX.
_PUBLIC = {
    "load": "loading",
    "HubError": "hub",
    "NoModel": "loading",
    "Info": "pipeline",
    "Progress": "pipeline",
    "Result": "pipeline",
    "StableDiffusion": "pipeline",
}

__all__ = ["HubError", "Info", "NoModel", "Progress", "Result", "StableDiffusion", "load"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
