"""The leaves against what their papers say, computed with numpy in double precision."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_maple.models.attention import FeedForward, attend
from mlx_maple.models.clip import quick_gelu
from mlx_maple.models.layers import GroupNorm, sinusoids
from mlx_maple.models.resnet import Downsample, ResnetBlock, Upsample, double

RANDOM = np.random.default_rng(11)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def _normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def _double(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _group_norm(x: np.ndarray, groups: int, eps: float) -> np.ndarray:
    """As torch defines it: neighbouring channels form a group, biased variance."""
    grouped = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape)


class TestGroupNorm:
    @pytest.mark.parametrize("shape", [(2, 5, 7, 12), (1, 1, 1, 12), (3, 64, 2, 24)])
    @pytest.mark.parametrize("eps", [1e-5, 1e-6])
    def test_value(self, shape: tuple[int, ...], eps: float):
        norm = GroupNorm(4, shape[-1], eps)
        norm.weight, norm.bias = mx.array(_normal(shape[-1])), mx.array(_normal(shape[-1]))
        x = _normal(*shape) * 0.01 + 0.02  # small, so that eps counts
        expected = _group_norm(x, 4, eps) * _double(norm.weight) + _double(norm.bias)
        np.testing.assert_allclose(_double(norm(mx.array(x))), expected, rtol=0, atol=1e-5)

    def test_accurate_on_a_large_picture(self):
        """Half a million numbers a group, off centre, as in the autoencoder at 512 pixels."""
        x = _normal(1, 256, 256, 32) + 2
        expected = _group_norm(x, 4, 1e-6)
        ours = _double(GroupNorm(4, 32, 1e-6)(mx.array(x)))
        assert np.abs(ours - expected).max() < 1e-5

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_statistics_are_float32(self, dtype: mx.Dtype):
        """Squares of 300 are beyond float16, and their sum is beyond it for any picture."""
        x = mx.array(_normal(2, 32, 32, 8) * 300).astype(dtype)
        norm = GroupNorm(2, 8, 1e-5)
        norm.set_dtype(dtype)
        y = norm(x)
        assert y.dtype == dtype
        step = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
        np.testing.assert_allclose(_double(y), _group_norm(_double(x), 2, 1e-5), atol=step)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_flat_background(self, dtype: mx.Dtype):
        """One colour everywhere: nothing but the bias is left, and no division by zero."""
        norm = GroupNorm(2, 8, 1e-6)
        norm.bias = mx.arange(8)
        norm.set_dtype(dtype)
        y = norm(mx.full((1, 64, 64, 8), 3.7).astype(dtype))
        np.testing.assert_allclose(_double(y), np.broadcast_to(np.arange(8), y.shape), atol=5e-3)

    def test_groups_must_divide(self):
        with pytest.raises(ValueError, match="10 channels do not split into 4 groups"):
            GroupNorm(4, 10, 1e-5)


class TestSinusoids:
    def test_value(self):
        times = np.array([0, 1, 20.5, 856.286, 999], np.float32)
        angles = times[:, None].astype(np.float64) * 10_000.0 ** (-np.arange(32) / 32)
        expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)  # cosines first
        ours = sinusoids(mx.array(times), 64)
        assert ours.shape == (5, 64)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)

    @pytest.mark.parametrize("dtype", [*DTYPES, mx.int32], ids=str)
    def test_float32_whatever_comes(self, dtype: mx.Dtype):
        assert sinusoids(mx.array([3]).astype(dtype), 8).dtype == mx.float32

    def test_odd_width(self):
        assert sinusoids(mx.array([3.0]), 7).shape == (1, 7)
        assert sinusoids(mx.array([3.0]), 7)[0, 6] == 0


class TestSizes:
    def test_doubling(self):
        x = _normal(2, 3, 5, 4)
        np.testing.assert_array_equal(double(mx.array(x)), x.repeat(2, axis=1).repeat(2, axis=2))

    def test_cutting_the_double_is_resizing_to_the_size(self):
        """torch's nearest neighbour: floor(i * (in / out)) with a float32 scale."""
        for out in range(1, 1025):
            source = (out + 1) // 2
            scale = np.float32(source) / np.float32(out)
            rows = np.floor(np.arange(out, dtype=np.float32) * scale).astype(int)
            assert np.array_equal(np.minimum(rows, source - 1), np.arange(out) // 2), out

    @pytest.mark.parametrize("size", [(5, 9), (6, 9), (5, 10), (6, 10), None])
    def test_upsample(self, size: tuple[int, int] | None):
        up = Upsample(4)
        x = mx.array(_normal(1, 3, 5, 4))
        y = up(x) if size is None else up(x, size)
        rows, columns = size or (6, 10)
        assert y.shape == (1, rows, columns, 4)
        np.testing.assert_array_equal(y, up.conv(double(x)[:, :rows, :columns]))

    @pytest.mark.parametrize(("rows", "up", "down"), [(8, 4, 4), (9, 5, 4), (2, 1, 1), (1, 1, 0)])
    def test_downsample(self, rows: int, up: int, down: int):
        """The UNet's rounds up, the autoencoder's rounds down."""
        x = mx.zeros((1, rows, rows, 4))
        assert Downsample(4, symmetric=True)(x).shape == (1, up, up, 4)
        if down:
            assert Downsample(4, symmetric=False)(x).shape == (1, down, down, 4)

    def test_downsample_sides(self):
        """With a kernel that only copies its top left pixel, the padding can be read off."""
        x = _normal(1, 4, 4, 1)
        for symmetric, expected in (
            (False, x[0, ::2, ::2, 0]),
            (True, [[0, 0], [0, x[0, 1, 1, 0]]]),
        ):
            down = Downsample(1, symmetric=symmetric)
            down.conv.weight = mx.zeros((1, 3, 3, 1)).at[0, 0, 0, 0].add(1)
            np.testing.assert_allclose(down(mx.array(x))[0, :, :, 0], expected, atol=1e-6)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, causal: bool) -> np.ndarray:
    batch, tokens, channels = q.shape
    width = channels // heads
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            logits = q[b, :, part].astype(np.float64) @ k[b, :, part].T / np.sqrt(width)
            if causal:
                logits[np.triu_indices(tokens, 1)] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, part] = weights / weights.sum(-1, keepdims=True) @ v[b, :, part]
    return out


