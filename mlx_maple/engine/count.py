"""What one call of a network asks of the device: how many primitives, how many bytes of weights.

Where a graph is small, as a UNet step is on a large GPU, the host's work of encoding one primitive
after the other is what takes the time: their number tells more than their arithmetic. Nothing is
evaluated here: the call is described, and the description is read.

On a CPU MLX takes its fused operations apart while they are described, and knows no kernels of
ours. So that a count taken anywhere holds for a GPU, each of them is stood in for by one primitive
that no network uses.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_maple.engine.kernels import kernels_of
from mlx_maple.engine.prepare import Recipe

# Primitives that only say how the same memory is to be seen, and start no kernel. (A reshape of
# what does not lie in order copies; an honest count would have to know strides.)
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes Depends ExpandDims Flatten Reshape Slice Split Squeeze "
    "StopGradient Transpose Unflatten View".split()
)
STAND_INS = {  # the primitive that stands for a fused operation, and its name
    "ArcTanh": "ScaledDotProductAttention",
    "ArcSinh": "LayerNorm",
    "ArcCosh": "RMSNorm",
    "ErfInv": "CustomKernel",
    "ArcCos": "Dequantize",
}

# (name of an operation in mx.fast, its arguments, its options)
Seen = Callable[[str, Sequence[Any], Mapping[str, Any]], None]


@dataclass(frozen=True)
class Count:
    """The primitives of one call.

    Attributes:
        kernels: how many compute something.
        views: how many only see memory in another shape.
        by_name: of those that compute, how often each occurs, most frequent first.
        weight_bytes: of the arrays that the call reads beside its arguments.
    """

    kernels: int
    views: int
    by_name: Mapping[str, int]
    weight_bytes: int


def count(
    function: Callable[..., Any],
    *arguments: mx.array,
    weights: Mapping[str, mx.array],
    on_a_gpu: bool = True,
) -> Count:
    """Count what ``function(*arguments)`` describes.

    Args:
        function: a network or any other function of arrays; one array or several come out.
        arguments: of that function.
        weights: arrays by name, of which some are read.
        on_a_gpu: count as on one, wherever this is; else as on the device that runs.
    """
    mx.eval(arguments, list(weights.values()))  # what is left to do then is the call's own
    named = {f"weight{i}": weight for i, weight in enumerate(weights.values())}
    with as_on_a_gpu() if on_a_gpu else nullcontext():
        text = io.StringIO()
        out = function(*arguments)
        mx.export_to_dot(text, *(out if isinstance(out, list | tuple) else [out]), **named)
    graph = text.getvalue()
    names = Counter(re.findall(r"label ?= ?\"(\w+)\"", graph))
    for mark, name in STAND_INS.items():
        if mark in names:
            names[name] += names.pop(mark)
    views = sum(names.pop(view, 0) for view in VIEWS)
    by_name = {_short(name): number for name, number in names.most_common()}
    read = set(re.findall(r"\"(\w+)\" ->", graph)) & named.keys()
    return Count(sum(names.values()), views, by_name, sum(named[name].nbytes for name in read))


def _short(name: str) -> str:
    """A fused chain's name without the broadcasts in it: "CompiledSigmoidMultiply"."""
    return name.replace("Broadcast", "") if name.startswith("Compiled") else name


def described_recipe(backend: str) -> Recipe:
    """How networks are made ready for a backend that need not be there; they can only be described.

    Args:
        backend: "metal" or "cuda".
    """
    kernels = kernels_of(backend, described_kernel)
    return Recipe.of(backend, kernels)


@contextmanager
def as_on_a_gpu(seen: Seen | None = None) -> Iterator[None]:
    """While this lasts, fused operations are described as one primitive each, on any device.

    Args:
        seen: is told of each call: the operation's name in mx.fast and its arguments.
    """

    def watched(name: str, stand_in: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if seen is not None:
                seen(name, arguments, options)
            return stand_in(*arguments, **options)

        return call

    kept = [
        (place, name, getattr(place, name)) for place, names in _FUSED.items() for name in names
    ]
    for place, name, _ in kept:
        setattr(place, name, watched(name, _FUSED[place][name]))
    try:
        yield
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def _attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    mask = options.get("mask")
    others = [k, v, *([mask] if isinstance(mask, mx.array) else [])]
    return mx.arctanh(_after(q[..., : v.shape[-1]], others))


def _layer_norm(
    x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **options: Any
) -> mx.array:
    return mx.arcsinh(_after(x, [a for a in (weight, bias) if a is not None]))


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    return mx.arccosh(_after(x, [] if weight is None else [weight]))


def described_kernel(**making: Any) -> Callable[..., list[mx.array]]:
    """Takes mx.fast.metal_kernel's place: one primitive a call, however many arrays come out."""

    def call(
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        **options: Any,
    ) -> list[mx.array]:
        arrays = [a for a in inputs if isinstance(a, mx.array)]
        outputs: list[mx.array] = []
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            empty = mx.broadcast_to(_nothing(dtype), tuple(shape))
            if not outputs:
                outputs.append(mx.erfinv(_after(empty, arrays)))
            else:
                outputs.append(_after(empty, outputs[:1]))
        return outputs

    return call


def _dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    **options: Any,
) -> mx.array:
    empty = mx.broadcast_to(_nothing(scales.dtype), (*w.shape[:-1], w.shape[-1] * 32 // bits))
    return mx.arccos(_after(empty, [w, scales, biases]))


_FUSED: dict[Any, dict[str, Callable[..., Any]]] = {
    mx: {"dequantize": _dequantize},
    mx.fast: {
        "scaled_dot_product_attention": _attention,
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
        "metal_kernel": described_kernel,
        "cuda_kernel": described_kernel,
    },
}


def _nothing(dtype: mx.Dtype) -> mx.array:
    zero = mx.zeros((), dtype=dtype)
    mx.eval(zero)
    return zero


def _after(x: mx.array, others: Sequence[mx.array]) -> mx.array:
    """``x``, which now also needs ``others``."""
    return mx.depends([x], list(others))[0] if others else x
