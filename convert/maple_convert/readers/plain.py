"""The parts of a pickle that are not tensors, as plain values that are safe to print.

Numbers, text and containers become Python's own; numpy scalars and arrays of numbers are decoded
from the bytes that the pickle holds; anything else becomes a ``Stub``. The result is small and
shallow whatever the pickle holds, so that callers may print it, compare it or turn it into JSON.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maple_convert.readers.pickle_tree import Call, Global, Items, Pairs, PersistentId

MAX_NODES = 10_000  # kept as values, for one checkpoint
MAX_LENGTH = 1_000  # of one container, so that a long list leaves room for the rest
MAX_DEPTH = 16
MAX_TEXT = 1_000  # characters or bytes of one value
MAX_NDIM = 32  # numpy 1's limit
LEFT_OUT = "…"

MAPPINGS = frozenset(
    {
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.Counter",
        "builtins.dict",
        "__builtin__.dict",
    }
)
NUMBERS = re.compile(r"[fiu][1248]|b1")


@dataclass(frozen=True)
class Stub:
    """An object of a stranger's class, inert.

    Attributes:
        name: the class or function, dotted; "…" where a value was left out for its size.
        args: what it would have been called with.
        state: what would have been set on it: its attributes, or the items of a container.
    """

    name: str
    args: tuple[object, ...] = ()
    state: object = None


def as_pairs(node: object) -> list[tuple[object, object]] | None:
    """The pairs of a dictionary or of a call that makes one; None for anything else."""
    if isinstance(node, Pairs):
        return node.pairs
    if not isinstance(node, Call):
        return None
    if node.name in MAPPINGS:
        # Python 2 wrote OrderedDict([[key, value], ...]); later ones set items on an empty one.
        given = node.args.values[:1] if isinstance(node.args, Items) else []
        pairs = [
            (item.values[0], item.values[1])
            for first in given
            for item in (first.values if isinstance(first, Items) else [])
            if isinstance(item, Items) and len(item.values) == 2
        ]
        return pairs + (node.pairs or [])
    return node.pairs  # of an unknown dict subclass


def label(key: object) -> str:
    """A dictionary's key as part of a name. Lightning keys its callbacks by class, for one."""
    if isinstance(key, str):
        return key
    if isinstance(key, Global):
        return key.dotted
    if key is None or isinstance(key, bool | int | float):
        return str(key)
    return f"<{kind(key)}>"


def kind(node: object) -> str:
    """What a node is, in a few words for a message."""
    if isinstance(node, Items):
        return f"a {node.kind}"
    if isinstance(node, Pairs) or (isinstance(node, Call) and node.name in MAPPINGS):
        return "a dictionary"
    if isinstance(node, Call):
        return f"an object made by {node.name}"
    if isinstance(node, Global):
        return f"the name {node.dotted}"
    if isinstance(node, PersistentId):
        return "a bare reference"
    return "nothing" if node is None else f"a value of type {type(node).__name__}"


