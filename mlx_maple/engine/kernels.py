"""Kernels for what MLX's own operations do far from the memory's speed: norms, gates, joins.

A feature map travels as a sum that nobody has added up yet: ``value + residual + shift``, arrays
(B, N, C) with N pixels in reading order, and a float32 row of biases. The next norm adds it up on
its way, so that no pass over memory is spent on a bias or a skip alone.

Legend   B batch; N pixels; C channels; G groups; L rows of tokens; F width of a gate.
Source   Wu and He 2018, Group Normalization (arXiv:1803.08494); Chan et al. 1979 for shifted sums;
         Shazeer 2020, GLU variants (arXiv:2002.05202). What they compute is mlx_maple/models' own:
         layers.GroupNorm, nn.LayerNorm, attention.FeedForward, resnet.double.
Two dialects  One text serves CUDA and Metal; what differs stands in ``_CUDA`` and ``_METAL``. A
         kernel is used on a device only after it was compiled there and agreed with ``Plain``, the
         same in MLX's operations; else ``Plain`` is, and ``chosen`` says why.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from string import Template
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# One block a group of one sample, while that many numbers do not keep a multiprocessor for long.
ONE_BLOCK = 160_000
STREAM_THREADS = 256  # of blocks that stream a map
SLABS = 64  # parts of a map whose sums are taken apart, for large maps
WARP = 32
ROWS = 4  # token rows a block normalises, one a warp
TOLERANCE = {
    mx.float32: 2e-5,
    mx.float16: 4e-3,
    mx.bfloat16: 3e-2,
}  # of a self-check, times the max


class Norm(NamedTuple):
    """A group norm's constants: weight (C,) and bias (C,) float32, G, eps."""

    weight: mx.array
    bias: mx.array
    groups: int
    eps: float


class Plain:
    """The same in MLX's operations: for the CPU, for devices that refuse a kernel, for checks."""

    name = "plain"

    def group_norm(
        self,
        value: mx.array,
        norm: Norm,
        *,
        residual: mx.array | None = None,
        skip: mx.array | None = None,
        shift: mx.array | None = None,
        start: int = 0,
        silu: bool = True,
        size: tuple[int, int] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Add up, join, normalise and gate a feature map.

        Args:
            value: (B, N, C1).
            norm: over C1 + C2 channels.
            residual: (B, N, C1), added to ``value``.
            skip: (B, N, C2), joined behind it.
            shift: float32 biases that are still owed, rows (1, …) or (B, …).
            start: where in such a row this map's C biases begin.
            silu: gate with SiLU.
            size: rows and columns where a 3x3 neighbourhood of each pixel is wanted.

        Returns:
            (B, N, C) in the type of ``value``, or (B, N, 9 C) with ``size``: neighbours in reading
            order, zeros beyond the border. And ``value + residual``, which still owes its shift.
        """
        total = value if residual is None else value + residual
        x = total if skip is None else mx.concatenate([total, skip], axis=-1)
        batch, _, channels = x.shape
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
        return (y if size is None else unfold(y, size)), total

    def layer_norm(
        self, x: mx.array, weight: mx.array, bias: mx.array, shift: mx.array, eps: float
    ) -> mx.array:
        """Normalise tokens (…, C) that still owe a float32 ``shift`` (C,)."""
        return mx.fast.layer_norm(x + shift.astype(x.dtype), weight, bias, eps)

    def gate(self, x: mx.array, bias: mx.array) -> mx.array:
        """GEGLU of (…, 2F), which still owes its ``bias`` (2F,) float32: to (…, F)."""
        value, gate = mx.split(x + bias.astype(x.dtype), 2, axis=-1)
        return value * nn.gelu(gate)

    def total(
        self,
        value: mx.array,
        residual: mx.array | None,
        shift: mx.array,
        size: tuple[int, int],
        doubled: tuple[int, int] | None = None,
    ) -> mx.array:
        """Add a feature map up: (B, N, C) to (B, h, w, C), or to ``doubled`` rows and columns.

        Doubling is nearest-neighbour, cut to a size that may be one short of double.
        """
        x = value if residual is None else value + residual
        x = x + shift.astype(x.dtype)
        batch, _, channels = x.shape
        rows, columns = size
        x = x.reshape(batch, rows, columns, channels)
        if doubled is None:
            return x
        x = mx.broadcast_to(x[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
        return x.reshape(batch, 2 * rows, 2 * columns, channels)[:, : doubled[0], : doubled[1]]


def unfold(x: mx.array, size: tuple[int, int]) -> mx.array:
    """Each pixel's 3x3 neighbourhood: (B, N, C) to (B, N, 9 C), zeros beyond the border."""
    batch, _, channels = x.shape
    rows, columns = size
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
        threads: of a block that owns a group.
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
__device__ inline float silu(float x) { return x / (1.0f + __expf(-x)); }
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
""",
    1024,
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
inline float silu(float x) { return x / (1.0f + metal::exp(-x)); }
""",
    512,  # a kernel that needs many registers is not given more on the smaller chips
)


