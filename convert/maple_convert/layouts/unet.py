"""UNet of Stable Diffusion 1.x, 2.x and XL: native, CompVis and diffusers names.

Source   CompVis/stable-diffusion @21f890f ldm/modules/diffusionmodules/openaimodel.py and
         ldm/modules/attention.py; diffusers 0.42 models/unets/unet_2d_condition.py.
Numbers  CompVis counts input_blocks 0 (the first convolution), then every ResNet block (with the
         transformer that follows it) and every downsampler as one; an upsampler sits in the last
         output block of its level, at index 1 where the level has no transformers, else at 2.
Layouts  The layers before and after a transformer's blocks are 1x1 convolutions in SD 1.x's files
         and linear layers in all later ones: spellings that end in ``_linear``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maple_convert.layouts.parts import (
    LINEAR,
    SAME,
    Part,
    Parts,
    Place,
    View,
    conv,
    linear,
    norm,
    pointwise,
)

SPELLINGS = ("compvis", "diffusers")

ROOT = Parts(
    "network",
    SPELLINGS,
    (
        #    native                     CompVis              diffusers
        Part("time_embedding.linear_1", ("time_embed.0", SAME), linear("base", "time")),
        Part("time_embedding.linear_2", ("time_embed.2", SAME), linear("time", "time")),
        Part("conv_in", ("input_blocks.0.0", SAME), conv("in", "base")),
        Part("conv_norm_out", ("out.0", SAME), norm("base")),
        Part("conv_out", ("out.2", SAME), conv("base", "out")),
    ),
)
VECTOR = Parts(
    "vector's embedding",
    SPELLINGS,
    (
        Part("add_embedding.linear_1", ("label_emb.0.0", SAME), linear("vector", "time")),
        Part("add_embedding.linear_2", ("label_emb.0.2", SAME), linear("time", "time")),
    ),
)
RESNET = Parts(
    "ResNet block",
    SPELLINGS,
    (
        Part("norm1", ("in_layers.0", SAME), norm("in")),
        Part("conv1", ("in_layers.2", SAME), conv("in", "out")),
        Part("time_emb_proj", ("emb_layers.1", SAME), linear("time", "out")),
        Part("norm2", ("out_layers.0", SAME), norm("out")),
        Part("conv2", ("out_layers.3", SAME), conv("out", "out")),
        Part("conv_shortcut", ("skip_connection", SAME), pointwise("in", "out"), ("in", "out")),
    ),
)
# Latent consistency models: no CompVis file has a name for it, and some carry diffusers' own.
GUIDANCE = Parts(
    "guidance embedding",
    SPELLINGS,
    (Part("time_embedding.cond_proj", (SAME, SAME), linear("waves", "base", bias=False)),),
)
TRANSFORMER = Parts(
    "transformer",
    SPELLINGS,
    (
        Part("norm", (SAME, SAME), norm("c")),
        Part("proj_in", (SAME, SAME), pointwise("c", "c"), may_be_linear=True),
        Part("proj_out", (SAME, SAME), pointwise("c", "c"), may_be_linear=True),
    ),
)
TRANSFORMER_BLOCK = Parts(
    "transformer block",
    SPELLINGS,
    (
        Part("norm1", (SAME, SAME), norm("c")),
        Part("attn1.to_q", (SAME, SAME), linear("c", "c", bias=False)),
        Part("attn1.to_k", (SAME, SAME), linear("c", "c", bias=False)),
        Part("attn1.to_v", (SAME, SAME), linear("c", "c", bias=False)),
        Part("attn1.to_out", ("attn1.to_out.0", "attn1.to_out.0"), linear("c", "c")),
        Part("norm2", (SAME, SAME), norm("c")),
        Part("attn2.to_q", (SAME, SAME), linear("c", "c", bias=False)),
        Part("attn2.to_k", (SAME, SAME), linear("context", "c", bias=False)),
        Part("attn2.to_v", (SAME, SAME), linear("context", "c", bias=False)),
        Part("attn2.to_out", ("attn2.to_out.0", "attn2.to_out.0"), linear("c", "c")),
        Part("norm3", (SAME, SAME), norm("c")),
        # GEGLU: the first 4c outputs are the value, the last 4c its gate, in every spelling.
        Part("ff.proj_in", ("ff.net.0.proj", "ff.net.0.proj"), linear("c", "8c")),
        Part("ff.proj_out", ("ff.net.2", "ff.net.2"), linear("4c", "c")),
    ),
)
DOWNSAMPLER = Parts("downsampler", SPELLINGS, (Part("conv", ("op", SAME), conv("c", "c")),))
UPSAMPLER = Parts("upsampler", SPELLINGS, (Part("conv", (SAME, SAME), conv("c", "c")),))

TABLES = (
    ROOT,
    GUIDANCE,
    VECTOR,
    RESNET,
    TRANSFORMER,
    TRANSFORMER_BLOCK,
    DOWNSAMPLER,
    UPSAMPLER,
)
PUBLISHED_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "transformer_layers": (1, 1, 1, 0),
    "mid_transformer_layers": 1,
    "cross_attention_dim": 768,
}


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every block of the network in the order in which data passes it."""
    widths: Sequence[int] = config["block_out_channels"]
    depths: Sequence[int] = config["transformer_layers"]
    layers: int = config["layers_per_block"]
    time = 4 * widths[0]
    found = [
        Place(
            "",
            ("", ""),
            ROOT,
            {
                "in": config["in_channels"],
                "out": config["out_channels"],
                "base": widths[0],
                "time": time,
            },
        )
    ]

    if (waves := config.get("time_cond_dim")) is not None:
        found.append(Place("", ("", ""), GUIDANCE, {"waves": waves, "base": widths[0]}))
    if (vector := config.get("vector_channels")) is not None:
        found.append(Place("", ("", ""), VECTOR, {"vector": vector, "time": time}))

    def resnet(native: str, compvis: str, inputs: int, outputs: int) -> None:
        dims = {"in": inputs, "out": outputs, "time": time}
        found.append(Place(native, (compvis, native), RESNET, dims))

    def transformer(native: str, compvis: str, width: int, depth: int) -> None:
        dims = {"c": width, "4c": 4 * width, "8c": 8 * width}
        dims["context"] = config["cross_attention_dim"]
        found.append(Place(native, (compvis, native), TRANSFORMER, dims))
        for k in range(depth):
            block = f".transformer_blocks.{k}"
            names = (compvis + block, native + block)
            found.append(Place(native + block, names, TRANSFORMER_BLOCK, dims))

    skips = [widths[0]]
    width, index, last = widths[0], 1, len(widths) - 1
    for i, out in enumerate(widths):
        for j in range(layers):
            resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{index}.0", width, out)
            if depths[i]:
                native = f"down_blocks.{i}.attentions.{j}"
                transformer(native, f"input_blocks.{index}.1", out, depths[i])
            width, index = out, index + 1
            skips.append(width)
        if i < last:
            native = f"down_blocks.{i}.downsamplers.0"
            names = (f"input_blocks.{index}.0", native)
            found.append(Place(native, names, DOWNSAMPLER, {"c": width}))
            skips.append(width)
            index += 1

    middle: int | None = config["mid_transformer_layers"]
    if middle is not None:
        resnet("mid_block.resnets.0", "middle_block.0", width, width)
    if middle:
        transformer("mid_block.attentions.0", "middle_block.1", width, middle)
        resnet("mid_block.resnets.1", "middle_block.2", width, width)

    index, ups = 0, up_depths(config)
    for i, out in enumerate(reversed(widths)):
        for j in range(layers + 1):
            depth = ups[index]
            native, compvis = f"up_blocks.{i}", f"output_blocks.{index}"
            resnet(f"{native}.resnets.{j}", f"{compvis}.0", width + skips.pop(), out)
            if depth:
                transformer(f"{native}.attentions.{j}", f"{compvis}.1", out, depth)
            if j == layers and i < last:
                names = (f"{compvis}.{2 if depth else 1}", f"{native}.upsamplers.0")
                found.append(Place(names[1], names, UPSAMPLER, {"c": out}))
            width, index = out, index + 1
    return found


