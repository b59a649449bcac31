"""GGUF files, made without ggml: by the book, or with any field spoiled."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maple_convert.readers.encodings import GGML

F32, F16, Q4_0, Q8_0, Q4_K, IQ4_NL, BF16 = 0, 1, 2, 8, 12, 20, 30
PLAIN = {"float32": F32, "float16": F16, "int64": 27, "float64": 28}


def text(value: str | bytes) -> bytes:
    """A string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def setting(key: str | bytes, value: Any) -> bytes:
    """A key with its value: a string, a uint32, or a list of int32 or strings."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        strings = bool(value) and isinstance(value[0], str)
        body = b"".join(text(v) if strings else struct.pack("<i", v) for v in value)
        return text(key) + struct.pack("<IIQ", 9, 8 if strings else 5, len(value)) + body
    return text(key) + struct.pack("<II", 4, value)


def entry(name: str | bytes, shape: Iterable[int], kind: int, offset: int) -> bytes:
    """A tensor's description; ``shape`` as numpy has it."""
    axes = [*shape][::-1]
    sizes = struct.pack(f"<{len(axes)}Q", *axes)
    return text(name) + struct.pack("<I", len(axes)) + sizes + struct.pack("<IQ", kind, offset)


def header(
    settings: Iterable[bytes] = (),
    entries: Iterable[bytes] = (),
    *,
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
) -> bytes:
    """Everything before the padding; counts are true unless given."""
    settings, entries = list(settings), list(entries)
    counts = (
        len(entries) if tensors is None else tensors,
        len(settings) if keys is None else keys,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(settings + entries)


def padded(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def packed(array: np.ndarray, kind: int) -> tuple[bytes, np.ndarray]:
    """Some blocks of a quantised form with about an array's size of values, and what they mean."""
    encoding = GGML[kind]
    generator = np.random.default_rng(array.size + kind)
    count = array.size // encoding.elements
    blocks = generator.integers(0, 256, (count, encoding.nbytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = scale
    return blocks.tobytes(), encoding.decode(blocks).reshape(array.shape)


# Where each form keeps its float16 scales.
SCALES = {2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,)}
SCALES |= {12: (0, 2), 13: (0, 2), 14: (208,)}


def save(
    path: Path,
    state: Mapping[str, np.ndarray],
    kind: int | None = None,
    *,
    version: int = 3,
    settings: Mapping[str, Any] | None = None,
    folded: bool = False,
    alignment: int = 32,
) -> dict[str, np.ndarray]:
    """Write arrays; returns them as they must be read.

    Args:
        path: the file.
        state: the arrays.
        kind: quantise every weight of whole rows to this form.
        version: of the container.
        settings: further ones.
        folded: quantise weights of other rows too, folded up as ComfyUI's add-on does.
        alignment: of the tensors.
    """
    keys = dict(settings or {})
    if alignment != 32:
        keys["general.alignment"] = alignment
    entries, data, expected, kinds = [], bytearray(), {}, []
    for name, array in state.items():
        form, raw, shape = PLAIN[array.dtype.name], array.tobytes(), array.shape
        expected[name] = array
        if kind is not None and array.ndim > 1:
            block = GGML[kind].elements
            is_folded = folded and array.shape[-1] % block and not array.size % block
            if is_folded:
                keys[f"comfy.gguf.orig_shape.{name}"] = list(array.shape)
                shape = (array.size // block, block)
            if is_folded or not array.shape[-1] % block:
                raw, expected[name] = packed(array, kind)
                form = kind
        kinds.append(form)
        entries.append(entry(name, shape, form, len(data)))
        data += padded(raw, alignment)
    assert kind is None or kind in kinds, "nothing was quantised"
    head = header([setting(*pair) for pair in keys.items()], entries, version=version)
    path.write_bytes(padded(head, alignment) + data)
    return expected
