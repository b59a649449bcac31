"""Closed pictures: a network that knows no edge draws the same wherever the edge is put."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_maple.models import AutoencoderKL, UNet, UNetConfig, VAEConfig
from mlx_maple.models.seamless import WrappedConv2d, WrappedDownsample, wrap, wrapped

AXIS = {"x": 2, "y": 1}


@pytest.fixture(scope="module")
def unet() -> UNet:
    mx.random.seed(3)
    return UNet(
        UNetConfig(
            block_out_channels=(8, 16),
            layers_per_block=1,
            transformer_layers=(1, 0),
            num_attention_heads=(2, 2),
            cross_attention_dim=16,
            norm_num_groups=4,
        )
    )


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    mx.random.seed(4)
    return AutoencoderKL(
        VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    )


def shift_error(run, shape, axis, step, out_step):
    """How far a shifted input's output is from the shifted output, against the output's spread."""
    x = mx.random.normal(shape, key=mx.random.key(1))
    moved = run(mx.roll(x, step, axis))
    expected = mx.roll(run(x), out_step, axis)
    return (mx.abs(moved - expected).max() / mx.std(expected)).item()


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_the_unet_and_the_decoder_know_no_edge_along_those_axes(unet, vae, axes):
    times, context = mx.array([500.0]), mx.random.normal((1, 7, 16), key=mx.random.key(2))
    runs = {"unet": (lambda x: unet(x, times, context), 4), "vae": (vae.decode, 32)}
    try:
        for network in (unet, vae):
            wrap(network, axes)
        for run, out_step in runs.values():
            for letter, axis in AXIS.items():
                error = shift_error(run, (1, 8, 12, 4), axis, 4, out_step)
                if letter in axes:
                    assert error < 1e-4
                else:  # the control: an edge that is open is seen
                    assert error > 1e-3
    finally:
        for network in (unet, vae):
            wrap(network, None)


def test_the_encoder_wraps_what_its_source_wraps(vae):
    """Its halving pads by hand, in the source too: all but that is closed."""
    wrap(vae, "xy")
    try:
        closed = [m for _, m in vae.encoder.named_modules() if isinstance(m, WrappedConv2d)]
        plain = [m for _, m in vae.encoder.named_modules() if isinstance(m, WrappedDownsample)]
        assert len(closed) > 10 and not plain
    finally:
        wrap(vae, None)


def test_open_again_it_is_the_same_network(unet):
    def state():
        return [(name, type(m).__name__) for name, m in unet.named_modules()], [
            (name, np.array(w)) for name, w in tree_flatten(unet.parameters())
        ]

    x, times, context = mx.ones((1, 4, 4, 4)), mx.array([1.0]), mx.ones((1, 3, 16))
    before, drawn = state(), np.array(unet(x, times, context))
    wrap(unet, "xy")
    during = state()
    assert [name for name, _ in during[1]] == [name for name, _ in before[1]]
    assert not np.array_equal(drawn, np.array(unet(x, times, context)))
    wrap(unet, None)
    after = state()
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before[1], after[1], strict=True))
    assert np.array_equal(drawn, np.array(unet(x, times, context)))


def test_axes_can_be_changed_at_once(unet):
    wrap(unet, "x")
    wrap(unet, "y")
    layer = unet.conv_in
    assert isinstance(layer, WrappedConv2d) and (layer.columns, layer.rows) == (False, True)
    wrap(unet, None)


def test_wrapped_takes_the_opposite_edge():
    x = mx.arange(4).reshape(1, 4, 1, 1)
    assert wrapped(x, 1, 1).reshape(-1).tolist() == [3, 0, 1, 2, 3, 0]
    assert wrapped(x, 1, 0).shape == x.shape


def test_other_axes_are_refused(unet):
    with pytest.raises(ValueError, match="choose from x, y, xy"):
        wrap(unet, "z")
