"""`maple models`: what is kept on this disk, what can be fetched, and the default model.

Two kinds are kept: twins, which raw checkpoints were converted into when they were first drawn
with, and what was downloaded from the hub, in huggingface_hub's cache, which others share. The
folders of ``$MAPLE_MODELS`` are a third place, whose files are listed and never touched.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from mlx_maple import hub, known_models, model_folders
from mlx_maple.cli import DONE, FAULT, USAGE, Failure, _default_model, _terminal
from mlx_maple.cli._loose import OPTIONS, Loose, family_of, list_loose
from mlx_maple.cli._terminal import Screen
from mlx_maple.known_models import KnownModel


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
        family: of what was downloaded, by evidence; "" where it is no model that can be used.
    """

    kind: str
    name: str
    path: Path
    nbytes: int
    detail: str
    remove: Callable[[], None]
    family: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    verbs = parser.add_subparsers(
        dest="action",
        metavar="list | pull | use | clear | path",
        help="what to do (default: list)",
    )
    name = "a name as `maple models` lists it, or a hub name (owner/name)"

    listing = verbs.add_parser("list", help="list what is kept and what can be fetched")
    listing.add_argument("--json", action="store_true", help="print one JSON object")

    pull = verbs.add_parser("pull", help="download a model and print where it is")
    pull.add_argument("name", metavar="NAME", help=name)
    pull.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="what it will be drawn in, which decides between a repository's files",
    )
    pull.add_argument("--variant", metavar="NAME", help="which weights, such as fp16")
    pull.add_argument("--json", action="store_true", help="print one JSON object")
    pull.add_argument("--progress", action="store_true", help="show it where stderr is no terminal")
    pull.add_argument("--quiet", action="store_true", help="print nothing but the path and errors")

    use = verbs.add_parser("use", help="set or show what `maple generate` draws with")
    use.add_argument("name", nargs="?", metavar="MODEL", help=f"{name}, or a file or folder")
    use.add_argument("--json", action="store_true", help="print one JSON object")

    clear = verbs.add_parser("clear", help="remove kept models")
    clear.add_argument("name", nargs="?", metavar="NAME", help="a name as `maple models` lists it")
    clear.add_argument(
        "--all", action="store_true", help="every twin; what the hub's cache holds stays"
    )
    verbs.add_parser("path", help="print the folder of the twins")
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """List, fetch, choose, clear or print the path."""
    from mlx_maple import twins

    if args.action == "path":
        print(twins.twins_folder())
        return DONE
    if args.action == "clear":
        return _clear(args.name, args.all)
    if args.action == "pull":
        return _pull(args)
    if args.action == "use":
        return _use(args.name, args.json)
    return _list(getattr(args, "json", False))


def _list(as_json: bool) -> int:
    from mlx_maple import twins

    kept, known, loose = list_kept(families=True), known_models.known_models(), list_loose()
    default, _ = _default_model.chosen()
    here = {model.name for model in kept if model.kind == "hub"}
    if as_json:
        report = {
            "folder": str(twins.twins_folder()),
            "models": [{k: v for k, v in vars(model).items() if k != "remove"} for model in kept],
            "files": [vars(one) for one in loose],
            "known": [{**asdict(m), "is_here": m.hub is None or m.repo in here} for m in known],
            "default": default or "demo",
        }
        print(json.dumps(report, default=str))
        return DONE
    width = max((len(model.name) for model in kept), default=0)
    for model in kept:
        size = _terminal.size(model.nbytes)
        family = f"{model.family}, " if model.family else ""
        print(f"{model.kind:<5} {size:>8}  {model.name:<{width}}  {family}{model.detail}")
    total = _terminal.size(sum(model.nbytes for model in kept))
    print(f"{len(kept)} kept, {total}; twins in {twins.twins_folder()}")

    _print_loose(loose)
    print("\nknown by name (`maple models pull NAME` downloads, the option draws with it):")
    options = {model.name: f"{known_models.OPTIONS[model.kind]} {model.name}" for model in known}
    width = max(map(len, options.values()))
    for model in known:
        state = "here" if model.hub is None or model.repo in here else ""
        words = "; ".join(filter(None, (model.note, _recommended(model), model.license)))
        print(f"{state:<5} {_download_size(model):>29}  {options[model.name]:<{width}}  {words}")
    print(f"default: {default or 'demo'} (`maple models use`)")
    return DONE


def _print_loose(loose: list[Loose]) -> None:
    if not loose:
        return
    print(f"\nfiles in ${model_folders.VARIABLE} (the option takes the name):")
    width = max(len(f"{OPTIONS[one.kind]} {one.name}") for one in loose)
    for one in loose:
        what = one.family or (one.fault and f"cannot be used: {one.fault}")
        line = f"{f'{OPTIONS[one.kind]} {one.name}':<{width}}  {what}"
        print(f"{_terminal.size(one.nbytes):>14}  {line}".rstrip())


