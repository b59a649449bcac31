"""Files as ``torch.save`` writes them, written without torch.

For tests: state dicts of numpy arrays become torch zip or legacy files, and awkward cases (views,
shared storages, parameters, strangers' classes) are spelled with the small classes below.
``tests/parity/test_readers.py`` holds every byte against the real ``torch.save``.

    write_torch_zip(path, {"state_dict": {"weight": np.zeros((2, 3), np.float32)}})
    write_legacy(path, OrderedDict(weight=TorchTensor(Storage(bits, "bfloat16"), 0, (4,), (1,))))
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

STORAGE_CLASSES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
ALIGNMENT = 64  # torch starts every record of a zip at a multiple of this
UINT32_MAX = 0xFFFFFFFF


class Global:
    """Something that is pickled as the global ``module.name``, whether or not that exists here."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


class Call:
    """Something that is pickled as ``function(*args)``, with ``state`` set by BUILD if given."""

    def __init__(self, function: object, args: tuple = (), state: object = None) -> None:
        self.function = function
        self.args = args
        self.state = state


class Storage:
    """A flat run of elements, as torch stores it; bfloat16 comes as uint16 bit patterns."""

    def __init__(
        self,
        array: np.ndarray,
        dtype: str | None = None,
        location: str = "cpu",
        view: object = None,
    ) -> None:
        self.array = np.ascontiguousarray(array).reshape(-1)
        self.dtype = dtype if dtype is not None else self.array.dtype.name
        self.location = location
        self.view = view  # legacy only: (key, offset, size) of a view into this storage


class TorchTensor:
    """A view of a storage: the arguments of ``torch._utils._rebuild_tensor_v2``."""

    def __init__(
        self,
        storage: Storage,
        offset: int = 0,
        shape: Sequence[int] = (),
        stride: Sequence[int] = (),
        requires_grad: bool = False,
    ) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = tuple(shape)
        self.stride = tuple(stride)
        self.requires_grad = requires_grad


class Hole:
    """Zeros that a record has and the disk does not: they are skipped in a sparse file."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def tensor(array: np.ndarray, dtype: str | None = None, **keywords: Any) -> TorchTensor:
    """A contiguous tensor with a storage of its own."""
    stride, step = [], 1
    for n in reversed(array.shape):
        stride.insert(0, step)
        step *= max(n, 1)
    return TorchTensor(Storage(array, dtype), 0, array.shape, stride, **keywords)


def bfloat16(values: np.ndarray) -> TorchTensor:
    """Float values cut to bfloat16 (their upper 16 bits)."""
    bits = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return tensor(bits.reshape(values.shape), "bfloat16")


def parameter(value: TorchTensor | np.ndarray) -> Call:
    """A ``torch.nn.Parameter``."""
    inner = tensor(value) if isinstance(value, np.ndarray) else value
    return Call(Global("torch._utils", "_rebuild_parameter"), (inner, True, OrderedDict()))


class _Pickler(pickle._Pickler):  # the Python one: its save_global can be taught new names
    """Protocol 2 with torch's persistent ids, memoising what the C pickler memoises."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO, protocol: int, legacy: bool, oldest: bool) -> None:
        super().__init__(file, protocol)
        self.storages: dict[int, tuple[str, Storage]] = {}
        self.legacy = legacy
        self.oldest = oldest
        self._globals: dict[tuple[str, str], Global] = {}
        self._keep: list[object] = []  # the memo goes by id(): nothing may be freed meanwhile

    def _named(self, module: str, name: str) -> Global:
        return self._globals.setdefault((module, name), Global(module, name))

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Storage):
            return None
        key, _ = self.storages.setdefault(id(obj), (self._key(), obj))
        if self.legacy:
            key = str(int(key))  # the old format spells the key anew each time
        kind = self._named("torch", STORAGE_CLASSES[obj.dtype])
        record = ("storage", kind, key, obj.location, obj.array.size)
        record += (obj.view,) if self.legacy else ()
        self._keep.append(record)
        return record

    def _key(self) -> str:
        return str((94000000000000 if self.legacy else 0) + len(self.storages))

    def reducer_override(self, obj: object) -> object:
        if isinstance(obj, np.ndarray):
            obj = tensor(obj)
        if isinstance(obj, TorchTensor):
            args = (obj.storage, obj.offset, obj.shape, obj.stride)
            if self.oldest:
                result = (self._named("torch._utils", "_rebuild_tensor"), args)
            else:
                rest = (obj.requires_grad, OrderedDict())
                result = (self._named("torch._utils", "_rebuild_tensor_v2"), args + rest)
        elif isinstance(obj, Call):
            function = obj.function
            if isinstance(function, Global):
                function = self._named(function.module, function.name)
            result = (function, obj.args) + (() if obj.state is None else (obj.state,))
        else:
            return NotImplemented
        self._keep.append((obj, result))
        return result

    def save_reduce(self, func: Any, args: Any, *rest: Any, **keywords: Any) -> None:
        if isinstance(func, Global | Call):  # save_reduce insists on a callable
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
            obj = keywords.get("obj")
            if obj is not None:
                self.memoize(obj)
            if rest and rest[0] is not None:
                self.save(rest[0])
                self.write(pickle.BUILD)
        else:
            super().save_reduce(func, args, *rest, **keywords)

    def _save_global(self, obj: Global) -> None:
        first = self._named(obj.module, obj.name)
        if first is not obj:
            self._keep.append(obj)
            return self.save(first)
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    dispatch[Global] = _save_global


