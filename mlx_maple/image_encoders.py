"""Which CLIP image encoder an IP-Adapter was made with, and where it is."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maple_convert import SourceModel, open_model
from maple_convert.errors import ConvertError, UnsupportedCheckpoint
from mlx_maple import model_folders

PART = "image_encoder"
# The published ones, by the width of what is read of them: of their tokens, of their projection.
# h94's are OpenCLIP's, which nearly all adapters were made with.
_H = "h94/IP-Adapter:models/image_encoder/model.safetensors"
_BIG_G = "h94/IP-Adapter:sdxl_models/image_encoder/model.safetensors"
PUBLISHED = {"tokens": {1280: _H, 1664: _BIG_G}, "projection": {1024: _H, 1280: _BIG_G}}


def find(adapter: Path, config: Mapping[str, Any]) -> str | Path:
    """The image encoder of an adapter: a path, or a name on the hub.

    It is looked for beside the adapter, as published folders have it, then in the models' folders
    (``clip_vision``); the first that fits counts.

    Args:
        adapter: its file or folder.
        config: of its network.

    Raises:
        UnsupportedCheckpoint: if none is there and none that is published fits.
    """
    for path in _candidates(adapter):
        try:
            with open_model(path) as model:
                if _fits(model, config):
                    return path
        except ConvertError:
            continue  # something else that is kept there
    reads, width = _read(config), config["image_dim"]
    if width not in PUBLISHED[reads]:
        raise UnsupportedCheckpoint(
            adapter,
            f"was made with an image encoder whose {reads} are {width} wide, and no such one is "
            f"known: name it with --ip-encoder, or put it into ${model_folders.VARIABLE}, "
            "clip_vision",
        )
    return PUBLISHED[reads][width]


def check(path: Path, model: SourceModel, adapter: Path, config: Mapping[str, Any]) -> None:
    """Raise unless a file holds the image encoder that an adapter reads.

    Raises:
        UnsupportedCheckpoint: saying what it holds, or which width is wanted.
    """
    if PART not in model.components:
        there = ", ".join(model.components)
        raise UnsupportedCheckpoint(path, f"holds no image encoder but {there}")
    if not _fits(model, config):
        reads, found = _read(config), _width(model, config)
        raise UnsupportedCheckpoint(
            path,
            f"is not the image encoder of {adapter.name}: its {reads} are {found} wide, and "
            f"{config['image_dim']} is read",
        )


def _candidates(adapter: Path) -> Iterator[Path]:
    for folder in (adapter.parent, adapter.parent.parent, adapter.parent.parent / "models"):
        if (path := folder / PART).is_dir():
            yield path
    yield from model_folders.list("clip_vision").values()


def _fits(model: SourceModel, config: Mapping[str, Any]) -> bool:
    return PART in model.components and _width(model, config) == config["image_dim"]


def _width(model: SourceModel, config: Mapping[str, Any]) -> int:
    key = "projection_dim" if _read(config) == "projection" else "hidden_size"
    return model.components[PART].config[key]


def _read(config: Mapping[str, Any]) -> str:
    """What an adapter reads of its encoder."""
    return "projection" if config["projection"] == "linear" else "tokens"
