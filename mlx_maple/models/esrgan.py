"""ESRGAN: a picture to a larger one with the detail that its training taught it to expect.

Legend   B batch; H, W pixel rows and columns; C channels; G growth; s scale; r shuffle. Channels
         last.
Source   Wang et al. 2018, ESRGAN (arXiv:1809.00219); Wang et al. 2021, Real-ESRGAN
         (arXiv:2107.10833), section 3.4: for scales below 4 the picture is folded into channels
         first. xinntao/BasicSR @1.4.2 basicsr/archs/rrdbnet_arch.py (Apache-2.0).
Differs  Any number of doublings, as community models have them. Tolerances:
         tests/parity/test_esrgan_parity.py.
Names    BasicSR's. convert/maple_convert/upscaler.py maps the two older spellings onto them.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.resnet import double

SLOPE = 0.2  # of every activation below zero
SHARE = 0.2  # of a residual that is added
DENSE = 5  # convolutions of a dense block
BLOCKS = 3  # dense blocks of a residual block


@dataclass(frozen=True, kw_only=True)
class ESRGANConfig:
    """Architecture facts of one network; the defaults are Real-ESRGAN x4plus.

    Attributes:
        width: C of all but the dense blocks' inner layers.
        growth: G, what each layer of a dense block adds.
        num_blocks: residual blocks in a row.
        doublings: at the end.
        shuffle: r; the picture is folded r x r pixels to one first.
    """

    width: int = 64
    growth: int = 32
    num_blocks: int = 23
    doublings: int = 2
    shuffle: int = 1

    def __post_init__(self) -> None:
        most = {"width": 512, "growth": 512, "num_blocks": checks.MAX_LAYERS, "doublings": 4}
        for name, high in most.items():
            low = 0 if name == "doublings" else 1
            checks.integer("ESRGANConfig", name, getattr(self, name), low, high)
        if self.shuffle not in (1, 2, 4):
            raise ValueError(f"[ESRGANConfig] shuffle must be 1, 2 or 4, got {self.shuffle}.")

    @property
    def scale(self) -> float:
        """s, how many times larger a picture becomes."""
        return 2**self.doublings / self.shuffle


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all before it, and a skip: (B, H, W, C) to the same."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(DENSE):
            out = width if i == DENSE - 1 else growth
            setattr(self, f"conv{i + 1}", _conv(width + i * growth, out))

    def __call__(self, x: mx.array) -> mx.array:
        known = x
        for i in range(1, DENSE):
            known = mx.concatenate([known, _active(self[f"conv{i}"](known))], axis=-1)
        return SHARE * self[f"conv{DENSE}"](known) + x


class ResidualBlock(nn.Module):
    """Three dense blocks and a skip around them: (B, H, W, C) to the same."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(BLOCKS):
            setattr(self, f"rdb{i + 1}", DenseBlock(width, growth))

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for i in range(BLOCKS):
            y = self[f"rdb{i + 1}"](y)
        return SHARE * y + x


class ESRGAN(nn.Module):
    """The whole network, often called RRDBNet."""

    def __init__(self, config: ESRGANConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv_first = _conv(3 * config.shuffle**2, width)
        self.body = [ResidualBlock(width, config.growth) for _ in range(config.num_blocks)]
        self.conv_body = _conv(width, width)
        for i in range(config.doublings):
            setattr(self, f"conv_up{i + 1}", _conv(width, width))
        self.conv_hr = _conv(width, width)
        self.conv_last = _conv(width, 3)

    def __call__(self, images: mx.array) -> mx.array:
        """Enlarge lazily: (B, H, W, 3) in [0, 1] to (B, sH, sW, 3), about [0, 1], unclipped.

        Raises:
            ValueError: on another shape (an NCHW array?), or sides that are no multiples of r.
        """
        checks.channels_last("ESRGAN", "images", images, 3)
        x = self.conv_first(unshuffled(images, self.config.shuffle).astype(self._dtype))
        y = x
        for block in self.body:
            y = block(y)
        x = x + self.conv_body(y)
        for i in range(self.config.doublings):
            x = _active(self[f"conv_up{i + 1}"](double(x)))
        return self.conv_last(_active(self.conv_hr(x)))

    @property
    def _dtype(self) -> mx.Dtype:
        return self.conv_first.weight.dtype


def unshuffled(images: mx.array, factor: int) -> mx.array:
    """Each r x r pixels folded into one: (B, H, W, C) to (B, H/r, W/r, C r r), C first.

    Raises:
        ValueError: if the sides are no multiples of r.
    """
    if factor == 1:
        return images
    batch, rows, columns, channels = images.shape
    if rows % factor or columns % factor:
        raise ValueError(f"[ESRGAN] sides must be multiples of {factor}, got {columns}x{rows}.")
    shape = (batch, rows // factor, factor, columns // factor, factor, channels)
    folded = images.reshape(shape).transpose(0, 1, 3, 5, 2, 4)
    return folded.reshape(batch, rows // factor, columns // factor, channels * factor**2)


def _active(x: mx.array) -> mx.array:
    return nn.leaky_relu(x, SLOPE)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
