"""What can be seen of a drawing while it goes on."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_maple import images
from mlx_maple.drawing.jobs import Job
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.drawing.results import FloatArray
from mlx_maple.models import AutoencoderKL


def fit_latent_rgb_factors(vae: AutoencoderKL, latents: FloatArray) -> list[list[float]]:
    """The linear preview that suits an autoencoder: C rows of weights and a row of offsets.

    Args:
        vae: its decoder is run once.
        latents: (B, h, w, C) scaled latents of pictures such as the model draws. A linear map is no
            decoder: it fits well the colours that it was fitted to.
    """
    pixels = np.array(vae.decode(mx.array(latents)).astype(mx.float32))
    return images.solve_rgb_factors(latents, np.nan_to_num(pixels))


class Previews:
    """What can be seen of one drawing while it goes on.

    A model that brings no factors for linear previews has them fitted to the picture as far as it
    is drawn: when the first preview is asked for, and again at twice as many steps.
    """

    def __init__(self, sd: DiffusionModel, job: Job) -> None:
        self._sd = sd
        self._is_taesd = job.preview == "taesd"
        self._factors = sd.latent_rgb_factors
        self._is_fitted = self._factors is None
        self._fitted_at = 0
        self._size = job.size

    def of(self, index: int, denoised: mx.array) -> Callable[[int], Image.Image]:
        """A function from a picture's number to its preview, after ``index`` steps."""

        def preview(image: int) -> Image.Image:
            if self._is_taesd and self._sd.taesd is not None:
                decoded = self._sd.taesd.decode(denoised[image : image + 1]).astype(mx.float32)
                return images.to_image(np.array(decoded)[0])
            # These latents are evaluated, and numpy does not wait for the step that runs now.
            seen = np.array(denoised)[image]
            if self._factors is None or (self._is_fitted and index >= 2 * self._fitted_at):
                self._factors = fit_latent_rgb_factors(self._sd.vae, seen[None])
                self._sd.networks.release("vae")
                self._fitted_at = index
            return images.linear_preview(seen, self._factors, self._size)

        return preview
