"""A pickle's bytes as an inert tree.

A pickle is a program for a small stack machine: one byte of opcode, then its argument, until STOP.
Python's unpickler executes it, imports included. Here the same program only builds the nodes below:
no global is looked up, nothing is imported, nothing is called. ``os.system`` in a pickle becomes
``Global("os", "system")``, its call ``Call(Global(...), Items(...))``, and so it stays.

    opcodes                                          here
    PROTO FRAME                                      version and length are checked, nothing else
    NONE NEWTRUE INT BININT LONG1 BINFLOAT ...       None, bool, int, float
    UNICODE BINUNICODE STRING BINSTRING ...          str (Python 2's bytes become str as well)
    BINBYTES BYTEARRAY8 ...                          bytes
    EMPTY_LIST TUPLE FROZENSET EMPTY_SET ...         Items
    EMPTY_DICT DICT                                  Pairs
    GLOBAL STACK_GLOBAL EXT1 EXT2 EXT4               Global
    REDUCE NEWOBJ NEWOBJ_EX INST OBJ                 Call
    BUILD APPEND(S) SETITEM(S) ADDITEMS              set on the node; on a Call, kept beside it
    PERSID BINPERSID                                 PersistentId
    MARK POP POP_MARK DUP PUT GET MEMOIZE ...        the machine's own stack and memo

Refused: any other byte (NEXT_BUFFER and READONLY_BUFFER too: the buffers lie outside the file), a
protocol above 5, a length beyond the end, an empty stack, an unset memo slot, a node of the wrong
kind, more than ``MAX_OPCODES`` steps, ``MAX_MARKS`` nested marks or ``MAX_NAMES`` globals, integers
of more than 256 bytes.

Nothing is ever expanded: a node that is used twice is one node, so a "billion laughs" pickle costs
its few bytes. Lists may hold themselves; who walks the tree needs a budget and a depth limit.
Dictionaries stay lists of pairs, because keys may be unhashable nodes or chosen to collide.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from maple_convert.readers.known_code import runs_code

MAX_OPCODES = 1_000_000  # Stable Diffusion 1 with its EMA copy and optimizer: about 160,000
MAX_MARKS = 1_000
MAX_NAMES = 10_000  # different globals; a training checkpoint has tens
MAX_LINE = 4_096  # of a text argument that names something or spells a number
MAX_INT_BYTES = 256


class PickleFault(Exception):
    """What is wrong with a pickle, in words that follow the file's name."""


class PickleEnds(PickleFault):
    """The bytes end before STOP; with more bytes it might be a whole pickle."""


@dataclass(slots=True, eq=False)
class Global:
    """A name that the unpickler would have imported."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        """The whole name, as ``collections.OrderedDict``."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class PersistentId:
    """A reference to something outside the pickle; torch's storages are written so."""

    value: object


@dataclass(slots=True, eq=False)
class Items:
    """A list, tuple, set or frozenset."""

    kind: Literal["list", "tuple", "set"]
    values: list[object]


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary, in the order of its pairs."""

    pairs: list[tuple[object, object]]


@dataclass(slots=True, eq=False)
class Call:
    """A call that was not made.

    Attributes:
        callee: what would have been called, usually a ``Global``.
        args: its arguments, usually ``Items``.
        kwargs: keyword arguments of NEWOBJ_EX, else None.
        state: what BUILD would have set on the result, else None.
        values: what would have been appended or added to the result.
        pairs: what would have been set as the result's items (a dict subclass).
    """

    callee: object
    args: object
    kwargs: object = None
    state: object = None
    values: list[object] | None = None
    pairs: list[tuple[object, object]] | None = None

    @property
    def name(self) -> str:
        """The callee's dotted name, or what kind of thing it is."""
        return self.callee.dotted if isinstance(self.callee, Global) else "a computed callable"


@dataclass(slots=True, frozen=True)
class Pickle:
    """One parsed pickle.

    Attributes:
        root: the tree.
        end: where the next byte after STOP lies.
        names: every global that the pickle names, dotted.
        references: every persistent id, in order, whether or not the tree still holds it.
    """

    root: object
    end: int
    names: frozenset[str]
    references: tuple[PersistentId, ...]

    def code(self) -> list[str]:
        """The names in it by which pickles are known to run code."""
        return sorted(name for name in self.names if runs_code(name))


