"""Token merging: pixels that look alike look around as one, at the level that has most of them.

Legend   B batch; h, w rows and columns; N = h w tokens in reading order; M of them left; C
         channels. A *target* is the token that others are merged into: the first of each 2x2 cell.
Source   Bolya and Hoffman 2023, Token Merging for Fast Stable Diffusion (arXiv:2303.17604), after
         Bolya et al. 2022 (arXiv:2210.09461); tomesd 0.1.3 with ``use_rand=False``, which is how
         AUTOMATIC1111/stable-diffusion-webui @v1.10.1 calls it: self-attention alone.
Differs  Where the finest level has no transformers, as in SDXL, the finest that has some merges
         (tomesd does nothing there). Means are taken by a product, not added up by atomics, so that
         a GPU rounds them the same every time. tests/parity/test_token_merging_parity.py.

The network is changed in place and keeps its parameters and their names.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_maple.models.attention import Context, SpatialTransformer, TransformerBlock
from mlx_maple.models.unet import UNet

CELL = 2  # rows and columns of a cell
MOST = 0.75  # of the tokens can be merged: all but the targets
TINY = 1e-20  # under a length, so that a token of nothing but zeros is like no other
SCORE_BYTES = 64 << 20  # the most that the likenesses of some tokens may take at once


class Merging(NamedTuple):
    """Which tokens of each sample are one.

    Attributes:
        kept: (B, K) tokens that stay by themselves.
        merged: (B, R) tokens that go into a target.
        into: (B, R) the number of its target.
        targets: (T,) tokens that others go into.
        back: (B, N) where each token is found among the K + T that are left.
    """

    kept: mx.array
    merged: mx.array
    into: mx.array
    targets: mx.array
    back: mx.array

    def merge(self, x: mx.array) -> mx.array:
        """(B, N, C) to (B, M, C): the kept ones, then each target's mean with what joins it."""
        joining = mx.take_along_axis(x, self.merged[..., None], axis=1)
        numbers = mx.arange(self.targets.shape[0])
        means: list[mx.array] = []
        for some in _in_parts(numbers, x.shape[0] * joining.shape[1] * x.itemsize):
            means.append(self._means(x, joining, _behind(some, means)))
        return mx.concatenate([mx.take_along_axis(x, self.kept[..., None], axis=1), *means], axis=1)

    def _means(self, x: mx.array, joining: mx.array, numbers: mx.array) -> mx.array:
        """The means of some targets: (B, t, C)."""
        goes = self.into[:, None] == numbers[:, None]  # (B, t, R)
        shares = 1 / (1 + goes.sum(axis=-1, keepdims=True)).astype(mx.float32)
        shares = shares.astype(x.dtype)
        # Shared before they are added: of a plain sky thousands join, too many for a float16 sum.
        return (goes * shares) @ joining + shares * mx.take(x, self.targets[numbers], axis=1)

    def unmerge(self, x: mx.array) -> mx.array:
        """(B, M, C) to (B, N, C): each token gets what became of the one that it went into."""
        return mx.take_along_axis(x, self.back[..., None], axis=1)


def match(x: mx.array, rows: int, columns: int, ratio: float) -> Merging | None:
    """Find for each token the target most like it, and merge those that are likest.

    Args:
        x: (B, N, C) by which they are compared, by the angle between them.
        rows: h.
        columns: w.
        ratio: of the tokens, that are to be merged; at most those that are no target.

    Returns:
        None where there is nothing to merge.
    """
    batch, tokens, _ = x.shape
    others, targets = (mx.array(each) for each in _split(rows, columns))
    count = min(int(tokens * ratio), others.size)
    if count <= 0 or not targets.size:
        return None
    wide = x.astype(mx.float32)
    squares = mx.maximum(mx.square(wide).sum(axis=-1, keepdims=True), TINY)
    unit = (wide * mx.rsqrt(squares)).astype(x.dtype)
    looked_for = mx.take(unit, targets, axis=1).swapaxes(1, 2)
    likeness: list[mx.array] = []
    best: list[mx.array] = []
    for some in _in_parts(others, batch * targets.size * x.itemsize):
        scores = mx.take(unit, _behind(some, likeness), axis=1) @ looked_for
        likeness.append(scores.max(axis=-1))
        best.append(scores.argmax(axis=-1))
    order = mx.argsort(-mx.concatenate(likeness, axis=1), axis=1)
    merged, kept = mx.split(order, [count], axis=1)
    into = mx.take_along_axis(mx.concatenate(best, axis=1), merged, axis=1)
    left = mx.arange(tokens - count, dtype=into.dtype)
    alone, behind = mx.split(left, [kept.shape[1]])
    sources = [others[kept], others[merged], mx.broadcast_to(targets, (batch, targets.size))]
    found = [
        mx.broadcast_to(alone, kept.shape),
        into + kept.shape[1],
        mx.broadcast_to(behind, sources[2].shape),
    ]
    back = mx.put_along_axis(
        mx.zeros((batch, tokens), into.dtype),
        mx.concatenate(sources, axis=1),
        mx.concatenate(found, axis=1),
        axis=1,
    )
    return Merging(sources[0], sources[1], into, targets, back)


