"""ESRGAN against a second statement of the paper's figure 4 in torch, written for this test."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maple_convert.upscaler import expected_shapes
from mlx_maple.models.esrgan import ESRGAN, ESRGANConfig

pytestmark = pytest.mark.parity


def reference(state, x, *, blocks, doublings, shuffle, slope=0.2, share=0.2):
    """The network as a function of torch tensors (B, C, H, W)."""

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def act(x):
        return F.leaky_relu(x, slope)

    def dense(name, x):
        seen = [x]
        for i in range(1, 5):
            seen.append(act(conv(f"{name}.conv{i}", torch.cat(seen, 1))))
        return x + share * conv(f"{name}.conv5", torch.cat(seen, 1))

    x = first = conv("conv_first", F.pixel_unshuffle(x, shuffle))
    for b in range(blocks):
        inner = x
        for d in (1, 2, 3):
            inner = dense(f"body.{b}.rdb{d}", inner)
        x = x + share * inner
    x = first + conv("conv_body", x)
    for i in range(doublings):
        x = act(conv(f"conv_up{i + 1}", F.interpolate(x, scale_factor=2, mode="nearest")))
    return conv("conv_last", act(conv("conv_hr", x)))


@pytest.mark.parametrize(("doublings", "shuffle"), [(2, 1), (1, 1), (2, 2), (3, 1), (2, 4)])
def test_esrgan(doublings, shuffle):
    config = {"width": 16, "growth": 8, "num_blocks": 3}
    config |= {"doublings": doublings, "shuffle": shuffle}
    draw = np.random.default_rng(2)
    state = {
        name: torch.from_numpy(draw.normal(0, 0.1, shape).astype(np.float32))
        for name, shape in expected_shapes(config).items()
    }
    network = ESRGAN(ESRGANConfig(**config))
    network.load_weights(
        [
            (n, mx.array((w.permute(0, 2, 3, 1) if w.ndim == 4 else w).numpy()))
            for n, w in state.items()
        ]
    )
    x = draw.random((2, 16, 24, 3), np.float32)
    how = {"blocks": 3, "doublings": doublings, "shuffle": shuffle}
    given = torch.from_numpy(x).permute(0, 3, 1, 2)
    wanted = reference(state, given, **how).permute(0, 2, 3, 1).numpy()
    ours = np.array(network(mx.array(x)))
    assert ours.shape == wanted.shape
    error = np.sqrt(np.mean((ours - wanted) ** 2)) / wanted.std()
    assert error < 2e-5
    for broken in ({"slope": 0.1}, {"share": 0.1}):
        other = reference(state, given, **how, **broken).permute(0, 2, 3, 1).numpy()
        assert np.sqrt(np.mean((ours - other) ** 2)) / wanted.std() > 1e-3
