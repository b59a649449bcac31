"""Arrays as checkpoints store them, and the interface that every reader offers.

numpy has no bfloat16 and no 8-bit floats, and most of the converter only moves bytes. So a tensor
here is a numpy array of *storage* type plus the name of the type it means: bfloat16 lies in uint16.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

STORAGE = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint32": np.dtype("<u4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
CHECKED_AT_ONCE = 1 << 18  # elements of has_nonfinite's temporary array, which stays in the cache


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor before its bytes are read."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous array."""
        return self.size * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class Tensor:
    """One array and the type it means.

    Attributes:
        dtype: a key of ``STORAGE``.
        array: the values in storage type; bfloat16 as uint16 bit patterns.
    """

    dtype: str
    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)

    def has_nonfinite(self) -> bool:
        """Whether any value is NaN or infinite; never so for integers and bools.

        Reading lets such values pass: this is for who streams them, at a fraction of a copy's cost.
        """
        if self.dtype not in FLOATS:
            return False
        flat = self.array.ravel()
        for start in range(0, flat.size, CHECKED_AT_ONCE):
            part = flat[start : start + CHECKED_AT_ONCE]
            if self.dtype == "bfloat16":  # an exponent of ones only
                finite = (part & np.uint16(0x7F80)) != 0x7F80
            else:
                finite = np.isfinite(part)
            if not finite.all():
                return True
        return False

    def astype(self, dtype: str) -> "Tensor":
        """The same values rounded to ``dtype`` (nearest even), or self where it is that already."""
        if dtype == self.dtype:
            return self
        if self.dtype == "bfloat16":
            bits = self.array.astype(np.uint32)
            bits <<= 16
            wide: npt.NDArray[Any] = bits.view(np.float32)  # pyright: ignore[reportUnknownMemberType]
            return Tensor("float32", wide).astype(dtype)
        with np.errstate(over="ignore"):  # a value beyond float16 becomes inf, as in the reference
            if dtype == "bfloat16":
                return Tensor(dtype, _round_to_bfloat16(self.array.astype(np.float32)))
            return Tensor(dtype, self.array.astype(STORAGE[dtype]))


class Checkpoint(Protocol):
    """A file or folder opened for reading: names and shapes at once, values one at a time.

    Attributes:
        path: what was opened.
        container: what it is, in a few words ("torch zip", "legacy torch pickle", "safetensors",
            "safetensors in 3 shards", ...).
        tensors: every tensor by its name in the file; nested dictionaries are joined with dots
            except that a wrapping ``state_dict`` is taken off and said in ``notes``. What lies
            beside a ``state_dict`` (an optimizer's tensors) is no weight and not listed here.
        objects: everything else at top level (``global_step`` and the like), inert: numbers,
            text, containers, ``TensorInfo`` for tensors that are no weights, ``readers.Stub``
            for strangers' objects. Bounded in size and depth.
        metadata: the container's own string metadata (safetensors ``__metadata__``).
        notes: what a reader had to decide, one sentence each.
    """

    path: Path
    container: str
    tensors: Mapping[str, TensorInfo]
    objects: Mapping[str, object]
    metadata: Mapping[str, str]
    notes: list[str]

    def read(self, name: str) -> Tensor:
        """Read one tensor's values: contiguous, native byte order, owning its memory."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...

    def __enter__(self) -> "Checkpoint": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def _round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits: npt.NDArray[np.uint32] = values.view(np.uint32)  # pyright: ignore[reportUnknownMemberType]
    rounded = bits >> 16  # then in place: the largest tensors are worth one temporary, not four
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = np.asarray(rounded, np.uint16)  # asarray: of a zero-dim array, >> made a scalar
    # Rounding could carry a NaN's payload into infinity: keep it a quiet NaN.
    nan = np.isnan(values)
    result[nan] = (bits[nan] >> 16) | 0x40
    return result
