"""Models on the Hugging Face hub: which files of a repository are needed, and their download.

Only the files that drawing needs are fetched, into huggingface_hub's own cache, which other
programs share. ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and the rest mean
what they mean there. Weights are fetched so that a run that was cut off goes on where it stopped
(huggingface_hub 2 starts a file again), and compared with the hub's sha256 before they are used.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what

CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
RESUMED_FROM = 8 << 20  # smaller files are not worth a partial file
TRIES_IN_VAIN = 2  # at a broken connection, after each 2, 4, … seconds

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]*\w)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?"
)
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<variant>\.\w+)?\.(?:safetensors|bin)")


class HubError(Exception):
    """A model could not be had from the hub; one line with what to do next."""

    exit_code = 1


@dataclass(frozen=True)
class HubName:
    """``owner/name``, ``owner/name@revision``, ``owner/name:file`` or both."""

    repo: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.repo + revision + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Choice:
    """The files of a repository that are needed.

    Attributes:
        files: their names in the repository.
        single: the one weights file when the repository is used as a file, else None.
        variant: the variant of the weights ("fp16") when a folder is used, else None.
    """

    files: tuple[str, ...]
    single: str | None = None
    variant: str | None = None


def parse_name(text: str) -> HubName | None:
    """The hub name that ``text`` spells, or None where it reads as a path.

    A text that ends as a checkpoint file does ("models/some.ckpt") is a path, missing or not.
    """
    match = _NAME.fullmatch(text)
    if match is None or (match["file"] is None and text.lower().endswith(CHECKPOINTS)):
        return None
    if match["file"] and ".." in PurePosixPath(match["file"]).parts:
        return None
    return HubName(match["repo"], match["revision"] or "main", match["file"])


def choose(name: HubName, files: Collection[str], dtype: str, variant: str | None = None) -> Choice:
    """The files of ``name`` to use among all of the repository's, for a run in ``dtype``.

    Of a component's weights exactly one form is taken: safetensors before torch files, and the
    16-bit variant where the run is 16-bit, the full one where it is not; ``variant`` before all.

    Raises:
        HubError: when the repository holds no model, not all of one, or several checkpoint files.
    """
    present = set(files)
    if name.file is not None:
        if name.file not in present:
            raise HubError(f"{name}: the repository has no such file; {_some_weights(present)}")
        return Choice((name.file, *_shards(name.file, present)), single=name.file)
    if "model_index.json" in present:
        return _choose_diffusers(name, present, dtype, variant)
    if "config.json" in present and "unet.safetensors" in present:  # a maple folder
        return Choice(tuple(sorted(f for f in present if _in_maple_folder(f))))
    if "config.json" in present:  # one component by itself, such as a VAE
        if weights := _best_weights(present, "", dtype, variant):
            return Choice(("config.json", *weights[0]), variant=weights[1])
    single = sorted(f for f in present if "/" not in f and f.lower().endswith(CHECKPOINTS))
    # A quantised copy is taken only where there is nothing else, or where it is named.
    single = [f for f in single if not f.lower().endswith(".gguf")] or single
    if len(single) == 1:
        return Choice((single[0],), single=single[0])
    if single:
        raise HubError(
            f"{name}: the repository holds several checkpoints; {_some_weights(present)}"
        )
    raise HubError(
        f"{name}: no Stable Diffusion model there (no model_index.json and no checkpoint file)"
    )


def fetch(
    name: HubName,
    *,
    dtype: str = "float16",
    variant: str | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Choice, list[str]]:
    """Bring the files that ``name`` needs into the hub's cache.

    Args:
        name: what to fetch.
        dtype: the run's dtype, which decides between variants.
        variant: the one to take where there is a choice.
        local_files_only: use what the cache holds; no network.
        progress: called with bytes done, bytes in all and the file's name.

    Returns:
        The path to open (a snapshot folder, or the one file), what was chosen, and notes.

    Raises:
        HubError: with what to do.
    """
    from huggingface_hub import constants

    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the network is not allowed"
        return *_from_cache(name, dtype, variant, f"{why}: allow it once to download"), []
    with _quiet_hub():
        try:
            return *_download(name, dtype, variant, progress), []
        except HubError:
            raise
        except Exception as error:
            reason = _explain(error, name)
            if reason is None:
                raise
            failure = HubError(f"{name}: {reason}")
            if not _is_connection(error):
                raise failure from error
            try:  # no connection, but all that is needed may be here
                path, choice = _from_cache(name, dtype, variant, reason)
            except HubError:
                raise failure from error
            return path, choice, [f"{name}: {reason}; used the copy in the cache"]


def _choose_diffusers(name: HubName, present: set[str], dtype: str, variant: str | None) -> Choice:
    files = ["model_index.json"]
    variants: list[str] = []
    for component in _components(present):
        weights = _best_weights(present, f"{component}/", dtype, variant)
        config = f"{component}/config.json"
        if weights is None or config not in present:
            what = "weights that can be read" if weights is None else "config.json"
            raise HubError(f"{name}: the repository has no {what} in {component}/")
        files += [config, *weights[0]]
        if weights[1]:
            variants.append(weights[1])
    small = ["scheduler/scheduler_config.json"]
    small += [f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in _TOKENIZER]
    files += [f for f in small if f in present]
    return Choice(tuple(files), variant=variants[0] if variants else None)


_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def _components(present: set[str]) -> list[str]:
    """A diffusers repository's networks: SDXL has two text encoders, its refiner the second."""
    encoders = [
        part
        for part in ("text_encoder", "text_encoder_2")
        if any(file.startswith(f"{part}/") for file in present)
    ]
    return [*(encoders or ["text_encoder"]), "unet", "vae"]