# Sources -----------------------------------------------------------------------------------------

# Numbers that a kernel is told at run time, so that one compilation serves all sizes.
_DIMS = """
  const int N = dims[0], C1 = dims[1], C2 = dims[2], G = dims[3];
  const int rows = dims[4], columns = dims[5], row_start = dims[6], row_stride = dims[7];
  const int C = C1 + C2, CPG = C / G;
"""


@dataclass(frozen=True)
class _Form:
    """Which terms a feature map's sum has, and what becomes of it."""

    residual: bool = False
    skip: bool = False
    shift: bool = False
    silu: bool = False
    unfold: bool = False

    @property
    def inputs(self) -> list[str]:
        named = [n for n in ("residual", "skip", "shift") if getattr(self, n)]
        return ["value", *named]

    @property
    def suffix(self) -> str:
        parts = ("residual", "skip", "shift", "silu", "unfold")
        return "".join(f"_{n}" for n in parts if getattr(self, n))

    def gather(self, b: str, n: str, c: str, source: str = "terms") -> str:
        """Text that fills ``float x[V]`` with the sum at sample b, pixel n, channel c.

        Args:
            b: expression of the sample.
            n: of the pixel.
            c: of the first of V channels.
            source: what to read: the "terms"; the terms, and "write" value + residual down; or
                what was "written".
        """
        at = f"(({b}) * N + ({n})) * C1 + ({c})"
        own = f"auto v = fetch<V>({'total' if source == 'written' else 'value'} + {at});"
        if source != "written":
            own += f"""
      auto r = fetch<V>(residual + {at});
      for (int i = 0; i < V; ++i) v.at[i] = T(float(v.at[i]) + float(r.at[i]));"""
        if source == "write":
            own += f"""
      put<V>(total + {at}, v);"""
        if not self.residual:
            own = f"auto v = fetch<V>(value + {at});"
        text = f"{{ {own} for (int i = 0; i < V; ++i) x[i] = float(v.at[i]); }}"
        if self.skip:
            text = f"""
    if (({c}) < C1) {text} else {{
      auto v = fetch<V>(skip + (({b}) * N + ({n})) * C2 + ({c}) - C1);
      for (int i = 0; i < V; ++i) x[i] = float(v.at[i]);
    }}"""
        if self.shift:
            text += f"""
    for (int i = 0; i < V; ++i) x[i] += shift[({b}) * row_stride + row_start + ({c}) + i];"""
        return text

    def store(self, b: str, n: str, c: str) -> str:
        """Text that normalises, gates and writes ``x``: ``y = x * weight * rstd + …``."""
        gate = "y = silu(y);" if self.silu else ""
        text = f"""
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) {{
      float y = (x[i] - mean) * rstd * weight[({c}) + i] + bias[({c}) + i];
      {gate}
      out.at[i] = T(y);
    }}"""
        if not self.unfold:
            return text + f"\n    put<V>(y_out + (({b}) * N + ({n})) * C + ({c}), out);"
        return (
            text
            + f"""
    Pack<T, V> none;
    for (int i = 0; i < V; ++i) none.at[i] = T(0.0f);
    const int row = ({n}) / columns, column = ({n}) - row * columns;
    for (int k = 0; k < 9; ++k) {{
      const int dy = k / 3 - 1, dx = k % 3 - 1;
      // This pixel is neighbour k of the one at (row - dy, column - dx).
      const int i = row - dy, j = column - dx;
      if (i >= 0 && i < rows && j >= 0 && j < columns)
        put<V>(y_out + ((({b}) * N + i * columns + j) * 9 + k) * C + ({c}), out);
      const int u = row + dy, v = column + dx;
      if (u < 0 || u >= rows || v < 0 || v >= columns)
        put<V>(y_out + ((({b}) * N + ({n})) * 9 + k) * C + ({c}), none);
    }}"""
        )


