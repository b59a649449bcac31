"""Whether Apple's GPUs have a fast kernel for everything that a network does, told anywhere.

The network is described at the asked size as it would be on Metal, nothing is evaluated, and every
attention, convolution, matrix product and norm that it really calls is held against the rules by
which MLX's Metal backend picks its kernels. What falls off the fast path does so silently there.

Source   ml-explore/mlx @846d176 (0.32.2), mlx/backend/metal: scaled_dot_product_attention.cpp
         (has_fused_kernel, use_fallback), conv.cpp (dispatch_conv_2D_gpu), matmul.cpp
         (Matmul::eval_gpu, AddMM::eval_gpu), normalization.cpp. Other versions may have others.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_maple.engine.attention import METAL_WIDTHS, SCORE_BYTES
from mlx_maple.engine.count import Seen, as_on_a_gpu, described_kernel
from mlx_maple.engine.kernels import kernels_of
from mlx_maple.engine.prepare import Recipe

Network = TypeVar("Network", bound=nn.Module)
RULES_OF = "MLX 0.32.2 (846d176)"
VECTOR_WIDTHS = frozenset({64, 96, 128})  # of heads, with 8 queries or fewer
WINOGRAD_PIXELS, WINOGRAD_CHANNELS = 4096, 256
# What makes an operation matter: its share of the network's arithmetic, or what it stores. Every
# norm does, since all of a map passes through it. (Attention whose scores are stored is two blocked
# products around a softmax: what it loses is memory and bandwidth.)
HEAVY_SHARE, HEAVY_BYTES = 0.05, SCORE_BYTES


@dataclass(frozen=True)
class Operation:
    """What a network asks of the device, and what Metal has for it.

    Attributes:
        kind: attention, convolution, product, norm, or kernel for one of our own.
        shape: of what goes in and out, in a few words.
        kernel: what MLX runs.
        is_fast: whether that is the one it was made for.
        flops: of one call; multiplications and additions are counted apart.
        stored: bytes of intermediate results that a fast kernel would not have written.
        calls: how many alike there are.
    """

    kind: str
    shape: str
    kernel: str
    is_fast: bool
    flops: int = 0
    stored: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Report:
    """All operations of one network, the most arithmetic first."""

    operations: Sequence[Operation]

    @property
    def flops(self) -> int:
        """Of one call of the network."""
        return sum(each.flops * each.calls for each in self.operations)

    def share(self, operation: Operation) -> float:
        """Its part of the network's arithmetic, all its calls together."""
        return operation.flops * operation.calls / max(self.flops, 1)

    def is_heavy(self, operation: Operation) -> bool:
        """Whether it matters how fast it is."""
        is_much = self.share(operation) >= HEAVY_SHARE or operation.stored > HEAVY_BYTES
        return is_much or operation.kind == "norm"

    @property
    def slow(self) -> list[Operation]:
        """What is heavy and has no fast kernel."""
        return [each for each in self.operations if self.is_heavy(each) and not each.is_fast]


def audit(function: Callable[..., Any], *arguments: mx.array) -> Report:
    """Look at every operation of ``function(*arguments)`` on Metal; nothing is evaluated.

    Args:
        function: a network made ready with ``metal_recipe``, or a plain one.
        arguments: of the shapes that are asked about.
    """
    found: list[Operation] = []
    _watch.append(found)
    try:
        with as_on_a_gpu(_seen_fused(found)), _watched_operations(found):
            function(*arguments)
    finally:
        _watch.pop()
    counted: dict[Operation, int] = {}
    for each in found:
        counted[each] = counted.get(each, 0) + 1
    grouped = [replace(each, calls=calls) for each, calls in counted.items()]
    return Report(sorted(grouped, key=lambda each: -each.flops * each.calls))


def metal_recipe() -> Recipe:
    """How networks are made ready for Metal, to be described on any machine."""
    return Recipe("metal", kernels_of("metal", _watched_kernel))


def without_weights(network: Network, dtype: mx.Dtype) -> Network:
    """The network with weights that take no memory: of its shapes, in ``dtype``, all zero."""
    zero = mx.zeros((), dtype=dtype)
    mx.eval(zero)
    weights = network.parameters()
    network.update(tree_map(lambda weight: mx.broadcast_to(zero, weight.shape), weights))
    return network


# What was called ---------------------------------------------------------------------------------


_watch: list[list[Operation]] = []  # where kernels of ours are noted down while an audit looks


def _watched_kernel(*, name: str, **making: Any) -> Callable[..., list[mx.array]]:
    described = described_kernel(**making)

    def call(*, inputs: Sequence[Any], **options: Any) -> list[mx.array]:
        outputs = described(inputs=inputs, **options)
        if _watch:
            shapes = f"{_times(inputs[0].shape)} to {_times(outputs[0].shape)}"
            _watch[-1].append(Operation("kernel", shapes, f"our {name}", True))
        return outputs

    return call


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
) -> Operation:
    """The rules of has_fused_kernel and use_fallback, without training or output of sums."""
    batch, heads, tokens, width = q.shape
    others = k.shape[2]
    shape = f"{batch} x {heads} heads of {width}: {tokens} look at {others}"
    flops = 2 * batch * heads * tokens * others * (width + v.shape[-1])
    reason = ""
    if tokens > 8:
        if width not in METAL_WIDTHS or v.shape[-1] != width:
            reason = f"no kernel for heads of {width}"
        elif mask == "causal" and tokens > others:
            reason = "no causal kernel for more queries than keys"
        kernel = "attention"
    else:
        if width not in VECTOR_WIDTHS or v.shape[-1] != width:
            reason = f"no kernel for few queries of {width}"
        elif tokens > others or tokens * heads // k.shape[1] > 32:
            reason = "no kernel for so few keys"
        kernel = "sdpa_vector"
    if not reason or options.get("force_fused"):
        return Operation("attention", shape, f"fused ({kernel})", True, flops)
    stored = batch * heads * tokens * others * q.dtype.size
    return Operation("attention", shape, f"scores stored: {reason}", False, flops, stored)