class PlainValues:
    """Turns nodes into plain values, within one budget for all of them.

    Args:
        tensor: gives a tensor's description for a node that is one, else None.
    """

    def __init__(self, tensor: Callable[[object], object | None]) -> None:
        self._tensor = tensor
        self._left = MAX_NODES

    def value(self, node: object, depth: int = 0) -> object:
        """The node as a plain value; ``Stub("…")`` where it is too large or too deep."""
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            return Stub(LEFT_OUT)
        if isinstance(node, str):
            return node if len(node) <= MAX_TEXT else node[:MAX_TEXT] + LEFT_OUT
        if isinstance(node, bytes):
            return node[:MAX_TEXT]
        if isinstance(node, Items):
            values = self._values(node.values, depth)
            return tuple(values) if node.kind == "tuple" else values
        if isinstance(node, Pairs):
            return self._mapping(node.pairs, depth)
        if isinstance(node, Global):
            return Stub(node.dotted)
        if isinstance(node, PersistentId):
            return Stub("a reference outside the pickle")
        if isinstance(node, Call):
            return self._call(node, depth)
        return node  # None, bool, int, float

    def _call(self, node: Call, depth: int) -> object:
        if (known := self._tensor(node)) is not None:
            return known
        decode = DECODERS.get(node.name)
        if decode is not None and (decoded := decode(node)) is not None:
            return decoded
        if node.name in MAPPINGS:
            return self._mapping(as_pairs(node) or [], depth)
        args = node.args.values if isinstance(node.args, Items) else []
        if node.name == "torch.Size" and args:
            return self.value(args[0], depth + 1)
        state: object = None
        if node.state is not None:
            state = self.value(node.state, depth + 1)
        elif node.pairs is not None:
            state = self._mapping(node.pairs, depth + 1)
        elif node.values is not None:
            state = self._values(node.values, depth + 1)
        return Stub(node.name, tuple(self._values(args, depth)), state)

    def _values(self, nodes: list[object], depth: int) -> list[object]:
        values: list[object] = []
        for node in nodes[:MAX_LENGTH]:
            values.append(self.value(node, depth + 1))
            if self._left < 0:
                return values
        return values + [Stub(LEFT_OUT)] * (len(nodes) > MAX_LENGTH)

    def _mapping(self, pairs: list[tuple[object, object]], depth: int) -> dict[str, object]:
        values: dict[str, object] = {}
        for key, node in pairs[:MAX_LENGTH]:
            values[label(key)[:MAX_TEXT]] = self.value(node, depth + 1)
            if self._left < 0:
                return values
        if len(pairs) > MAX_LENGTH:
            values[LEFT_OUT] = Stub(LEFT_OUT)
        return values


# Bytes and numpy's own pickles, decoded by name. Numbers only: an object array holds more pickles.


def _dtype(node: object) -> np.dtype[Any] | None:
    """numpy.dtype("f4", False, True) with the state (3, "<", ...)."""
    if not isinstance(node, Call) or node.name != "numpy.dtype":
        return None
    code = _at(node.args, 0)
    order = _at(node.state, 1)
    if not isinstance(code, str) or not NUMBERS.fullmatch(code) or order not in ("<", ">", "|"):
        return None
    return np.dtype(f"{order}{code}")


def _raw(node: object) -> bytes | None:
    """Bytes; protocol 2 writes them as _codecs.encode(text, "latin1"), Python 2 as text."""
    if isinstance(node, Call) and node.name == "_codecs.encode" and _at(node.args, 1) == "latin1":
        node = _at(node.args, 0)
    if isinstance(node, str):
        try:
            return node.encode("latin-1")
        except UnicodeEncodeError:
            return None
    return node if isinstance(node, bytes) else None


def _no_bytes(node: Call) -> bytes | None:
    """bytes(), as protocol 2 writes b""."""
    return b"" if isinstance(node.args, Items) and not node.args.values else None


def _number(node: Call) -> int | float | bool | None:
    dtype, raw = _dtype(_at(node.args, 0)), _raw(_at(node.args, 1))
    if dtype is None or raw is None or len(raw) != dtype.itemsize:
        return None
    return np.frombuffer(raw, dtype)[0].item()


def _array(node: Call) -> npt.NDArray[Any] | None:
    """_reconstruct(ndarray, (0,), b"b") with the state (1, shape, dtype, Fortran order, bytes)."""
    shape, dtype, raw = _at(node.state, 1), _dtype(_at(node.state, 2)), _raw(_at(node.state, 4))
    if not isinstance(shape, Items) or dtype is None or raw is None or len(shape.values) > MAX_NDIM:
        return None
    sizes = [n for n in shape.values if type(n) is int and 0 <= n <= len(raw)]
    count = 1
    for n in sizes:
        count *= n
    if len(sizes) != len(shape.values) or count * dtype.itemsize != len(raw):
        return None
    order = "F" if _at(node.state, 3) is True else "C"
    array: npt.NDArray[Any] = np.ndarray(sizes, dtype, raw, order=order)
    return np.array(array, order="C")


def _at(node: object, index: int) -> object:
    """One value of a tuple node; None where there is none."""
    if isinstance(node, Items) and index < len(node.values):
        return node.values[index]
    return None


DECODERS: dict[str, Callable[[Call], object | None]] = {
    "_codecs.encode": _raw,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
    "numpy.core.multiarray.scalar": _number,  # before numpy 2, and since
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
}
