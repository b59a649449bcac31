"""Models and other networks by name: what is on this disk, and what ``load`` takes for a name.

A name from a request is looked up here and nowhere else, so that none reaches the file system: it
must be one of the embedded model, the model that the server was started with, the folders of
``$MAPLE_MODELS``, the hub's cache and the known names.

What lies there is looked up once, and again when a folder of it has changed: names that nothing
goes by cost a look at the folders' times, not at what is in them.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_maple import hub, known_models, model_folders
from mlx_maple.serve.config import Config

CHECK_SECONDS = 1.0  # between two looks at the folders' times
OLD_SECONDS = 600.0  # after which all is looked up again: a file may have grown
MOST_FOLDERS = 5000  # whose times are looked at
PUBLISHED = (
    "vae",
    "taesd",
    "controlnet",
    "lora",
    "ip_adapter",
)  # kinds of which some are known by name


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


Stamp = tuple[tuple[Path, int], ...]  # folders and when they changed


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was on the disk at one time.

    Attributes:
        entries: models by their ids.
        files: of each kind, as ``model_folders.named`` gives them.
        published: names of networks of each kind that are known, and in the hub's cache.
        stamp: the folders that were looked at.
        roots: what ``$MAPLE_MODELS`` named.
        at: when, by the monotonic clock.
    """

    entries: dict[str, Entry]
    files: dict[str, model_folders.Named]
    published: dict[str, tuple[str, ...]]
    stamp: Stamp
    roots: Sequence[Path]
    at: float

    @property
    def is_old(self) -> bool:
        """Whether something may have changed since."""
        if model_folders.roots() != self.roots or time.monotonic() - self.at > OLD_SECONDS:
            return True
        return any(_changed(path) != when for path, when in self.stamp)


class Catalog:
    """What there is to draw with."""

    def __init__(self, config: Config) -> None:
        """Look at nothing yet."""
        self._config = config
        self._looking = threading.Lock()
        self._last: _Look | None = None
        self._checked = float("-inf")

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

    def _look(self, *, again: bool = False, check: bool = False) -> _Look:
        """What is on the disk, as it was when a folder changed last.

        Args:
            again: look at all of it now.
            check: look at the folders' times now, not only once in a while.
        """
        with self._looking:
            last, now = self._last, time.monotonic()
            if last is not None and not again:
                is_checked = now - self._checked < CHECK_SECONDS
                if not check and is_checked and last.roots == model_folders.roots():
                    return last
                self._checked = now
                if not last.is_old:
                    return last
            # Times before contents: what changes meanwhile is seen at the next look.
            stamp = tuple((path, _changed(path)) for path in _folders())
            files = {kind: model_folders.named(kind) for kind in model_folders.KINDS}
            found = [self._named(), *_embedded(), *_in_folders(files["checkpoint"]), *_from_hub()]
            entries: dict[str, Entry] = {}
            for entry in found:
                entries.setdefault(entry.id, entry)
            self._checked = time.monotonic()
            self._last = _Look(
                entries=entries,
                files=files,
                published=_published(),
                stamp=stamp,
                roots=model_folders.roots(),
                at=now,
            )
            return self._last

    def entries(self, *, again: bool = False) -> list[Entry]:
        """Every model, the default one first; ``again`` looks at the disk in any case."""
        return list(self._look(again=again).entries.values())

    def find(self, name: str | None) -> Entry:
        """The model that goes by a name; None is the default one.

        A1111's spelling will do: "name.safetensors [0123abcd]".

        Raises:
            UnknownName: there is none, or it is not on this disk.
        """
        wanted = self.default if not name else name
        candidates = [wanted, *_spellings(wanted)]
        for check in (False, True):
            found = list(self._look(check=check).entries.values())
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
        self,
        entry: Entry,
        *,
        beside: Mapping[str, str | Sequence[str] | None] | None = None,
        dtype: str | None = None,
        quantize: int | None = None,
        low_memory: bool | None = None,
    ) -> dict[str, Any]:
        """The arguments of ``load`` for a model; what is None is as the server was started.

        Args:
            entry: the model.
            beside: names of networks that it is to draw with, by kind.
            dtype: of weights and activations.
            quantize: bits to keep weights in; 0 is as they are stored.
            low_memory: hold one network at a time.

        Raises:
            UnknownName: no network of the kind goes by a name.
        """
        config = self._config
        how: dict[str, Any] = {
            "source": entry.load,
            "dtype": config.dtype if dtype is None else dtype,
            "quantize": (config.quantize if quantize is None else quantize) or None,
            "low_memory": config.low_memory if low_memory is None else low_memory,
            "local_files_only": True,  # a request has nothing fetched
        }
        for kind, names in (beside or {}).items():
            if isinstance(names, str):
                how[kind] = self.network(kind, names)
            elif names:
                how[kind] = [self.network(kind, name) for name in names]
        return how

    def networks(self, kind: str) -> list[str]:
        """Names of a kind: files in the model folders, then known ones in the hub's cache."""
        look = self._look()
        names = list(model_folders.list(kind, look.files[kind])) if kind in look.files else []
        return names + [name for name in look.published.get(kind, ()) if name not in names]

    def files(self, kind: str) -> dict[str, Path]:
        """Files of a kind in the model folders, by name."""
        return model_folders.list(kind, self._look().files[kind])

    def network(self, kind: str, name: str) -> str:
        """What ``load`` takes for a network of a kind that goes by a name.

        A TAESD may also lie among the autoencoders.

        Raises:
            UnknownName: there is none.
        """
        folder = "vae" if kind == "taesd" else kind
        for check in (False, True):
            look = self._look(check=check)
            path = model_folders.find(folder, name, look.files[folder])
            if path is not None:
                return str(path)
            if name in look.published.get(kind, ()):
                return name
        raise UnknownName(f"no {kind} is called {name!r}: GET /api/v1/networks lists them")

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


