"""LoRA and its kin: differences to a network's weights, put in before it is made ready to draw.

Source   Hu et al. 2021 (arXiv:2106.09685), section 4.1. The forms and their arithmetic are in
         convert/maple_convert/updates.py, whose updates come here ready to be used.

A weight is read, changed in float32 and cast back, one after the other. Nothing of the old weight
is kept: without the LoRA the network is read from its file again, and is what it was, bit for bit.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_maple.adapters.textual_inversion import Word

MOST_WEIGHT = 100.0  # A1111 has no bound; beyond this a picture is noise, and soon not finite


class Update(Protocol):
    """The change of one parameter."""

    def changed(self, values: NDArray[Any], strength: float) -> NDArray[Any]:
        """The parameter's values (float32, native layout) with the difference in them."""
        ...

    def low_rank(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Two factors whose product, in the native shape, is all that is added; or None."""
        ...


@dataclass(frozen=True, eq=False)
class Lora:
    """A file of differences, read for one model.

    Attributes:
        name: to call it by.
        updates: by network and native name of the parameter.
        identity: of the file and its state: equal for two readings of one file.
        notes: what of it did not fit.
        words: textual inversions that came with it.
    """

    name: str
    updates: Mapping[str, Mapping[str, Update]]
    identity: object
    notes: Sequence[str] = ()
    words: Sequence[Word] = ()


@dataclass(frozen=True)
class Choice:
    """A LoRA that is asked for, and how strongly.

    Attributes:
        name: of a file, or as it is called in the models' folders.
        text: strength in the text encoders.
        unet: in the UNet.
    """

    name: str
    text: float = 1.0
    unet: float = 1.0

    def __post_init__(self) -> None:
        for weight in (self.text, self.unet):
            if not abs(weight) <= MOST_WEIGHT:  # NaN, too
                most = f"{MOST_WEIGHT:g}"
                raise ValueError(
                    f"a LoRA's weight must be from -{most} to {most}, got {weight:g} ({self.name})."
                )

    def strength(self, part: str) -> float:
        """In one of the networks."""
        return self.unet if part == "unet" else self.text

    def __str__(self) -> str:
        """As ``read_choice`` reads it."""
        if self.text == self.unet:
            return f"{self.name}:{self.unet:g}"
        return f"{self.name}:unet={self.unet:g},te={self.text:g}"


def read_choice(text: str) -> Choice:
    r"""Read ``NAME``, ``NAME:0.8`` or ``NAME:unet=0.8,te=0.5``; what is not said is 1.

    A colon with something else behind it belongs to the name, as in ``C:\\style.safetensors``.

    Raises:
        ValueError: for a weight out of bounds, or no name.
    """
    text = text.strip()
    name, colon, end = text.rpartition(":")
    weights = _weights(end) if colon else None
    if weights is None:
        name, weights = text, {}
    if not name.strip():
        raise ValueError(f"a LoRA needs a name, got {text!r}.")
    return Choice(name, **weights)


def read_choices(given: Any) -> list[Choice]:
    """Read what a caller asks for: any number of LoRAs.

    Args:
        given: a sequence of texts as ``read_choice`` takes them, of pairs of a name and a weight,
            of paths or of choices; or one text with ";" between.

    Raises:
        ValueError: for what is none of these, or a weight out of bounds.
    """
    if isinstance(given, str):
        given = [text for text in given.split(";") if text.strip()]
    choices = []
    try:
        for one in given:
            if isinstance(one, Choice):
                choices.append(one)
            elif isinstance(one, tuple | list):
                name, weight = one
                choices.append(Choice(str(name), float(weight), float(weight)))
            else:
                choices.append(read_choice(os.fspath(one)))
    except TypeError:
        raise ValueError("loras must be names of files, such as 'style.safetensors:0.8'.") from None
    return choices


def _weights(text: str) -> dict[str, float] | None:
    """Of ``0.8`` or ``unet=0.8,te=0.5``; None where it is neither."""
    number = _number(text)
    if number is not None:
        return {"text": number, "unet": number}
    found: dict[str, float] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        number = _number(value)
        name = {"unet": "unet", "te": "text"}.get(key.strip().lower())
        if name is None or number is None or name in found:
            return None
        found[name] = number
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def fold(network: nn.Module, part: str, chosen: Sequence[tuple[Lora, Choice]]) -> None:
    """Put differences into a network's weights, in order, one weight after the other.

    Args:
        network: plain, as models/ has it; its weights may be still to be read, and may be
            quantised: those are dequantised, changed and quantised again.
        part: which of a model's networks it is.
        chosen: what to put in, and how strongly.
    """
    changes: dict[str, list[tuple[Update, float]]] = {}
    for lora, choice in chosen:
        strength = choice.strength(part)
        if strength:
            for name, update in lora.updates.get(part, {}).items():
                changes.setdefault(name, []).append((update, strength))
    if not changes:
        return
    leaves = dict(network.named_modules())
    for name, updates in changes.items():
        path, _, leaf_name = name.rpartition(".")
        leaf: Any = leaves[path]
        values = _values(leaf, leaf_name).astype(mx.float32)
        for update, strength in updates:
            values = _changed(values, update, strength)
        _put(leaf, leaf_name, values)


def _changed(values: mx.array, update: Update, strength: float) -> mx.array:
    """A parameter with one difference in it; a low-rank one's product is the device's to make."""
    factors = update.low_rank()
    if factors is None:
        return mx.array(update.changed(np.array(values), strength))
    up, down = (mx.array(factor) for factor in factors)
    return values + strength * (up @ down).reshape(values.shape)


def changed_parts(lora: Lora) -> Iterator[str]:
    """The networks that a LoRA changes."""
    return (part for part, updates in lora.updates.items() if updates)


def _values(leaf: Any, name: str) -> mx.array:
    """A parameter in its native shape, dequantised."""
    if name != "weight" or "scales" not in leaf:
        return leaf[name]
    flat = mx.dequantize(leaf.weight, leaf.scales, leaf.biases, leaf.group_size, leaf.bits)
    return flat.reshape(getattr(leaf, "shape", flat.shape))


def _put(leaf: Any, name: str, values: mx.array) -> None:
    """Store a parameter as it was stored before, computed and not put off."""
    if name != "weight" or "scales" not in leaf:
        leaf[name] = values.astype(leaf[name].dtype)
        mx.eval(leaf[name])
        return
    matrix = values.reshape(values.shape[0], -1).astype(leaf.scales.dtype)
    leaf.weight, leaf.scales, leaf.biases = mx.quantize(matrix, leaf.group_size, leaf.bits)
    mx.eval(leaf.weight, leaf.scales, leaf.biases)
