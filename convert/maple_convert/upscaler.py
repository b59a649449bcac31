"""Files of networks that enlarge pictures (ESRGAN and its kin), opened for the one network here.

Three spellings of one architecture are in circulation: BasicSR's (``body.0.rdb1.conv1``), which
Real-ESRGAN has and which are our names; ESRGAN's first ones, counted by layer
(``model.1.sub.0.RDB1.conv1.0``); and those in between (``RRDB_trunk.0.RDB1.conv1``). Nothing in a
file says how it is built: that is read off its names and shapes. All others are refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maple_convert.errors import InvalidCheckpoint, LayoutMismatch, UnsupportedCheckpoint, quoted
from maple_convert.readers import open_checkpoint
from maple_convert.tensors import FLOATS, Checkpoint, Tensor

WRAPPERS = ("params_ema", "params", "params-ema")  # the better copy first
MOST_BLOCKS, MOST_DOUBLINGS, MOST_WIDTH = 64, 4, 512
SHUFFLES = {3: 1, 12: 2, 48: 4}  # channels of the first layer's input to the fold before it

_DENSE = {
    "BasicSR": re.compile(r"body\.(\d{1,4})\.rdb([123])\.conv([1-5])"),
    "ESRGAN, in between": re.compile(r"RRDB_trunk\.(\d{1,4})\.RDB([123])\.conv([1-5])"),
    "ESRGAN's first": re.compile(r"model\.1\.sub\.(\d{1,4})\.RDB([123])\.conv([1-5])\.0"),
}
_OTHERS = {  # a part of a name that gives a network away, and what people call it
    "conv1x1": "ESRGAN+",
    "layers.0.residual_group": "SwinIR or HAT",
    "relative_position_index": "SwinIR or HAT",
    "body.1.num_parameters": "Real-ESRGAN's compact network (SRVGGNet)",
    "body.0.weight": "Real-ESRGAN's compact network (SRVGGNet)",
    "model.diffusion_model": "a model that draws",
}


@dataclass(frozen=True)
class UpscalerFile:
    """One network, as it is built here.

    Attributes:
        path: the file.
        spelling: whose names it has.
        config: width, growth, num_blocks, doublings and shuffle.
        tensors: float32 by native name, convolutions O, H, W, I.
    """

    path: Path
    spelling: str
    config: Mapping[str, int]
    tensors: Mapping[str, Tensor]


def open_upscaler(path: Path | str) -> UpscalerFile:
    """Read a network that enlarges pictures, whole.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file.

    Raises:
        UnsupportedCheckpoint: if it is another network.
        LayoutMismatch: if its names or shapes do not make one.
        InvalidCheckpoint: if a value is not finite, or the file is malformed.
        UnreadableFile: if it cannot be read.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        keys = _keys(checkpoint)
        spelling, names = _native(path, keys)
        shapes = {native: checkpoint.tensors[key].shape for native, key in names.items()}
        config = _config(path, shapes)
        _check(path, shapes, config)
        return UpscalerFile(
            path, spelling, config, {name: _read(checkpoint, key) for name, key in names.items()}
        )


def _keys(checkpoint: Checkpoint) -> dict[str, str]:
    """Names less what wraps them, and the file's own."""
    for wrapper in WRAPPERS:
        found = {
            key.removeprefix(f"{wrapper}."): key
            for key in checkpoint.tensors
            if key.startswith(f"{wrapper}.")
        }
        if found:
            return found
    return {key.removeprefix("module."): key for key in checkpoint.tensors}


