"""Tiny networks whose weights and inputs need no file: both sides make them from names.

`numpy.random.RandomState` promises the same stream for ever, so a golden file holds only what the
reference answered. Names and shapes are the native ones (channels last).
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

CLIP = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "projection_dim": None,
    "eos_token_id": 95,
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 24, 16],
    "layers_per_block": 1,
    "transformer_layers": [1, 2, 0],
    "num_attention_heads": [2, 3, 2],
    "cross_attention_dim": 20,
    "mid_transformer_layers": 1,
    "norm_num_groups": 4,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 12, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
TAESD = {"latent_channels": 4, "width": 8}

# A wrong eps hides in a stream of unit variance. So the stream is kept at a std of about 0.15: what
# starts it and what adds to it is turned down.
QUIET = 0.15
QUIETENED = ("conv_in", "conv2", "proj_in", "proj_out", "to_out", "out_proj", "fc2")


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that name, with a variance like a trained one's, float32."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    *module, kind = name.split(".")
    if len(shape) == 1:
        centre = 1 if kind == "weight" else 0  # a norm's scale, or a bias
        return (centre + (0.1 if centre else 0.1 * QUIET) * noise).astype(np.float32)
    if module[-1].endswith("embedding"):
        return (QUIET * noise).astype(np.float32)
    gain = QUIET if module[-1] in QUIETENED and module[-2:] != ["ff", "proj_in"] else 1.0
    return (gain * noise / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Every weight of a network."""
    return {name: value(name, shape) for name, shape in shapes.items()}


def inputs() -> dict[str, np.ndarray]:
    """What the golden runs are fed. The latents' sides are odd, so that skips are cut."""
    random = np.random.RandomState(1234)
    ids = random.randint(1, 95, (2, 16))
    ids[0, 9:] = 95
    ids[1, 15:] = 95
    return {
        "ids": ids,
        "latents": random.standard_normal((2, 5, 6, 4)).astype(np.float32),
        "timesteps": np.array([20.0, 856.286], np.float32),
        "context": random.standard_normal((2, 7, 20)).astype(np.float32),
        "images": random.uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32),
        "tiny_latents": random.standard_normal((1, 2, 3, 4)).astype(np.float32),
        "vae_latents": random.standard_normal((1, 3, 4, 4)).astype(np.float32),
    }


def louder_autoencoder(weights: Mapping[str, Any], by: float = 2.0**17) -> dict[str, Any]:
    """An autoencoder's weights that compute the same with a residual stream ``by`` times as large.

    From the last resampling on in both halves: all that is added to the stream grows with it, and
    the norms before every other layer take the factor out again. The weights stay within float16,
    and the stream does not, as in SDXL's autoencoder.

    Args:
        weights: native names to arrays; of at least two levels.
        by: how many times.
    """
    levels = 1 + max(int(name.split(".")[2]) for name in weights if ".down_blocks." in name)
    grown = []  # what is added to the stream, and what makes it anew from a quiet one
    for half, resampler in (("encoder.down", "down"), ("decoder.up", "up")):
        last = f"{half}_blocks.{levels - 1}"
        grown += [f"{half}_blocks.{levels - 2}.{resampler}samplers.0.conv."]
        grown += [f"{last}.resnets.{n}.conv2." for n in range(9)]
        grown += [f"{last}.resnets.{n}.conv_shortcut.bias" for n in range(9)]
    grown += [f"encoder.mid_block.resnets.{n}.conv2." for n in range(2)]
    grown += ["encoder.mid_block.attentions.0.to_out."]
    return {name: v * by if name.startswith(tuple(grown)) else v for name, v in weights.items()}
