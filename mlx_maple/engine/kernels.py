"""Kernels for what MLX's own operations do far from the memory's speed: norms, gates, joins.

A feature map travels as a sum that nobody has added up yet: ``value + residual + shift``, arrays of
B N pixels of C channels, and a float32 row of biases. The next norm adds it up on its way, so that
no pass over memory is spent on a bias or a skip alone. Arrays that only lie in their order are
taken in whatever shape they come: every reshape between two kernels is work for MLX's host side.

Legend   B batch; N pixels; C channels; G groups; L rows of tokens; F width of a gate.
Source   Wu and He 2018, Group Normalization (arXiv:1803.08494); Chan et al. 1979 for shifted sums;
         Shazeer 2020, GLU variants (arXiv:2002.05202). What they compute is mlx_maple/models' own:
         layers.GroupNorm, nn.LayerNorm, attention.FeedForward, resnet.double.
Two dialects  One text serves CUDA and Metal; what differs stands in ``_CUDA`` and ``_METAL``. A
         kernel is used on a device only after it was compiled there and agreed with ``Plain``, the
         same in MLX's operations; else ``Plain`` is, and ``chosen`` says why.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_maple.engine import nvrtc, verdict
from mlx_maple.engine.attention import CUDA_MAX_WIDTH, SCORE_BYTES, attend_heads

# One block a group of one sample, while that many numbers do not keep a multiprocessor for long.
ONE_BLOCK = 85_000
STREAM_THREADS = 256  # of blocks that stream a map
SLABS = 264  # parts of a map whose sums are taken apart, for large maps
BLOCKS = 528  # that a large map is normalised by, four for each multiprocessor of a large chip
WARP = 32
LARGEST = (1 << 31) - 1  # numbers of a map: kernels count them in 32 bits
FEW_KEYS = 1024  # so many and fewer are attended to by our kernel, not cuDNN's
CLUSTER = 8  # blocks that own some groups of a map together, where the device has clusters
CLUSTER_PIXELS = 1024  # of the smallest map that they pay for
CLUSTER_CHANNELS = 32  # of a pixel that they take at least: two sectors of memory
CLUSTER_BLOCKS = 96  # fewer in all do not fill a chip that has clusters
HELD_BYTES = 192  # of a map that a thread keeps in its registers
HELD_SUM_BYTES = 64  # the same where it first adds two maps up
QUERY_WARPS = 4  # of a block of our attention, each with 16 queries
ROWS = 4  # token rows a block normalises, one a warp
TOLERANCE = {
    mx.float32: 2e-5,
    mx.float16: 4e-3,
    mx.bfloat16: 3e-2,
}  # of a self-check, times the max


Size = tuple[int, int, int]  # of a feature map: B, h, w


class Norm(NamedTuple):
    """A group norm's constants: weight (C,) and bias (C,) float32, G, eps."""

    weight: mx.array
    bias: mx.array
    groups: int
    eps: float


def _shape(size: Size, channels: int, wanted: str) -> tuple[int, ...]:
    batch, rows, columns = size
    if wanted == "map":
        return batch, rows, columns, channels
    return batch * rows * columns, channels * (9 if wanted == "neighbours" else 1)


