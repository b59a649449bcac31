"""A checkpoint in several files with an index, as Hugging Face writes large ones.

``model.safetensors.index.json`` (or ``pytorch_model.bin.index.json``) lies beside its shards:

    {"metadata": {"total_size": 5135149760},
     "weight_map": {"conv_in.weight": "model-00001-of-00002.safetensors", ...}}

Refused: shard names that are more than a file's name beside the index (slashes, "..", drives); more
than ``MAX_SHARDS`` shards; a tensor that is not in the shard that the index names, and a tensor in
a shard that the index does not name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.source import FileCheckpoint
from maple_convert.tensors import Tensor, TensorInfo

MAX_SHARDS = 128  # files held open at once; macOS allows 256
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class ShardedCheckpoint:
    """Several files read as one: see ``maple_convert.tensors.Checkpoint``."""

    def __init__(self, path: Path, shards: Mapping[str, FileCheckpoint]) -> None:
        self.path = path
        self.shards = list(shards.values())
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for shard in self.shards for name, info in shard.tensors.items()
        }
        self.container = f"{self.shards[0].container} in {len(self.shards)} shards"
        self.objects: Mapping[str, object] = {}
        self.metadata: Mapping[str, str] = {
            key: text for shard in self.shards for key, text in shard.metadata.items()
        }
        self.notes = [note for shard in self.shards for note in shard.notes]
        self._owner = {name: shard for shard in self.shards for name in shard.tensors}

    def read(self, name: str) -> Tensor:
        """One tensor's values: contiguous, owning its memory. KeyError for an unknown name."""
        return self._owner[name].read(name)

    def close(self) -> None:
        """Close every shard."""
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> "ShardedCheckpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_sharded(
    path: Path, index: dict[str, Any], open_shard: Callable[[Path], FileCheckpoint]
) -> ShardedCheckpoint:
    """Open every shard that an index names.

    Args:
        path: the index file; the shards lie beside it.
        index: its content.
        open_shard: opens one file that is not itself an index.
    """
    wanted = _weight_map(path, index)
    shards: dict[str, FileCheckpoint] = {}
    try:
        for shard_name, names in wanted.items():
            shard = shards[shard_name] = open_shard(path.parent / shard_name)
            if missing := sorted(names - set(shard.tensors)):
                raise InvalidCheckpoint(
                    path,
                    f"says that {quoted(shard_name)} holds {quoted(missing[0])}, which it does not",
                )
            if extra := sorted(set(shard.tensors) - names):
                raise InvalidCheckpoint(
                    path, f"does not list {quoted(extra[0])} of {quoted(shard_name)}"
                )
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise
    return ShardedCheckpoint(path, shards)


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, set[str]]:
    """Names by shard, from a checked ``weight_map``."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        reason = "is a JSON file without a weight_map: give the folder or the weights beside it"
        raise UnsupportedCheckpoint(path, reason)
    wanted: dict[str, set[str]] = {}
    for name, shard in weight_map.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(name, str) or not isinstance(shard, str):
            raise InvalidCheckpoint(path, "maps a tensor to something that is no file name")
        if set(shard) & set("/\\:\0") or shard.startswith(".") or not shard.endswith(SUFFIXES):
            raise InvalidCheckpoint(
                path, f"names a shard {quoted(shard)}, which is no file beside it"
            )
        wanted.setdefault(shard, set()).add(name)
    if not 0 < len(wanted) <= MAX_SHARDS:
        raise InvalidCheckpoint(path, f"names {len(wanted)} shards; 1 to {MAX_SHARDS} are read")
    return wanted
