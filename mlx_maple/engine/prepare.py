"""The networks made ready to draw: the same weights, rearranged exactly for speed.

``prepare_unet`` and ``prepare_vae`` take the plain networks of mlx_maple/models and return ones
with the same signatures and, within rounding, the same numbers:

- Queries, keys and values come from one matrix product; those of the prompt are made once a prompt.
- Everything that depends on the time alone is made for all steps at once, with the biases of the
  convolutions it is added to.
- Biases are not added where they arise. A map owes them, as ``value + residual + shift``, until the
  next norm adds it all up in one pass; what a linear layer would make of them is known beforehand.
- A skip is joined by the norm, which reads both maps anyway.
- The last product of a block and the one behind it are one, as nothing lies between them.
- Doubling a map and the 3x3 convolution behind it are one 2x2 convolution of the map as it was.
- Where a map is small, the norm writes each pixel's neighbourhood and the 3x3 convolution is a
  matrix product. Where a backend's attention fuses other widths, heads are padded with zeros.

Legend   B batch; h, w rows and columns; N = h w pixels; C channels; T prompt tokens; K heads; D
         width of a head.
Source   mlx_maple/models, whose blocks these mirror one by one; tests/engine holds them together.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.engine.attention import METAL_WIDTHS, SCORE_BYTES, running_backend
from mlx_maple.engine.edges import around, neighbours
from mlx_maple.engine.kernels import Kernels, Norm, Plain, Size, kernels_for
from mlx_maple.engine.quantize import QuantizedConv2d, matmul
from mlx_maple.engine.traced import Traced
from mlx_maple.models import AutoencoderKL, UNet
from mlx_maple.models.attention import LAYER_NORM_EPS, SpatialTransformer, TransformerBlock
from mlx_maple.models.forms import PLAIN
from mlx_maple.models.layers import GroupNorm, sinusoids
from mlx_maple.models.resnet import Downsample, ResnetBlock, Upsample
from mlx_maple.models.unet import as_times, check_guidance, check_image, check_inputs
from mlx_maple.models.vae import Decoder, Encoder, PixelAttention

# Below this many pixels a convolution is a matrix product on CUDA, where cuDNN's own is far from
# the chip's rate: measured in benchmarks/.
UNFOLD_PIXELS = {"cuda": 256}
# Of maps that may be under way where an autoencoder works in stages; at 512x512 one has 4 to 134
# MB.
AHEAD_BYTES = 300_000_000
TRACES = 256  # of its steps that are kept: those of some six sizes
# One cross-attention's keys and values: (B, T, 2 K D) of the text, or in a list with those of image
# prompts behind it.
Keys = mx.array | list[mx.array]


@dataclass(frozen=True)
class Recipe:
    """How the networks are made ready.

    Attributes:
        backend: "metal", "cuda" or "cpu".
        kernels: what norms, gates and joins run on.
        score_bytes: the most that the scores of one attention may take.
        unfold_pixels: maps up to this size are convolved by a matrix product.
        merges_outputs: the last two products of a transformer become one. It pays where the gate
            can write the tokens beside its own numbers; elsewhere joining them costs what it saves.
        has_phases: an autoencoder's doubling is a part of its convolution. Metal has a faster way
            to convolve, for 3x3 alone.
    """

    backend: str
    kernels: Kernels | Plain
    score_bytes: int = SCORE_BYTES
    unfold_pixels: int = 0
    merges_outputs: bool = False
    has_phases: bool = False

    @classmethod
    def usual(cls, dtype: mx.Dtype, *, backend: str | None = None) -> "Recipe":
        """What suits a backend; None is the one that runs, whose kernels are checked first."""
        running = running_backend()
        backend = running if backend is None else backend
        return cls.of(backend, kernels_for(backend, dtype)[0] if backend == running else Plain())

    @classmethod
    def of(cls, backend: str, kernels: Kernels | Plain, score_bytes: int = SCORE_BYTES) -> "Recipe":
        """What suits a backend with these kernels."""
        return cls(
            backend,
            kernels,
            score_bytes,
            unfold_pixels=UNFOLD_PIXELS.get(backend, 0),
            merges_outputs=kernels.has_gate,
            has_phases=backend == "cuda",
        )

    def head_width(self, width: int) -> int:
        """The width that heads are padded to where the backend's attention would not fuse."""
        if self.backend != "metal" or width in METAL_WIDTHS:
            return width
        return next((wider for wider in sorted(METAL_WIDTHS) if wider > width), width)


