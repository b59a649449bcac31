"""What the network comparisons share: errors against the reference, bars, and the same weights."""

import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import maple_convert

sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))
import recipe

FP16_COSINE = 0.9999

Record = Callable[..., None]


class Bar:
    """How far a float32 output may be from the reference's: design.md, section 6."""

    def __init__(self, rms: float, max_error: float) -> None:
        self.rms = rms
        self.max_error = max_error

    def __str__(self) -> str:
        return f"rms <= {self.rms:g}, max <= {self.max_error:g}"

    def passes(self, figures: dict[str, float]) -> bool:
        return figures["rms"] <= self.rms and figures["max_error"] <= self.max_error


NETWORK = Bar(rms=2e-5, max_error=2.4e-4)  # text states and the UNet's output
AUTOENCODER = Bar(rms=3e-5, max_error=1e-3)


def figures(ours: mx.array, reference: np.ndarray) -> dict[str, float]:
    """Largest error, rms error as a part of the reference's std, cosine; in double precision."""
    a = np.array(ours.astype(mx.float32), np.float64)
    b = np.asarray(reference, np.float64)
    assert a.shape == b.shape
    error = a - b
    return {
        "max_error": float(np.abs(error).max()),
        "rms": float(np.sqrt(np.mean(error**2)) / b.std()),
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
    }


def compare(record: Record, name: str, ours: mx.array, reference: np.ndarray, bar: Bar) -> None:
    """Record one float32 quantity and hold it to its bar."""
    assert ours.dtype == mx.float32
    found = figures(ours, reference)
    record(name, **found, bar=str(bar))
    assert bar.passes(found), f"{name}: {found}, bar {bar}"


def compare_half(record: Record, name: str, ours: mx.array, reference: np.ndarray) -> None:
    """Record one float16 quantity; its direction must be the float32 reference's."""
    assert ours.dtype == mx.float16
    found = figures(ours, reference)
    record(name, **found, bar=f"cosine >= {FP16_COSINE}")
    assert found["cosine"] >= FP16_COSINE, f"{name}: {found}"


def control(record: Record, name: str, ours: mx.array, reference: np.ndarray, bar: Bar) -> None:
    """Record a network broken on purpose; it must miss the bar."""
    found = figures(ours, reference)
    record(f"control: {name}", **found, bar=f"must miss {bar}")
    assert not bar.passes(found), f"{name} goes unnoticed: {found}, bar {bar}"


def fill(module: nn.Module) -> nn.Module:
    """Give every parameter the recipe's value of its name, as tests/golden/reference.py does."""
    module.load_weights(
        [
            (name, mx.array(recipe.value(name, tuple(array.shape))))
            for name, array in tree_flatten(module.parameters())
        ]
    )
    return module


def trained(path: Path, component: str, build: Callable[[dict], nn.Module]) -> nn.Module:
    """A component of a published file as a user gets it: through the converter, in float32."""
    with maple_convert.open_model(path) as model:
        part = model.components[component]
        module = build(part.config)
        module.load_weights(
            [(name, mx.array(tensor.array)) for name, tensor in part.tensors("float32")]
        )
    return module


def set_weight(module: nn.Module, name: str, change: Callable[[mx.array], mx.array]) -> None:
    """Replace one parameter by ``change`` of it."""
    parameters = dict(tree_flatten(module.parameters()))
    module.load_weights([(name, change(parameters[name]))], strict=False)


def half(module: nn.Module) -> nn.Module:
    """The same module with its weights rounded to float16."""
    module.set_dtype(mx.float16)
    return module
