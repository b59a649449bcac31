"""ControlNet: a copy of a UNet's way down that looks at a picture and steers the UNet by it.

Legend   B batch; H, W pixel rows and columns; h, w latent ones (H/8, W/8); C channels; T prompt
         tokens; D their width. Channels last.
Source   Zhang, Rao and Agrawala 2023 (arXiv:2302.05543); lllyasviel/ControlNet @ed85cd1
         cldm/cldm.py, class ControlNet; diffusers 0.42.1 models/controlnets/controlnet.py.
Differs  The picture is embedded once a drawing and not once a step. The 1x1 "zero" convolutions
         are Linear layers. Tolerances: tests/parity/test_control_parity.py.
Names    Those of diffusers 0.42.1; convert/maple_convert/layouts/controlnet.py maps published
         checkpoints onto these.
"""

from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.layers import TimeEmbedding, sinusoids
from mlx_maple.models.unet import (
    TIME_EXPANSION,
    DownBlock,
    MidBlock,
    UNetConfig,
    as_times,
    check_inputs,
)


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(UNetConfig):
    """Architecture facts of one published ControlNet; the defaults are SD 1.x.

    Attributes:
        hint_channels: 3, of the picture that steers.
        hint_widths: C of the layers that embed it, each after the first at half the size.
    """

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "ControlNetConfig"
        checks.integer(owner, "hint_channels", self.hint_channels, 1, checks.MAX_WIDTH)
        widths = checks.integers(owner, "hint_widths", self.hint_widths, 1, checks.MAX_WIDTH)
        object.__setattr__(self, "hint_widths", widths)

    @property
    def downscale(self) -> int:
        """Pixels of the picture that one latent cell covers along a side: 8."""
        return 2 ** (len(self.hint_widths) - 1)


class HintEmbedding(nn.Module):
    """The picture that steers at the latents' size: (B, H, W, 3) to (B, h, w, C)."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.hint_widths
        self.conv_in = _conv(config.hint_channels, widths[0])
        self.blocks = []
        for inputs, outputs in pairwise(widths):
            self.blocks += [_conv(inputs, inputs), _conv(inputs, outputs, stride=2)]
        self.conv_out = _conv(widths[-1], config.block_out_channels[0])

    def __call__(self, hint: mx.array) -> mx.array:
        checks.channels_last("ControlNet", "hint", hint, self.config.hint_channels)
        _, height, width, _ = hint.shape
        factor = self.config.downscale
        if height % factor or width % factor or not height * width:
            size = f"{width}x{height}"
            raise ValueError(f"[ControlNet] sizes are multiples of {factor}, got {size} pixels.")
        x = nn.silu(self.conv_in(hint.astype(self.conv_in.weight.dtype)))
        for block in self.blocks:
            x = nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """Reads latents, time, prompt and a picture; says what to add to each kept state of a UNet."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_channels = TIME_EXPANSION * widths[0]
        self.conv_in = _conv(config.in_channels, widths[0])
        self.controlnet_cond_embedding = HintEmbedding(config)
        self.time_embedding = TimeEmbedding(widths[0], time_channels)
        if config.vector_channels is not None:
            self.add_embedding = TimeEmbedding(config.vector_channels, time_channels)
        kept = [widths[0]]  # C of every state that the UNet keeps
        self.down_blocks = []
        channels = widths[0]
        for level, width in enumerate(widths):
            block = DownBlock(config, level, channels, time_channels)
            self.down_blocks.append(block)
            kept += [width] * (len(block.resnets) + ("downsamplers" in block))
            channels = width
        if config.mid_transformer_layers is not None:
            self.mid_block = MidBlock(config, time_channels)
        self.controlnet_down_blocks = [nn.Linear(width, width) for width in kept]
        self.controlnet_mid_block = nn.Linear(widths[-1], widths[-1])

    def embed_hint(self, hint: mx.array) -> mx.array:
        """What ``__call__`` takes of a picture: (B, H, W, 3) in [0, 1] to (B, h, w, C), lazily.

        Raises:
            ValueError: on another shape (an NCHW array?) or size.
        """
        return self.controlnet_cond_embedding(hint)

    def __call__(
        self,
        latents: mx.array,
        timesteps: mx.array | float,
        context: mx.array,
        hint: mx.array,
        vector: mx.array | None = None,
    ) -> list[mx.array]:
        """Say lazily what to add; nothing runs until the caller evaluates.

        Args:
            latents: (B, h, w, in_channels), as the UNet sees them.
            timesteps: (B,), or one for the whole batch: 0 to 999, fractions allowed.
            context: (B, T, cross_attention_dim), the text encoder's states.
            hint: (B or 1, h, w, C), from ``embed_hint``.
            vector: (B, vector_channels), for a network that has such a width.

        Returns:
            A map for each state that the UNet keeps on its way down, finest first, and one for its
            middle: ``control`` of ``UNet.__call__``.

        Raises:
            ValueError: if an argument has another shape (an NCHW array?).
        """
        check_inputs(self.config, latents, context, vector)
        check_hint(latents, hint)
        dtype = self.conv_in.weight.dtype
        context = context.astype(dtype)
        waves = sinusoids(as_times(timesteps, latents.shape[0]), self.config.block_out_channels[0])
        time = self.time_embedding(waves.astype(dtype))
        if vector is not None:
            time = time + self.add_embedding(vector.astype(dtype))

        x = self.conv_in(latents.astype(dtype)) + hint
        kept = [x]
        for block in self.down_blocks:
            x, passed = block(x, time, context)
            kept += passed
        if self.config.mid_transformer_layers is not None:
            x = self.mid_block(x, time, context)
        maps = [layer(x) for layer, x in zip(self.controlnet_down_blocks, kept, strict=True)]
        return [*maps, self.controlnet_mid_block(x)]


def check_hint(latents: mx.array, hint: mx.array) -> None:
    """Raise unless an embedded picture has the size of the latents (B, h, w, C).

    Raises:
        ValueError: with both sizes.
    """
    if hint.ndim != 4 or hint.shape[1:3] != latents.shape[1:3]:
        found, size = tuple(hint.shape), tuple(latents.shape[1:3])
        raise ValueError(f"[ControlNet] expected a hint for latents of {size}, got {found}.")


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
