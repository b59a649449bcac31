"""One file as a model: sections found, family identified, every key planned.

What a bare file cannot say is settled by the rules of its family and said in the notes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np

from maple_convert import detect, maple_folder
from maple_convert.detect import Section
from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint
from maple_convert.layouts import LAYOUTS, View, diffusers_config, files, image_encoder
from maple_convert.layouts.diffusers_config import UNKNOWN
from maple_convert.layouts.parts import LINEAR
from maple_convert.readers import open_checkpoint
from maple_convert.source import Component, Slot, SourceModel, files_of, in_file_order, match
from maple_convert.tensors import Checkpoint, Tensor

SD1_HEADS = 8  # at every level of every SD 1.x UNet
OPEN_CLIP_H_LAYERS = 24  # of the text model that SD 2.x reads, all of them


def open_file(path: Path, stack: ExitStack, ema: bool) -> SourceModel:
    """Open a checkpoint of a whole model or of some of its components."""
    checkpoint = stack.enter_context(open_checkpoint(path))
    tensors = checkpoint.tensors
    everything = View(path, tensors)
    detect.refuse_others(everything)
    sections = detect.find_sections(everything)
    if not sections:
        detect.refuse_unknown(everything)
    if {section.component for section in sections} == {"text_encoder", "image_encoder"}:
        sections = [section for section in sections if section.component == "image_encoder"]
    halves = [section for section in sections if section.component in TAESD_HALVES]
    facts = detect.gather(path, sections, everything)
    if halves and len(sections) == 1:
        return _open_taesd_pair(checkpoint, halves[0], stack)
    family, title = detect.identify(facts)
    configs: dict[str, dict[str, Any]] = {}
    whole: dict[str, dict[str, Any]] = {}
    for section in sections:
        name, spelling = section.component, section.spelling
        whole[name] = LAYOUTS[name].infer(section.view, spelling)
        configs[name] = complete(name, _used(section, whole[name], family), spelling, family)
    has_ema = files.holds_ema(tensors)
    if ema and not (has_ema and "unet" in configs):
        raise UnsupportedCheckpoint(path, "holds no EMA copy of the UNet (model_ema.*)")
    components, dropped = _plan(checkpoint, sections, configs, whole, ema)
    model = SourceModel(
        path=path,
        container=checkpoint.container,
        family=family,
        title=title,
        layout=_layout(sections),
        evidence=facts.lines,
        components=components,
        notes=list(checkpoint.notes),
        has_ema=has_ema,
        uses_ema=ema,
        dropped=dropped,
        files=files_of(path),
    )
    _read_schedule(model, checkpoint)
    _note_rules(model)
    return model


def complete(
    component: str, found: Mapping[str, Any], spelling: str = "", family: str = "sd1"
) -> dict[str, Any]:
    """Complete an architecture by its family's rules, where no config lies beside the tensors.

    Args:
        component: its name.
        found: what the tensors say of it.
        spelling: of its names in the file.
        family: of the whole model.
    """
    rules: dict[str, Any] = {}
    if component in ("unet", "controlnet"):
        widths: Sequence[int] = found["block_out_channels"]
        heads = [SD1_HEADS] * len(widths)
        if spelling.endswith(LINEAR):  # every family but SD 1.x
            heads = [max(width // diffusers_config.HEAD_WIDTH, 1) for width in widths]
        rules = {"num_attention_heads": heads, "norm_num_groups": 32}
    elif component == "vae":
        factor = diffusers_config.SD1_SCALING_FACTOR
        rules = {"norm_num_groups": 32, "scaling_factor": factor}
        if family.startswith("sdxl"):
            rules["scaling_factor"] = diffusers_config.SDXL_SCALING_FACTOR
            rules["force_upcast"] = True
    elif component == "image_encoder":
        width: int = found["hidden_size"]
        heads = image_encoder.HEADS.get(width, max(width // diffusers_config.HEAD_WIDTH, 1))
        is_openais = width in image_encoder.OPENAI_WIDTHS and spelling != "openclip"
        rules = {
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if is_openais else "gelu",
        }
    elif component in detect.TEXT_ENCODERS:
        is_open = _is_openclip(component, spelling, family)
        rules = {
            "num_attention_heads": max(found["hidden_size"] // diffusers_config.HEAD_WIDTH, 1),
            "hidden_act": "gelu" if is_open else "quick_gelu",
            "eos_token_id": diffusers_config.eos_token(Path(), None, found["vocab_size"]),
        }
        if is_open:
            rules["pad_token_id"] = diffusers_config.OPEN_CLIP_PAD
    return {**found, **rules}


def _is_openclip(component: str, spelling: str, family: str) -> bool:
    """Whether a text encoder is OpenCLIP's, which GGUF files give transformers' names."""
    return spelling == "openclip" or component == "text_encoder_2" or family.startswith("sd2")


def _used(section: Section, found: dict[str, Any], family: str) -> dict[str, Any]:
    """What of a component is used: SD 2.x's files hold the whole of OpenCLIP's text model.

    The UNet was trained on the states before the last layer, so that this layer and the projection
    behind it are never computed. Folders of diffusers, and what is made from them, lack both.
    """
    name = section.component
    if name != "text_encoder" or not _is_openclip(name, section.spelling, family):
        return found
    layers: int = found["num_hidden_layers"]
    is_whole = found["projection_dim"] is not None or layers == OPEN_CLIP_H_LAYERS
    return {
        **found,
        "num_hidden_layers": max(layers - is_whole, 1),
        "projection_dim": None,
    }


_COMPVIS_SPELLINGS = ("compvis", "openclip", "sdcpp", "upstream", "upstream_from_0")
_COMPVIS_PREFIXES = ("model.", "first_stage_model.", "cond_stage_model.", "conditioner.")


def _layout(sections: Sequence[Section]) -> str:
    """CompVis where any name is; a text encoder is spelt alike in both."""
    compvis = any(
        section.spelling.removesuffix(LINEAR) in _COMPVIS_SPELLINGS
        or section.view.prefix.startswith(_COMPVIS_PREFIXES)
        for section in sections
    )
    return "compvis" if compvis else "diffusers"


def _plan(
    checkpoint: Checkpoint,
    sections: Sequence[Section],
    configs: Mapping[str, dict[str, Any]],
    whole: Mapping[str, dict[str, Any]],
    ema: bool,
) -> tuple[dict[str, Component], dict[str, str]]:
    """Match the rows of all sections against all keys of the file, both ways."""
    path, tensors = checkpoint.path, checkpoint.tensors
    replaced: dict[str, str] = {}
    plans: dict[str, list[Slot]] = {}
    for section in sections:
        name, config = section.component, configs[section.component]
        # Before the rows are made: how many they are follows from these settings.
        maple_folder.check_component(path, name, config)
        plans[name] = []
        for row in LAYOUTS[name].rows(config, section.spelling):
            key = section.view.key(row.published)
            if ema and name == "unet":
                replaced[key] = "replaced by its EMA copy"
                key = files.ema_name(row)
            plans[name].append(Slot(row, checkpoint, key))
        if name == "image_encoder":
            halves = (key for key in tensors if key.startswith(files.TEXT_HALF))
            replaced |= dict.fromkeys(halves, "CLIP's text half, which reads no pictures")
        if name in detect.TEXT_ENCODERS:
            used = {slot.key for slot in plans[name]}
            for row in LAYOUTS[name].rows(whole[name], section.spelling):
                if (key := section.view.key(row.published)) not in used:
                    replaced[key] = "behind the layer whose states the UNet takes"
    dropped = match(path, tensors, [slot for slots in plans.values() for slot in slots], replaced)
    components: dict[str, Component] = {}
    for section in sections:
        name, prefix = section.component, section.view.prefix
        mine = {key: why for key, why in dropped.items() if prefix and key.startswith(prefix)}
        slots = in_file_order(plans[name], tensors)
        is_linear = section.spelling.endswith(LINEAR)
        components[name] = Component(name, configs[name], slots, mine, has_linear_doors=is_linear)
    return components, dropped


# ---------------------------------------------------------------------------------------------
# Noise schedule and prediction


def _read_schedule(model: SourceModel, checkpoint: Checkpoint) -> None:
    """Take the stored noise schedule and the marks that some fine-tunes leave."""
    tensors = checkpoint.tensors
    if "unet" not in model.components:
        return
    if model.family.startswith("sd2"):
        # SD 2.x comes in both kinds with the same tensors; see docs/porting.md.
        model.prediction = UNKNOWN
    if files.V_PREDICTION_MARK in tensors:
        model.prediction = "v_prediction"
        model.evidence.append(f"{files.V_PREDICTION_MARK}: the UNet predicts v")
    if files.ZERO_SNR_MARK in tensors:
        model.scheduler["rescale_zero_terminal_snr"] = True
        model.evidence.append(f"{files.ZERO_SNR_MARK}: noise schedule of zero terminal SNR")
    if files.ALPHAS not in tensors:
        return
    info = tensors[files.ALPHAS]
    if info.dtype not in ("float16", "bfloat16", "float32", "float64") or len(info.shape) != 1:
        raise InvalidCheckpoint(
            checkpoint.path, f"{files.ALPHAS} is {info.dtype} of shape {info.shape}"
        )
    stored = checkpoint.read(files.ALPHAS)
    exact = stored.astype("float32").array if stored.dtype == "bfloat16" else stored.array
    maple_folder.check_alphas(checkpoint.path, exact)
    usual = diffusers_config.alphas_cumprod(
        {**diffusers_config.SD1_SCHEDULER, "num_train_timesteps": exact.size}
    )
    assert usual is not None
    if stored.dtype in ("float16", "bfloat16"):
        rounded = Tensor("float64", usual).astype("float32").astype(stored.dtype)
        if np.array_equal(rounded.array, stored.array):
            # Half precision would move the smallest noise levels by a tenth; the betas are exact.
            model.notes.append(
                f"{files.ALPHAS} is stored in {stored.dtype}: it is the usual schedule rounded, "
                "which is rebuilt from its betas."
            )
            return
    model.alphas_cumprod = exact
    if not np.allclose(exact, usual, rtol=1e-3):
        model.notes.append(f"{files.ALPHAS} is stored and is not SD 1.x's usual one; it is used.")


def _note_rules(model: SourceModel) -> None:
    """Say what the file leaves open and how it was settled."""
    components, width = model.components, diffusers_config.HEAD_WIDTH
    for name in ("unet", "controlnet", "image_encoder", *detect.TEXT_ENCODERS):
        if name not in components:
            continue
        part, title = components[name], LAYOUTS[name].title
        heads = part.config["num_attention_heads"]
        rule = f"{heads}, one for {width} channels"
        if isinstance(heads, list):
            shown = ", ".join(str(n) for n in cast("list[int]", heads))
            rule = f"{shown}, one for {width} channels"
            rule = rule if part.has_linear_doors else f"{SD1_HEADS}, as in SD 1.x"
        if name == "image_encoder":
            which = image_encoder.NAMES.get(part.config["hidden_size"])
            rule = f"{heads}, as in {which}" if which else rule
        title = "text encoder" if name == "text_encoder" else title
        model.notes.append(f"The file cannot say the {title}'s heads: {rule}.")
    if set(components) == {"vae"}:
        model.notes.append(
            "An autoencoder alone does not say its scaling factor: 0.18215, as in SD 1.x "
            "(SDXL's has the same names and 0.13025)."
        )
    if (beside := model.path.with_suffix(".yaml")).is_file():
        model.notes.append(f"{beside.name} beside it is not read.")


# ---------------------------------------------------------------------------------------------
# TAESD, published in two files

TAESD_HALVES = {"taesd encoder": "encoder", "taesd decoder": "decoder"}


def _open_taesd_pair(checkpoint: Checkpoint, section: Section, stack: ExitStack) -> SourceModel:
    """Open one half of TAESD and the other half beside it."""
    path = checkpoint.path
    half = TAESD_HALVES[section.component]
    other_half = "decoder" if half == "encoder" else "encoder"
    stem, found, rest = path.name.rpartition(half)
    other = path.with_name(stem + other_half + rest)
    if not found or not other.is_file():
        wanted = other.name if found else f"a file named …{other_half}…"
        raise UnsupportedCheckpoint(
            path, f"this is the {half} of TAESD; its {other_half} ({wanted}) must lie beside it"
        )
    second = stack.enter_context(open_checkpoint(other))
    others = detect.find_sections(View(other, second.tensors))
    if [TAESD_HALVES.get(s.component) for s in others] != [other_half]:
        raise UnsupportedCheckpoint(other, f"this is not the {other_half} of TAESD")
    pair = {half: (checkpoint, section), other_half: (second, others[0])}
    shapes = {name: info for _, s in pair.values() for name, info in s.view.tensors.items()}
    # Each half has its own numbering; the decoder's tells where the architecture is read.
    config = LAYOUTS["taesd"].infer(View(path, shapes), pair["decoder"][1].spelling)
    maple_folder.check_component(path, "taesd", config)
    slots: list[Slot] = []
    dropped: dict[str, str] = {}
    for name, (opened, part) in pair.items():
        mine = [
            Slot(row, opened, part.view.key(row.published))
            for row in LAYOUTS["taesd"].rows(config, part.spelling)
            if row.native.startswith(name)
        ]
        dropped |= match(opened.path, opened.tensors, mine)
        slots += in_file_order(mine, opened.tensors)
    return SourceModel(
        path=path,
        container=checkpoint.container,
        family="taesd",
        title="TAESD alone",
        layout="compvis",
        evidence=[f"{opened.path.name} holds the {name}" for name, (opened, _) in pair.items()],
        components={"taesd": Component("taesd", config, slots, dropped)},
        notes=[f"The {other_half} is read from {other.name}."],
        dropped=dropped,
        files=[path, other],
    )
