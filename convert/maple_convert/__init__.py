"""Stable Diffusion checkpoints read, recognised, renamed and written, without torch.

``open_model`` reads any published form and ``inspect`` says what it is; ``convert`` writes another.
"""

from typing import TYPE_CHECKING, Any

from maple_convert.errors import (
    ConvertError,
    InvalidCheckpoint,
    LayoutMismatch,
    UnreadableFile,
    UnsupportedCheckpoint,
)

if TYPE_CHECKING:
    from maple_convert.conversion import Report, convert
    from maple_convert.model import inspect, open_model
    from maple_convert.source import Component, SourceModel
    from maple_convert.write import write_safetensors

__all__ = [
    "Component",
    "ConvertError",
    "InvalidCheckpoint",
    "LayoutMismatch",
    "Report",
    "SourceModel",
    "UnreadableFile",
    "UnsupportedCheckpoint",
    "convert",
    "inspect",
    "open_model",
    "write_safetensors",
]

_HOMES = {
    "Component": "source",
    "Report": "conversion",
    "SourceModel": "source",
    "convert": "conversion",
    "inspect": "model",
    "open_model": "model",
    "write_safetensors": "write",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: reading one name of this package must not cost numpy and every table.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