@dataclass
class Map:
    """A feature map that nobody has added up yet: value + residual + what its maker owes.

    Attributes:
        value: B h w pixels of C channels, in whatever shape.
        residual: likewise, or None; the first norm that adds it puts the sum in its place.
        size: B, h and w.
    """

    value: mx.array
    residual: mx.array | None
    size: Size

    @property
    def tokens(self) -> mx.array:
        """The settled map's pixels as rows (B N, C)."""
        assert self.residual is None
        return self.value if self.value.ndim == 2 else self.value.flatten(0, -2)

    @classmethod
    def of(cls, parts: Sequence[mx.array], size: Size) -> "Map":
        """A map of its ``parts``."""
        return cls(parts[0], parts[1] if len(parts) > 1 else None, size)

    @property
    def parts(self) -> list[mx.array]:
        """The arrays that there are: the value, and the residual."""
        return [self.value] if self.residual is None else [self.value, self.residual]

    def plus(self, more: mx.array) -> "Map":
        """The map with something added: (B or 1, h, w, C)."""
        self.settle()
        value = self.value.reshape(*self.size, self.value.shape[-1])
        return Map(value + more.astype(value.dtype), None, self.size)

    def settle(self) -> None:
        """Add the residual, where no norm comes before the map is kept."""
        if self.residual is not None:
            value = self.value.reshape(self.residual.shape)
            self.value, self.residual = value + self.residual, None


# Leaves ------------------------------------------------------------------------------------------


class Product(nn.Module):
    """x W^T, perhaps added to something: linear layers over the same input, one under the other.

    Args:
        layers: nn.Linear or QuantizedLinear, all of one kind; their biases are the caller's.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        joined = layers[0] if len(layers) == 1 else None
        for name in ("weight", "scales", "biases"):
            if name in layers[0]:
                parts = [layer[name] for layer in layers]
                self[name] = parts[0] if joined is not None else mx.concatenate(parts)
        self.group_size = getattr(layers[0], "group_size", 0)
        self.bits = getattr(layers[0], "bits", 0)
        self._matrix: mx.array | None = None

    def fix(self) -> mx.array | None:
        """Turn the weights, as they are now, into the matrix that is multiplied by, once for all.

        A compiled step would describe the turning again at every call, for some 150 products.
        """
        self._matrix = None if "scales" in self else self.weight.T
        return self._matrix

    def __call__(self, x: mx.array, added: mx.array | None = None) -> mx.array:
        """(…, I) to (…, O); ``added`` broadcasts to that."""
        if "scales" not in self:
            weight = self._matrix if self._matrix is not None else self.weight.T
            return x @ weight if added is None else mx.addmm(added, x, weight)
        y = matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)
        return y if added is None else added + y

    def of(self, row: mx.array) -> mx.array:
        """What the product makes of a float32 row (I,), in float32."""
        weight = self.weight
        if "scales" in self:
            weight = mx.dequantize(
                weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
            )
        return (weight.astype(mx.float32) * row).sum(axis=-1)


class Convolution(nn.Module):
    """A 3x3 convolution without its bias, which its maker's map owes.

    Attributes:
        closed: whether rows and columns continue at the opposite edge; engine.prepared_forms says.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name in ("weight", "scales", "biases"):
            if name in layer:
                self[name] = layer[name]
        if isinstance(layer, QuantizedConv2d):
            self.shape = layer.shape
            self.group_size, self.bits = layer.group_size, layer.bits
        else:
            self.shape = tuple(layer.weight.shape)
        self.stride = layer.stride
        self.closed: tuple[bool, bool] = (False, False)
        self._matrix: mx.array | None = None

    def fix(self) -> mx.array | None:
        """As ``Product.fix``, of the matrix for neighbourhoods."""
        self._matrix = None if "scales" in self else self._rows()
        return self._matrix

    def _rows(self) -> mx.array:
        return self.weight.reshape(self.shape[0], -1).T

    @property
    def kernel(self) -> mx.array:
        """(O, 3, 3, I); stored in few bits, it is dequantised here, at each use."""
        if "scales" not in self:
            return self.weight
        flat = mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )
        return flat.reshape(self.shape)

    def __call__(self, x: mx.array, padding: int = 1) -> mx.array:
        """(B, h, w, I) to (B, h', w', O)."""
        if padding and any(self.closed):
            x = around(x, self.closed)
            rows, columns = self.closed
            return mx.conv2d(x, self.kernel, self.stride, (int(not rows), int(not columns)))
        return mx.conv2d(x, self.kernel, self.stride, padding)

    def on_neighbours(self, x: mx.array) -> mx.array:
        """The same on neighbourhoods: (B, N, 9 I) to (B, N, O)."""
        if "scales" not in self:
            return x @ (self._matrix if self._matrix is not None else self._rows())
        return matmul(x, self.weight, self.scales, self.biases, self.group_size, self.bits)


class MapNorm(nn.Module):
    """A group norm with its constants in float32."""

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.weight = norm.weight.astype(mx.float32)
        self.bias = norm.bias.astype(mx.float32)
        self.groups = norm.groups
        self.eps = norm.eps

    @property
    def constants(self) -> Norm:
        return Norm(self.weight, self.bias, self.groups, self.eps)


def _bias(layer: Any) -> mx.array:
    return layer.bias.astype(mx.float32)


# Blocks ------------------------------------------------------------------------------------------


