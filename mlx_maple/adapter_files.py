"""From a path or a name to a LoRA or to learned words, read for one model.

A path that exists goes before a name in the models' folders. What was read is kept for a while, as
one drawing after another asks for it; a file that has changed since is read again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maple_convert.embedding import EmbeddingFile, Vectors, fitted, open_embedding
from maple_convert.errors import UnreadableFile, one_line
from maple_convert.lora import LoraFile, open_lora
from mlx_maple import model_folders
from mlx_maple.adapters import Adapters, Lora, Word

KEPT = 8  # files of each kind, and bytes of them in all, beside what a drawing has
KEPT_BYTES = 1 << 30
SHOWN = 3  # names in a message


class _Identity(NamedTuple):
    """A file and its state: equal for two readings of one file that has not changed."""

    path: str
    size: int
    changed: int


class AdapterFiles:
    """The files of LoRAs and words, as one model reads them.

    Args:
        configs: of the model's networks by name, as its components have them.
        fetch: brings a file of the hub by its name there; None for what is no such name.
    """

    def __init__(
        self,
        configs: Mapping[str, Mapping[str, Any]],
        fetch: Callable[[str], Path | None] = lambda name: None,
    ) -> None:
        self._configs = configs
        self._fetch = fetch
        self._fetched: dict[str, Path] = {}
        self._widths = {
            part: config["hidden_size"]
            for part, config in configs.items()
            if part.startswith("text_encoder")
        }
        self._loras: OrderedDict[_Identity, Lora] = OrderedDict()
        self._words: OrderedDict[_Identity, list[Word]] = OrderedDict()

    def adapters(self, embeddings: Iterable[str | Path] = ()) -> Adapters:
        """What the pipeline is handed: nothing on top of the model but these words."""
        words = [word for source in embeddings for word in self.words(source)]
        return Adapters(self.lora, self.shelf, words, tuple(self._widths))

    def lora(self, name: str) -> Lora:
        """A LoRA by its path or name.

        Raises:
            ConvertError: if it is not there, cannot be read, or is for another model.
        """
        path = self._found("lora", name, "LoRA")
        identity = _identity(path)
        return _kept(self._loras, identity, lambda: self._read_lora(path, identity))

    def words(self, source: str | Path) -> list[Word]:
        """The words of a file by its path or name; the first is the file's own name.

        Raises:
            ConvertError: if it is not there, cannot be read, or is for another model.
        """
        path = self._found("embedding", str(source), "embedding")
        return _kept(self._words, _identity(path), lambda: self._of(open_embedding(path)))

    def shelf(self) -> dict[str, Callable[[], Word]]:
        """What opens each word in the models' folders, by its name there: nothing is read yet."""
        found: dict[str, Callable[[], Word]] = {}
        for name, path in model_folders.list("embedding").items():
            found.setdefault(name.rpartition("/")[2], lambda path=path: self.words(path)[0])
        return found

    def _read_lora(self, path: Path, identity: _Identity) -> Lora:
        file = open_lora(path, self._configs)
        vectors = [self._word(path, name, vectors) for name, vectors in file.vectors.items()]
        return Lora(
            name=path.stem,
            updates=file.updates,
            identity=identity,
            notes=_unmatched(file),
            words=vectors,
        )

    def _of(self, file: EmbeddingFile) -> list[Word]:
        return [self._word(file.path, name, vectors) for name, vectors in file.words.items()]

    def _word(self, path: Path, name: str, vectors: Vectors) -> Word:
        mine = fitted(path, name, vectors, self._widths)
        return Word(name, {part: np.asarray(tensor.array) for part, tensor in mine.items()})

    def _found(self, kind: str, name: str, what: str) -> Path:
        """The file that is meant: a path, a name in the models' folders, a name of the hub."""
        path = Path(name)
        try:
            path = path.expanduser()
            if path.is_file():
                return path
        except (OSError, RuntimeError, ValueError):  # too long, "~nobody", a NUL
            pass
        if (named := model_folders.find(kind, name)) is not None:
            return named
        if name in self._fetched:
            return self._fetched[name]
        if (fetched := self._fetch(name)) is not None:
            self._fetched[name] = fetched  # the hub is not asked again at every drawing
            return fetched
        known = list(model_folders.list(kind))
        more = f" and {len(known) - SHOWN} more" if known[SHOWN:] else ""
        there = ", ".join(known[:SHOWN]) + more if known else "which has none"
        where = f"${model_folders.VARIABLE} ({there})"
        reason = f"no such file, and no {what} by that name in {where}"
        raise UnreadableFile(one_line(name, 200) or "''", reason)


def _identity(path: Path) -> _Identity:
    try:
        status = path.stat()
    except OSError as error:
        raise UnreadableFile(path, error.strerror or "cannot be read") from error
    return _Identity(str(path.resolve()), status.st_size, status.st_mtime_ns)


def _kept(
    shelf: "OrderedDict[_Identity, Any]", identity: _Identity, read: Callable[[], Any]
) -> Any:
    """What was read of a file, if it is kept and the file is as it was; else it is read now."""
    if identity not in shelf:
        shelf[identity] = read()
        while len(shelf) > 1 and (len(shelf) > KEPT or sum(k.size for k in shelf) > KEPT_BYTES):
            shelf.popitem(last=False)
    shelf.move_to_end(identity)
    return shelf[identity]


def _unmatched(file: LoraFile) -> list[str]:
    """One line for what the model has no layer for."""
    if not file.unmatched:
        return []
    names = [one_line(name, 80) for name in file.unmatched]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")
    total = file.modules + len(names)
    reason = next(iter(file.unmatched.values()))
    return [
        f"{file.path.name}: {len(names)} of its {total} layers are left out ({shown}): {reason}"
    ]
