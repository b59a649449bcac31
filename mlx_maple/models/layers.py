"""Leaves that more than one network needs: group normalisation and the embedding of time.

Legend   B batch; h, w rows and columns; C channels; G groups. Channels last.
Source   Wu and He 2018, Group Normalization (arXiv:1803.08494); Vaswani et al. 2017, section 3.5,
         in the form of Ho et al. 2020: CompVis/stable-diffusion @21f890f
         ldm/modules/diffusionmodules/util.py, timestep_embedding and GroupNorm32.
Differs  Statistics and sinusoids are float32 whatever the weights' type, as in the source; the
         reference in half precision (diffusers) leaves the former to the framework.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

MAX_PERIOD = 10_000  # the slowest sinusoid turns once in 2 pi times this many timesteps


class GroupNorm(nn.Module):
    """Normalise each group of neighbouring channels of one sample: (B, h, w, C) to the same.

    The groups and the biased variance are those of torch. ``mlx.nn.GroupNorm`` agrees only with
    ``pytorch_compatible=True``, and then, on the CPU, adds up a whole group in one float32 run: on
    a 256x256 picture that is wrong in the fourth digit. Here a row is averaged first, then the
    rows.

    Args:
        groups: G; must divide ``channels``.
        channels: C.
        eps: added to the variance. No default: the networks use 1e-5 and 1e-6 in different places.
    """

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"[GroupNorm] {channels} channels do not split into {groups} groups.")
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        centred = x.astype(mx.float32)
        centred = centred - self._group_mean(centred)
        scale = mx.rsqrt(self._group_mean(mx.square(centred)) + self.eps) * self.weight
        return (centred * scale + self.bias).astype(x.dtype)

    def _group_mean(self, x: mx.array) -> mx.array:
        """Mean over h, w and a group's channels, repeated for each channel: (B, 1, 1, C)."""
        channel_means = x.mean(axis=2).mean(axis=1)  # (B, C)
        grouped = channel_means.reshape(x.shape[0], self.groups, -1)  # (B, G, C / G)
        means = mx.broadcast_to(grouped.mean(axis=-1, keepdims=True), grouped.shape)
        return means.reshape(x.shape[0], 1, 1, -1)


def sinusoids(timesteps: mx.array, width: int) -> mx.array:
    """Places in time as waves of falling frequency: (B,) to (B, width), float32.

    The cosines come first, then the sines (``flip_sin_to_cos`` in diffusers), and the frequencies
    reach 1 / MAX_PERIOD only in the limit (``freq_shift`` 0). An odd width is padded with a zero.

    Args:
        timesteps: (B,), 0 to 999, fractions allowed.
        width: number of waves; half of them cosines.
    """
    half = width // 2
    # Made with numpy in the order of the reference's float32 operations: at t = 999 one unit in the
    # last place of a frequency is 6e-5 of a radian.
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    frequencies = mx.array(np.exp(exponents / np.float32(half)))
    angles = timesteps.astype(mx.float32)[:, None] * frequencies
    waves = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
    return mx.pad(waves, [(0, 0), (0, width % 2)]) if width % 2 else waves


def guidance_waves(scales: mx.array, width: int) -> mx.array:
    """Guidance scales as waves, for networks that are told them: (B,) to (B, width), float32.

    Unlike those of time the sines come first and the slowest wave is 1 / MAX_PERIOD itself; a scale
    of 1, which is no guidance, is 0. Reference: Luo et al. 2023 (arXiv:2310.04378), section 4.2, as
    diffusers 0.42.1 has it (pipeline_latent_consistency_text2img.py).
    """
    half = width // 2
    exponents = np.float32(-math.log(MAX_PERIOD) / (half - 1)) * np.arange(half, dtype=np.float32)
    angles = (scales.astype(mx.float32) - 1)[:, None] * 1000 * mx.array(np.exp(exponents))
    waves = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
    return mx.pad(waves, [(0, 0), (0, width % 2)]) if width % 2 else waves


class TimeEmbedding(nn.Module):
    """Two layers that turn sinusoids into what every residual block is told: (B, C) to (B, D).

    Args:
        channels: C.
        time_channels: D.
        guidance_channels: waves of a guidance scale that are added to the sinusoids; None for most
            networks, which are told none.
    """

    def __init__(
        self, channels: int, time_channels: int, guidance_channels: int | None = None
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)
        if guidance_channels is not None:
            self.cond_proj = nn.Linear(guidance_channels, channels, bias=False)

    def __call__(self, waves: mx.array, guidance: mx.array | None = None) -> mx.array:
        """Embed ``waves``; ``guidance`` (B,) are scales, where the network is told them."""
        if guidance is not None:
            weight = self.cond_proj.weight
            told = guidance_waves(guidance.reshape(-1), weight.shape[1]).astype(waves.dtype)
            waves = waves + self.cond_proj(told)
        return self.linear_2(nn.silu(self.linear_1(waves)))
