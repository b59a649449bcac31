"""Conversion: a model in any layout to a model in another, streamed, whole or not at all.

``convert`` plans the files of the output, every tensor with its name, shape and dtype, before it
writes the first byte; write.py does the writing. The source's digest is computed on the side.
"""

import errno
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from maple_convert import maple_folder, quantized
from maple_convert.detect import TEXT_ENCODERS
from maple_convert.errors import (
    ConvertError,
    InvalidCheckpoint,
    UnreadableFile,
    UnsupportedCheckpoint,
    one_line,
)
from maple_convert.layouts import LAYOUTS, NATIVE, diffusers_config, files
from maple_convert.layouts.diffusers_config import UNKNOWN
from maple_convert.layouts.parts import LINEAR, TRANSPOSED, Row
from maple_convert.model import WrongUse, open_model
from maple_convert.open_folder import KINDS, check_vocabulary
from maple_convert.quantized import Quantizer
from maple_convert.readers import read_json
from maple_convert.source import Component, Slot, SourceModel
from maple_convert.stream import Task
from maple_convert.tensors import STORAGE, TensorInfo
from maple_convert.write import Entry, copy_small, whole_or_nothing, write_json, write_safetensors

LAYOUT_NAMES = ("maple", "compvis", "diffusers")
Progress = Callable[[int, int, str], None]


# ---------------------------------------------------------------------------------------------
# Digest


class _Digest:
    """The sha256 of the source, computed beside the conversion.

    One file: its sha256. Several: the sha256 of the lines "<sha256>  <path in the folder>", as
    ``sha256sum`` prints them, in the order of the paths.
    """

    def __init__(self, model: SourceModel, wanted: bool) -> None:
        self._files = sorted(model.files) if wanted else []
        self._root = model.path
        self._stop = threading.Event()
        self._result: str | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="maple-digest", daemon=True)

    def __enter__(self) -> "_Digest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> str | None:
        """Wait for the digest; None where none was wanted."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            digests = [(file, self._of(file)) for file in self._files]
        except OSError as error:
            self._error = error
            return
        if len(digests) == 1:
            self._result = digests[0][1]
        elif digests:
            root = self._root if self._root.is_dir() else self._root.parent
            lines = [f"{value}  {file.relative_to(root).as_posix()}\n" for file, value in digests]
            self._result = hashlib.sha256("".join(lines).encode()).hexdigest()

    def _of(self, file: Path) -> str:
        digest, buffer = hashlib.sha256(), bytearray(1 << 20)
        with open(file, "rb", buffering=0) as opened:
            while not self._stop.is_set() and (n := opened.readinto(buffer)):
                digest.update(memoryview(buffer)[:n])
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Conversion


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        path: what was written.
        layout: maple, compvis or diffusers.
        bytes: size of the weight files.
        components: parameters of each component.
        dtype: type of the weights written; "mixed" where they differ.
        bits: that the weights are quantised to, or None.
        seconds: how long it took.
        notes: what had to be decided, one sentence each.
    """

    path: Path
    layout: str
    bytes: int
    components: dict[str, int]
    dtype: str
    seconds: float
    notes: list[str]
    bits: int | None = None


@dataclass(frozen=True)
class _File:
    """One weight file of the output."""

    name: str
    metadata: dict[str, str]
    entries: list[Entry]


