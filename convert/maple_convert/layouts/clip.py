"""CLIP text encoder: native and transformers names, with and without ``text_model.``.

Source   huggingface/transformers models/clip/modeling_clip.py. Versions from 5.6 on save a
         CLIPTextModel without the ``text_model.`` prefix; everything older, every CompVis file and
         CLIPTextModelWithProjection carry it. ``text_projection`` never had it.
"""

from collections.abc import Mapping
from typing import Any

from maple_convert.layouts.parts import SAME, Part, Parts, Place, View, linear, norm, table

SPELLINGS = ("transformers", "transformers_flat")
PREFIX = {"transformers": "text_model.", "transformers_flat": ""}

EMBEDDINGS = Parts(
    "embeddings",
    SPELLINGS,
    (
        Part("token_embedding", (SAME, SAME), table("tokens", "d")),
        Part("position_embedding", (SAME, SAME), table("positions", "d")),
    ),
)
LAYER = Parts(
    "layer",
    SPELLINGS,
    (
        Part("layer_norm1", (SAME, SAME), norm("d")),
        Part("self_attn.q_proj", (SAME, SAME), linear("d", "d")),
        Part("self_attn.k_proj", (SAME, SAME), linear("d", "d")),
        Part("self_attn.v_proj", (SAME, SAME), linear("d", "d")),
        Part("self_attn.out_proj", (SAME, SAME), linear("d", "d")),
        Part("layer_norm2", (SAME, SAME), norm("d")),
        Part("mlp.fc1", (SAME, SAME), linear("d", "hidden")),
        Part("mlp.fc2", (SAME, SAME), linear("hidden", "d")),
    ),
)
FINAL = Parts("final norm", SPELLINGS, (Part("final_layer_norm", (SAME, SAME), norm("d")),))
PROJECTION = Parts(
    "projection",
    SPELLINGS,
    (Part("text_projection", (SAME, SAME), linear("d", "p", bias=False)),),
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


def places(config: Mapping[str, Any]) -> list[Place]:
    """Every block in the order in which data passes it."""
    d: int = config["hidden_size"]

    def place(native: str, parts: Parts, **dims: int) -> Place:
        names = tuple((PREFIX[spelling] + native).rstrip(".") for spelling in SPELLINGS)
        return Place(native, names, parts, {"d": d, **dims})

    found = [
        place(
            "embeddings",
            EMBEDDINGS,
            tokens=config["vocab_size"],
            positions=config["max_position_embeddings"],
        )
    ]
    for n in range(config["num_hidden_layers"]):
        found.append(place(f"encoder.layers.{n}", LAYER, hidden=config["intermediate_size"]))
    found.append(place("", FINAL))
    if config["projection_dim"] is not None:
        found.append(Place("", ("", ""), PROJECTION, {"d": d, "p": config["projection_dim"]}))
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes; heads and activation are not in them."""
    prefix = PREFIX[spelling]
    projected = "text_projection.weight" in view.tensors
    return {
        "vocab_size": view.axis(f"{prefix}embeddings.token_embedding.weight", 0, 2),
        "hidden_size": view.axis(f"{prefix}embeddings.token_embedding.weight", 1, 2),
        "intermediate_size": view.axis(f"{prefix}encoder.layers.0.mlp.fc1.bias", 0, 1),
        "num_hidden_layers": view.count(f"{prefix}encoder.layers"),
        "max_position_embeddings": view.axis(f"{prefix}embeddings.position_embedding.weight", 0, 2),
        "projection_dim": view.axis("text_projection.weight", 0, 2) if projected else None,
    }
