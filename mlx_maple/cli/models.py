"""`maple models`: the models that are kept on this disk, their sizes, and how to clear them.

Two kinds are kept: twins, which raw checkpoints were converted into when they were first drawn
with, and what was downloaded from the hub, in huggingface_hub's cache, which others share.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_maple.cli import DONE, FAULT, USAGE, Failure, _terminal


@dataclass(frozen=True)
class Kept:
    """One model on this disk.

    Attributes:
        kind: "twin" or "hub".
        name: what it is called in the list, and by ``clear``.
        path: its folder.
        nbytes: what it takes.
        detail: what a person would want to know of it.
        remove: takes it away.
    """

    kind: str
    name: str
    path: Path
    nbytes: int
    detail: str
    remove: Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    verbs = parser.add_subparsers(
        dest="action", metavar="list | clear | path", help="what to do (default: list)"
    )
    listing = verbs.add_parser("list", help="list what is kept, with sizes (the default)")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    clear = verbs.add_parser("clear", help="remove kept models")
    clear.add_argument("name", nargs="?", metavar="NAME", help="a name as `maple models` lists it")
    clear.add_argument(
        "--all", action="store_true", help="every twin; what the hub's cache holds stays"
    )
    verbs.add_parser("path", help="print the folder of the twins")


def run(args: argparse.Namespace) -> int:
    """List, clear or print the path."""
    from mlx_maple import twins

    if args.action == "path":
        print(twins.twins_folder())
        return DONE
    if args.action == "clear":
        return _clear(args.name, args.all)
    kept = list_kept()
    if getattr(args, "json", False):
        models = [{k: v for k, v in vars(model).items() if k != "remove"} for model in kept]
        print(json.dumps({"folder": str(twins.twins_folder()), "models": models}, default=str))
        return DONE
    width = max((len(model.name) for model in kept), default=0)
    for model in kept:
        size = _terminal.size(model.nbytes)
        print(f"{model.kind:<5} {size:>8}  {model.name:<{width}}  {model.detail}")
    total = _terminal.size(sum(model.nbytes for model in kept))
    print(f"{len(kept)} kept, {total}; twins in {twins.twins_folder()}")
    return DONE


def list_kept() -> list[Kept]:
    """Twins, unfinished conversions and the models in the hub's cache."""
    return [*_twins(), *_unfinished(), *_from_hub()]


def _twins() -> list[Kept]:
    from mlx_maple import twins

    found = []
    for twin in twins.all_twins():
        gone = "" if Path(twin.source).exists() else " (which is gone)"
        state = "" if twin.is_whole else "damaged, "
        detail = f"{state}{twin.dtype}, made from {twin.source}{gone}"
        found.append(
            Kept(
                "twin",
                twin.path.name,
                twin.path,
                twin.nbytes,
                detail,
                lambda t=twin: twins.remove(t),
            )
        )
    return found


def _unfinished() -> list[Kept]:
    from mlx_maple import twins

    found = []
    for path in twins.unfinished():
        nbytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        detail = "a conversion under way, or what a killed one left"
        found.append(Kept("part", path.name, path, nbytes, detail, partial(shutil.rmtree, path)))
    return found


def _from_hub() -> list[Kept]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, OSError):
        return []
    found = []
    for repo in sorted(cache.repos, key=lambda repo: -repo.last_accessed):
        files = {file.file_name for revision in repo.revisions for file in revision.files}
        if repo.repo_type != "model" or not _is_ours(files):
            continue
        hashes = [revision.commit_hash for revision in repo.revisions]
        detail = f"{repo.nb_files} files in {repo.repo_path}"

        def remove(hashes: list[str] = hashes) -> None:
            cache.delete_revisions(*hashes).execute()

        found.append(Kept("hub", repo.repo_id, repo.repo_path, repo.size_on_disk, detail, remove))
    return found


def _is_ours(files: set[str]) -> bool:
    """Whether a cached repository looks like one to draw with: language models are not listed."""
    for file in files:
        language = file.startswith(("model", "pytorch_model", "adapter_model"))
        if file == "model_index.json" or file.endswith(".ckpt"):
            return True
        if file.endswith(".safetensors") and "/" not in file and not language:
            return True
    return False


def _clear(name: str | None, everything: bool) -> int:
    if (name is None) == (not everything):
        raise Failure(USAGE, "maple models clear: give a NAME as `maple models` lists it, or --all")
    kept = list_kept()
    if everything:
        chosen = [model for model in kept if model.kind != "hub"]
    else:
        chosen = [model for model in kept if model.name == name]
        if not chosen:
            names = ", ".join(model.name for model in kept) or "none is kept"
            raise Failure(FAULT, f"no kept model is called {name}: {names}")
    for model in chosen:
        model.remove()
    freed = _terminal.size(sum(model.nbytes for model in chosen))
    print(f"removed {len(chosen)}, {freed}")
    return DONE