def _one_block_norm(form: _Form) -> str:
    """A block owns a group of a sample: sums about the group's first number, then the second pass.

    Sums of squares about a number of the group itself lose no digits to a large mean.
    """
    return f"""{_DIMS}
  const int b = $block / G, g = $block % G, tid = $thread;
  const int P = CPG / V, R = THREADS / P;
  const int c = g * CPG + (tid % P) * V, r = tid / P;
  $shared float sums[64];
  float x[V];
  {form.gather("b", "0", "g * CPG")}
  const float origin = x[0];
  float sum = 0.0f, squares = 0.0f;
  if (r < R) for (int n = r; n < N; n += R) {{
    {form.gather("b", "n", "c", "write")}
    for (int i = 0; i < V; ++i) {{
      const float d = x[i] - origin;
      sum += d;
      squares += d * d;
    }}
  }}
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (tid % 32 == 0) {{ sums[tid / 32] = sum; sums[32 + tid / 32] = squares; }}
  $barrier
  const int lane = tid % 32;
  sum = warp_sum(lane < THREADS / 32 ? sums[lane] : 0.0f);
  squares = warp_sum(lane < THREADS / 32 ? sums[32 + lane] : 0.0f);
  const float count = float(N) * float(CPG);
  const float offset = sum / count;
  const float mean = origin + offset;
  const float rstd = $rsqrt(squares / count - offset * offset + eps[0]);
  if (r < R) for (int n = r; n < N; n += R) {{
    {form.gather("b", "n", "c", "written")}
    {form.store("b", "n", "c")}
  }}
"""


def _slab_sums(form: _Form) -> str:
    """Sums of one slab of pixels, about each group's first number: (B, slabs, G, 2)."""
    return f"""{_DIMS}
  const int slab = $block, b = $block_y, tid = $thread;
  const int Q = C / V, P = CPG / V;
  const int R = Q < THREADS ? THREADS / Q : 1;
  const int each = (N + SLABS - 1) / SLABS;
  const int begin = slab * each, end = begin + each < N ? begin + each : N;
  $shared float held[2 * THREADS];
  float group_sum = 0.0f, group_squares = 0.0f;
  for (int base = 0; base < Q; base += THREADS) {{
    const int width = Q - base < THREADS ? Q - base : THREADS;
    const int q = base + tid % width, r = tid / width;
    const int c = q * V;
    float x[V];
    float sum = 0.0f, squares = 0.0f;
    if (r < R) {{
      const int first_channel = q / P * CPG;
      {form.gather("b", "0", "first_channel")}
      float origin = x[0];
      for (int n = begin + r; n < end; n += R) {{
        {form.gather("b", "n", "c", "write")}
        for (int i = 0; i < V; ++i) {{
          const float d = x[i] - origin;
          sum += d;
          squares += d * d;
        }}
      }}
    }}
    held[tid] = sum;
    held[THREADS + tid] = squares;
    $barrier
    const int low = tid * P > base ? tid * P : base;
    const int high = (tid + 1) * P < base + width ? (tid + 1) * P : base + width;
    if (tid < G) for (int k = 0; k < R; ++k) for (int e = low; e < high; ++e) {{
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
    """The second pass over large maps: every block knows all groups, and streams some pixels."""
    return f"""{_DIMS}
  const int b = $block_y, tid = $thread, Q = C / V;
  $shared float means[MAX_GROUPS];
  $shared float rstds[MAX_GROUPS];
  float x[V];
  if (tid < G) {{
    float sum = 0.0f, squares = 0.0f;
    for (int k = 0; k < SLABS; ++k) {{
      sum += partial[((b * SLABS + k) * G + tid) * 2];
      squares += partial[((b * SLABS + k) * G + tid) * 2 + 1];
    }}
    const int first_channel = tid * CPG;
    {form.gather("b", "0", "first_channel")}
    const float count = float(N) * float(CPG);
    const float offset = sum / count;
    means[tid] = x[0] + offset;
    rstds[tid] = $rsqrt(squares / count - offset * offset + eps[0]);
  }}
  $barrier
  const int begin = $block * WORK * THREADS + tid;
  for (int k = 0; k < WORK; ++k) {{
    const int at = begin + k * THREADS;
    if (at < N * Q) {{
      const int n = at / Q, c = (at - n * Q) * V;
      const float mean = means[c / CPG], rstd = rstds[c / CPG];
      {form.gather("b", "n", "c")}
      {form.store("b", "n", "c")}
    }}
  }}
