"""Maps that continue at their opposite edge, as the convolutions of a closed network see them.

Legend   B batch; h, w rows and columns; N = h w pixels; C channels. Channels last. ``closed`` says
         of rows and columns whether they are.
Source   models/seamless.py, whose arithmetic this is.
Differs  What surrounds a map is gathered by one kernel, where joining parts is a copy for each.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_maple.engine.kernels import Size
from mlx_maple.models.seamless import wrapped

# Pixels of all samples, above which parts are joined: there copies are fast, and a number for each
# pixel that is gathered would take memory of its own.
GATHERED_PIXELS = 1 << 16


def around(x: mx.array, closed: tuple[bool, bool]) -> mx.array:
    """A map (B, h, w, C) with one pixel of the opposite edge on either side of each closed axis."""
    batch, rows, columns, channels = x.shape
    if batch * rows * columns > GATHERED_PIXELS:
        for axis in (1, 2):
            x = wrapped(x, axis, int(closed[axis - 1]))
        return x
    places = _around((batch, rows, columns), closed)
    found = mx.take(x.reshape(-1, channels), mx.array(places.reshape(-1)), axis=0)
    return found.reshape(*places.shape, channels)


def neighbours(x: mx.array, size: Size, closed: tuple[bool, bool]) -> mx.array:
    """Each pixel's 3x3 neighbourhood in reading order, zeros beyond an edge that is open.

    Args:
        x: pixels (B N, C).
        size: B, h and w.
        closed: whether rows and columns are.

    Returns:
        (B N, 9 C), as kernels write it of open maps.
    """
    pixels, channels = x.shape
    if not all(closed):
        x = mx.pad(x, [(0, 1), (0, 0)])  # a pixel of zeros, which stands beyond
    places = mx.array(_neighbours(size, closed).reshape(-1))
    return mx.take(x, places, axis=0).reshape(pixels, 9 * channels)


@lru_cache(maxsize=32)
def _around(size: Size, closed: tuple[bool, bool]) -> NDArray[np.int32]:
    """Which pixel of all samples stands at each place: (B, h or h + 2, w or w + 2)."""
    down, right = (
        np.arange(-1, side + 1) % side if closes else np.arange(side)
        for side, closes in zip(size[1:], closed, strict=True)
    )
    return _numbered(size)[:, down[:, None], right]


@lru_cache(maxsize=32)
def _neighbours(size: Size, closed: tuple[bool, bool]) -> NDArray[np.int32]:
    """Which pixel of all samples is each neighbour: (B, h, w, 3, 3), behind the last one none."""
    numbers = _numbered(size)
    beyond = np.int32(numbers.size)
    for axis, closes in enumerate(closed, 1):
        sides = [(0, 0)] * 3
        sides[axis] = (1, 1)
        if closes:
            numbers = np.pad(numbers, sides, mode="wrap")
        else:
            numbers = np.pad(numbers, sides, constant_values=beyond)
    return np.lib.stride_tricks.sliding_window_view(numbers, (3, 3), axis=(1, 2))


def _numbered(size: Size) -> NDArray[np.int32]:
    return np.arange(np.prod(size), dtype=np.int32).reshape(size)
