"""The container of torch 0.1.10 to 1.5 (.pt, .pth, .ckpt), one file without an archive.

    pickle    the number 0x1950A86A20F9469CFC6C
    pickle    the number 1001, the protocol's version
    pickle    {"protocol_version": 1001, "little_endian": True, "type_sizes": {...}}
    pickle    the object: see torch_tree.py
    pickle    a list of the storages' keys
    then, for each key in that order:
        8 bytes     the number of elements, signed, little-endian
        elements    in the storage's type, which only the object's pickle tells

A storage's persistent id has a sixth field here: None, or ``(key, offset, size)`` where the storage
is itself a view of another one (torch < 0.4).

Refused: another protocol version; big-endian files; keys that are repeated, not text, or not named
by the object; counts that differ from the object's; storages that reach beyond the file; pickles of
more than ``MAX_PICKLES`` bytes together. Pickles that torch did not write are refused by name.
"""

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.pickle_tree import (
    Items,
    Pickle,
    PickleEnds,
    PickleFault,
    parse_pickle,
)
from maple_convert.readers.plain import as_pairs, kind
from maple_convert.readers.source import FileCheckpoint, Placement, SourceFile
from maple_convert.readers.torch_tree import TorchTree, read_tree
from maple_convert.tensors import STORAGE

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
WINDOW = 1 << 20  # bytes read at first in search of the pickles' end
MAX_PICKLES = 64 << 20


def open_torch_legacy(file: SourceFile) -> FileCheckpoint:
    """Read the five pickles; the storages stay in the file."""
    _, protocol, system, body, keys = _pickles(file)
    if protocol.root != PROTOCOL:
        raise InvalidCheckpoint(file.path, f"is not of torch's file protocol {PROTOCOL}")
    for key, value in as_pairs(system.root) or []:
        if key == "little_endian" and value is not True:
            raise UnsupportedCheckpoint(file.path, "was saved on a big-endian machine: not read")
    tree = read_tree(file.path, body)
    starts = _storage_starts(file, tree, keys)
    places: dict[str, Placement] = {}
    for name, view in tree.views.items():
        if view.storage.key not in starts:
            raise InvalidCheckpoint(file.path, f"lacks the storage of tensor {quoted(name)}")
        offset = starts[view.storage.key] + view.offset * STORAGE[view.info.dtype].itemsize
        places[name] = Placement(view.info, offset, None if view.contiguous else view.strides)
    return FileCheckpoint(file, "legacy torch pickle", places, tree.objects, notes=tree.notes)


def _pickles(file: SourceFile) -> tuple[Pickle, Pickle, Pickle, Pickle, Pickle]:
    """The five pickles at the front, whose length only parsing tells."""
    window = WINDOW
    while True:
        data = file.read(0, min(window, file.size))
        try:
            first = parse_pickle(data)
            if first.root != MAGIC:
                raise _not_torch(file, first)
            second = parse_pickle(data, first.end)
            third = parse_pickle(data, second.end)
            fourth = parse_pickle(data, third.end)
            return first, second, third, fourth, parse_pickle(data, fourth.end)
        except PickleEnds as fault:
            if window >= file.size:
                raise InvalidCheckpoint(file.path, f"{fault}: it is truncated") from fault
            if window >= MAX_PICKLES:
                reason = f"its pickles are longer than {MAX_PICKLES} bytes"
                raise InvalidCheckpoint(file.path, reason) from fault
            window *= 8
        except PickleFault as fault:
            raise InvalidCheckpoint(file.path, str(fault)) from fault


def _storage_starts(file: SourceFile, tree: TorchTree, keys: Pickle) -> dict[str, int]:
    """Where each storage's elements begin, from the list of keys and the counts in the file."""
    if not isinstance(keys.root, Items):
        raise InvalidCheckpoint(file.path, f"has {kind(keys.root)} where its storages are listed")
    starts: dict[str, int] = {}
    position = keys.end
    for key in keys.root.values:
        storage = tree.storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.key in starts:
            raise InvalidCheckpoint(file.path, "lists a storage twice or one that it does not use")
        count = int.from_bytes(file.read(position, 8), "little", signed=True)
        if count != storage.size:
            reason = f"storage {quoted(key)} has {count} elements, its pickle says {storage.size}"
            raise InvalidCheckpoint(file.path, reason)
        starts[storage.key] = position + 8
        position += 8 + count * STORAGE[storage.dtype].itemsize
        if position > file.size:
            raise InvalidCheckpoint(
                file.path, f"ends inside storage {quoted(key)}: it is truncated"
            )
    if position != file.size:
        tree.notes.append(f"{file.size - position} bytes after the last storage were not read.")
    return starts


def _not_torch(file: SourceFile, pickle: Pickle) -> UnsupportedCheckpoint:
    if code := pickle.code():
        reason = f"is a pickle that names {', '.join(code[:3])}: it would run code if unpickled"
        return UnsupportedCheckpoint(file.path, reason)
    reason = f"is a pickle of {kind(pickle.root)} that torch.save did not write"
    return UnsupportedCheckpoint(file.path, reason)
