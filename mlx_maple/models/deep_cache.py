"""DeepCache: a UNet's deep features, which change little between steps, used for several of them.

Legend   B batch; h, w latent rows and columns; C channels. Channels last. The kept states of the
         way down are numbered from 0, the first convolution's; a *branch* is one of them.
Source   Ma et al. 2023, DeepCache (arXiv:2312.00858), section 3; DeepCache 0.1.1
         (extension/deepcache.py), whose ``cache_branch_id`` this branch is.
Differs  Nothing. Tolerances: tests/parity/test_deep_cache_parity.py.

A full call is the network's own, and gives beside the prediction the map that meets the branch's
state on the way up. A shallow call takes that map as it was: of the network there run what leads to
the branch's state on the way down, and what comes after it on the way up. The rest of the way down
is described, too, and never evaluated, as nothing reads it.
"""

from typing import Any

import mlx.core as mx

from mlx_maple.models.attention import Context
from mlx_maple.models.unet import UNet


def place(branch: int, kept: int, layers: int) -> tuple[int, int]:
    """Where a branch's state is taken on the way up: the block, and the layer within it.

    Args:
        branch: number of the state.
        kept: how many there are.
        layers: residual blocks a level on the way up.

    Raises:
        ValueError: if there is no such state.
    """
    if not 0 <= branch < kept:
        raise ValueError(f"[deep_cache] expected a branch from 0 to {kept - 1}, got {branch}.")
    return divmod(kept - 1 - branch, layers)


def full(unet: UNet, branch: int, *inputs: Any, **told: Any) -> tuple[mx.array, mx.array]:
    """The network's prediction (B, h, w, C), and the deep map that meets a branch's state.

    Args:
        unet: plain, in any of its forms.
        branch: number of the state.
        inputs: what the network takes.
        told: likewise.
    """
    x, skips, time, context = unet.descend(*inputs, **told)
    level, layer = place(branch, len(skips), unet.config.layers_per_block + 1)
    for block in unet.up_blocks[:level]:
        x = block(x, skips, time, context)
    x = unet.up_blocks[level](x, skips, time, context, range(layer))
    deep = x
    return _climbed(unet, x, skips, time, context, level, layer), deep


def shallow(
    unet: UNet, branch: int, deep: mx.array, *inputs: Any, **told: Any
) -> tuple[mx.array, mx.array]:
    """The same with the ``deep`` map of another call, which is handed back."""
    _, skips, time, context = unet.descend(*inputs, **told)
    level, layer = place(branch, len(skips), unet.config.layers_per_block + 1)
    near = skips[: branch + 1]
    if isinstance(context, Context):  # what the layers that are left out would have seen
        for _ in range(_attentions_before(unet, level, layer)):
            next(context.image)
    return _climbed(unet, deep, near, time, context, level, layer), deep


def _attentions_before(unet: UNet, level: int, layer: int) -> int:
    """How many cross-attentions the way up has before a layer of a level."""
    kept = [
        attentions
        for i, block in enumerate(unet.up_blocks[: level + 1])
        for attentions in block.get("attentions", [])[: layer if i == level else None]
    ]
    return sum(len(attentions.transformer_blocks) for attentions in kept)


def _climbed(
    unet: UNet,
    x: mx.array,
    skips: list[mx.array],
    time: mx.array,
    context: mx.array | Context,
    level: int,
    layer: int,
) -> mx.array:
    """The way up from a layer of a level on."""
    block = unet.up_blocks[level]
    x = block(x, skips, time, context, range(layer, len(block.resnets)))
    for block in unet.up_blocks[level + 1 :]:
        x = block(x, skips, time, context)
    return unet.leave(x)
