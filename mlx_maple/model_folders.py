"""Folders of loose model files, as other programs keep them, and what lies in them by name.

``$MAPLE_MODELS`` names them: a folder, an ``extra_model_paths.yaml``, or several of either with the
system's separator between (":" or ";"). In a folder each kind has a subfolder of its own, called as
AUTOMATIC1111's or as ComfyUI's, directly or under ``models``; an ``extra_model_paths.yaml`` in it
is followed too (one level: those that it names are taken as they are).

A name is what people write in a prompt or choose from a list: a file's name without its suffix,
with or without the folders above it. It never leads out of these folders.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

VARIABLE = "MAPLE_MODELS"
YAML_NAME = "extra_model_paths.yaml"

# Each kind's subfolders: AUTOMATIC1111's names, then ComfyUI's, which are its YAML's keys too.
SUBFOLDERS: dict[str, tuple[str, ...]] = {
    "checkpoint": ("Stable-diffusion", "checkpoints"),
    "lora": ("Lora", "LyCORIS", "loras"),
    "embedding": ("embeddings",),
    "unet": ("unet", "diffusion_models"),
    "vae": ("VAE", "vae"),
    "controlnet": ("ControlNet", "controlnet"),
    "ip_adapter": ("ipadapter", "ip_adapter"),
    "clip_vision": ("clip_vision",),
    "upscaler": ("ESRGAN", "RealESRGAN", "upscale_models"),
}
KINDS = tuple(SUBFOLDERS)
SUFFIXES: dict[str, tuple[str, ...]] = {
    "checkpoint": (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin"),
    "lora": (".safetensors", ".pt", ".ckpt", ".bin"),
    "embedding": (".safetensors", ".pt", ".bin"),
    "unet": (".safetensors", ".gguf", ".pt", ".ckpt", ".pth", ".bin"),
    "vae": (".safetensors", ".pt", ".ckpt", ".pth", ".bin"),
    "controlnet": (".safetensors", ".pth", ".ckpt", ".pt", ".bin"),
    "ip_adapter": (".safetensors", ".bin", ".pth", ".pt"),
    "clip_vision": (".safetensors", ".bin", ".pth", ".pt"),
    "upscaler": (".pth", ".safetensors", ".pt"),
}
DEPTH = 4  # folders below a kind's own that are looked into; links can make a tree endless
MOST_FILES = 20_000  # of one kind
MOST_YAML = 1 << 20  # bytes


class ModelFoldersError(ValueError):
    """``$MAPLE_MODELS`` cannot be followed; one line that names the file and the reason."""

    exit_code = 3


Named = Sequence[tuple[str, Path]]  # names and files; of equal names the one that counts is first


def find(kind: str, name: str, among: Named | None = None) -> Path | None:
    """The file of a kind that goes by a name, or None.

    Args:
        kind: one of ``KINDS``.
        name: as ``list`` gives it, with or without the suffix and the folders above it; capital
            letters count only where two files differ in nothing else.
        among: what ``named`` gave for this kind; None looks at the disk now.

    Raises:
        ValueError: for another kind.
        ModelFoldersError: if the environment names a YAML file that cannot be used.
    """
    wanted = name.replace("\\", "/").strip()
    parts = PurePosixPath(wanted).parts
    if not parts or wanted.startswith("/") or ".." in parts or "\0" in wanted:
        return None
    found, suffix = named(kind) if among is None else among, PurePosixPath(wanted).suffix.lower()
    if suffix in SUFFIXES[kind]:
        wanted = wanted[: -len(suffix)]
        found = [(key, path) for key, path in found if path.suffix.lower() == suffix]
    lower = wanted.lower()
    fits: tuple[Callable[[str], bool], ...] = (
        lambda key: key == wanted,
        lambda key: key.rpartition("/")[2] == wanted,
        lambda key: lower in (key.lower(), key.rpartition("/")[2].lower()),
    )
    return next((path for fit in fits for key, path in found if fit(key)), None)


def list(kind: str, among: Named | None = None) -> dict[str, Path]:
    """Every file of a kind by its name: the path below its folder, "/" between, without a suffix.

    In order of name; where two files have one name, the first folder's and the first suffix's
    counts. Folders that are not there or may not be read hold nothing.

    Args:
        kind: one of ``KINDS``.
        among: what ``named`` gave for this kind; None looks at the disk now.

    Raises:
        ValueError: for a kind that there is not.
        ModelFoldersError: if the environment names a YAML file that cannot be used.
    """
    files = dict(reversed(named(kind) if among is None else among))
    return dict(sorted(files.items(), key=lambda pair: pair[0].lower()))


def folders(kind: str) -> tuple[Path, ...]:
    """The folders that hold files of a kind, the first one first; each is there, and once.

    Raises:
        ModelFoldersError: if the environment names a YAML file that cannot be used.
    """
    found: dict[tuple[int, int] | Path, Path] = {}
    for folder in _candidates(kind):
        try:
            if folder.is_dir():
                status = folder.stat()
                # By what it is: "VAE" and "vae" are one folder on most Macs. Windows has no inodes.
                key = (status.st_dev, status.st_ino) if status.st_ino else folder.resolve()
                found.setdefault(key, folder)
        except (OSError, ValueError):
            continue
    return tuple(found.values())


def named(kind: str) -> Named:
    """Names and files of a kind, as they are on the disk now; for ``find`` and ``list``.

    Raises:
        ValueError: for a kind that there is not.
        ModelFoldersError: if the environment names a YAML file that cannot be used.
    """
    if kind not in SUBFOLDERS:
        raise ValueError(f"[model_folders] kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    suffixes = SUFFIXES[kind]
    found: tuple[tuple[str, Path], ...] = ()
    for folder in folders(kind):
        files = [path for path in _files(folder) if path.suffix.lower() in suffixes]
        files.sort(key=lambda path: suffixes.index(path.suffix.lower()))  # keeps the order else
        found += tuple(
            (path.relative_to(folder).with_suffix("").as_posix(), path) for path in files
        )
    return found


def roots() -> Sequence[Path]:
    """What ``$MAPLE_MODELS`` names: folders and YAML files, whether they are there or not."""
    texts = os.environ.get(VARIABLE, "").split(os.pathsep)
    return tuple(_expanded(text.strip()) for text in texts if text.strip())


def _candidates(kind: str) -> Iterator[Path]:
    for root in roots():
        if root.suffix.lower() in (".yaml", ".yml"):
            yield from _in_yaml(root, kind)
            continue
        for above in (root, root / "models"):
            for name in SUBFOLDERS[kind]:
                yield above / name
        if (root / YAML_NAME).is_file():
            yield from _in_yaml(root / YAML_NAME, kind)


def _in_yaml(path: Path, kind: str) -> Iterator[Path]:
    """ComfyUI's file: sections of a base path and, for each kind, folders below it, one a line.

    Relative base paths begin at the file; a section with ``is_default`` goes first.
    """
    sections = [section for section in _read_yaml(path).values() if isinstance(section, dict)]
    sections.sort(key=lambda section: section.get("is_default") is not True)
    for section in sections:
        base = path.parent / _expanded(str(section.get("base_path") or "."))
        for key in SUBFOLDERS[kind]:
            lines = section.get(key)
            if isinstance(lines, str):
                yield from (
                    base / _expanded(line.strip()) for line in lines.split("\n") if line.strip()
                )


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_YAML + 1)
    except OSError as error:
        raise ModelFoldersError(f"{path}: {error.strerror or 'cannot be read'}") from error
    if len(raw) > MOST_YAML:
        raise ModelFoldersError(f"{path}: larger than {MOST_YAML >> 20} MiB")
    import yaml  # 20 ms, for those who have such a file

    try:
        found = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" at line {line + 1}"
        raise ModelFoldersError(f"{path}: not YAML{where}") from error
    if not isinstance(found, dict):
        raise ModelFoldersError(f"{path}: no sections of folders, as ComfyUI's {YAML_NAME} has")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, in the order of their names; hidden ones are left out."""
    count = 0
    for above, subfolders, names in os.walk(folder, followlinks=True):
        depth = len(Path(above).relative_to(folder).parts)
        subfolders[:] = (
            sorted(n for n in subfolders if not n.startswith(".")) if depth < DEPTH else []
        )
        for name in sorted(names):
            if not name.startswith("."):
                count += 1
                if count > MOST_FILES:
                    return
                yield Path(above, name)


def _expanded(text: str) -> Path:
    path = Path(os.path.expandvars(text))
    try:
        return path.expanduser()
    except RuntimeError:  # "~name" of nobody
        return path