def _best_weights(
    present: set[str], folder: str, dtype: str, wanted: str | None
) -> tuple[tuple[str, ...], str | None] | None:
    """The weights of one component in the form that suits best, and their variant."""
    half = {"float16": ("fp16", None, "bf16"), "bfloat16": ("bf16", "fp16", None)}
    variants = half.get(dtype, (None, "fp16", "bf16"))
    if dtype == "float32":  # a full torch file holds more than a 16-bit safetensors file
        order = [(v, e) for v in variants for e in ("safetensors", "bin")]
    else:
        order = [(v, e) for e in ("safetensors", "bin") for v in variants]
    if wanted is not None:
        order = [(wanted, "safetensors"), (wanted, "bin"), *order]
    for variant, ending in order:
        dotted = f".{variant}" if variant else ""
        for stem in ("model", "diffusion_pytorch_model", "pytorch_model"):
            whole = f"{folder}{stem}{dotted}.{ending}"
            if whole in present:
                return (whole,), variant
            for index in (
                f"{stem}.{ending}.index{dotted}.json",
                f"{stem}{dotted}.{ending}.index.json",
            ):
                if (index := folder + index) in present and (shards := _shards(index, present)):
                    return (index, *shards), variant
    return None


def _shards(index: str, present: set[str]) -> tuple[str, ...]:
    """The shards that lie beside ``index``, for a name such as model.safetensors.index.json."""
    stem, dot, rest = PurePosixPath(index).name.partition(".")
    if not dot or ".index" not in "." + rest or not rest.endswith("json"):
        return ()
    parent = str(PurePosixPath(index).parent)
    variant = next((v for v in ("fp16", "bf16") if f".{v}." in f".{rest}"), None)
    shards = []
    for file in present:
        match = _SHARD.fullmatch(PurePosixPath(file).name)
        if match and str(PurePosixPath(file).parent) == parent:
            spelled = match["stem"] + (match["variant"] or "")
            if spelled == (f"{stem}.{variant}" if variant else stem):
                shards.append(file)
    return tuple(sorted(shards))


def _in_maple_folder(file: str) -> bool:
    path = PurePosixPath(file)
    top = len(path.parts) == 1 and (path.suffix == ".safetensors" or file == "config.json")
    return top or file in ("tokenizer/vocab.json", "tokenizer/merges.txt")


def _some_weights(present: set[str], count: int = 5) -> str:
    found = sorted(f for f in present if f.lower().endswith(CHECKPOINTS))
    if not found:
        return "it has no weights"
    more = f", … ({len(found) - count} more)" if len(found) > count else ""
    return (
        f"name one as owner/name:file: {', '.join(found[:count])}{more}" if found else "no weights"
    )


def cache_folder() -> Path:
    """Where downloads are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_of(name: HubName) -> Path:
    """The folder of one repository in the hub's cache, whose layout is published."""
    return cache_folder() / ("models--" + name.repo.replace("/", "--"))


def _cached_commit(name: HubName) -> str | None:
    try:
        return (folder_of(name) / "refs" / name.revision).read_text().strip()
    except OSError:
        is_commit = re.fullmatch(r"[0-9a-f]{40}", name.revision)
        return name.revision if is_commit else None


def _from_cache(name: HubName, dtype: str, variant: str | None, why: str) -> tuple[Path, Choice]:
    commit = _cached_commit(name)
    folder = folder_of(name) / "snapshots" / (commit or "absent")
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()  # a link to a blob that is gone is not
    }
    try:
        choice = choose(name, files, dtype, variant)
    except HubError:
        state = "not complete in" if files else "not in"
        raise HubError(f"{name}: {state} the hub's cache, and {why}") from None
    return folder / choice.single if choice.single else folder, choice


