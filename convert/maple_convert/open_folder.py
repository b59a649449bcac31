"""A folder as a model: diffusers (a whole model or one component), or our own.

diffusers   model_index.json names the components; each has a folder with config.json and weights.
component   config.json and weights at top level, as in a repository of one autoencoder.
maple       config.json with ``"format": "mlx-maple"``, see maple_folder.py and docs/format.md.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from maple_convert import detect, maple_folder, quantized
from maple_convert.detect import Section
from maple_convert.errors import InvalidCheckpoint, UnreadableFile, UnsupportedCheckpoint, one_line
from maple_convert.layouts import LAYOUTS, NATIVE, View, diffusers_config
from maple_convert.layouts.diffusers_config import UNKNOWN
from maple_convert.layouts.parts import LINEAR
from maple_convert.readers import open_checkpoint, read_json
from maple_convert.source import Component, Slot, SourceModel, files_of, in_file_order, match
from maple_convert.tensors import Checkpoint

Config = Mapping[str, Any]


class _Kind:
    """One class of diffusers: which component it is, its weights' stem, how to read its config."""

    def __init__(
        self, component: str, stem: str, complete: Callable[[Path, Config, Config], dict[str, Any]]
    ) -> None:
        self.component = component
        self.stem = stem
        self.complete = complete


_DIFFUSERS_STEM, _TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
KINDS = {
    "UNet2DConditionModel": _Kind("unet", _DIFFUSERS_STEM, diffusers_config.unet),
    "AutoencoderKL": _Kind("vae", _DIFFUSERS_STEM, diffusers_config.vae),
    "AutoencoderTiny": _Kind("taesd", _DIFFUSERS_STEM, diffusers_config.taesd),
    "T2IAdapter": _Kind("t2i_adapter", _DIFFUSERS_STEM, diffusers_config.t2i_adapter),
    "ControlNetModel": _Kind("controlnet", _DIFFUSERS_STEM, diffusers_config.controlnet),
    "CLIPVisionModelWithProjection": _Kind(
        "image_encoder", _TRANSFORMERS_STEM, diffusers_config.image_encoder
    ),
    "CLIPTextModel": _Kind("text_encoder", _TRANSFORMERS_STEM, diffusers_config.text_encoder),
    "CLIPTextModelWithProjection": _Kind(
        "text_encoder", _TRANSFORMERS_STEM, diffusers_config.text_encoder
    ),
}
# Parts of a pipeline that hold no weights used here.
_WITHOUT_WEIGHTS = frozenset(
    {
        "depth_estimator",  # a depth map is given instead
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    }
)
_PLAIN_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",  # of SDXL's refiner
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "LatentConsistencyModelPipeline",
)
_TOKENIZER = {"vocab": "vocab.json", "merges": "merges.txt"}


def open_folder(path: Path, stack: ExitStack, variant: str | None, ema: bool) -> SourceModel:
    """Open a folder of any known kind."""
    if ema:
        raise UnsupportedCheckpoint(path, "a folder holds no EMA copy; only .ckpt files do")
    index, config = path / "model_index.json", path / maple_folder.CONFIG_NAME
    if index.is_file():
        return _open_diffusers(path, stack, variant)
    if not config.is_file():
        names = ", ".join(sorted(one_line(p.name, 40) for p in path.iterdir())[:4]) or "nothing"
        raise UnsupportedCheckpoint(
            path, f"a folder with neither model_index.json nor config.json (it holds {names})"
        )
    settings = _read_object(config)
    if maple_folder.is_maple(settings):
        if variant is not None:
            raise UnsupportedCheckpoint(path, "a maple folder has no variants")
        return _open_maple(path, stack, settings)
    return _open_component(path, stack, variant, settings)


# ---------------------------------------------------------------------------------------------
# diffusers


