"""Files of differences (LoRA and its kin), opened for a model: which weight each one changes.

Any dialect in, updates by native name out. What no layer of the model takes is listed, not dropped
in silence; a file of which nothing fits is an error that says which family it is for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maple_convert.embedding import ANY, VECTOR_ROLES, Vectors, vectors_of
from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, one_line, quoted
from maple_convert.layouts import Row
from maple_convert.layouts.lora import FAMILIES, STRANGERS, Module, Names, split, unread
from maple_convert.readers import open_checkpoint, read_json
from maple_convert.readers.json_text import JSONFault, parse_object
from maple_convert.tensors import FLOATS, Checkpoint, Tensor
from maple_convert.updates import Update

# cloneofsimo's names: the network, the layer's place in its order, and the factor.
BY_PLACE = re.compile(r"(unet|text_encoder):(\d{1,6}):(up|down)")
EMBED_FLAG = "<embed>"
PEFT_CONFIG = "adapter_config.json"
# PEFT's settings of a network, in diffusers' metadata with its name in front.
SETTINGS = ("r", "lora_alpha", "alpha_pattern", "use_rslora")
ADAPTER_METADATA = "lora_adapter_metadata"


@dataclass
class LoraFile:
    """One file of differences, as a model takes it.

    Attributes:
        path: the file.
        dialect: whose names it has.
        updates: by network, by the native name of the parameter.
        modules: how many layers are changed.
        unmatched: the file's names of layers that the model has not, or has in another shape, and
            the reason.
        vectors: textual inversions that came with it, by their name in prompts.
    """

    path: Path
    dialect: str
    updates: dict[str, dict[str, Update]] = field(default_factory=dict[str, dict[str, Update]])
    modules: int = 0
    unmatched: dict[str, str] = field(default_factory=dict[str, str])
    vectors: dict[str, Vectors] = field(default_factory=dict[str, Vectors])


def open_lora(path: Path | str, configs: Mapping[str, Mapping[str, Any]]) -> LoraFile:
    """Read a file of differences whole.

    Args:
        path: a ``.safetensors``, ``.pt`` or ``.bin`` file.
        configs: of the model's networks by name.

    Raises:
        UnsupportedCheckpoint: if it holds no differences, or none for this model.
        InvalidCheckpoint: if a value is not finite, or the file is malformed.
        UnreadableFile: if it cannot be read.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        names = Names(configs)
        grouped, dialect = _grouped(checkpoint, names)
        if not grouped:
            raise UnsupportedCheckpoint(path, _what_else(checkpoint))
        _check_family(checkpoint, grouped, configs)
        found = LoraFile(path, dialect)
        settings = _settings(checkpoint)
        for name, (module, roles) in grouped.items():
            reason = _add(found, checkpoint, name, module, roles, settings)
            if reason:
                found.unmatched[name] = reason
        if not found.modules:
            raise UnsupportedCheckpoint(
                path, _why_nothing_fits(checkpoint, grouped, found, configs)
            )
        found.vectors = _vectors(checkpoint)
        return found


# Keys to layers -------------------------------------------------------------------------------

_Grouped = dict[str, tuple[Module | None, dict[str, str]]]  # by name: the layer, role to key


def _grouped(checkpoint: Checkpoint, names: Names) -> tuple[_Grouped, str]:
    tensors = checkpoint.tensors
    if any(BY_PLACE.fullmatch(key) for key in tensors):
        return _by_place(checkpoint, names), "cloneofsimo"
    if _is_bare_list(checkpoint):
        return _by_order(checkpoint, names), "cloneofsimo, without names"
    grouped: _Grouped = {}
    for key in tensors:
        parts = split(key)
        if parts is None:
            continue
        name, role = parts
        if name not in grouped:
            grouped[name] = (names.find(name), {})
        grouped[name][1][role] = key
    return grouped, _dialect(tensors)


def _by_place(checkpoint: Checkpoint, names: Names) -> _Grouped:
    """Layers by their number in each network's order."""
    places: dict[str, dict[int, dict[str, str]]] = {}
    for key in checkpoint.tensors:
        match = BY_PLACE.fullmatch(key)
        if match:
            component, place, role = match.groups()
            places.setdefault(component, {}).setdefault(int(place), {})[role] = key
    grouped: _Grouped = {}
    for component, layers in places.items():
        order = _order(checkpoint, names, component, [layers[place] for place in sorted(layers)])
        for place, module in zip(sorted(layers), order, strict=True):
            grouped[f"{component}:{place}"] = (module, layers[place])
    return grouped


def _by_order(checkpoint: Checkpoint, names: Names) -> _Grouped:
    """A bare list: an "up" and a "down" for each layer of one network, which shapes tell."""
    keys = list(checkpoint.tensors)
    layers = [{"up": up, "down": down} for up, down in zip(keys[::2], keys[1::2], strict=True)]
    order = _order(checkpoint, names, None, layers)
    return {str(n): (module, layers[n]) for n, module in enumerate(order)}


