"""VAE: pictures to latents an eighth their size, and back.

Legend   B batch; H, W pixel rows and columns; h, w latent ones (H/8, W/8 in published models); C
         channels; L latent channels. Channels last.
Source   Kingma and Welling 2013 (arXiv:1312.6114); Rombach et al. 2022 (arXiv:2112.10752), section
         3.1; CompVis/stable-diffusion @21f890f ldm/modules/diffusionmodules/model.py (Encoder,
         Decoder) and ldm/models/autoencoder.py (AutoencoderKL).
Differs  Latents here are always the scaled ones, scaling_factor times what the convolutions speak.
         Blocks are cut and named as in diffusers 0.42.1; 1x1 convolutions are Linear layers.
         Tolerances: tests/parity/test_vae_parity.py.
Names    convert/maple_convert/layouts/vae.py maps published checkpoints onto these.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.attention import attend
from mlx_maple.models.layers import GroupNorm
from mlx_maple.models.resnet import Downsample, ResnetBlock, Upsample

NORM_EPS = 1e-6  # the reference's value throughout the VAE; MLX defaults to 1e-5
LOGVAR_RANGE = (-30.0, 20.0)  # the reference clips the posterior's log variance to this


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Architecture facts of one published autoencoder; the defaults are SD 1.x.

    Attributes:
        in_channels: 3, of the pictures that it encodes.
        out_channels: 3, of those that it decodes.
        latent_channels: L.
        block_out_channels: C at each level, fine to coarse. Each further level halves H and W.
        layers_per_block: residual blocks a level in the encoder; one more in the decoder.
        norm_num_groups: groups of every GroupNorm.
        scaling_factor: scaled latent = scaling_factor * raw latent, about unit variance.
        force_upcast: whether float16 overflows in it, as in SDXL's, which then draws black.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = False

    def __post_init__(self) -> None:
        owner = "VAEConfig"
        for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups"):
            checks.integer(owner, name, getattr(self, name), 1, checks.MAX_WIDTH)
        checks.integer(owner, "layers_per_block", self.layers_per_block, 1, checks.MAX_LAYERS)
        widths = checks.integers(
            owner, "block_out_channels", self.block_out_channels, 1, checks.MAX_WIDTH
        )
        object.__setattr__(self, "block_out_channels", widths)
        checks.multiples(
            owner, "block_out_channels", widths, self.norm_num_groups, "norm_num_groups"
        )
        checks.number(owner, "scaling_factor", self.scaling_factor, 1e-6, 1e6)
        if not isinstance(self.force_upcast, bool):
            found = repr(self.force_upcast)[:60]
            raise ValueError(f"[VAEConfig] force_upcast must be true or false, got {found}.")

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers along one side: 8 with four levels."""
        return 2 ** (len(self.block_out_channels) - 1)


class Moments(NamedTuple):
    """The posterior of scaled latents, a Gaussian for each number of them.

    Attributes:
        mean: (B, h, w, L).
        logvar: (B, h, w, L), log of the variance.
    """

    mean: mx.array
    logvar: mx.array


class PixelAttention(nn.Module):
    """Every pixel looks at every other, with one head as wide as C: (B, h, w, C) to the same."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)  # biased, unlike those of the UNet
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        tokens = self.group_norm(x).flatten(1, 2)  # (B, h w, C)
        mixed = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1)
        return x + self.to_out(mixed).reshape(x.shape)


class MidBlock(nn.Module):
    """The coarsest level: residual block, attention, residual block: (B, h, w, C) to the same."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = [
            ResnetBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2)
        ]
        self.attentions = [PixelAttention(channels, groups)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """Residual blocks, then a halving at all levels but the last: (B, H, W, C_in) to (…, C)."""

    def __init__(
        self, in_channels: int, channels: int, layers: int, groups: int, *, halve: bool
    ) -> None:
        super().__init__()
        self.resnets = [
            ResnetBlock(in_channels if i == 0 else channels, channels, groups=groups, eps=NORM_EPS)
            for i in range(layers)
        ]
        if halve:
            self.downsamplers = [Downsample(channels, symmetric=False)]

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if "downsamplers" in self else x


class UpBlock(nn.Module):
    """Residual blocks, then a doubling at all levels but the last: (B, h, w, C_in) to (…, C)."""

    def __init__(
        self, in_channels: int, channels: int, layers: int, groups: int, *, double: bool
    ) -> None:
        super().__init__()
        self.resnets = [
            ResnetBlock(in_channels if i == 0 else channels, channels, groups=groups, eps=NORM_EPS)
            for i in range(layers)
        ]
        if double:
            self.upsamplers = [Upsample(channels)]

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


class Encoder(nn.Module):
    """The autoencoder's first half: (B, H, W, 3) to (B, h, w, 2L), raw mean and log variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], kernel_size=3, padding=1)
        self.down_blocks = [
            DownBlock(
                widths[max(level - 1, 0)],
                width,
                config.layers_per_block,
                groups,
                halve=level < len(widths) - 1,
            )
            for level, width in enumerate(widths)
        ]
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, kernel_size=3, padding=1)

    def __call__(self, images: mx.array) -> mx.array:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """The autoencoder's generative half: (B, h, w, L) raw latents to (B, H, W, 3)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups  # coarse to fine
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], kernel_size=3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = [
            UpBlock(
                widths[max(level - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                double=level < len(widths) - 1,
            )
            for level, width in enumerate(widths)
        ]
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, kernel_size=3, padding=1)

    def __call__(self, latents: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the two pointwise layers between them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Linear(2 * config.latent_channels, 2 * config.latent_channels)
        self.post_quant_conv = nn.Linear(config.latent_channels, config.latent_channels)

    def encode(self, images: mx.array) -> Moments:
        """Encode ``images`` lazily; nothing runs until the caller evaluates.

        Args:
            images: (B, H, W, in_channels) in [-1, 1]; H and W multiples of ``config.downscale``.

        Returns:
            Mean and log variance of the scaled latents, in the weights' dtype. A sample of it is
            ``mean + exp(logvar / 2) * noise``.

        Raises:
            ValueError: on another shape (an NCHW array?) or size.
        """
        checks.channels_last("AutoencoderKL", "images", images, self.config.in_channels)
        _, height, width, _ = images.shape
        factor = self.config.downscale
        if height % factor or width % factor or not height * width:
            size = f"{width}x{height}"
            raise ValueError(f"[AutoencoderKL] sizes are multiples of {factor}, got {size} pixels.")
        x = self.encoder(images.astype(self.quant_conv.weight.dtype))
        mean, logvar = mx.split(self.quant_conv(x), 2, axis=-1)
        scale = self.config.scaling_factor
        return Moments(mean * scale, mx.clip(logvar, *LOGVAR_RANGE) + 2 * math.log(scale))

    def decode(self, latents: mx.array) -> mx.array:
        """Decode ``latents`` lazily; nothing runs until the caller evaluates.

        Args:
            latents: (B, h, w, L), scaled as the UNet makes them.

        Returns:
            (B, H, W, out_channels), nominally in [-1, 1] and not clipped, in the weights' dtype.

        Raises:
            ValueError: if the last axis is not L (an NCHW array?).
        """
        checks.channels_last("AutoencoderKL", "latents", latents, self.config.latent_channels)
        raw = latents / self.config.scaling_factor
        return self.decoder(self.post_quant_conv(raw.astype(self.post_quant_conv.weight.dtype)))
