"""Attention in chunks: the numbers of the whole, and no score matrix above its bound."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_maple.engine import attention
from mlx_maple.models import UNet, UNetConfig
from mlx_maple.models.attention import attend as plain


def tokens(*shape, seed=0, dtype=mx.float32):
    values = np.random.default_rng(seed).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("count", [1, 7, 64, 100])
@pytest.mark.parametrize("heads", [1, 4])
def test_chunks_equal_the_whole(count, heads):
    q, k, v = tokens(2, count, 32, seed=1), tokens(2, 90, 32, seed=2), tokens(2, 90, 32, seed=3)
    one_row = 2 * heads * 90 * 4
    found = attention.attend(q, k, v, heads, score_bytes=3 * one_row)
    np.testing.assert_allclose(found, plain(q, k, v, heads), rtol=0, atol=1e-6)


def test_chunks_equal_the_whole_within_a_compiled_function():
    q, k, v = (tokens(1, 50, 16, seed=seed) for seed in range(3))
    chunked = mx.compile(lambda *qkv: attention.attend(*qkv, 2, score_bytes=4000))
    np.testing.assert_allclose(chunked(q, k, v), plain(q, k, v, 2), rtol=0, atol=1e-6)


def test_a_scale_is_kept():
    q, k, v = (tokens(1, 9, 8, seed=seed) for seed in range(3))
    padded = [mx.pad(x.reshape(1, 9, 2, 4), [(0, 0)] * 3 + [(0, 4)]) for x in (q, k, v)]
    wide = [x.reshape(1, 9, 16) for x in padded]
    found = attention.attend(*wide, 2, scale=4**-0.5, score_bytes=200)
    found = found.reshape(1, 9, 2, 8)[..., :4].reshape(1, 9, 8)
    np.testing.assert_allclose(found, plain(q, k, v, 2), rtol=0, atol=1e-6)


def test_a_mask_is_kept():
    q, k, v = (tokens(1, 12, 8, seed=seed) for seed in range(3))
    found = attention.attend(q, k, v, 2, mask="causal", score_bytes=1)
    np.testing.assert_allclose(found, plain(q, k, v, 2, mask="causal"), rtol=0, atol=1e-6)


def peak(work) -> int:
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


def test_scores_are_bounded():
    q, k, v = (tokens(1, 2048, 64, seed=seed) for seed in range(3))
    mx.eval(q, k, v)
    scores = 2048 * 2048 * 4
    whole = peak(lambda: attention.attend(q, k, v, 1, score_bytes=scores))
    chunked = peak(lambda: attention.attend(q, k, v, 1, score_bytes=scores // 64))
    assert whole >= scores
    assert chunked < scores // 4  # MLX runs a few chunks ahead


def test_rows_keep_the_bound_and_cover_every_token():
    for count in (1, 5, 17, 4096):
        for bound in (1, 10_000, 1 << 20, 1 << 30):
            rows = attention.chunk_rows((2, 8, count, 40), 77, mx.float16, bound)
            assert 1 <= rows <= count
            least = -(-count // attention.MOST_CHUNKS)
            assert rows == least or rows * 2 * 8 * 77 * 2 <= bound


@pytest.mark.parametrize(
    ("backend", "width", "dtype", "fused"),
    [
        ("metal", 40, mx.float16, False),  # SD 1.x's finest level, unless padded
        ("metal", 64, mx.float32, True),
        ("metal", 160, mx.float16, False),
        ("metal", 512, mx.float16, False),  # the autoencoder's
        ("cuda", 40, mx.float16, True),
        ("cuda", 40, mx.float32, False),
        ("cuda", 160, mx.float16, False),
        ("cpu", 64, mx.float32, False),
    ],
)
def test_which_widths_have_a_kernel(backend, width, dtype, fused):
    assert attention.is_fused(4096, width, dtype, backend) is fused


def test_a_network_in_chunks_gives_the_same_and_keeps_its_names():
    config = UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers=(1, 0),
        num_attention_heads=(4, 4),
        cross_attention_dim=32,
    )
    mx.random.seed(0)
    network = UNet(config)
    x, context, time = tokens(1, 16, 16, 4), tokens(1, 77, 32), mx.array([300.0])
    plain = np.array(network(x, time, context))
    names = sorted(name for name, _ in tree_flatten(network.parameters()))
    attention.in_chunks(network, score_bytes=4 * 4 * 256 * 7)  # seven queries at a time
    np.testing.assert_allclose(network(x, time, context), plain, rtol=0, atol=2e-5)
    assert sorted(name for name, _ in tree_flatten(network.parameters())) == names
    kinds = {type(m) for _, m in network.named_modules() if "to_q" in m}
    assert kinds == {attention.ChunkedAttention}