def _recommended(model: KnownModel) -> str:
    """What a model's name stands for beside its files, in a few words."""
    said = dict(model.settings)
    words = [f"{said['steps']} steps"] if "steps" in said else []
    if "guidance_scale" in said:
        words.append(f"guidance {said['guidance_scale']:g}")
    words += [said[name] for name in ("sampler", "schedule") if name in said]
    return ", ".join(words + ([f"with {model.vae}"] if model.vae else []))


def _download_size(model: KnownModel) -> str:
    size = _terminal.size(model.bytes)
    if model.bytes_in_float32 == model.bytes:
        return size
    return f"{size}, {_terminal.size(model.bytes_in_float32)} in float32"


def _pull(args: argparse.Namespace) -> int:
    """Download what drawing with a model needs, and say where it is."""
    from mlx_maple import loading

    known = known_models.find(args.name)
    if known is not None and known.hub is None:
        path, files, notes, license = loading.DEMO, (), ["it comes with maple"], known.license
    else:
        name = hub.parse_name(known.hub if known and known.hub else args.name)
        if name is None:
            raise Failure(FAULT, _unknown(args.name))
        screen = Screen(quiet=args.quiet, forced=args.progress)

        def progress(done: int, total: int, label: str) -> None:
            detail = f"{_terminal.size(done)} of {_terminal.size(total)}"
            screen.progress(label, done, total, detail)

        dtype = args.dtype or loading.default_dtype()
        try:
            path, choice, notes = hub.fetch(
                name, dtype=dtype, variant=args.variant, progress=progress
            )
            if (vae := _vae_of(known)) is not None:
                hub.fetch(vae, dtype=dtype, progress=progress)
        finally:
            screen.clear()
        files, license = choice.files, known.license if known else ""
        for note in notes:
            screen.say(f"note: {note}")
    if args.json:
        report = {"name": args.name, "path": str(path), "files": files, "license": license}
        print(json.dumps({**report, "notes": notes}))
    else:
        print(path)
    return DONE


def _vae_of(known: KnownModel | None) -> hub.HubName | None:
    """Where the autoencoder lies that a known model is best drawn with, if it is not its own."""
    vae = None if known is None or known.vae is None else known_models.find(known.vae)
    return None if vae is None or vae.hub is None else hub.parse_name(vae.hub)


def _use(name: str | None, as_json: bool) -> int:
    """Keep the default model, or only say which it is."""
    if name is not None:
        _default_model.keep(_default_for(name))
    model, origin = _default_model.chosen()
    if as_json:
        print(json.dumps({"model": model or "demo", "from": origin if model else ""}))
    elif model is None:
        print("demo, which comes with maple")
    else:
        print(f"{model} (from {origin})")
    if name is not None and origin == f"${_default_model.VARIABLE}":
        Screen().say(f"note: kept, but {origin} is set, and goes before it")
    return DONE


def _default_for(name: str) -> str | None:
    """What to keep for ``name``: a path in full, a name as it is; None for the embedded model."""
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if path.exists():
        return str(path.resolve())
    if model_folders.find("checkpoint", name) is not None:
        return name
    known = known_models.find(name)
    if known is None:
        if hub.parse_name(name) is None:
            raise Failure(FAULT, f"{_unknown(name)}; nor is it a file or folder")
        return name
    if known.kind != "model":
        option = known_models.OPTIONS[known.kind]
        raise Failure(USAGE, f"{name} is no whole model: give it to {option}")
    return None if known.hub is None else known.name


def _unknown(name: str) -> str:
    names = ", ".join(model.name for model in known_models.known_models())
    return f"{name}: not a hub name (owner/name), and no model is known by it: {names}"


def list_kept(*, families: bool = False) -> list[Kept]:
    """Twins, unfinished conversions and the models in the hub's cache.

    Args:
        families: look into the downloads for their families, too.
    """
    return [*_twins(), *_unfinished(), *_from_hub(families)]


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


def _from_hub(families: bool) -> list[Kept]:
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

        family = ""
        if families:
            newest = max(repo.revisions, key=lambda revision: revision.last_modified)
            family = _family(newest.snapshot_path)
        path, nbytes = repo.repo_path, repo.size_on_disk
        found.append(Kept("hub", repo.repo_id, path, nbytes, detail, remove, family))
    return found


def _family(snapshot: Path) -> str:
    """The family of a download: of the whole folder, or of its one file; "" for several."""
    family, _ = family_of(snapshot)
    if not family:
        files = [path for path in snapshot.iterdir() if path.name.endswith(hub.CHECKPOINTS)]
        family = family_of(files[0])[0] if len(files) == 1 else ""
    return family


def _is_ours(files: set[str]) -> bool:
    """Whether a cached repository looks like one to draw with: language models are not listed."""
    for file in files:
        language = file.startswith(("model", "pytorch_model", "adapter_model"))
        if file == "model_index.json" or file.endswith((".ckpt", ".gguf")):
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