def convert(
    source: Path | str,
    out: Path | str,
    *,
    to: str = "maple",
    dtype: str | None = None,
    ema: bool = False,
    variant: str | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
    digest: bool = True,
    quantizer: Quantizer | None = None,
) -> Report:
    """Write a model in another layout, dtype or both; whole or not at all.

    Args:
        source: anything that ``open_model`` takes.
        out: the folder to make, or the ``.safetensors`` file for ``to="compvis"``. It must not
            exist, but for an empty folder or a maple folder, which are replaced.
        to: "maple", "compvis" or "diffusers".
        dtype: float16, bfloat16 or float32; None keeps what is stored (float64 becomes float32).
        ema: take the EMA copy of the UNet's weights.
        variant: which files of a diffusers folder to read.
        config: see ``model.apply_overrides``.
        tokenizer: "vocab" and "merges" files for a diffusers folder whose source brings none.
        progress: called with bytes written, bytes in all, and what is being written.
        digest: compute the source's sha256 for the maple folder's config.
        quantizer: quantises the weights of a maple folder's text encoder and UNet.

    Raises:
        ConvertError: the source cannot be used, or the output not be written.
        WrongUse: arguments that do not exist or do not go together.
    """
    started = time.perf_counter()
    source, out = Path(source), Path(out)
    _check_arguments(out, to, dtype)
    if quantizer is not None and to != "maple":
        raise WrongUse(f"only a maple folder holds quantised weights, not --to {to}.")
    try:
        with open_model(source, variant=variant, ema=ema, config=config) as model:
            _check_places(model, out)
            if any(part.bits for part in model.components.values()):
                reason = "its weights are quantised: convert the model that it was made from"
                raise UnsupportedCheckpoint(source, reason)
            notes = list(model.notes)
            plan = _PLANS[to](model, dtype, notes)
            if quantizer is not None:
                plan = _quantized(plan, model, quantizer)
            total = sum(entry.info.nbytes for file in plan for entry in file.entries)
            done = written = 0
            with (
                whole_or_nothing(out, _is_maple_folder if to == "maple" else _never) as partial,
                _Digest(model, digest and to == "maple") as sha256,
            ):
                _check_space(out, total)
                for file in plan:
                    path = partial / file.name if file.name else partial
                    path.parent.mkdir(parents=True, exist_ok=True)

                    def wrote(size: int, label: str = file.name or out.name) -> None:
                        nonlocal done
                        done += size
                        if progress is not None:
                            progress(done, total, label)

                    written += write_safetensors(path, file.entries, file.metadata, wrote)
                # The small files last: without them a folder is nothing.
                if to == "maple":
                    _finish_maple(model, partial, dtype, sha256.result, quantizer)
                elif to == "diffusers":
                    _finish_diffusers(model, partial, tokenizer, notes)
            return Report(
                path=out,
                layout=to,
                bytes=written,
                components={name: part.parameters for name, part in model.components.items()},
                dtype=_dtype_of(model, dtype),
                seconds=time.perf_counter() - started,
                notes=notes,
                bits=None if quantizer is None else quantizer.bits,
            )
    except OSError as error:
        raise UnreadableFile(out, _why(error)) from error


def _check_arguments(out: Path, to: str, dtype: str | None) -> None:
    if to not in LAYOUT_NAMES:
        raise WrongUse(f"to must be one of {', '.join(LAYOUT_NAMES)}, got {to!r}.")
    if dtype is not None and dtype not in maple_folder.DTYPES:
        raise WrongUse(f"dtype must be one of {', '.join(maple_folder.DTYPES)}, got {dtype!r}.")
    if to == "compvis" and out.suffix != ".safetensors":
        raise WrongUse(
            f"CompVis files are written as .safetensors, which everything reads: "
            f"name it {one_line(out.with_suffix('.safetensors').name)}."
        )
    if to != "compvis" and out.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        raise WrongUse(f"--to {to} writes a folder, got {one_line(out.name)!r}.")


def _check_places(model: SourceModel, out: Path) -> None:
    """Refuse an output that would write into its own input or replace it."""
    source, target = model.path.resolve(), out.resolve()
    if source == target:
        raise UnreadableFile(out, "the output is the input")
    if source.is_dir() and source in target.parents:
        raise UnreadableFile(out, "the output lies inside the input")
    if target in source.parents and out.exists():
        raise UnreadableFile(out, "the input lies inside the output")


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise UnreadableFile(
            out, f"needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
        )


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing was written"
    if error.errno == errno.EFBIG:
        return "the file is larger than allowed here; nothing was written"
    return (error.strerror or str(error)).lower()


_COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae",
    "taesd",
    "controlnet",
    "t2i_adapter",
    "image_encoder",
    "ip_adapter",
)


def _is_maple_folder(path: Path) -> bool:
    """Whether ``path`` is a maple folder that holds nothing else, which replacing would delete."""
    try:
        config = read_json(path / maple_folder.CONFIG_NAME)
        if not maple_folder.is_maple(config):
            return False
        ours = {maple_folder.CONFIG_NAME, "tokenizer", "README.md", "NOTICE"}
        ours |= {f"{name}.safetensors" for name in _COMPONENTS}
        return {entry.name for entry in path.iterdir()} <= ours
    except (ConvertError, OSError):
        return False


def _never(_: Path) -> bool:
    return False