class TestAttention:
    @pytest.mark.parametrize(("heads", "channels"), [(1, 20), (3, 12), (8, 320)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_value(self, heads: int, channels: int, causal: bool):
        sizes = (6, 6, 6) if causal else (6, 9, 9)
        q, k, v = (_normal(2, n, channels) for n in sizes)
        ours = attend(*(mx.array(a) for a in (q, k, v)), heads, "causal" if causal else None)
        expected = _attend(q, k, v, heads, causal)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("causal", [None, "causal"])
    def test_large_float16_logits_stay_finite(self, causal: str | None):
        """Queries and keys of 60: their product is beyond float16 before it is scaled."""
        q, k, v = (mx.array(_normal(1, 8, 256) * 60).astype(mx.float16) for _ in range(3))
        out = attend(q, k, v, 4, causal)
        assert out.dtype == mx.float16
        assert mx.isfinite(out).all()

    def test_geglu_value_first_gate_second_by_erf(self):
        from math import erf

        ff = FeedForward(2)
        ff.proj_in.weight, ff.proj_in.bias = mx.zeros((16, 2)), mx.array(_normal(16))
        ff.proj_out.weight, ff.proj_out.bias = mx.zeros((2, 8)), mx.zeros((2,))
        ff.proj_out.weight = ff.proj_out.weight.at[0, 3].add(1)
        value, gate = float(ff.proj_in.bias[3]), float(ff.proj_in.bias[8 + 3])
        expected = value * gate * (1 + erf(gate / 2**0.5)) / 2
        assert float(ff(mx.zeros((1, 1, 2)))[0, 0, 0]) == pytest.approx(expected, abs=1e-6)


def test_quick_gelu_is_the_sigmoid_one():
    x = np.linspace(-6, 6, 101)
    ours = quick_gelu(mx.array(x.astype(np.float32)))
    np.testing.assert_allclose(ours, x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    assert np.abs(np.array(ours) - np.array(nn.gelu(mx.array(x.astype(np.float32))))).max() > 0.01


def test_residual_block_projects_only_where_widths_differ():
    same = ResnetBlock(8, 8, groups=2, eps=1e-5)
    wider = ResnetBlock(8, 12, groups=2, eps=1e-5, time_channels=6)
    assert "conv_shortcut" not in same
    assert "time_emb_proj" not in same
    assert wider.conv_shortcut.weight.shape == (12, 8)
    assert wider(mx.zeros((2, 3, 3, 8)), mx.zeros((1, 6))).shape == (2, 3, 3, 12)
