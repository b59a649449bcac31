r"""The zip container of torch >= 1.6 (.ckpt, .pt, .pth, .bin).

    <root>/data.pkl      the pickle: see torch_tree.py
    <root>/data/<key>    the bytes of one storage, little-endian
    <root>/byteorder     "little" or "big"; absent before torch 2.1, which wrote little
    <root>/version, .format_version, .storage_alignment, .data/serialization_id    not needed

<root> is the saved file's stem or "archive". Records are stored, never compressed, and their data
begin at multiples of 64 bytes, for which local headers carry padding as an extra field "FB".

    local record      "PK\3\4", 26 bytes of fields, name, extra field, data, [data descriptor]
    ...
    directory entry   "PK\1\2", 42 bytes of fields (sizes, offset), name, extra field, comment
    ...
    zip64 end         "PK\6\6", 52 bytes: 64-bit count, size and offset of the directory
    zip64 locator     "PK\6\7", 16 bytes: where the zip64 end lies
    end               "PK\5\6", 18 bytes: the same in 16 and 32 bits, all ones where too small

The directory decides; local headers only say how long they are themselves. zipfile is not used: it
accepts what this refuses. Refused: bytes before the first record or after the end; several disks;
counts, sizes and offsets that disagree with each other or the file; a directory of more than
``MAX_DIRECTORY`` bytes; encrypted or compressed records; names that are repeated, absolute, hold
"..", a backslash or a NUL; local headers whose name differs; records that overlap; a storage whose
length is not what the pickle says; big-endian files; TorchScript archives, .npz and other zips, by
name. Checksums are not compared: torch does not do so either, and may write constants for them.
"""

import struct
from dataclasses import dataclass

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.pickle_tree import PickleFault, parse_pickle
from maple_convert.readers.source import FileCheckpoint, Placement, SourceFile
from maple_convert.readers.torch_tree import TorchTree, read_tree
from maple_convert.tensors import STORAGE

MAX_DIRECTORY = 16 << 20  # about 200,000 records
MAX_PICKLE = 64 << 20
MAX_COMMENT = 65_535
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
ALL_ONES_16, ALL_ONES_32 = 0xFFFF, 0xFFFFFFFF
ENCRYPTED = 0x2041  # flag bits 0 (encrypted), 6 (strongly), 13 (names masked)


@dataclass(frozen=True)
class Record:
    """One file in the archive: where its bytes lie, how many they are, how they are packed."""

    name: str
    offset: int
    size: int
    method: int = 0


def open_torch_zip(file: SourceFile) -> FileCheckpoint:
    """Read directory and pickle; the storages stay in the file."""
    records = read_directory(file)
    root = _root(file, records)
    order = records.get(f"{root}/byteorder")
    if order is not None:
        word = file.read(order.offset, min(order.size, 16)).strip()
        if word == b"big":
            raise UnsupportedCheckpoint(file.path, "was saved on a big-endian machine: not read")
        if word != b"little":
            raise InvalidCheckpoint(file.path, f"has an unknown byte order {word!r}")
    record = records[f"{root}/data.pkl"]
    if record.size > MAX_PICKLE:
        raise InvalidCheckpoint(file.path, f"has a pickle of {record.size} bytes: too large")
    try:
        pickle = parse_pickle(file.read(record.offset, record.size))
    except PickleFault as fault:
        raise InvalidCheckpoint(file.path, str(fault)) from fault
    tree = read_tree(file.path, pickle)
    return FileCheckpoint(
        file, "torch zip", _places(file, tree, records, root), tree.objects, notes=tree.notes
    )


