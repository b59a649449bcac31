"""One file's bytes by offset, and the checkpoint that every container becomes.

A container's reader only has to find where each tensor lies: a byte offset, a type, a shape and
strides. Reading is then the same for all of them, here. The file is never mapped into memory:
mapped pages count as resident, and a file that shrinks under a map kills the process.
"""

import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint, UnreadableFile
from maple_convert.readers.encodings import Encoding
from maple_convert.tensors import STORAGE, Tensor, TensorInfo

CHUNK = 1 << 28  # bytes asked of the system at once; macOS refuses reads of 2 GiB and more
BLOCK = 1 << 26  # bytes of file held while the elements of a strided view are picked out
BLOCK_DECODED = 1 << 18  # elements decoded at once, which stay in the cache
AMPLIFICATION = 8  # tensors may share storages, but not claim many times the file's size
ALLOWANCE = 1 << 26  # bytes that any file, however small, may claim


class SourceFile:
    """A regular file opened for reading at offsets, from any thread.

    Raises:
        UnreadableFile: if it is missing, not permitted, a folder or a device.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self.path, flags)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise UnreadableFile(self.path, _reason(error)) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise UnreadableFile(self.path, f"is {what}, not a file")
        self.size = status.st_size
        self._file = open(descriptor, "rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``, which must lie in the file."""
        buffer = bytearray(count)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` (bytes) from ``offset``, without a copy between."""
        if offset < 0 or offset + target.nbytes > self.size:
            raise InvalidCheckpoint(self.path, "ends early: it is truncated")
        done = 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < target.nbytes:
                    count = self._file.readinto(target[done : done + CHUNK])
                    if not count:
                        raise UnreadableFile(self.path, "became shorter while it was read")
                    done += count
        except (OSError, ValueError) as error:  # ValueError: it was closed
            raise UnreadableFile(self.path, _reason(error)) from error

    def close(self) -> None:
        """Close the file; closing twice is no fault."""
        self._file.close()


class Placement(NamedTuple):
    """Where one tensor lies in its file; a tuple, for files of very many.

    Attributes:
        info: type and shape.
        offset: of its first element, in bytes from the start of the file.
        strides: elements from one index to the next on each axis; None if contiguous.
        encoding: how its elements are spelt, in C order, where they are not plain; whole blocks.
    """

    info: TensorInfo
    offset: int
    strides: tuple[int, ...] | None = None
    encoding: Encoding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take in the file, if none of them is shared."""
        if self.encoding is None:
            return self.info.nbytes
        return self.info.size // self.encoding.elements * self.encoding.nbytes


@dataclass(eq=False)
class FileCheckpoint:
    """A checkpoint in one file: see ``maple_convert.tensors.Checkpoint``."""

    file: SourceFile
    container: str
    places: Mapping[str, Placement]
    objects: Mapping[str, object] = field(default_factory=dict[str, object])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.path = self.file.path
        self.tensors: Mapping[str, TensorInfo] = {n: p.info for n, p in self.places.items()}
        claimed = sum(place.nbytes for place in self.places.values())
        if claimed > AMPLIFICATION * self.file.size + ALLOWANCE:
            reason = f"claims {claimed} bytes of tensors in a file of {self.file.size} bytes"
            raise InvalidCheckpoint(self.path, reason)

    def read(self, name: str) -> Tensor:
        """One tensor's values: contiguous, owning its memory. KeyError for an unknown name."""
        place = self.places[name]
        dtype, shape = place.info.dtype, place.info.shape
        # A bool byte other than 0 and 1 is undefined behaviour in numpy: read bytes, then compare.
        stored = np.dtype("u1") if dtype == "bool" else STORAGE[dtype]
        array = np.empty(shape, stored)
        if array.size:
            if place.strides is None:
                self.read_elements(place, 0, array)
            else:
                self._gather(array, place.offset, place.strides)
        if dtype == "bool":
            array = np.asarray(array != 0)  # asarray: a zero-dim comparison is no array
        return Tensor(dtype, array)

    def read_elements(self, place: Placement, start: int, out: npt.NDArray[Any]) -> None:
        """Fill a contiguous array with a contiguous tensor's elements from the ``start``th on."""
        encoding = place.encoding
        if encoding is None:
            self.file.read_into(place.offset + start * out.itemsize, out.data.cast("B"))
            return
        flat, end = np.ravel(out), start + out.size  # a view: out is contiguous
        most = max(BLOCK_DECODED // encoding.elements, 1)
        last = -(-end // encoding.elements)  # a run may begin and end within a block
        for block in range(start // encoding.elements, last, most):
            packed = np.empty((min(most, last - block), encoding.nbytes), np.uint8)
            self.file.read_into(place.offset + block * encoding.nbytes, packed.data.cast("B"))
            first = block * encoding.elements
            with np.errstate(invalid="ignore"):  # scales may be infinite, as any stored value
                values = np.ravel(encoding.decode(packed))
            skipped = max(start - first, 0)
            values = values[skipped : end - first]
            at = first + skipped - start
            flat[at : at + values.size] = values

    def _gather(self, out: npt.NDArray[Any], offset: int, strides: Sequence[int]) -> None:
        """Fill ``out`` from a strided view, holding at most about BLOCK bytes of the file."""
        extent = 1 + sum((n - 1) * step for n, step in zip(out.shape, strides, strict=True))
        if extent * out.itemsize <= BLOCK:
            flat = np.empty(extent, out.dtype)
            self.file.read_into(offset, flat.data.cast("B"))
            steps = [step * out.itemsize for step in strides]
            out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, steps, writeable=False)
            return
        # Cut the axis with the longest stride into runs of indices whose span fits.
        axis = max(range(out.ndim), key=lambda i: (out.shape[i] > 1) * strides[i])
        step = strides[axis]
        inner = extent - (out.shape[axis] - 1) * step
        run = max(1, (BLOCK // out.itemsize - inner) // step + 1)
        for start in range(0, out.shape[axis], run):
            part = out[(slice(None),) * axis + (slice(start, start + run),)]
            self._gather(part, offset + start * step * out.itemsize, strides)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> "FileCheckpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _reason(error: OSError | ValueError) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return f"cannot be read: {text or type(error).__name__}"
