"""CLIP text encoder: native, transformers' (with and without ``text_model.``) and OpenCLIP names.

Source   huggingface/transformers models/clip/modeling_clip.py. Versions from 5.6 on save a
         CLIPTextModel without the ``text_model.`` prefix; everything older, every CompVis file and
         CLIPTextModelWithProjection carry it. ``text_projection`` never had it.
         mlfoundations/open_clip @v2.0.2 src/open_clip/model.py: SD 2.x and SDXL files hold it so.
         leejet/stable-diffusion.cpp src/name_conversion.cpp: its GGUF files give SDXL's second
         encoder transformers' names, but for the projection.
Layouts  OpenCLIP keeps queries, keys and values in one tensor, in this order, and its projection
         (D, P), as it is multiplied by; the table of places is a tensor by itself.
"""

from collections.abc import Mapping
from typing import Any

from maple_convert.layouts.parts import (
    SAME,
    Bare,
    Packed,
    Part,
    Parts,
    Place,
    View,
    linear,
    norm,
    table,
)

SPELLINGS = ("transformers", "transformers_flat", "openclip", "sdcpp")
PREFIX = {"transformers": "text_model.", "transformers_flat": "", "sdcpp": "text_model."}

EMBEDDINGS = Parts(
    "embeddings",
    SPELLINGS,
    (
        Part("token_embedding", (SAME, SAME, SAME, SAME), table("tokens", "d")),
        Part(
            "position_embedding",
            (SAME, SAME, Bare("positional_embedding"), SAME),
            table("positions", "d"),
        ),
    ),
)
LAYER = Parts(
    "layer",
    SPELLINGS,
    (
        Part("layer_norm1", (SAME, SAME, "ln_1", SAME), norm("d")),
        Part(
            "self_attn.q_proj", (SAME, SAME, Packed("attn.in_proj", 0, 3), SAME), linear("d", "d")
        ),
        Part(
            "self_attn.k_proj", (SAME, SAME, Packed("attn.in_proj", 1, 3), SAME), linear("d", "d")
        ),
        Part(
            "self_attn.v_proj", (SAME, SAME, Packed("attn.in_proj", 2, 3), SAME), linear("d", "d")
        ),
        Part("self_attn.out_proj", (SAME, SAME, "attn.out_proj", SAME), linear("d", "d")),
        Part("layer_norm2", (SAME, SAME, "ln_2", SAME), norm("d")),
        Part("mlp.fc1", (SAME, SAME, "mlp.c_fc", SAME), linear("d", "hidden")),
        Part("mlp.fc2", (SAME, SAME, "mlp.c_proj", SAME), linear("hidden", "d")),
    ),
)
FINAL = Parts(
    "final norm", SPELLINGS, (Part("final_layer_norm", (SAME, SAME, "ln_final", SAME), norm("d")),)
)
PROJECTION = Parts(
    "projection",
    SPELLINGS,
    (
        Part(
            "text_projection",
            (
                SAME,
                SAME,
                Bare("text_projection", transposed=True),
                Bare("text_model.text_projection", transposed=True),
            ),
            linear("d", "p", bias=False),
        ),
    ),
)

TABLES = (EMBEDDINGS, LAYER, FINAL, PROJECTION)
PUBLISHED_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "projection_dim": None,
}
# SDXL's second, OpenCLIP's ViT-bigG/14.
PUBLISHED_CONFIG_2 = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
}


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every block in the order in which data passes it."""
    d: int = config["hidden_size"]

    def place(native: str, openclip: str, parts: Parts, **dims: int) -> Place:
        old, flat, sdcpp = ((prefix + native).rstrip(".") for prefix in PREFIX.values())
        return Place(native, (old, flat, openclip, sdcpp), parts, {"d": d, **dims})

    found = [
        place(
            "embeddings",
            "",
            EMBEDDINGS,
            tokens=config["vocab_size"],
            positions=config["max_position_embeddings"],
        )
    ]
    for n in range(config["num_hidden_layers"]):
        names = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
        found.append(place(*names, LAYER, hidden=config["intermediate_size"]))
    found.append(place("", "", FINAL))
    if config["projection_dim"] is not None:
        found.append(Place("", ("",) * 4, PROJECTION, {"d": d, "p": config["projection_dim"]}))
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes; heads and activation are not in them."""
    if spelling == "openclip":
        projected = "text_projection" in view.tensors
        return {
            "vocab_size": view.axis("token_embedding.weight", 0, 2),
            "hidden_size": view.axis("token_embedding.weight", 1, 2),
            "intermediate_size": view.axis("transformer.resblocks.0.mlp.c_fc.bias", 0, 1),
            "num_hidden_layers": view.count("transformer.resblocks"),
            "max_position_embeddings": view.axis("positional_embedding", 0, 2),
            "projection_dim": view.axis("text_projection", 1, 2) if projected else None,
        }
    prefix = PREFIX[spelling]
    projection, axis = "text_projection.weight", 0
    if spelling == "sdcpp":
        projection, axis = f"{prefix}text_projection", 1
    return {
        "vocab_size": view.axis(f"{prefix}embeddings.token_embedding.weight", 0, 2),
        "hidden_size": view.axis(f"{prefix}embeddings.token_embedding.weight", 1, 2),
        "intermediate_size": view.axis(f"{prefix}encoder.layers.0.mlp.fc1.bias", 0, 1),
        "num_hidden_layers": view.count(f"{prefix}encoder.layers"),
        "max_position_embeddings": view.axis(f"{prefix}embeddings.position_embedding.weight", 0, 2),
        "projection_dim": view.axis(projection, axis, 2) if projection in view.tensors else None,
    }
