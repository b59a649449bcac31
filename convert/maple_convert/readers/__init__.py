"""Hostile bytes in, checkpoints out.

``open_checkpoint`` looks at a file's content and hands it to the reader of that container. Opening
costs the metadata; ``read`` brings one tensor at a time. Whatever the bytes are, only ConvertErrors
leave this package: nothing in a file is executed, no name in it is used as a path outside its own
folder, and limits are checked before memory is taken.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from maple_convert.errors import InvalidCheckpoint
from maple_convert.readers.gguf import open_gguf
from maple_convert.readers.json_text import read_json
from maple_convert.readers.plain import Stub
from maple_convert.readers.safetensors_file import open_safetensors
from maple_convert.readers.sharded import open_sharded
from maple_convert.readers.sniff import Kind, sniff
from maple_convert.readers.source import FileCheckpoint, SourceFile
from maple_convert.readers.torch_legacy import open_torch_legacy
from maple_convert.readers.torch_zip import open_torch_zip
from maple_convert.tensors import Checkpoint

__all__ = ["Stub", "open_checkpoint", "read_json"]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint file, or the ``*.index.json`` of a sharded one, whatever it is called.

    Raises:
        UnreadableFile: if it cannot be read at all.
        InvalidCheckpoint: if it is malformed.
        UnsupportedCheckpoint: if it is of a kind that is not read.
    """
    path = Path(path)
    opened = _open(path)
    if isinstance(opened, FileCheckpoint):
        return opened
    return open_sharded(path, read_json(path), _open_shard)


def _open_shard(path: Path) -> FileCheckpoint:
    opened = _open(path)
    if not isinstance(opened, FileCheckpoint):
        raise InvalidCheckpoint(path, "is a JSON file where a shard of weights was expected")
    return opened


@contextmanager
def _without_collector() -> Generator[None, None, None]:
    """Pause the search for cyclic garbage while a tree of objects grows.

    Python looks through all of them again and again as they become more, and finds none to free:
    for half a million lists that is two thirds of the time that it takes to refuse them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collector()
def _open(path: Path) -> "FileCheckpoint | Kind":
    """A checkpoint in one file, or "json"."""
    file = SourceFile(path)
    try:
        kind = sniff(file)
        if kind == "json":
            file.close()
            return kind
        readers = {
            "safetensors": open_safetensors,
            "zip": open_torch_zip,
            "pickle": open_torch_legacy,
            "gguf": open_gguf,
        }
        return readers[kind](file)
    except BaseException:
        file.close()
        raise
