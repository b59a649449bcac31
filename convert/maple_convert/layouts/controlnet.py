"""ControlNet: native, CompVis and diffusers names.

Source   lllyasviel/ControlNet @ed85cd1 cldm/cldm.py, class ControlNet; diffusers 0.42
         models/controlnets/controlnet.py.
Numbers  Its way down and its middle are a UNet's, in the UNet's names. CompVis numbers the layers
         that embed the picture together with the activations between them (0, 2, 4, …), and has one
         "zero convolution" for each of its input_blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maple_convert.layouts import unet
from maple_convert.layouts.parts import (
    LINEAR,
    SAME,
    Part,
    Parts,
    Place,
    View,
    conv,
    linear,
    pointwise,
)

SPELLINGS = unet.SPELLINGS

ROOT = Parts(
    "network",
    SPELLINGS,
    (
        Part("time_embedding.linear_1", ("time_embed.0", SAME), linear("base", "time")),
        Part("time_embedding.linear_2", ("time_embed.2", SAME), linear("time", "time")),
        Part("conv_in", ("input_blocks.0.0", SAME), conv("in", "base")),
    ),
)
HINT = Parts("picture's convolution", SPELLINGS, (Part("", (SAME, SAME), conv("in", "out")),))
ZERO = Parts("zero convolution", SPELLINGS, (Part("", (SAME, SAME), pointwise("c", "c")),))

TABLES = (ROOT, HINT, ZERO)
PUBLISHED_CONFIG = {
    **{key: value for key, value in unet.PUBLISHED_CONFIG.items() if key != "out_channels"},
    "hint_channels": 3,
    "hint_widths": (16, 32, 96, 256),
}
_EMBEDDING = "controlnet_cond_embedding"


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every block of the network in the order in which data passes it."""
    as_unet = {**config, "out_channels": config["in_channels"]}
    shared = unet.places(as_unet)
    widths: Sequence[int] = config["block_out_channels"]
    hints: Sequence[int] = config["hint_widths"]
    dims = {"in": config["in_channels"], "base": widths[0], "time": 4 * widths[0]}
    found = [Place("", ("", ""), ROOT, dims)]
    if (vector := config.get("vector_channels")) is not None:
        dims = {"vector": vector, "time": 4 * widths[0]}
        found.append(Place("", ("", ""), unet.VECTOR, dims))

    def hint(name: str, number: int, inputs: int, outputs: int) -> None:
        native = f"{_EMBEDDING}.{name}"
        names = (f"input_hint_block.{number}", native)
        found.append(Place(native, names, HINT, {"in": inputs, "out": outputs}))

    hint("conv_in", 0, config["hint_channels"], hints[0])
    for n in range(len(hints) - 1):
        hint(f"blocks.{2 * n}", 4 * n + 2, hints[n], hints[n])
        hint(f"blocks.{2 * n + 1}", 4 * n + 4, hints[n], hints[n + 1])
    hint("conv_out", 4 * len(hints) - 2, hints[-1], widths[0])

    kept = [widths[0]]
    last = len(widths) - 1
    for i, width in enumerate(widths):
        kept += [width] * (config["layers_per_block"] + (i < last))
    for n, width in enumerate(kept):
        native = f"controlnet_down_blocks.{n}"
        found.append(Place(native, (f"zero_convs.{n}.0", native), ZERO, {"c": width}))
    native = "controlnet_mid_block"
    found.append(Place(native, ("middle_block_out.0", native), ZERO, {"c": widths[-1]}))
    return found + [p for p in shared if p.native.startswith(("down_blocks.", "mid_block."))]


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes; the number of heads is not in them."""
    compvis = spelling.removesuffix(LINEAR) == "compvis"
    hint = {True: "input_hint_block.{}", False: f"{_EMBEDDING}.blocks.{{}}"}[compvis]
    first = hint.format(0) if compvis else f"{_EMBEDDING}.conv_in"
    coarser: list[str] = []
    n = 1
    while view.holds(name := hint.format(4 * n if compvis else 2 * n - 1)):
        coarser.append(name)
        n += 1
    vector = unet.VECTOR.name("add_embedding.linear_1", spelling) + ".weight"
    told = {"vector_channels": view.axis(vector, 1, 2)} if vector in view.tensors else {}
    return {
        **unet.infer_down(view, spelling),
        **told,
        "hint_channels": view.axis(f"{first}.weight", 1, 4),
        "hint_widths": [view.axis(f"{name}.bias", 0, 1) for name in (first, *coarser)],
    }