class Resnet(nn.Module):
    """models.resnet.ResnetBlock on maps that owe.

    Args:
        block: the plain one.
        owed: (C_in,) float32: what the input's maker owes, the skip's behind it.
        start: where in a row of times this block's channels begin; None without time.
        recipe: how.

    Attributes:
        owed: (C_out,) float32: what the output owes.
        in_turn: wait for the first convolution before the second is prepared.
        weighting: FreeU's of the map and the skip that come in, on the way up; or None.
    """

    def __init__(
        self,
        block: ResnetBlock,
        owed: mx.array,
        start: int | None,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self._recipe = recipe
        self.in_turn = False
        self.weighting: Any = None
        self._start = start
        self.norm1, self.norm2 = MapNorm(block.norm1), MapNorm(block.norm2)
        self.conv1, self.conv2 = Convolution(block.conv1), Convolution(block.conv2)
        self.shift1 = owed[None]
        if start is None:
            self.shift2 = _bias(block.conv1)[None]
        if "conv_shortcut" in block:
            self.shortcut = Product([block.conv_shortcut])
            made = self.shortcut.of(owed) + _bias(block.conv_shortcut)
        else:
            made = owed
        self.owed = _bias(block.conv2) + made

    def __call__(self, x: Map, times: mx.array | None = None, skip: Map | None = None) -> Map:
        if self.weighting is not None:
            x, skip = self.weighting(x, skip, self.shift1)
        y = self._convolved(
            self.conv1,
            self.norm1,
            x,
            shift=self.shift1,
            skip=None if skip is None else skip.value,
        )
        if self.in_turn:
            mx.eval(y, x.value)
        shift, start = (self.shift2, 0) if self._start is None else (times, self._start)
        assert shift is not None
        y = self._convolved(self.conv2, self.norm2, Map(y, None, x.size), shift=shift, start=start)
        return Map(y, self.shortcut(x.tokens) if "shortcut" in self else x.value, x.size)

    def _convolved(
        self,
        conv: Convolution,
        norm: MapNorm,
        x: Map,
        *,
        shift: mx.array,
        start: int = 0,
        skip: mx.array | None = None,
    ) -> mx.array:
        """Settle ``x``, normalise it and convolve it: to B N pixels of O channels."""
        _, rows, columns = x.size
        by_product = rows * columns <= self._recipe.unfold_pixels
        is_closed = any(conv.closed)  # kernels write neighbourhoods of open maps
        y, x.value = self._recipe.kernels.group_norm(
            x.value,
            norm.constants,
            x.size,
            residual=x.residual,
            skip=skip,
            shift=shift,
            start=start,
            wanted="map" if not by_product else "tokens" if is_closed else "neighbours",
        )
        x.residual = None
        if by_product and is_closed:
            y = neighbours(y, x.size, conv.closed)
        return conv.on_neighbours(y) if by_product else conv(y)


class Block(nn.Module):
    """models.attention.TransformerBlock on tokens that owe.

    Args:
        block: the plain one.
        owed: (C,) float32: what the tokens owe.
        recipe: how.
        behind: the linear layer that follows the block, if it is to be made part of it.

    Attributes:
        owed: (C,) float32: what the tokens owe behind the block alone.
        merging: engine.token_merging's, which finds the tokens that look around as one; or None.
    """

    def __init__(
        self,
        block: TransformerBlock,
        owed: mx.array,
        recipe: Recipe,
        behind: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self._recipe = recipe
        self.merging: Any = None
        self._heads = block.attn1.heads
        channels = owed.shape[0]
        self._scale = (channels // self._heads) ** -0.5
        width = channels // self._heads
        self._width = recipe.head_width(width)
        layers = (block.attn1.to_q, block.attn2.to_q, block.attn2.to_k)
        if any("scales" in layer for layer in layers):
            # Packed rows are not padded; the heads are, as they come.
            self._pad = self._width - width
            self._width = width
        else:
            self._pad = 0

        def padded(layer: Any) -> Any:
            return _padded_rows(layer, self._heads, self._width)

        attn1, attn2 = block.attn1, block.attn2
        self.qkv = Product([padded(layer) for layer in (attn1.to_q, attn1.to_k, attn1.to_v)])
        self.q = Product([padded(attn2.to_q)])
        self.kv = Product([padded(attn2.to_k), padded(attn2.to_v)])
        self.out1 = Product([_padded_columns(attn1.to_out, self._heads, self._width)])
        self.out2 = Product([_padded_columns(attn2.to_out, self._heads, self._width)])
        self.ff_in = Product([block.ff.proj_in])
        self._is_merged = behind is not None
        ff_out = block.ff.proj_out if behind is None else _merged(block.ff.proj_out, behind)
        self.ff_out = Product([ff_out])
        for i, norm in enumerate((block.norm1, block.norm2, block.norm3), 1):
            self[f"norm{i}_weight"] = norm.weight.astype(mx.float32)
            self[f"norm{i}_bias"] = norm.bias.astype(mx.float32)
        self.gate_bias = _bias(block.ff.proj_in)
        self.shift1 = owed
        self.shift2 = owed + _bias(attn1.to_out)
        self.shift3 = self.shift2 + _bias(attn2.to_out)
        self.owed = self.shift3 + _bias(block.ff.proj_out)

    def keys_values(self, context: mx.array) -> mx.array:
        """What the prompt (B, T, D) shows to every pixel at every step: (B, T, 2 K D)."""
        return self.kv(context)

    def beside(self, keys_values: mx.array) -> mx.array:
        """An image prompt's keys and values (B, S, 2 C) with heads as wide as the text's."""
        width = keys_values.shape[-1] // (2 * self._heads)
        if self._width == width:
            return keys_values
        split = keys_values.reshape(*keys_values.shape[:2], 2 * self._heads, width)
        wider = mx.pad(split, [(0, 0), (0, 0), (0, 0), (0, self._width - width)])
        return wider.flatten(2)

    def __call__(
        self, x: mx.array, prompt: Keys, size: Size, residual: mx.array | None = None
    ) -> mx.array:
        """Tokens (B N, C) to the same; the prompt's keys and values are (B, T, 2 K D).

        Where the layer behind is part of the block, ``residual`` is what that is added to.
        """
        text, *images = [prompt] if isinstance(prompt, mx.array) else prompt
        batch = text.shape[0]
        y = self._norm(1, x)
        found = None if self.merging is None else self.merging(x, self.shift1, size)
        joined = self.qkv(y if found is None else found.merge(y))
        mixed = self._attend(joined, joined, batch)
        x = self.out1(mixed, x) if found is None else x + found.unmerge(self.out1(mixed))
        queries = self.q(self._norm(2, x))
        mixed = self._attend(queries, text, batch)
        for image in images:
            mixed = mixed + self._attend(queries, image, batch)
        x = self.out2(mixed, x)
        y, gate = self.ff_in(self._norm(3, x)), self._recipe.kernels.gate
        if self._is_merged:
            return self.ff_out(gate(y, self.gate_bias, x), residual)
        return self.ff_out(gate(y, self.gate_bias), x)

    def _norm(self, i: int, x: mx.array) -> mx.array:
        weight, bias = self[f"norm{i}_weight"], self[f"norm{i}_bias"]
        return self._recipe.kernels.layer_norm(x, weight, bias, self[f"shift{i}"], LAYER_NORM_EPS)

    def _attend(self, queries: mx.array, others: mx.array, batch: int) -> mx.array:
        is_self = others is queries
        if self._pad:
            queries = self._wider(queries)
            others = queries if is_self else self._wider(others)
        mixed = self._recipe.kernels.attention(
            queries,
            others,
            batch,
            self._heads,
            scale=self._scale,
            score_bytes=self._recipe.score_bytes,
            backend=self._recipe.backend,
        )
        if self._pad:
            mixed = mixed.reshape(mixed.shape[0], self._heads, -1)[..., : self._width]
            mixed = mixed.flatten(1)
        return mixed

    def _wider(self, x: mx.array) -> mx.array:
        """Heads padded with zeros, where the weights are packed and could not be."""
        split = x.reshape(-1, x.shape[-1] // self._width, self._width)
        return mx.pad(split, [(0, 0), (0, 0), (0, self._pad)]).flatten(1)


def _merged(first: Any, second: Any) -> Any:
    """The layer that takes [x, r] to second(first(x) + r), without biases."""
    layer: Any = nn.Module()
    a, b = first.weight.astype(mx.float32), second.weight.astype(mx.float32)
    layer.weight = mx.concatenate([(b @ a).astype(first.weight.dtype), second.weight], axis=1)
    return layer


def _padded_rows(layer: Any, heads: int, width: int) -> Any:
    """A linear layer whose heads are made wider with zero rows."""
    rows, inputs = layer.weight.shape
    if rows == heads * width:
        return layer
    part: Any = nn.Module()
    split = layer.weight.reshape(heads, rows // heads, inputs)
    wider = mx.pad(split, [(0, 0), (0, width - rows // heads), (0, 0)])
    part.weight = wider.reshape(-1, inputs)
    return part


def _padded_columns(layer: Any, heads: int, width: int) -> Any:
    """A linear layer that takes such heads, and multiplies their zeros by zeros."""
    if "scales" in layer or layer.weight.shape[1] == heads * width:
        return layer
    rows, inputs = layer.weight.shape
    part: Any = nn.Module()
    split = layer.weight.reshape(rows, heads, inputs // heads)
    wider = mx.pad(split, [(0, 0), (0, 0), (0, width - inputs // heads)])
    part.weight = wider.reshape(rows, -1)
    return part


class Transformer(nn.Module):
    """models.attention.SpatialTransformer on maps that owe."""

    def __init__(self, block: SpatialTransformer, owed: mx.array, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self.norm = MapNorm(block.norm)
        self.shift = owed[None]
        self.proj_in = Product([block.proj_in])
        proj_out = Product([block.proj_out])
        inner = _bias(block.proj_in)
        self.blocks = []
        *earlier, last = block.transformer_blocks
        is_stored = "scales" in block.proj_out or "scales" in last.ff.proj_out
        self._is_merged = recipe.merges_outputs and not is_stored
        for each in (*earlier, last):
            behind = block.proj_out if each is last and self._is_merged else None
            self.blocks.append(Block(each, inner, recipe, behind))
            inner = self.blocks[-1].owed
        self.owed = owed + _bias(block.proj_out) + proj_out.of(inner)
        if not self._is_merged:
            self.proj_out = proj_out

    def __call__(self, x: Map, prompt: list[Keys]) -> Map:
        """Take each block's keys and values from the end of ``prompt``."""
        y, x.value = self._recipe.kernels.group_norm(
            x.value,
            self.norm.constants,
            x.size,
            residual=x.residual,
            shift=self.shift,
            silu=False,
            wanted="tokens",
        )
        x.residual = None
        tokens, residual = self.proj_in(y), x.tokens
        for block in self.blocks:
            tokens = block(tokens, prompt.pop(), x.size, residual)
        if not self._is_merged:
            tokens = self.proj_out(tokens, residual)
        return Map(tokens, None, x.size)


class Resample(nn.Module):
    """models.resnet.Downsample or Upsample: the map is added up, then convolved."""

    def __init__(self, block: Downsample | Upsample, owed: mx.array, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self._symmetric = getattr(block, "symmetric", True)
        self.doubles = isinstance(block, Upsample)
        self.conv = Convolution(block.conv)
        self.shift = owed
        self.owed = _bias(block.conv)

    def __call__(self, x: Map, doubled: tuple[int, int] | None = None) -> Map:
        if doubled is None:
            x.settle()  # on the way down the map is kept for the way up, too
        full = self._recipe.kernels.total(x.value, x.residual, self.shift, x.size, doubled)
        if not self._symmetric:
            full = mx.pad(full, [(0, 0), (0, 1), (0, 1), (0, 0)])
        y = self.conv(full, 1 if self._symmetric else 0)
        return _map(y)


def _resampling(block: Downsample | Upsample, recipe: Recipe) -> type[nn.Module]:
    """How an autoencoder's map is halved or doubled."""
    is_phased = recipe.has_phases and isinstance(block, Upsample) and type(block.conv) is nn.Conv2d
    return Doubling if is_phased else Resample


class Doubling(nn.Module):
    """models.resnet.Upsample on maps that owe, on a quarter of the pixels.

    Of the doubled map's three rows under a convolution's window two are one row of the map: the
    window of an even row is on rows y - 1, y, y and that of an odd row on y, y, y + 1. So their
    weights are added up, for columns likewise, and each of the four kinds of pixels has a 2x2
    convolution of its own; one convolution makes all four. 16 products for 36.
    """

    def __init__(self, block: Upsample, owed: mx.array, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        weight = block.conv.weight
        wide = weight.astype(mx.float32)
        kinds = [kind for rows in _added_up(wide, 1) for kind in _added_up(rows, 2)]
        every: Any = nn.Module()
        every.weight, every.stride = mx.concatenate(kinds).astype(weight.dtype), 1
        self.conv = Convolution(every)
        self.shift = owed
        self.owed = _bias(block.conv)

    def __call__(self, x: Map) -> Map:
        """Double the map."""
        full = self._recipe.kernels.total(x.value, x.residual, self.shift, x.size)
        return _map(self._recipe.kernels.interleave(self.conv(full)))


def _added_up(weight: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """A window's weights on three doubled rows as those on two rows: of even and of odd ones."""
    first, second, third = mx.split(weight, 3, axis)
    even, odd = [first, second + third], [first + second, third]
    return mx.concatenate(even, axis), mx.concatenate(odd, axis)


def _map(x: mx.array) -> Map:
    """(B, h, w, C) as a map."""
    batch, rows, columns, _ = x.shape
    return Map(x, None, (batch, rows, columns))


# The UNet ----------------------------------------------------------------------------------------


class PreparedUNet(nn.Module):
    """models.UNet, made ready: (B, h, w, C_in) to (B, h, w, C_out).

    Attributes:
        config: the plain network's.
        dtype: of its weights.
        form: that it is in; engine.prepared_forms sets it.
        steps: engine.compiled's, which are as good as the network they were traced from.
    """

    def __init__(self, unet: UNet, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self.form = PLAIN
        self.steps: Any = None
        self._traced: dict[Any, Any] = {}  # the steps of other forms
        self.config = unet.config
        self.dtype = unet.conv_in.weight.dtype
        self.time_embedding = unet.time_embedding
        if "add_embedding" in unet:
            self.add_embedding = unet.add_embedding
        self._blocks: list[ResnetBlock] = []  # in the order in which they run

        self.conv_in = Convolution(unet.conv_in)
        owed = _bias(unet.conv_in)
        self.start = 0
        kept = [owed]  # what each map on the stack owes
        self.down = []
        for level in unet.down_blocks:
            steps = []
            for i, resnet in enumerate(level.resnets):
                steps.append(self._resnet(resnet, owed))
                owed = steps[-1].owed
                if "attentions" in level:
                    steps.append(Transformer(level.attentions[i], owed, recipe))
                    owed = steps[-1].owed
                kept.append(owed)
            if "downsamplers" in level:
                steps.append(Resample(level.downsamplers[0], owed, recipe))
                owed = steps[-1].owed
                kept.append(owed)
            self.down.append(steps)

        self.mid: list[Any] = []
        if "mid_block" in unet:
            middle = unet.mid_block
            for i, resnet in enumerate(middle.resnets):
                self.mid.append(self._resnet(resnet, owed))
                owed = self.mid[-1].owed
                if i == 0 and "attentions" in middle:
                    self.mid.append(Transformer(middle.attentions[0], owed, recipe))
                    owed = self.mid[-1].owed

        self.up = []
        for level in unet.up_blocks:
            steps = []
            for i, resnet in enumerate(level.resnets):
                skip = kept.pop()
                both = mx.concatenate([owed, skip])
                steps.append(self._resnet(resnet, both))
                owed = steps[-1].owed
                if "attentions" in level:
                    steps.append(Transformer(level.attentions[i], owed, recipe))
                    owed = steps[-1].owed
            if "upsamplers" in level:
                steps.append(Resample(level.upsamplers[0], owed, recipe))
                owed = steps[-1].owed
            self.up.append(steps)

        self.norm_out = MapNorm(unet.conv_norm_out)
        self.shift_out = owed[None]
        self.conv_out = Convolution(unet.conv_out)
        self.bias_out = unet.conv_out.bias
        # One product makes what every residual block is told of the times.
        self.time_product = Product([block.time_emb_proj for block in self._blocks])
        self.time_bias = mx.concatenate(
            [_bias(block.time_emb_proj) + _bias(block.conv1) for block in self._blocks]
        )
        self._blocks = []

    def _resnet(self, block: ResnetBlock, owed: mx.array) -> Resnet:
        made = Resnet(block, owed, self.start, self._recipe)
        self.start += block.conv1.weight.shape[0]
        self._blocks.append(block)
        return made

    def __call__(
        self,
        latents: mx.array,
        timesteps: mx.array | float,
        context: mx.array,
        vector: mx.array | None = None,
        guidance: mx.array | None = None,
        control: Sequence[mx.array] | None = None,
        features: Sequence[mx.array] | None = None,
        image: Sequence[Sequence[mx.array]] = (),
    ) -> mx.array:
        """As models.UNet: same arguments, shapes and errors."""
        check_inputs(self.config, latents, context, vector)
        check_guidance(self.config, guidance)
        times = self.times(as_times(timesteps, latents.shape[0]), vector, guidance)
        prompt = self.prompt(context, image)
        added = list(features or ())
        maps = self.begin(latents, times, prompt, added)
        return self.finish(maps, times, prompt, added, control)

    def times(
        self,
        timesteps: mx.array,
        vector: mx.array | None = None,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """What the residual blocks are told of times (S,): rows (S, all their C_out), float32.

        Args:
            timesteps: (S,), or (1,) for all of the others.
            vector: (S, V), for a network that takes one.
            guidance: (S,), for a network that is told it.
        """
        waves = sinusoids(timesteps, self.config.block_out_channels[0]).astype(self.dtype)
        embedded = self.time_embedding(waves, guidance)
        if vector is not None:
            embedded = embedded + self.add_embedding(vector.astype(self.dtype))
        return self.time_product(nn.silu(embedded)).astype(mx.float32) + self.time_bias

    def prompt(self, context: mx.array, image: Sequence[Sequence[mx.array]] = ()) -> list[Keys]:
        """Keys and values of every cross-attention for (B, T, D), in the order of their use.

        ``image`` is as for models.UNet: what image prompts show beside it.
        """
        context = context.astype(self.dtype)
        blocks = [
            block
            for steps in (*self.down, self.mid, *self.up)
            for step in steps
            if isinstance(step, Transformer)
            for block in step.blocks
        ]
        made: list[Keys] = [block.keys_values(context) for block in blocks]
        if not image:
            return made
        check_image(self.config, image)
        return [
            [text, *[block.beside(each.astype(self.dtype)) for each in shown]]
            for block, text, *shown in zip(blocks, made, *image, strict=True)
        ]

    def predict(self, latents: mx.array, times: mx.array, prompt: Sequence[Keys]) -> mx.array:
        """Predict from what ``times`` (a row, or one a sample) and ``prompt`` have made."""
        return self.finish(self.begin(latents, times, prompt), times, prompt)

    def begin(
        self,
        latents: mx.array,
        times: mx.array,
        prompt: Sequence[Keys],
        features: list[mx.array] | None = None,
        hint: mx.array | None = None,
    ) -> list[Map]:
        """The first level of ``predict``: maps that the others go on from, the last one last.

        Of ``features`` the first is taken away; ``hint`` is added to the first map.
        """
        x = _map(self.conv_in(latents.astype(self.dtype)))
        x = x if hint is None else x.plus(hint)
        skips = [x]
        self._descend(self.down[:1], skips, times, list(reversed(prompt)), features)
        return skips

    def finish(
        self,
        skips: list[Map],
        times: mx.array,
        prompt: Sequence[Keys],
        features: list[mx.array] | None = None,
        control: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """The other levels of ``predict``; ``skips`` are used up."""
        x, skips, stack = self.descend(skips, times, prompt, features, control)
        return self.leave(self.climb(x, skips, times, stack))

    def descend(
        self,
        skips: list[Map],
        times: mx.array,
        prompt: Sequence[Keys],
        features: list[mx.array] | None = None,
        control: Sequence[mx.array] | None = None,
    ) -> tuple[Map, list[Map], list[Keys]]:
        """From the first level's maps to the middle's, all that are kept, and the prompt's rest."""
        stack = list(reversed(prompt[self.first_blocks :]))
        self._descend(self.down[1:], skips, times, stack, features)
        x = skips[-1]
        if not self.mid:
            x.settle()  # it is also the first skip that is joined to it
        for step in self.mid:
            x = self._step(step, x, times, stack)
        if features:
            x = x.plus(features.pop(0))
        if control is not None:
            if len(control) != len(skips) + 1:
                expected = f"expected {len(skips) + 1} maps of control"
                raise ValueError(f"[UNet] {expected}, got {len(control)}.")
            skips = [skip.plus(each) for skip, each in zip(skips, control, strict=False)]
            x = x.plus(control[-1])
        return x, skips, stack

    @property
    def way_up(self) -> list[nn.Module]:
        """The blocks of all levels on the way up, in their order."""
        return [step for steps in self.up for step in steps]

    def climb(
        self,
        x: Map,
        skips: list[Map],
        times: mx.array,
        stack: list[Keys],
        steps: Sequence[nn.Module] | None = None,
    ) -> Map:
        """Go up from a map, taking from the ends of ``skips`` and ``stack``, all the way or some.

        Args:
            x: the map below.
            skips: that were kept on the way down.
            times: what the residual blocks are told.
            stack: keys and values of the prompt, the first ones last.
            steps: of ``way_up``; None is all of them.
        """
        for step in self.way_up if steps is None else steps:
            if isinstance(step, Resnet):
                x = step(x, times, skips.pop())
            elif isinstance(step, Resample):
                x = step(x, skips[-1].size[1:])
            else:
                x = step(x, stack)
        return x

    def leave(self, x: Map) -> mx.array:
        """What the last map says: (B, h, w, C)."""
        y, _ = self._recipe.kernels.group_norm(
            x.value, self.norm_out.constants, x.size, residual=x.residual, shift=self.shift_out
        )
        return self.conv_out(y) + self.bias_out

    @property
    def first_blocks(self) -> int:
        """How many of a prompt's keys and values ``begin`` reads."""
        return sum(len(step.blocks) for step in self.down[0] if isinstance(step, Transformer))

    def _descend(
        self,
        levels: list[list[Any]],
        skips: list[Map],
        times: mx.array,
        stack: list[Keys],
        features: list[mx.array] | None,
    ) -> None:
        """Go down from the last map, and put behind it those that are kept for the way up."""
        x = skips[-1]
        for steps in levels:
            halves = isinstance(steps[-1], Resample)
            # models.unet.DownBlock tells where an adapter's map belongs.
            is_late = halves and not any(isinstance(step, Transformer) for step in steps)
            end = len(steps) - 1 - (halves and not is_late)
            for i, step in enumerate(steps):
                x = self._step(step, x, times, stack)
                if features and i == end:
                    x = x.plus(features.pop(0))
                # A residual block with a transformer behind it leaves the transformer's map.
                behind = steps[i + 1] if i + 1 < len(steps) else None
                if not (isinstance(step, Resnet) and isinstance(behind, Transformer)):
                    skips.append(x)

    def fix(self) -> None:
        """Evaluate the weights, and what a step would otherwise make of them each time."""
        mx.eval(self.parameters())
        leaves = [m for m in self.modules() if isinstance(m, Product | Convolution)]
        mx.eval([made for leaf in leaves if (made := leaf.fix()) is not None])

    @staticmethod
    def _step(step: nn.Module, x: Map, times: mx.array, stack: list) -> Map:
        if isinstance(step, Resnet):
            return step(x, times)
        return step(x, stack) if isinstance(step, Transformer) else step(x)


# The VAE -----------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """models.vae.PixelAttention on maps that owe."""

    def __init__(self, block: PixelAttention, owed: mx.array, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self.norm = MapNorm(block.group_norm)
        self.shift = owed[None]
        layers = (block.to_q, block.to_k, block.to_v)
        self.qkv = Product(layers)
        self.qkv_bias = mx.concatenate([layer.bias for layer in layers])
        self.out = Product([block.to_out])
        self.owed = owed + _bias(block.to_out)

    def __call__(self, x: Map) -> Map:
        y, x.value = self._recipe.kernels.group_norm(
            x.value,
            self.norm.constants,
            x.size,
            residual=x.residual,
            shift=self.shift,
            silu=False,
            wanted="tokens",
        )
        x.residual = None
        qkv = self.qkv(y, self.qkv_bias)
        mixed = self._recipe.kernels.attention(
            qkv,
            qkv,
            x.size[0],
            1,
            scale=(qkv.shape[-1] // 3) ** -0.5,
            score_bytes=self._recipe.score_bytes,
            backend=self._recipe.backend,
        )
        return Map(self.out(mixed, x.tokens), None, x.size)


class Half(nn.Module):
    """models.vae.Encoder or Decoder on maps that owe: (B, H, W, C) to (B, H', W', C').

    Attributes:
        in_stages: evaluate maps as they are made, a few ahead of the device. It begins at once, and
            gives back what it has used: by itself MLX does so after many operations, which are
            most of a decoding.
        compiled_for: the type of the weights with which each step is traced once for a size, and
            run again. Describing it anew takes as long as starting it. None is never; an
            autoencoder that is brought to another type for a while is then not traced.
    """

    def __init__(self, half: Encoder | Decoder, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self.compiled_for: mx.Dtype | None = None
        self._traced: dict[Any, Any] = {}
        self.conv_in = Convolution(half.conv_in)
        owed = _bias(half.conv_in)
        self.steps = []

        def add(step: type, block: nn.Module, *more: object) -> None:
            nonlocal owed
            self.steps.append(step(block, owed, *more, recipe))
            owed = self.steps[-1].owed

        def add_middle() -> None:
            add(Resnet, half.mid_block.resnets[0], None)
            add(Pixels, half.mid_block.attentions[0])
            add(Resnet, half.mid_block.resnets[1], None)

        is_encoder = isinstance(half, Encoder)
        if not is_encoder:
            add_middle()
        for level in half.down_blocks if is_encoder else half.up_blocks:
            for resnet in level.resnets:
                add(Resnet, resnet, None)
            for name in ("downsamplers", "upsamplers"):
                if name in level:
                    add(_resampling(level[name][0], recipe), level[name][0])
        if is_encoder:
            add_middle()
        self.in_stages = False
        self.norm_out = MapNorm(half.conv_norm_out)
        self.shift_out = owed[None]
        self.conv_out = Convolution(half.conv_out)
        self.bias_out = half.conv_out.bias

    def wait(self, in_turn: bool) -> None:
        """Whether to have no large map prepared before the last is done: less memory, more time."""
        for step in self.steps:
            if isinstance(step, Resnet):
                step.in_turn = in_turn

    def __call__(self, x: mx.array) -> mx.array:
        x_map = _map(self.conv_in(x))
        in_turn = any(step.in_turn for step in self.steps if isinstance(step, Resnet))
        running: deque[list[mx.array]] = deque()
        is_traced = self.compiled_for is not None and x.dtype == self.compiled_for and not in_turn
        for index in range(len(self.steps)):
            x_map = self._traced_step(index, x_map) if is_traced else self._step(index, x_map)
            if self.in_stages:
                running.append(x_map.parts)
                mx.async_eval(running[-1])
                # One is always under way, or the device would wait for this side.
                while (in_turn and running) or (
                    len(running) > 1 and _nbytes(running) > AHEAD_BYTES
                ):
                    mx.eval(running.popleft())
        y, _ = self._recipe.kernels.group_norm(
            x_map.value,
            self.norm_out.constants,
            x_map.size,
            residual=x_map.residual,
            shift=self.shift_out,
        )
        return self.conv_out(y) + self.bias_out

    def _step(self, index: int, x: Map) -> Map:
        step = self.steps[index]
        if isinstance(step, Resample) and step.doubles:
            return step(x, (2 * x.size[1], 2 * x.size[2]))
        return step(x)

    def _traced_step(self, index: int, x: Map) -> Map:
        """The same, traced for this size; the same number of pixels may be another size."""
        key = (index, x.size, self.conv_in.closed)
        if key not in self._traced:
            if len(self._traced) >= TRACES:
                self._traced.clear()
            mx.eval(self.steps[index].parameters())  # or it would read them again at every call

            def run(parts: list[mx.array], size: Size = x.size) -> list[mx.array]:
                return self._step(index, Map.of(parts, size)).parts

            self._traced[key] = Traced(run)
        parts = self._traced[key](x.parts)
        step, size = self.steps[index], x.size
        if isinstance(step, Resample | Doubling):
            batch, rows, columns, _ = parts[0].shape
            size = batch, rows, columns
        return Map.of(parts, size)


def _nbytes(running: Iterable[list[mx.array]]) -> int:
    return sum(each.nbytes for maps in running for each in maps)


class PreparedVAE(AutoencoderKL):
    """models.AutoencoderKL with both halves made ready; encode and decode are its own."""

    def __init__(self, vae: AutoencoderKL, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.config = vae.config
        self.encoder = Half(vae.encoder, recipe)
        self.decoder = Half(vae.decoder, recipe)
        self.quant_conv = vae.quant_conv
        self.post_quant_conv = vae.post_quant_conv

    def compile(self) -> None:
        """Trace both halves' steps; see ``Half.compiled_for``."""
        for half in (self.encoder, self.decoder):
            half.compiled_for = half.conv_in.weight.dtype


# Making ready ------------------------------------------------------------------------------------


def prepare_unet(unet: UNet, recipe: Recipe | None = None) -> PreparedUNet:
    """Rearrange a UNet's weights; those that stay as they are, are shared with it."""
    return PreparedUNet(unet, recipe or Recipe.usual(unet.conv_in.weight.dtype))


def prepare_vae(vae: AutoencoderKL, recipe: Recipe | None = None) -> PreparedVAE:
    """Rearrange an autoencoder's weights; those that stay as they are, are shared with it."""
    return PreparedVAE(vae, recipe or Recipe.usual(vae.quant_conv.weight.dtype))
