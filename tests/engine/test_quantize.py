"""Weights in few bits: what is replaced, what stays, and what it costs in numbers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_maple as maple
from mlx_maple.engine import quantize
from mlx_maple.engine.quantize import QuantizedConv2d
from mlx_maple.models import CLIPTextConfig, CLIPTextEncoder, UNet, UNetConfig


def unet() -> UNet:
    mx.random.seed(0)
    network = UNet(
        UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            transformer_layers=(1, 0),
            num_attention_heads=(4, 4),
            cross_attention_dim=32,
        )
    )
    mx.eval(network.parameters())
    return network


def run(network: UNet) -> np.ndarray:
    rng = np.random.default_rng(0)
    latents = mx.array(rng.standard_normal((1, 16, 16, 4)).astype(np.float32))
    context = mx.array(rng.standard_normal((1, 77, 32)).astype(np.float32))
    return np.array(network(latents, mx.array([500.0]), context))


def leaves(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if "weight" in module}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [64, 96, 32])
def test_a_convolution_is_that_of_its_dequantised_weights(bits, inputs):
    mx.random.seed(1)
    conv = nn.Conv2d(inputs, 24, kernel_size=3, stride=2, padding=1)
    owner = nn.Module()
    owner.conv, weight = conv, conv.weight
    quantize.quantize(owner, bits)
    found = owner.conv
    assert isinstance(found, QuantizedConv2d)
    size = 64 if inputs * 9 % 64 == 0 else 32
    assert found.group_size == size
    rebuilt = found.dequantized()
    assert rebuilt.shape == weight.shape
    step = (weight.max() - weight.min()).item() / (2**bits - 1)
    # MLX moves the steps so that 0 is one of them, which costs up to one at the ends.
    assert mx.abs(rebuilt - weight).max().item() <= 1.1 * step
    x = mx.random.normal((2, 9, 9, inputs))
    wanted = mx.conv2d(x, rebuilt, 2, 1) + conv.bias
    np.testing.assert_allclose(found(x), wanted, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantised_and_what_stays(bits):
    network = unet()
    quantize.quantize(network, bits)
    for name, leaf in leaves(network).items():
        is_large = "conv" in name.rpartition(".")[2] or "to_" in name or "linear" in name
        is_kept = name in ("conv_in", "conv_out") or "norm" in name
        assert isinstance(leaf, quantize.QuantizedLeaf) is (is_large and not is_kept) or (
            "proj" in name or "ff" in name
        ), name
    assert quantize.bits_of(network) == bits
    assert quantize.bits_of(unet()) is None


def test_a_row_that_no_group_divides_is_left_alone():
    owner = nn.Module()
    owner.narrow, owner.wide = nn.Linear(48, 8), nn.Linear(96, 8)
    quantize.quantize(owner, 4)
    assert isinstance(owner.narrow, nn.Linear)
    assert isinstance(owner.wide, nn.QuantizedLinear) and owner.wide.group_size == 32


@pytest.mark.parametrize("backend", ["cuda", "metal", "cpu"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_multiplied_by_what_the_backend_does_well(backend, bits, monkeypatch):
    """On CUDA MLX's own product is wrong for rows of 64 numbers: it must not be called there."""
    mx.random.seed(2)
    owner = nn.Module()
    owner.linear = nn.Linear(64, 24)
    weight, bias = owner.linear.weight, owner.linear.bias
    quantize.quantize(owner, bits)
    x = mx.random.normal((3, 5, 64))
    stored = [owner.linear[name] for name in ("weight", "scales", "biases")]
    wanted = x @ mx.dequantize(*stored, group_size=64, bits=bits).T + bias
    calls, original = [], mx.quantized_matmul
    monkeypatch.setattr(quantize, "running_backend", lambda: backend)
    monkeypatch.setattr(
        mx, "quantized_matmul", lambda *a, **k: calls.append(a) or original(*a, **k)
    )
    np.testing.assert_allclose(owner.linear(x), wanted, atol=1e-5)
    assert len(calls) == (backend == "metal")
    assert mx.abs(wanted - x @ weight.T - bias).max().item() > 1e-3  # few bits are not the same


def test_embedding_tables_and_norms_stay():
    network = CLIPTextEncoder(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        )
    )
    quantize.quantize(network, 4)
    kept = {name for name, leaf in leaves(network).items() if leaf.weight.dtype != mx.uint32}
    assert all("embedding" in name or "norm" in name for name in kept)
    assert len(kept) == 5


def test_the_error_shrinks_with_the_bits():
    plain = run(unet())
    errors = {}
    for bits in (8, 4):
        network = unet()
        quantize.quantize(network, bits)
        errors[bits] = float(np.sqrt(np.mean((run(network) - plain) ** 2)) / plain.std())
    assert errors[8] < 0.03
    assert 4 * errors[8] < errors[4] < 0.3


def test_parameters_are_counted_as_they_were():
    plain, network = unet(), unet()
    count = sum(value.size for _, value in tree_flatten(plain.parameters()))
    quantize.quantize(network, 4)
    assert quantize.parameter_count(plain) == quantize.parameter_count(network) == count


def test_leaves_without_weights_take_those_of_a_quantised_network():
    network, empty = unet(), unet()
    quantize.quantize(network, 8)
    quantize.as_quantized(empty, 8)
    empty.load_weights(tree_flatten(network.parameters()), strict=True)
    assert np.array_equal(run(network), run(empty))


def test_groups_are_measured_in_float32(monkeypatch):
    weight = mx.random.normal((4, 64), key=mx.random.key(0)).astype(mx.float16)
    seen, original = [], mx.quantize
    monkeypatch.setattr(
        mx,
        "quantize",
        lambda values, *rest: (seen.append(values.dtype), original(values, *rest))[1],
    )
    words, scales, biases = quantize.quantized(weight, 32, 4)
    _, step, low = original(weight.astype(mx.float32), 32, 4)
    assert seen == [mx.float32] and words.dtype == mx.uint32
    assert scales.dtype == biases.dtype == mx.float16
    assert mx.array_equal(scales, step.astype(mx.float16))
    assert mx.array_equal(biases, low.astype(mx.float16))


def test_the_dtype_of_the_weights_is_kept():
    network = unet()
    network.set_dtype(mx.float16)
    quantize.quantize(network, 4)
    dtypes = {value.dtype for _, value in tree_flatten(network.parameters())}
    assert dtypes == {mx.float16, mx.uint32}


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"8 or 4 bits, not {bits}"):
        quantize.quantize(unet(), bits)


def test_pictures_of_the_embedded_model():
    """49 and 27 dB on average over eight prompts (docs/memory.md); here one, with a margin."""
    drawn = {}
    for bits in (None, 8, 4):
        sd = maple.load(quantize=bits)
        image = sd("a red maple leaf on a yellow background", seed=1, steps=4).images[0]
        drawn[bits] = np.array(image, np.float64)
    errors = {bits: np.mean((drawn[bits] - drawn[None]) ** 2) for bits in (8, 4)}
    psnr = {bits: 10 * np.log10(255**2 / error) for bits, error in errors.items()}
    assert psnr[8] > 38
    assert 16 < psnr[4] < psnr[8] - 10
