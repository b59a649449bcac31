"""FreeU against diffusers' own, live, on a small UNet of random weights."""

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from diffusers.utils.torch_utils import fourier_filter
from network_parity import NETWORK

from mlx_maple.models import UNet, UNetConfig
from mlx_maple.models.freeu import Factors, low_frequencies_scaled, set_freeu

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (5, 7)])
@pytest.mark.parametrize("scale", [0.2, 0.9, 1.5])
def test_low_frequencies(size, scale):
    x = np.random.default_rng(0).normal(size=(2, *size, 6)).astype(np.float32)
    wanted = fourier_filter(torch.from_numpy(x).permute(0, 3, 1, 2), threshold=1, scale=scale)
    ours = np.array(low_frequencies_scaled(mx.array(x), scale))
    assert np.allclose(ours, wanted.permute(0, 2, 3, 1).numpy(), atol=2e-6)
    assert not np.allclose(ours, x, atol=1e-2)


CONFIG = {
    **recipe.UNET,
    "block_out_channels": [8, 16, 24],
    "transformer_layers": [1, 1, 0],
    "num_attention_heads": [2, 2, 3],
}
FACTORS = Factors(b1=1.5, b2=1.6, s1=0.9, s2=0.2)
TIMES = [3.0, 921.5]


@pytest.fixture(scope="module", params=[(8, 12), (5, 11)], ids=["8x12", "5x11"])
def expected(request):
    draw = np.random.default_rng(4)
    latents = draw.standard_normal((2, *request.param, CONFIG["in_channels"]), np.float32)
    context = draw.standard_normal((2, 9, CONFIG["cross_attention_dim"]), np.float32)
    model = reference.unet(CONFIG)
    for number, block in enumerate(model.up_blocks):
        block.resolution_idx = number
    model.enable_freeu(**{name: getattr(FACTORS, name) for name in FACTORS._fields})
    with torch.no_grad():
        out = model(reference.nchw(latents), torch.tensor(TIMES), torch.from_numpy(context))
    return latents, context, reference.nhwc(out.sample)


def ours(latents, context, factors):
    unet = parity.fill(UNet(UNetConfig(**CONFIG)))
    set_freeu(unet, factors)
    return unet(mx.array(latents), mx.array(TIMES), mx.array(context))


def test_freeu(expected, parity_record, request):
    latents, context, wanted = expected
    found = ours(latents, context, FACTORS)
    parity.compare(parity_record, f"FreeU {request.node.callspec.id}", found, wanted, NETWORK)


@pytest.mark.parametrize("name", [None, *Factors._fields])
def test_each_factor_is_seen(expected, parity_record, request, name):
    """Without FreeU, and with each of its numbers a little off: the bar is missed."""
    latents, context, wanted = expected
    value = None if name is None else getattr(FACTORS, name)
    factors = None if value is None else FACTORS._replace(**{name: value * 1.05})
    found = ours(latents, context, factors)
    label = f"FreeU, {request.node.callspec.id}"
    parity.control(parity_record, label, found, wanted, NETWORK)
