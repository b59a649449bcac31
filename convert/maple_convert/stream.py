"""The values of a tensor as a stream of rows: read, cast and checked while they are in the cache.

Nearly every layout keeps the first axis of a weight where it is, so a block of rows can be cast,
rearranged and written on its own. No tensor is ever whole in memory on the way from file to file;
touching fresh memory for each would cost more than reading the file.
"""

import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint
from maple_convert.half import round_to_half
from maple_convert.readers.sharded import ShardedCheckpoint
from maple_convert.readers.source import FileCheckpoint, Placement
from maple_convert.tensors import STORAGE, Checkpoint, Tensor

Block = npt.NDArray[Any]
Task = Callable[[], Block]

BLOCK_BYTES = 1 << 21

# Exponent bits of each floating type: all ones in an infinity or NaN, and in nothing else.
_EXPONENT = {
    "float64": (np.dtype(np.uint64), 0x7FF0_0000_0000_0000),
    "float32": (np.dtype(np.uint32), 0x7F80_0000),
    "float16": (np.dtype(np.uint16), 0x7C00),
    "bfloat16": (np.dtype(np.uint16), 0x7F80),
}


def stream_rows(
    checkpoint: Checkpoint, key: str, dtype: str | None, share: tuple[int, int] = (0, 1)
) -> Iterator[Task]:
    """One tensor in ``dtype`` (None: as stored): functions, in order, that each make some rows.

    They may be called in any order and from any thread; what they give owns its memory. Called,
    each raises ``InvalidCheckpoint`` if a value is not finite, in the file or in ``dtype``.

    Args:
        checkpoint: where it lies.
        key: its name there.
        dtype: what is wanted.
        share: (which, of how many) equal parts of the rows to read.
    """
    kind = checkpoint.tensors[key].dtype if dtype is None else dtype
    fresh = kind == checkpoint.tensors[key].dtype
    for read in _stored_rows(checkpoint, key, share, fresh=fresh):
        yield partial(_cast, checkpoint, key, kind, read)


def _cast(checkpoint: Checkpoint, key: str, kind: str, read: Task) -> Block:
    stored, block = checkpoint.tensors[key].dtype, read()
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
    return result


def _stored_rows(
    checkpoint: Checkpoint, key: str, share: tuple[int, int], *, fresh: bool
) -> Iterator[Task]:
    """One tensor as stored: functions that each read some rows.

    Args:
        checkpoint: where it lies.
        key: its name there.
        share: (which, of how many) parts of the rows.
        fresh: give each block memory of its own; otherwise it is valid until its thread's next.
    """
    info = checkpoint.tensors[key]
    count = info.shape[0] if info.shape else 1
    row = info.nbytes // max(count, 1)
    rows = max(BLOCK_BYTES // max(row, 1), 1)
    first, end = (count // share[1] * n for n in (share[0], share[0] + 1))
    if isinstance(checkpoint, ShardedCheckpoint):
        checkpoint = next(shard for shard in checkpoint.shards if key in shard.tensors)
    place = checkpoint.places[key] if isinstance(checkpoint, FileCheckpoint) else None
    if place is None or place.strides is not None or not info.shape:
        whole = checkpoint.read(key).array
        if not info.shape:
            yield lambda: whole
        for start in range(first, end if info.shape else first, rows):
            yield partial(whole.__getitem__, slice(start, min(start + rows, end)))
        return
    assert isinstance(checkpoint, FileCheckpoint)
    width = math.prod(info.shape[1:])
    for start in range(first, end, rows):
        shape = (min(rows, end - start), *info.shape[1:])
        empty = np.empty if fresh else _scratch.empty
        new = partial(empty, shape, STORAGE[info.dtype])
        yield partial(_read_rows, checkpoint, place, start * width, new)


def _read_rows(checkpoint: FileCheckpoint, place: Placement, start: int, empty: Task) -> Block:
    block = empty()
    checkpoint.read_elements(place, start, block)
    return block


class _Scratch(threading.local):
    """Memory for a block, one a thread: fresh memory for each would cost as much as a read."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], storage: np.dtype[Any]) -> Block:
        size = math.prod(shape) * storage.itemsize
        if size > BLOCK_BYTES:  # a single row, and too much to keep
            return np.empty(shape, storage)
        if size > self._bytes.size:
            self._bytes = np.empty(BLOCK_BYTES, np.uint8)
        return np.ndarray(shape, storage, self._bytes)


_scratch = _Scratch()


def _is_finite(array: Block, dtype: str) -> bool:
    kind, exponent = _EXPONENT[dtype]
    bits: Block = np.frombuffer(np.ravel(array), kind)
    return not bool(((bits & kind.type(exponent)) == exponent).any())