def _native(path: Path, keys: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Whose spelling the names are, and each native name's key."""
    stems = {key.rpartition(".")[0] for key in keys}
    spelling = next(
        (s for s, pattern in _DENSE.items() if any(pattern.fullmatch(stem) for stem in stems)), None
    )
    if spelling is None or any("conv1x1" in stem for stem in stems):
        raise UnsupportedCheckpoint(path, _what_else(keys))
    outer = _outer(spelling, stems)
    names: dict[str, str] = {}
    unexpected: list[str] = []
    for key, own in keys.items():
        stem, _, kind = key.rpartition(".")
        inner = _DENSE[spelling].fullmatch(stem)
        if inner:
            native = f"body.{int(inner[1])}.rdb{inner[2]}.conv{inner[3]}"
        else:
            native = outer.get(stem, "")
        if not native or kind not in ("weight", "bias"):
            unexpected.append(own)
        elif f"{native}.{kind}" in names:
            raise InvalidCheckpoint(path, f"{quoted(own)} is there twice")
        else:
            names[f"{native}.{kind}"] = own
    if unexpected:
        raise LayoutMismatch(path, unexpected=sorted(unexpected))
    return spelling, names


def _outer(spelling: str, stems: set[str]) -> dict[str, str]:
    """The layers outside of the blocks: this spelling's names to native ones."""
    if spelling == "BasicSR":
        ups = [f"conv_up{i + 1}" for i in range(MOST_DOUBLINGS)]
        return {name: name for name in ("conv_first", "conv_body", "conv_hr", "conv_last", *ups)}
    if spelling == "ESRGAN, in between":
        ups = {f"upconv{i + 1}": f"conv_up{i + 1}" for i in range(MOST_DOUBLINGS)}
        own = {"conv_first": "conv_first", "trunk_conv": "conv_body", "HRconv": "conv_hr"}
        return {**own, **ups, "conv_last": "conv_last"}
    # Counted by layer: 0 the first, 1 the blocks and, as the last of them, conv_body; then three
    # places a doubling (doubling, convolution, activation); then conv_hr, activation, conv_last.
    found: dict[str, str] = {"model.0": "conv_first"}
    trunk = [int(m[1]) for stem in stems if (m := re.fullmatch(r"model\.1\.sub\.(\d{1,4})", stem))]
    if len(trunk) == 1:
        found[f"model.1.sub.{trunk[0]}"] = "conv_body"
    after = sorted(
        int(m[1]) for stem in stems if (m := re.fullmatch(r"model\.(\d{1,3})", stem)) and int(m[1])
    )
    for i, place in enumerate(after[:-2]):
        if place == 3 * (i + 1):
            found[f"model.{place}"] = f"conv_up{i + 1}"
    if len(after) >= 2 and after[-2] == 3 * (len(after) - 2) + 2 and after[-1] == after[-2] + 2:
        found |= {f"model.{after[-2]}": "conv_hr", f"model.{after[-1]}": "conv_last"}
    return found


def _config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How the network is built, as far as the shapes say it."""
    first = shapes.get("conv_first.weight", ())
    inner = shapes.get("body.0.rdb1.conv1.weight", ())
    if len(first) != 4 or len(inner) != 4 or first[1] not in SHUFFLES:
        wanted = {"conv_first.weight": first, "body.0.rdb1.conv1.weight": inner}
        missing = [name for name, shape in wanted.items() if not shape]
        if missing:
            raise LayoutMismatch(path, missing=missing)
        raise UnsupportedCheckpoint(
            path, f"enlarges pictures of {first[1] if len(first) > 1 else '?'} channels, not of 3"
        )
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("body.")}
    doublings = sum(f"conv_up{i + 1}.weight" in shapes for i in range(MOST_DOUBLINGS))
    if max(blocks) >= MOST_BLOCKS or max(first[0], inner[0]) > MOST_WIDTH:
        size = f"{max(blocks) + 1} blocks of {first[0]} and {inner[0]} channels"
        raise UnsupportedCheckpoint(path, f"is too large: {size}")
    return {
        "width": first[0],
        "growth": inner[0],
        "num_blocks": max(blocks) + 1,
        "doublings": doublings,
        "shuffle": SHUFFLES[first[1]],
    }


def _check(path: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, int]) -> None:
    """Raise unless every parameter of such a network is there, and in its shape."""
    wanted = expected_shapes(config)
    missing = [name for name in wanted if name not in shapes]
    misshapen = [
        (name, shapes[name], shape)
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    unexpected = [name for name in shapes if name not in wanted]
    if missing or misshapen or unexpected:
        raise LayoutMismatch(path, missing, unexpected, misshapen)


def expected_shapes(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a network by native name, in torch's order of axes."""
    width, growth = config["width"], config["growth"]
    convs = {"conv_first": (width, 3 * config["shuffle"] ** 2)}
    for block in range(config["num_blocks"]):
        for dense in (1, 2, 3):
            for i in range(5):
                out = width if i == 4 else growth
                convs[f"body.{block}.rdb{dense}.conv{i + 1}"] = (out, width + i * growth)
    ups = [f"conv_up{i + 1}" for i in range(config["doublings"])]
    convs |= {name: (width, width) for name in ("conv_body", *ups, "conv_hr")}
    convs["conv_last"] = (3, width)
    return {
        f"{name}.{kind}": (out, into, 3, 3) if kind == "weight" else (out,)
        for name, (out, into) in convs.items()
        for kind in ("weight", "bias")
    }


def _read(checkpoint: Checkpoint, key: str) -> Tensor:
    if checkpoint.tensors[key].dtype not in FLOATS:
        dtype = checkpoint.tensors[key].dtype
        raise UnsupportedCheckpoint(checkpoint.path, f"{quoted(key)} is {dtype}, no float")
    tensor = checkpoint.read(key)
    if tensor.has_nonfinite():
        raise InvalidCheckpoint(checkpoint.path, f"{quoted(key)} holds NaN or infinity")
    array = tensor.astype("float32").array
    if array.ndim == 4:
        array = np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return Tensor("float32", array)


def _what_else(keys: Mapping[str, str]) -> str:
    """What a file is that holds no network of this kind."""
    if not keys:
        return "holds no tensors: not a network that enlarges pictures"
    for sign, name in _OTHERS.items():
        if any(sign in key for key in keys):
            return f"is {name}, and only ESRGAN's network (RRDBNet) is read"
    shown = quoted(next(iter(keys)))
    return f"is no ESRGAN: no name of its network (RRDBNet) is there, but {shown}"