"""


# A warp a row; the row stays in registers between the passes.
_LAYER_NORM = """
  const int L = dims[0], lane = $thread % 32;
  const int row = $block * ROWS + $thread / 32;
  if (row < L) {
    constexpr int EACH = (C / V + 31) / 32;
    float x[EACH * V];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = (k * 32 + lane) * V;
      if (c < C) {
        auto v = fetch<V>(value + row * C + c);
        for (int i = 0; i < V; ++i) {
          x[k * V + i] = float(v.at[i]) + shift[c + i];
          sum += x[k * V + i];
        }
      }
    }
    const float mean = warp_sum(sum) / float(C);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < EACH; ++k)
      if ((k * 32 + lane) * V < C)
        for (int i = 0; i < V; ++i) {
          const float d = x[k * V + i] - mean;
          squares += d * d;
        }
    const float rstd = $rsqrt(warp_sum(squares) / float(C) + eps[0]);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = (k * 32 + lane) * V;
      if (c < C) {
        Pack<T, V> out;
        for (int i = 0; i < V; ++i)
          out.at[i] = T((x[k * V + i] - mean) * rstd * weight[c + i] + bias[c + i]);
        put<V>(y_out + row * C + c, out);
      }
    }
  }
"""

_GATE = """
  const int L = dims[0], F = dims[1];
  const int at = ($block * THREADS + $thread) * V;
  if (at < L * F) {
    const int row = at / F, f = at - row * F;
    auto v = fetch<V>(value + row * 2 * F + f);
    auto g = fetch<V>(value + row * 2 * F + F + f);
    Pack<T, V> out;
    for (int i = 0; i < V; ++i)
      out.at[i] = T((float(v.at[i]) + bias[f + i]) * gelu(float(g.at[i]) + bias[F + f + i]));
    put<V>(y_out + at, out);
  }
"""


def _total(residual: bool) -> str:
    added = ""
    if residual:
        added = """
    auto r = fetch<V>(residual + from);
    for (int i = 0; i < V; ++i) x[i] += float(r.at[i]);"""
    return f"""
  const int B = dims[0], C = dims[1], rows = dims[2], columns = dims[3];
  const int out_rows = dims[4], out_columns = dims[5], factor = dims[6];
  const int Q = C / V, at = $block * THREADS + $thread;
  if (at < B * out_rows * out_columns * Q) {{
    const int pixel = at / Q, c = (at - pixel * Q) * V;
    const int b = pixel / (out_rows * out_columns);
    const int inside = pixel - b * out_rows * out_columns;
    const int row = inside / out_columns, column = inside - row * out_columns;
    const int from = ((b * rows + row / factor) * columns + column / factor) * C + c;
    auto v = fetch<V>(value + from);
    float x[V];
    for (int i = 0; i < V; ++i) x[i] = float(v.at[i]) + shift[c + i];{added}
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) out.at[i] = T(x[i]);
    put<V>(y_out + pixel * C + c, out);
  }}