def _in_folders(files: model_folders.Named) -> list[Entry]:
    found = []
    for name, path in model_folders.list("checkpoint", files).items():
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


def _published() -> dict[str, tuple[str, ...]]:
    """Names of known networks of each kind that are in the hub's cache."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(PUBLISHED, ())
    for known in known_models.known_models():
        name = None if known.hub is None else hub.parse_name(known.hub)
        if known.kind in found and name is not None and hub.folder_of(name).is_dir():
            found[known.kind] += (known.name,)
    return found


def _folders() -> Iterator[Path]:
    """Every folder whose change may mean another model, down to where the files lie."""
    trees = [
        (folder, model_folders.DEPTH)
        for kind in model_folders.KINDS
        for folder in model_folders.folders(kind)
    ]
    # Whether a folder of models is there at all; in the hub's cache, downloads that are whole.
    trees += [(root, 0) for root in model_folders.roots()]
    trees += [(root / "models", 0) for root in model_folders.roots()]
    cache = hub.cache_folder()
    trees += [(cache, 0)]
    with suppress(OSError):
        trees += [(path / "snapshots", 1) for path in cache.glob("models--*")]
    count = 0
    for top, depth in trees:
        yield top
        for above, below, _ in os.walk(top, followlinks=True) if depth else ():
            if len(Path(above).relative_to(top).parts) + 1 >= depth:
                below.clear()
            for name in below:
                if (count := count + 1) > MOST_FOLDERS:
                    return
                yield Path(above, name)


def _changed(path: Path) -> int:
    """When a folder or file changed; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _spellings(name: str) -> list[str]:
    """What else a name may mean: without A1111's hash, without a file's ending."""
    bare = name.partition(" [")[0].strip()
    stem, _, ending = bare.rpartition(".")
    is_file = ending.lower() in ("safetensors", "ckpt", "gguf", "pt", "pth", "bin")
    return [bare, stem] if is_file else [bare]