def _open_diffusers(path: Path, stack: ExitStack, variant: str | None) -> SourceModel:
    index = _read_object(path / "model_index.json")
    pipeline = index.get("_class_name")
    named: dict[str, str] = {}
    for name, entry in index.items():
        if name.startswith("_") or name in _WITHOUT_WEIGHTS or not isinstance(entry, list):
            continue
        pair = cast("list[object]", entry)
        if pair == [None, None]:
            continue  # this pipeline could have one and has none
        if len(pair) != 2 or not isinstance(pair[1], str) or not _plain_name(name):
            raise InvalidCheckpoint(
                path / "model_index.json", f"{one_line(name, 40)} is {one_line(repr(pair), 80)}"
            )
        named[name] = pair[1]
    model = _empty(path, "diffusers folder")
    sections: list[tuple[Section, Checkpoint, Config, Path]] = []
    unknown: list[str] = []
    for name, kind in named.items():
        folder = path / name
        if kind not in KINDS or KINDS[kind].component != name.removesuffix("_2"):
            unknown.append(f"{name} ({one_line(kind, 40)})")
            continue
        if not folder.is_dir():
            raise InvalidCheckpoint(path, f"model_index.json names {name}, which has no folder")
        part = _open_part(model, folder, kind, stack, variant)
        sections.append((replace(part[0], component=name), *part[1:]))
    _require_variant(model, variant)
    facts = detect.gather(path, [part[0] for part in sections])
    facts.lines.insert(0, f"model_index.json names {one_line(repr(pipeline), 60)}")
    facts.others += unknown
    model.family, model.title = detect.identify(facts)
    model.evidence = facts.lines
    if pipeline not in _PLAIN_PIPELINES:
        model.notes.append(
            f"The folder is of {one_line(repr(pipeline), 60)}; it is used as a plain model."
        )
    _plan_parts(model, sections)
    _read_scheduler(model, path / "scheduler" / "scheduler_config.json")
    words = path / "tokenizer"
    _find_tokenizer(model, words if words.is_dir() else path / "tokenizer_2")
    for name in detect.TEXT_ENCODERS:
        if name in model.components:
            _read_padding(model, name, path / name.replace("text_encoder", "tokenizer"))
    return model


def _open_component(
    path: Path, stack: ExitStack, variant: str | None, config: Config
) -> SourceModel:
    kind = config.get("_class_name")
    if kind is None and isinstance(names := config.get("architectures"), list) and names:
        kind = cast("list[object]", names)[0]
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedCheckpoint(
            path / "config.json",
            f"is of {one_line(repr(kind), 60)}; known are {', '.join(KINDS)}",
        )
    model = _empty(path, "diffusers folder of one component")
    part = _open_part(model, path, kind, stack, variant)
    _require_variant(model, variant)
    facts = detect.gather(path, [part[0]])
    facts.lines.insert(0, f"config.json names {kind}")
    model.family, model.title = detect.identify(facts)
    model.evidence = facts.lines
    _plan_parts(model, [part])
    return model


def _empty(path: Path, container: str) -> SourceModel:
    return SourceModel(path, container, "", "", "diffusers", [], {})


def _open_part(
    model: SourceModel, folder: Path, kind: str, stack: ExitStack, variant: str | None
) -> tuple[Section, Checkpoint, Config, Path]:
    """Open one component's weights and find its spelling."""
    known = KINDS[kind]
    weights = find_weights(folder, known.stem, variant, model.notes)
    checkpoint = stack.enter_context(open_checkpoint(weights))
    model.files += files_of(weights)
    model.notes += checkpoint.notes
    settings = _read_object(folder / "config.json")
    shown = "" if folder == model.path else f"{folder.name}/"
    everything = View(weights, checkpoint.tensors, folder=shown)
    detect.refuse_others(everything)
    sections = detect.find_sections(everything)
    if [section.component for section in sections] != [known.component]:
        found = " and ".join(section.component for section in sections) or "none of that"
        raise InvalidCheckpoint(weights, f"should hold a {kind} and holds {found}")
    return sections[0], checkpoint, settings, folder


def _plan_parts(model: SourceModel, parts: list[tuple[Section, Checkpoint, Config, Path]]) -> None:
    """Complete every architecture by its config and match it against its file."""
    for section, checkpoint, settings, folder in parts:
        name = section.component
        found = LAYOUTS[name].infer(section.view, section.spelling)
        kind = next(k for k in KINDS.values() if k.component == name.removesuffix("_2"))
        config = kind.complete(folder / "config.json", settings, found)
        if name in ("unet", "controlnet"):
            diffusers_config.check_doors(folder / "config.json", settings, section.spelling)
        # SD 1.x's and 2.x's do not overflow in half precision, whatever their configs say.
        if name == "vae":
            is_sdxls = model.family.startswith("sdxl")
            is_sdxls |= config["scaling_factor"] == diffusers_config.SDXL_SCALING_FACTOR
            if is_sdxls and settings.get("force_upcast", True):
                config["force_upcast"] = True
        maple_folder.check_component(folder / "config.json", name, config)
        slots = [
            Slot(row, checkpoint, section.view.key(row.published))
            for row in LAYOUTS[name].rows(config, section.spelling)
        ]
        dropped = match(checkpoint.path, checkpoint.tensors, slots)
        slots = in_file_order(slots, checkpoint.tensors)
        is_linear = section.spelling.endswith(LINEAR)
        model.components[name] = Component(name, config, slots, dropped, has_linear_doors=is_linear)
        model.dropped |= {f"{name}/{key}": why for key, why in dropped.items()}
        if name == "unet":
            _native_size(model, settings.get("sample_size"))


