"""TAESD, the tiny autoencoder: native names, upstream's numbers, diffusers' AutoencoderTiny.

Source   madebyollin/taesd taesd.py; diffusers 0.42 models/autoencoders/vae.py (EncoderTiny,
         DecoderTiny). MIT, Ollin Boer Bohan.
Numbers  Both halves are one nn.Sequential each. Upstream's decoder begins with the clamp, so its
         first convolution is 1; diffusers computes the clamp outside and begins at 0, as some
         re-saved upstream files do. Upstream ships two files without the half's name; here those
         names carry ``encoder.`` or ``decoder.`` in front.
"""

from collections.abc import Mapping
from typing import Any

from maple_convert.layouts.parts import SAME, Part, Parts, Place, View, conv

SPELLINGS = ("upstream", "upstream_from_0", "diffusers")

CONV = Parts("convolution", SPELLINGS, (Part("", (SAME, SAME, SAME), conv("in", "out")),))
RESAMPLE = Parts(
    "convolution that changes size",
    SPELLINGS,
    (Part("", (SAME, SAME, SAME), conv("in", "out", bias=False)),),
)
BLOCK = Parts(
    "block",
    SPELLINGS,
    (
        Part("conv.0", (SAME, SAME, SAME), conv("out", "out")),
        Part("conv.2", (SAME, SAME, SAME), conv("out", "out")),
        Part("conv.4", (SAME, SAME, SAME), conv("out", "out")),
    ),
)

TABLES = (CONV, RESAMPLE, BLOCK)
PUBLISHED_CONFIG = {"latent_channels": 4, "width": 64}

# What nn.Sequential holds at each number: a convolution, a strided or upsampled one, a block, or a
# layer without parameters.
ENCODER = ("conv_in", "block", *("resample", "block", "block", "block") * 3, "conv_out")
DECODER = (
    "conv_in",
    "relu",
    *("block", "block", "block", "upsample", "resample") * 3,
    "block",
    "conv_out",
)


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every layer with parameters, encoder first."""
    width: int = config["width"]
    image, latent = 3, int(config["latent_channels"])
    found: list[Place] = []
    for half, layers, first, last in (
        ("encoder", ENCODER, image, latent),
        ("decoder", DECODER, latent, image),
    ):
        for n, layer in enumerate(layers):
            inputs = first if layer == "conv_in" else width
            outputs = last if layer == "conv_out" else width
            parts = {
                "conv_in": CONV,
                "conv_out": CONV,
                "resample": RESAMPLE,
                "block": BLOCK,
            }.get(layer)
            if parts is None:
                continue
            clamp = 1 if half == "decoder" else 0
            names = (f"{half}.{n + clamp}", f"{half}.{n}", f"{half}.layers.{n}")
            dims = {"in": inputs, "out": outputs}
            found.append(Place(f"{half}.layers.{n}", names, parts, dims))
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes."""
    middle = "layers." if spelling == "diffusers" else ""
    first = {"upstream": "1", "upstream_from_0": "0", "diffusers": "layers.0"}[spelling]
    return {
        "latent_channels": view.axis(f"decoder.{first}.weight", 1, 4),
        "width": view.axis(f"encoder.{middle}0.bias", 0, 1),
    }
