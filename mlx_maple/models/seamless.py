"""Networks whose pictures continue at the opposite edge, for wallpapers and textures.

Legend   B batch; h, w rows and columns; C channels. Channels last.
Source   Every convolution that pads with zeros takes the opposite edge instead, in rows, columns
         or both: "Tiling" of AUTOMATIC1111/stable-diffusion-webui @v1.10.1 (modules/sd_hijack.py,
         apply_circular), which sets torch's padding_mode there.
Differs  Each axis by itself. The encoder's halving pads by hand in the source and stays as it is
         there, and here.

The network is changed in place and keeps its parameters and their names; `wrap` with no axis puts
the plain layers back. Attention and norms know no edges. Doubling does where a level has an odd
size: pictures whose sides are multiples of 64 have none in the published networks.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models.resnet import Downsample

AXES = ("x", "y", "xy")


class WrappedConv2d(nn.Module):
    """A convolution over a picture that is closed in itself: (B, h, w, C_in) to (B, ~h, ~w, C_out).

    Args:
        plain: the layer whose weights, stride and padding it takes over.
        columns: whether the right edge continues at the left.
        rows: whether the lower edge continues at the top.
    """

    def __init__(self, plain: nn.Conv2d, *, columns: bool, rows: bool) -> None:
        super().__init__()
        self.weight = plain.weight
        if "bias" in plain:
            self.bias = plain.bias
        self.plain_padding = _pair(plain.padding)
        self.stride = _pair(plain.stride)
        self.columns, self.rows = columns, rows
        self.more = {"dilation": plain.dilation, "groups": plain.groups}

    def __call__(self, x: mx.array) -> mx.array:
        x, padding = with_edges(x, self.plain_padding, (self.rows, self.columns))
        y = mx.conv2d(x, self.weight, self.stride, padding, **self.more)
        return y + self.bias if "bias" in self else y


class WrappedDownsample(nn.Module):
    """The UNet's halving of such a picture: (B, h, w, C) to (B, ~h/2, ~w/2, C)."""

    def __init__(self, plain: Downsample, *, columns: bool, rows: bool) -> None:
        super().__init__()
        self.conv = plain.conv
        self.symmetric = plain.symmetric
        self.columns, self.rows = columns, rows

    def __call__(self, x: mx.array) -> mx.array:
        for axis, closes in ((1, self.rows), (2, self.columns)):
            sides = [(0, 0)] * 4
            sides[axis] = (1, 1)
            x = wrapped(x, axis, 1) if closes else mx.pad(x, sides)
        return self.conv(x)


def wrap(network: nn.Module, axes: str | None) -> None:
    """Close a network's pictures along ``axes``, or open them again.

    Args:
        network: of plain layers: a UNet, an autoencoder, a ControlNet, a TAESD. A convolution of
            another kind that has an attribute ``closed`` is told there, of rows and columns.
        axes: "x" for left and right, "y" for top and bottom, "xy" for both, None for neither.

    Raises:
        ValueError: for other axes.
    """
    if axes is not None and axes not in AXES:
        raise ValueError(f"unknown axes {axes!r}: choose from {', '.join(AXES)}.")
    columns, rows = "x" in (axes or ""), "y" in (axes or "")
    for _, module in network.named_modules():
        for name, value in list(module.items()):
            if isinstance(value, list):
                value[:] = [_closed(each, columns, rows) for each in value]
            else:
                module[name] = _closed(value, columns, rows)


def with_edges(
    x: mx.array, padding: tuple[int, int], closed: tuple[bool, bool]
) -> tuple[mx.array, tuple[int, int]]:
    """What a convolution reads of a map, and what is left of its padding with zeros.

    Args:
        x: (B, h, w, C).
        padding: of rows and columns.
        closed: whether rows and columns continue at the opposite edge.
    """
    for axis, closes in enumerate(closed, 1):
        if closes:
            x = wrapped(x, axis, padding[axis - 1])
    down, right = (0 if closes else side for side, closes in zip(padding, closed, strict=True))
    return x, (down, right)


def wrapped(x: mx.array, axis: int, width: int) -> mx.array:
    """``x`` with ``width`` rows or columns of its opposite edge on either side."""
    if not width:
        return x
    start = mx.split(x, [x.shape[axis] - width], axis)[1]
    end = mx.split(x, [width], axis)[0]
    return mx.concatenate([start, x, end], axis)


def _closed(layer: Any, columns: bool, rows: bool) -> Any:
    """A layer in its plain or its closed form, whichever it is in now."""
    plain = _opened(layer)
    if isinstance(plain, nn.Module) and hasattr(plain, "closed"):
        plain.closed = (rows, columns)
        return plain
    if not columns and not rows:
        return plain
    if type(plain) is nn.Conv2d and any(_pair(plain.padding)):
        return WrappedConv2d(plain, columns=columns, rows=rows)
    if type(plain) is Downsample and plain.symmetric:
        return WrappedDownsample(plain, columns=columns, rows=rows)
    return plain


def _opened(layer: Any) -> Any:
    if isinstance(layer, WrappedConv2d):
        out, height, width, channels = layer.weight.shape
        groups = layer.more["groups"]
        plain = nn.Conv2d(
            channels * groups,
            out,
            (height, width),
            layer.stride,
            layer.plain_padding,
            bias="bias" in layer,
            **layer.more,
        )
        plain.weight = layer.weight
        if "bias" in layer:
            plain.bias = layer.bias
        return plain
    if isinstance(layer, WrappedDownsample):
        plain = Downsample(1, symmetric=layer.symmetric)
        plain.conv = layer.conv
        return plain
    return layer


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
