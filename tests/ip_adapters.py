"""IP-Adapters and image encoders for the tiny model, in the files that people have."""

import functools
import json
from pathlib import Path

import numpy as np
import tiny_model
from safetensors.numpy import save_file

from maple_convert.layouts import LAYOUTS, diffusers_config

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 20,
    "hidden_act": "gelu",
}
# Of the tiny model's cross-attentions: down, up (of which the finest level has two), middle.
CHANNELS = [32, 32, 32, 64]
_PLAIN = {"cross_attention_dim": 64, "channels": CHANNELS}
_NONE = dict.fromkeys(("tokens", "inner_dim", "num_attention_heads", "num_layers"))
KINDS = {
    "linear": {**_NONE, **_PLAIN, "projection": "linear", "image_dim": 20, "tokens": 4},
    "mlp": {**_NONE, **_PLAIN, "projection": "mlp", "image_dim": 32},
    "resampler": {
        **_PLAIN,
        "projection": "resampler",
        "image_dim": 32,
        "tokens": 5,
        "inner_dim": 24,
        "num_attention_heads": 1,
        "num_layers": 2,
    },
}


def state(component: str, config: dict, spelling: str, seed: int = 5) -> dict[str, np.ndarray]:
    """Random weights of a size that matters, by published name."""
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for row in LAYOUTS[component].rows(config, spelling):
        shape = row.published_shape
        values = random.normal(0, 0.3 if len(shape) > 1 else 0.1, shape)
        if len(shape) == 1 and row.native.endswith("weight") and "norm" in row.native:
            values += 1
        found[row.published] = values.astype(np.float32)
    return found


def published(
    component: str, config: dict, native: dict, spelling: str, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Native arrays in a published spelling; parts of one tensor one under the other."""
    found: dict[str, np.ndarray] = {}
    for row in LAYOUTS[component].rows(config, spelling):
        name, values = prefix + row.published, row.weights.to_published(native[row.native])
        found[name] = np.concatenate([found[name], values]) if name in found else values
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def nested(plain: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """As the original's .bin files hold it: a dictionary of two."""
    found: dict[str, dict[str, np.ndarray]] = {"image_proj": {}, "ip_adapter": {}}
    for name, values in plain.items():
        part, _, rest = name.partition(".")
        found[part][rest] = values
    return found


@functools.cache
def folder() -> Path:
    """An adapter of each kind, and beside them the encoder, in a folder as published."""
    made = tiny_model.folder() / "ip"
    encoder = made / "image_encoder"
    encoder.mkdir(parents=True)
    save_file(state("image_encoder", ENCODER, "transformers"), encoder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps(diffusers_config.write_image_encoder(ENCODER)))
    for seed, (kind, config) in enumerate(KINDS.items()):
        save_file(state("ip_adapter", config, "original", seed), made / f"{kind}.safetensors")
    return made