def _convolution(
    input: mx.array,
    weight: mx.array,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    **options: Any,
) -> Operation:
    """The rules of dispatch_conv_2D_gpu; Winograd's also asks for memory, which is not known."""
    strides, pads, dilations = (
        (n, n) if isinstance(n, int) else tuple(n) for n in (stride, padding, dilation)
    )
    x = input.shape
    out_channels, *sides, _ = weight.shape
    batch, rows, columns, channels = x
    out = [batch]
    for size, side, step, pad, spread in zip(x[1:3], sides, strides, pads, dilations, strict=True):
        out.append((size + 2 * pad - spread * (side - 1) - 1) // step + 1)
    out.append(out_channels)
    flops = 2 * math.prod(out) * math.prod(sides) * channels // groups
    shape = f"{_times(sides)}, {_times(x)} to {_times(out[1:])}"
    if set(strides) != {1}:
        shape += f", stride {strides[0]}"
    is_plain = set(strides) == set(dilations) == {1}
    is_out_aligned = out_channels <= 16 or out_channels % 16 == 0
    is_aligned = is_out_aligned and (channels <= 4 or channels % 16 == 0)
    if groups > 1:
        kernel, is_fast = "grouped", False
    elif (
        is_plain
        and sides == [3, 3]
        and channels % 32 == out_channels % 32 == 0
        and channels + out_channels >= WINOGRAD_CHANNELS
        and batch * rows * columns >= WINOGRAD_PIXELS
    ):
        kernel, is_fast = "Winograd", True
    elif is_aligned:
        kernel, is_fast = "implicit product", True
    elif is_plain and is_out_aligned and math.prod(out[:3]) >= 256 and math.prod(sides) >= 9:
        kernel, is_fast = f"implicit product, {channels} channels padded", True
    else:
        kernel, is_fast = "general implicit product", False
    return Operation("convolution", shape, kernel, is_fast, flops)


def _product(a: mx.array, b: mx.array, is_added: bool = False) -> Operation:
    """Matmul and AddMM have kernels for every shape: blocks, or a vector's."""
    rows, inner, columns = math.prod(a.shape[:-1]), a.shape[-1], b.shape[-1]
    batches = math.prod(b.shape[:-2])
    shape = f"{rows} x {inner} x {columns}" + (f", {batches} apart" if batches > 1 else "")
    kernel = "vector product" if min(rows, columns) == 1 else "blocked product"
    kernel += ", added to" if is_added else ""
    return Operation("product", shape, kernel, True, 2 * rows * inner * columns)


def _quantized(x: mx.array, w: mx.array, scales: mx.array, *others: Any, **how: Any) -> Operation:
    rows, inner = math.prod(x.shape[:-1]), x.shape[-1]
    columns = w.shape[0] if how.get("transpose", True) else scales.shape[-1] * how["group_size"]
    shape = f"{rows} x {inner} x {columns}, {how.get('bits', 4)} bits"
    return Operation("product", shape, "quantised product", True, 2 * rows * inner * columns)


def _softmax(a: mx.array, *others: Any, **how: Any) -> Operation:
    """On its own: an attention that somebody wrote out."""
    return Operation(
        "attention", f"softmax of {_times(a.shape)}", "written out", False, 0, a.nbytes
    )


def _root(a: mx.array, *others: Any, **how: Any) -> Operation:
    """A reciprocal root on its own: a norm that is made of MLX's elementwise operations."""
    return Operation("norm", f"scales of {_times(a.shape)}", "several passes over the map", False)


def _seen_fused(found: list[Operation]) -> Seen:
    def seen(name: str, given: Sequence[Any], options: Mapping[str, Any]) -> None:
        if name == "scaled_dot_product_attention":
            found.append(_attention(*given, **options))
        elif name in ("layer_norm", "rms_norm"):
            shape = _times(given[0].shape)
            found.append(Operation("norm", shape, f"{name}, one pass", True))

    return seen


@contextmanager
def _watched_operations(found: list[Operation]) -> Iterator[None]:
    """While this lasts, MLX's heavy operations are noted down as they are called.

    (A graph that is exported would tell of them too, but not every primitive can be exported.)
    """

    def added(c: mx.array, a: mx.array, b: mx.array, *others: Any, **how: Any) -> Operation:
        return _product(a, b, is_added=True)

    wrapped: list[tuple[Any, str, Callable[..., Operation]]] = [
        (mx, "conv2d", _convolution),
        (mx, "matmul", _product),
        (mx, "addmm", added),
        (mx.array, "__matmul__", _product),
        (mx, "quantized_matmul", _quantized),
        (mx, "softmax", _softmax),
        (mx, "rsqrt", _root),
    ]

    def watched(original: Callable[..., Any], told: Callable[..., Operation]) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            found.append(told(*given, **{k: v for k, v in options.items() if k != "stream"}))
            return original(*given, **options)

        return call

    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    for owner, name, told in wrapped:
        setattr(owner, name, watched(getattr(owner, name), told))
    try:
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
