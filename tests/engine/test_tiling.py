"""The autoencoder in stripes: the numbers of the whole, in less memory."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_maple.engine import tiling
from mlx_maple.models import AutoencoderKL, VAEConfig

CONFIG = VAEConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1)
STRIPE = 200_000  # several stripes at the finer levels


def autoencoder() -> AutoencoderKL:
    mx.random.seed(0)
    vae = AutoencoderKL(CONFIG)
    mx.eval(vae.parameters())
    return vae


def latents(batch: int, rows: int, columns: int) -> mx.array:
    values = np.random.default_rng(1).standard_normal((batch, rows, columns, 4))
    # a brighter lower half: the statistics of a stripe are not those of the picture
    values[:, rows // 2 :] += 2
    return mx.array(values.astype(np.float32))


@pytest.mark.parametrize("size", [(1, 16, 24), (1, 17, 9), (2, 12, 8)])
def test_decoding_in_stripes_equals_the_whole(size):
    z = latents(*size)
    whole = np.array(autoencoder().decode(z))
    striped = np.array(tiling.in_stripes(autoencoder(), stripe_bytes=STRIPE).decode(z))
    assert np.abs(whole - striped).max() < 2e-5 * max(1, whole.std())


@pytest.mark.parametrize("size", [(1, 128, 192), (1, 136, 72), (2, 96, 64)])
def test_encoding_in_stripes_equals_the_whole(size):
    pixels = mx.array(np.random.default_rng(2).uniform(-1, 1, (*size, 3)).astype(np.float32))
    whole = autoencoder().encode(pixels)
    striped = tiling.in_stripes(autoencoder(), stripe_bytes=STRIPE).encode(pixels)
    for name in ("mean", "logvar"):
        found, wanted = np.array(getattr(striped, name)), np.array(getattr(whole, name))
        assert np.abs(found - wanted).max() < 1e-5, name


def test_a_stripe_of_one_row_and_odd_edges():
    z = latents(1, 9, 7)
    whole = np.array(autoencoder().decode(z))
    striped = np.array(tiling.in_stripes(autoencoder(), stripe_bytes=1, score_bytes=1).decode(z))
    assert np.abs(whole - striped).max() < 2e-5


@pytest.mark.parametrize("broken", ["statistics", "the row above"])
def test_these_comparisons_see_what_tiles_get_wrong(broken, monkeypatch):
    z = latents(1, 16, 24)
    whole = np.array(autoencoder().decode(z))
    if broken == "statistics":

        def normed(self, norm, x):
            return lambda a, b: tiling.nn.silu(norm(x[:, a:b]))

        monkeypatch.setattr(tiling._Work, "_normed", normed)
    else:
        plain = tiling._Work._convolved

        def shifted(self, conv, rows_of, shape, skip):
            return plain(self, conv, lambda a, b: rows_of(a, b).at[:, :1].multiply(0), shape, skip)

        monkeypatch.setattr(tiling._Work, "_convolved", shifted)
    striped = np.array(tiling.in_stripes(autoencoder(), stripe_bytes=STRIPE).decode(z))
    assert np.abs(whole - striped).max() > 1e-2


def test_a_small_picture_is_the_same_bit_for_bit():
    z = latents(1, 8, 8)
    whole = np.array(autoencoder().decode(z))
    assert np.array_equal(whole, np.array(tiling.in_stripes(autoencoder()).decode(z)))


def test_weights_keep_their_names_and_half_precision_its_type():
    plain, vae = autoencoder(), tiling.in_stripes(autoencoder(), stripe_bytes=STRIPE)
    names = [[name for name, _ in tree_flatten(v.parameters())] for v in (plain, vae)]
    assert sorted(names[0]) == sorted(names[1])
    vae.set_dtype(mx.float16)
    assert vae.decode(latents(1, 16, 16)).dtype == mx.float16


def test_stripes_take_less_memory():
    z = latents(1, 40, 40)
    mx.eval(z)
    peaks = []
    for stripe_bytes in (1 << 40, 1 << 18):
        vae = tiling.in_stripes(autoencoder(), stripe_bytes=stripe_bytes)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(vae.decode(z))
        peaks.append(mx.get_peak_memory() - before)
    maps = 4 * 320 * 320 * (32 + 16 + 16)  # input, middle and output of the finest block
    assert peaks[1] < 1.3 * maps
    assert peaks[1] < peaks[0] / 2
