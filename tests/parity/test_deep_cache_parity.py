"""DeepCache against its authors' helper on diffusers' UNet, live, call by call."""

from types import SimpleNamespace

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from DeepCache import DeepCacheSDHelper
from network_parity import NETWORK

from mlx_maple.models import UNet, UNetConfig
from mlx_maple.models.deep_cache import full, shallow

pytestmark = pytest.mark.parity

CONFIG = {**recipe.UNET, "layers_per_block": 2}  # the helper counts three layers a level
TIMES = [921.0, 700.0, 420.0, 199.0, 3.0]
INTERVAL = 3
BRANCHES = [0, 1, 2, 4]


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(4)
    latents = [draw.standard_normal((2, 5, 7, 4), np.float32) for _ in TIMES]
    context = draw.standard_normal((2, 9, CONFIG["cross_attention_dim"]), np.float32)
    return latents, context


@pytest.fixture(scope="module", params=BRANCHES)
def expected(request, given):
    latents, context = given
    model = reference.unet(CONFIG)
    steps = SimpleNamespace(timesteps=torch.tensor(TIMES))
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=steps))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=request.param)
    helper.enable()
    with torch.no_grad():
        outs = [
            model(reference.nchw(x), torch.tensor(time), torch.from_numpy(context)).sample
            for x, time in zip(latents, TIMES, strict=True)
        ]
    return request.param, [reference.nhwc(out) for out in outs]


@pytest.fixture(scope="module")
def unet():
    return parity.fill(UNet(UNetConfig(**CONFIG)))


def drawn(unet, given, branch, interval):
    latents, context = given
    deep, found = None, []
    for call, (x, time) in enumerate(zip(latents, TIMES, strict=True)):
        inputs = mx.array(x), mx.array(time), mx.array(context)
        if deep is None or call % interval == 0:
            prediction, deep = full(unet, branch, *inputs)
        else:
            prediction, deep = shallow(unet, branch, deep, *inputs)
        found.append(prediction)
    return found


def test_deep_cache(unet, given, expected, parity_record):
    branch, wanted = expected
    for call, ours in enumerate(drawn(unet, given, branch, INTERVAL)):
        label = f"DeepCache branch {branch}, call {call}"
        parity.compare(parity_record, label, ours, wanted[call], NETWORK)


@pytest.mark.parametrize(("other", "interval"), [(0, 1), (1, INTERVAL)])
def test_interval_and_branch_are_seen(unet, given, expected, parity_record, other, interval):
    branch, wanted = expected
    ours = drawn(unet, given, branch + other, interval)[1]
    label = f"DeepCache branch {branch}, another's features every {interval}"
    parity.control(parity_record, label, ours, wanted[1], NETWORK)
