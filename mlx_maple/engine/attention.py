"""Attention whose score matrix is never stored whole where it would be large.

Legend   B batch; T tokens that look; S tokens looked at; K heads; C channels; D = C / K width of a
         head. Tokens are (B, T, C), split into heads (B, K, T, D).
Source   Rabe and Staats 2021, Self-attention Does Not Need O(n^2) Memory (arXiv:2112.05682), in its
         plain form: some queries at a time. A query's softmax is its own, so that nothing is
         approximated; and MLX's rules for its fused kernels, as of 0.32.4 (backend/metal and
         backend/cuda, scaled_dot_product_attention.cpp).

MLX's fused kernels store no scores. Where it has none for a shape it falls back, silently, to two
matrix products with the scores (B, K, T, S) between them: half a gigabyte for one picture of
1024x1024 in the autoencoder alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models.attention import Attention

SCORE_BYTES = 256 << 20  # the most that the scores of one product may take
LOW_MEMORY_SCORE_BYTES = 64 << 20  # the same in low-memory mode; smaller chunks only cost time

MOST_CHUNKS = 128  # beyond, chunks grow instead: to describe more takes longer than to run them

METAL_WIDTHS = frozenset({64, 72, 80, 96, 128})  # of heads, with more than 8 queries
CUDA_MAX_WIDTH = 128  # of heads, in multiples of 8, in half precision (cuDNN, Ampere and later)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    heads: int,
    mask: str | None = None,
    *,
    scale: float | None = None,
    score_bytes: int = SCORE_BYTES,
    backend: str | None = None,
) -> mx.array:
    """Scaled dot-product attention with K heads: (B, T, C), (B, S, C), (B, S, C) to (B, T, C).

    As ``models.attention.attend``, with the same numbers.

    Args:
        queries: (B, T, C).
        keys: (B, S, C).
        values: (B, S, C).
        heads: K; must divide C.
        mask: None or "causal".
        scale: of the scores; None is 1 / sqrt(D). Heads that were padded with zeros keep that of
            their own width.
        score_bytes: the most that the scores of one product may take.
        backend: whose kernels are asked for; None is the one that runs.
    """
    batch, _, channels = queries.shape
    width = channels // heads

    def split(x: mx.array) -> mx.array:
        return x.reshape(batch, -1, heads, width).transpose(0, 2, 1, 3)  # (B, K, T, D)

    mixed = attend_heads(
        split(queries),
        split(keys),
        split(values),
        mask,
        scale=scale,
        score_bytes=score_bytes,
        backend=backend,
    )
    return mixed.transpose(0, 2, 1, 3).reshape(batch, -1, channels)


def attend_heads(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: str | None = None,
    *,
    scale: float | None = None,
    score_bytes: int = SCORE_BYTES,
    backend: str | None = None,
) -> mx.array:
    """The same on heads that are split already: (B, K, T, D), (B, K, S, D) twice to (B, K, T, D).

    With a mask the queries stay together: only the text encoder has one, on 77 tokens.
    """
    tokens, width = queries.shape[2:]
    scale = 1 / math.sqrt(width) if scale is None else scale
    rows = tokens
    if mask is None and not is_fused(tokens, width, queries.dtype, backend):
        rows = chunk_rows(queries.shape, keys.shape[2], queries.dtype, score_bytes)
    if rows >= tokens:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    chunks: list[mx.array] = []
    for start in range(0, tokens, rows):
        some = queries[:, :, start : start + rows]
        # MLX evaluates a graph breadth first: chunks that do not wait for one another would all
        # have their scores stored at once.
        if chunks:
            some = mx.depends([some], [chunks[-1]])[0]
        chunks.append(mx.fast.scaled_dot_product_attention(some, keys, values, scale=scale))
    return mx.concatenate(chunks, axis=2)


def chunk_rows(shape: tuple[int, ...], others: int, dtype: mx.Dtype, score_bytes: int) -> int:
    """How many of the queries (B, K, T, D) may look at ``others`` tokens at once: 1 to T.

    Chunks are as equal as can be, so that a compiled graph has few shapes.
    """
    batch, heads, tokens, _ = shape
    one_row = batch * heads * others * dtype.size
    most = max(1, -(-tokens // MOST_CHUNKS), min(tokens, score_bytes // max(one_row, 1)))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def in_chunks(network: nn.Module, *, score_bytes: int = LOW_MEMORY_SCORE_BYTES) -> None:
    """Make a plain network's attentions bound their scores, in place; names and weights stay."""
    for _, parent in network.named_modules():
        for name, layer in list(parent.items()):
            if type(layer) is Attention:
                parent[name] = ChunkedAttention(layer, score_bytes)


class ChunkedAttention(Attention):
    """``models.attention.Attention`` with scores of bounded size: (B, T, C) to the same."""

    def __init__(self, plain: Attention, score_bytes: int) -> None:
        nn.Module.__init__(self)  # the layers are there already
        for name, layer in plain.items():
            self[name] = layer
        self.heads = plain.heads
        self._score_bytes = score_bytes

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """(B, T, C), (B, S, C) twice to (B, T, C)."""
        return attend(queries, keys, values, self.heads, score_bytes=self._score_bytes)


def is_fused(tokens: int, width: int, dtype: mx.Dtype, backend: str | None = None) -> bool:
    """Whether MLX has a kernel that stores no scores, for T queries of width D, without a mask."""
    backend = running_backend() if backend is None else backend
    if backend == "metal":
        return tokens > 8 and width in METAL_WIDTHS
    if backend == "cuda":
        is_half = dtype in (mx.float16, mx.bfloat16)
        return tokens > 1 and is_half and width % 8 == 0 and width <= CUDA_MAX_WIDTH
    return False


_described: ContextVar[str | None] = ContextVar("described", default=None)


@contextmanager
def described_as_on(backend: str) -> Iterator[None]:
    """While this lasts, what is described is meant for a backend, wherever this is."""
    token = _described.set(backend)
    try:
        yield
    finally:
        _described.reset(token)


def running_backend() -> str:
    """Where MLX works by default: "metal", "cuda" or "cpu"."""
    if (described := _described.get()) is not None:
        return described
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"
