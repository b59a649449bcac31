"""Maps with more numbers than a kernel counts go to MLX's own operations; nothing is evaluated."""

import mlx.core as mx
import pytest

from mlx_maple.engine.count import described_kernel
from mlx_maple.engine.kernels import LARGEST, Norm, kernels_of

CHANNELS = 256


def empty(*shape: int) -> mx.array:
    return mx.broadcast_to(mx.zeros((), mx.float16), shape)


@pytest.fixture
def calls():
    return []


@pytest.fixture(params=["cuda", "metal"])
def kernels(request, calls):
    def make(**making):
        calls.append(making["name"])
        return described_kernel(**making)

    return kernels_of(request.param, make)


@pytest.mark.parametrize(("side", "is_ours"), [(2888, True), (2904, False)])
def test_a_map_of_more_than_31_bits_goes_to_plain(kernels, calls, side, is_ours):
    assert (side * side * CHANNELS <= LARGEST) == is_ours
    row = mx.zeros((CHANNELS,))
    norm, size = Norm(row, row, 32, 1e-6), (1, side, side)
    y, _ = kernels.group_norm(empty(*size, CHANNELS), norm, size, shift=row[None])
    assert y.shape == (*size, CHANNELS) and bool(calls) == is_ours
    calls.clear()
    half = (1, side // 2, side // 2)
    y = kernels.total(empty(*half, CHANNELS), None, row, half, (side, side))
    assert y.shape == (*size, CHANNELS) and bool(calls) == is_ours
    calls.clear()
    y = kernels.interleave(empty(1, side // 2, side // 2, 4 * CHANNELS))
    assert y.shape == (1, side - 2, side - 2, CHANNELS) and bool(calls) == is_ours


@pytest.mark.parametrize(("rows", "is_ours"), [((1 << 21) - 1, True), (1 << 21, False)])
def test_as_many_numbers_of_tokens_go_to_plain(kernels, calls, rows, is_ours):
    row = mx.zeros((1024,))
    y = kernels.layer_norm(empty(rows, 1024), row, row, row, 1e-5)
    assert y.shape == (rows, 1024) and bool(calls) == is_ours
    calls.clear()
    y = kernels.gate(empty(rows, 1024), row)
    assert y.shape == (rows, 512) and bool(calls) == (is_ours and kernels.has_gate)
    calls.clear()
    y = kernels.attention(empty(rows, 1024), empty(77, 2048), 1, 8, scale=1, backend=kernels.name)
    assert y.shape == (rows, 1024) and bool(calls) == (is_ours and kernels.name == "cuda")
