"""T2I-Adapter: native names, the original's and diffusers'.

Source   TencentARC/T2I-Adapter ldm/modules/encoders/adapter.py, class Adapter; diffusers 0.42
         models/adapter.py (FullAdapter, FullAdapterXL).
Numbers  The original counts all residual blocks in one list; the first of a stage has the layer
         that changes its width. Which stages halve is in no tensor: SDXL's adapters, with cells of
         16 pixels, halve before the third alone, all others before each but the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maple_convert.layouts.parts import SAME, Part, Parts, Place, View, conv, pointwise

SPELLINGS = ("compvis", "diffusers")

ROOT = Parts("network", SPELLINGS, (Part("conv_in", (SAME, SAME), conv("cells", "base")),))
WIDTH = Parts("change of width", SPELLINGS, (Part("", (SAME, SAME), pointwise("in", "out")),))
RESNET = Parts(
    "block",
    SPELLINGS,
    (
        Part("block1", (SAME, SAME), conv("c", "c")),
        Part("block2", (SAME, SAME), pointwise("c", "c")),
    ),
)

TABLES = (ROOT, WIDTH, RESNET)
PUBLISHED_CONFIG = {
    "hint_channels": 3,
    "channels": (320, 640, 1280, 1280),
    "layers": 2,
    "downscale": 8,
    "halves": (1, 2, 3),
}
XL = 16  # pixels a cell is wide in SDXL's adapters, in the others half of that


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every layer in the order in which data passes it."""
    widths: Sequence[int] = config["channels"]
    layers: int = config["layers"]
    cells = config["hint_channels"] * config["downscale"] ** 2
    found = [Place("", ("", "adapter"), ROOT, {"cells": cells, "base": widths[0]})]
    for i, width in enumerate(widths):
        before = widths[max(i - 1, 0)]
        if before != width:
            native = f"body.{i}.in_conv"
            names = (f"body.{i * layers}.in_conv", f"adapter.{native}")
            found.append(Place(native, names, WIDTH, {"in": before, "out": width}))
        for j in range(layers):
            native = f"body.{i}.resnets.{j}"
            names = (f"body.{i * layers + j}", f"adapter.{native}")
            found.append(Place(native, names, RESNET, {"c": width}))
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes."""
    root = "adapter." if spelling == "diffusers" else ""
    cells = view.axis(f"{root}conv_in.weight", 1, 4)
    if spelling == "diffusers":
        stages = view.count("adapter.body")
        layers = view.count("adapter.body.0.resnets")
        firsts = [f"adapter.body.{i}.resnets.0" for i in range(stages)]
    else:
        # Widths say where a stage begins, but for one that keeps them: all stages are as long.
        blocks = view.count("body")
        later = [n for n in range(1, blocks) if view.holds(f"body.{n}.in_conv")]
        layers = later[0] if later else blocks
        firsts = [f"body.{n}" for n in range(0, blocks, max(layers, 1))]
    is_xl = cells in (XL**2, 3 * XL**2)
    downscale = XL if is_xl else XL // 2
    return {
        "hint_channels": max(cells // downscale**2, 1),
        "channels": [view.axis(f"{name}.block1.bias", 0, 1) for name in firsts],
        "layers": layers,
        "downscale": downscale,
        "halves": [2] if is_xl else list(range(1, len(firsts))),
    }