def _places(
    file: SourceFile, tree: TorchTree, records: dict[str, Record], root: str
) -> dict[str, Placement]:
    places: dict[str, Placement] = {}
    for name, view in tree.views.items():
        key, storage = view.storage.key, view.storage
        record = records.get(f"{root}/data/{key}")
        if record is None:
            reason = f"lacks the record {quoted(f'data/{key}')} of tensor {quoted(name)}"
            raise InvalidCheckpoint(file.path, reason)
        expected = storage.size * STORAGE[storage.dtype].itemsize
        if record.size != expected:
            where = quoted(f"data/{key}")
            reason = f"record {where} has {record.size} bytes, its pickle says {expected}"
            raise InvalidCheckpoint(file.path, reason)
        itemsize = STORAGE[view.info.dtype].itemsize
        places[name] = Placement(
            view.info,
            record.offset + view.offset * itemsize,
            None if view.contiguous else view.strides,
        )
    return places


def _root(file: SourceFile, records: dict[str, Record]) -> str:
    """The one folder that holds data.pkl; other kinds of zip are refused by name."""
    roots = [name[: -len("/data.pkl")] for name in records if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if any(name.endswith(".npy") for name in records) and not roots:
        raise UnsupportedCheckpoint(file.path, "is a NumPy .npz archive, not a torch checkpoint")
    if not roots:
        inner = next((n for n in records if n.endswith((".ckpt", ".safetensors", ".pt"))), None)
        hint = f"unpack {quoted(inner)} from it first" if inner else "it has no */data.pkl"
        reason = f"is a zip archive that torch.save did not write: {hint}"
        raise UnsupportedCheckpoint(file.path, reason)
    if len(roots) > 1:
        raise InvalidCheckpoint(file.path, f"has {len(roots)} files data.pkl, expected one")
    root = roots[0]
    if f"{root}/constants.pkl" in records or any(n.startswith(f"{root}/code/") for n in records):
        reason = "is a TorchScript archive (a program with its weights), not a state dict"
        raise UnsupportedCheckpoint(file.path, reason)
    if packed := [record.name for record in records.values() if record.method != 0]:
        reason = (
            f"its record {quoted(packed[0])} is compressed, which torch never does:"
            " unpack it and zip it again without compression (zip -0)"
        )
        raise UnsupportedCheckpoint(file.path, reason)
    return root


def read_directory(file: SourceFile) -> dict[str, Record]:
    """Every record of a zip by name, checked against the file and against each other."""
    start, size, count = _directory_place(file)
    directory = file.read(start, size)
    records: dict[str, Record] = {}
    spans: list[tuple[int, int]] = []
    position = 0
    for _ in range(count):
        if position + ENTRY.size > size:
            raise _damaged(file, "its directory ends early")
        fields = ENTRY.unpack_from(directory, position)
        signature, _, _, flags, method, _, _, _, packed, length, *rest = fields
        name_length, extra_length, comment_length, disk, _, _, header = rest
        end = position + ENTRY.size + name_length + extra_length + comment_length
        if signature != b"PK\1\2" or end > size:
            raise _damaged(file, "its directory is malformed")
        raw = directory[position + ENTRY.size :][:name_length]
        extra = directory[position + ENTRY.size + name_length :][:extra_length]
        position = end
        name = _name(file, raw)
        length, packed, header = _wide(file, name, extra, length, packed, header)
        if flags & ENCRYPTED:
            raise UnsupportedCheckpoint(file.path, f"its record {quoted(name)} is encrypted")
        if (packed != length and method == 0) or disk != 0:
            raise _damaged(file, f"the sizes of record {quoted(name)} disagree")
        if name in records:
            raise _damaged(file, f"it has two records named {quoted(name)}")
        data = _data_start(file, name, raw, method, header, start)
        if data + packed > start:
            raise _damaged(file, f"its record {quoted(name)} reaches beyond the data")
        spans.append((header, data + packed))
        records[name] = Record(name, data, length, method)
    if position != size:
        raise _damaged(file, "its directory has more bytes than entries")
    if spans and min(spans)[0] != 0:
        raise _damaged(file, "its first record is not at its beginning")
    reached = 0
    for header, end in sorted(spans):
        if header < reached:
            raise _damaged(file, "two of its records overlap")
        reached = end
    return records


def _directory_place(file: SourceFile) -> tuple[int, int, int]:
    """Offset, size and number of entries of the directory."""
    tail_start = max(0, file.size - MAX_COMMENT - END.size)
    tail = file.read(tail_start, file.size - tail_start)
    position = tail.rfind(b"PK\5\6")
    while position >= 0:  # the signature may occur in the comment too
        if len(tail) - position >= END.size:
            fields = END.unpack_from(tail, position)
            if position + END.size + fields[-1] == len(tail):
                break
        position = tail.rfind(b"PK\5\6", 0, position)
    if position < 0:
        if b"\xef\xbf\xbd" in file.read(0, min(file.size, 4096)):
            raise _damaged(file, "its bytes were replaced as if it were text: download it again")
        raise _damaged(file, "it has no end record: it is truncated, download it again")
    _, disk, directory_disk, here, count, size, start, _ = END.unpack_from(tail, position)
    end = tail_start + position
    limit = end
    if end >= LOCATOR.size + END64.size:
        signature, locator_disk, at, disks = LOCATOR.unpack(
            file.read(end - LOCATOR.size, LOCATOR.size)
        )
        if signature == b"PK\6\7":
            limit = end - LOCATOR.size - END64.size
            if at != limit or locator_disk != 0 or disks != 1:
                raise _damaged(file, "its zip64 locator points elsewhere")
            wide = END64.unpack(file.read(at, END64.size))
            if wide[0] != b"PK\6\6" or wide[1] != END64.size - 12:
                raise _damaged(file, "its zip64 end record is malformed")
            wide_fields = wide[4:]
            for short, long, ones in zip(
                (disk, directory_disk, here, count, size, start),
                wide_fields,
                (ALL_ONES_16,) * 4 + (ALL_ONES_32,) * 2,
                strict=True,
            ):
                if short not in (long, ones):
                    raise _damaged(file, "its two end records disagree")
            disk, directory_disk, here, count, size, start = wide_fields
    if disk or directory_disk or here != count:
        raise _damaged(file, "it is one part of several")
    if start + size != limit:
        raise _damaged(file, "its directory is not where its end record says")
    if size > MAX_DIRECTORY or count * ENTRY.size > size:
        raise _damaged(file, f"its directory says {count} records in {size} bytes")
    return start, size, count


def _name(file: SourceFile, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("latin-1")
    parts = name.removesuffix("/").split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise _damaged(file, f"it has a record named {quoted(name)}, which is no plain path")
    return name


def _wide(
    file: SourceFile, name: str, extra: bytes, length: int, packed: int, header: int
) -> tuple[int, int, int]:
    """Sizes and offset with the zip64 extra field put in where a field is all ones."""
    values: list[int] = []
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + size]
        position += 4 + size
        if kind == 1:
            values = [int.from_bytes(body[i : i + 8], "little") for i in range(0, len(body) - 7, 8)]
    result: list[int] = []
    for value in (length, packed, header):
        if value == ALL_ONES_32:
            if not values:
                raise _damaged(file, f"its record {quoted(name)} lacks the zip64 field")
            value = values.pop(0)
        result.append(value)
    return result[0], result[1], result[2]


def _data_start(
    file: SourceFile, name: str, raw: bytes, method: int, header: int, limit: int
) -> int:
    """Where a record's data begin, behind its local header."""
    if header + LOCAL.size + len(raw) > limit:
        raise _damaged(file, f"its record {quoted(name)} begins beyond the data")
    local = file.read(header, LOCAL.size + len(raw))
    fields = LOCAL.unpack_from(local)
    signature, flags, local_method, name_length, extra_length = (
        fields[i] for i in (0, 2, 3, 9, 10)
    )
    if signature != b"PK\3\4" or name_length != len(raw) or local[LOCAL.size :] != raw:
        raise _damaged(file, f"the local header of record {quoted(name)} names another")
    if flags & ENCRYPTED or local_method != method:
        raise _damaged(file, f"the local header of record {quoted(name)} packs it otherwise")
    return header + LOCAL.size + name_length + extra_length


def _damaged(file: SourceFile, reason: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(file.path, f"is a damaged zip archive: {reason}")