def _native_size(model: SourceModel, size: object) -> None:
    """The size that the folder says the model was trained at, in latents."""
    pair = cast("list[object]", size if isinstance(size, list) else [size, size])
    if len(pair) == 2 and all(isinstance(n, int) and 1 <= n <= 1024 for n in pair):
        height, width = cast("list[int]", pair)
        model.defaults |= {"width": 8 * width, "height": 8 * height}
    elif size is not None:
        raise InvalidCheckpoint(
            model.path / "unet" / "config.json", f"sample_size is {one_line(repr(pair), 60)}"
        )


def find_weights(folder: Path, stem: str, variant: str | None, notes: list[str]) -> Path:
    """The file with a component's weights: safetensors before pickles, whole before shards.

    Raises:
        UnsupportedCheckpoint: if there is none, or only variants among which to choose.
    """
    pickled = "pytorch_model" if stem == _TRANSFORMERS_STEM else stem
    forms = [
        (f"{stem}", ".safetensors"),
        (f"{stem}.safetensors.index", ".json"),
        (f"{pickled}", ".bin"),
        (f"{pickled}.bin.index", ".json"),
    ]

    def existing(middle: str) -> Path | None:
        paths = (folder / f"{name}{middle}{suffix}" for name, suffix in forms)
        return next((path for path in paths if path.is_file()), None)

    if variant is not None:
        if not _plain_name(variant):
            raise UnsupportedCheckpoint(folder, f"{one_line(repr(variant), 40)} is no variant name")
        if (path := existing(f".{variant}")) is not None:
            return path
        notes.append(f"{folder.name} has no variant {variant}: its plain files are read.")
    if (path := existing("")) is not None:
        return path
    others = _variants(folder, forms)
    if len(others) == 1 and variant is None and (path := existing(f".{others[0]}")) is not None:
        notes.append(f"{folder.name} has only the variant {others[0]}: it is read.")
        return path
    choice = f"; choose a variant: {', '.join(others)}" if others else ""
    raise UnsupportedCheckpoint(folder, f"holds no {stem}.safetensors or {pickled}.bin{choice}")


def _variants(folder: Path, forms: list[tuple[str, str]]) -> list[str]:
    found: set[str] = set()
    for path in folder.iterdir():
        for name, suffix in forms:
            if path.name.startswith(f"{name}.") and path.name.endswith(suffix):
                middle = path.name[len(name) + 1 : -len(suffix)]
                if middle and "." not in middle and middle != "index":
                    found.add(one_line(middle, 40))
    return sorted(found)


def _require_variant(model: SourceModel, variant: str | None) -> None:
    if variant is None:
        return
    if not any(f".{variant}." in file.name for file in model.files):
        raise UnsupportedCheckpoint(model.path, f"no component has a variant {variant!r}")


def _read_scheduler(model: SourceModel, path: Path) -> None:
    if not path.is_file():
        if model.family.startswith("sd2"):
            model.prediction = UNKNOWN
            model.notes.append("No scheduler_config.json: SD 1.x's betas are assumed.")
        else:
            model.notes.append("No scheduler_config.json: SD 1.x's betas and epsilon are assumed.")
        return
    config = _read_object(path)
    model.scheduler, model.prediction = diffusers_config.scheduler(path, config)
    model.alphas_cumprod = diffusers_config.trained_alphas(path, config)
    model.scheduler_class = one_line(str(config.get("_class_name", "")), 60)
    model.evidence.append(f"scheduler_config.json says prediction {model.prediction}")


def _find_tokenizer(model: SourceModel, folder: Path) -> None:
    """Take the folder's own vocabulary, if its ids fit the embedding table."""
    files = {name: folder / file for name, file in _TOKENIZER.items()}
    there = [path for path in files.values() if path.is_file()]
    if not there:
        if folder.is_dir():
            model.notes.append("tokenizer/ lacks vocab.json and merges.txt: CLIP's own is used.")
        return
    if len(there) == 1:
        raise InvalidCheckpoint(folder, f"holds {there[0].name} alone, expected both files")
    check_vocabulary(model, files["vocab"])
    model.tokenizer_files = files


