"""T2I-Adapter: a small network that reads a picture once and adds to a UNet's way down.

Legend   B batch; H, W pixel rows and columns; C channels. Channels last.
Source   Mou et al. 2023 (arXiv:2302.08453); TencentARC/T2I-Adapter ldm/modules/encoders/adapter.py,
         class Adapter; for SDXL as in diffusers 0.42.1 models/adapter.py (FullAdapterXL).
Differs  1x1 convolutions are Linear layers. Tolerances: tests/parity/test_control_parity.py.
Names    Those of diffusers 0.42.1 without "adapter."; convert/maple_convert/layouts/t2i_adapter.py
         maps published checkpoints onto these.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """Architecture facts of one published adapter; the defaults are SD 1.x.

    Attributes:
        hint_channels: 3 of a picture in colour, 1 of a grey one.
        channels: C of each stage, fine to coarse.
        layers: residual blocks a stage.
        downscale: pixels a side that become one cell of the first stage: 8, of SDXL 16.
        halves: before which stages h and w are halved.
    """

    hint_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    downscale: int = 8
    halves: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        owner = "T2IAdapterConfig"
        checks.integer(owner, "hint_channels", self.hint_channels, 1, checks.MAX_WIDTH)
        checks.integer(owner, "layers", self.layers, 1, checks.MAX_LAYERS)
        checks.integer(owner, "downscale", self.downscale, 1, 64)
        widths = checks.integers(owner, "channels", self.channels, 1, checks.MAX_WIDTH)
        object.__setattr__(self, "channels", widths)
        halves = checks.integers(owner, "halves", self.halves, 1, len(widths))
        object.__setattr__(self, "halves", halves)


class AdapterResnet(nn.Module):
    """A 3x3 and a pointwise layer, and a skip: (B, h, w, C) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.block2 = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.block2(nn.relu(self.block1(x)))


class AdapterStage(nn.Module):
    """One resolution: perhaps halved, perhaps projected, then residual blocks."""

    def __init__(self, in_channels: int, channels: int, layers: int, *, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        if in_channels != channels:
            self.in_conv = nn.Linear(in_channels, channels)
        self.resnets = [AdapterResnet(channels) for _ in range(layers)]

    def __call__(self, x: mx.array) -> mx.array:
        x = _halved(x) if self.halve else x
        x = self.in_conv(x) if "in_conv" in self else x
        for resnet in self.resnets:
            x = resnet(x)
        return x


class T2IAdapter(nn.Module):
    """A picture to ``features`` of ``UNet.__call__``, one for each stage."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        inputs = config.hint_channels * config.downscale**2
        self.conv_in = nn.Conv2d(inputs, widths[0], kernel_size=3, padding=1)
        self.body = [
            AdapterStage(widths[max(i - 1, 0)], width, config.layers, halve=i in config.halves)
            for i, width in enumerate(widths)
        ]

    def __call__(self, hint: mx.array) -> list[mx.array]:
        """Read a picture lazily: (B, H, W, hint_channels) in [0, 1] to a map for each stage.

        Raises:
            ValueError: on another shape (an NCHW array?) or size.
        """
        checks.channels_last("T2IAdapter", "hint", hint, self.config.hint_channels)
        batch, height, width, channels = hint.shape
        factor = self.config.downscale
        if height % factor or width % factor or not height * width:
            size = f"{width}x{height}"
            raise ValueError(f"[T2IAdapter] sizes are multiples of {factor}, got {size} pixels.")
        # Each cell's pixels become its channels: C outermost, then rows, then columns.
        cells = hint.reshape(batch, height // factor, factor, width // factor, factor, channels)
        cells = cells.transpose(0, 1, 3, 5, 2, 4).flatten(3)
        x = self.conv_in(cells.astype(self.conv_in.weight.dtype))
        features = []
        for stage in self.body:
            x = stage(x)
            features.append(x)
        return features


def _halved(x: mx.array) -> mx.array:
    """Means of 2x2 pixels; at an odd border of those that there are."""
    rows, columns = x.shape[1:3]
    sides = [(0, 0), (0, rows % 2), (0, columns % 2), (0, 0)]
    padded = mx.pad(x, sides)
    batch, rows, columns, channels = padded.shape
    total = padded.reshape(batch, rows // 2, 2, columns // 2, 2, channels).sum(axis=(2, 4))
    ones = mx.pad(mx.ones_like(x[:1, :, :, :1]), sides)
    counts = ones.reshape(1, rows // 2, 2, columns // 2, 2, 1).sum(axis=(2, 4))
    return total / counts
