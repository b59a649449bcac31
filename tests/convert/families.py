"""Tiny random models of every family past SD 1.x, in every published layout, made without torch.

Each is a family's true shape at small widths: the same blocks, fewer channels. Heads are 64 wide,
as files without a config are read. ``compvis`` and ``save_diffusers`` write what hubs hold.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from tiny import Arrays

from maple_convert.layouts import diffusers_config

TOKENS = 120
_CLIP = {**tiny.CONFIGS["text_encoder"], "vocab_size": TOKENS, "eos_token_id": TOKENS - 1}
_OPEN = {**_CLIP, "hidden_act": "gelu", "pad_token_id": 0}
_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "mid_transformer_layers": 1,
}
_SD1_UNET = {
    **_UNET,
    "block_out_channels": [32, 64, 64, 64],
    "transformer_layers": [1, 1, 1, 0],
    "num_attention_heads": [8, 8, 8, 8],
    "cross_attention_dim": 64,
}
_SD2_UNET = {
    **_SD1_UNET,
    "block_out_channels": [64, 64, 128, 128],
    "num_attention_heads": [1, 1, 2, 2],
}
_XL_UNET = {
    **_UNET,
    "block_out_channels": [32, 64, 128],
    "transformer_layers": [0, 2, 3],
    "mid_transformer_layers": 3,
    "num_attention_heads": [1, 1, 2],
    "cross_attention_dim": 128,
    "vector_channels": 40 + 6 * 8,
}
_BIG = {**_OPEN, "projection_dim": 40}
_XL_VAE = {**tiny.CONFIGS["vae"], "scaling_factor": 0.13025, "force_upcast": True}
_XL = {"text_encoder": _CLIP, "text_encoder_2": _BIG, "unet": _XL_UNET, "vae": _XL_VAE}

FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "sd2": {"text_encoder": _OPEN, "unet": _SD2_UNET, "vae": tiny.CONFIGS["vae"]},
    "sdxl": _XL,
    "sdxl-refiner": {
        "text_encoder_2": {**_BIG, "hidden_size": 64},
        "unet": {
            **_XL_UNET,
            "block_out_channels": [64, 64, 128, 128],
            "transformer_layers": [0, 2, 2, 0],
            "mid_transformer_layers": 2,
            "num_attention_heads": [1, 1, 2, 2],
            "cross_attention_dim": 64,
            "vector_channels": 40 + 5 * 8,
        },
        "vae": _XL_VAE,
    },
    # SSD-1B: one residual block in the middle, other depths on the way up.
    "sdxl-distilled": {
        **_XL,
        "unet": {
            **_XL_UNET,
            "mid_transformer_layers": 0,
            "transformer_layers": [0, 2, 3],
            "up_transformer_layers": [3, 3, 5, 2, 1, 1, 0, 0, 0],
        },
    },
    # tiny-sd and small-sd: no middle, one residual block a level.
    "sd1-distilled": {
        "text_encoder": _CLIP,
        "unet": {**_SD1_UNET, "layers_per_block": 1, "mid_transformer_layers": None},
        "vae": tiny.CONFIGS["vae"],
    },
}
# Published networks by the shape of their config, which need not be built to be told apart.
VEGA = {**_XL_UNET, "mid_transformer_layers": 0, "transformer_layers": [0, 1, 2]}
KOALA = {**_XL_UNET, "mid_transformer_layers": None, "layers_per_block": 1}

_TEXT = {
    "sd2": {"text_encoder": ("openclip", "cond_stage_model.model.")},
    "sdxl": {
        "text_encoder": ("transformers", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("openclip", "conditioner.embedders.1.model."),
    },
    "sdxl-refiner": {"text_encoder_2": ("openclip", "conditioner.embedders.0.model.")},
}
_TEXT["sdxl-distilled"] = _TEXT["sdxl"]


def native(family: str, dtype: Any = np.float32) -> dict[str, Arrays]:
    """A family's random native arrays by component."""
    return {name: tiny.arrays(name, c, dtype) for name, c in FAMILIES[family].items()}


def spelling(family: str, component: str) -> tuple[str, str]:
    """The spelling and prefix of a component in a CompVis file."""
    found = _TEXT.get(family, {}).get(component) or tiny.COMPVIS[component]
    is_linear = component == "unet" and not family.startswith("sd1")
    return (found[0] + "_linear" * is_linear, found[1])


def compvis(family: str, dtype: Any = np.float32) -> Arrays:
    """A family's whole model as one flat state dict."""
    arrays, state = native(family, dtype), {}
    for name, config in FAMILIES[family].items():
        how, prefix = spelling(family, name)
        state |= tiny.published(name, config, arrays[name], how, prefix)
    return state


def whole_openclip(dtype: Any = np.float32) -> Arrays:
    """SD 2.x's text encoder as its files hold it: with the last layer and the projection."""
    config = FAMILIES["sd2"]["text_encoder"]
    config = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1, "projection_dim": 64}
    arrays = tiny.arrays("text_encoder", config, dtype)
    arrays |= native("sd2", dtype)["text_encoder"]
    state = tiny.published("text_encoder", config, arrays, *_TEXT["sd2"]["text_encoder"])
    return {**state, "cond_stage_model.model.logit_scale": np.array(4.6, dtype)}


def save_diffusers(folder: Path, family: str, dtype: Any = np.float32, **changes: Any) -> Path:
    """A family's model as a diffusers folder; ``changes`` go into the UNet's config.json."""
    arrays = native(family, dtype)
    pipeline = (
        "StableDiffusionXLPipeline" if family.startswith("sdxl") else "StableDiffusionPipeline"
    )
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, config in FAMILIES[family].items():
        is_text, is_linear = name.startswith("text_encoder"), not family.startswith("sd1")
        how = (
            "transformers" if is_text else "diffusers" + "_linear" * (name == "unet" and is_linear)
        )
        kind, stem = tiny.CLASSES[name.removesuffix("_2")]
        kind += "WithProjection" * name.endswith("_2")
        index[name] = ["transformers" if is_text else "diffusers", kind]
        (folder / name).mkdir(parents=True)
        state = tiny.published(name, config, arrays[name], how)
        tiny.save_safetensors(folder / name / f"{stem}.safetensors", state)
        written = diffusers_config.write(
            name, config, 64, family=family, is_linear=is_linear, pooled=40
        )
        more: Mapping[str, Any] = changes if name == "unet" else {}
        tiny.write_json(folder / name / "config.json", {**written, **more})
    (folder / "scheduler").mkdir()
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    scheduler = diffusers_config.write_scheduler(diffusers_config.SD1_SCHEDULER, prediction)
    tiny.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    tiny.write_json(folder / "model_index.json", index)
    return folder