class MergingTransformer(nn.Module):
    """A `SpatialTransformer` whose self-attentions see merged tokens: (B, h, w, C) to the same.

    Args:
        plain: the one whose layers it takes over.
        ratio: of the tokens, that are merged.
    """

    def __init__(self, plain: SpatialTransformer, ratio: float) -> None:
        super().__init__()
        self.norm, self.proj_in = plain.norm, plain.proj_in
        self.transformer_blocks = plain.transformer_blocks  # the same list of the same layers
        self.proj_out = plain.proj_out
        self.ratio = ratio
        self._plain = [plain]  # in a list of its own: not one of this layer's parts

    def __call__(self, x: mx.array, context: mx.array | Context) -> mx.array:
        batch, rows, columns, channels = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(batch, rows * columns, channels)
        for block in self.transformer_blocks:
            tokens = self._through(block, tokens, context, rows, columns)
        return x + self.proj_out(tokens).reshape(batch, rows, columns, channels)

    def _through(
        self,
        block: TransformerBlock,
        x: mx.array,
        context: mx.array | Context,
        rows: int,
        columns: int,
    ) -> mx.array:
        found = match(x, rows, columns, self.ratio)
        if found is None:
            return block(x, context)
        x = x + found.unmerge(block.attn1(found.merge(block.norm1(x))))
        x = x + block.attn2(block.norm2(x), context)
        return x + block.ff(block.norm3(x))


def set_token_merging(unet: UNet, ratio: float) -> None:
    """Merge tokens at the finest level that has transformers; 0 takes it back."""
    for attentions in finest(
        [block.get("attentions") for block in unet.down_blocks],
        [block.get("attentions") for block in unet.up_blocks],
    ):
        for i, layer in enumerate(attentions):
            plain = layer._plain[0] if isinstance(layer, MergingTransformer) else layer
            attentions[i] = MergingTransformer(plain, ratio) if ratio else plain


def finest(down: list, up: list) -> list:
    """Of each level's transformers, where it has some, those of the finest level, down and up."""
    levels = zip(down, reversed(up), strict=True)
    return next(([x for x in pair if x] for pair in levels if any(pair)), [])


@cache
def _split(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are no target, and those that are; what fills no cell is none."""
    is_target = np.zeros((rows, columns), bool)
    is_target[: rows // CELL * CELL : CELL, : columns // CELL * CELL : CELL] = True
    flat = is_target.reshape(-1)
    return np.flatnonzero(~flat).astype(np.int32), np.flatnonzero(flat).astype(np.int32)


def _in_parts(numbers: mx.array, bytes_each: int) -> Iterator[mx.array]:
    """``numbers`` in as few parts as keep within ``SCORE_BYTES``."""
    parts = -(-numbers.size * bytes_each // SCORE_BYTES)
    length = -(-numbers.size // max(1, min(parts, numbers.size)))
    for start in range(0, numbers.size, length):
        yield numbers[start : start + length]


def _behind(part: mx.array, made: list[mx.array]) -> mx.array:
    """``part``, not before what is made already: MLX would store the likenesses of all at once."""
    return mx.depends([part], [made[-1]])[0] if made else part
