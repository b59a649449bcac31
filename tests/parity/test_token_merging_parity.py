"""Token merging against tomesd, live, on a small UNet of random weights."""

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import tomesd
import torch
from network_parity import NETWORK

from mlx_maple.models import UNet, UNetConfig
from mlx_maple.models.token_merging import match, set_token_merging

pytestmark = pytest.mark.parity

TIMES = [3.0, 921.5]
RATIO = 0.4


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (5, 7)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_the_same_tokens_are_merged(size, ratio):
    rows, columns = size
    x = np.random.default_rng(0).normal(size=(2, rows * columns, 6)).astype(np.float32)
    given = torch.from_numpy(x)
    count = int(rows * columns * ratio)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        given, columns, rows, 2, 2, count, no_rand=True
    )
    wanted = merge(given)
    found = match(mx.array(x), rows, columns, ratio)
    assert found is not None
    ours = found.merge(mx.array(x))
    assert ours.shape == tuple(wanted.shape)
    restored = np.array(found.unmerge(ours))
    assert np.allclose(restored, unmerge(wanted).numpy(), atol=1e-6)
    other = match(mx.array(x), columns, rows, ratio)  # the control: the map lies on its side
    assert (
        rows == columns
        or other is None
        or not np.allclose(np.array(other.unmerge(other.merge(mx.array(x)))), restored, atol=1e-3)
    )


@pytest.fixture(scope="module", params=[(8, 12), (5, 11)], ids=["8x12", "5x11"])
def expected(request):
    draw = np.random.default_rng(4)
    latents = draw.standard_normal((2, *request.param, recipe.UNET["in_channels"]), np.float32)
    context = draw.standard_normal((2, 9, recipe.UNET["cross_attention_dim"]), np.float32)
    model = reference.unet(recipe.UNET)
    tomesd.apply_patch(model, ratio=RATIO, use_rand=False)
    with torch.no_grad():
        out = model(reference.nchw(latents), torch.tensor(TIMES), torch.from_numpy(context))
    return latents, context, reference.nhwc(out.sample)


def ours(latents, context, ratio):
    unet = parity.fill(UNet(UNetConfig(**recipe.UNET)))
    set_token_merging(unet, ratio)
    return unet(mx.array(latents), mx.array(TIMES), mx.array(context))


def test_token_merging(expected, parity_record, request):
    latents, context, wanted = expected
    found = ours(latents, context, RATIO)
    label = f"token merging {request.node.callspec.id}"
    parity.compare(parity_record, label, found, wanted, NETWORK)


@pytest.mark.parametrize("ratio", [0, 0.35])
def test_the_ratio_is_seen(expected, parity_record, request, ratio):
    latents, context, wanted = expected
    label = f"token merging, {request.node.callspec.id}"
    parity.control(parity_record, label, ours(latents, context, ratio), wanted, NETWORK)
