"""Weights in 8 or 4 bits: a network's linear layers and convolutions, replaced one by one.

Legend   O output channels; kh, kw a kernel's rows and columns; I input channels; G group size.
Source   MLX's affine quantisation (``mx.quantize``): the G numbers of a group along a row share a
         scale and an offset, w = scale * q + offset with q of 0 to 2^bits - 1. What a folder of
         quantised weights holds is docs/format.md's law.

MLX multiplies by quantised matrices, but has no quantised convolution, and convolutions are 541 of
the 860 million weights of a Stable Diffusion 1 UNet. They are stored as the matrix (O, kh * kw * I)
and become what they were when they are used, one at a time.

So do matrices anywhere but on Metal. MLX's products on CUDA (0.32.4) are compiled for 17 to 47
seconds a kind at their first use, and are wrong for rows of 64 numbers in one group (the kernel for
Hopper: errors of 500 times the standard deviation, and NaN); those on a CPU know no BLAS.

What stays as it is: norms, biases and embedding tables (a vector is used as it is, and the tables
are read, not multiplied); the first and the last convolution of a network (0.003 % of its weights,
between them and the latents stands nothing that would even an error out); the autoencoder (its
errors are seen as they are, and it is a twelfth of a model).
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_maple.engine.attention import running_backend
from mlx_maple.models.seamless import with_edges

BITS = (8, 4)
GROUP_SIZES = (64, 32)  # the first that divides a row; a row that neither divides is left alone
QUANTIZED = ("text_encoder", "text_encoder_2", "unet")  # the components whose weights are
KEPT = ("conv_in", "conv_out")


def matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Multiply by a W that ``mx.quantize`` made, x W^T: (..., n) to (..., O)."""
    if running_backend() != "metal":
        return x @ mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits).T
    return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits)


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's own, multiplied by ``matmul``."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., I) to (..., O)."""
        assert self.biases is not None  # MLX's other modes have none
        y = matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)
        return y + self.bias if "bias" in self else y


