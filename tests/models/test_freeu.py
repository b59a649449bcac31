"""FreeU without torch: what it leaves alone, and that it can be taken back."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_maple.models import UNet, UNetConfig
from mlx_maple.models.freeu import Factors, low_frequencies_scaled, set_freeu


def test_a_wave_passes_and_a_plane_is_scaled():
    wave = np.cos(2 * np.pi * 3 * np.arange(8) / 8)[None, :, None, None] * np.ones((1, 1, 8, 2))
    plane = np.full((1, 8, 8, 2), 3.0)
    found = np.array(low_frequencies_scaled(mx.array((wave + plane).astype(np.float32)), 0.2))
    assert np.allclose(found, wave + 0.2 * plane, atol=1e-5)


@pytest.fixture(scope="module")
def unet() -> UNet:
    mx.random.seed(3)
    return UNet(
        UNetConfig(
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            transformer_layers=(1, 0, 0),
            num_attention_heads=(2, 2, 2),
            cross_attention_dim=16,
            norm_num_groups=4,
        )
    )


def test_ones_change_nothing_and_it_can_be_taken_back(unet):
    def drawn():
        x = mx.random.normal((1, 8, 8, 4), key=mx.random.key(1))
        return np.array(unet(x, mx.array([500.0]), mx.ones((1, 3, 16))))

    names = [name for name, _ in tree_flatten(unet.parameters())]
    before = drawn()
    set_freeu(unet, Factors(1, 1, 1, 1))
    assert np.allclose(before, drawn(), atol=1e-5)
    set_freeu(unet, Factors(1.5, 1.6, 0.9, 0.2))
    assert not np.allclose(before, drawn(), atol=1e-3)
    assert sorted(names) == sorted(name for name, _ in tree_flatten(unet.parameters()))
    set_freeu(unet, None)
    assert np.array_equal(before, drawn())