def _entries(component: Component, spelling: str, prefix: str, dtype: str | None) -> list[Entry]:
    """One component's tensors in one spelling, in the order in which the source holds them."""
    rows = {row.native: row for row in LAYOUTS[component.name].rows(component.config, spelling)}
    sharing: dict[str, list[tuple[Row, Slot]]] = {}
    for slot in component.slots:
        row = rows[slot.row.native]
        sharing.setdefault(row.published, []).append((row, slot))
    entries: list[Entry] = []
    for name, parts in sharing.items():
        parts.sort(key=lambda part: part[0].share)
        # Layers that share a tensor share a type: the widest that any of them is stored in.
        stored = max((slot.info.dtype for _, slot in parts), key=lambda d: STORAGE[d].itemsize)
        target = _target(stored, dtype)
        info = TensorInfo(target, parts[0][0].published_shape)
        entries.append(Entry(prefix + name, info, partial(_tasks, parts, target)))
    return entries


def _target(stored: str, dtype: str | None) -> str:
    # float64 is nothing that a network is run in, and MLX has none on a GPU.
    return dtype if dtype is not None else "float32" if stored == "float64" else stored


def _tasks(parts: list[tuple[Row, Slot]], dtype: str) -> Iterator[Task]:
    # Views both ways: where source and target are laid out alike nothing is moved.
    for row, slot in parts:
        to_published = row.weights.to_published
        if row.weights is TRANSPOSED:
            yield lambda slot=slot, to=to_published: to(slot.read(dtype).array)
            continue
        for task in slot.tasks(dtype):
            yield lambda task=task, to=to_published: to(task())


def _dtype_of(model: SourceModel, dtype: str | None) -> str:
    parts = model.components.values()
    dtypes = {_target(slot.info.dtype, dtype) for part in parts for slot in part.slots}
    return dtypes.pop() if len(dtypes) == 1 else maple_folder.MIXED


def _converter() -> str:
    try:
        return f"mlx-maple {metadata.version('mlx-maple')}"
    except metadata.PackageNotFoundError:
        return "mlx-maple"


# -- maple ------------------------------------------------------------------------------------


def _plan_maple(model: SourceModel, dtype: str | None, notes: list[str]) -> list[_File]:
    return [
        _File(
            f"{name}.safetensors",
            {"format": "mlx", "component": name},
            _entries(part, NATIVE, "", dtype),
        )
        for name, part in model.components.items()
    ]


def _quantized(plan: list[_File], model: SourceModel, quantizer: Quantizer) -> list[_File]:
    """The files of a maple folder with the weights quantised that the format wants so."""
    return [
        replace(file, entries=_quantized_entries(model.components[name], file.entries, quantizer))
        if (name := file.metadata["component"]) in quantized.COMPONENTS
        else file
        for file in plan
    ]


def _quantized_entries(
    component: Component, entries: list[Entry], quantizer: Quantizer
) -> list[Entry]:
    found: list[Entry] = []
    for slot, entry in zip(component.slots, entries, strict=True):
        if quantized.group_size(slot.row) is None:
            found.append(entry)
            continue
        stored = quantized.narrower(slot.info.dtype, entry.info.dtype)
        read = partial(slot.blocks, stored)
        row = replace(slot.row, published=slot.row.native)
        target = entry.info.dtype
        found += quantized.quantized_entries(row, stored, target, read, quantizer)
    return found


def _finish_maple(
    model: SourceModel,
    folder: Path,
    dtype: str | None,
    sha256: Callable[[], str | None],
    quantizer: Quantizer | None,
) -> None:
    for name, path in model.tokenizer_files.items():
        copy_small(path, folder / maple_folder.TOKENIZER_FILES[name])
    stored = model.alphas_cumprod
    config = {
        "format": maple_folder.FORMAT,
        "format_version": maple_folder.FORMAT_VERSION,
        "family": model.family,
        "components": {name: part.config for name, part in model.components.items()},
        "prediction": model.prediction,
        "scheduler": model.scheduler,
        **({} if stored is None else {"alphas_cumprod": [float(a) for a in stored]}),
        "defaults": model.defaults,
        "latent_rgb_factors": model.latent_rgb_factors,
        "tokenizer": "tokenizer/" if model.tokenizer_files else None,
        "source": model.source or {"file": model.path.absolute().name, "sha256": sha256()},
        "converter": _converter(),
        "dtype": _dtype_of(model, dtype),
        "quantization": _quantization(model, quantizer),
    }
    maple_folder.check_config(folder / maple_folder.CONFIG_NAME, config)
    write_json(folder / maple_folder.CONFIG_NAME, config)


