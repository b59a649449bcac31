"""A model of SD 1's architecture with a few channels and random weights, built in this process."""

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    TAESDConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from mlx_maple.pipeline import StableDiffusion
from mlx_maple.sampling import NoiseSchedule
from mlx_maple.text.tokenizer import Tokenizer

DEFAULTS = {
    "width": 128,
    "height": 64,
    "steps": 4,
    "guidance_scale": 5.0,
    "sampler": "euler_a",
    "schedule": "karras",
}


def made(*, dtype: mx.Dtype = mx.float32, **more) -> StableDiffusion:
    """The model anew; always the same weights."""
    mx.random.seed(0)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    unet = UNetConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers=(1, 0),
        num_attention_heads=(2, 2),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    networks = {
        "text_encoder": CLIPTextEncoder(text),
        "unet": UNet(unet),
        "vae": AutoencoderKL(vae),
        "taesd": TAESD(TAESDConfig(width=4)),
    }
    for name, network in networks.items():
        network.eval()
        if name == "text_encoder":  # MLX starts embeddings and layers too small to matter
            network.update(tree_map(lambda weight: weight * 3, network.parameters()))
        network.set_dtype(dtype)
        mx.eval(network.parameters())
    return StableDiffusion(
        **networks,
        tokenizer=Tokenizer.bundled(),
        noise_schedule=NoiseSchedule.from_betas(),
        defaults=DEFAULTS,
        **{"name": "tiny", "sha256": "0123456789abcdef", "notes": ["a note"], **more},
    )


@pytest.fixture(scope="session")
def build():
    """Makes a model that a test may change."""
    return made


@pytest.fixture(scope="session")
def sd() -> StableDiffusion:
    """The model that all tests share, and leave as it is."""
    return made()


@pytest.fixture(scope="session")
def defaults() -> dict:
    return DEFAULTS
