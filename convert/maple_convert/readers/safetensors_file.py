"""The safetensors container.

    bytes            content
    0 .. 7           N, the header's length: unsigned, little-endian, at most 100 MB
    8 .. 8+N-1       the header: a JSON object in UTF-8 that begins with "{" and may be padded with
                     spaces at its end
    8+N .. end       the buffer: the tensors' elements, little-endian, C order

The header maps each name to {"dtype": "F16", "shape": [320, 4], "data_offsets": [begin, end]},
offsets counted from the buffer's start. "__metadata__", if there, maps strings to strings.

Refused: a header longer than the file or than 100 MB; bytes before "{"; JSON that names a key twice
or holds NaN; keys of an entry other than the three; negative or non-integer sizes; a dtype that the
format does not know (malformed) or that nothing here computes with (named as unsupported); a range
that does not fit dtype and shape; ranges that overlap, leave a hole, or do not end with the file.

The safetensors library itself is not used to read: its numpy binding has no bfloat16 and maps the
file into memory. Tests hold this reader against it, on good and on damaged files.
"""

import math
from typing import Any, cast

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.encodings import EIGHT_BITS, Encoding
from maple_convert.readers.json_text import JSONFault, parse_object
from maple_convert.readers.source import FileCheckpoint, Placement, SourceFile
from maple_convert.tensors import STORAGE, TensorInfo

MAX_HEADER = 100_000_000  # the format's own limit
MAX_NDIM = 32  # numpy 1's limit
FIELDS = frozenset({"dtype", "shape", "data_offsets"})  # of an entry, each once
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U32": "uint32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# What a type's tensors are here, the bytes of an element, and how it is spelt if not plainly.
TYPES: dict[str, tuple[str, int, Encoding | None]] = {
    **{name: (kind, STORAGE[kind].itemsize, None) for name, kind in DTYPES.items()},
    **{name: (how.dtype, how.nbytes, how) for name, how in EIGHT_BITS.items()},
}
NOT_COMPUTED = frozenset("U16 U64 C64 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ F6_E2M3 F6_E3M2 F4".split())
# ComfyUI's 8-bit files whose weights need a scale that lies beside each.
SCALED_MARK, SCALES = "scaled_fp8", (".scale_weight", ".weight_scale")


def open_safetensors(file: SourceFile) -> FileCheckpoint:
    """Read the header; the tensors stay in the file."""
    path = file.path
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        reason = f"says its header has {length} bytes, more than safetensors allows"
        raise InvalidCheckpoint(path, reason)
    if 8 + length > file.size:
        reason = f"has {file.size} bytes, but its header alone says {8 + length}: it is truncated"
        raise InvalidCheckpoint(path, reason)
    text = file.read(8, length)
    if not text.startswith(b"{"):
        raise InvalidCheckpoint(path, "its header does not begin with '{'")
    try:
        header = parse_object(text)
    except JSONFault as fault:
        raise InvalidCheckpoint(path, f"its header {fault}") from fault

    metadata = _metadata(file, header.pop("__metadata__", {}))
    buffer = 8 + length
    ranges: list[tuple[int, int, str]] = []
    places: dict[str, Placement] = {}
    for name, entry in header.items():
        info, begin, end, encoding = _entry(file, name, entry)
        ranges.append((begin, end, name))
        places[name] = Placement(info, buffer + begin, encoding=encoding)
    reached = 0
    for begin, end, name in sorted(ranges):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "comes after a hole"
            raise InvalidCheckpoint(
                path, f"tensor {quoted(name)} {what} (byte {begin}, not {reached})"
            )
        reached = end
    if buffer + reached != file.size:
        what = "it is truncated" if buffer + reached > file.size else "bytes follow the last tensor"
        reason = f"has {file.size} bytes, its header describes {buffer + reached}: {what}"
        raise InvalidCheckpoint(path, reason)
    if not places:
        raise UnsupportedCheckpoint(path, "holds no tensors")
    encoded = {place.encoding.name for place in places.values() if place.encoding is not None}
    notes: list[str] = []
    if encoded:
        if scale := next((n for n in places if n == SCALED_MARK or n.endswith(SCALES)), None):
            raise UnsupportedCheckpoint(
                path,
                f"its 8-bit weights need scales that are not read ({quoted(scale)}): use the "
                "model in F16",
            )
        notes.append(f"Its weights have 8 bits ({', '.join(sorted(encoded))}): read as float16.")
    return FileCheckpoint(file, "safetensors", places, metadata=metadata, notes=notes)


def _metadata(file: SourceFile, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidCheckpoint(file.path, "its __metadata__ is not an object of strings")
    result: dict[str, str] = {}
    for key, text in value.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(key, str) or not isinstance(text, str):
            raise InvalidCheckpoint(file.path, "its __metadata__ is not an object of strings")
        result[key] = text
    return result


def _entry(file: SourceFile, name: str, entry: Any) -> tuple[TensorInfo, int, int, Encoding | None]:
    """Check one tensor's description: what it is, its range in the buffer, how it is spelt."""

    def malformed(reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(file.path, f"tensor {quoted(name)}: {reason}")

    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if fields.keys() != FIELDS:
        raise malformed("its entry does not have exactly dtype, shape and data_offsets")
    if not _encodable(name):
        raise malformed("its name is not valid Unicode")
    dtype = fields["dtype"]
    known = TYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        if isinstance(dtype, str) and dtype in NOT_COMPUTED:
            reason = (
                f"tensor {quoted(name)} has type {dtype}, which is not supported: convert it to F16"
            )
            raise UnsupportedCheckpoint(file.path, reason)
        raise malformed(f"unknown type {quoted(dtype)}")
    kind, itemsize, encoding = known
    shape, offsets = _sizes(fields["shape"]), _sizes(fields["data_offsets"])
    if shape is None or len(shape) > MAX_NDIM:
        raise malformed("its shape is not a short list of non-negative integers")
    if offsets is None or len(offsets) != 2:
        raise malformed("its data_offsets are not two non-negative integers")
    begin, end = offsets
    expected = itemsize * math.prod(shape)
    if end - begin != expected:
        found = f"its range has {end - begin} bytes, its type and shape need {expected}"
        raise malformed(found)
    return TensorInfo(kind, shape), begin, end, encoding


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of integers from 0 to 2**63 - 1 as a tuple; None for anything else."""
    if not isinstance(value, list):
        return None
    sizes = tuple(cast("list[Any]", value))
    for n in sizes:
        if type(n) is not int or not 0 <= n < 1 << 63:  # bool is an int, not a size
            return None
    return sizes


def _encodable(name: str) -> bool:
    if name.isascii():
        return True
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