class Plain:
    """The same in MLX's operations: for the CPU, for devices that refuse a kernel, for checks."""

    name = "plain"
    has_gate = False

    def group_norm(
        self,
        value: mx.array,
        norm: Norm,
        size: Size,
        *,
        residual: mx.array | None = None,
        skip: mx.array | None = None,
        shift: mx.array | None = None,
        start: int = 0,
        silu: bool = True,
        wanted: str = "map",
    ) -> tuple[mx.array, mx.array]:
        """Add up, join, normalise and gate a feature map.

        Args:
            value: B h w pixels of C1 channels, in whatever shape.
            norm: over C1 + C2 channels.
            size: B, h and w.
            residual: likewise, added to ``value``.
            skip: of C2 channels, joined behind it.
            shift: float32 biases that are still owed, rows (1, …) or (B, …).
            start: where in such a row this map's C biases begin.
            silu: gate with SiLU.
            wanted: "map", "tokens" or "neighbours".

        Returns:
            In the type of ``value`` a map (B, h, w, C), tokens (B N, C) or each pixel's 3x3
            neighbours in reading order (B N, 9 C), zeros beyond the border. And ``value +
            residual`` with the skip behind it, which still owes its shift, as tokens.
        """
        batch, rows, columns = size
        own = value.shape[-1]
        total = value if residual is None else value.reshape(-1, own) + residual.reshape(-1, own)
        x = total.reshape(batch, rows * columns, own)
        if skip is not None:
            x = mx.concatenate([x, skip.reshape(batch, rows * columns, -1)], axis=-1)
        channels = x.shape[-1]
        centred = x.astype(mx.float32)
        if shift is not None:
            centred = centred + shift[:, None, start : start + channels]

        def group_mean(x: mx.array) -> mx.array:
            means = x.mean(axis=1).reshape(batch, norm.groups, -1)
            means = mx.broadcast_to(means.mean(axis=-1, keepdims=True), means.shape)
            return means.reshape(batch, 1, channels)

        centred = centred - group_mean(centred)
        scale = mx.rsqrt(group_mean(mx.square(centred)) + norm.eps) * norm.weight
        y = (centred * scale + norm.bias).astype(value.dtype)
        y = nn.silu(y) if silu else y
        y = unfold(y, size) if wanted == "neighbours" else y
        return y.reshape(_shape(size, channels, wanted)), total if skip is None else x.reshape(
            -1, channels
        )

    def layer_norm(
        self, x: mx.array, weight: mx.array, bias: mx.array, shift: mx.array, eps: float
    ) -> mx.array:
        """Normalise tokens (…, C) that still owe a float32 ``shift`` (C,)."""
        weight, bias, shift = (each.astype(x.dtype) for each in (weight, bias, shift))
        return mx.fast.layer_norm(x + shift, weight, bias, eps)

    def gate(self, x: mx.array, bias: mx.array, beside: mx.array | None = None) -> mx.array:
        """GEGLU of (…, 2F), which still owes its ``bias`` (2F,) float32: to (…, F).

        With ``beside`` (…, C) those numbers follow in each row: to (…, F + C).
        """
        value, gate = mx.split(x + bias.astype(x.dtype), 2, axis=-1)
        gated = value * nn.gelu(gate)
        return gated if beside is None else mx.concatenate([gated, beside], axis=-1)

    def attention(
        self,
        queries: mx.array,
        others: mx.array,
        batch: int,
        heads: int,
        *,
        scale: float,
        score_bytes: int = SCORE_BYTES,
        backend: str | None = None,
    ) -> mx.array:
        """Attention on products that hold their parts side by side: to tokens (B T, K D).

        Args:
            queries: B T rows, whose first K D numbers are the queries.
            others: B S rows, whose last 2 K D are keys and values; the same array for
                self-attention.
            batch: B.
            heads: K.
            scale: of the scores.
            score_bytes: the most that scores may take where they are stored.
            backend: whose kernels MLX is asked for.
        """
        parts = 3 if others is queries else 2
        width = others.shape[-1] // parts // heads

        def split(x: mx.array, part: int) -> mx.array:
            x = x.reshape(batch, -1, x.shape[-1] // (heads * width), heads, width)
            return x[:, :, part].transpose(0, 2, 1, 3)

        mixed = attend_heads(
            split(queries, 0),
            split(others, parts - 2),
            split(others, parts - 1),
            scale=scale,
            score_bytes=score_bytes,
            backend=backend,
        )
        return mixed.transpose(0, 2, 1, 3).reshape(-1, heads * width)

    def total(
        self,
        value: mx.array,
        residual: mx.array | None,
        shift: mx.array,
        size: Size,
        doubled: tuple[int, int] | None = None,
    ) -> mx.array:
        """Add a feature map up: to (B, h, w, C), or to ``doubled`` rows and columns.

        Doubling is nearest-neighbour, cut to a size that may be one short of double.
        """
        batch, rows, columns = size
        channels = value.shape[-1]
        x = value.reshape(batch, rows, columns, channels)
        if residual is not None:
            x = x + residual.reshape(x.shape)
        x = x + shift.astype(x.dtype)
        if doubled is None:
            return x
        x = mx.broadcast_to(x[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
        return x.reshape(batch, 2 * rows, 2 * columns, channels)[:, : doubled[0], : doubled[1]]


def unfold(x: mx.array, size: Size) -> mx.array:
    """Each pixel's 3x3 neighbourhood: (B, N, C) to (B, N, 9 C), zeros beyond the border."""
    batch, rows, columns = size
    channels = x.shape[-1]
    padded = mx.pad(x.reshape(batch, rows, columns, channels), [(0, 0), (1, 1), (1, 1), (0, 0)])
    parts = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return mx.concatenate(parts, axis=-1).reshape(batch, rows * columns, 9 * channels)


# The dialects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dialect:
    """What differs between two languages.

    Attributes:
        words: for ``$name`` in the sources.
        header: functions that the sources call.
        threads: of a block that owns a group; more would have to share its registers.
    """

    words: dict[str, str]
    header: str
    threads: int


_CUDA = _Dialect(
    {
        "thread": "int(threadIdx.x)",
        "block": "int(blockIdx.x)",
        "block_y": "int(blockIdx.y)",
        "shared": "__shared__",
        "barrier": "__syncthreads();",
        "rsqrt": "rsqrtf",
        "device": "",
        "unroll": '_Pragma("unroll")',
        "rolled": '_Pragma("unroll 1")',
    },
    """
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };
template <int N, typename T> __device__ inline Pack<T, N> fetch(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, typename T> __device__ inline void put(T* p, const Pack<T, N>& v) {
  *reinterpret_cast<Pack<T, N>*>(p) = v;
}
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ inline float above_zero(float x) { return x > 0.0f ? x : 0.0f; }
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
""",
    512,
)
_METAL = _Dialect(
    {
        "thread": "int(thread_position_in_threadgroup.x)",
        "block": "int(threadgroup_position_in_grid.x)",
        "block_y": "int(threadgroup_position_in_grid.y)",
        "shared": "threadgroup",
        "barrier": "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "rsqrt": "metal::precise::rsqrt",
        "device": "device",
        "unroll": '_Pragma("unroll")',
        "rolled": '_Pragma("unroll 1")',
    },
    """
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };
template <int N, typename T> inline Pack<T, N> fetch(const device T* p) {
  return *reinterpret_cast<const device Pack<T, N>*>(p);
}
template <int N, typename T> inline void put(device T* p, Pack<T, N> v) {
  *reinterpret_cast<device Pack<T, N>*>(p) = v;
}
inline float warp_sum(float x) { return simd_sum(x); }
inline float above_zero(float x) { return x > 0.0f ? x : 0.0f; }
inline float silu(float x) { return x / (1.0f + metal::exp(-x)); }
""",
    512,
)


# Sources -----------------------------------------------------------------------------------------

# Beside arrays a kernel is told numbers by name, at run time: one compilation serves all sizes.
_CHANNELS = """
  const int C = C1 + C2, CPG = C / G;
"""


@dataclass(frozen=True)
class _Form:
    """Which terms a feature map's sum has, what becomes of it, and whether registers hold it."""

    residual: bool = False
    skip: bool = False
    shift: bool = False
    silu: bool = False
    unfold: bool = False
    held: bool = False

    @property
    def inputs(self) -> list[str]:
        """Names of the terms."""
        return ["value", *(n for n in ("residual", "skip", "shift") if getattr(self, n))]

    @property
    def suffix(self) -> str:
        """What tells this form's kernels from others'."""
        parts = ("residual", "skip", "shift", "silu", "unfold", "held")
        return "".join(f"_{n}" for n in parts if getattr(self, n))

    def aim(self, c: str) -> str:
        """Text that points ``from`` at sample b, channels c to c + V of a map that holds them.

        And ``sum_to`` at their place in the sum that is written down, whose pixels are C apart.

        A thread keeps its channels while it walks over pixels ``step`` numbers apart, and so keeps
        ``owed``, what is owed there, in registers.
        """
        text = f"const $device T* from = value + b * N * C1 + {c};\n    int step = C1;"
        if self.skip:
            text = f"""const bool is_own = {c} < C1;
    const $device T* from = is_own ? value + b * N * C1 + {c} : skip + b * N * C2 + {c} - C1;
    const int step = is_own ? C1 : C2;"""
        if self.residual:
            text += f"\n    const $device T* other = residual + b * N * C1 + {c};"
        if self.is_kept:
            text += f"\n    $device T* sum_to = total + b * N * C + {c};"
        text += "\n    Pack<float, V> owed = {};"
        if self.shift:  # whose beginning need not be aligned for a wider access
            text += f"""
    for (int i = 0; i < V; ++i) owed.at[i] = shift[b * row_stride + row_start + {c} + i];"""
        return text

    @property
    def is_kept(self) -> bool:
        """Whether the sum is written down: where it is not one of the terms."""
        return self.residual or self.skip

    @property
    def is_summed(self) -> str:
        """An expression: whether a residual is added to these channels."""
        return "false" if not self.residual else "is_own" if self.skip else "true"

    def origin(self, c: str) -> str:
        """An expression: the sum at pixel 0, channel c, of sample b, as it is written down."""
        own = f"float(value[b * N * C1 + {c}])"
        if self.residual:
            own = f"float(T({own} + float(residual[b * N * C1 + {c}])))"
        if self.skip:
            own = f"({c} < C1 ? {own} : float(skip[b * N * C2 + {c} - C1]))"
        return own + (f" + shift[b * row_stride + row_start + {c}]" if self.shift else "")

    def add_up(self, begin: str, end: str) -> str:
        """Text for the first pass over pixels: ``sum`` and ``squares`` about ``origin``.

        Loads go ahead of the arithmetic, some pixels at once: nothing here tells the compiler that
        what is stored is never loaded.
        """
        added = ""
        if self.residual:
            added = f"""
      if ({self.is_summed}) {{
        Pack<T, V> w[AHEAD];
        $unroll
        for (int k = 0; k < AHEAD; ++k)
          if (n + k * R < {end}) w[k] = fetch<V>(other + (n + k * R) * step);
        $unroll
        for (int k = 0; k < AHEAD; ++k) if (n + k * R < {end}) {{
          $unroll
          for (int i = 0; i < V; ++i) v[k].at[i] = T(float(v[k].at[i]) + float(w[k].at[i]));
        }}
      }}"""
        kept = "put<V>(sum_to + (n + k * R) * C, v[k]);" if self.is_kept else ""
        return f"""
    $rolled
    for (int n = {begin}; n < {end}; n += R * AHEAD) {{
      Pack<T, V> v[AHEAD];
      $unroll
      for (int k = 0; k < AHEAD; ++k)
        if (n + k * R < {end}) v[k] = fetch<V>(from + (n + k * R) * step);{added}
      $unroll
      for (int k = 0; k < AHEAD; ++k) if (n + k * R < {end}) {{
        {kept}
        $unroll
        for (int i = 0; i < V; ++i) {{
          const float d = float(v[k].at[i]) + owed.at[i] - origin;
          sum += d;
          squares += d * d;
        }}
      }}
    }}"""

    def hold(self, begin: str, end: str) -> str:
        """As ``add_up``, of HELD pixels at the most, which stay in ``v``."""
        added = ""
        if self.residual:
            added = f"""
    $unroll
    for (int near = 0; near < HELD; near += AHEAD) if ({self.is_summed}) {{
      Pack<T, V> w[AHEAD];
      $unroll
      for (int k = near; k < near + AHEAD && k < HELD; ++k)
        if ({begin} + k * R < {end}) w[k - near] = fetch<V>(other + ({begin} + k * R) * step);
      $unroll
      for (int k = near; k < near + AHEAD && k < HELD; ++k) if ({begin} + k * R < {end}) {{
        $unroll
        for (int i = 0; i < V; ++i)
          v[k].at[i] = T(float(v[k].at[i]) + float(w[k - near].at[i]));
      }}
    }}"""
        kept = f"put<V>(sum_to + ({begin} + k * R) * C, v[k]);" if self.is_kept else ""
        return f"""
    Pack<T, V> v[HELD];
    $unroll
    for (int k = 0; k < HELD; ++k)
      if ({begin} + k * R < {end}) v[k] = fetch<V>(from + ({begin} + k * R) * step);{added}
    $unroll
    for (int k = 0; k < HELD; ++k) if ({begin} + k * R < {end}) {{
      {kept}
      $unroll
      for (int i = 0; i < V; ++i) {{
        const float d = float(v[k].at[i]) + owed.at[i] - origin;
        sum += d;
        squares += d * d;
      }}
    }}"""

    def normalise(self, begin: str, end: str, c: str) -> str:
        """Text for the second pass over pixels, which writes ``y_out``."""
        if self.held:
            return f"""{self._constants(c)}
    $unroll
    for (int k = 0; k < HELD; ++k) if ({begin} + k * R < {end}) {{
      const int m = {begin} + k * R;{self._written(c)}
    }}"""
        source, apart = ("sum_to", "C") if self.is_kept else ("from", "step")
        return f"""{self._constants(c)}
    $rolled
    for (int n = {begin}; n < {end}; n += R * AHEAD) {{
      Pack<T, V> v[AHEAD];
      $unroll
      for (int k = 0; k < AHEAD; ++k)
        if (n + k * R < {end}) v[k] = fetch<V>({source} + (n + k * R) * {apart});
      $unroll
      for (int k = 0; k < AHEAD; ++k) if (n + k * R < {end}) {{
        const int m = n + k * R;{self._written(c)}
      }}
    }}"""

    def _constants(self, c: str) -> str:
        """Text for what a thread multiplies by and adds."""
        none = ""
        if self.unfold:
            none = "Pack<T, V> none;\n    for (int i = 0; i < V; ++i) none.at[i] = T(0.0f);"
        return f"""{none}
    const Pack<float, V> gain = fetch<V>(weight + {c});
    const Pack<float, V> offsets = fetch<V>(bias + {c});
    float a[V], z[V];
    $unroll
    for (int i = 0; i < V; ++i) {{
      a[i] = rstd * gain.at[i];
      z[i] = (owed.at[i] - mean) * a[i] + offsets.at[i];
    }}"""

    def _written(self, c: str) -> str:
        """Text that writes what becomes of ``v[k]``, the sum at pixel m."""
        gate = "y = silu(y);" if self.silu else ""
        if self.unfold:
            store = f"""
        const int row = m / columns, column = m - row * columns;
        $rolled
        for (int near = 0; near < 9; ++near) {{
          const int dy = near / 3 - 1, dx = near % 3 - 1;
          // This pixel is that neighbour of the one at (row - dy, column - dx).
          const int i = row - dy, j = column - dx;
          if (i >= 0 && i < rows && j >= 0 && j < columns)
            put<V>(y_out + ((b * N + i * columns + j) * 9 + near) * C + {c}, out);
          const int u = row + dy, w = column + dx;
          if (u < 0 || u >= rows || w < 0 || w >= columns)
            put<V>(y_out + ((b * N + m) * 9 + near) * C + {c}, none);
        }}"""
        else:
            store = f"put<V>(y_out + (b * N + m) * C + {c}, out);"
        return f"""
        Pack<T, V> out;
        $unroll
        for (int i = 0; i < V; ++i) {{
          float y = float(v[k].at[i]) * a[i] + z[i];
          {gate}
          out.at[i] = T(y);
        }}
        {store}"""


def _one_block_norm(form: _Form) -> str:
    """A block owns a group of a sample: sums about the group's first number, then the second pass.

    Sums of squares about a number of the group itself lose no digits to a large mean.
    """
    return f"""{_CHANNELS}
  const int b = $block / G, g = $block % G, tid = $thread;
  const int P = CPG / V, R = THREADS / P;
  const int c = g * CPG + (tid % P) * V, r = tid / P;
  $shared float sums[64];
  {form.aim("c")}
  const int first = g * CPG;
  const float origin = {form.origin("first")};
  float sum = 0.0f, squares = 0.0f;
  if (r < R) {{{form.add_up("r", "N")}
  }}
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  const int lane = tid % 32;
  if (lane == 0) {{ sums[tid / 32] = sum; sums[32 + tid / 32] = squares; }}
  $barrier
  sum = warp_sum(lane < THREADS / 32 ? sums[lane] : 0.0f);
  squares = warp_sum(lane < THREADS / 32 ? sums[32 + lane] : 0.0f);
  const float count = float(N) * float(CPG);
  const float offset = sum / count;
  const float mean = origin + offset;
  const float rstd = $rsqrt(above_zero(squares / count - offset * offset) + eps);
  if (r < R) {{{form.normalise("r", "N", "c")}
  }}
"""


def _slab_sums(form: _Form) -> str:
    """Sums of one slab of pixels, about each group's first number: (B, slabs, G, 2)."""
    return f"""{_CHANNELS}
  const int slab = $block, b = $block_y, tid = $thread;
  const int Q = C / V, P = CPG / V;
  const int R = Q < THREADS ? THREADS / Q : 1;
  const int each = (N + SLABS - 1) / SLABS;
  const int begin = slab * each, end = begin + each < N ? begin + each : N;
  $shared float held[2 * THREADS];
  float group_sum = 0.0f, group_squares = 0.0f;
  $rolled
  for (int base = 0; base < Q; base += THREADS) {{
    const int width = Q - base < THREADS ? Q - base : THREADS;
    const int q = base + tid % width, r = tid / width;
    float sum = 0.0f, squares = 0.0f;
    if (r < R) {{
      const int c = q * V, first = q / P * CPG;
      {form.aim("c")}
      const float origin = {form.origin("first")};
      {form.add_up("begin + r", "end")}
    }}
    held[tid] = sum;
    held[THREADS + tid] = squares;
    $barrier
    const int low = tid * P > base ? tid * P : base;
    const int high = (tid + 1) * P < base + width ? (tid + 1) * P : base + width;
    if (tid < G) $rolled for (int k = 0; k < R; ++k) $rolled for (int e = low; e < high; ++e) {{
      group_sum += held[k * width + e - base];
      group_squares += held[THREADS + k * width + e - base];
    }}
    $barrier
  }}
  if (tid < G) {{
    partial[((b * SLABS + slab) * G + tid) * 2] = group_sum;
    partial[((b * SLABS + slab) * G + tid) * 2 + 1] = group_squares;
  }}
"""


def _slab_norm(form: _Form) -> str:
    """The second pass over large maps: every block knows all groups, and takes some pixels."""
    return f"""{_CHANNELS}
  const int b = $block_y, tid = $thread;
  const int Q = C / V, P = CPG / V;
  const int R = Q < THREADS ? THREADS / Q : 1;
  const int begin = $block * each, end = begin + each < N ? begin + each : N;
  $shared float means[THREADS];
  $shared float rstds[THREADS];
  const int parts = THREADS / G, group = tid % G;
  float sum = 0.0f, squares = 0.0f;
  $rolled
  for (int k = tid / G; k < SLABS && tid < parts * G; k += parts) {{
    sum += partial[((b * SLABS + k) * G + group) * 2];
    squares += partial[((b * SLABS + k) * G + group) * 2 + 1];
  }}
  means[tid] = sum;
  rstds[tid] = squares;
  $barrier
  if (tid < G) {{
    for (int k = 1; k < parts; ++k) {{
      sum += means[k * G + tid];
      squares += rstds[k * G + tid];
    }}
    const int first = tid * CPG;
    const float count = float(N) * float(CPG);
    const float offset = sum / count;
    means[tid] = offset + {form.origin("first")};
    rstds[tid] = $rsqrt(above_zero(squares / count - offset * offset) + eps);
  }}
  $barrier
  $rolled
  for (int base = 0; base < Q; base += THREADS) {{
    const int width = Q - base < THREADS ? Q - base : THREADS;
    const int q = base + tid % width, r = tid / width;
    if (r < R) {{
      const int c = q * V;
      const float mean = means[q / P], rstd = rstds[q / P];
      {form.aim("c")}
      {form.normalise("begin + r", "end", "c")}
    }}
  }}
"""


def _cluster_norm(form: _Form) -> str:
    """A cluster of blocks owns some groups of a sample, each block a part of the pixels.

    Several groups side by side are as many channels as memory is read at once; a block alone would
    take too long over them. The blocks tell each other their sums. Where HELD pixels a thread are
    all, they stay in its registers: the second pass reads nothing.
    """
    taken = form.hold if form.held else form.add_up
    return f"""{_CHANNELS}
  const int rank = $block % CLUSTER, chunks = G / GROUPS, tid = $thread;
  const int chunk = $block / CLUSTER % chunks, b = $block / CLUSTER / chunks;
  const int Q = CPG / V, P = GROUPS * Q, R = THREADS / P;
  const int group = tid % P / Q, r = tid / P;
  const int first = (chunk * GROUPS + group) * CPG, c = first + tid % Q * V;
  const int each = (N + CLUSTER - 1) / CLUSTER;
  const int begin = rank * each, end = r >= R ? 0 : begin + each < N ? begin + each : N;
  $shared float held[2 * THREADS];
  $shared float sums[2 * GROUPS];
  $shared float totals[2 * GROUPS];
  {form.aim("c")}
  const float origin = {form.origin("first")};
  float sum = 0.0f, squares = 0.0f;
  {taken("begin + r", "end")}
  held[tid] = sum;
  held[THREADS + tid] = squares;
  $barrier
  const int lane = tid % 32;
  for (int k = tid / 32; k < 2 * GROUPS; k += THREADS / 32) {{
    const float* from = held + k % 2 * THREADS + k / 2 * Q;
    float x = 0.0f;
    for (int t = lane; t < R; t += 32) for (int i = 0; i < Q; ++i) x += from[t * P + i];
    x = warp_sum(x);
    if (lane == 0) sums[k] = x;
  }}
  cluster_arrive();
  cluster_wait();
  if (tid < 2 * GROUPS) {{
    float x = 0.0f;
    for (int k = 0; k < CLUSTER; ++k) x += of_block(sums + tid, k);
    totals[tid] = x;
  }}
  $barrier
  cluster_arrive();
  const float count = float(N) * float(CPG);
  const float offset = totals[2 * group] / count;
  const float mean = origin + offset;
  const float rstd = $rsqrt(above_zero(totals[2 * group + 1] / count - offset * offset) + eps);
  {form.normalise("begin + r", "end", "c")}
  cluster_wait();  // no block goes before the others have read its sums
"""


_CLUSTER_HEADER = """
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline float of_block(const float* at, int block) {
  uint32_t there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there) : "r"(uint32_t(__cvta_generic_to_shared(at))), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}
"""


# A warp a row, which stays in registers; sums are taken about the row's first number.
_LAYER_NORM = """
  const int lane = $thread % 32;
  const int row = $block * ROWS + $thread / 32;
  if (row < L) {
    constexpr int EACH = (C / V + 31) / 32;
    const float origin = float(value[row * C]) + shift[0];
    float x[EACH * V];
    float sum = 0.0f, squares = 0.0f;
    $unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = (k * 32 + lane) * V;
      if (c < C) {
        const Pack<T, V> v = fetch<V>(value + row * C + c);
        const Pack<float, V> owed = fetch<V>(shift + c);
        $unroll
        for (int i = 0; i < V; ++i) {
          const float d = float(v.at[i]) + owed.at[i] - origin;
          x[k * V + i] = d;
          sum += d;
          squares += d * d;
        }
      }
    }
    const float mean = warp_sum(sum) / float(C);
    const float rstd = $rsqrt(above_zero(warp_sum(squares) / float(C) - mean * mean) + eps);
    $unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = (k * 32 + lane) * V;
      if (c < C) {
        const Pack<float, V> gain = fetch<V>(weight + c), offset = fetch<V>(bias + c);
        Pack<T, V> out;
        $unroll
        for (int i = 0; i < V; ++i)
          out.at[i] = T((x[k * V + i] - mean) * rstd * gain.at[i] + offset.at[i]);
        put<V>(y_out + row * C + c, out);
      }
    }
  }
"""


def _gate(has_beside: bool) -> str:
    gated = """
    const Pack<T, V> v = fetch<V>(value + row * 2 * F + f);
    const Pack<T, V> g = fetch<V>(value + row * 2 * F + F + f);
    const Pack<float, V> p = fetch<V>(bias + f), q = fetch<V>(bias + F + f);
    $unroll
    for (int i = 0; i < V; ++i)
      out.at[i] = T((float(v.at[i]) + p.at[i]) * gelu(float(g.at[i]) + q.at[i]));"""
    if has_beside:
        gated = f"""
    if (f >= F) out = fetch<V>(beside + row * (W - F) + f - F);
    else {{{gated}
    }}"""
    return f"""
  const int at = ($block * THREADS + $thread) * V;
  if (at < L * W) {{
    const int row = at / W, f = at - row * W;
    Pack<T, V> out;{gated}
    put<V>(y_out + at, out);
  }}
"""


def _total(residual: bool) -> str:
    added = ""
    if residual:
        added = """
    const Pack<T, V> w = fetch<V>(residual + from);
    for (int i = 0; i < V; ++i) x[i] += float(w.at[i]);"""
    return f"""
  const int Q = C / V, at = $block * THREADS + $thread;
  if (at < B * out_rows * out_columns * Q) {{
    const int pixel = at / Q, c = (at - pixel * Q) * V;
    const int b = pixel / (out_rows * out_columns);
    const int inside = pixel - b * out_rows * out_columns;
    const int row = inside / out_columns, column = inside - row * out_columns;
    const int from = ((b * rows + row / factor) * columns + column / factor) * C + c;
    const Pack<T, V> v = fetch<V>(value + from);
    const Pack<float, V> owed = fetch<V>(shift + c);
    float x[V];
    for (int i = 0; i < V; ++i) x[i] = float(v.at[i]) + owed.at[i];{added}
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) out.at[i] = T(x[i]);
    put<V>(y_out + pixel * C + c, out);
  }}
"""


# FlashAttention-2 (Dao 2023, arXiv:2307.08691) on tensor cores, for what MLX has no fused kernel on
# CUDA: heads wider than 128; and for few keys, where cuDNN's call costs more than its work. Four
# warps share some keys and values at a time, which come while they work on others; each owns 16
# queries, whose scores and sums never leave its registers. Accumulators of the first product are,
# in pairs, operands of the second.
_ATTENTION = """
  constexpr int DP = (D + 15) / 16 * 16, STRIDE = DP + 8;
  __shared__ __align__(16) T held[2 * KEYS * STRIDE];
  T *keys = held, *values = held + KEYS * STRIDE;
  const int b = $block_y / H, h = $block_y % H;
  const int tid = $thread, warp = tid / 32, lane = tid % 32, quad = lane / 4, pair = lane % 4 * 2;
  const T* q_from = queries + b * TQ * q_row + h * D;
  const T* k_from = others + b * S * kv_row + kv_row - (2 * H - h) * D;
  const T* v_from = k_from + H * D;
  const int first = ($block * WARPS + warp) * 16, row0 = first + quad, row1 = row0 + 8;
  bring<KEYS, D, STRIDE, WARPS>(keys, k_from, kv_row, S, tid);
  bring<KEYS, D, STRIDE, WARPS>(values, v_from, kv_row, S, tid);

  const T *q0 = q_from + row0 * q_row + pair, *q1 = q0 + 8 * q_row;
  uint32_t q[DP / 16][4];
#pragma unroll
  for (int t = 0; t < DP / 16; ++t)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int d = t * 16 + j / 2 * 8;
      q[t][j] = (j % 2 ? row1 : row0) < TQ && d < D ? two_at((j % 2 ? q1 : q0) + d) : 0u;
    }
  float o[DP / 8][4] = {};
  float top0 = -INFINITY, top1 = -INFINITY, sum0 = 0.0f, sum1 = 0.0f;
  const float factor = scale * 1.4426950408889634f;

#pragma unroll 1
  for (int start = 0; start < S; start += KEYS) {
    const int next = start + KEYS;
    all_but_one_came();  // the values may be on their way
    __syncthreads();
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int t = 0; t < DP / 16; ++t)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
        uint32_t k[4];
        const T* at = keys + (n * 8 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
        four_blocks(k, at + t * 16);
        multiply(s[n], q[t], k[0], k[1], T());
        multiply(s[n + 1], q[t], k[2], k[3], T());
      }
    __syncthreads();
    bring<KEYS, D, STRIDE, WARPS>(keys, k_from + next * kv_row, kv_row, S - next, tid);
    if (next > S)
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (start + n * 8 + pair + j % 2 >= S) s[n][j] = -INFINITY;
    float new0 = top0, new1 = top1;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      new0 = fmaxf(new0, fmaxf(s[n][0], s[n][1]));
      new1 = fmaxf(new1, fmaxf(s[n][2], s[n][3]));
    }
#pragma unroll
    for (int i = 1; i < 4; i *= 2) {
      new0 = fmaxf(new0, __shfl_xor_sync(0xffffffffu, new0, i));
      new1 = fmaxf(new1, __shfl_xor_sync(0xffffffffu, new1, i));
    }
    const float old0 = power((top0 - new0) * factor), old1 = power((top1 - new1) * factor);
    top0 = new0; top1 = new1;
    const float less0 = top0 * factor, less1 = top1 * factor;
    sum0 *= old0; sum1 *= old1;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      o[n][0] *= old0; o[n][1] *= old0; o[n][2] *= old1; o[n][3] *= old1;
    }
    uint32_t p[KEYS / 16][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      const float a = power(s[n][0] * factor - less0), c = power(s[n][1] * factor - less0);
      const float e = power(s[n][2] * factor - less1), g = power(s[n][3] * factor - less1);
      sum0 += a + c;
      sum1 += e + g;
      p[n / 2][n % 2 * 2] = packed(a, c, T());
      p[n / 2][n % 2 * 2 + 1] = packed(e, g, T());
    }
    all_but_one_came();  // the next keys may be on their way
    __syncthreads();
#pragma unroll
    for (int t = 0; t < KEYS / 16; ++t)
#pragma unroll
      for (int n = 0; n < DP / 8; n += 2) {
        uint32_t v[4];
        four_blocks_turned(v, values + (t * 16 + lane % 16) * STRIDE + (n + lane / 16) * 8);
        multiply(o[n], p[t], v[0], v[1], T());
        multiply(o[n + 1], p[t], v[2], v[3], T());
      }
    __syncthreads();
    bring<KEYS, D, STRIDE, WARPS>(values, v_from + next * kv_row, kv_row, S - next, tid);
  }
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    sum0 += __shfl_xor_sync(0xffffffffu, sum0, i);
    sum1 += __shfl_xor_sync(0xffffffffu, sum1, i);
  }
  sum0 = 1.0f / sum0;
  sum1 = 1.0f / sum1;
  // Through shared memory, so that what is written down lies side by side.
  T* mine = held + warp * 16 * STRIDE;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const int d = n * 8 + pair;
    two_at(mine + quad * STRIDE + d) = packed(o[n][0] * sum0, o[n][1] * sum0, T());
    two_at(mine + (quad + 8) * STRIDE + d) = packed(o[n][2] * sum1, o[n][3] * sum1, T());
  }
  __syncwarp();
  T* to = y_out + b * TQ * H * D + h * D;
#pragma unroll
  for (int e = lane; e < 16 * (D / 8); e += 32) {
    const int row = e / (D / 8), d = e % (D / 8) * 8;
    if (first + row < TQ) put<8>(to + (first + row) * H * D + d, fetch<8>(mine + row * STRIDE + d));
  }
"""

_ATTENTION_HEADER = """
// KEYS rows of D numbers, of which ``left`` are there, on their way to shared memory.
template <int KEYS, int D, int STRIDE, int WARPS, typename T>
__device__ inline void bring(T* to, const T* from, int step, int left, int tid) {
  constexpr int EACH = STRIDE / 8 - 1;
#pragma unroll
  for (int e = tid; e < KEYS * EACH; e += 32 * WARPS) {
    const int row = e / EACH, d = e % EACH * 8;
    const bool is_there = row < left && d < D;
    if (left > 0)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :: "r"(uint32_t(__cvta_generic_to_shared(to + row * STRIDE + d))),
                      "l"(is_there ? from + row * step + d : from), "r"(is_there ? 16 : 0)
                   : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ inline void all_but_one_came() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
}
template <typename T> __device__ inline void four_blocks(uint32_t* x, const T* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(uint32_t(__cvta_generic_to_shared(at))) : "memory");
}
template <typename T> __device__ inline void four_blocks_turned(uint32_t* x, const T* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(uint32_t(__cvta_generic_to_shared(at))) : "memory");
}
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <typename T> __device__ inline const uint32_t& two_at(const T* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
template <typename T> __device__ inline uint32_t& two_at(T* p) {
  return *reinterpret_cast<uint32_t*>(p);
}
__device__ inline uint32_t packed(float a, float b, half_t) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
  return two;
}
__device__ inline uint32_t packed(float a, float b, bfloat_t) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
  return two;
}
__device__ inline void multiply(float* c, const uint32_t* a, uint32_t x, uint32_t y, half_t) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(y));
}
__device__ inline void multiply(float* c, const uint32_t* a, uint32_t x, uint32_t y, bfloat_t) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(y));
}
"""


# Calling them ------------------------------------------------------------------------------------


class _MetalKernel:
    """mx.fast.metal_kernel with numbers beside the arrays: they travel in an array of their own."""

    def __init__(self, **making: Any) -> None:
        self._making = making
        self._made: dict[tuple[str, ...], Any] = {}

    def __call__(
        self, *, inputs: list[mx.array], scalars: Mapping[str, int | float], **options: Any
    ) -> list[mx.array]:
        names = tuple(scalars)
        if names not in self._made:
            told = "".join(
                f"const float {name} = as_type<float>(numbers[{i}]);\n"
                if isinstance(value, float)
                else f"const int {name} = numbers[{i}];\n"
                for i, (name, value) in enumerate(scalars.items())
            )
            making = dict(self._making)
            making["input_names"] = [*making["input_names"], "numbers"]
            making["source"] = told + making["source"]
            self._made[names] = mx.fast.metal_kernel(**making)
        numbers = [
            int(np.float32(value).view(np.int32)) if isinstance(value, float) else value
            for value in scalars.values()
        ]
        return self._made[names](inputs=[*inputs, _numbers(*numbers)], **options)


@cache
def _numbers(*values: int) -> mx.array:
    # MLX hands arrays of less than eight numbers over in another address space.
    return mx.array(values + (0,) * (8 - len(values)), dtype=mx.int32)


def _code(text: str) -> str:
    """A source without indentation and comments."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _width(*counts: int) -> int:
    """Numbers that one access takes: the widest that divides every count."""
    return next(width for width in (8, 4, 2, 1) if not any(n % width for n in counts))


def _keys(count: int, width: int) -> int:
    """How many of so many keys our attention takes at a time, so that few are taken in vain."""
    row = 2 * 2 * (-(-width // 16) * 16 + 8)  # bytes of a key and its value
    fitting = [keys for keys in (64, 80, 48) if keys * row <= 48 << 10]
    return min(fitting, key=lambda keys: -(-count // keys) * keys)


def _is_chunk(groups: int, of: int, channels: int) -> bool:
    """Whether so many groups of so many channels are a good part for a cluster."""
    return of % groups == 0 and (groups * channels >= CLUSTER_CHANNELS or groups == of)


def _for_checked_types(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method for arrays of the type that was checked; ``Plain``'s for all others."""

    @wraps(method)
    def call(self: "Kernels", first: mx.array, *others: Any, **options: Any) -> Any:
        if self.dtype is not None and first.dtype != self.dtype:
            return getattr(Plain(), method.__name__)(first, *others, **options)
        return method(self, first, *others, **options)

    return call


@dataclass(eq=False)
class Kernels:
    """The same as ``Plain`` through kernels of our own; shapes and arguments are those there."""

    dialect: _Dialect
    make: Callable[..., Any]  # from names and sources to functions of arrays and numbers
    name: str  # of the backend
    has_gate: bool  # Metal has no erf of its own: there MLX's fused operations serve
    has_clusters: bool = False  # of blocks, as CUDA devices of compute capability 9
    dtype: mx.Dtype | None = None  # that was checked on this device; None takes all
    _made: dict[str, Any] = field(default_factory=dict)

    def _kernel(
        self,
        name: str,
        inputs: list[str],
        outputs: list[str],
        source: str,
        header: str = "",
        **more: int,
    ) -> Any:
        if name not in self._made:
            # MLX hashes a kernel's text at every call: what is not code is left out.
            text = _code(Template(source).substitute(self.dialect.words))
            self._made[name] = self.make(
                name=f"maple_{name}",
                input_names=inputs,
                output_names=outputs,
                header=_code(self.dialect.header) + _code(header),
                source=text,
                **more,
            )
        return self._made[name]

    @_for_checked_types
    def group_norm(
        self,
        value: mx.array,
        norm: Norm,
        size: Size,
        *,
        residual: mx.array | None = None,
        skip: mx.array | None = None,
        shift: mx.array | None = None,
        start: int = 0,
        silu: bool = True,
        wanted: str = "map",
    ) -> tuple[mx.array, mx.array]:
        """As ``Plain.group_norm``."""
        batch, rows, columns = size
        pixels, own = rows * columns, value.shape[-1]
        joined = 0 if skip is None else skip.shape[-1]
        channels = own + joined
        per_group = channels // norm.groups
        if norm.groups > STREAM_THREADS or batch * pixels * channels > LARGEST:
            return Plain().group_norm(
                value,
                norm,
                size,
                residual=residual,
                skip=skip,
                shift=shift,
                start=start,
                silu=silu,
                wanted=wanted,
            )
        unfolds = wanted == "neighbours"
        form = _Form(residual is not None, skip is not None, shift is not None, silu, unfolds)
        stride = 0 if shift is None or shift.shape[0] == 1 else shift.shape[-1]
        numbers = {
            "N": pixels,
            "C1": own,
            "C2": joined,
            "G": norm.groups,
            "rows": rows,
            "columns": columns,
            "row_start": start,
            "row_stride": stride,
        }
        terms = [value, *(t for t in (residual, skip, shift) if t is not None)]
        width = _width(per_group, own)
        template = [("T", value.dtype), ("V", width)]
        ends = [norm.weight, norm.bias]
        y_shape = _shape(size, channels, wanted)
        totals = [(batch * pixels, channels)] if form.is_kept else []
        total_names = ["total"] if form.is_kept else []
        types = [value.dtype] * (1 + len(totals))
        threads = self.dialect.threads
        ahead = max(8 // width, 2)
        beside = next(n for n in range(1, norm.groups + 1) if _is_chunk(n, norm.groups, per_group))
        blocks = batch * norm.groups // beside * CLUSTER
        is_shared = pixels >= CLUSTER_PIXELS and blocks >= CLUSTER_BLOCKS and not unfolds
        if self.has_clusters and is_shared and beside * per_group // width <= threads:
            together = threads // (beside * per_group // width)  # pixels
            held = -(-pixels // (CLUSTER * together * 4)) * 4
            most = HELD_SUM_BYTES if residual is not None else HELD_BYTES
            is_held = held * width * value.dtype.size <= most
            form = replace(form, held=is_held)
            template += (
                [("AHEAD", 3 * ahead), ("HELD", held)] if is_held else [("AHEAD", 2 * ahead)]
            )
            kernel = self._kernel(
                "cluster_norm" + form.suffix,
                [*form.inputs, "weight", "bias"],
                ["y_out", *total_names],
                _cluster_norm(form),
                _CLUSTER_HEADER,
                cluster=CLUSTER,
            )
            template += [("GROUPS", beside), ("CLUSTER", CLUSTER)]
            outputs = kernel(
                inputs=[*terms, *ends],
                scalars={**numbers, "eps": float(norm.eps)},
                template=[*template, ("THREADS", threads)],
                grid=(blocks * threads, 1, 1),
                threadgroup=(threads, 1, 1),
                output_shapes=[y_shape, *totals],
                output_dtypes=types,
            )
            return outputs[0], outputs[1] if form.is_kept else value
        if pixels * per_group <= ONE_BLOCK and per_group // width <= threads:
            kernel = self._kernel(
                "group_norm" + form.suffix,
                [*form.inputs, "weight", "bias"],
                ["y_out", *total_names],
                _one_block_norm(form),
            )
            outputs = kernel(
                inputs=[*terms, *ends],
                scalars={**numbers, "eps": float(norm.eps)},
                template=[*template, ("THREADS", threads), ("AHEAD", ahead)],
                grid=(batch * norm.groups * threads, 1, 1),
                threadgroup=(threads, 1, 1),
                output_shapes=[y_shape, *totals],
                output_dtypes=types,
            )
            return outputs[0], outputs[1] if form.is_kept else value
        sums = self._kernel(
            "slab_sums" + _Form(form.residual, form.skip, form.shift).suffix,
            form.inputs,
            ["partial", *total_names],
            _slab_sums(form),
        )
        template += [("SLABS", SLABS), ("AHEAD", ahead)]
        partial, *total = sums(
            inputs=terms,
            scalars=numbers,
            template=[*template, ("THREADS", threads)],
            grid=(SLABS * threads, batch, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, SLABS, norm.groups, 2), *totals],
            output_dtypes=[mx.float32, *types[1:]],
        )
        # The second pass reads the sum that the first wrote down.
        total = total[0] if total else value
        second = _Form(shift=form.shift, silu=silu, unfold=form.unfold)
        apply = self._kernel(
            "slab_norm" + second.suffix,
            [*second.inputs, "partial", "weight", "bias"],
            ["y_out"],
            _slab_norm(second),
        )
        each = -(-pixels // BLOCKS)
        (y,) = apply(
            inputs=[total, *([] if shift is None else [shift]), partial, *ends],
            scalars={**numbers, "C1": channels, "C2": 0, "eps": float(norm.eps), "each": each},
            template=[*template, ("THREADS", STREAM_THREADS)],
            grid=(-(-pixels // each) * STREAM_THREADS, batch, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[y_shape],
            output_dtypes=[value.dtype],
        )
        return y, total

    @_for_checked_types
    def layer_norm(
        self, x: mx.array, weight: mx.array, bias: mx.array, shift: mx.array, eps: float
    ) -> mx.array:
        """As ``Plain.layer_norm``."""
        if x.size > LARGEST:
            return Plain().layer_norm(x, weight, bias, shift, eps)
        channels = x.shape[-1]
        rows = x.size // channels
        kernel = self._kernel(
            "layer_norm",
            ["value", "shift", "weight", "bias"],
            ["y_out"],
            _LAYER_NORM,
        )
        width = next(
            w for w in (8, 4, 2, 1) if channels % w == 0 and (w == 1 or channels // w >= WARP)
        )
        return kernel(
            inputs=[x, shift, weight, bias],
            scalars={"L": rows, "eps": float(eps)},
            template=[("T", x.dtype), ("V", width), ("C", channels), ("ROWS", ROWS)],
            grid=(-(-rows // ROWS) * ROWS * WARP, 1, 1),
            threadgroup=(ROWS * WARP, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    @_for_checked_types
    def gate(self, x: mx.array, bias: mx.array, beside: mx.array | None = None) -> mx.array:
        """As ``Plain.gate``."""
        if not self.has_gate or x.size > LARGEST:
            return Plain().gate(x, bias, beside)
        width = x.shape[-1] // 2
        rows = x.size // (2 * width)
        more = 0 if beside is None else beside.shape[-1]
        each = _width(width, more)
        suffix, terms = ("", []) if beside is None else ("_beside", [beside])
        kernel = self._kernel(
            "gate" + suffix,
            ["value", "bias", "beside"][: 2 + len(terms)],
            ["y_out"],
            _gate(beside is not None),
        )
        threads = -(-rows * (width + more) // each // STREAM_THREADS) * STREAM_THREADS
        return kernel(
            inputs=[x, bias, *terms],
            scalars={"L": rows, "F": width, "W": width + more},
            template=[("T", x.dtype), ("V", each), ("THREADS", STREAM_THREADS)],
            grid=(threads, 1, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[(*x.shape[:-1], width + more)],
            output_dtypes=[x.dtype],
        )[0]

    @_for_checked_types
    def attention(
        self,
        queries: mx.array,
        others: mx.array,
        batch: int,
        heads: int,
        *,
        scale: float,
        score_bytes: int = SCORE_BYTES,
        backend: str | None = None,
    ) -> mx.array:
        """As ``Plain.attention``."""
        is_self = others is queries
        q_row, kv_row = queries.shape[-1], others.shape[-1]
        tokens, keys = queries.size // q_row // batch, others.size // kv_row // batch
        width = kv_row // (3 if is_self else 2) // heads
        is_half = queries.dtype in (mx.float16, mx.bfloat16)
        is_ours = width > CUDA_MAX_WIDTH or keys <= FEW_KEYS
        is_ours = is_ours and max(queries.size, others.size) <= LARGEST
        if self.name != "cuda" or not is_half or width % 8 or width > 160 or not is_ours:
            return Plain().attention(
                queries,
                others,
                batch,
                heads,
                scale=scale,
                score_bytes=score_bytes,
                backend=backend,
            )
        kernel = self._kernel(
            "attention",
            ["queries", "others"],
            ["y_out"],
            _ATTENTION,
            _ATTENTION_HEADER,
        )
        warps = QUERY_WARPS
        blocks = -(-tokens // (16 * warps))
        return kernel(
            inputs=[queries, others],
            scalars={
                "TQ": tokens,
                "S": keys,
                "H": heads,
                "q_row": q_row,
                "kv_row": kv_row,
                "scale": float(scale),
            },
            template=[
                ("T", queries.dtype),
                ("D", width),
                ("KEYS", _keys(keys, width)),
                ("WARPS", warps),
            ],
            grid=(blocks * 32 * warps, batch * heads, 1),
            threadgroup=(32 * warps, 1, 1),
            output_shapes=[(batch * tokens, heads * width)],
            output_dtypes=[queries.dtype],
        )[0]

    @_for_checked_types
    def total(
        self,
        value: mx.array,
        residual: mx.array | None,
        shift: mx.array,
        size: Size,
        doubled: tuple[int, int] | None = None,
    ) -> mx.array:
        """As ``Plain.total``."""
        batch, rows, columns = size
        channels = value.shape[-1]
        out_rows, out_columns = (rows, columns) if doubled is None else doubled
        if batch * out_rows * out_columns * channels > LARGEST:
            return Plain().total(value, residual, shift, size, doubled)
        each = _width(channels)
        terms = [value] if residual is None else [value, residual]
        kernel = self._kernel(
            "total" if residual is None else "total_residual",
            [*["value", "residual"][: len(terms)], "shift"],
            ["y_out"],
            _total(residual is not None),
        )
        count = batch * out_rows * out_columns * channels // each
        factor = 1 if doubled is None else 2
        return kernel(
            inputs=[*terms, shift],
            scalars={
                "B": batch,
                "C": channels,
                "rows": rows,
                "columns": columns,
                "out_rows": out_rows,
                "out_columns": out_columns,
                "factor": factor,
            },
            template=[("T", value.dtype), ("V", each), ("THREADS", STREAM_THREADS)],
            grid=(-(-count // STREAM_THREADS) * STREAM_THREADS, 1, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[(batch, out_rows, out_columns, channels)],
            output_dtypes=[value.dtype],
        )[0]


# Choosing ----------------------------------------------------------------------------------------


@cache
def kernels_for(backend: str, dtype: mx.Dtype) -> tuple[Kernels | Plain, str]:
    """The kernels for the device that runs, and a line that says why these.

    They are compiled and compared with ``Plain`` when the first network is made ready; that they
    passed is kept for this device, this MLX, this compiler and these kernels.

    Args:
        backend: "metal", "cuda" or "cpu".
        dtype: of the maps.
    """
    if backend == "cpu":
        return Plain(), "the CPU backend takes no kernels: MLX's operations"
    if os.environ.get("MAPLE_KERNELS") == "0":
        return Plain(), "switched off by MAPLE_KERNELS=0: MLX's operations"
    found = kernels_of(backend)
    fault = verdict.kept(_key(backend, dtype), lambda: disagreement(found, dtype))
    if fault is not None:
        return Plain(), f"not used on this device ({fault}): MLX's operations"
    found.dtype = dtype
    return found, "compiled and checked on this device"


def _key(backend: str, dtype: mx.Dtype) -> str:
    """Names all that a verdict on kernels depends on."""
    sources = [Path(__file__), Path(nvrtc.__file__)]
    device = mx.device_info().get("device_name", "")
    try:
        mlx = version("mlx")
    except PackageNotFoundError:  # a build without metadata
        mlx = ""
    compiler = nvrtc.compiler() if backend == "cuda" else ""
    facts = [
        backend,
        str(device),
        mlx,
        compiler,
        str(dtype),
        *(path.read_text() for path in sources),
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def kernels_of(backend: str, make: Callable[..., Any] | None = None) -> Kernels:
    """A backend's kernels, unchecked; ``make`` can take the place of MLX's, to look at calls."""
    if backend == "cuda":
        has_clusters = (
            make is None and int(mx.device_info().get("compute_capability_major", 0)) >= 9
        )
        return Kernels(
            _CUDA, make or nvrtc.Kernel, backend, has_gate=True, has_clusters=has_clusters
        )
    return Kernels(_METAL, make or _MetalKernel, backend, has_gate=False)


def disagreement(kernels: Kernels, dtype: mx.Dtype) -> str | None:
    """What is wrong with kernels on the device that runs, in a few words; None if nothing is."""
    plain = Plain()
    numbers = np.random.default_rng(0)

    def array(*shape: int, of: mx.Dtype = dtype) -> mx.array:
        return mx.array(numbers.standard_normal(shape, np.float32) + 0.5).astype(of)

    size, channels = (2, 6, 5), 64
    value, residual, skip = (array(2, 30, channels) for _ in range(3))
    norm = Norm(1 + array(channels, of=mx.float32), array(channels, of=mx.float32), 16, 1e-5)
    weight, bias = (mx.concatenate([a, a]) for a in (norm.weight, norm.bias))
    wide = Norm(weight, bias, norm.groups, norm.eps)
    shift = array(2, 3 * channels, of=mx.float32)
    row = shift[0, :channels]
    large = array(1, 3000, 64), Norm(norm.weight, norm.bias, 1, 1e-6), shift[:1]

    other = array(1, 3000, 64)
    several = array(2, 1200, 640), array(2, 1200, 640)
    shared = Norm(1 + array(640, of=mx.float32), array(640, of=mx.float32), 32, 1e-5)
    joined, alone, pairs = array(2, 70, 960), array(2, 70, 80), array(2, 77, 160)
    many = array(1, 300, 240)
    # More pixels than registers hold, in as few numbers as a cluster is used for.
    vast = mx.random.normal((1, 13000, 384), key=mx.random.key(0)).astype(dtype)
    split = Norm(1 + array(384, of=mx.float32), array(384, of=mx.float32), 12, 1e-5)
    cases: dict[str, Callable[[Any], Any]] = {
        "group norm": lambda k: k.group_norm(value, norm, size, shift=shift, start=7),
        "group norm with a residual": lambda k: k.group_norm(
            value, norm, size, residual=residual, shift=shift[:1], silu=False, wanted="tokens"
        ),
        "group norm with a skip": lambda k: k.group_norm(
            value, wide, size, residual=residual, skip=skip, shift=shift, wanted="neighbours"
        ),
        "group norm of a large map": lambda k: k.group_norm(
            large[0], large[1], (1, 60, 50), shift=large[2]
        ),
        "group norm of a large map with a residual": lambda k: k.group_norm(
            large[0], large[1], (1, 60, 50), residual=other, shift=large[2]
        ),
        "group norm of a map that blocks share": lambda k: k.group_norm(
            several[0], shared, (2, 40, 30), residual=several[1], shift=mx.repeat(shift[:1], 4, 1)
        ),
        "group norm of a map that registers do not hold": lambda k: k.group_norm(
            vast, split, (1, 130, 100), residual=vast, silu=False, wanted="tokens"
        ),
        "group norm of two such maps": lambda k: k.group_norm(
            several[0][..., :320], shared, (2, 40, 30), skip=several[1][..., 320:], silu=False
        ),
        "layer norm": lambda k: k.layer_norm(value, norm.weight, norm.bias, row, 1e-5),
        "attention": lambda k: k.attention(joined, joined, 2, 2, scale=0.11),
        "attention to several blocks": lambda k: k.attention(many, many, 1, 1, scale=0.11),
        "attention to few": lambda k: k.attention(alone, pairs, 2, 2, scale=0.3),
        "gate": lambda k: k.gate(value, row),
        "gate beside": lambda k: k.gate(value, row, residual),
        "total": lambda k: k.total(value, residual, row, size, (12, 9)),
    }
    for name, case in cases.items():
        try:
            got, wanted = (
                [np.array(a.astype(mx.float32)) for a in (o if isinstance(o, tuple) else (o,))]
                for o in (case(kernels), case(plain))
            )
        except Exception as error:  # a compiler's or a driver's: whatever it is, do without
            return f"{name}: {str(error).splitlines()[0][:120] if str(error) else type(error)}"
        for a, b in zip(got, wanted, strict=True):
            if not np.abs(a - b).max() <= TOLERANCE[dtype] * np.abs(b).max():
                return f"{name} differs by {np.abs(a - b).max():.1e}"
    return None
