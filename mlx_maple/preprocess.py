"""Pictures made ready to steer a drawing: edges, scribbles, inverted lines. No network is needed.

Legend   H, W pixel rows and columns. Pictures are 8-bit RGB, before and after.
Source   Canny 1986 (IEEE PAMI 8:679) as OpenCV's Canny computes it, bit for bit: Sobel gradients of
         the channel that changes most, the sum of their magnitudes, thresholds with hysteresis.
         Scribble and invert: Mikubill/sd-webui-controlnet's preprocessors of those names.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CANNY_LOW, CANNY_HIGH = 100, 200  # thresholds in use everywhere; the gradients reach 2040
SCRIBBLE_DARK = 127  # a pixel counts as drawn where some channel is darker

_SHIFT = 15
_TAN_22 = int(0.4142135623730950488 * (1 << _SHIFT) + 0.5)  # OpenCV's fixed point
_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]

Ints = NDArray[np.int64]


def as_it_is(picture: Image.Image) -> Image.Image:
    """The picture itself: a map that was made elsewhere, such as depth, a pose or edges."""
    return picture


def invert(picture: Image.Image) -> Image.Image:
    """Light for dark: for line art on white, where networks were trained on lines on black."""
    return Image.fromarray(255 - np.asarray(picture))


def scribble(picture: Image.Image) -> Image.Image:
    """White lines on black from dark lines on white."""
    drawn = np.asarray(picture).min(axis=2) < SCRIBBLE_DARK
    return _white_where(drawn)


def canny(picture: Image.Image, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Image.Image:
    """Edges, one pixel wide, white on black.

    Args:
        picture: RGB.
        low: an edge goes on while its gradient is above this.
        high: and begins where it is above that.
    """
    low, high = int(min(low, high)), int(max(low, high))
    across, down = _gradients(np.asarray(picture, np.int64))
    strength = np.pad(np.abs(across) + np.abs(down), 1)  # nothing beyond the border competes
    thin = _is_ridge(strength, across, down) & (strength[1:-1, 1:-1] > low)
    return _white_where(_connected(thin, thin & (strength[1:-1, 1:-1] > high)))


PREPROCESSORS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": as_it_is,
    "canny": canny,
    "scribble": scribble,
    "invert": invert,
}


def _gradients(pixels: Ints) -> tuple[Ints, Ints]:
    """Sobel gradients to the right and down (H, W), of whichever channel changes most."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    beside = padded[:, 2:] - padded[:, :-2]
    across = beside[:-2] + 2 * beside[1:-1] + beside[2:]
    below = padded[2:] - padded[:-2]
    down = below[:, :-2] + 2 * below[:, 1:-1] + below[:, 2:]
    most = (np.abs(across) + np.abs(down)).argmax(axis=2)[..., None]  # the first of equals
    pick = [np.take_along_axis(each, most, axis=2)[..., 0] for each in (across, down)]
    return pick[0], pick[1]


def _is_ridge(strength: Ints, across: Ints, down: Ints) -> NDArray[np.bool_]:
    """Where a gradient is the largest of its two neighbours along its direction, (H, W)."""

    def beside(y: int, x: int) -> Ints:
        rows, columns = across.shape
        return strength[1 + y : 1 + y + rows, 1 + x : 1 + x + columns]

    here = beside(0, 0)
    wide, tall = np.abs(across), np.abs(down) << _SHIFT
    flat = wide * _TAN_22
    steep = flat + (wide << (_SHIFT + 1))
    horizontal = (here > beside(0, -1)) & (here >= beside(0, 1))
    vertical = (here > beside(-1, 0)) & (here >= beside(1, 0))
    falling = (here > beside(-1, -1)) & (here > beside(1, 1))
    rising = (here > beside(-1, 1)) & (here > beside(1, -1))
    diagonal = np.where((across ^ down) < 0, rising, falling)
    return np.where(tall < flat, horizontal, np.where(tall > steep, vertical, diagonal))


def _connected(thin: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The ``thin`` pixels that hang together with a ``strong`` one, corners included."""
    waiting = np.pad(thin & ~strong, 1)
    found = np.pad(strong, 1)
    rows, columns = np.nonzero(found)
    while rows.size:  # each round looks at the pixels that the last one found, and no others
        next_rows = np.concatenate([rows + y for y, _ in _AROUND])
        next_columns = np.concatenate([columns + x for _, x in _AROUND])
        is_new = waiting[next_rows, next_columns]
        flat = np.unique(next_rows[is_new] * waiting.shape[1] + next_columns[is_new])
        rows, columns = np.divmod(flat, waiting.shape[1])
        found[rows, columns] = True
        waiting[rows, columns] = False
    return found[1:-1, 1:-1]


def _white_where(is_white: NDArray[np.bool_]) -> Image.Image:
    grey = np.where(is_white, 255, 0).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))