def up_depths(config: Mapping[str, Any]) -> Sequence[int]:
    """The depth behind each residual block on the way up, from the coarsest level on."""
    given: Sequence[int] | None = config.get("up_transformer_layers")
    if given is not None:
        return given
    layers: int = config["layers_per_block"]
    return [depth for depth in reversed(config["transformer_layers"]) for _ in range(layers + 1)]


@dataclass(frozen=True)
class Level:
    """One resolution of the downward path: the names of its blocks in the file's spelling.

    ``first`` is the name that its first ResNet block must have, whether or not it is there.
    """

    first: str
    resnets: list[str]
    transformers: list[str]


def walk(view: View, spelling: str) -> list[Level]:
    """The levels of the downward path, coarse facts only, in the order of the file's numbers."""
    return {"compvis": _walk_compvis, "diffusers": _walk_diffusers}[_base(spelling)](view)


def _base(spelling: str) -> str:
    return spelling.removesuffix(LINEAR)


def _walk_compvis(view: View) -> list[Level]:
    levels = [Level("input_blocks.1.0", [], [])]
    for n in range(1, view.count("input_blocks")):
        block = f"input_blocks.{n}"
        if view.holds(f"{block}.0.op"):
            levels.append(Level(f"input_blocks.{n + 1}.0", [], []))
            continue
        levels[-1].resnets.append(f"{block}.0")
        if view.holds(f"{block}.1"):
            levels[-1].transformers.append(f"{block}.1")
    return levels