def _quantization(model: SourceModel, quantizer: Quantizer | None) -> dict[str, Any] | None:
    names = [name for name in quantized.COMPONENTS if name in model.components]
    if quantizer is None or not names:
        return None
    return {"bits": quantizer.bits, "components": names}


# -- CompVis ----------------------------------------------------------------------------------

_COMPVIS = {
    "unet": ("compvis", "model.diffusion_model."),
    "vae": ("compvis", "first_stage_model."),
    "text_encoder": ("transformers", "cond_stage_model.transformer."),
    "taesd": ("upstream", ""),
    "controlnet": ("compvis", "control_model."),
    "t2i_adapter": ("compvis", ""),
    "image_encoder": ("transformers", ""),
    "ip_adapter": ("original", ""),
}
# Where a family's files hold its text encoders, where that is not where SD 1.x's do.
_COMPVIS_TEXT = {
    "sd2": {"text_encoder": ("openclip", "cond_stage_model.model.")},
    "sdxl": {
        "text_encoder": ("transformers", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("openclip", "conditioner.embedders.1.model."),
    },
    "sdxl-refiner": {"text_encoder_2": ("openclip", "conditioner.embedders.0.model.")},
}


def _compvis_place(model: SourceModel, name: str) -> tuple[str, str]:
    """The spelling and the prefix of one component in a CompVis file of a model's family."""
    family = model.family
    of_family = _COMPVIS_TEXT.get(family, _COMPVIS_TEXT.get(family.partition("-")[0], {}))
    spelling, prefix = of_family.get(name) or _COMPVIS[name]
    if model.components[name].has_linear_doors:
        spelling += LINEAR
    return spelling, prefix


def _plan_compvis(model: SourceModel, dtype: str | None, notes: list[str]) -> list[_File]:
    entries: list[Entry] = []
    for name, part in model.components.items():
        spelling, prefix = _compvis_place(model, name)
        entries += _entries(part, spelling, prefix, dtype)
    if model.alphas_cumprod is not None:
        entries.append(_constant(files.ALPHAS, model.alphas_cumprod.astype(np.float32)))
    if model.prediction == "v_prediction":
        entries.append(_constant(files.V_PREDICTION_MARK, np.zeros(0, np.float32)))
    if model.scheduler["rescale_zero_terminal_snr"] and model.alphas_cumprod is None:
        entries.append(_constant(files.ZERO_SNR_MARK, np.zeros(0, np.float32)))
    if model.tokenizer_files:
        notes.append("A CompVis file has no place for a vocabulary: the model's own is left out.")
    for name, part in model.components.items():
        if (groups := part.config.get("norm_num_groups", 32)) != 32:
            notes.append(f"A CompVis file has no place for the {name}'s {groups} groups: not 32.")
    for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps"):
        if model.scheduler[key] != diffusers_config.SD1_SCHEDULER[key]:
            notes.append(f"A CompVis file has no place for {key} {model.scheduler[key]}.")
    return [_File("", {"format": "pt"}, entries)]


def _constant(name: str, array: np.ndarray[Any, np.dtype[np.float32]]) -> Entry:
    return Entry(name, TensorInfo("float32", array.shape), lambda: [lambda: array])


# -- diffusers --------------------------------------------------------------------------------

_DIFFUSERS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "taesd": ("diffusers", "AutoencoderTiny"),
    "controlnet": ("diffusers", "ControlNetModel"),
    "t2i_adapter": ("diffusers", "T2IAdapter"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


def _plan_diffusers(model: SourceModel, dtype: str | None, notes: list[str]) -> list[_File]:
    plan: list[_File] = []
    for name, part in model.components.items():
        if name not in _DIFFUSERS:
            title = LAYOUTS[name].title
            raise WrongUse(f"diffusers has no folder for an {title}: convert it --to maple.")
        spelling, kind = _DIFFUSERS[name]
        if part.has_linear_doors:
            spelling += LINEAR
        folder = "" if len(model.components) == 1 else f"{name}/"
        path = f"{folder}{KINDS[kind].stem}.safetensors"
        plan.append(_File(path, {"format": "pt"}, _entries(part, spelling, "", dtype)))
    return plan


def _finish_diffusers(
    model: SourceModel, folder: Path, tokenizer: Mapping[str, Path] | None, notes: list[str]
) -> None:
    size = max(model.defaults["width"], model.defaults["height"])
    alone = len(model.components) == 1
    second = model.components.get("text_encoder_2")
    for name, part in model.components.items():
        written = diffusers_config.write(
            name,
            part.config,
            size,
            family=model.family,
            is_linear=part.has_linear_doors,
            pooled=None if second is None else second.config["projection_dim"],
        )
        write_json((folder if alone else folder / name) / "config.json", written)
    if alone:
        return
    betas = None
    if model.alphas_cumprod is not None:
        betas = _betas_unless_usual(model)
    if model.prediction == UNKNOWN:
        notes.append(
            "The file does not say what the UNet predicts: the folder says epsilon. "
            "If that is wrong, convert with --prediction v_prediction."
        )
    scheduler = diffusers_config.write_scheduler(model.scheduler, model.prediction)
    if betas is not None:
        scheduler["trained_betas"] = betas
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    vocabulary = model.tokenizer_files or tokenizer
    if vocabulary and not _fits(model, vocabulary["vocab"]):
        notes.append("CLIP's vocabulary has more tokens than the text encoder: it was left out.")
        vocabulary = None
    if vocabulary:
        for name in TEXT_ENCODERS:
            if name in model.components:
                target = folder / name.replace("text_encoder", "tokenizer")
                copy_small(vocabulary["vocab"], target / "vocab.json")
                copy_small(vocabulary["merges"], target / "merges.txt")
                settings = _tokenizer_config(model, name, vocabulary["vocab"])
                write_json(target / "tokenizer_config.json", settings)
    else:
        notes.append("No tokenizer was written: the source has no vocab.json and merges.txt.")
    write_json(folder / "model_index.json", _model_index(model, bool(vocabulary)))


def _fits(model: SourceModel, vocabulary: Path) -> bool:
    try:
        check_vocabulary(model, vocabulary)
    except InvalidCheckpoint:
        return False
    return True


_TOKENIZER_CONFIG = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "model_max_length": 77,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
}


def _tokenizer_config(model: SourceModel, encoder: str, vocabulary: Path) -> dict[str, Any]:
    pad = model.components[encoder].config.get("pad_token_id")
    if pad is None:
        return _TOKENIZER_CONFIG
    word = next((word for word, number in read_json(vocabulary).items() if number == pad), "!")
    return {**_TOKENIZER_CONFIG, "pad_token": word}


def _model_index(model: SourceModel, tokenizer: bool) -> dict[str, Any]:
    is_xl, is_refiner = model.family.startswith("sdxl"), model.family == "sdxl-refiner"
    kind = "StableDiffusionPipeline"
    if is_xl:
        kind = "StableDiffusionXLImg2ImgPipeline" if is_refiner else "StableDiffusionXLPipeline"
    index: dict[str, Any] = {
        "_class_name": kind,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if is_xl:
        index["force_zeros_for_empty_prompt"] = not is_refiner
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    if is_refiner:
        index["requires_aesthetics_score"] = True
    for name in TEXT_ENCODERS if is_xl else TEXT_ENCODERS[:1]:
        words = name.replace("text_encoder", "tokenizer")
        is_there = name in model.components
        has_words = tokenizer and (is_there or not is_xl)
        index[words] = ["transformers", "CLIPTokenizer"] if has_words else [None, None]
        index[name] = [None, None]
    for name in model.components:
        library = "transformers" if name in TEXT_ENCODERS else "diffusers"
        index[name] = [library, _DIFFUSERS[name][1]]
    return index


def _betas_unless_usual(model: SourceModel) -> list[float] | None:
    """A stored noise schedule as betas, or None where the scheduler's own settings give it."""
    assert model.alphas_cumprod is not None
    stored = model.alphas_cumprod.astype(np.float64)
    usual = diffusers_config.alphas_cumprod(model.scheduler)
    if usual is not None and usual.size == stored.size and np.allclose(stored, usual, rtol=1e-4):
        return None
    before = np.concatenate([[1.0], stored[:-1]])
    return [float(beta) for beta in 1 - stored / np.maximum(before, np.finfo(np.float64).tiny)]


_PLANS = {"maple": _plan_maple, "compvis": _plan_compvis, "diffusers": _plan_diffusers}