class QuantizedConv2d(nn.Module):
    """A convolution whose weights are stored in few bits: (B, h, w, I) to (B, h', w', O).

    ``weight``, ``scales`` and ``biases`` are those of ``mx.quantize``, as in
    ``QuantizedLinear``; ``bias`` is the layer's own.

    Args:
        shape: (O, kh, kw, I) of the weights that are stood for.
        bits: 8 or 4.
        group_size: G; divides kh * kw * I.
        bias: whether there is one.
        stride: of rows and columns.
        padding: of rows and columns.
        dilation: of rows and columns.
        groups: of channels.

    Attributes:
        closed: whether rows and columns continue at the opposite edge; models.seamless says.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        bits: int,
        group_size: int,
        *,
        bias: bool = True,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        outputs, row = shape[0], shape[1] * shape[2] * shape[3]
        self.weight = mx.zeros((outputs, row * bits // 32), mx.uint32)
        self.scales = mx.zeros((outputs, row // group_size))
        self.biases = mx.zeros((outputs, row // group_size))
        if bias:
            self.bias = mx.zeros((outputs,))
        self.shape = shape
        self.bits = bits
        self.group_size = group_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.closed = (False, False)

    def dequantized(self) -> mx.array:
        """The weights (O, kh, kw, I) that are stood for, in the scales' dtype."""
        return mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        ).reshape(self.shape)

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve ``x`` with the weights as they are dequantised."""
        x, padding = with_edges(x, self.padding, self.closed)
        y = mx.conv2d(x, self.dequantized(), self.stride, padding, self.dilation, self.groups)
        return y + self.bias if "bias" in self else y


QuantizedLeaf = QuantizedLinear | QuantizedConv2d


def group_size(row: int) -> int | None:
    """How many numbers of a row of so many share a scale; None where no size divides it."""
    return next((size for size in GROUP_SIZES if row % size == 0), None)


class Quantizer:
    """Quantises matrices of numpy arrays, for who writes folders (maple_convert.quantized).

    Args:
        bits: 8 or 4.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(
        self, matrix: NDArray[Any], dtype: str, group_size: int
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """(O, n) to words (O, n * bits / 32), scales and biases (O, n / G).

        Args:
            matrix: bfloat16 lies in uint16.
            dtype: what it means: float32, float16 or bfloat16. Scales and biases come in it.
            group_size: G.
        """
        values = mx.array(matrix)
        if dtype == "bfloat16":
            values = values.view(mx.bfloat16)
        words, *others = quantized(values, group_size, self.bits)
        if dtype == "bfloat16":
            others = [other.view(mx.uint16) for other in others]
        return np.array(words), np.array(others[0]), np.array(others[1])


def quantized(weight: mx.array, group_size: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """A matrix (O, n) as words, scales and biases; both of the latter in its dtype.

    Found in float32, whatever the dtype: in float16 MLX's backends round a group's step otherwise.
    What lies halfway between two steps goes up on CUDA and down on a CPU still: one of 1000 numbers
    of float16 (MLX 0.32.4).
    """
    words, *others = mx.quantize(weight.astype(mx.float32), group_size, bits)
    scales, biases = (other.astype(weight.dtype) for other in others)
    return words, scales, biases


def quantize(module: nn.Module, bits: int, *, evaluate: bool = True) -> None:
    """Replace a network's linear layers and convolutions by quantised ones, in place.

    Each is computed and let go of before the next, so that a network whose weights are still to be
    read never has them all in memory. Scales and offsets have the weights' own dtype.

    Args:
        module: a network with its weights.
        bits: 8 or 4.
        evaluate: whether to compute now; else nothing is read.

    Raises:
        ValueError: for other bits.
    """
    for parent, name, leaf, size in _quantizable(module, bits):
        weight = leaf.weight.reshape(leaf.weight.shape[0], -1)
        found = _empty(leaf, bits, size)
        found.weight, found.scales, found.biases = quantized(weight, size, bits)
        if "bias" in leaf:
            found.bias = leaf.bias
        if evaluate:
            mx.eval(found.parameters())
        parent[name] = found


def as_quantized(module: nn.Module, bits: int) -> None:
    """Give a network the leaves of a quantised one, whose weights are loaded afterwards.

    Raises:
        ValueError: for bits that there are not.
    """
    for parent, name, leaf, size in _quantizable(module, bits):
        parent[name] = _empty(leaf, bits, size)


def bits_of(module: nn.Module) -> int | None:
    """8 or 4, or None where no leaf is quantised."""
    return next((leaf.bits for _, leaf in _quantized(module)), None)


def parameter_count(module: nn.Module) -> int:
    """How many numbers a network has, whatever they are stored as."""
    found = tree_flatten(module.parameters())
    assert isinstance(found, list)
    count = sum(value.size for _, value in found)
    for _, leaf in _quantized(module):
        packed = leaf.weight.size + 2 * leaf.scales.size
        count += leaf.weight.size * 32 // leaf.bits - packed
    return count


def _quantizable(
    module: nn.Module, bits: int
) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d, int]]:
    """Each leaf to replace: whose it is and under which name, and its group size."""
    if bits not in BITS:
        raise ValueError(
            f"weights are quantised to {' or '.join(map(str, BITS))} bits, not {bits}."
        )
    for _, parent in module.named_modules():
        for name, leaf in list(parent.items()):
            if not isinstance(leaf, nn.Linear | nn.Conv2d) or name in KEPT:
                continue
            size = group_size(leaf.weight.size // leaf.weight.shape[0])
            if size is not None:
                yield parent, name, leaf, size


def _empty(leaf: nn.Linear | nn.Conv2d, bits: int, size: int) -> Any:
    """A quantised leaf without its weights."""
    if isinstance(leaf, nn.Linear):
        outputs, inputs = leaf.weight.shape
        return QuantizedLinear(inputs, outputs, "bias" in leaf, size, bits)
    outputs, rows, columns, inputs = leaf.weight.shape
    return QuantizedConv2d(
        (outputs, rows, columns, inputs),
        bits,
        size,
        bias="bias" in leaf,
        stride=leaf.stride,
        padding=leaf.padding,
        dilation=leaf.dilation,
        groups=leaf.groups,
    )


def _quantized(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, leaf in module.named_modules():
        if isinstance(leaf, QuantizedLeaf):
            yield name, leaf
