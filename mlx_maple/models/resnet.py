"""The convolutional blocks that the UNet and the VAE share: residual block, halving, doubling.

Legend   B batch; h, w rows and columns; C channels; D width of the time embedding. Channels last.
Source   He et al. 2015 (arXiv:1512.03385) as in Ho et al. 2020 (arXiv:2006.11239); CompVis/
         stable-diffusion @21f890f ldm/modules/diffusionmodules/openaimodel.py (ResBlock,
         Downsample, Upsample) and model.py (the same three, without time).
Differs  One class for both networks: the VAE's blocks have no time and another eps. The 1x1
         shortcut is a Linear layer. Parameter names are those of diffusers 0.42.1.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models.layers import GroupNorm


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip: (B, h, w, C_in) to (B, h, w, C_out).

    Args:
        in_channels: C_in.
        out_channels: C_out; where it differs, the skip is projected.
        groups: groups of both norms.
        eps: of both norms: 1e-5 in the UNet, 1e-6 in the VAE.
        time_channels: D of the time embedding that is added between the convolutions, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Linear(in_channels, out_channels)

    def __call__(self, x: mx.array, time: mx.array | None = None) -> mx.array:
        """Refine ``x``; ``time`` is (B, D), or (1, D) for the whole batch."""
        y = self.conv1(nn.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(nn.silu(time))[:, None, None, :]
        y = self.conv2(nn.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if "conv_shortcut" in self else x)


class Downsample(nn.Module):
    """A 3x3 convolution that takes every other pixel: (B, h, w, C) to (B, ~h/2, ~w/2, C).

    Args:
        channels: C.
        symmetric: pad one pixel on all four sides (the UNet), or only at the right and bottom (the
            VAE's encoder, which then sees other pixels at every level). Odd sizes are rounded up
            by the former and down by the latter.
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        self.symmetric = symmetric

    def __call__(self, x: mx.array) -> mx.array:
        sides = (1, 1) if self.symmetric else (0, 1)
        return self.conv(mx.pad(x, [(0, 0), sides, sides, (0, 0)]))


class Upsample(nn.Module):
    """Each pixel four times, then a 3x3 convolution: (B, h, w, C) to (B, 2h, 2w, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def __call__(self, x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
        """Double ``x``, or bring it to ``size``, which may be one row or column short of double.

        The reference resizes to ``size`` by nearest neighbour. For 2n - 1 rows from n that picks
        row floor(i n / (2n - 1)) = floor(i / 2) for every i: doubling, and dropping the last row.
        """
        x = double(x)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return self.conv(x)


def double(x: mx.array) -> mx.array:
    """Nearest-neighbour doubling: (B, h, w, C) to (B, 2h, 2w, C)."""
    batch, rows, columns, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
    return x.reshape(batch, 2 * rows, 2 * columns, channels)
