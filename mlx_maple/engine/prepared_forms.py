"""Forms of networks that were made ready: models.forms on maps that owe.

A network's compiled steps are traced for one form: those for another are made beside them, and the
last of them are kept. Its weights stay what they are.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_maple.engine.prepare import Convolution, Map, PreparedUNet, PreparedVAE, Resnet
from mlx_maple.engine.token_merging import set_token_merging
from mlx_maple.models.forms import PLAIN, Form
from mlx_maple.models.freeu import Factors

KEPT = 4  # forms, beside the plain one, whose steps a network keeps


def set_form(network: PreparedUNet | PreparedVAE, form: Form) -> None:
    """Bring a network into a form; an autoencoder is closed or not, and has no other."""
    if isinstance(network, PreparedVAE):
        _close(network, form.tile)
        return
    before = network.form
    if form == before:
        return
    _close(network, form.tile)
    _set_freeu(network, form.freeu)
    set_token_merging(network, form.merging)
    traced = network._traced
    traced[before] = network.steps
    steps = traced.pop(form, None)
    for old in [each for each in traced if each != PLAIN][:-KEPT]:
        del traced[old]
    network.form = form
    network.steps = steps or (network.steps and network.steps.again())


def _close(network: PreparedUNet | PreparedVAE, tile: str | None) -> None:
    closed = "y" in (tile or ""), "x" in (tile or "")
    for layer in network.modules():
        if isinstance(layer, Convolution):
            layer.closed = closed


def _set_freeu(unet: PreparedUNet, factors: Factors | None) -> None:
    """Weight a network's two coarsest ways up, or no longer."""
    pairs = [] if factors is None else [(factors.b1, factors.s1), (factors.b2, factors.s2)]
    for level, steps in enumerate(unet.up):
        for step in steps:
            if isinstance(step, Resnet):
                step.weighting = Weighting(*pairs[level]) if level < len(pairs) else None


class Weighting(NamedTuple):
    """FreeU's of what comes from below and of what comes from the side; see models/freeu.py.

    A map goes on owing what it owed, and nothing behind it need know: where v owes o, the weighted
    map is A (v + o) - o, and owes o.

    Attributes:
        louder: of the first half of what comes from below.
        smooth: of the lowest frequencies of what comes from the side.
    """

    louder: float
    smooth: float

    def __call__(self, x: Map, skip: Map, owed: mx.array) -> tuple[Map, Map]:
        """Both weighted; one owes the first of the numbers ``owed`` (1, C + C'), one the others."""
        x.settle()
        channels = x.value.shape[-1]
        below, beside = mx.split(owed, [channels], axis=-1)
        factors = np.where(np.arange(channels) < channels // 2, self.louder, 1)
        louder = mx.array(factors.astype(np.float32))
        batch, rows, columns = skip.size
        waves = mx.array(_lowest(rows, columns))
        # In float32, as all numbers beside those of the maps are.
        value = x.value * louder + (louder - 1) * below
        whole = skip.value.reshape(batch, rows * columns, -1) + beside
        smooth = whole + (self.smooth - 1) * (waves @ (waves.T @ whole)) - beside
        return (
            Map(value.astype(x.value.dtype), None, x.size),
            Map(smooth.astype(skip.value.dtype), None, skip.size),
        )


@lru_cache(maxsize=32)
def _lowest(rows: int, columns: int) -> NDArray[np.float32]:
    """Waves (N, 8) whose product with themselves turned is the projection of models.freeu.

    They are cosine and sine of each pair of the frequencies -1 and 0 along both sides: the real
    part of the projection, as two products with few numbers between.
    """
    down = 2 * np.pi * np.arange(rows)[:, None] / rows
    right = 2 * np.pi * np.arange(columns) / columns
    places = [0 * down + 0 * right, down + 0 * right, 0 * down + right, down + right]
    waves = [wave(place).reshape(-1) for wave in (np.cos, np.sin) for place in places]
    found = np.stack(waves, axis=-1)
    return (found / np.sqrt(rows * columns)).astype(np.float32)
