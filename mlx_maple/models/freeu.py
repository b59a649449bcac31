"""FreeU: the UNet's two coarsest ways up, with what comes from below louder and skips less smooth.

Legend   B batch; h, w rows and columns; C channels. Channels last.
Source   Si et al. 2023, FreeU (arXiv:2309.11497), section 3.2, as diffusers 0.42.1 has it (its
         utils/torch_utils.py, apply_freeu): the first half of the channels is scaled as a whole.
Differs  The lowest frequencies are taken out by two small matrices and not by a Fourier transform;
         the reference's 2 x 2 of them are those of index -1 and 0. Tolerances:
         tests/parity/test_freeu_parity.py.

The network is changed in place and keeps its parameters and their names.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_maple.models.attention import Context
from mlx_maple.models.unet import UNet, UpBlock


class Factors(NamedTuple):
    """The paper's four numbers; 1 changes nothing. Its own for SD 1.5: 1.5, 1.6, 0.9, 0.2.

    Attributes:
        b1: of what comes from below, at the coarsest level.
        b2: at the next one.
        s1: of the skip's lowest frequencies, at the coarsest level.
        s2: at the next one.
    """

    b1: float
    b2: float
    s1: float
    s2: float


class FreeUpBlock(nn.Module):
    """An `UpBlock` whose inputs are weighted before they are joined.

    Args:
        plain: the block whose layers it takes over.
        louder: of the first half of what comes from below.
        smooth: of the lowest frequencies of what comes from the side.
    """

    def __init__(self, plain: UpBlock, louder: float, smooth: float) -> None:
        super().__init__()
        self.resnets = plain.resnets  # the same lists of the same layers
        if "attentions" in plain:
            self.attentions = plain.attentions
        if "upsamplers" in plain:
            self.upsamplers = plain.upsamplers
        self.louder, self.smooth = louder, smooth
        self._plain = [plain]  # in a list of its own: not one of this block's parts

    def __call__(
        self,
        x: mx.array,
        skips: list[mx.array],
        time: mx.array,
        context: mx.array | Context,
        layers: range | None = None,
    ) -> mx.array:
        """Climb a level; see ``UpBlock``."""
        layers = range(len(self.resnets)) if layers is None else layers
        for i in layers:
            half = x.shape[-1] // 2
            x = mx.concatenate([x[..., :half] * self.louder, x[..., half:]], axis=-1)
            skip = low_frequencies_scaled(skips.pop(), self.smooth)
            x = self.resnets[i](mx.concatenate([x, skip], axis=-1), time)
            if "attentions" in self:
                x = self.attentions[i](x, context)
        if "upsamplers" in self and layers.stop == len(self.resnets):
            _, rows, columns, _ = skips[-1].shape
            x = self.upsamplers[0](x, (rows, columns))
        return x


def set_freeu(unet: UNet, factors: Factors | None) -> None:
    """Weight a network's two coarsest ways up, or no longer."""
    pairs = [] if factors is None else [(factors.b1, factors.s1), (factors.b2, factors.s2)]
    for level, block in enumerate(unet.up_blocks):
        plain = block._plain[0] if isinstance(block, FreeUpBlock) else block
        changed = level < len(pairs)
        unet.up_blocks[level] = FreeUpBlock(plain, *pairs[level]) if changed else plain


def low_frequencies_scaled(x: mx.array, scale: float) -> mx.array:
    """(B, h, w, C) with its lowest frequencies times ``scale``; float32 inside."""
    _, rows, columns, _ = x.shape
    wide = x.astype(mx.float32)
    low = mx.zeros_like(wide)
    # The product of two complex matrices on both sides, of which only the real part is wanted.
    for sign, part in ((1, 0), (-1, 1)):
        left, right = mx.array(_lowest(rows)[part]), mx.array(_lowest(columns)[part])
        seen = mx.einsum("ij,bjkc->bikc", left, wide)
        low = low + sign * mx.einsum("kl,bilc->bikc", right, seen)
    return (wide + (scale - 1) * low).astype(x.dtype)


def _lowest(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of the projection onto frequencies -1 and 0 along one side."""
    place = 2 * np.pi * (np.arange(size)[:, None] - np.arange(size)) / size
    real, imaginary = (1 + np.cos(place)) / size, -np.sin(place) / size
    return real.astype(np.float32), imaginary.astype(np.float32)
