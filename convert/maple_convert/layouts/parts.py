"""How the key tables are written: parts, places, and the rows that they multiply out to.

A *part* is one layer of a block and its name in every published spelling; a *place* is where a
block of the network sits in every spelling. Place x part = exact keys, in both directions. Nothing
here or in the tables looks at a value, and no name is ever searched for a substring.

    native     our own: diffusers' names without torch's artefacts, convolutions (O, H, W, I)
    others     as published, weights as torch stores them: convolutions (O, I, H, W)

A weight's layout only rearranges bytes, so every transform is exactly inverse and works on the bits
of any dtype.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint, LayoutMismatch
from maple_convert.tensors import TensorInfo

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

NATIVE = "native"
SAME = "="  # in a table: spelled as the native name
# Behind a spelling's name: the same names, but 1x1 convolutions that some families keep as such are
# linear layers in the file.
LINEAR = "_linear"


@dataclass(frozen=True)
class Weights:
    """How one kind of weight lies in a torch file and in ours.

    Attributes:
        name: what the tables print.
        published_shape: native shape to the shape in a torch file.
        to_native: torch's array to ours; the result may be a view.
        to_published: the exact inverse.
    """

    name: str
    published_shape: Callable[[Shape], Shape]
    to_native: Callable[[Array], Array]
    to_published: Callable[[Array], Array]


AS_IS = Weights("as is", lambda s: s, lambda a: a, lambda a: a)
OIHW_TO_OHWI = Weights(
    "OIHW to OHWI",
    lambda s: (s[0], s[3], s[1], s[2]),
    lambda a: np.transpose(a, (0, 2, 3, 1)),
    lambda a: np.transpose(a, (0, 3, 1, 2)),
)
POINTWISE_TO_LINEAR = Weights(
    "OI11 to OI",
    lambda s: (s[0], s[1], 1, 1),
    lambda a: np.reshape(a, a.shape[:2]),
    lambda a: np.reshape(a, (*a.shape, 1, 1)),
)


TRANSPOSED = Weights(
    "transposed", lambda s: s[::-1], lambda a: np.transpose(a), lambda a: np.transpose(a)
)


@dataclass(frozen=True)
class Leaf:
    """The parameters of one layer: its weight's native shape and layout, and whether it has a bias.

    Shapes are written in the block's own letters ("in", "out", "4c"), which a place resolves.
    """

    kind: str
    shape: tuple[str | int, ...]
    weights: Weights
    bias: bool = True


def norm(width: str) -> Leaf:
    """Group or layer norm: weight and bias of ``width``."""
    return Leaf("norm", (width,), AS_IS)


def linear(inputs: str, outputs: str, *, bias: bool = True) -> Leaf:
    """Linear layer, (outputs, inputs) on both sides."""
    return Leaf("linear", (outputs, inputs), AS_IS, bias)


def conv(inputs: str, outputs: str, *, bias: bool = True) -> Leaf:
    """3x3 convolution."""
    return Leaf("conv 3x3", (outputs, 3, 3, inputs), OIHW_TO_OHWI, bias)


def pointwise(inputs: str, outputs: str, *, bias: bool = True) -> Leaf:
    """1x1 convolution in the file, linear layer here."""
    return Leaf("conv 1x1", (outputs, inputs), POINTWISE_TO_LINEAR, bias)


def vector(width: str) -> Leaf:
    """One learned vector."""
    return Leaf("vector", (width,), AS_IS, bias=False)


def table(rows: str, width: str) -> Leaf:
    """Embedding table."""
    return Leaf("embedding", (rows, width), AS_IS, bias=False)


@dataclass(frozen=True)
class AsLinear:
    """The name in a spelling that keeps a linear layer where others keep a 1x1 convolution."""

    name: str


@dataclass(frozen=True)
class Packed:
    """The name in a spelling that keeps several layers' rows in one tensor, one under the other.

    Attributes:
        name: of the tensors, without the ``_weight`` and ``_bias`` that end them.
        index: which of them this layer is.
        count: how many there are, all of one shape.
    """

    name: str
    index: int
    count: int


@dataclass(frozen=True)
class Bare:
    """The name in a spelling that keeps a weight as a tensor by itself, with nothing behind it."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Part:
    """One layer of a block: its native name, its published names, its parameters.

    Attributes:
        native: name below the block's native place.
        published: name below the block's place, one per spelling of the table.
        leaf: the layer's parameters.
        only_if_differ: two widths; the layer exists only where they differ (a skip's projection).
        may_be_linear: whether ``LINEAR`` spellings keep it as a linear layer.
    """

    native: str
    published: tuple[str | AsLinear | Packed | Bare, ...]
    leaf: Leaf
    only_if_differ: tuple[str, str] | None = None
    may_be_linear: bool = False


@dataclass(frozen=True)
class Parts:
    """The table of one kind of block."""

    title: str
    spellings: tuple[str, ...]
    parts: tuple[Part, ...]

    def name(self, native: str, spelling: str) -> str:
        """The published name of one part below its place."""
        for part in self.parts:
            if part.native == native:
                return _name(part, self.spellings.index(spelling.removesuffix(LINEAR)))
        raise KeyError(native)


