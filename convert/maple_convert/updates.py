"""What a file of differences does to one weight, in float32 and in the shape that torch has it.

Legend   O outputs, I inputs, k a kernel's rows and columns together, r a rank; W the weight, D the
         difference, s the strength that it is asked for with.
Forms    low rank        D = up @ down, up (O, r), down (r, I k)
         Tucker          D[p q k] = sum_ij mid[i j k] up[p i] down[j q]
         LoHa            D = (w1_a @ w1_b) * (w2_a @ w2_b), each with a Tucker core t or without
         LoKr            D = w1 (x) w2, Kronecker's product; each whole or a product of two
         full            D itself, of weights, biases and norms
         each times alpha / r; without an alpha, or where nothing is factored, times 1
         DoRA            W + s (m (W + D) / |W + D| - W), with a length m for each output or input
Source   Hu et al. 2021 (arXiv:2106.09685); Hyeon-Woo et al. 2021 (arXiv:2108.06098); Yeh et al.
         2023 (arXiv:2309.14859); Liu et al. 2024 (arXiv:2402.09353). LyCORIS @main functional/ and
         modules/ for which axis is which.
Differs  Where DoRA is asked for with a strength other than 1, W + s (...) is A1111's and ComfyUI's
         reading; LyCORIS scales the change of length alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maple_convert.layouts import Row
from maple_convert.layouts.parts import TRANSPOSED
from maple_convert.tensors import Tensor

Array = npt.NDArray[Any]  # float32
Shape = tuple[int, ...]
MOST_RANK = 4_096  # what a Tucker core makes on the way grows with it, and not the file


@dataclass(frozen=True)
class Update:
    """The change of one parameter.

    Attributes:
        row: the parameter: its name, shape and layout.
        tensors: by role; see ``layouts.lora.ROLES``.
        alpha: the numerator of the scale; None is 1 in all.
        root: whether alpha is divided by the root of the rank (rank-stabilised LoRA).
    """

    row: Row
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    root: bool = False

    def fits(self) -> bool:
        """Whether the factors fit one another and the parameter."""
        shapes = {role: tensor.shape for role, tensor in self.tensors.items()}
        if any(0 in shape for shape in shapes.values()):
            return False
        found, wanted = difference_shape(shapes), self.row.published_shape
        if not found or found[0] != wanted[0] or math.prod(found) != math.prod(wanted):
            return False
        if len(found) == len(wanted) and found != wanted:
            return False
        if "dora_scale" not in self.tensors:
            return True
        return self._length_axis() is not None and self.row.share[1] == 1

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        rank = self.rank
        if self.alpha is None or rank is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.root else rank)

    @property
    def rank(self) -> int | None:
        """r, or None where nothing is factored."""
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if role in self.tensors:
                return self.tensors[role].shape[0]
        return None

    def difference(self) -> Array:
        """D in the shape that torch has the parameter in; its rows, of several layers' in one."""
        whole = np.reshape(self._product() * np.float32(self.scale), self.row.published_shape)
        index, count = self.row.share
        rows = len(whole) // count
        return whole[index * rows : (index + 1) * rows]

    def changed(self, values: npt.NDArray[Any], strength: float) -> Array:
        """The parameter's values with the difference in them.

        Args:
            values: float32, in native shape and layout.
            strength: s; 0 leaves the values as they are.
        """
        weights = self.row.weights
        before: Array = np.ascontiguousarray(weights.to_published(values), np.float32)
        difference = self.difference()
        if "dora_scale" in self.tensors:
            merged = before + difference
            lengths = self._lengths(merged)
            wanted = np.reshape(self._array("dora_scale"), lengths.shape)
            difference = merged * (wanted / lengths) - before
        after: Array = before + difference * strength
        return np.ascontiguousarray(weights.to_native(after), np.float32)

    def low_rank(self) -> tuple[Array, Array] | None:
        """Factors (O, r) and (r, n) of a plain low-rank difference, its scale in the first one.

        Their product, in the native shape, is what ``changed`` adds; so that who has a faster
        product than numpy's can use it. None for other forms.
        """
        if set(self.tensors) != {"down", "up"} or self.row.weights is TRANSPOSED:
            return None
        up, down = self._array("up"), self._array("down")
        up = np.reshape(up, (len(up), -1)) * np.float32(self.scale)
        index, count = self.row.share
        rows = len(up) // count
        # A factor's inputs lie as the weight's do: moved alike, the product needs no moving.
        published = (len(down), *self.row.published_shape[1:])
        native = self.row.weights.to_native(np.reshape(down, published))
        return up[index * rows : (index + 1) * rows], np.reshape(native, (len(down), -1))

    # Private ----------------------------------------------------------------------------------

    def _array(self, role: str) -> Array:
        return self.tensors[role].astype("float32").array

    def _product(self) -> Array:
        if "diff" in self.tensors:
            return self._array("diff")
        if "down" in self.tensors:
            up, down = self._array("up"), self._array("down")
            if "mid" in self.tensors:
                up, down = np.reshape(up, up.shape[:2]), np.reshape(down, down.shape[:2])
                return _tucker(self._array("mid"), np.transpose(up), down)
            return np.reshape(up, (len(up), -1)) @ np.reshape(down, (len(down), -1))
        if "hada_w1_a" in self.tensors:
            return self._hada("1") * self._hada("2")
        return self._kron()

    def _hada(self, half: str) -> Array:
        a, b = self._array(f"hada_w{half}_a"), self._array(f"hada_w{half}_b")
        core = f"hada_t{half}"
        return _tucker(self._array(core), a, b) if core in self.tensors else a @ b

    def _kron(self) -> Array:
        one, two = self._half_of_kron("1"), self._half_of_kron("2")
        kernel = (1,) * (two.ndim - 2)
        return np.kron(np.reshape(one, one.shape + kernel), two)

    def _half_of_kron(self, half: str) -> Array:
        whole, core = f"lokr_w{half}", f"lokr_t{half}"
        if whole in self.tensors:
            return self._array(whole)
        a, b = self._array(f"{whole}_a"), self._array(f"{whole}_b")
        return _tucker(self._array(core), a, b) if core in self.tensors else a @ b

    def _length_axis(self) -> int | None:
        """The axis along which DoRA has a length for each: 0 outputs, 1 inputs, None neither."""
        shape, wanted = self.tensors["dora_scale"].shape, self.row.published_shape
        size = math.prod(shape)
        if len(wanted) < 2:
            return None
        if size == wanted[0] and shape[:1] != (1,):
            return 0
        if size == wanted[1] and shape[:1] == (1,):
            return 1
        return None

    def _lengths(self, values: Array) -> Array:
        axis = self._length_axis()
        others = tuple(n for n in range(values.ndim) if n != axis)
        squares: Array = np.sum(np.square(values, dtype=np.float64), axis=others, keepdims=True)
        return np.sqrt(squares).astype(np.float32) + np.finfo(np.float32).eps