_PADDING_FILES = ("special_tokens_map.json", "tokenizer_config.json")


def _read_padding(model: SourceModel, encoder: str, folder: Path) -> None:
    """Take the token that a tokenizer's folder fills up with, where its id is known."""
    if not (folder / _TOKENIZER["vocab"]).is_file():
        return
    for path in (folder / name for name in _PADDING_FILES):
        said = _read_object(path).get("pad_token") if path.is_file() else None
        token = cast("dict[str, object]", said).get("content") if isinstance(said, dict) else said
        if not isinstance(token, str):
            continue
        number = _read_object(folder / _TOKENIZER["vocab"]).get(token)
        config = model.components[encoder].config
        if isinstance(number, int) and 0 <= number < config["vocab_size"]:
            config.pop("pad_token_id", None)
            if number != config["eos_token_id"]:
                config["pad_token_id"] = number
            return


def check_vocabulary(model: SourceModel, path: Path) -> None:
    """Refuse a vocabulary with ids for which the embedding table has no row."""
    sizes = [
        part.config["vocab_size"]
        for name, part in model.components.items()
        if name in detect.TEXT_ENCODERS
    ]
    vocabulary = _read_object(path)
    rows = min(sizes, default=None)
    for word, number in vocabulary.items():
        if not isinstance(number, int) or number < 0 or (rows is not None and number >= rows):
            raise InvalidCheckpoint(
                path,
                f"{one_line(repr(word), 40)} has id {one_line(repr(number), 40)}, "
                f"but the text encoder has {rows} rows",
            )


# ---------------------------------------------------------------------------------------------
# Our own folder


def _open_maple(path: Path, stack: ExitStack, config: Config) -> SourceModel:
    where = path / maple_folder.CONFIG_NAME
    maple_folder.check_config(where, config)
    model = SourceModel(
        path=path,
        container="maple folder",
        family=config["family"],
        title=f"maple folder of {config['family']}",
        layout="maple",
        evidence=[f"config.json says format {maple_folder.FORMAT}, family {config['family']}"],
        components={},
        prediction=config["prediction"],
        scheduler=dict(config["scheduler"]),
        defaults=dict(config["defaults"]),
        latent_rgb_factors=config["latent_rgb_factors"],
        source=config["source"],
    )
    if config.get("alphas_cumprod") is not None:
        model.alphas_cumprod = np.asarray(config["alphas_cumprod"], np.float64)
    for name, settings in config["components"].items():
        weights = path / f"{name}.safetensors"
        if not weights.is_file():
            raise InvalidCheckpoint(path, f"lacks {weights.name}, which config.json names")
        checkpoint = stack.enter_context(open_checkpoint(weights))
        rows = LAYOUTS[name].rows(settings, NATIVE)
        bits = _bits(config, name)
        if bits is not None:
            rows = quantized.quantized_rows(rows, bits)
        slots = [Slot(row, checkpoint, row.native) for row in rows]
        match(weights, checkpoint.tensors, slots)
        packed = {row.native for row in rows if row.packed}
        for key, info in checkpoint.tensors.items():
            if info.dtype not in maple_folder.DTYPES and key not in packed:
                raise InvalidCheckpoint(weights, f"{key} is {info.dtype}: not allowed here")
        slots = in_file_order(slots, checkpoint.tensors)
        is_linear = name == "unet" and not model.family.startswith("sd1")
        model.components[name] = Component(
            name, dict(settings), slots, bits=bits, has_linear_doors=is_linear
        )
        model.files.append(weights)
    if config["tokenizer"] is not None:
        files = {name: path / file for name, file in maple_folder.TOKENIZER_FILES.items()}
        for file in files.values():
            if not file.is_file():
                raise InvalidCheckpoint(path, f"lacks {file.name}, which config.json names")
        check_vocabulary(model, files["vocab"])
        model.tokenizer_files = files
    return model


def _bits(config: Config, component: str) -> int | None:
    """What a component's weights are quantised to, or None."""
    said = config["quantization"]
    return said["bits"] if said is not None and component in said["components"] else None


# ---------------------------------------------------------------------------------------------


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnreadableFile(path, "no such file")
    return read_json(path)


def _plain_name(name: str) -> bool:
    """Whether a name from a stranger's file names something inside the folder and nothing else."""
    return name.replace("_", "").replace("-", "").isalnum()
