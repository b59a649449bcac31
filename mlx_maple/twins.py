"""Converted twins: what a raw checkpoint became, so that the next start only reads what it uses.

A twin is a maple folder in the cache with a record of what it was made from. It is found again by
the source's real path, size and time of change and by the options of the conversion; a source that
has changed gets a new twin, and the old one goes. It comes into being whole, by a rename, under a
lock that is held by whoever converts. This module knows nothing of checkpoints: its caller writes
the folder.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_maple import __version__

RECORD = "twin.json"
UNFINISHED = ".making-"

# Files of a folder that say whether the model in it has changed.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt")
_WEIGHT_FILES = (".safetensors", ".bin")
_FOLDER_MARKS = ("model_index.json", "config.json")  # without one it is no model's folder


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A converted model in the cache.

    Attributes:
        path: the maple folder.
        source: real path of what it was made from.
        key: which state of the source, under which options.
        options: what the conversion was asked for.
        dtype: how its weights are stored.
        source_dtype: the widest float in the source.
        created: seconds since 1970.
        files: names and sizes of what the folder holds.
    """

    path: Path
    source: str
    key: str
    options: dict[str, Any]
    dtype: str
    source_dtype: str
    created: float
    files: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """What it takes on the disk."""
        return sum(self.files.values())

    @property
    def is_whole(self) -> bool:
        """Whether every file is there and as long as it was."""
        return bool(self.files) and all(
            (self.path / name).is_file() and (self.path / name).stat().st_size == size
            for name, size in self.files.items()
        )


def cache_folder() -> Path:
    """Where mlx-maple keeps what it can make again: $MAPLE_CACHE, else the user's cache folder."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("MAPLE_CACHE") or Path(shared) / "mlx-maple")
    try:
        return path.expanduser()
    except RuntimeError:  # a container's user without a name or a home
        return Path(tempfile.gettempdir()) / f"mlx-maple-{os.getuid()}"


def twins_folder() -> Path:
    """Where the twins lie."""
    return cache_folder() / "models"


def source_key(source: Path, options: Mapping[str, object]) -> str:
    """A short name for this state of ``source``, this program and ``options``."""
    real = source.resolve()
    files = [real]
    if real.name.endswith(".index.json"):  # and the shards that it names
        files += sorted(p for p in real.parent.iterdir() if p.suffix in _WEIGHT_FILES)
    elif real.is_dir() and any((real / name).is_file() for name in _FOLDER_MARKS):
        names = (p for p in real.rglob("*") if p.suffix in _MODEL_FILES and p.is_file())
        files = sorted(names)
    state: list[object] = [__version__, str(real), sorted(options.items())]
    for file in files:
        stat = file.stat()
        state.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def all_twins() -> list[Twin]:
    """Every twin in the cache, the newest first."""
    folder = twins_folder()
    try:
        entries = [e for e in folder.iterdir() if not e.name.startswith(".")]
    except OSError:
        return []
    found = [twin for entry in entries if (twin := _read(entry)) is not None]
    return sorted(found, key=lambda twin: -twin.created)


def find(key: str, accepts: Callable[[Twin], bool]) -> Twin | None:
    """The whole twin with this key that ``accepts`` takes."""
    for entry in twins_folder().glob(f"*-{key}-*"):
        twin = _read(entry)
        if twin is not None and twin.key == key and twin.is_whole and accepts(twin):
            return twin
    return None


def make(
    source: Path,
    options: Mapping[str, Any],
    *,
    name: str,
    dtype: str,
    source_dtype: str,
    write: Callable[[Path], None],
    waiting: Callable[[], None],
) -> Twin:
    """Let ``write`` fill a new maple folder and put it into the cache; or take one just made.

    Args:
        source: what is converted.
        options: what the conversion is asked for.
        name: for people; begins the folder's name.
        dtype: how the weights will be stored.
        source_dtype: the widest float in the source.
        write: writes the maple folder to the path that it is given.
        waiting: called once when another process is at the same work.

    Raises:
        OSError: when the cache cannot be written; nothing is left behind.
    """
    folder, key = twins_folder(), source_key(source, options)
    final = folder / f"{name}-{key}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, key, waiting):
        _clear_unfinished(folder, but=key)
        twin = _read(final)
        if twin is not None and twin.is_whole:
            return twin
        making = folder / f"{UNFINISHED}{key}"
        for left_over in (making, final):
            shutil.rmtree(left_over, ignore_errors=True)
        making.mkdir()
        try:
            write(making / "model")
            files = {p.relative_to(making / "model").as_posix(): p.stat().st_size
                     for p in (making / "model").rglob("*") if p.is_file()}  # fmt: skip
            record: dict[str, Any] = {
                "source": str(source.resolve()),
                "key": key,
                "options": dict(options),
                "dtype": dtype,
                "source_dtype": source_dtype,
                "created": time.time(),
                "files": files,
            }
            (making / "model" / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            os.rename(making / "model", final)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    made = Twin(path=final, **record)
    for old in all_twins():
        kin = (old.source, old.options, old.dtype) == (made.source, made.options, made.dtype)
        if kin and old.key != key:
            remove(old)
    return made


def remove(twin: Twin) -> None:
    """Take a twin away; half of one is never found, for its record goes first."""
    (twin.path / RECORD).unlink(missing_ok=True)
    shutil.rmtree(twin.path, ignore_errors=True)


def unfinished() -> list[Path]:
    """Folders that a killed conversion left."""
    return sorted(twins_folder().glob(f"{UNFINISHED}*"))


def _read(entry: Path) -> Twin | None:
    try:
        record = json.loads((entry / RECORD).read_text())
        return Twin(path=entry, **record)
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _locked(folder: Path, key: str, waiting: Callable[[], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / f".{key}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _clear_unfinished(folder: Path, but: str) -> None:
    """Remove what conversions left that were killed: those whose lock is free."""
    from filelock import FileLock, Timeout

    for left_over in unfinished():
        key = left_over.name[len(UNFINISHED) :]
        if key == but:
            continue
        try:
            with FileLock(str(folder / f".{key}.lock"), timeout=0):
                shutil.rmtree(left_over, ignore_errors=True)
        except Timeout:
            continue