def parse_pickle(data: bytes, start: int = 0) -> Pickle:
    """Parse the pickle that begins at ``data[start]``.

    Raises:
        PickleEnds: if the data end before the pickle does.
        PickleFault: if it is malformed or over a limit.
    """
    machine = _Machine(data, start)
    try:
        root = machine.run()
    except IndexError as error:  # every pop is on a list that may be empty
        raise PickleFault(f"takes from an empty stack at byte {machine.position}") from error
    names = frozenset(name.dotted for name in machine.names.values())
    return Pickle(root, machine.position, names, tuple(machine.references))


class _Machine:
    """The stack machine. Opcodes are methods, listed in ``_OPCODES`` below the class."""

    __slots__ = ("data", "memo", "metastack", "names", "position", "references", "stack")

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.position = start
        self.stack: list[object] = []
        self.metastack: list[list[object]] = []  # a MARK puts the stack aside and begins another
        self.memo: dict[int, object] = {}
        self.names: dict[tuple[str, str], Global] = {}
        self.references: list[PersistentId] = []

    def run(self) -> object:
        data, end = self.data, len(self.data)
        for _ in range(MAX_OPCODES):
            position = self.position
            if position >= end:
                raise PickleEnds("its pickle ends before STOP")
            code = data[position]
            self.position = position + 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            operation = _OPCODES.get(code)
            if operation is None:
                raise PickleFault(f"its pickle has an unknown opcode 0x{code:02x} at {position}")
            operation(self)
        raise PickleFault(f"its pickle has more than {MAX_OPCODES} opcodes")

    # Arguments in the byte stream

    def take(self, count: int) -> bytes:
        start = self.position
        self.position = start + count
        if self.position > len(self.data):
            raise PickleEnds(f"its pickle ends inside an argument of {count} bytes")
        return self.data[start : self.position]

    def byte(self) -> int:
        position = self.position
        if position >= len(self.data):
            raise PickleEnds("its pickle ends inside an argument")
        self.position = position + 1
        return self.data[position]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def sized(self, size: int) -> bytes:
        return self.take(self.uint(size))

    def line(self, limit: int = MAX_LINE) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + limit + 1)
        if end < 0:
            if len(self.data) - self.position <= limit:
                raise PickleEnds("its pickle ends inside a line of text")
            raise PickleFault(f"its pickle has a line of more than {limit} bytes")
        text = self.data[self.position : end]
        self.position = end + 1
        return text

    def number(self) -> int:
        text = self.line(2 * MAX_INT_BYTES).removesuffix(b"L")
        try:
            return int(text)
        except ValueError as error:
            raise PickleFault(f"its pickle spells a number as {text[:20]!r}") from error

    # The stack

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        if len(self.metastack) >= MAX_MARKS:
            raise PickleFault(f"its pickle is nested deeper than {MAX_MARKS} marks")
        self.metastack.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.metastack.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def pop_mark(self) -> None:
        self.to_mark()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    # The memo

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def put_text(self) -> None:
        index = self.number()
        if not 0 <= index < 1 << 32:
            raise PickleFault(f"its pickle has a memo slot {index}")
        self.put(index)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleFault(f"its pickle reads memo slot {index}, which was never set")
        self.stack.append(self.memo[index])

    # Atoms

    def protocol(self) -> None:
        version = self.byte()
        if version > 5:
            raise PickleFault(f"its pickle has protocol {version}; 5 is the newest that is known")

    def frame(self) -> None:
        length = self.uint(8)
        if length > len(self.data) - self.position:
            raise PickleEnds(f"its pickle has a frame of {length} bytes, beyond its end")

    def int_text(self) -> None:
        text = self.line(2 * MAX_INT_BYTES)
        if text in (b"00", b"01"):  # protocol 0's False and True
            self.push(text == b"01")
        else:
            self.position -= len(text) + 1
            self.push(self.number())

    def long(self, size: int) -> None:
        length = self.uint(size)
        if length > MAX_INT_BYTES:
            raise PickleFault(f"its pickle has an integer of {length} bytes")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def float_text(self) -> None:
        text = self.line()
        try:
            self.push(float(text))
        except ValueError as error:
            raise PickleFault(f"its pickle spells a number as {text[:20]!r}") from error

    def string_text(self) -> None:
        """Python 2's repr of a byte string: quotes and escapes."""
        text = self.line(len(self.data))
        if len(text) < 2 or text[0] != text[-1] or text[:1] not in (b"'", b'"'):
            raise PickleFault("its pickle has a string without quotes")
        self.push(_text(re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", _unescape, text[1:-1])))

    def unicode_text(self) -> None:
        text = self.line(len(self.data))
        try:
            self.push(text.decode("raw-unicode-escape"))
        except UnicodeDecodeError as error:
            raise PickleFault("its pickle has a malformed \\u escape") from error

    def unicode(self, size: int) -> None:
        raw = self.sized(size)
        try:
            self.push(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise PickleFault("its pickle has text that is not UTF-8") from error

    # Containers

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        self.push(Items("tuple", values))

    def items_to_mark(self, kind: Literal["list", "tuple", "set"]) -> None:
        items = self.to_mark()
        self.push(Items(kind, items))

    def dict_to_mark(self) -> None:
        pairs = self._pairs(self.to_mark())
        self.push(Pairs(pairs))

    def append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def extend(self) -> None:
        self._extend(self.to_mark())

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._update([(key, value)])

    def set_items(self) -> None:
        self._update(self._pairs(self.to_mark()))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Call):
            raise PickleFault("its pickle sets the state of something that has none")
        target.state = state

    def _extend(self, values: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Items) and target.kind != "tuple":
            target.values.extend(values)
        elif isinstance(target, Call):
            target.values = target.values or []
            target.values.extend(values)
        else:
            raise PickleFault("its pickle appends to something that is not a list")

    def _update(self, pairs: list[tuple[object, object]]) -> None:
        target = self.stack[-1]
        if isinstance(target, Pairs):
            target.pairs.extend(pairs)
        elif isinstance(target, Call):
            target.pairs = target.pairs or []
            target.pairs.extend(pairs)
        else:
            raise PickleFault("its pickle sets an item of something that is not a dictionary")

    @staticmethod
    def _pairs(flat: list[object]) -> list[tuple[object, object]]:
        if len(flat) % 2:
            raise PickleFault("its pickle has a dictionary with a key but no value")
        return list(zip(flat[::2], flat[1::2], strict=True))

    # Names and calls, none of which is looked up or made

    def name(self, module: str, name: str) -> Global:
        found = self.names.get((module, name))
        if found is None:
            if len(self.names) >= MAX_NAMES:
                raise PickleFault(f"its pickle names more than {MAX_NAMES} globals")
            found = self.names[module, name] = Global(module, name)
        return found

    def name_lines(self) -> Global:
        module, name = self.line(), self.line()
        try:
            return self.name(module.decode("utf-8"), name.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PickleFault("its pickle has a name that is not UTF-8") from error

    def global_lines(self) -> None:
        self.push(self.name_lines())

    def global_stack(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleFault("its pickle has a global whose name is not text")
        if len(name) + len(module) > MAX_LINE:
            raise PickleFault(f"its pickle has a name of more than {MAX_LINE} characters")
        self.push(self.name(module, name))

    def extension(self, size: int) -> None:
        self.push(self.name("copyreg extension", str(self.uint(size))))

    def call(self) -> None:
        args = self.stack.pop()
        callee = self.stack.pop()
        self.push(Call(callee, args))

    def call_with_keywords(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        callee = self.stack.pop()
        self.push(Call(callee, args, kwargs))

    def instance(self) -> None:
        callee = self.name_lines()
        args = self.to_mark()
        self.push(Call(callee, Items("tuple", args)))

    def object_to_mark(self) -> None:
        items = self.to_mark()
        self.push(Call(items.pop(0), Items("tuple", items)))

    def persistent_text(self) -> None:
        self.refer(_text(self.line()))

    def persistent(self) -> None:
        self.refer(self.stack.pop())

    def refer(self, value: object) -> None:
        reference = PersistentId(value)
        self.references.append(reference)
        self.push(reference)


def _text(raw: bytes) -> str:
    """Python 2's str: UTF-8 where it is that, else its bytes as they are."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match.group(1)
    if len(code) == 3:
        return bytes([int(code[1:], 16)])
    return _ESCAPES.get(code, code if code in b"\\'\"" else b"\\" + code)


_ESCAPES = {
    b"n": b"\n",
    b"r": b"\r",
    b"t": b"\t",
    b"0": b"\0",
    b"a": b"\a",
    b"b": b"\b",
    b"f": b"\f",
    b"v": b"\v",
}

# The closed set. A byte that is not a key here ends the parse.
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,  # PROTO
    0x95: _Machine.frame,  # FRAME
    ord("("): _Machine.mark,  # MARK
    ord("0"): _Machine.pop,  # POP
    ord("1"): _Machine.pop_mark,  # POP_MARK
    ord("2"): _Machine.duplicate,  # DUP
    ord("p"): _Machine.put_text,  # PUT
    ord("q"): lambda m: m.put(m.byte()),  # BINPUT
    ord("r"): lambda m: m.put(m.uint(4)),  # LONG_BINPUT
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    ord("g"): lambda m: m.get(m.number()),  # GET
    ord("h"): lambda m: m.get(m.byte()),  # BINGET
    ord("j"): lambda m: m.get(m.uint(4)),  # LONG_BINGET
    ord("N"): lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    ord("I"): _Machine.int_text,  # INT
    ord("L"): lambda m: m.push(m.number()),  # LONG
    ord("J"): lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),  # BININT
    ord("K"): lambda m: m.push(m.byte()),  # BININT1
    ord("M"): lambda m: m.push(m.uint(2)),  # BININT2
    0x8A: lambda m: m.long(1),  # LONG1
    0x8B: lambda m: m.long(4),  # LONG4
    ord("F"): _Machine.float_text,  # FLOAT
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    ord("S"): _Machine.string_text,  # STRING
    ord("T"): lambda m: m.push(_text(m.sized(4))),  # BINSTRING
    ord("U"): lambda m: m.push(_text(m.sized(1))),  # SHORT_BINSTRING
    ord("V"): _Machine.unicode_text,  # UNICODE
    ord("X"): lambda m: m.unicode(4),  # BINUNICODE
    0x8C: lambda m: m.unicode(1),  # SHORT_BINUNICODE
    0x8D: lambda m: m.unicode(8),  # BINUNICODE8
    ord("B"): lambda m: m.push(m.sized(4)),  # BINBYTES
    ord("C"): lambda m: m.push(m.sized(1)),  # SHORT_BINBYTES
    0x8E: lambda m: m.push(m.sized(8)),  # BINBYTES8
    0x96: lambda m: m.push(m.sized(8)),  # BYTEARRAY8
    ord("]"): lambda m: m.push(Items("list", [])),  # EMPTY_LIST
    ord(")"): lambda m: m.push(Items("tuple", [])),  # EMPTY_TUPLE
    0x8F: lambda m: m.push(Items("set", [])),  # EMPTY_SET
    ord("}"): lambda m: m.push(Pairs([])),  # EMPTY_DICT
    ord("l"): lambda m: m.items_to_mark("list"),  # LIST
    ord("t"): lambda m: m.items_to_mark("tuple"),  # TUPLE
    0x91: lambda m: m.items_to_mark("set"),  # FROZENSET
    ord("d"): _Machine.dict_to_mark,  # DICT
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    ord("a"): _Machine.append,  # APPEND
    ord("e"): _Machine.extend,  # APPENDS
    0x90: _Machine.extend,  # ADDITEMS
    ord("s"): _Machine.set_item,  # SETITEM
    ord("u"): _Machine.set_items,  # SETITEMS
    ord("b"): _Machine.build,  # BUILD
    ord("c"): _Machine.global_lines,  # GLOBAL
    0x93: _Machine.global_stack,  # STACK_GLOBAL
    0x82: lambda m: m.extension(1),  # EXT1
    0x83: lambda m: m.extension(2),  # EXT2
    0x84: lambda m: m.extension(4),  # EXT4
    ord("R"): _Machine.call,  # REDUCE
    0x81: _Machine.call,  # NEWOBJ
    0x92: _Machine.call_with_keywords,  # NEWOBJ_EX
    ord("i"): _Machine.instance,  # INST
    ord("o"): _Machine.object_to_mark,  # OBJ
    ord("P"): _Machine.persistent_text,  # PERSID
    ord("Q"): _Machine.persistent,  # BINPERSID
}
