"""Networks of Stable Diffusion's structure, a thousandth of its size, in which nothing is zero.

Biases and norms' weights are random too: a bias that is forgotten, or added twice, must be seen.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_maple.models import (
    AutoencoderKL,
    ControlNet,
    ControlNetConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)

CONTEXT = 32
SD1 = {
    "block_out_channels": (32, 64, 64, 64),
    "transformer_layers": (1, 1, 1, 0),
    "num_attention_heads": (2, 2, 2, 2),
}
XL = {  # attention from the second level on, and more than one block deep
    "block_out_channels": (32, 64, 64),
    "transformer_layers": (0, 2, 1),
    "num_attention_heads": (4, 2, 4),
    "mid_transformer_layers": 2,
}
SMALL = {
    "block_out_channels": (32, 64),
    "transformer_layers": (1, 0),
    "num_attention_heads": (2, 2),
    "layers_per_block": 1,
}


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random weights, biases and norms that keep activations near 1."""
    rng = np.random.default_rng(seed)
    found = []
    for name, old in tree_flatten(network.parameters()):
        values = rng.standard_normal(old.shape).astype(np.float32)
        if old.ndim > 1:
            values /= np.sqrt(old.size / old.shape[0])
        else:
            values = 0.3 * values + name.endswith("weight")
        found.append((name, mx.array(values)))
    network.update(tree_unflatten(found))
    mx.eval(network.parameters())
    return network


def unet(seed: int = 0, **facts) -> UNet:
    config = UNetConfig(cross_attention_dim=CONTEXT, norm_num_groups=8, **facts)
    return filled(UNet(config), seed)


def controlnet(seed: int = 0, **facts) -> ControlNet:
    facts = {"cross_attention_dim": CONTEXT, "norm_num_groups": 8, "hint_widths": (8, 16), **facts}
    return filled(ControlNet(ControlNetConfig(**facts)), seed)


def vae(seed: int = 0) -> AutoencoderKL:
    facts = {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return filled(AutoencoderKL(VAEConfig(**facts)), seed)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def error(found: mx.array, wanted: mx.array) -> float:
    """The largest difference, in units of the wanted array's standard deviation."""
    a, b = np.array(found, np.float64), np.array(wanted, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / b.std())