def _download(
    name: HubName, dtype: str, variant: str | None, progress: Progress | None
) -> tuple[Path, Choice]:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    choice = choose(name, sizes, dtype, variant)
    commit = info.sha or name.revision
    snapshot = folder_of(name) / "snapshots" / commit
    missing = [file for file in choice.files if not (snapshot / file).exists()]
    total, done = sum(sizes[file] for file in missing), 0
    for file in missing:

        def report(count: int, file: str = file, before: int = done) -> None:
            if progress is not None:
                progress(before + count, total, f"downloading {file}")

        report(0)
        if sizes[file] >= RESUMED_FROM:
            _fetch_blob(name, commit, file, report)
        hf_hub_download(name.repo, file, revision=commit)
        done += sizes[file]
    if progress is not None and missing:
        progress(total, total, f"downloading {name}")
    if _cached_commit(name) != commit:  # so that the name is found again without a network
        hf_hub_download(name.repo, choice.files[0], revision=name.revision)
    return snapshot / choice.single if choice.single else snapshot, choice


def _fetch_blob(name: HubName, commit: str, file: str, report: Callable[[int], None]) -> None:
    """Download one large file to the place of its content in the hub's cache, going on if begun.

    The partial file has the name, and the lock the place, that huggingface_hub before 2 used.
    """
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(name.repo, file, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or metadata.size is None or not re.fullmatch(r"\w+", metadata.etag):
        return  # not as the hub describes its large files: left to hf_hub_download
    headers = build_hf_headers()
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        # The content lies on another host, whose signed address needs no token and must not see it.
        url = metadata.location
        headers.pop("authorization", None)

    repo = folder_of(name)
    blob = repo / "blobs" / metadata.etag
    partial = blob.with_name(f"{metadata.etag}.incomplete")
    lock = repo.parent / ".locks" / repo.name / f"{metadata.etag}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(lock)):
        if blob.exists():
            return
        _fetch_bytes(url, headers, partial, metadata.size, report)
        _verify(name, partial, metadata.etag, file)
        os.replace(partial, blob)


def _fetch_bytes(
    url: str, headers: dict[str, str], partial: Path, size: int, report: Callable[[int], None]
) -> None:
    """Bring ``partial`` to its full ``size``, trying again for as long as bytes arrive."""
    from huggingface_hub.file_download import http_get

    in_vain = 0
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        if start > size:
            partial.unlink()
            continue
        try:
            with open(partial, "ab") as handle:
                target: Any = _Counted(handle, report)
                http_get(url, target, resume_size=start, headers=headers, expected_size=size)
            return
        except Exception as error:
            in_vain = 0 if partial.stat().st_size > start else in_vain + 1
            if in_vain > TRIES_IN_VAIN or not _is_connection(error):
                raise
            time.sleep(2**in_vain)


class _Counted:
    """A file that reports how far it has been written."""

    def __init__(self, handle: IO[bytes], report: Callable[[int], None]) -> None:
        self.handle = handle
        self.report = report

    def write(self, data: bytes) -> int:
        count = self.handle.write(data)
        self.report(self.handle.tell())
        return count

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.handle, attribute)


def _verify(name: HubName, path: Path, etag: str, file: str) -> None:
    if len(etag) != 64:  # only large files are named by their sha256
        return
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != etag:
        path.unlink(missing_ok=True)
        raise HubError(
            f"{name}: {file} arrived damaged (its sha256 is not the hub's); run the command again"
        )


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No bars and warnings of huggingface_hub: there is ``progress``, and errors are raised."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, enabled = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if enabled:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            enable_progress_bars()


def _explain(error: Exception, name: HubName) -> str | None:
    """What a fault of the hub, the network or the disk means to a person; None for any other."""
    from huggingface_hub import constants, errors

    log_in = "log in (hf auth login) or set HF_TOKEN"
    page = f"{constants.ENDPOINT}/{name.repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"access is gated: accept the terms at {page}, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such repository, or it is private: check the name, or {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {name.revision}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return "the hub lists a file that it does not have; try again later"
    if isinstance(error, errors.HFValidationError):
        return "not a name that a hub repository can have"
    again = "run the same command again, it goes on where it stopped"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}): {log_in}"
    if status is not None:
        return f"the hub answers with HTTP {status}: {again}"
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        return f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}"
    if _is_connection(error):
        detail = " ".join(str(error).split())[:160] or type(error).__name__
        return f"{constants.ENDPOINT} cannot be reached or broke off ({detail}): {again}"
    return None


def _is_connection(error: Exception) -> bool:
    """Whether the network or the server failed, rather than the request, the disk or we."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, errors.LocalEntryNotFoundError):  # a HEAD request found no network
        return True
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        return False
    origins = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(origins & {"httpx", "httpx2", "requests"})