def pickled(
    tree: object, *, protocol: int = 2, legacy: bool = False, oldest: bool = False
) -> tuple[bytes, list[tuple[str, Storage]]]:
    """The pickle of a tree and the storages that it refers to, with their keys."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol, legacy, oldest)
    pickler.dump(tree)
    return buffer.getvalue(), list(pickler.storages.values())


def write_legacy(
    path: Path | str, tree: object, *, oldest: bool = False, protocol: int = 2
) -> Path:
    """What ``torch.save(..., _use_new_zipfile_serialization=False)`` writes.

    Args:
        path: where to.
        tree: dictionaries, lists, numbers, numpy arrays and the classes above.
        oldest: name ``_rebuild_tensor`` as torch 0.1 did.
        protocol: of the pickles.
    """
    path = Path(path)
    stream, storages = pickled(tree, protocol=protocol, legacy=True, oldest=oldest)
    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": LEGACY_PROTOCOL, "little_endian": True, "type_sizes": sizes}
    storages.sort(key=lambda pair: pair[0])
    with path.open("wb") as file:
        for head in (LEGACY_MAGIC, LEGACY_PROTOCOL, system):
            pickle.dump(head, file, protocol)
        file.write(stream)
        pickle.dump([key for key, _ in storages], file, protocol)
        for _, storage in storages:
            file.write(struct.pack("<q", storage.array.size))
            file.write(memoryview(storage.array).cast("B") if storage.array.size else b"")
    return path


def write_torch_zip(
    path: Path | str,
    tree: object,
    *,
    root: str | None = None,
    protocol: int = 2,
    byteorder: str | None = "little",
    serialization_id: str = "0" * 40,
) -> Path:
    """What ``torch.save`` writes since 1.6.

    Args:
        path: where to.
        tree: dictionaries, lists, numbers, numpy arrays and the classes above.
        root: the folder inside the archive; torch takes the file's stem.
        protocol: of the pickle.
        byteorder: the record of that name; None leaves it out, as torch before 2.1 did.
        serialization_id: torch's checksum over records, which no reader needs.
    """
    path = Path(path)
    stream, storages = pickled(tree, protocol=protocol)
    records: list[tuple[str, Any]] = [("data.pkl", stream)]
    if byteorder is not None:
        records += [(".format_version", b"1"), (".storage_alignment", b"64")]
        records += [("byteorder", byteorder.encode())]
    records += [(f"data/{key}", storage.array) for key, storage in storages]
    records += [("version", b"3\n"), (".data/serialization_id", serialization_id.encode())]
    write_records(path, [(f"{path.stem if root is None else root}/{n}", d) for n, d in records])
    return path


def write_records(path: Path | str, records: Sequence[tuple[str, Any]]) -> Path:
    """A zip laid out as torch's writer does: stored, data aligned to 64 bytes, zip64 trailer."""
    path = Path(path)
    directory = b""
    with path.open("wb") as file:
        for name, data in records:
            raw = name.encode()
            hole = isinstance(data, Hole)
            view = data if hole else memoryview(data).cast("B") if len(data) else memoryview(b"")
            start = file.tell()
            wide = max(start, view.nbytes) >= UINT32_MAX
            data_start = start + 30 + len(raw) + 4
            padding = -data_start % ALIGNMENT
            extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            # Bit 3: sizes follow the data, not here (an empty record has none); bit 11: UTF-8 name.
            flags = 0x808 if view.nbytes else 0x800
            head = struct.pack(
                "<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(raw), len(extra)
            )
            file.write(head + raw + extra)
            crc = 0 if hole else zlib.crc32(view)
            if view.nbytes:
                sizes = struct.pack("<2Q" if wide else "<2I", view.nbytes, view.nbytes)
                file.seek(view.nbytes, 1) if hole else file.write(view)
                file.write(b"PK\7\x08" + struct.pack("<I", crc) + sizes)
            long = b""
            size, offset = view.nbytes, start
            if size >= UINT32_MAX:
                long += struct.pack("<2Q", size, size)
                size = UINT32_MAX
            if offset >= UINT32_MAX:
                long += struct.pack("<Q", offset)
                offset = UINT32_MAX
            long = struct.pack("<2H", 1, len(long)) + long if long else b""
            directory += struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size, size,
                len(raw), len(long), 0, 0, 0, 0, offset,
            ) + raw + long  # fmt: skip
        start, count = file.tell(), len(records)
        file.write(directory)
        file.write(
            struct.pack(
                "<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(directory), start
            )
        )
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1))
        short = (min(count, 0xFFFF), min(count, 0xFFFF), len(directory), min(start, UINT32_MAX))
        file.write(struct.pack("<4s2H2H2IH", b"PK\5\6", 0, 0, *short, 0))
    return path
