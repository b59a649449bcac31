"""Models and other networks by name: what is on this disk, and what ``load`` takes for a name.

A name from a request is looked up here and nowhere else, so that none reaches the file system: it
must be one of the embedded model, the model that the server was started with, the folders of
``$MAPLE_MODELS``, the hub's cache and the known names.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_maple import hub, known_models, model_folders
from mlx_maple.serve.config import Config

FRESH_SECONDS = 30.0  # that a look at the disk is good for


class UnknownName(LookupError):
    """Nothing that can be used goes by a name; one line."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model that can be named.

    Attributes:
        id: the name.
        source: embedded, named, folder, hub or known.
        load: what ``mlx_maple.load`` takes for it.
        is_here: whether it is on this disk.
        bytes: that it takes there, or would to download; None where that is not known.
        note: one line for people.
        license: of the weights, where it is known.
        file: name of its file, without folders; "" for a folder or a repository.
        aliases: what else it goes by, such as the name that its pictures tell.
    """

    id: str
    source: str
    load: str | None
    is_here: bool = True
    bytes: int | None = None
    note: str = ""
    license: str = ""
    file: str = ""
    aliases: tuple[str, ...] = ()


class Catalog:
    """What there is to draw with."""

    def __init__(self, config: Config) -> None:
        """Look at nothing yet."""
        self._config = config
        self._entries: dict[str, Entry] = {}
        self._looked = float("-inf")

    @property
    def default(self) -> str:
        """The name of the model that draws where none is named."""
        model = self._config.model
        if model is None:
            return "demo"
        if Path(model).exists():
            path = Path(model)
            return path.stem if path.is_file() else path.resolve().name
        return model

    def entries(self, *, again: bool = False) -> list[Entry]:
        """Every model, the default one first; looks at the disk where the last look is old."""
        if again or time.monotonic() - self._looked > FRESH_SECONDS:
            found = [self._named(), *_embedded(), *_in_folders(), *_from_hub()]
            entries: dict[str, Entry] = {}
            for entry in found:
                entries.setdefault(entry.id, entry)
            self._entries = entries
            self._looked = time.monotonic()
        return list(self._entries.values())

    def find(self, name: str | None) -> Entry:
        """The model that goes by a name; None is the default one.

        A1111's spelling will do: "name.safetensors [0123abcd]".

        Raises:
            UnknownName: there is none, or it is not on this disk.
        """
        wanted = self.default if not name else name
        candidates = [wanted, *_spellings(wanted)]
        for look_again in (False, True):
            found = self.entries(again=look_again)
            entries = {name.lower(): entry for entry in reversed(found) for name in entry.aliases}
            entries |= {entry.id.lower(): entry for entry in reversed(found)}
            for candidate in candidates:
                if (entry := entries.get(candidate.lower())) is not None:
                    if not entry.is_here:
                        raise UnknownName(
                            f"{entry.id} is not on this disk: `maple models pull {entry.id}` "
                            "fetches it"
                        )
                    return entry
        raise UnknownName(f"no model is called {name!r}: GET /api/v1/models lists them")

    def how(
        self, entry: Entry, *, vae: str | None = None, controlnets: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The arguments of ``load`` for a model.

        Raises:
            UnknownName: no autoencoder or ControlNet goes by a name.
        """
        how: dict[str, Any] = {
            "source": entry.load,
            "dtype": self._config.dtype,
            "quantize": self._config.quantize,
            "low_memory": self._config.low_memory,
            # Who started the server may have a model fetched; a request may not.
            "local_files_only": entry.source != "named",
        }
        if vae:
            how["vae"] = str(self.network("vae", vae))
        if controlnets:
            how["controlnet"] = [str(self.network("controlnet", name)) for name in controlnets]
        return how

    def networks(self, kind: str) -> dict[str, Path]:
        """Files of a kind in the model folders, by name."""
        return model_folders.list(kind)

    def network(self, kind: str, name: str) -> Path:
        """One file of a kind by its name.

        Raises:
            UnknownName: there is none.
        """
        path = model_folders.find(kind, name)
        if path is None:
            raise UnknownName(f"no {kind} is called {name!r}: GET /api/v1/networks lists them")
        return path

    def _named(self) -> Entry:
        if self._config.model is None:
            return _embedded()[0]
        path = Path(self._config.model)
        known = known_models.find(self._config.model)
        return Entry(
            id=self.default,
            source="named",
            load=self._config.model,
            note="the model that the server was started with",
            bytes=known.bytes if known else None,
            license=known.license if known else "",
            file=path.name if path.is_file() else "",
        )


def _embedded() -> list[Entry]:
    known = known_models.find("demo")
    assert known is not None
    return [
        Entry(
            id=known.name,
            source="embedded",
            load=known.name,
            bytes=known.bytes,
            note=known.note,
            license=known.license,
        )
    ]


def _in_folders() -> list[Entry]:
    found = []
    for name, path in model_folders.list("checkpoint").items():
        try:
            size = path.stat().st_size
        except OSError:
            continue
        found.append(
            Entry(
                id=name,
                source="folder",
                load=str(path),
                bytes=size,
                file=path.name,
                aliases=(path.stem,),
            )
        )
    return found


def _from_hub() -> list[Entry]:
    """Known names, and what else the hub's cache holds."""
    from mlx_maple.cli.models import list_kept

    here = {kept.name: kept.nbytes for kept in list_kept() if kept.kind == "hub"}
    found, told = [], set()
    for known in known_models.known_models():
        if known.kind != "model" or known.hub is None:
            continue
        is_here = known.repo in here
        told.add(known.repo)
        found.append(
            Entry(
                id=known.name,
                source="known",
                load=known.name,
                is_here=is_here,
                bytes=here[known.repo] if is_here and known.repo else known.bytes,
                note=known.note,
                license=known.license,
                aliases=(known.repo, known.repo.partition("/")[2]) if known.repo else (),
            )
        )
    parts = {known.repo for known in known_models.known_models() if known.kind != "model"}
    for repo, nbytes in here.items():
        if repo not in told | parts and hub.parse_name(repo) is not None:
            name = repo.partition("/")[2]
            found.append(Entry(id=repo, source="hub", load=repo, bytes=nbytes, aliases=(name,)))
    return found


def _spellings(name: str) -> list[str]:
    """What else a name may mean: without A1111's hash, without a file's ending."""
    bare = name.partition(" [")[0].strip()
    stem, _, ending = bare.rpartition(".")
    is_file = ending.lower() in ("safetensors", "ckpt", "gguf", "pt", "pth", "bin")
    return [bare, stem] if is_file else [bare]
