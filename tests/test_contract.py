"""The contract of the two packages: the converter's names and shapes are the modules' own."""

import math
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from maple_convert import convert, open_model
from maple_convert.layouts import LAYOUTS, NATIVE
from maple_convert.maple_folder import SETTINGS
from maple_convert.open_file import complete
from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
    CLIPVisionEncoder,
    ControlNet,
    ControlNetConfig,
    IPAdapter,
    IPAdapterConfig,
    T2IAdapter,
    T2IAdapterConfig,
    TAESDConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)

MODULES = {
    "text_encoder": (CLIPTextConfig, CLIPTextEncoder),
    "text_encoder_2": (CLIPTextConfig, CLIPTextEncoder),
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, AutoencoderKL),
    "taesd": (TAESDConfig, TAESD),
    "controlnet": (ControlNetConfig, ControlNet),
    "t2i_adapter": (T2IAdapterConfig, T2IAdapter),
    "image_encoder": (CLIPVisionConfig, CLIPVisionEncoder),
    "ip_adapter": (IPAdapterConfig, IPAdapter),
}
OTHER_KIND = dict.fromkeys(("inner_dim", "num_attention_heads", "num_layers"))
ODD = {
    "text_encoder": [
        {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 300, "projection_dim": 40},
        {"hidden_size": 64, "intermediate_size": 100, "max_position_embeddings": 9},
    ],
    "unet": [
        {"block_out_channels": [64, 128, 64, 64], "cross_attention_dim": 128},
        {"block_out_channels": [32], "transformer_layers": [2], "layers_per_block": 3},
        {
            "block_out_channels": [32, 64, 32],
            "transformer_layers": [0, 2, 1],
            "layers_per_block": 1,
            "mid_transformer_layers": 3,
            "in_channels": 9,
            "cross_attention_dim": 24,
            "time_cond_dim": 14,
        },
        {
            "block_out_channels": [32, 64, 64],
            "transformer_layers": [0, 2, 4],
            "mid_transformer_layers": 0,
            "up_transformer_layers": [4, 4, 10, 2, 1, 1, 0, 0, 0],
            "vector_channels": 40,
        },
        {
            "block_out_channels": [32, 64],
            "transformer_layers": [1, 0],
            "mid_transformer_layers": None,
        },
    ],
    "vae": [
        {"block_out_channels": [32, 64, 96, 64]},
        {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 16},
    ],
    "taesd": [{"width": 8, "latent_channels": 16}],
    "controlnet": [
        {"block_out_channels": [64, 128, 64, 64], "hint_widths": [8, 24]},
        {"block_out_channels": [32], "transformer_layers": [2], "hint_channels": 1},
    ],
    "image_encoder": [{"hidden_size": 24, "image_size": 12, "patch_size": 4, "projection_dim": 7}],
    "ip_adapter": [
        {**OTHER_KIND, "projection": "linear", "tokens": 3, "channels": [8, 16, 8]},
        {**OTHER_KIND, "projection": "mlp", "tokens": None, "image_dim": 20},
        {"inner_dim": 10, "num_attention_heads": 1, "num_layers": 2, "channels": [8]},
    ],
}
# What a ControlNet's config takes from a UNet's and no ControlNet has.
NOT_A_CONTROLNETS = {"out_channels", "time_cond_dim", "up_transformer_layers"}
CASES = [(name, {}) for name in MODULES] + [(n, c) for n, cases in ODD.items() for c in cases]


def settings(name, changes):
    found = {**LAYOUTS[name].published_config, **changes}
    return complete(name, {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()})


def parameters(name, config):
    """Names and shapes of the module; nothing is computed, so a true-size one costs nothing."""
    kind, module = MODULES[name]
    return {
        key: tuple(value.shape) for key, value in tree_flatten(module(kind(**config)).parameters())
    }


@pytest.mark.parametrize("name, changes", CASES)
def test_names_and_shapes_are_the_modules_own(name, changes):
    config = settings(name, changes)
    rows = {row.native: row.native_shape for row in LAYOUTS[name].rows(config, NATIVE)}
    assert rows == parameters(name, config)


@pytest.mark.parametrize("name", MODULES)
def test_settings_are_the_config_classes_own(name):
    kind, _ = MODULES[name]
    own = {field.name for field in fields(kind)}
    assert set(SETTINGS[name]) == own - (NOT_A_CONTROLNETS if name == "controlnet" else set())
    if name in ("text_encoder_2", "ip_adapter"):
        return  # the class's defaults are another one's
    defaults = kind()
    for key, value in settings(name, {}).items():
        found = getattr(defaults, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key


@pytest.mark.weights
def test_a_converted_model_loads_as_it_is(weights, tmp_path):
    """One lazy ``mx.load`` a component and a strict load is all that a maple folder needs."""
    source = weights / "emoji-trial" / "emoji-trial.ckpt"
    convert(source, tmp_path / "out", digest=False)
    with open_model(source) as model:
        for name, part in model.components.items():
            kind, module = MODULES[name]
            network: nn.Module = module(kind(**part.config))
            arrays = mx.load(str(tmp_path / "out" / f"{name}.safetensors"))
            assert isinstance(arrays, dict)
            network.load_weights(list(arrays.items()), strict=True)
            loaded = dict(tree_flatten(network.parameters()))
            assert sum(math.prod(value.shape) for value in loaded.values()) == part.parameters
            for key, tensor in part.tensors():
                assert loaded[key].dtype == mx.float16
                assert np.array_equal(np.array(loaded[key]), tensor.array), key
