"""What a torch pickle means: tensors by name, and the rest as plain values.

torch writes a tensor as a call, here left unmade, whose first argument refers to a storage:

    torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)
    storage = persistent id ("storage", torch.HalfStorage, key, device, size [, view])

offset, stride and size count elements of the storage's type. The key leads to the bytes, which lie
outside the pickle. ``_rebuild_tensor`` (torch 0.1) has the first four arguments only;
``_rebuild_tensor_v3`` adds a dtype, for storages that have none; ``_rebuild_parameter`` wraps a
tensor; ``_rebuild_from_type_v2`` wraps the call of a tensor subclass.

Dictionaries, lists and pickled ``torch.nn`` modules are walked, their keys joined with dots.
Everything else becomes an inert ``Stub`` or plain value in ``objects``.

Refused: a tensor outside its storage; negative or non-integer sizes; more than 32 dimensions; a
storage that is named with two types or sizes; two tensors of one name; quantised, sparse, complex
and 8-bit float tensors, by name; nesting deeper than ``MAX_DEPTH``; a walk of more than
``MAX_NODES`` steps, as trees with exponentially shared nodes or cycles need.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from maple_convert.errors import ConvertError, InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.pickle_tree import Call, Global, Items, PersistentId, Pickle
from maple_convert.readers.plain import PlainValues, as_pairs, kind, label
from maple_convert.tensors import STORAGE, TensorInfo

MAX_NODES = 100_000  # a training checkpoint of SDXL has about 20,000
ATOMS_PER_NODE = 32  # numbers in a list pass so much quicker than containers
MAX_DEPTH = 64
MAX_NDIM = 32  # numpy 1's limit
MAX_SIZE = 1 << 48
MAX_NAME = 1_024
MAX_OTHERS = 1_000  # non-tensors that are kept among the objects
MAX_WRAPPERS = 4

STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
UNTYPED = ("UntypedStorage", "_UntypedStorage")
DTYPES = {f"torch.{name}": name for name in STORAGE}
TENSORS = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}  # argument count
WRAPPERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
ATOMS = frozenset({type(None), bool, int, float, str, bytes})
MODULE_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Storage:
    """A run of elements outside the pickle.

    Attributes:
        key: its name in the container.
        dtype: of its elements; untyped storages count as uint8.
        size: its number of elements.
    """

    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class View:
    """One tensor: elements of a storage.

    Attributes:
        storage: what it looks into.
        info: type and shape.
        offset: of its first element, in elements of ``info.dtype``.
        strides: in elements, one an axis.
    """

    storage: Storage
    info: TensorInfo
    offset: int
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other in C order (axes of length 1 do not matter)."""
        step = 1
        for n, stride in zip(reversed(self.info.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True


@dataclass
class TorchTree:
    """The tensors and objects of one pickle.

    Attributes:
        views: every tensor by its dotted name.
        storages: every storage that any tensor of the pickle refers to, by key.
        objects: everything else at top level, as plain values.
        notes: what had to be decided, one sentence each.
    """

    path: Path
    views: dict[str, View] = field(default_factory=dict[str, View])
    storages: dict[str, Storage] = field(default_factory=dict[str, Storage])
    objects: dict[str, object] = field(default_factory=dict[str, object])
    notes: list[str] = field(default_factory=list[str])


def read_tree(path: Path, pickle: Pickle) -> TorchTree:
    """Find the tensors in a parsed pickle.

    Raises:
        UnsupportedCheckpoint: if the pickle names code, holds no tensor, or tensors of a kind that
            is not read.
        InvalidCheckpoint: if what it says of a tensor cannot be.
    """
    if code := pickle.code():
        reason = (
            f"its pickle names {', '.join(code[:3])}: it would run code in a program that unpickles"
            " it; nothing was run here; do not open it elsewhere"
        )
        raise UnsupportedCheckpoint(path, reason)
    reader = _TreeReader(path)
    for reference in pickle.references:
        reader.storage(reference)
    reader.read(pickle.root)
    if not reader.tree.views:
        reason = f"holds no tensors, only {kind(pickle.root)}: it is not a checkpoint of weights"
        raise UnsupportedCheckpoint(path, reason)
    return reader.tree


class _TreeReader:
    """Walks one tree; every method raises ConvertErrors about its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = TorchTree(path)
        self.visited = 0
        self.resolved: dict[int, _Extent] = {}  # by id of the reference, which the pickle keeps
        self.plain = PlainValues(self.describe)

    def malformed(self, reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(self.path, reason)

    def read(self, root: object) -> None:
        """Fill the tree's views and objects from the root."""
        tree = self.tree
        if view := self.tensor(root):
            tree.views["tensor"] = view
            tree.notes.append("The file is one bare tensor, called 'tensor' here.")
            return
        top = self.children(root) or []
        wrapped = [
            node for key, node in top if key == "state_dict" and self.children(node) is not None
        ]
        if len(wrapped) > 1:
            raise self.malformed("its pickle has two entries named 'state_dict'")
        if wrapped:
            found = _Leaves()
            self.walk("", wrapped[0], 0, found)
            self.add(found)
            tree.notes.append("The weights lie in 'state_dict', which their names leave out.")
        for key, node in top:
            kept = len(tree.objects) < MAX_OTHERS
            if (wrapped and node is wrapped[0]) or (node.__class__ in ATOMS and not kept):
                continue
            found = _Leaves()
            if not wrapped:
                self.walk(label(key), node, 0, found)
            if found.views:
                self.add(found)
            elif kept:
                tree.objects[label(key)] = self.plain.value(node)

    def add(self, found: "_Leaves") -> None:
        for name, view in found.views:
            if name in self.tree.views:
                raise self.malformed(f"two tensors are named {quoted(name)}")
            if len(name) > MAX_NAME:
                raise self.malformed(f"a tensor has a name of more than {MAX_NAME} characters")
            if not name.isascii() and not _encodable(name):
                raise self.malformed(f"a tensor's name is not valid Unicode: {quoted(name)}")
            self.tree.views[name] = view
        for name, node in found.others:
            self.tree.objects[name] = self.plain.value(node)

    def walk(self, name: str, node: object, depth: int, found: "_Leaves") -> None:
        """Collect the tensors under a node, and what else lies beside them."""
        self.visited += 1
        if self.visited > MAX_NODES:
            raise self.malformed(f"its pickle unfolds to more than {MAX_NODES} nodes")
        if view := self.tensor(node):
            found.views.append((name, view))
            return
        children = self.children(node)
        if children is None:
            if len(found.others) < MAX_OTHERS:
                found.others.append((name, node))
            return
        if depth >= MAX_DEPTH:
            raise self.malformed(f"its pickle is nested deeper than {MAX_DEPTH}")
        self.visited += len(children) // ATOMS_PER_NODE
        for key, child in children:
            if child.__class__ in ATOMS and len(found.others) >= MAX_OTHERS:
                continue
            inner = f"{name}.{label(key)}" if name else label(key)
            if len(inner) > MAX_NAME:
                raise self.malformed(f"its pickle has a name of more than {MAX_NAME} characters")
            self.walk(inner, child, depth + 1, found)

    def children(self, node: object) -> list[tuple[object, object]] | None:
        """Keys and nodes inside a dictionary, list or pickled module; None for a leaf."""
        if isinstance(node, Items):
            return list(enumerate(node.values))
        if isinstance(node, Call) and (attributes := as_pairs(node.state)):
            # A pickled torch.nn module (ParameterDict, or a whole network): its own three tables.
            tables = [value for key, value in attributes if key in MODULE_TABLES]
            if tables:
                pairs = [pair for table in tables for pair in as_pairs(table) or []]
                return [(key, value) for key, value in pairs if value is not None]
        return as_pairs(node)

    # Tensors

    def describe(self, node: object) -> TensorInfo | None:
        """A tensor among the objects, told but not read."""
        try:
            view = self.tensor(node)
        except ConvertError:  # of a kind that is not read: it is no weight, so no fault either
            return None
        return view.info if view else None

    def tensor(self, node: object) -> View | None:
        """The view that a call rebuilds; None if the node is no tensor."""
        for _ in range(MAX_WRAPPERS):
            if not isinstance(node, Call) or not isinstance(node.callee, Global):
                return None
            module, name = node.callee.module, node.callee.name
            if module not in ("torch._utils", "torch._tensor") or not name.startswith("_rebuild"):
                return None
            args = node.args.values if isinstance(node.args, Items) else []
            if name in TENSORS:
                return self.view(args, TENSORS[name])
            if name in WRAPPERS and args:
                node = args[0]
            elif name == "_rebuild_from_type_v2" and len(args) == 4:
                node = Call(args[0], args[2])
            else:
                reason = f"holds a tensor made by {node.name}, a kind that is not read here"
                raise UnsupportedCheckpoint(self.path, reason)
        raise self.malformed("its pickle wraps a tensor too often")

    def view(self, args: list[object], count: int) -> View:
        if not count <= len(args) <= count + 1:  # newer torch may add metadata
            raise self.malformed(f"a tensor has {len(args)} arguments instead of {count}")
        reference, offset, shape, strides = args[0], args[1], _sizes(args[2]), _sizes(args[3])
        if not isinstance(reference, PersistentId):
            raise self.malformed("a tensor refers to no storage")
        extent = self.storage(reference)
        if extent is None:
            raise self.malformed("a tensor's storage is no storage")
        if not _is_size(offset) or shape is None or strides is None or len(shape) != len(strides):
            raise self.malformed("a tensor's offset, shape or strides are not sizes")
        dtype = extent.storage.dtype
        if count == TENSORS["_rebuild_tensor_v3"]:
            dtype = self.dtype(args[6])
        # Untyped storages count bytes; the tensor counts elements.
        scale, itemsize = STORAGE[extent.storage.dtype].itemsize, STORAGE[dtype].itemsize
        if extent.offset * scale % itemsize:
            raise self.malformed("a tensor begins inside an element")
        available = extent.size * scale // itemsize
        span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        info = TensorInfo(dtype, shape)
        if info.size == 0:
            return View(extent.storage, info, 0, strides)
        if info.size > MAX_SIZE or offset + span > available:
            needs = f"needs elements {offset} to {offset + span} of a storage of {available}"
            raise self.malformed(f"a tensor of shape {shape} {needs}")
        return View(extent.storage, info, offset + extent.offset * scale // itemsize, strides)

    def dtype(self, node: object) -> str:
        name = node.dotted if isinstance(node, Global) else ""
        if name in DTYPES:
            return DTYPES[name]
        if name.startswith("torch."):
            raise UnsupportedCheckpoint(self.path, f"holds a tensor of type {name}: not supported")
        raise self.malformed("a tensor's type is not named")

    def storage(self, reference: PersistentId) -> "_Extent | None":
        """The storage that a reference names; None for torch's note of a module's source code."""
        if (known := self.resolved.get(id(reference))) is not None:
            return known
        record = reference.value.values if isinstance(reference.value, Items) else []
        if record and record[0] == "module":
            return None
        if not 5 <= len(record) <= 6 or record[0] != "storage":
            raise self.malformed("its pickle refers to something outside that is no torch storage")
        kind, key, size = record[1], record[2], record[4]
        if not isinstance(key, str) or not _is_size(size):
            raise self.malformed("a storage's key or size is malformed")
        storage = Storage(key, self.storage_type(kind), size)
        if self.tree.storages.setdefault(key, storage) != storage:
            raise self.malformed(f"storage {quoted(key)} is named with two types or sizes")
        extent = _Extent(storage, 0, size)
        if len(record) == 6 and record[5] is not None:  # torch < 0.4: a view of the storage
            view = record[5].values if isinstance(record[5], Items) else []
            if len(view) != 3 or not _is_size(view[1]) or not _is_size(view[2]):
                raise self.malformed(f"the view of storage {quoted(key)} is malformed")
            extent = _Extent(storage, view[1], view[2])
            if extent.offset + extent.size > size:
                raise self.malformed(f"the view of storage {quoted(key)} reaches beyond it")
        self.resolved[id(reference)] = extent
        return extent

    def storage_type(self, node: object) -> str:
        if isinstance(node, Global) and node.module in ("torch", "torch.cuda", "torch.storage"):
            if node.name in STORAGE_TYPES:
                return STORAGE_TYPES[node.name]
            if node.name in UNTYPED:
                return "uint8"
            if node.name.endswith("Storage"):
                reason = f"holds elements of {node.dotted}, a type that is not supported"
                raise UnsupportedCheckpoint(self.path, reason)
        raise self.malformed(f"a storage's type is {kind(node)}")


@dataclass(frozen=True)
class _Extent:
    """The part of a storage that a reference gives: all of it, but for views of torch < 0.4."""

    storage: Storage
    offset: int
    size: int


@dataclass
class _Leaves:
    """What a walk finds under one entry."""

    views: list[tuple[str, View]] = field(default_factory=list[tuple[str, View]])
    others: list[tuple[str, object]] = field(default_factory=list[tuple[str, object]])


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_SIZE  # True is an int, but not a size


def _sizes(node: object) -> tuple[int, ...] | None:
    """A tuple (or torch.Size) of sizes; None for anything else."""
    if isinstance(node, Call) and node.name == "torch.Size" and isinstance(node.args, Items):
        node = node.args.values[0] if node.args.values else None
    if not isinstance(node, Items) or len(node.values) > MAX_NDIM:
        return None
    sizes = tuple(n for n in node.values if _is_size(n))
    return sizes if len(sizes) == len(node.values) else None


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
