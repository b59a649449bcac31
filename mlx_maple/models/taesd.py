"""TAESD: a tiny autoencoder of the same latents, for previews that cost almost nothing.

Legend   B batch; H, W pixel rows and columns; h, w = H/8, W/8; C channels; L latent channels.
         Channels last.
Source   madebyollin/taesd @5cccb12 taesd.py (no paper); weights MIT, distilled from SD's VAE.
Differs  Pictures are [-1, 1] here, [0, 1] in the source; its latents are already scaled ones.
         Tolerances: tests/parity/test_taesd_parity.py.
Names    Those of diffusers 0.42.1 (AutoencoderTiny), whose decoder does not count the clamp: its
         indices are one less than in the source. convert/maple_convert/layouts/taesd.py maps both.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.resnet import double

LEVELS = 4  # three halvings
BLOCKS = 3  # residual blocks a level; the finest has one
LATENT_LIMIT = 3  # latents are squeezed softly into this magnitude before they are decoded


@dataclass(frozen=True, kw_only=True)
class TAESDConfig:
    """Architecture facts of the published tiny autoencoders; the defaults are SD 1.x's and SDXL's.

    Attributes:
        latent_channels: L.
        width: C of every layer.
    """

    latent_channels: int = 4
    width: int = 64

    def __post_init__(self) -> None:
        for name in ("latent_channels", "width"):
            checks.integer("TAESDConfig", name, getattr(self, name), 1, checks.MAX_WIDTH)

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers along one side."""
        return 2 ** (LEVELS - 1)


class Double(nn.Module):
    """Nearest-neighbour doubling as a layer: (B, h, w, C) to (B, 2h, 2w, C)."""

    def __call__(self, x: mx.array) -> mx.array:
        return double(x)


class Block(nn.Module):
    """Three 3x3 convolutions and a skip, with no norm: (B, h, w, C) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The activations hold a place in the list because the published names count them.
        self.conv = [_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU()]
        self.conv.append(_conv(width, width))

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for layer in self.conv:
            y = layer(y)
        return nn.relu(x + y)


class TAESD(nn.Module):
    """The tiny encoder and decoder, each a plain sequence of layers."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        self.config = config
        width, latent = config.width, config.latent_channels

        encoder = [_conv(3, width), Block(width)]
        for _ in range(LEVELS - 1):
            encoder.append(_conv(width, width, stride=2, bias=False))
            encoder += [Block(width) for _ in range(BLOCKS)]
        encoder.append(_conv(width, latent))
        self.encoder = nn.Sequential(*encoder)

        decoder = [_conv(latent, width), nn.ReLU()]
        for _ in range(LEVELS - 1):
            decoder += [Block(width) for _ in range(BLOCKS)]
            decoder += [Double(), _conv(width, width, bias=False)]
        decoder += [Block(width), _conv(width, 3)]
        self.decoder = nn.Sequential(*decoder)

    def encode(self, images: mx.array) -> mx.array:
        """Encode lazily: (B, H, W, 3) in [-1, 1] to scaled latents (B, H/8, W/8, L).

        Raises:
            ValueError: on another shape (an NCHW array?), or sizes that are no multiples of 8.
        """
        checks.channels_last("TAESD", "images", images, 3)
        _, height, width, _ = images.shape
        factor = self.config.downscale
        if height % factor or width % factor or not height * width:
            size = f"{width}x{height}"
            raise ValueError(f"[TAESD] sizes are multiples of {factor}, got {size} pixels.")
        return self.encoder(((images + 1) / 2).astype(self._dtype))

    def decode(self, latents: mx.array) -> mx.array:
        """Decode lazily: scaled latents (B, h, w, L) to (B, 8h, 8w, 3), about [-1, 1], unclipped.

        Raises:
            ValueError: if the last axis is not L (an NCHW array?).
        """
        checks.channels_last("TAESD", "latents", latents, self.config.latent_channels)
        squeezed = mx.tanh(latents / LATENT_LIMIT) * LATENT_LIMIT
        return self.decoder(squeezed.astype(self._dtype)) * 2 - 1

    @property
    def _dtype(self) -> mx.Dtype:
        return self.decoder.layers[0].weight.dtype


def _conv(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=bias)
