"""UNets with parts left out, in the arrangements that are published, beside diffusers' own.

Each is built by diffusers from its publisher's config.json with narrow widths, saved as a folder
and spelt as a bare CompVis file; our reader must find the arrangement in the tensors of either.

Source   nota-ai/bk-sdm-{base,small,tiny} and -v2: Nota-NetsPresso/BK-SDM @f3d9882 src/unet_config*
         (segmind/tiny-sd has bk-sdm-tiny's, segmind/small-sd bk-sdm-base's: 323 and 579 million).
         segmind/SSD-1B: huggingface/diffusers#5400 and its config.json; segmind/Segmind-Vega and
         etri-vilab/koala-700m, -1b: the tables of ComfyUI's comfy/model_detection.py.
"""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import torch
from diffusers import UNet2DConditionModel
from network_parity import NETWORK
from safetensors.numpy import save_file

from maple_convert import open_model
from maple_convert.layouts import LAYOUTS, NATIVE
from mlx_maple.models import UNet, UNetConfig
from mlx_maple.models.layers import sinusoids

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
import tiny

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
SMALL = {
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": [CROSS_DOWN] * 3 + [DOWN],
    "up_block_types": [UP] + [CROSS_UP] * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
}
BASE = {**SMALL, "mid_block_type": "UNetMidBlock2DCrossAttn"}
TINY = {
    **SMALL,
    "block_out_channels": [32, 64, 64],
    "down_block_types": [CROSS_DOWN] * 3,
    "up_block_types": [CROSS_UP] * 3,
}
SD2 = {"use_linear_projection": True, "upcast_attention": True}
XL = {
    "block_out_channels": [64, 64, 128],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
    "sample_size": 128,
}
# The publisher's arrangement; the family; middle, depths down, depths up where they differ.
PUBLISHED: dict[str, tuple[dict[str, Any], str, Any, list[int], list[int] | None]] = {
    "bk-sdm-base": (BASE, "sd1", 1, [1, 1, 1, 0], None),
    "bk-sdm-small": (SMALL, "sd1-distilled", None, [1, 1, 1, 0], None),
    "bk-sdm-tiny": (TINY, "sd1-distilled", None, [1, 1, 1], None),
    "bk-sdm-v2-small": (
        {**SMALL, **SD2, "block_out_channels": [64, 64, 128, 128]}
        | {"attention_head_dim": [1, 1, 2, 2]},
        "sd2-distilled",
        None,
        [1, 1, 1, 0],
        None,
    ),
    "bk-sdm-v2-tiny": (
        {**TINY, **SD2, "block_out_channels": [64, 64, 128], "attention_head_dim": [1, 1, 2]},
        "sd2-distilled",
        None,
        [1, 1, 1],
        None,
    ),
    "SSD-1B": (
        {**XL, "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D"}
        | {"transformer_layers_per_block": [[1], [2, 2], [4, 4]]}
        | {"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]},
        "sdxl-distilled",
        0,
        [0, 2, 4],
        [4, 4, 10, 2, 1, 1, 0, 0, 0],
    ),
    "Segmind-Vega": (
        {**XL, "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D"}
        | {"transformer_layers_per_block": [[1], [1, 1], [2, 2]]}
        | {"reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1]},
        "sdxl-distilled",
        0,
        [0, 1, 2],
        None,
    ),
    "koala-700m": (
        {**XL, "layers_per_block": 1, "mid_block_type": None}
        | {"transformer_layers_per_block": [1, 2, 5]},
        "sdxl-distilled",
        None,
        [0, 2, 5],
        None,
    ),
    "koala-1b": (
        {**XL, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
        "sdxl",
        6,
        [0, 2, 6],
        None,
    ),
}


def theirs(config: dict[str, Any]) -> UNet2DConditionModel:
    """diffusers' network, its weights made from their names."""
    model = UNet2DConditionModel(**config).eval()
    values = {n: recipe.value(n, tuple(v.shape)) for n, v in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(v) for name, v in values.items()})
    return model


def ours(opened: Any) -> UNet:
    part = opened.components["unet"]
    unet = UNet(UNetConfig(**part.config))
    weights = [(name, mx.array(tensor.array)) for name, tensor in part.tensors("float32")]
    unet.load_weights(weights, strict=True)
    return unet


def bare(opened: Any, path: Path) -> Path:
    """The same UNet as one file in CompVis names."""
    part = opened.components["unet"]
    native = {name: tensor.array for name, tensor in part.tensors("float32")}
    spelling = "compvis_linear" if part.has_linear_doors else "compvis"
    state = tiny.published("unet", part.config, native, spelling, "model.diffusion_model.")
    save_file(state, path)
    return path


def swapped(unet: UNet) -> None:
    """The way up's first transformer and the one behind it take each other's places."""
    level = next(block for block in unet.up_blocks if "attentions" in block and block.attentions)
    first, second = level.attentions[:2]
    level.attentions[:2] = [second, first]


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_distilled_unet(name, parity_record, tmp_path):
    config, family, middle, depths, ups = PUBLISHED[name]
    model = theirs(config)
    model.save_pretrained(tmp_path / "unet")
    random = np.random.default_rng(3)
    latents = random.standard_normal((1, 4, 8, 4), np.float32)
    context = random.standard_normal((1, 7, 64), np.float32)
    told, vector = None, None
    if "addition_embed_type" in config:
        pooled, sizes = random.standard_normal((1, 40), np.float32), np.arange(6.0)[None] * 50
        told = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(sizes)}
        waves = sinusoids(mx.array(sizes[0].astype(np.float32)), 8).reshape(1, -1)
        vector = mx.concatenate([mx.array(pooled), waves], axis=-1)
    expected = model(
        torch.from_numpy(np.moveaxis(latents, -1, 1).copy()),
        torch.tensor(500.25),
        torch.from_numpy(context),
        added_cond_kwargs=told,
    ).sample.numpy()
    expected = np.moveaxis(expected, 1, -1)
    arrays = mx.array(latents), 500.25, mx.array(context), vector
    with open_model(tmp_path / "unet") as opened:
        found = opened.components["unet"].config
        assert opened.family == family
        assert found["transformer_layers"] == depths
        assert (found["mid_transformer_layers"], found.get("up_transformer_layers")) == (
            middle,
            ups,
        )
        unet = ours(opened)
        parity.compare(parity_record, f"{name}: UNet", unet(*arrays), expected, NETWORK)
        file = bare(opened, tmp_path / "bare.safetensors")
    with open_model(file) as alone:
        assert alone.family == family
        assert alone.components["unet"].config == found
        again = ours(alone)
        assert mx.array_equal(again(*arrays), unet(*arrays)).item()
    swapped(unet)
    parity.control(parity_record, f"{name}: two swapped", unet(*arrays), expected, NETWORK)


# Of the UNet alone: Nota-NetsPresso/BK-SDM's MODEL_CARD.md, and what the float32 files take.
BILLIONS = {
    "bk-sdm-base": 0.58,
    "bk-sdm-small": 0.49,
    "bk-sdm-tiny": 0.33,
    "koala-700m": 3.13 / 4,
    "koala-1b": 4.64 / 4,
}


@pytest.mark.parametrize("name", BILLIONS)
def test_published_widths_have_the_published_size(name):
    config, _, middle, depths, ups = PUBLISHED[name]
    is_xl = "addition_embed_type" in config
    whole = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280][: len(depths)],
        "layers_per_block": config["layers_per_block"],
        "transformer_layers": depths,
        "mid_transformer_layers": middle,
        "cross_attention_dim": 2048 if is_xl else 768,
        **({"vector_channels": 2816} if is_xl else {}),
        **({"up_transformer_layers": ups} if ups is not None else {}),
    }
    total = sum(int(np.prod(row.native_shape)) for row in LAYOUTS["unet"].rows(whole, NATIVE))
    assert abs(total / 1e9 - BILLIONS[name]) < 0.01, total
