"""Quantised weights in a maple folder: which tensors stand for which, and how they are written.

docs/format.md is the law. Nothing here quantises: that is MLX's arithmetic, which the caller brings
as a ``Quantizer``; the names, shapes and types that must result are known without it.

    x.weight (O, …) of a float  becomes
    x.weight   (O, n * bits / 32) uint32, n numbers a row, the first in the lowest bits
    x.scales   (O, n / G) in the folder's dtype
    x.biases   (O, n / G) likewise: number = scale * bits + bias
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from maple_convert.layouts.parts import AS_IS, Row, Shape
from maple_convert.tensors import STORAGE, Tensor, TensorInfo
from maple_convert.write import Entry

BITS = (8, 4)
GROUP_SIZES = (64, 32)
COMPONENTS = ("text_encoder", "text_encoder_2", "unet")
KEPT = ("conv_in.weight", "conv_out.weight")
PACKED = "uint32"

Block = npt.NDArray[Any]


class Quantizer(Protocol):
    """Quantises matrices.

    Attributes:
        bits: 8 or 4.
    """

    bits: int

    def __call__(self, matrix: Block, dtype: str, group_size: int) -> tuple[Block, Block, Block]:
        """(O, n) in storage type to packed words, scales and biases, the latter in ``dtype``."""
        ...


def group_size(row: Row) -> int | None:
    """How many numbers of a weight share a scale; None for what is not quantised."""
    shape = row.native_shape
    if len(shape) < 2 or row.native in KEPT or row.native.endswith("embedding.weight"):
        return None
    return next((size for size in GROUP_SIZES if _numbers(shape) % size == 0), None)


def quantized_rows(rows: Sequence[Row], bits: int) -> list[Row]:
    """The native rows of a component as a quantised folder has them."""
    found: list[Row] = []
    for row in rows:
        size = group_size(row)
        if size is None:
            found.append(row)
            continue
        outputs, numbers = row.native_shape[0], _numbers(row.native_shape)
        words, groups = (outputs, numbers * bits // 32), (outputs, numbers // size)
        found.append(replace(row, native_shape=words, packed=True))
        for name in ("scales", "biases"):
            native = row.native.removesuffix("weight") + name
            found.append(Row(native, native, AS_IS, groups))
    return found


def quantized_entries(
    row: Row, stored: str, target: str, read: Callable[[], Iterator[Block]], quantizer: Quantizer
) -> list[Entry]:
    """What to write of one weight: its three tensors, quantised while the first is written.

    Args:
        row: the weight's native row; ``group_size`` must have a size for it.
        stored: dtype that ``read`` gives, in which it is quantised.
        target: dtype of scales and biases.
        read: the weight's values, some rows (first axis) at a time.
        quantizer: the arithmetic.
    """
    size = group_size(row)
    assert size is not None
    outputs, numbers = row.native_shape[0], _numbers(row.native_shape)
    kept: dict[str, list[Block]] = {"scales": [], "biases": []}

    # Quantised while the functions are asked for, in order: when those for the scales are, all the
    # words have been.
    def words() -> Iterator[Callable[[], Block]]:
        for name in kept:
            kept[name] = []
        for block in read():
            matrix = np.reshape(block, (len(block), -1))
            packed, *others = quantizer(np.asarray(matrix, order="C"), stored, size)
            for name, values in zip(kept, others, strict=True):
                kept[name].append(Tensor(stored, values).astype(target).array)
            yield lambda packed=packed: packed

    def others(name: str) -> Iterator[Callable[[], Block]]:
        if not kept[name]:
            for _ in words():
                pass
        values, kept[name] = kept[name], []
        for block in values:
            yield lambda block=block: block

    place = row.native.removesuffix("weight")
    groups = TensorInfo(target, (outputs, numbers // size))
    return [
        Entry(row.native, TensorInfo(PACKED, (outputs, numbers * quantizer.bits // 32)), words),
        Entry(f"{place}scales", groups, lambda: others("scales")),
        Entry(f"{place}biases", groups, lambda: others("biases")),
    ]


def narrower(stored: str, target: str) -> str:
    """The dtype in which a weight is quantised: the smaller of what is stored and wanted."""
    return target if STORAGE[target].itemsize < STORAGE[stored].itemsize else stored


def _numbers(shape: Shape) -> int:
    """How many numbers a row of a weight has."""
    count = 1
    for n in shape[1:]:
        count *= n
    return count
