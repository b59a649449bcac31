"""CLIP's image encoder: native, transformers' and OpenCLIP's names.

Source   huggingface/transformers models/clip/modeling_clip.py, CLIPVisionModelWithProjection, whose
         ``pre_layrnorm`` is spelt so; mlfoundations/open_clip @v2.0.2 src/open_clip/model.py, class
         VisualTransformer, everything below ``visual.``.
Layouts  OpenCLIP keeps queries, keys and values in one tensor, and its projection (D, P); the
         table of places and the picture's own token are tensors by themselves.
"""

import math
from collections.abc import Mapping
from typing import Any

from maple_convert.layouts.parts import (
    OIHW_TO_OHWI,
    SAME,
    Bare,
    Leaf,
    Packed,
    Part,
    Parts,
    Place,
    View,
    linear,
    norm,
    table,
    vector,
)

SPELLINGS = ("transformers", "openclip")

EMBEDDINGS = Parts(
    "embeddings",
    SPELLINGS,
    (
        Part(
            "class_embedding",
            (Bare("class_embedding"), Bare("class_embedding")),
            vector("d"),
        ),
        Part(
            "patch_embedding",
            (SAME, "conv1"),
            Leaf("conv of patches", ("d", "patch", "patch", "colours"), OIHW_TO_OHWI, bias=False),
        ),
        Part("position_embedding", (SAME, Bare("positional_embedding")), table("positions", "d")),
    ),
)
NORMS = Parts(
    "norms",
    SPELLINGS,
    (
        Part("pre_layernorm", ("pre_layrnorm", "ln_pre"), norm("d")),
        Part("post_layernorm", (SAME, "ln_post"), norm("d")),
    ),
)
LAYER = Parts(
    "layer",
    SPELLINGS,
    (
        Part("layer_norm1", (SAME, "ln_1"), norm("d")),
        Part("self_attn.q_proj", (SAME, Packed("attn.in_proj", 0, 3)), linear("d", "d")),
        Part("self_attn.k_proj", (SAME, Packed("attn.in_proj", 1, 3)), linear("d", "d")),
        Part("self_attn.v_proj", (SAME, Packed("attn.in_proj", 2, 3)), linear("d", "d")),
        Part("self_attn.out_proj", (SAME, "attn.out_proj"), linear("d", "d")),
        Part("layer_norm2", (SAME, "ln_2"), norm("d")),
        Part("mlp.fc1", (SAME, "mlp.c_fc"), linear("d", "hidden")),
        Part("mlp.fc2", (SAME, "mlp.c_proj"), linear("hidden", "d")),
    ),
)
PROJECTION = Parts(
    "projection",
    SPELLINGS,
    (
        Part(
            "visual_projection",
            (SAME, Bare("proj", transposed=True)),
            linear("d", "p", bias=False),
        ),
    ),
)

TABLES = (EMBEDDINGS, NORMS, LAYER, PROJECTION)
PUBLISHED_CONFIG = {  # OpenCLIP's ViT-H/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
}
# Heads are in no tensor: these are the published encoders', by their width.
HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
OPENAI_WIDTHS = (768, 1024)  # ViT-B and ViT-L, whose GELU is OpenAI's; the others are OpenCLIP's
NAMES = {768: "ViT-B", 1024: "ViT-L/14", 1280: "ViT-H/14", 1408: "ViT-g/14", 1664: "ViT-bigG/14"}


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every block in the order in which data passes it."""
    d: int = config["hidden_size"]
    cells = config["image_size"] // config["patch_size"]
    inside = "vision_model"
    found = [
        Place(
            "embeddings",
            (f"{inside}.embeddings", ""),
            EMBEDDINGS,
            {"d": d, "patch": config["patch_size"], "colours": 3, "positions": cells**2 + 1},
        ),
        Place("", (inside, ""), NORMS, {"d": d}),
    ]
    for n in range(config["num_hidden_layers"]):
        names = f"{inside}.encoder.layers.{n}", f"transformer.resblocks.{n}"
        widths = {"d": d, "hidden": config["intermediate_size"]}
        found.append(Place(f"encoder.layers.{n}", names, LAYER, widths))
    found.append(Place("", ("", ""), PROJECTION, {"d": d, "p": config["projection_dim"]}))
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes; heads and activation are not in them."""
    if spelling == "openclip":
        patches, positions = "conv1.weight", "positional_embedding"
        layers, inner = "transformer.resblocks", "mlp.c_fc.bias"
        projection, axis = "proj", 1
    else:
        patches = "vision_model.embeddings.patch_embedding.weight"
        positions = "vision_model.embeddings.position_embedding.weight"
        layers, inner = "vision_model.encoder.layers", "mlp.fc1.bias"
        projection, axis = "visual_projection.weight", 0
    patch = view.axis(patches, 2, 4)
    return {
        "hidden_size": view.axis(patches, 0, 4),
        "intermediate_size": view.axis(f"{layers}.0.{inner}", 0, 1),
        "num_hidden_layers": view.count(layers),
        "image_size": math.isqrt(max(view.axis(positions, 0, 2) - 1, 1)) * patch,
        "patch_size": patch,
        "projection_dim": view.axis(projection, axis, 2),
    }
