"""On Apple's GPUs nothing heavy falls off the fast path, by the rules of MLX's Metal backend."""

import mlx.core as mx
import pytest

from mlx_maple.engine.audit import Operation, audit, metal_recipe, without_weights
from mlx_maple.engine.prepare import prepare_unet, prepare_vae
from mlx_maple.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    UNet,
    UNetConfig,
    VAEConfig,
)

HALF = mx.float16


def unet_report(network, latent_size):
    latents = mx.zeros((2, latent_size, latent_size, 4), HALF)
    context = mx.zeros((2, 77, 768), HALF)
    return audit(network, latents, mx.array([10.0, 10.0]), context)


def kinds(report):
    return {each.kind for each in report.operations}


@pytest.mark.parametrize("latent_size", [64, 96])
def test_nothing_heavy_of_sd15_is_slow(latent_size):
    unet = prepare_unet(without_weights(UNet(UNetConfig()), HALF), metal_recipe())
    report = unet_report(unet, latent_size)
    assert kinds(report) == {"attention", "convolution", "product", "kernel"}
    assert report.slow == []

    vae = prepare_vae(without_weights(AutoencoderKL(VAEConfig()), HALF), metal_recipe())
    report = audit(vae.decode, mx.zeros((1, latent_size, latent_size, 4), HALF))
    assert report.slow == []


def test_the_text_encoder_is_fused():
    encoder = without_weights(CLIPTextEncoder(CLIPTextConfig()), HALF)
    report = audit(lambda ids: encoder(ids).last, mx.zeros((1, 77), mx.int32))
    assert report.slow == []
    assert sum(each.calls for each in report.operations if each.kind == "attention") == 12


def test_what_the_published_networks_would_lose_is_seen():
    """The control: heads of 40 store their scores, and norms take many passes."""
    report = unet_report(without_weights(UNet(UNetConfig()), HALF), 64)
    slow = report.slow
    scores = max(slow, key=lambda each: each.stored)
    assert "no kernel for heads of 40" in scores.kernel
    assert scores.stored == 2 * 8 * 4096 * 4096 * 2 and scores.calls == 5
    assert sum(each.calls for each in slow if each.kind == "norm") == 61


def test_the_arithmetic_of_sd15_is_counted():
    """0.803 TFLOP a sample, counted from the architecture by another hand."""
    report = unet_report(without_weights(UNet(UNetConfig()), HALF), 64)
    assert report.flops == pytest.approx(2 * 0.803e12, rel=0.001)


def attended(q, k, v, **options):
    report = audit(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=1, **options))
    (operation,) = report.operations
    return operation


def heads(tokens, width):
    return mx.zeros((1, 2, tokens, width), HALF)


@pytest.mark.parametrize("width", [64, 72, 80, 96, 128])
def test_widths_that_fuse(width):
    assert attended(*[heads(99, width)] * 3).is_fast


@pytest.mark.parametrize("width", [32, 40, 160, 192, 256, 512])
def test_widths_that_do_not(width):
    found = attended(*[heads(99, width)] * 3)
    assert not found.is_fast
    assert found.stored == 2 * 99 * 99 * 2


def test_few_queries_take_the_vector_kernel():
    assert attended(heads(1, 64), heads(77, 64), heads(77, 64)).is_fast
    assert not attended(heads(1, 80), heads(77, 80), heads(77, 80)).is_fast
    assert not attended(heads(8, 64), heads(4, 64), heads(4, 64)).is_fast
    assert attended(heads(9, 80), heads(77, 80), heads(77, 80)).is_fast


def test_a_causal_mask_needs_keys_for_all_queries():
    assert attended(heads(77, 64), heads(77, 64), heads(77, 64), mask="causal").is_fast
    assert not attended(heads(78, 64), heads(77, 64), heads(77, 64), mask="causal").is_fast


def convolved(shape, out_channels, stride=1, side=3) -> Operation:
    weight = mx.zeros((out_channels, side, side, shape[-1]), HALF)
    x = mx.zeros(shape, HALF)
    (operation,) = audit(lambda: mx.conv2d(x, weight, stride, side // 2)).operations
    return operation


@pytest.mark.parametrize(
    ("shape", "out_channels", "stride", "kernel"),
    [
        ((1, 64, 64, 320), 320, 1, "Winograd"),
        ((2, 64, 32, 128), 128, 1, "Winograd"),
        ((1, 64, 32, 128), 128, 1, "implicit product"),  # 2048 pixels
        ((1, 64, 64, 96), 128, 1, "implicit product"),  # 224 channels
        ((1, 64, 64, 336), 320, 1, "implicit product"),  # no multiple of 32
        ((1, 64, 64, 320), 320, 2, "implicit product"),
        ((1, 64, 64, 4), 320, 1, "implicit product"),
        ((1, 64, 64, 320), 4, 1, "implicit product"),
        ((1, 64, 64, 9), 320, 1, "implicit product, 9 channels padded"),
        ((1, 64, 64, 9), 320, 2, "general implicit product"),
        ((1, 64, 64, 320), 20, 1, "general implicit product"),
    ],
)
def test_convolutions(shape, out_channels, stride, kernel):
    found = convolved(shape, out_channels, stride)
    assert found.kernel == kernel
    assert found.is_fast == ("general" not in kernel)


def test_arithmetic_of_one_operation():
    assert convolved((2, 8, 8, 16), 32).flops == 2 * (2 * 8 * 8) * 32 * 9 * 16
    assert convolved((2, 8, 8, 16), 32, stride=2).flops == 2 * (2 * 4 * 4) * 32 * 9 * 16
    (product,) = audit(lambda: mx.zeros((5, 3, 4)) @ mx.zeros((4, 7))).operations
    assert product.flops == 2 * 15 * 4 * 7


def test_nothing_is_left_behind():
    before = mx.conv2d, mx.array.__matmul__, mx.fast.scaled_dot_product_attention
    with pytest.raises(ValueError, match=r"\(2,3\)"):
        audit(lambda: mx.zeros((2, 3)) @ mx.zeros((4, 5)))
    assert (mx.conv2d, mx.array.__matmul__, mx.fast.scaled_dot_product_attention) == before
