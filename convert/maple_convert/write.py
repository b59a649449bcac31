"""Writing: safetensors as a stream, and anything whole or not at all.

Streaming   A safetensors header holds every shape and offset, and all shapes are known before a
            value is read; so the header is written first and the values follow as they are made.
            Workers read, cast and rearrange the next rows while these are written.
Atomic      Everything is written into a hidden sibling, ``.NAME.partial-PID``, brought to the disk
            and renamed. A crash leaves the sibling, which no one loads and the next run removes.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from maple_convert.errors import UnreadableFile
from maple_convert.tensors import STORAGE, TensorInfo

Block = npt.NDArray[Any]

WORKERS = 1  # numpy holds the GIL between its calls: two took a third longer for each number
BLOCKS_AHEAD = 8  # prepared while one is written
SYNCED_BYTES = 1 << 28  # written before they are brought to the disk
SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint32": "U32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


# ---------------------------------------------------------------------------------------------
# safetensors


@dataclass(frozen=True)
class Entry:
    """One tensor to write: what the header says, and how to get the values when its turn comes.

    ``tasks`` gives functions that each make some rows, in order. Workers call them, several at the
    same time; what they give may be a view in another order.
    """

    name: str
    info: TensorInfo
    tasks: Callable[[], Iterable[Callable[[], Block]]]


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
    wrote: Callable[[int], None] | None = None,
) -> int:
    """Write a safetensors file, a few blocks of rows in memory, and bring it to the disk.

    Args:
        path: the file; the caller sees to it that a half of it is never taken for the whole.
        entries: the tensors in the order in which they are wanted in the file.
        metadata: strings for ``__metadata__``.
        wrote: called with the bytes of each block after it was written.

    Returns:
        The file's size in bytes.
    """
    # Wider types first keeps every tensor aligned to its type, as readers that map files like it.
    ordered = sorted(entries, key=lambda entry: -STORAGE[entry.info.dtype].itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for entry in ordered:
        end = offset + entry.info.nbytes
        header[entry.name] = {
            "dtype": SAFETENSORS_NAMES[entry.info.dtype],
            "shape": list(entry.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        with closing(_read_ahead(ordered)) as blocks, _Syncing(file) as syncing:
            for block in blocks:
                file.write(block.data)
                syncing.wrote(block.nbytes)
                if wrote is not None:
                    wrote(block.nbytes)
        assert file.tell() == 8 + len(text) + offset
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset


class _Syncing:
    """Brings a long file to the disk while it is written, so that little is left at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="maple-sync")
        self._running: Future[None] | None = None
        self._waiting = 0

    def __enter__(self) -> "_Syncing":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown()

    def wrote(self, size: int) -> None:
        """Count what was written, and begin to bring it to the disk when it is enough."""
        self._waiting += size
        if self._running is not None and self._running.done():
            self._running.result()  # a disk that is full may say so only here
            self._running = None
        if self._waiting >= SYNCED_BYTES and self._running is None:
            self._running = self._worker.submit(os.fsync, self._file.fileno())
            self._waiting = 0


def _read_ahead(entries: Sequence[Entry]) -> Generator[Block, None, None]:
    """Every block in order, contiguous, while workers prepare the next ones."""

    def prepare(entry: Entry, task: Callable[[], Block]) -> Block:
        block = task()
        assert block.dtype == STORAGE[entry.info.dtype]
        return np.asarray(block, order="C")

    tasks = (partial(prepare, entry, task) for entry in entries for task in entry.tasks())
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="maple-read") as workers:
        ahead = deque(workers.submit(task) for task in islice(tasks, BLOCKS_AHEAD))
        while ahead:
            block = ahead.popleft().result()
            ahead.extend(workers.submit(task) for task in islice(tasks, 1))
            if block.size:
                yield block


# ---------------------------------------------------------------------------------------------
# Whole or not at all


@contextmanager
def whole_or_nothing(out: Path, replace: Callable[[Path], bool]) -> Generator[Path, None, None]:
    """Yield a hidden path beside ``out`` to write to; renamed to it at the end, else removed.

    Args:
        out: a folder or file that appears when everything is written.
        replace: whether an existing ``out`` may be replaced.

    Raises:
        UnreadableFile: if ``out`` exists and may not be replaced.
    """
    parent, name = out.absolute().parent, out.name
    if not parent.is_dir():
        raise UnreadableFile(out, "its folder does not exist")
    _clean_up_after_others(out)
    _refuse_existing(out, replace)
    partial = parent / f".{name}.partial-{os.getpid()}"
    try:
        yield partial
        _sync_folders(partial)
        if out.is_dir() and any(out.iterdir()):
            _refuse_existing(out, replace)
            # A folder cannot take another's name while that one stands: step aside, then go.
            aside = parent / f".{name}.replaced-{os.getpid()}"
            os.rename(out, aside)
            os.rename(partial, out)
            _remove(aside)
        else:
            os.replace(partial, out)
        _sync(parent)
    except BaseException:
        _remove(partial)
        raise


def _refuse_existing(out: Path, replace: Callable[[Path], bool]) -> None:
    empty = out.is_dir() and not any(out.iterdir())
    if os.path.lexists(out) and not empty and not replace(out):
        raise UnreadableFile(out, "exists already; remove it or choose another name")


def _clean_up_after_others(out: Path) -> None:
    """Remove what runs that were killed have left beside ``out``."""
    parent, name = out.absolute().parent, out.name
    for word in ("partial", "replaced"):
        for left in parent.glob(f".{_literal(name)}.{word}-*"):
            pid = left.name.rpartition("-")[2]
            if not pid.isdecimal() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue
            if word == "replaced" and not os.path.lexists(out):
                os.rename(left, out)  # killed between the two renames: the old one comes back
            else:
                _remove(left)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folders(path: Path) -> None:
    if path.is_dir():
        for folder, _, _ in os.walk(path):
            _sync(Path(folder))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_small(path: Path, content: bytes) -> None:
    """Write a small file and bring it to the disk; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """The same for a JSON value: objects over several lines, lists on one."""
    write_small(path, f"{_pretty(value)}\n".encode())


def _pretty(value: object, margin: str = "") -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    inner = margin + "  "
    items = cast("dict[str, object]", value).items()
    lines = [f"{inner}{json.dumps(key)}: {_pretty(item, inner)}" for key, item in items]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def copy_small(source: Path, target: Path) -> None:
    """The same for a copy of another small file."""
    write_small(target, source.read_bytes())