def _order(
    checkpoint: Checkpoint,
    names: Names,
    component: str | None,
    layers: Sequence[Mapping[str, str]],
) -> list[Module | None]:
    """The layers in their order, if it is as long as they are and every shape fits."""
    for which, modules in names.in_cloneofsimos_order():
        if component in (None, which) and len(modules) == len(layers):
            pairs = zip(modules, layers, strict=True)
            if all(_has_shape(checkpoint, module.weights[0], layer) for module, layer in pairs):
                return list(modules)
    return [None] * len(layers)


def _has_shape(checkpoint: Checkpoint, row: Row, layer: Mapping[str, str]) -> bool:
    if set(layer) != {"up", "down"}:
        return False
    up, down = (checkpoint.tensors[layer[role]].shape for role in ("up", "down"))
    wanted = row.published_shape
    return up[:1] == wanted[:1] and down[1:2] == wanted[1:2]


def _is_bare_list(checkpoint: Checkpoint) -> bool:
    keys = list(checkpoint.tensors)
    return (
        len(keys) >= 2
        and len(keys) % 2 == 0
        and keys == [str(n) for n in range(len(keys))]
        and all(len(info.shape) in (2, 4) for info in checkpoint.tensors.values())
    )


def _dialect(tensors: Mapping[str, Any]) -> str:
    for piece, dialect in (
        ("lora_A", "PEFT"),
        ("processor.", "diffusers, attention processors"),
        (".lora.", "diffusers"),
        ("lora_linear_layer", "diffusers"),
        ("lokr_", "LyCORIS LoKr"),
        ("hada_", "LyCORIS LoHa"),
        ("lora_unet_", "kohya"),
        ("lora_te", "kohya"),
    ):
        if any(piece in key for key in tensors):
            return dialect
    return "kohya's roles"


# One layer ------------------------------------------------------------------------------------


def _add(
    found: LoraFile,
    checkpoint: Checkpoint,
    name: str,
    module: Module | None,
    roles: Mapping[str, str],
    settings: Mapping[str, Any],
) -> str:
    """Add a layer's updates; or say why it cannot be."""
    if module is None:
        return "the model has no such layer"
    tensors = {role: _read(checkpoint, key) for role, key in roles.items()}
    alpha, root = _alpha(checkpoint, name, tensors, settings)
    if "magnitude" in tensors:  # PEFT's DoRA: a length for each output, in (O,) or (1, O, 1, 1)
        lengths = tensors.pop("magnitude")
        tensors["dora_scale"] = Tensor(lengths.dtype, np.reshape(lengths.array, (-1, 1)))
    bias = tensors.pop("diff_b", None)
    made: list[Update] = []
    if tensors:
        if len(tensors) == 1 and "dora_scale" in tensors:
            return "a length without a difference"
        made += [Update(row, tensors, alpha, root) for row in module.weights]
    if bias is not None:
        if not module.biases:
            return "the model's layer has no bias"
        made += [Update(row, {"diff": bias}) for row in module.biases]
    if not made or not all(update.fits() for update in made):
        shapes = ", ".join(f"{role} {tensor.shape}" for role, tensor in tensors.items())
        return f"its shapes ({shapes}) do not fit the layer's {module.weights[0].published_shape}"
    updates = found.updates.setdefault(module.component, {})
    if any(update.row.native in updates for update in made):
        return "the file changes this layer twice"
    for update in made:
        updates[update.row.native] = update
    found.modules += 1
    return ""


def _read(checkpoint: Checkpoint, key: str) -> Tensor:
    if checkpoint.tensors[key].dtype not in FLOATS and not key.endswith(".alpha"):
        reason = f"{quoted(key)} is {checkpoint.tensors[key].dtype}, not a weight"
        raise InvalidCheckpoint(checkpoint.path, reason)
    tensor = checkpoint.read(key)
    if tensor.has_nonfinite():
        raise InvalidCheckpoint(checkpoint.path, f"{quoted(key)} holds NaN or infinite values")
    return tensor


