"""Whether a UNet predicts the noise or the velocity, seen from what it does.

Source   Salimans & Ho 2022 (arXiv:2202.00512): with x = a clean + s noise, where a^2 + s^2 = 1, the
         velocity is a noise - s clean. At the last timestep of Stable Diffusion's schedule a is
         0.068: x is noise, which the one kind of network repeats and the other does not.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_maple.models import UNetConfig

LAST_TIMESTEP = 999.0
CELLS = 16  # of the latents that are looked at, along a side
TOKENS = 77
REPEATS = 0.5  # a network that predicts noise repeats it nearly whole, one of velocity 0.068 of it

UNetCall = Callable[[mx.array, mx.array, mx.array], mx.array]


def seen_prediction(unet: UNetCall, config: UNetConfig) -> tuple[str, float]:
    """What a UNet predicts, and how far its answer to noise is that noise: a correlation, -1 to 1.

    Args:
        unet: called as models.UNet, once, with a prompt of zeros.
        config: its config.
    """
    drawn = np.random.default_rng(0).standard_normal((1, CELLS, CELLS, config.in_channels))
    noise = mx.array(drawn.astype(np.float32))
    context = mx.zeros((1, TOKENS, config.cross_attention_dim))
    answer = unet(noise, mx.array([LAST_TIMESTEP]), context)
    seen = np.array(answer.astype(mx.float32)).ravel()
    given = np.array(noise[..., : answer.shape[-1]]).ravel()
    share = 0.0
    if np.isfinite(seen).all() and seen.std() > 0:
        share = float(np.corrcoef(seen, given)[0, 1])
    return ("epsilon" if share > REPEATS else "v_prediction"), share
