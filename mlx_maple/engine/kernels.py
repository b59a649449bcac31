"""Kernels for what MLX's own operations do far from the memory's speed: norms, gates, joins.

A feature map travels as a sum that nobody has added up yet: ``value + residual + shift``, arrays of
B N pixels of C channels, and a float32 row of biases. The next norm adds it up on its way, so that
no pass over memory is spent on a bias or a skip alone. Arrays that only lie in their order are
taken in whatever shape they come: every reshape between two kernels is work for MLX's host side.

Legend   B batch; N pixels; C channels; G groups; L rows of tokens; F width of a gate.
Source   Wu and He 2018, Group Normalization (arXiv:1803.08494); Chan et al. 1979 for shifted sums;
         Shazeer 2020, GLU variants (arXiv:2002.05202). What they compute is mlx_maple/models' own:
         layers.GroupNorm, nn.LayerNorm, attention.FeedForward, resnet.double.
Two dialects  One text serves CUDA and Metal: kernel_sources.py. A kernel is used on a device only
         after it was compiled there and agreed with ``Plain``, the same in MLX's operations; else
         ``Plain`` is, and ``kernels_for`` says why.
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

from mlx_maple.engine import kernel_sources as sources
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

    def interleave(self, phases: mx.array) -> mx.array:
        """A map twice as large out of its four phases: (B, h + 1, w + 1, 4 C) to (B, 2h, 2w, C).

        Phase 2 i + j has every other pixel of the map from row i and column j on, and itself begins
        in row i and column j.
        """
        batch, rows, columns, channels = (
            n - k for n, k in zip(phases.shape, (0, 1, 1, 0), strict=True)
        )
        split = phases.reshape(batch, rows + 1, columns + 1, 2, 2, channels // 4)
        parts = [
            mx.stack([split[:, i : i + rows, j : j + columns, i, j] for j in (0, 1)], axis=3)
            for i in (0, 1)
        ]
        return mx.stack(parts, axis=2).reshape(batch, 2 * rows, 2 * columns, channels // 4)


def unfold(x: mx.array, size: Size) -> mx.array:
    """Each pixel's 3x3 neighbourhood: (B, N, C) to (B, N, 9 C), zeros beyond the border."""
    batch, rows, columns = size
    channels = x.shape[-1]
    padded = mx.pad(x.reshape(batch, rows, columns, channels), [(0, 0), (1, 1), (1, 1), (0, 0)])
    parts = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return mx.concatenate(parts, axis=-1).reshape(batch, rows * columns, 9 * channels)


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

    dialect: sources.Dialect
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
        form = sources.Form(
            residual is not None, skip is not None, shift is not None, silu, unfolds
        )
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
                sources.cluster_norm(form),
                sources.CLUSTER_HEADER,
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
                sources.one_block_norm(form),
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
            "slab_sums" + sources.Form(form.residual, form.skip, form.shift).suffix,
            form.inputs,
            ["partial", *total_names],
            sources.slab_sums(form),
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
        second = sources.Form(shift=form.shift, silu=silu, unfold=form.unfold)
        apply = self._kernel(
            "slab_norm" + second.suffix,
            [*second.inputs, "partial", "weight", "bias"],
            ["y_out"],
            sources.slab_norm(second),
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
            sources.LAYER_NORM,
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
            sources.gate(beside is not None),
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
            sources.ATTENTION,
            sources.ATTENTION_HEADER,
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
            sources.total(residual is not None),
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

    @_for_checked_types
    def interleave(self, phases: mx.array) -> mx.array:
        """As ``Plain.interleave``."""
        if phases.size > LARGEST:
            return Plain().interleave(phases)
        batch, rows, columns = (n - k for n, k in zip(phases.shape[:3], (0, 1, 1), strict=True))
        channels = phases.shape[-1] // 4
        each = _width(channels)
        kernel = self._kernel("interleave", ["phases"], ["y_out"], sources.INTERLEAVE)
        count = batch * 4 * rows * columns * channels // each
        return kernel(
            inputs=[phases],
            scalars={"B": batch, "C": channels, "rows": rows, "columns": columns},
            template=[("T", phases.dtype), ("V", each), ("THREADS", STREAM_THREADS)],
            grid=(-(-count // STREAM_THREADS) * STREAM_THREADS, 1, 1),
            threadgroup=(STREAM_THREADS, 1, 1),
            output_shapes=[(batch, 2 * rows, 2 * columns, channels)],
            output_dtypes=[phases.dtype],
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
    files = [__file__, sources.__file__, nvrtc.__file__]
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
        *(Path(each).read_text() for each in files),
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def kernels_of(backend: str, make: Callable[..., Any] | None = None) -> Kernels:
    """A backend's kernels, unchecked; ``make`` can take the place of MLX's, to look at calls."""
    if backend == "cuda":
        has_clusters = (
            make is None and int(mx.device_info().get("compute_capability_major", 0)) >= 9
        )
        return Kernels(
            sources.CUDA, make or nvrtc.Kernel, backend, has_gate=True, has_clusters=has_clusters
        )
    return Kernels(sources.METAL, make or _MetalKernel, backend, has_gate=False)


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
    phases = array(2, 7, 6, 4 * 24)
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
        "interleave": lambda k: k.interleave(phases),
    }
    if kernels.name == "metal":
        del cases["interleave"]  # nothing doubles so there; see prepare.Recipe.has_phases
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