"""


# Calling them ------------------------------------------------------------------------------------


@cache
def _ints(*values: int) -> mx.array:
    return mx.array(values, dtype=mx.int32)


@cache
def _float(value: float) -> mx.array:
    return mx.array([value], dtype=mx.float32)


def _width(*counts: int) -> int:
    """Numbers that one access takes: the widest that divides every count."""
    return next(width for width in (8, 4, 2, 1) if not any(n % width for n in counts))


@dataclass(eq=False)
class Kernels:
    """The same as ``Plain`` through kernels of our own; shapes and arguments are those there."""

    dialect: _Dialect
    make: Callable[..., Any]  # mx.fast.cuda_kernel or mx.fast.metal_kernel
    name: str  # of the backend
    has_gate: bool  # Metal has no erf of its own: there MLX's fused operations serve
    _made: dict[str, Any] = field(default_factory=dict)

    def _kernel(self, name: str, inputs: list[str], outputs: list[str], source: str) -> Any:
        if name not in self._made:
            text = Template(source).substitute(self.dialect.words)
            self._made[name] = self.make(
                name=f"maple_{name}",
                input_names=inputs,
                output_names=outputs,
                header=self.dialect.header,
                source=text,
            )
        return self._made[name]

    def group_norm(
        self,
        value: mx.array,
        norm: Norm,
        *,
        residual: mx.array | None = None,
        skip: mx.array | None = None,
        shift: mx.array | None = None,
        start: int = 0,
        silu: bool = True,
        size: tuple[int, int] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """As ``Plain.group_norm``."""
        batch, pixels, own = value.shape
        joined = 0 if skip is None else skip.shape[-1]
        channels = own + joined
        per_group = channels // norm.groups
        if norm.groups > STREAM_THREADS:
            return Plain().group_norm(
                value,
                norm,
                residual=residual,
                skip=skip,
                shift=shift,
                start=start,
                silu=silu,
                size=size,
            )
        form = _Form(
            residual is not None, skip is not None, shift is not None, silu, size is not None
        )
        rows, columns = (1, pixels) if size is None else size
        stride = 0 if shift is None or shift.shape[0] == 1 else shift.shape[-1]
        dims = _ints(pixels, own, joined, norm.groups, rows, columns, start, stride)
        terms = [value, *(t for t in (residual, skip, shift) if t is not None)]
        width = _width(per_group, own)
        template = [("T", value.dtype), ("V", width)]
        ends = [norm.weight, norm.bias, _float(norm.eps), dims]
        y_shape = (batch, pixels, channels * (1 if size is None else 9))
        totals = [] if residual is None else [value.shape]
        total_names = [] if residual is None else ["total"]
        types = [value.dtype] * (1 + len(totals))
        threads = self.dialect.threads
        if pixels * per_group <= ONE_BLOCK and per_group // width <= threads:
            kernel = self._kernel(
                "group_norm" + form.suffix,
                [*form.inputs, "weight", "bias", "eps", "dims"],
                ["y_out", *total_names],
                _one_block_norm(form),
            )
            outputs = kernel(
                inputs=[*terms, *ends],
                template=[*template, ("THREADS", threads)],
                grid=(batch * norm.groups * threads, 1, 1),
                threadgroup=(threads, 1, 1),
                output_shapes=[y_shape, *totals],
                output_dtypes=types,
            )
            return outputs[0], value if residual is None else outputs[1]
        sums = self._kernel(
            "slab_sums" + _Form(form.residual, form.skip, form.shift).suffix,
            [*form.inputs, "dims"],
            ["partial", *total_names],
            _slab_sums(form),
        )
        template.append(("THREADS", STREAM_THREADS))
        template.append(("SLABS", SLABS))
        partial, *total = sums(
            inputs=[*terms, dims],
            template=template,
            grid=(SLABS * STREAM_THREADS, batch, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[(batch, SLABS, norm.groups, 2), *totals],
            output_dtypes=[mx.float32, *types[1:]],
        )
        # The second pass reads the sum that the first wrote down.
        total = total[0] if total else value
        second = _Form(False, form.skip, form.shift, silu, form.unfold)
        apply = self._kernel(
            "slab_norm" + second.suffix,
            [*second.inputs, "partial", "weight", "bias", "eps", "dims"],
            ["y_out"],
            _slab_norm(second),
        )
        work = 4
        blocks = -(-pixels * (channels // width) // (STREAM_THREADS * work))
        (y,) = apply(
            inputs=[total, *terms[2 if residual is not None else 1 :], partial, *ends],
            template=[*template, ("WORK", work), ("MAX_GROUPS", STREAM_THREADS)],
            grid=(blocks * STREAM_THREADS, batch, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[y_shape],
            output_dtypes=[value.dtype],
        )
        return y, total

    def layer_norm(
        self, x: mx.array, weight: mx.array, bias: mx.array, shift: mx.array, eps: float
    ) -> mx.array:
        """As ``Plain.layer_norm``."""
        channels = x.shape[-1]
        rows = x.size // channels
        kernel = self._kernel(
            "layer_norm",
            ["value", "shift", "weight", "bias", "eps", "dims"],
            ["y_out"],
            _LAYER_NORM,
        )
        width = next(
            w for w in (8, 4, 2, 1) if channels % w == 0 and (w == 1 or channels // w >= WARP)
        )
        return kernel(
            inputs=[x, shift, weight, bias, _float(eps), _ints(rows, 0, 0, 0, 0, 0, 0, 0)],
            template=[("T", x.dtype), ("V", width), ("C", channels), ("ROWS", ROWS)],
            grid=(-(-rows // ROWS) * ROWS * WARP, 1, 1),
            threadgroup=(ROWS * WARP, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    def gate(self, x: mx.array, bias: mx.array) -> mx.array:
        """As ``Plain.gate``."""
        if not self.has_gate:
            return Plain().gate(x, bias)
        width = x.shape[-1] // 2
        rows = x.size // (2 * width)
        each = _width(width)
        kernel = self._kernel("gate", ["value", "bias", "dims"], ["y_out"], _GATE)
        threads = -(-rows * width // each // STREAM_THREADS) * STREAM_THREADS
        return kernel(
            inputs=[x, bias, _ints(rows, width, 0, 0, 0, 0, 0, 0)],
            template=[("T", x.dtype), ("V", each), ("THREADS", STREAM_THREADS)],
            grid=(threads, 1, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[(*x.shape[:-1], width)],
            output_dtypes=[x.dtype],
        )[0]

    def total(
        self,
        value: mx.array,
        residual: mx.array | None,
        shift: mx.array,
        size: tuple[int, int],
        doubled: tuple[int, int] | None = None,
    ) -> mx.array:
        """As ``Plain.total``."""
        batch, _, channels = value.shape
        rows, columns = size
        out_rows, out_columns = size if doubled is None else doubled
        each = _width(channels)
        terms = [value] if residual is None else [value, residual]
        kernel = self._kernel(
            "total" if residual is None else "total_residual",
            [*["value", "residual"][: len(terms)], "shift", "dims"],
            ["y_out"],
            _total(residual is not None),
        )
        count = batch * out_rows * out_columns * channels // each
        factor = 1 if doubled is None else 2
        dims = _ints(batch, channels, rows, columns, out_rows, out_columns, factor, 0)
        return kernel(
            inputs=[*terms, shift, dims],
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

    They are compiled and compared with ``Plain`` once a process, at the first network that is made
    ready; MLX keeps what was compiled on the disk.

    Args:
        backend: "metal", "cuda" or "cpu".
        dtype: of the maps.
    """
    if backend == "cpu":
        return Plain(), "the CPU backend takes no kernels: MLX's operations"
    if os.environ.get("MAPLE_KERNELS") == "0":
        return Plain(), "switched off by MAPLE_KERNELS=0: MLX's operations"
    found = kernels_of(backend)
    fault = disagreement(found, dtype)
    if fault is not None:
        return Plain(), f"not used on this device ({fault}): MLX's operations"
    return found, "compiled and checked on this device"