def _walk_diffusers(view: View) -> list[Level]:
    levels: list[Level] = []
    for i in range(view.count("down_blocks")):
        block = f"down_blocks.{i}"
        resnets = [f"{block}.resnets.{j}" for j in range(view.count(f"{block}.resnets"))]
        attentions = view.count(f"{block}.attentions")
        transformers = [f"{block}.attentions.{j}" for j in range(attentions)]
        levels.append(Level(f"{block}.resnets.0", resnets, transformers))
    return levels


def middle(spelling: str) -> str:
    """The name of the middle transformer."""
    return {"compvis": "middle_block.1", "diffusers": "mid_block.attentions.0"}[_base(spelling)]


def has_linear_doors(view: View, spelling: str) -> bool:
    """Whether the layers before and after the transformers' blocks are linear ones in the file."""
    doors = [name for level in walk(view, spelling) for name in level.transformers]
    for door in (*doors, middle(spelling)):
        info = view.tensors.get(f"{door}.{TRANSFORMER.name('proj_in', spelling)}.weight")
        if info is not None:
            return len(info.shape) == 2
    return False


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes; the number of heads is not in them."""
    conv_out = ROOT.name("conv_out", spelling)
    found = infer_down(view, spelling)
    found["out_channels"] = view.axis(f"{conv_out}.weight", 0, 4)
    guidance = GUIDANCE.name("time_embedding.cond_proj", spelling) + ".weight"
    if guidance in view.tensors:
        found["time_cond_dim"] = view.axis(guidance, 1, 2)
    vector = VECTOR.name("add_embedding.linear_1", spelling) + ".weight"
    if vector in view.tensors:
        found["vector_channels"] = view.axis(vector, 1, 2)
    # Only where blocks were left out already: in a whole network a missing block is a fault.
    if not found["mid_transformer_layers"]:
        ups = _walk_up(view, spelling, len(found["block_out_channels"]), found["layers_per_block"])
        if ups != up_depths(found):
            found["up_transformer_layers"] = ups
    return found


def _walk_up(view: View, spelling: str, levels: int, layers: int) -> list[int]:
    """The depth behind each residual block on the way up, as the names have it."""
    if _base(spelling) == "compvis":
        names = [f"output_blocks.{n}.1" for n in range(levels * (layers + 1))]
    else:
        names = [f"up_blocks.{i}.attentions.{j}" for i in range(levels) for j in range(layers + 1)]
    return [view.count(f"{name}.transformer_blocks") for name in names]


def infer_down(view: View, spelling: str) -> dict[str, Any]:
    """What the way down and the middle say, which ControlNets have too."""
    levels = walk(view, spelling)
    bias = RESNET.name("conv1", spelling) + ".bias"
    to_k = TRANSFORMER_BLOCK.name("attn2.to_k", spelling) + ".weight"
    conv_in = ROOT.name("conv_in", spelling)
    first = next((t for level in levels for t in level.transformers), middle(spelling))
    mid_block = {"compvis": "middle_block", "diffusers": "mid_block"}[_base(spelling)]
    deep = None
    if view.holds(mid_block):
        deep = _depth(view, middle(spelling)) if view.holds(middle(spelling)) else 0
    return {
        "in_channels": view.axis(f"{conv_in}.weight", 1, 4),
        "block_out_channels": [view.axis(f"{level.first}.{bias}", 0, 1) for level in levels],
        "layers_per_block": max((len(level.resnets) for level in levels), default=0),
        "transformer_layers": [
            max((_depth(view, name) for name in level.transformers), default=0) for level in levels
        ],
        "mid_transformer_layers": deep,
        "cross_attention_dim": view.axis(f"{first}.transformer_blocks.0.{to_k}", 1, 2),
    }


def _depth(view: View, transformer: str) -> int:
    # A transformer whose blocks are all gone still counts as one: its keys are then missing.
    return max(view.count(f"{transformer}.transformer_blocks"), 1)