def _alpha(
    checkpoint: Checkpoint, name: str, tensors: dict[str, Tensor], settings: Mapping[str, Any]
) -> tuple[float | None, bool]:
    """A layer's alpha, from the file or from PEFT's settings, and whether it is rank-stabilised."""
    stored = tensors.pop("alpha", None)
    if stored is not None:
        if stored.array.size != 1:
            raise InvalidCheckpoint(
                checkpoint.path, f"{quoted(name)} has an alpha that is no number"
            )
        return float(np.reshape(stored.astype("float32").array, ())), False
    for network in ("unet", "text_encoder", "text_encoder_2", ""):
        start = f"{network}." if network else ""
        if name.startswith(start) and f"{start}lora_alpha" in settings:
            alpha = settings[f"{start}lora_alpha"]
            pattern: object = settings.get(f"{start}alpha_pattern")
            if isinstance(pattern, dict):
                for layer, value in pattern.items():  # pyright: ignore[reportUnknownVariableType]
                    if name == layer or name.endswith(f".{layer}"):
                        alpha: object = value  # pyright: ignore[reportUnknownVariableType]
            if isinstance(alpha, int | float) and not isinstance(alpha, bool):
                return float(alpha), settings.get(f"{start}use_rslora") is True
    return None, False


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What PEFT says beside the tensors: in the metadata, or in a file of its own."""
    text = checkpoint.metadata.get(ADAPTER_METADATA)
    if text is not None:
        try:
            return parse_object(text.encode("utf-8", errors="replace"))
        except JSONFault as fault:
            raise InvalidCheckpoint(checkpoint.path, f"its metadata {fault}") from fault
    beside = checkpoint.path.with_name(PEFT_CONFIG)
    if any("lora_A" in key for key in checkpoint.tensors) and beside.is_file():
        return read_json(beside)
    return {}


# What is not for this model -------------------------------------------------------------------


def _what_else(checkpoint: Checkpoint) -> str:
    """What a file without differences is."""
    tensors = checkpoint.tensors
    kinds = {kind for key in tensors if (kind := unread(key))}
    if kinds:
        return f"is {' and '.join(sorted(kinds))}, which is not read here"
    if vectors_of(checkpoint):
        return "is a textual inversion and no LoRA: load it with --embedding"
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in tensors):
        return "is a whole model and no LoRA: load it with --model"
    shown = ", ".join(one_line(key, 60) for key in list(tensors)[:2])
    return f"is no LoRA: no tensor of it has a LoRA's name, the first are {shown}"


def _check_family(
    checkpoint: Checkpoint, grouped: _Grouped, configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a file for another family, of which the layers that see no text could still fit."""
    mine = configs["unet"]["cross_attention_dim"]
    for name, (_, roles) in grouped.items():
        plain = name.replace(".", "_").replace("_processor", "")
        if plain.endswith(("attn2_to_k", "attn2_to_v")):
            width = _inputs({role: checkpoint.tensors[key].shape for role, key in roles.items()})
            if width not in (None, mine):
                raise UnsupportedCheckpoint(checkpoint.path, _is_for(width, mine))
            if width is not None:
                return


def _is_for(width: int, mine: int) -> str:
    return f"is for {_family(width)}; this model is {_family(mine)}"


def _family(width: int) -> str:
    family = FAMILIES.get(width)
    return f"{family} (its text {width} wide)" if family else f"a model of a text {width} wide"


def _why_nothing_fits(
    checkpoint: Checkpoint,
    grouped: _Grouped,
    found: LoraFile,
    configs: Mapping[str, Mapping[str, Any]],
) -> str:
    for key in checkpoint.tensors:
        for piece, family in STRANGERS.items():
            if piece in key:
                return f"is for {family}, not for Stable Diffusion"
    mine: int = configs["unet"]["cross_attention_dim"]
    own = {width * n for width in configs["unet"]["block_out_channels"] for n in (1, 4)}
    for name, (_, roles) in grouped.items():
        # Without names: whatever is as wide as a family's text and no layer of this UNet. With
        # names: what a text encoder's layers take in, if they are the first one's.
        is_nameless = name.isdecimal() or name.startswith(("unet:", "text_encoder:"))
        is_text = "self_attn" in name and "te2" not in name and "encoder_2" not in name
        width = _inputs({role: checkpoint.tensors[key].shape for role, key in roles.items()})
        if width is None or width not in FAMILIES or width in own | {mine}:
            continue
        if is_nameless or is_text:
            return _is_for(width, mine)
    name, reason = next(iter(found.unmatched.items()))
    return f"fits no layer of this model: {one_line(name, 100)}, for one: {reason}"


def _inputs(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    for role in ("down", "hada_w1_b", "diff"):
        if role in shapes and len(shapes[role]) > 1:
            return shapes[role][1]
    one = shapes.get("lokr_w1") or shapes.get("lokr_w1_b")
    two = shapes.get("lokr_w2") or shapes.get("lokr_w2_b")
    if one is not None and two is not None and len(one) > 1 and len(two) > 1:
        return one[1] * two[1]
    return None


def _vectors(checkpoint: Checkpoint) -> dict[str, Vectors]:
    """Textual inversions among the differences: cloneofsimo's, and A1111's bundles."""
    found: dict[str, Vectors] = {}
    for key in checkpoint.tensors:
        if checkpoint.metadata.get(key) == EMBED_FLAG:
            found[key] = {ANY: _read(checkpoint, key)}
        elif key.startswith("bundle_emb."):
            name, _, role = key.removeprefix("bundle_emb.").partition(".")
            if role in VECTOR_ROLES:
                found.setdefault(name, {})[VECTOR_ROLES[role]] = _read(checkpoint, key)
    return found