def kernels_of(backend: str, make: Callable[..., Any] | None = None) -> Kernels:
    """A backend's kernels, unchecked; ``make`` can take the place of MLX's, to look at calls."""
    if backend == "cuda":
        return Kernels(_CUDA, make or mx.fast.cuda_kernel, backend, has_gate=True)
    return Kernels(_METAL, make or mx.fast.metal_kernel, backend, has_gate=False)


def disagreement(kernels: Kernels, dtype: mx.Dtype) -> str | None:
    """What is wrong with kernels on the device that runs, in a few words; None if nothing is."""
    plain = Plain()
    numbers = np.random.default_rng(0)

    def array(*shape: int, of: mx.Dtype = dtype) -> mx.array:
        return mx.array(numbers.standard_normal(shape, np.float32) + 0.5).astype(of)

    size, channels = (6, 5), 64
    value, residual, skip = (array(2, 30, channels) for _ in range(3))
    norm = Norm(1 + array(channels, of=mx.float32), array(channels, of=mx.float32), 16, 1e-5)
    wide = Norm(*(mx.concatenate([a, a]) for a in norm[:2]), norm.groups, norm.eps)
    shift = array(2, 3 * channels, of=mx.float32)
    row = shift[0, :channels]
    large = array(1, 3000, 64), Norm(norm.weight, norm.bias, 1, 1e-6), shift[:1]

    cases: dict[str, Callable[[Any], Any]] = {
        "group norm": lambda k: k.group_norm(value, norm, shift=shift, start=7),
        "group norm with a residual": lambda k: k.group_norm(
            value, norm, residual=residual, shift=shift[:1], silu=False
        ),
        "group norm with a skip": lambda k: k.group_norm(
            value, wide, residual=residual, skip=skip, shift=shift, size=size
        ),
        "group norm of a large map": lambda k: k.group_norm(large[0], large[1], shift=large[2]),
        "layer norm": lambda k: k.layer_norm(value, norm.weight, norm.bias, row, 1e-5),
        "gate": lambda k: k.gate(value, row),
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