@dataclass(frozen=True)
class Place:
    """Where one block sits, in every spelling, and how wide it is there."""

    native: str
    published: tuple[str, ...]
    parts: Parts
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One parameter: its native name and shape, its published name and shape, the way between.

    ``packed`` says that it holds the words of quantised numbers (quantized.py) and no floats.
    ``share`` is its place among those that lie in one tensor of the file, and how many they are.
    """

    native: str
    published: str
    weights: Weights
    native_shape: Shape
    packed: bool = False
    share: tuple[int, int] = (0, 1)

    @property
    def published_shape(self) -> Shape:
        """The shape of the file's tensor."""
        rows, *others = self.weights.published_shape(self.native_shape)
        return (rows * self.share[1], *others)


def rows(places: Sequence[Place], spelling: str) -> list[Row]:
    """Multiply places by parts: every parameter of a network in one spelling, each exactly once."""
    made = [row for place in places for row in _rows_of(place, spelling)]
    places_in_file = {(row.published, row.share) for row in made}
    assert len({row.native for row in made}) == len(made) == len(places_in_file)
    return made


def _rows_of(place: Place, spelling: str) -> Iterator[Row]:
    for part in place.parts.parts:
        if part.only_if_differ is not None:
            one, other = part.only_if_differ
            if place.widths[one] == place.widths[other]:
                continue
        shape = tuple(n if isinstance(n, int) else place.widths[n] for n in part.leaf.shape)
        native = _join(place.native, part.native)
        published, weights, ends, share = native, AS_IS, (".weight", ".bias"), (0, 1)
        if spelling != NATIVE:
            column = place.parts.spellings.index(spelling.removesuffix(LINEAR))
            how = part.published[column]
            published = _join(place.published[column], _name(part, column))
            is_linear = part.may_be_linear and spelling.endswith(LINEAR)
            if not is_linear and not isinstance(how, AsLinear):
                weights = part.leaf.weights
            if isinstance(how, Packed):
                ends, share = ("_weight", "_bias"), (how.index, how.count)
            if isinstance(how, Bare):
                ends, weights = ("", ""), TRANSPOSED if how.transposed else weights
        yield Row(f"{native}.weight", published + ends[0], weights, shape, share=share)
        if part.leaf.bias:
            yield Row(f"{native}.bias", published + ends[1], AS_IS, shape[:1], share=share)


def _name(part: Part, column: int) -> str:
    how = part.published[column]
    name = how if isinstance(how, str) else how.name
    return part.native if name == SAME else name


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place and name else place or name


class View:
    """The tensors below one prefix of a file, as the walks that read an architecture see them.

    All views of one file share its names, sorted: a place is looked up by bisection, and a view
    under which nothing lies costs nothing, however many names a file holds.

    Attributes:
        path: the file, for messages.
        prefix: what was taken off every name.
        under: what the tables put before the names that the file leaves out.
        folder: the component's folder in front of names shown to people, as "unet/".
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        prefix: str = "",
        under: str = "",
        folder: str = "",
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        self.path = path
        self.prefix = prefix
        self.under = under
        self.folder = folder
        self._all = tensors
        self._names: Sequence[str] = sorted(tensors) if names is None else names

    def below(self, prefix: str, under: str = "") -> "View":
        """Another view of the same file."""
        return View(self.path, self._all, prefix, under, self.folder, names=self._names)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name without the prefix to what the file says of the tensor, in the file's order."""
        if not self.prefix and not self.under:
            return self._all
        return {
            self.under + name[len(self.prefix) :]: info
            for name, info in self._all.items()
            if name.startswith(self.prefix)
        }

    def key(self, name: str) -> str:
        """The file's own name of a tensor of this view."""
        return self.prefix + name[len(self.under) :]

    def shown(self, name: str) -> str:
        """The same for people, with its folder."""
        return self.folder + self.key(name)

    def begins(self, start: str) -> bool:
        """Whether any tensor's name begins with ``start``."""
        if self.under.startswith(start):
            start = self.under
        if not start.startswith(self.under):
            return False
        wanted = self.key(start)
        at = bisect_left(self._names, wanted)
        return at < len(self._names) and self._names[at].startswith(wanted)

    def holds(self, place: str) -> bool:
        """Whether any tensor lies below ``place``."""
        return self.begins(f"{place}.")

    def count(self, place: str) -> int:
        """How many of ``place.0``, ``place.1``, … follow one another without a gap."""
        n = 0
        while self.holds(f"{place}.{n}"):
            n += 1
        return n

    def axis(self, name: str, axis: int, ndim: int) -> int:
        """One axis of a tensor that the architecture is read from.

        Raises:
            LayoutMismatch: if the file lacks the tensor.
            InvalidCheckpoint: if it has another number of axes.
        """
        info = self.tensors.get(name)
        if info is None:
            raise LayoutMismatch(self.path, missing=[self.key(name)])
        if len(info.shape) != ndim:
            raise InvalidCheckpoint(
                self.path, f"{self.key(name)} has shape {info.shape}, expected {ndim} axes"
            )
        return info.shape[axis]
