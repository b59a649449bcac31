"""The GGUF container of ggml, versions 2 and 3, as stable-diffusion.cpp and ComfyUI's add-on write.

    bytes            content, all little-endian
    0 .. 3           "GGUF"
    4 .. 7           version
    8 .. 15          T, the number of tensors
    16 .. 23         K, the number of settings
    then K times     a key (string), a type (uint32), a value of it
    then T times     a name (string), the number of axes (uint32), the length of each (uint64), the
                     innermost axis first, a type (uint32), an offset (uint64)
    then             zeros up to a multiple of "general.alignment" (32 unless set): offsets count
                     from there, and each is such a multiple

A string is its length (uint64) and that many bytes of UTF-8; an array is the type of its elements
(uint32), their number (uint64) and they. Weights may be quantised: see encodings.py. Axes of length
1 at the outer end are not written; a setting ``comfy.gguf.orig_shape.NAME`` gives the shape of a
tensor that was folded up, as ggml has four axes at most and quantises whole rows.

Refused: other versions, and files that state that they are of a network other than Stable
Diffusion's; more settings, tensors, elements or text than any published file has, before memory is
taken for them; unknown types; a name or key twice; ranges outside the file, that overlap or leave
more room than alignment asks.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.encodings import GGML, Encoding
from maple_convert.readers.source import FileCheckpoint, Placement, SourceFile
from maple_convert.tensors import STORAGE, TensorInfo

VERSIONS = (2, 3)
MAX_SETTINGS = 10_000
MAX_TENSORS = 100_000
MAX_ELEMENTS = 2_000_000  # of all arrays of strings and arrays together
MAX_NAME = 1 << 12  # bytes
MAX_TEXT = 1 << 25  # bytes of all strings that are kept, together
MAX_DEPTH = 4  # arrays in arrays
MAX_AXES = 4  # ggml's own
MAX_FOLDED_AXES = 8
WINDOW = 1 << 20  # bytes of the header read at once

UINT8, BOOL, STRING, ARRAY = 0, 7, 8, 9
SCALARS = {
    UINT8: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    BOOL: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
PLAIN = {
    0: "float32",
    1: "float16",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    30: "bfloat16",
}
# Types of ggml that nothing here reads.
NOT_READ = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
ARCHITECTURE = "general.architecture"
ALIGNMENT = "general.alignment"
FOLDED = "comfy.gguf.orig_shape."
LENGTH = struct.Struct("<Q")  # of a string, before it
OURS = frozenset({"", "sd1", "sd2", "sdxl"})  # architectures; stable-diffusion.cpp states none


def open_gguf(file: SourceFile) -> FileCheckpoint:
    """Read the header; the tensors stay in the file."""
    path, header = file.path, _Header(file)
    header.skip(4)
    version = header.number("<I")
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            raise UnsupportedCheckpoint(path, "is a big-endian GGUF file, which is not read")
        raise UnsupportedCheckpoint(
            path, f"is a GGUF file of version {version}, and versions 2 and 3 are read"
        )
    count, settings = header.number("<Q"), header.number("<Q")
    for number, what, most in (
        (count, "tensors", MAX_TENSORS),
        (settings, "settings", MAX_SETTINGS),
    ):
        if number > most:
            raise InvalidCheckpoint(path, f"says that it has {number} {what}, more than {most}")
    known = header.settings(settings)
    architecture = known.get(ARCHITECTURE, "")
    if not isinstance(architecture, str) or architecture.lower() not in OURS:
        raise UnsupportedCheckpoint(
            path, f"is a GGUF file of {quoted(architecture)}, which is no Stable Diffusion model"
        )
    if count == 0:
        raise UnsupportedCheckpoint(path, "holds no tensors")
    listed = _with_linear_doors([_entry(header, known) for _ in range(count)])
    places = _places(file, listed, header.at, _alignment(file, known))
    encoded = {place.encoding.name for place in places.values() if place.encoding is not None}
    notes: list[str] = []
    if encoded:
        notes.append(
            f"Its weights are quantised ({', '.join(sorted(encoded))}), and read as floats."
        )
    metadata = {
        key: str(value) for key, value in known.items() if not isinstance(value, list | tuple)
    }
    return FileCheckpoint(file, f"GGUF version {version}", places, metadata=metadata, notes=notes)


class _Header:
    """The header's values one after the other, a window of the file at a time."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.at = 0
        self._window, self._start = b"", 0
        self._elements = self._text = 0

    def bytes(self, count: int) -> bytes:
        """The next bytes, which must be in the file."""
        if count > self.file.size - self.at:
            raise InvalidCheckpoint(self.file.path, "ends within its header: it is truncated")
        begin = self.at - self._start
        if begin + count > len(self._window):
            size = min(max(WINDOW, count), self.file.size - self.at)
            self._window, self._start, begin = self.file.read(self.at, size), self.at, 0
        self.at += count
        return self._window[begin : begin + count]

    def skip(self, count: int) -> None:
        """Pass over bytes without reading them; they must be in the file."""
        if count > self.file.size - self.at:
            raise InvalidCheckpoint(self.file.path, "ends within its header: it is truncated")
        self.at += count
        if self.at > self._start + len(self._window):
            self._window, self._start = b"", self.at

    def number(self, form: str) -> Any:
        """One number."""
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self, most: int, what: str) -> str:
        """One string of at most so many bytes."""
        length = self.number("<Q")
        if length > most:
            raise InvalidCheckpoint(self.file.path, f"has a {what} of {length} bytes")
        self._text += length
        if self._text > MAX_TEXT:
            raise InvalidCheckpoint(self.file.path, "has more text in its header than is read")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidCheckpoint(self.file.path, f"has a {what} that is not UTF-8") from error

    def settings(self, count: int) -> dict[str, Any]:
        """The settings: numbers and strings as they are, the integers of a shape, others None."""
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(MAX_NAME, "setting's name")
            if key in found:
                raise InvalidCheckpoint(self.file.path, f"has the setting {quoted(key)} twice")
            kind = self.number("<I")
            found[key] = self._array(key) if kind == ARRAY else self._value(kind)
        return found

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text(MAX_TEXT, "setting")
        if kind not in SCALARS:
            raise InvalidCheckpoint(self.file.path, f"has a setting of the unknown type {kind}")
        value = self.number(SCALARS[kind])
        return bool(value) if kind == BOOL else value

    def _array(self, key: str = "", depth: int = 1) -> tuple[int, ...] | None:
        """An array, passed over unless it is a folded tensor's shape."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            form = SCALARS[kind]
            if key.startswith(FOLDED) and count <= MAX_FOLDED_AXES and form[-1] not in "fd":
                return tuple(self.number(form) for _ in range(count))
            self.skip(count * struct.calcsize(form))
            return None
        if kind not in (STRING, ARRAY):
            raise InvalidCheckpoint(self.file.path, f"has an array of the unknown type {kind}")
        if depth == MAX_DEPTH:
            raise InvalidCheckpoint(self.file.path, "has arrays nested deeper than are read")
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise InvalidCheckpoint(self.file.path, "has arrays of more elements than are read")
        if kind == STRING:
            self._pass_over_texts(count)
            return None
        for _ in range(count):
            self._array(depth=depth + 1)
        return None

    def _pass_over_texts(self, count: int) -> None:
        """Strings of an array: a vocabulary has a hundred thousand, a hostile file two million."""
        while count:
            window, begin = self._window, self.at - self._start
            last = len(window) - LENGTH.size
            while count and begin <= last:
                end = begin + LENGTH.size + LENGTH.unpack_from(window, begin)[0]
                if end > len(window):
                    break
                begin, count = end, count - 1
            self.at = self._start + begin
            if count:  # one that ends beyond the window, or begins there
                self.skip(self.number("<Q"))
                count -= 1


@dataclass(frozen=True)
class _Listed:
    """One tensor as the header describes it; the offset counts from where the tensors begin."""

    name: str
    info: TensorInfo
    encoding: Encoding | None
    offset: int
    nbytes: int


def _entry(header: _Header, known: Mapping[str, Any]) -> _Listed:
    """Read one tensor's description and check it by itself."""
    name = header.text(MAX_NAME, "tensor's name")

    def malformed(reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(header.file.path, f"tensor {quoted(name)}: {reason}")

    axes = header.number("<I")
    if axes > MAX_AXES:
        raise malformed(f"has {axes} axes, more than {MAX_AXES}")
    lengths = [cast(int, header.number("<Q")) for _ in range(axes)]
    kind, offset = header.number("<I"), header.number("<Q")
    count = 1
    for length in lengths:
        count *= length
    if not 0 < count < 1 << 62:
        raise malformed(f"has {count} elements")
    shape = tuple(reversed(lengths))
    folded = known.get(FOLDED + name)
    if folded is not None:
        if not isinstance(folded, tuple):
            raise malformed("has a shape that is no list of whole numbers")
        shape, unfolded = cast("tuple[int, ...]", folded), 1
        for length in shape:
            unfolded *= length
        if unfolded != count or min(shape, default=1) < 1:
            raise malformed(f"has the shape {shape} and {count} elements")
    if kind in PLAIN:
        info = TensorInfo(PLAIN[kind], shape)
        return _Listed(name, info, None, offset, count * STORAGE[info.dtype].itemsize)
    if kind not in GGML:
        if kind in NOT_READ:
            raise UnsupportedCheckpoint(
                header.file.path,
                f"tensor {quoted(name)} is quantised to {NOT_READ[kind]}, which is not read: use "
                "the model in Q8_0 or F16",
            )
        raise malformed(f"is of the unknown type {kind}")
    encoding = GGML[kind]
    if (lengths[0] if lengths else 1) % encoding.elements:
        raise malformed(
            f"has rows of {lengths[0] if lengths else 1}, which {encoding.name} cannot hold"
        )
    nbytes = count // encoding.elements * encoding.nbytes
    return _Listed(name, TensorInfo(encoding.dtype, shape), encoding, offset, nbytes)


_UNET = "model.diffusion_model."
_DOORS = (".proj_in.weight", ".proj_out.weight")
_CONTEXT = ".attn2.to_k.weight"
_SD2_CONTEXT = 1024


def _with_linear_doors(listed: list[_Listed]) -> list[_Listed]:
    """Take two axes off the doors of SD 2.x's and SDXL's transformers, which are linear layers.

    stable-diffusion.cpp writes those of every family as the 1x1 convolutions that they are in
    SD 1.x alone, by which the families are told apart.
    """
    is_linear = any(
        one.name.startswith(f"{_UNET}label_emb.")
        or (one.name.endswith(_CONTEXT) and one.info.shape[1:] == (_SD2_CONTEXT,))
        for one in listed
    )
    if not is_linear:
        return listed
    return [
        replace(one, info=TensorInfo(one.info.dtype, one.info.shape[:2]))
        if one.name.startswith(_UNET) and one.name.endswith(_DOORS) and one.info.shape[2:] == (1, 1)
        else one
        for one in listed
    ]


def _alignment(file: SourceFile, known: Mapping[str, Any]) -> int:
    alignment = known.get(ALIGNMENT, 32)
    is_power = isinstance(alignment, int) and 0 < alignment <= 1 << 16
    if not is_power or alignment & (alignment - 1):
        raise InvalidCheckpoint(file.path, f"aligns its tensors to {quoted(alignment)}")
    return alignment


def _places(
    file: SourceFile, listed: list[_Listed], header: int, alignment: int
) -> dict[str, Placement]:
    """Where the tensors lie, in the order of the header; together they must fill the file."""
    start = _aligned(header, alignment)
    places: dict[str, Placement] = {}
    for one in listed:
        if one.name in places:
            raise InvalidCheckpoint(file.path, f"holds the tensor {quoted(one.name)} twice")
        places[one.name] = Placement(one.info, start + one.offset, encoding=one.encoding)
    reached = 0
    for one in sorted(listed, key=lambda one: one.offset):
        if one.offset != _aligned(reached, alignment):
            what = "overlaps the tensor before it" if one.offset < reached else "is out of place"
            raise InvalidCheckpoint(
                file.path, f"tensor {quoted(one.name)} {what} (byte {one.offset}, not {reached})"
            )
        reached = one.offset + one.nbytes
    if start + reached > file.size:
        reason = f"has {file.size} bytes, its header describes {start + reached}: it is truncated"
        raise InvalidCheckpoint(file.path, reason)
    if file.size - start - reached > alignment:
        raise InvalidCheckpoint(file.path, "has bytes behind its last tensor")
    return places


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
