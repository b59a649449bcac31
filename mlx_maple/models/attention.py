"""Attention, and the transformer that lets pixels look at each other and at the prompt.

Legend   B batch; h, w rows and columns; C channels; T tokens (pixels in reading order, or words);
         S tokens looked at; K heads; D = C / K width of a head. Channels last.
Source   Vaswani et al. 2017 (arXiv:1706.03762); Shazeer 2020, GLU variants (arXiv:2002.05202);
         Rombach et al. 2022 (arXiv:2112.10752), section 3.3; CompVis/stable-diffusion @21f890f
         ldm/modules/attention.py.
Differs  1x1 convolutions are Linear layers on pixels.
Names    Those of diffusers 0.42.1 without torch's containers: to_out for to_out.0, ff.proj_in for
         ff.net.0.proj, ff.proj_out for ff.net.2.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models.layers import GroupNorm

TRANSFORMER_NORM_EPS = 1e-6  # the GroupNorm at a transformer's door; residual blocks use 1e-5
LAYER_NORM_EPS = 1e-5


class Context(NamedTuple):
    """What the cross-attentions of one call look at, where that is more than a prompt.

    Attributes:
        text: (B, T, C') states of the prompt.
        image: for one attention after the other, what it sees of image prompts: of each its keys
            and values side by side, (B, S, 2C).
    """

    text: mx.array
    image: Iterator[Sequence[mx.array]]


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, heads: int, mask: str | None = None
) -> mx.array:
    """Scaled dot-product attention with K heads: (B, T, C), (B, S, C), (B, S, C) to (B, T, C).

    The softmax is taken in float32 whatever the type, and MLX scales the queries before the
    product, so that float16 logits do not overflow.

    Args:
        queries: (B, T, C).
        keys: (B, S, C).
        values: (B, S, C).
        heads: K; must divide C.
        mask: "causal" hides later tokens; what is hidden gets the least finite number of the type,
            since a float16 -1e9 would be -inf.
    """
    batch, _, channels = queries.shape
    width = channels // heads

    def split(x: mx.array) -> mx.array:
        return x.reshape(batch, -1, heads, width).transpose(0, 2, 1, 3)  # (B, K, T, D)

    mixed = mx.fast.scaled_dot_product_attention(
        split(queries), split(keys), split(values), scale=width**-0.5, mask=mask
    )
    return mixed.transpose(0, 2, 1, 3).reshape(batch, -1, channels)


class Attention(nn.Module):
    """Tokens gather from a context, or from each other: (B, T, C) and (B, S, C') to (B, T, C).

    Args:
        channels: C.
        heads: K.
        context_channels: C' of the context; None for self-attention.
    """

    def __init__(self, channels: int, heads: int, context_channels: int | None = None) -> None:
        super().__init__()
        context_channels = channels if context_channels is None else context_channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.heads = heads

    def __call__(self, x: mx.array, context: mx.array | Context | None = None) -> mx.array:
        image: Sequence[mx.array] = ()
        if isinstance(context, Context):
            context, image = context.text, next(context.image)
        context = x if context is None else context
        queries = self.to_q(x)
        mixed = self.attend(queries, self.to_k(context), self.to_v(context))
        for keys_values in image:  # each by itself: Ye et al. 2023 (arXiv:2308.06721), equation 5
            mixed = mixed + self.attend(queries, *mx.split(keys_values, 2, axis=-1))
        return self.to_out(mixed)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """(B, T, C), (B, S, C) twice to (B, T, C)."""
        return attend(queries, keys, values, self.heads)


class FeedForward(nn.Module):
    """The GEGLU of each token: (B, T, C) to the same, by way of 2 times 4C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, 8 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        # The first half is the value, the second its gate. The GELU is the exact one, by erf: its
        # tanh form is 1e-4 away.
        value, gate = mx.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(value * nn.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a norm and added: (B, T, C)."""

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.ff = FeedForward(channels)

    def __call__(self, x: mx.array, context: mx.array | Context) -> mx.array:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it: (B, h, w, C) to the same.

    Args:
        channels: C.
        heads: K of every attention in it.
        context_channels: width of the prompt's states.
        depth: number of blocks.
        groups: groups of the norm at its door.
    """

    def __init__(
        self, channels: int, heads: int, context_channels: int, depth: int, groups: int
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = [
            TransformerBlock(channels, heads, context_channels) for _ in range(depth)
        ]
        self.proj_out = nn.Linear(channels, channels)

    def __call__(self, x: mx.array, context: mx.array | Context) -> mx.array:
        batch, rows, columns, channels = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(batch, rows * columns, channels)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).reshape(batch, rows, columns, channels)
