"""Timing: what is counted, what is waited for, and that the measured work is the real one."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_maple.engine import measure
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.measure import GuidedStep, Timing, UNetStep, randomise, timed
from mlx_maple.engine.prepare import prepare_unet
from mlx_maple.models import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(32, 64), transformer_layers=(1, 0), num_attention_heads=(8, 8),
    cross_attention_dim=32, layers_per_block=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    network = UNet(CONFIG)
    randomise(network, mx.float32)
    return network


def test_every_call_is_evaluated_and_counted_once():
    calls = []

    def call():
        calls.append(mx.ones((3,)) * len(calls))
        return calls[-1]

    timing = timed(call, warm_up=2, runs=4, rows=3)
    assert len(calls) == 2 + 4 + 3 * 4
    assert (len(timing.warm_up), len(timing.seconds), len(timing.in_a_row)) == (2, 4, 3)
    assert all(seconds > 0 for seconds in timing.seconds)
    assert timing.peak_bytes > 0


def test_figures_are_medians_and_the_warm_up_is_apart():
    row = Timing([9.0, 5.0], [3.0, 1.0, 2.0], [0.5, 0.7, 0.6], 10).row()
    assert row == {
        "median_s": 2.0,
        "fastest_s": 1.0,
        "slowest_s": 3.0,
        "in_a_row_s": 0.6,
        "first_s": 9.0,
        "runs": 3,
        "peak_bytes": 10,
    }
    assert Timing([], [1.0]).row()["in_a_row_s"] is None


def test_a_step_runs_on_what_the_last_one_made_at_another_time(unet):
    step = UNetStep(unet, 2, 64, 48, mx.float32)
    assert step.latents.shape == (2, 8, 6, 4)
    seen = [step.latents, step(), step(), step()]
    for before, after in pairwise(seen):
        assert not np.allclose(before, after)
    assert step.latents is seen[-1]


def test_a_guided_step_is_that_of_the_network_made_ready(unet):
    ready = prepare_unet(unet)
    ready.steps = GuidedSteps(ready, compiles=False)
    step = GuidedStep(ready, 1, 64, 64)
    first, second = step(), step()
    assert first.shape == (1, 8, 8, 4) and first.dtype == mx.float32
    assert not np.allclose(first, second)
    assert np.isfinite(np.array(second)).all()


def test_random_weights_are_made_in_their_type_and_keep_activations_near_one():
    network = UNet(CONFIG)
    randomise(network, mx.float16)
    weights = dict(tree_flatten(network.parameters()))
    assert {weight.dtype for weight in weights.values()} == {mx.float16}
    assert len({float(weight.sum()) for weight in weights.values() if weight.ndim > 1}) > 10
    out = network(mx.ones((1, 8, 8, 4)), mx.array([10.0]), mx.ones((1, 5, 32)))
    assert 0.01 < float(mx.abs(out.astype(mx.float32)).mean()) < 10


def test_random_networks_are_of_sd15s_size(monkeypatch):
    monkeypatch.setattr(measure, "randomise", lambda *given: None)  # they would take gigabytes
    sizes = {
        name: sum(weight.size for _, weight in tree_flatten(network.parameters()))
        for name, network in measure.random_sd15(mx.float16).items()
    }
    assert sizes == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    assert measure.random_sd15(mx.float16, parts=["vae"]).keys() == {"vae"}
