"""Autoencoder (KL, f8) of Stable Diffusion: native, CompVis and two diffusers spellings.

Source   CompVis/stable-diffusion @21f890f ldm/modules/diffusionmodules/model.py; diffusers 0.42
         models/autoencoders/{autoencoder_kl,vae}.py, and before 2023 models/attention.py
         (``query``, ``key``, ``value``, ``proj_attn``: folders of that time still lie on the hub).
Numbers  CompVis counts decoder.up from the output side, diffusers from the latents.
Layouts  The one attention is made of 1x1 convolutions in CompVis and linear layers in diffusers;
         skips and the two convolutions around the latents are 1x1 convolutions in both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maple_convert.layouts.parts import (
    SAME,
    AsLinear,
    Part,
    Parts,
    Place,
    View,
    conv,
    norm,
    pointwise,
)

SPELLINGS = ("compvis", "diffusers", "diffusers_2022")

ROOT = Parts(
    "network",
    SPELLINGS,
    (
        Part("quant_conv", (SAME, SAME, SAME), pointwise("2z", "2z")),
        Part("post_quant_conv", (SAME, SAME, SAME), pointwise("z", "z")),
    ),
)
ENCODER = Parts(
    "encoder's ends",
    SPELLINGS,
    (
        Part("conv_in", (SAME, SAME, SAME), conv("image", "first")),
        Part("conv_norm_out", ("norm_out", SAME, SAME), norm("last")),
        Part("conv_out", (SAME, SAME, SAME), conv("last", "2z")),
    ),
)
DECODER = Parts(
    "decoder's ends",
    SPELLINGS,
    (
        Part("conv_in", (SAME, SAME, SAME), conv("z", "last")),
        Part("conv_norm_out", ("norm_out", SAME, SAME), norm("first")),
        Part("conv_out", (SAME, SAME, SAME), conv("first", "image")),
    ),
)
RESNET = Parts(
    "ResNet block",
    SPELLINGS,
    (
        Part("norm1", (SAME, SAME, SAME), norm("in")),
        Part("conv1", (SAME, SAME, SAME), conv("in", "out")),
        Part("norm2", (SAME, SAME, SAME), norm("out")),
        Part("conv2", (SAME, SAME, SAME), conv("out", "out")),
        Part("conv_shortcut", ("nin_shortcut", SAME, SAME), pointwise("in", "out"), ("in", "out")),
    ),
)
ATTENTION = Parts(
    "attention",
    SPELLINGS,
    (
        Part("group_norm", ("norm", SAME, SAME), norm("c")),
        Part("to_q", ("q", AsLinear("to_q"), AsLinear("query")), pointwise("c", "c")),
        Part("to_k", ("k", AsLinear("to_k"), AsLinear("key")), pointwise("c", "c")),
        Part("to_v", ("v", AsLinear("to_v"), AsLinear("value")), pointwise("c", "c")),
        Part(
            "to_out",
            ("proj_out", AsLinear("to_out.0"), AsLinear("proj_attn")),
            pointwise("c", "c"),
        ),
    ),
)
RESAMPLER = Parts(
    "down- or upsampler", SPELLINGS, (Part("conv", (SAME, SAME, SAME), conv("c", "c")),)
)

TABLES = (ROOT, ENCODER, DECODER, RESNET, ATTENTION, RESAMPLER)
PUBLISHED_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every block of both halves in the order in which data passes it."""
    widths: Sequence[int] = config["block_out_channels"]
    layers: int = config["layers_per_block"]
    latent: int = config["latent_channels"]
    first, last = widths[0], widths[-1]
    ends = {"first": first, "last": last, "z": latent, "2z": 2 * latent}
    found = [Place("", ("", "", ""), ROOT, ends)]

    def add(native: str, compvis: str, parts: Parts, dims: Mapping[str, int]) -> None:
        found.append(Place(native, (compvis, native, native), parts, dims))

    def middle(half: str, width: int) -> None:
        same = {"in": width, "out": width}
        add(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", RESNET, same)
        add(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", ATTENTION, {"c": width})
        add(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", RESNET, same)

    add("encoder", "encoder", ENCODER, {**ends, "image": config["in_channels"]})
    width = first
    for i, out in enumerate(widths):
        native, compvis = f"encoder.down_blocks.{i}", f"encoder.down.{i}"
        for j in range(layers):
            dims = {"in": width, "out": out}
            add(f"{native}.resnets.{j}", f"{compvis}.block.{j}", RESNET, dims)
            width = out
        if i < len(widths) - 1:
            add(f"{native}.downsamplers.0", f"{compvis}.downsample", RESAMPLER, {"c": out})
    middle("encoder", width)

    add("decoder", "decoder", DECODER, {**ends, "image": config["out_channels"]})
    middle("decoder", width)
    for i, out in enumerate(reversed(widths)):
        level = len(widths) - 1 - i
        native, compvis = f"decoder.up_blocks.{i}", f"decoder.up.{level}"
        for j in range(layers + 1):
            dims = {"in": width, "out": out}
            add(f"{native}.resnets.{j}", f"{compvis}.block.{j}", RESNET, dims)
            width = out
        if level:
            add(f"{native}.upsamplers.0", f"{compvis}.upsample", RESAMPLER, {"c": out})
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes; the scaling factor is not in them."""
    down, block = ("down", "block") if spelling == "compvis" else ("down_blocks", "resnets")
    levels = [f"encoder.{down}.{i}.{block}" for i in range(view.count(f"encoder.{down}"))]
    return {
        "in_channels": view.axis("encoder.conv_in.weight", 1, 4),
        "out_channels": view.axis("decoder.conv_out.weight", 0, 4),
        "latent_channels": view.axis("post_quant_conv.weight", 0, 4),
        "block_out_channels": [view.axis(f"{level}.0.conv1.bias", 0, 1) for level in levels],
        "layers_per_block": max((view.count(level) for level in levels), default=0),
    }
