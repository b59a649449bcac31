"""The autoencoder a stripe of rows at a time: large pictures in little memory, and no seams.

Legend   B batch; H, W rows and columns of a feature map, at any level; C channels. Channels last.
Source   The network is that of mlx_maple/models/vae.py, whose layers are used; only the order of
         the work is another.
Differs  Other programs decode tiles of the latents and blend where they overlap. The group norms
         then see the statistics of a tile and not of the picture, which shifts its colours. Here a
         norm's statistics are those of the whole feature map, taken stripe by stripe before it is
         applied, and a convolution reads the row above and the row below its stripe: the result is
         that of the whole, within rounding.

A feature map itself stays whole, in the weights' dtype. What is bounded is everything that a layer
needs beside it: float32 copies for norms, activations, and what a convolution unfolds. A feature
map that is no larger than a stripe goes through the plain layer, so that small pictures are the
same bit for bit.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.engine.attention import LOW_MEMORY_SCORE_BYTES, attend
from mlx_maple.models import AutoencoderKL, VAEConfig
from mlx_maple.models.layers import GroupNorm
from mlx_maple.models.resnet import Downsample, ResnetBlock, Upsample, double
from mlx_maple.models.vae import Decoder, Encoder, MidBlock, PixelAttention

STRIPE_BYTES = 16 << 20  # of a stripe as float32

# (a, b) to rows a to b of a feature map: (B, b - a, W, C)
Rows = Callable[[int, int], mx.array]


def in_stripes(
    vae: AutoencoderKL,
    *,
    stripe_bytes: int = STRIPE_BYTES,
    score_bytes: int = LOW_MEMORY_SCORE_BYTES,
) -> AutoencoderKL:
    """Make an autoencoder work in stripes; its weights and their names stay what they are.

    Unlike the plain network it evaluates as it goes: that is what bounds the memory.

    Args:
        vae: the autoencoder, changed in place.
        stripe_bytes: the most that a stripe of a feature map may take as float32.
        score_bytes: the most that the scores of its attention may take.
    """
    work = _Work(stripe_bytes, score_bytes)
    vae.encoder = StripedEncoder(vae.encoder, work)
    vae.decoder = StripedDecoder(vae.decoder, work)
    return vae


def striped_bytes(
    config: VAEConfig,
    width: int,
    height: int,
    itemsize: int,
    *,
    is_encoding: bool,
    unfolds: bool,
    ahead: int = 0,
    stripe_bytes: int = STRIPE_BYTES,
    score_bytes: int = LOW_MEMORY_SCORE_BYTES,
) -> int:
    """The most memory that one picture takes in stripes, beside the weights.

    Args:
        config: of the autoencoder.
        width: in pixels.
        height: in pixels.
        itemsize: bytes of an activation.
        is_encoding: the first half; else the second.
        unfolds: whether convolutions unfold their input in float32, as they do on the CPU.
        ahead: bytes that MLX prepares in advance, as it does in layers that are no stripes.
        stripe_bytes: as for ``in_stripes``.
        score_bytes: as for ``in_stripes``.
    """
    widths = config.block_out_channels
    most = 0

    def convolution(pixels: int, inputs: int, outputs: int, held: int, gone: int = 0) -> None:
        """What a convolution takes, in stripes or, where one is enough, as the plain layer.

        Maps that are ``held`` meanwhile are counted in channels, as are those that are ``gone``
        when the plain layer's norm is done.
        """
        nonlocal most
        stripes = -(-4 * pixels * max(inputs, outputs) // stripe_bytes)
        stripe, unfolded = pixels // stripes, 4 * 10 * inputs if unfolds else 0
        if stripes == 1:
            norm = 8 * inputs + itemsize * held  # centred and squared, in float32
            product = itemsize * (held - gone + inputs + outputs) + unfolded
            taken = pixels * max(norm, product)
            # Once it takes more than that MLX waits, and half of it remains on average.
            most = max(most, taken + (taken if taken <= ahead else ahead // 2))
            return
        # As float32: centred and normed. As they are: activated, convolved, with the skip.
        beside = 8 * inputs + itemsize * (inputs + 2 * outputs) + unfolded
        most = max(most, itemsize * pixels * (held + outputs) + stripe * beside)

    for level, channels in enumerate(widths):
        pixels = width * height // 4**level
        finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        before = finer if is_encoding else coarser
        convolution(pixels, before, channels, before)
        convolution(pixels, channels, channels, before + channels, channels)
        if is_encoding and level < len(widths) - 1:
            convolution(pixels // 4, channels, channels, 4 * channels)
        if not is_encoding and level > 0:
            convolution(4 * pixels, channels, channels, channels // 4)
    tokens = width * height // config.downscale**2
    scores = min(score_bytes, tokens**2 * itemsize)
    return max(most, tokens * widths[-1] * (6 * itemsize + 4) + 2 * scores)


class StripedEncoder(Encoder):
    """An autoencoder's first half, in stripes: (B, H, W, 3) to (B, h, w, 2L)."""

    def __init__(self, encoder: Encoder, work: "_Work") -> None:
        nn.Module.__init__(self)  # the layers are there already
        for name, layer in encoder.items():
            self[name] = layer
        self._work = work

    def __call__(self, images: mx.array) -> mx.array:
        """Encode and evaluate."""
        work = self._work
        x = work.conv(self.conv_in, images)
        for block in self.down_blocks:
            for resnet in block.resnets:
                x = work.resnet(resnet, x)
            if "downsamplers" in block:
                x = work.downsample(block.downsamplers[0], x)
        x = work.middle(self.mid_block, x)
        return work.norm_conv(self.conv_norm_out, self.conv_out, x)


