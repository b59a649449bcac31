"""Token merging in networks that were made ready: models.token_merging on tokens that owe."""

from typing import NamedTuple

import mlx.core as mx

from mlx_maple.engine.kernels import Size
from mlx_maple.engine.prepare import PreparedUNet, Transformer
from mlx_maple.models.token_merging import Merging, finest, match


def set_token_merging(unet: PreparedUNet, ratio: float) -> None:
    """Merge tokens at the finest level that has transformers; 0 takes it back."""
    levels = finest(*([_transformers(steps) for steps in way] for way in (unet.down, unet.up)))
    merging = _Matcher(ratio) if ratio else None
    for layer in (layer for layers in levels for layer in layers):
        for block in layer.blocks:
            block.merging = merging


def _transformers(steps: list) -> list[Transformer]:
    return [step for step in steps if isinstance(step, Transformer)]


class _Matcher:
    """Finds tokens that look around as one, for a ratio."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def __call__(self, x: mx.array, owed: mx.array, size: Size) -> "_Rows | None":
        """``models.token_merging.match`` of tokens (B N, C) that still owe (C,)."""
        batch, rows, columns = size
        whole = (x + owed.astype(x.dtype)).reshape(batch, rows * columns, -1)
        found = match(whole, rows, columns, self.ratio)
        return None if found is None else _Rows(batch, found)


class _Rows(NamedTuple):
    """A merging of tokens that stand in rows, those of all samples: (B N, C)."""

    batch: int
    merging: Merging

    def merge(self, x: mx.array) -> mx.array:
        """Rows (B N, C) to rows (B M, C)."""
        return self.merging.merge(x.reshape(self.batch, -1, x.shape[-1])).flatten(0, 1)

    def unmerge(self, x: mx.array) -> mx.array:
        """Rows (B M, C) to rows (B N, C)."""
        return self.merging.unmerge(x.reshape(self.batch, -1, x.shape[-1])).flatten(0, 1)
