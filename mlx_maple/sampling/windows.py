"""Drawings larger than a network draws well: predictions of overlapping windows, put together.

Legend   B pictures; h, w latent rows and columns; C channels; W a window's weight at each cell.
         Channels last.
Source   Bar-Tal et al. 2023, MultiDiffusion (arXiv:2302.08113), equation 5: in every step each cell
         takes the weighted mean of what the windows over it predict.
Differs  The weights fall towards a window's edges, where a window knows least of what surrounds a
         cell, as in Mixture of Diffusers (arXiv:2302.02412); the former's own are all 1. What is
         averaged is the prediction before the sampler's step and not after it; for steps that are
         linear in the prediction that is the same.
"""

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

Model = Callable[[mx.array, float], mx.array]


def windowed(model: Model, window: int, overlap: float = 0.5) -> Model:
    """The model for latents of any size, asked about ``window`` x ``window`` cells at a time.

    Latents that are no larger go through as they are.

    Args:
        model: (latents (B, h, w, C), timestep) -> prediction, of the same shape.
        window: latent cells a side.
        overlap: the least share of a window that its neighbours see too, 0 to 0.9.

    Raises:
        ValueError: for a window of no cells or another overlap.
    """
    if window < 1 or not 0 <= overlap <= 0.9:
        raise ValueError(f"[windowed] a window of {window} cells, overlap {overlap}: not possible.")

    def call(latents: mx.array, timestep: float) -> mx.array:
        rows, columns = latents.shape[1:3]
        if rows <= window and columns <= window:
            return model(latents, timestep)
        height, width = min(window, rows), min(window, columns)
        weights = mx.array(np.outer(_ramp(height), _ramp(width))[None, :, :, None])
        total = mx.zeros((1, rows, columns, 1))
        out = mx.zeros(latents.shape)
        last: mx.array | None = None
        for row, column in _places(rows, columns, window, overlap):
            part = latents[:, row : row + height, column : column + width]
            if last is not None:  # in turn: one window's memory
                part = mx.depends([part], [last])[0]
            last = model(part, timestep)
            spot = (slice(None), slice(row, row + height), slice(column, column + width))
            out = out.at[spot].add(weights * last)
            total = total.at[spot].add(weights)
        return out / total

    return call


def starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin that cover ``size`` cells, evenly and with at least this overlap."""
    if size <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / stride) + 1
    return [round(i * (size - window) / (count - 1)) for i in range(count)]


def _places(rows: int, columns: int, window: int, overlap: float) -> Iterator[tuple[int, int]]:
    for row in starts(rows, window, overlap):
        for column in starts(columns, window, overlap):
            yield row, column


def _ramp(size: int) -> np.ndarray:
    """Weights along one side: 1 in the middle, falling to little, not nothing, at the ends."""
    steps = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1))
    return (steps / steps.max()).astype(np.float32)
