"""Larger latents and larger pictures, for a second drawing on top of a first ("hires fix").

Legend   B pictures; h, w latent rows and columns; C channels. Channels last.
Source   AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/processing.py (sample_hr_pass) and
         modules/shared_items.py: its "Latent" is torch's bilinear interpolation, corners unaligned.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FloatArray = NDArray[np.float32]

BUILT_IN = ("latent", "lanczos")
MOST_PIXELS = 120_000_000  # of an enlarged picture


class Upscaler(Protocol):
    """A picture to a larger one, by the factor that it has."""

    @property
    def scale(self) -> float:
        """How many times larger a picture becomes."""
        ...

    def __call__(self, image: Image.Image) -> Image.Image:
        """The larger picture."""
        ...


def enlarged(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """The width and height that a network of this factor makes of another.

    Raises:
        ValueError: if they are more than ``MOST_PIXELS``.
    """
    width, height = (round(side * scale) for side in size)
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{width}x{height} are more than {MOST_PIXELS:,} pixels: enlarge a smaller one."
        )
    return width, height


def bilinear(latents: FloatArray, rows: int, columns: int) -> FloatArray:
    """Latents (B, h, w, C) to (B, rows, columns, C), each number from its four neighbours."""
    for axis, size in ((1, rows), (2, columns)):
        known = latents.shape[axis]
        # The middle of each new cell, in cells of the old; nothing lies outside of the middles.
        places = np.clip((np.arange(size) + 0.5) * known / size - 0.5, 0, known - 1)
        below = np.floor(places).astype(int)
        above = np.minimum(below + 1, known - 1)
        share = (places - below).astype(np.float32)
        share = share.reshape([-1 if i == axis else 1 for i in range(latents.ndim)])
        first, second = latents.take(below, axis), latents.take(above, axis)
        latents = first + share * (second - first)
    return latents.astype(np.float32)


def larger(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """A width and a height times ``scale``, rounded down to multiples."""
    width, height = (int(side * scale) // multiple * multiple for side in size)
    return width, height