class StripedDecoder(Decoder):
    """An autoencoder's second half, in stripes: (B, h, w, L) raw latents to (B, H, W, 3)."""

    def __init__(self, decoder: Decoder, work: "_Work") -> None:
        nn.Module.__init__(self)  # the layers are there already
        for name, layer in decoder.items():
            self[name] = layer
        self._work = work

    def __call__(self, latents: mx.array) -> mx.array:
        """Decode and evaluate."""
        work = self._work
        x = work.middle(self.mid_block, work.conv(self.conv_in, latents))
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = work.resnet(resnet, x)
            if "upsamplers" in block:
                x = work.upsample(block.upsamplers[0], x)
        return work.norm_conv(self.conv_norm_out, self.conv_out, x)


class _Work:
    """Each layer of an autoencoder, whole where it is small and in stripes where it is large."""

    def __init__(self, stripe_bytes: int, score_bytes: int) -> None:
        self.stripe_bytes = stripe_bytes
        self.score_bytes = score_bytes

    def conv(self, conv: nn.Conv2d, x: mx.array) -> mx.array:
        """A 3x3 convolution of stride 1: (B, H, W, C_in) to (B, H, W, C_out)."""
        if self._is_small(x, conv.weight.shape[0]):
            return _evaluated(conv(x))
        return self._convolved(conv, lambda a, b: x[:, a:b], x.shape, None)

    def norm_conv(self, norm: GroupNorm, conv: nn.Conv2d, x: mx.array) -> mx.array:
        """Norm, SiLU and a 3x3 convolution: (B, H, W, C_in) to (B, H, W, C_out)."""
        if self._is_small(x, conv.weight.shape[0]):
            return _evaluated(conv(nn.silu(norm(x))))
        return self._convolved(conv, self._normed(norm, x), x.shape, None)

    def resnet(self, block: ResnetBlock, x: mx.array) -> mx.array:
        """A residual block without time: (B, H, W, C_in) to (B, H, W, C_out)."""
        if self._is_small(x, block.conv1.weight.shape[0]):
            return _evaluated(block(x))
        y = self._convolved(block.conv1, self._normed(block.norm1, x), x.shape, None)

        def skip(a: int, b: int) -> mx.array:
            rows = x[:, a:b]
            return block.conv_shortcut(rows) if "conv_shortcut" in block else rows

        return self._convolved(block.conv2, self._normed(block.norm2, y), y.shape, skip)

    def downsample(self, block: Downsample, x: mx.array) -> mx.array:
        """The encoder's halving, padded at the right and bottom: (B, H, W, C) to (B, H/2, W/2, C).

        Rows a to b of the result read rows 2a to 2b of ``x``, and the zeros below the last.
        """
        if self._is_small(x, x.shape[-1]):
            return _evaluated(block(x))
        batch, height, width, channels = x.shape
        rows, conv = height // 2, block.conv

        def some(a: int, b: int) -> mx.array:
            below = max(0, 2 * b + 1 - height)
            part = mx.pad(x[:, 2 * a : 2 * b + 1], [(0, 0), (0, below), (0, 1), (0, 0)])
            return conv(part)

        shape = (batch, rows, width // 2, channels)
        return _assembled(shape, x.dtype, self._stripes(rows, 2 * width * channels), some)

    def upsample(self, block: Upsample, x: mx.array) -> mx.array:
        """Doubling and a 3x3 convolution: (B, H, W, C) to (B, 2H, 2W, C)."""
        batch, height, width, channels = x.shape
        if self._is_small(x, 4 * channels):
            return _evaluated(block(x))

        def doubled(a: int, b: int) -> mx.array:
            first = a // 2
            return double(x[:, first : (b + 1) // 2])[:, a - 2 * first : b - 2 * first]

        shape = (batch, 2 * height, 2 * width, channels)
        return self._convolved(block.conv, doubled, shape, None)

    def middle(self, block: MidBlock, x: mx.array) -> mx.array:
        """The coarsest level: (B, H, W, C) to the same."""
        x = self.resnet(block.resnets[0], x)
        x = self._attention(block.attentions[0], x)
        return self.resnet(block.resnets[1], x)

    def _attention(self, block: PixelAttention, x: mx.array) -> mx.array:
        tokens = block.group_norm(x).flatten(1, 2)
        q, k, v = block.to_q(tokens), block.to_k(tokens), block.to_v(tokens)
        mixed = attend(q, k, v, heads=1, score_bytes=self.score_bytes)
        return _evaluated(x + block.to_out(mixed).reshape(x.shape))

    def _convolved(
        self, conv: nn.Conv2d, rows_of: Rows, shape: tuple[int, ...], skip: Rows | None
    ) -> mx.array:
        """A 3x3 convolution of what ``rows_of`` gives, with ``skip`` added.

        Args:
            conv: the layer.
            rows_of: rows of its input, whose shape is ``shape``.
            shape: (B, H, W, C_in).
            skip: rows to add to those of its output, or None.
        """
        batch, height, width, inputs = shape
        weight = conv.weight
        outputs = weight.shape[0]

        def some(a: int, b: int) -> mx.array:
            first, last = max(a - 1, 0), min(b + 1, height)
            padding = ([first - a + 1, 1], [b + 1 - last, 1])
            y = mx.conv_general(rows_of(first, last), weight, padding=padding) + conv.bias
            return y if skip is None else y + skip(a, b)

        stripes = self._stripes(height, width * max(inputs, outputs))
        return _assembled((batch, height, width, outputs), weight.dtype, stripes, some)

    def _normed(self, norm: GroupNorm, x: mx.array) -> Rows:
        """Rows of SiLU(norm(x)), with the statistics of all of ``x``."""
        _, height, width, channels = x.shape
        stripes = list(self._stripes(height, width * channels))

        def group_mean(values: Callable[[mx.array], mx.array]) -> mx.array:
            """As ``GroupNorm`` takes it: first along the rows, then over them, then the groups."""
            means = []
            for a, b in stripes:
                means.append(values(x[:, a:b].astype(mx.float32)).mean(axis=2))
                mx.eval(means[-1])
            channel_means = mx.concatenate(means, axis=1).mean(axis=1)
            grouped = channel_means.reshape(x.shape[0], norm.groups, -1)
            found = mx.broadcast_to(grouped.mean(axis=-1, keepdims=True), grouped.shape)
            return _evaluated(found.reshape(x.shape[0], 1, 1, -1))

        mean = group_mean(lambda rows: rows)
        variance = group_mean(lambda rows: mx.square(rows - mean))
        scale = _evaluated(mx.rsqrt(variance + norm.eps) * norm.weight)

        def normed(a: int, b: int) -> mx.array:
            rows = x[:, a:b].astype(mx.float32) - mean
            return nn.silu((rows * scale + norm.bias).astype(x.dtype))

        return normed

    def _is_small(self, x: mx.array, outputs: int) -> bool:
        """Whether a layer's input and its output, of so many channels, are within a stripe."""
        batch, height, width, channels = x.shape
        return 4 * batch * height * width * max(channels, outputs) <= self.stripe_bytes

    def _stripes(self, rows: int, row: int) -> Iterator[tuple[int, int]]:
        """First and last row of each stripe, for rows of so many numbers."""
        most = max(1, self.stripe_bytes // (4 * row))
        count = -(-rows // most)
        for i in range(count):
            yield i * rows // count, (i + 1) * rows // count


def _assembled(
    shape: tuple[int, ...], dtype: mx.Dtype, stripes: Iterator[tuple[int, int]], rows: Rows
) -> mx.array:
    """The stripes in one array of ``shape``, written in place one after the other."""
    whole = mx.zeros(shape, dtype)
    for a, b in stripes:
        whole[:, a:b] = rows(a, b)
        mx.eval(whole)
    return whole


def _evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x
