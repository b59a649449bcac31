"""The values of a tensor as a stream of rows: read, cast and checked while they are in the cache.

Every layout keeps the first axis of a weight where it is, so a block of rows can be cast,
rearranged and written on its own. No tensor is ever whole in memory on the way from file to file;
touching fresh memory for each would cost more than reading the file.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint
from maple_convert.half import round_to_half
from maple_convert.readers.sharded import ShardedCheckpoint
from maple_convert.readers.source import FileCheckpoint
from maple_convert.tensors import STORAGE, Checkpoint, Tensor

Block = npt.NDArray[Any]

BLOCK_BYTES = 1 << 20

# Exponent bits of each floating type: all ones in an infinity or NaN, and in nothing else.
_EXPONENT = {
    "float64": (np.dtype(np.uint64), 0x7FF0_0000_0000_0000),
    "float32": (np.dtype(np.uint32), 0x7F80_0000),
    "float16": (np.dtype(np.uint16), 0x7C00),
    "bfloat16": (np.dtype(np.uint16), 0x7F80),
}


def stream_rows(checkpoint: Checkpoint, key: str, dtype: str | None) -> Iterator[Block]:
    """One tensor in ``dtype`` (None: as stored), some rows at a time; each block owns its memory.

    Raises:
        InvalidCheckpoint: if a value is not finite, in the file or in ``dtype``.
    """
    stored = checkpoint.tensors[key].dtype
    kind = stored if dtype is None else dtype
    for block in _stored_rows(checkpoint, key, fresh=kind == stored):
        result: Block = block if kind == stored else np.empty(block.shape, STORAGE[kind])
        if stored == "float32" and kind == "float16":
            flat: Block = np.ravel(result)  # a view: the result is contiguous
            finite = round_to_half(np.ravel(block), flat)
        else:
            if kind != stored:
                result[...] = Tensor(stored, block).astype(kind).array
            finite = _is_finite(result, kind)
        if not finite:
            fault = (
                f"values too large for {kind}; use bfloat16 or float32"
                if _is_finite(block, stored)
                else "values that are NaN or infinite: the file is damaged"
            )
            raise InvalidCheckpoint(checkpoint.path, f"{key} holds {fault}")
        yield result


def _stored_rows(checkpoint: Checkpoint, key: str, *, fresh: bool) -> Iterator[Block]:
    """One tensor as stored, some rows at a time.

    Args:
        checkpoint: where it lies.
        key: its name there.
        fresh: give each block memory of its own; otherwise it is valid until the next.
    """
    info = checkpoint.tensors[key]
    count = info.shape[0] if info.shape else 1
    row = info.nbytes // max(count, 1)
    rows = max(BLOCK_BYTES // max(row, 1), 1)
    if isinstance(checkpoint, ShardedCheckpoint):
        checkpoint = next(shard for shard in checkpoint.shards if key in shard.tensors)
    place = checkpoint.places[key] if isinstance(checkpoint, FileCheckpoint) else None
    if place is None or place.strides is not None or not info.shape:
        whole = checkpoint.read(key).array
        if not info.shape:
            yield whole
        for start in range(0, count if info.shape else 0, rows):
            yield whole[start : start + rows]
        return
    assert isinstance(checkpoint, FileCheckpoint)
    shape = (min(rows, count), *info.shape[1:])
    buffer: Block = np.empty(shape, STORAGE[info.dtype])
    for start in range(0, count, rows):
        if fresh and start:
            buffer = np.empty(shape, STORAGE[info.dtype])
        block = buffer[: min(rows, count - start)]
        checkpoint.file.read_into(place.offset + start * row, block.data.cast("B"))
        yield block


def _is_finite(array: Block, dtype: str) -> bool:
    kind, exponent = _EXPONENT[dtype]
    bits: Block = np.frombuffer(np.ravel(array), kind)
    return not bool(((bits & kind.type(exponent)) == exponent).any())