def difference_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the product of factors of these shapes; None where they do not fit."""
    if "diff" in shapes:
        return shapes["diff"]
    if "down" in shapes:
        return _low_rank(shapes)
    if "hada_w1_a" in shapes:
        halves = [_factored(shapes, f"hada_w{half}", f"hada_t{half}") for half in ("1", "2")]
        return halves[0] if halves[0] == halves[1] else None
    one = shapes.get("lokr_w1") or _factored(shapes, "lokr_w1", "")
    two = shapes.get("lokr_w2") or _factored(shapes, "lokr_w2", "lokr_t2")
    if one is None or two is None or len(one) != 2 or len(two) not in (2, 4):
        return None
    return (one[0] * two[0], one[1] * two[1], *two[2:])


def _low_rank(shapes: Mapping[str, Shape]) -> Shape | None:
    up, down, mid = shapes.get("up", ()), shapes["down"], shapes.get("mid")
    if len(up) not in (2, 4) or len(down) not in (2, 4) or math.prod(up[2:]) != 1:
        return None
    if max(up[1], down[0]) > MOST_RANK:
        return None
    if mid is None:
        return (up[0], *down[1:]) if up[1] == down[0] else None
    fits = len(mid) == 4 and len(down) == 4 and mid[:2] == (up[1], down[0]) and down[2:] == (1, 1)
    return (up[0], down[1], *mid[2:]) if fits else None


def _factored(shapes: Mapping[str, Shape], name: str, core: str) -> Shape | None:
    a, b, t = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ()), shapes.get(core)
    if len(a) != 2 or len(b) != 2 or max(a[1] if t is None else a[0], b[0]) > MOST_RANK:
        return None
    if t is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    return (a[1], b[1], *t[2:]) if len(t) == 4 and t[:2] == (a[0], b[0]) else None


def _tucker(core: Array, a: Array, b: Array) -> Array:
    """Core (i, j, kh, kw), a (i, p), b (j, q) to (p, q, kh, kw)."""
    i, j, *kernel = core.shape
    outer = np.transpose(a) @ np.reshape(core, (i, -1))  # (p, j k)
    outer = np.transpose(np.reshape(outer, (a.shape[1], j, -1)), (0, 2, 1)) @ b  # (p, k, q)
    return np.reshape(np.transpose(outer, (0, 2, 1)), (a.shape[1], b.shape[1], *kernel))
