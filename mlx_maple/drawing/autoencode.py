"""Pictures to latents and back; in float32 where the weights' dtype fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from mlx_maple import images
from mlx_maple.drawing.model import DiffusionModel, dtype_name
from mlx_maple.drawing.results import FloatArray
from mlx_maple.engine.prepare import PreparedVAE
from mlx_maple.models import TAESD


def encode(sd: DiffusionModel, picture: Image.Image, notes: list[str]) -> tuple[mx.array, mx.array]:
    """Mean and standard deviation of a picture's latents, each (1, h, w, C) float32."""
    return moments(sd, images.to_pixels(picture), notes)


def moments(sd: DiffusionModel, values: FloatArray, notes: list[str]) -> tuple[mx.array, mx.array]:
    """The same of pixels (H, W, 3) in [-1, 1]."""
    pixels = mx.array(values)[None]
    if isinstance(sd.vae, PreparedVAE):
        sd.vae.encoder.wait(sd.max_memory is not None)

    def moments() -> tuple[mx.array, mx.array]:
        vae: Any = sd.vae
        if isinstance(vae, TAESD):  # it knows one answer, and no other near it
            mean = vae.encode(pixels).astype(mx.float32)
            found = mean, mx.zeros_like(mean)
        else:
            mean, logvar = vae.encode(pixels)
            found = mean.astype(mx.float32), mx.exp(logvar.astype(mx.float32) / 2)
        mx.eval(found)
        return found

    found = moments()
    if not bool(mx.isfinite(found[0]).all()) and sd.dtype_of("vae") != mx.float32:
        notes.append(
            f"encoding the image overflowed {dtype_name(sd.dtype_of('vae'))}: done in float32"
        )
        with _in_float32(sd.vae):
            found = moments()
    return found


def decode(sd: DiffusionModel, latents: mx.array, notes: list[str]) -> Image.Image:
    """Latents (1, h, w, C) to a picture; in float32 where the weights' dtype fails."""
    if isinstance(sd.vae, PreparedVAE):
        sd.vae.decoder.wait(sd.max_memory is not None)

    def drawn() -> tuple[Image.Image, str]:
        pixels = sd.vae.decode(latents)[0].astype(mx.float32)
        shown = as_bytes(pixels)
        is_finite, brightest = mx.isfinite(pixels).all(), shown.max()
        mx.eval(shown, is_finite, brightest)
        fault = "as NaN" if not is_finite.item() else "" if brightest.item() else "black"
        return Image.fromarray(np.array(shown)), fault

    picture, fault = drawn()
    if fault:
        dtype = sd.dtype_of("vae")
        if not bool(mx.isfinite(latents).all()):
            name = dtype_name(sd.dtype_of("unet"))
            notes.append(f"the latents are not finite, the picture is lost (UNet in {name})")
        elif dtype == mx.float32:
            notes.append(f"the picture was decoded {fault}")
        else:
            with _in_float32(sd.vae):
                picture, still = drawn()
            again = f", and is {still} there too" if still else ""
            name = dtype_name(dtype)
            notes.append(f"the picture was decoded {fault} in {name}: done in float32{again}")
    return picture


def as_bytes(pixels: mx.array) -> mx.array:
    """Pixels in [-1, 1], float32, as the 8-bit numbers of ``images.to_image``, on the device.

    They are a quarter of what would be brought back otherwise, and each number is the same.
    """
    unit = pixels * 0.5 + 0.5
    unit = mx.where(unit > 0, mx.minimum(unit, 1), 0)  # NaN is no more than 0
    return mx.round(unit * 255).astype(mx.uint8)


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """The module with its weights in float32 for a while."""
    kept = module.parameters()
    module.update(tree_map(lambda weight: weight.astype(mx.float32), kept))
    try:
        yield
    finally:
        module.update(kept)
