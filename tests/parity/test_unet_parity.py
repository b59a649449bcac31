"""The UNet against diffusers, live, on identical weights."""

import time
from pathlib import Path

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from mlx.utils import tree_flatten
from network_parity import NETWORK

from mlx_maple.models import UNet, UNetConfig

pytestmark = pytest.mark.parity

TIMESTEPS = (999.0, 856.286, 500.0, 20.5, 0.0)
SIZES = ((9, 13), (7, 24), (1, 1), (33, 2))  # rows, columns; none a multiple of 8 both ways

DEEP = {
    **recipe.UNET,
    "in_channels": 9,
    "block_out_channels": [8, 16, 24, 24],
    "layers_per_block": 3,
    "transformer_layers": [2, 0, 1, 2],
    "mid_transformer_layers": 2,
    "num_attention_heads": [1, 4, 2, 3],
}
SHALLOW = {
    **recipe.UNET,
    "block_out_channels": [16, 32],
    "layers_per_block": 2,
    "transformer_layers": [0, 1],
    "num_attention_heads": [4, 2],
}
TINY = {"one layer": recipe.UNET, "three layers, nine channels": DEEP, "two levels": SHALLOW}
SD1 = vars(UNetConfig())


def _inputs(config: dict, batch: int, size: tuple[int, int], tokens: int = 77):
    random = np.random.default_rng(4)
    latents = random.standard_normal((batch, *size, config["in_channels"]), np.float32)
    context = random.standard_normal((batch, tokens, config["cross_attention_dim"]), np.float32)
    return latents, context


def _reference(model: torch.nn.Module, latents, timesteps, context) -> np.ndarray:
    with torch.no_grad():
        times = torch.tensor(timesteps, dtype=torch.float32)
        out = model(reference.nchw(latents), times, torch.from_numpy(context))
    return reference.nhwc(out.sample)


def _ours(unet: UNet, latents, timesteps, context) -> mx.array:
    return unet(mx.array(latents), mx.array(timesteps), mx.array(context))


@pytest.fixture(scope="module")
def trained_model(weights: Path) -> torch.nn.Module:
    folder = weights / "emoji-trial" / "diffusers" / "unet"
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


@pytest.fixture
def trained_unet(weights: Path) -> UNet:
    """The trained emoji-trial, taken from its .ckpt by the converter."""
    path = weights / "emoji-trial" / "emoji-trial.ckpt"
    return parity.trained(path, "unet", lambda c: UNet(UNetConfig(**c)))


@pytest.mark.parametrize("t", TIMESTEPS)
def test_trained_at_timesteps(t: float, trained_model, trained_unet, parity_record):
    latents, context = _inputs(vars(trained_unet.config), 3, (16, 16))
    expected = _reference(trained_model, latents, t, context)
    ours = _ours(trained_unet, latents, t, context)
    parity.compare(parity_record, f"UNet t={t:g}, emoji-trial", ours, expected, NETWORK)
    ours = _ours(parity.half(trained_unet), latents, t, context)
    parity.compare_half(parity_record, f"UNet t={t:g}, emoji-trial, fp16", ours, expected)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_trained_at_sizes(size: tuple[int, int], trained_model, trained_unet, parity_record):
    latents, context = _inputs(vars(trained_unet.config), 2, size)
    times = [700.25, 30.0]
    expected = _reference(trained_model, latents, times, context)
    ours = _ours(trained_unet, latents, times, context)
    name = f"UNet {size[0]}x{size[1]}, emoji-trial"
    parity.compare(parity_record, name, ours, expected, NETWORK)


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
@pytest.mark.parametrize("size", [(8, 8), (5, 11)], ids=["8x8", "5x11"])
def test_tiny(config: dict, size: tuple[int, int], parity_record, request):
    """Random weights, other architectures, a quiet residual stream in which eps counts."""
    model = reference.unet(config)
    unet = parity.fill(UNet(UNetConfig(**config)))
    latents, context = _inputs(config, 2, size, tokens=9)
    expected = _reference(model, latents, [3.0, 921.5], context)
    label = request.node.callspec.id.replace("-", ", ")
    ours = _ours(unet, latents, [3.0, 921.5], context)
    parity.compare(parity_record, f"UNet tiny, {label}", ours, expected, NETWORK)
    ours = _ours(parity.half(unet), latents, [3.0, 921.5], context)
    parity.compare_half(parity_record, f"UNet tiny, {label}, fp16", ours, expected)


@pytest.fixture(scope="module")
def control_reference() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    latents, context = _inputs(TestControls.config, 2, (5, 6), tokens=9)
    model = reference.unet(TestControls.config)
    return latents, context, _reference(model, latents, TestControls.times, context)


class TestControls:
    """One thing wrong at a time; each must miss the bar that the right network passes."""

    config = recipe.UNET
    times = (20.5, 856.286)

    @pytest.fixture
    def run(self, parity_record, control_reference):
        latents, context, expected = control_reference

        def run(name: str, unet: UNet | None = None, times=self.times) -> None:
            unet = parity.fill(UNet(UNetConfig(**self.config))) if unet is None else unet
            ours = _ours(unet, latents, times, context)
            parity.control(parity_record, f"UNet, {name}", ours, expected, NETWORK)

        return run

    @pytest.mark.parametrize(
        ("where", "wrong"),
        [
            ("unet.NORM_EPS", 1e-6),
            ("attention.TRANSFORMER_NORM_EPS", 1e-5),
            ("attention.LAYER_NORM_EPS", 1e-6),
        ],
        ids=str,
    )
    def test_eps(self, run, monkeypatch, where: str, wrong: float):
        monkeypatch.setattr(f"mlx_maple.models.{where}", wrong)
        run(f"{where} {wrong:g}")

    @pytest.mark.parametrize("kind", ["gelu_approx", "gelu_fast_approx"])
    def test_gelu_kind(self, run, monkeypatch, kind: str):
        import mlx.nn as nn

        monkeypatch.setattr("mlx.nn.gelu", getattr(nn, kind))
        run(kind)

    def test_geglu_halves(self, run):
        unet = parity.fill(UNet(UNetConfig(**self.config)))
        for kind in ("weight", "bias"):
            parity.set_weight(
                unet,
                f"mid_block.attentions.0.transformer_blocks.0.ff.proj_in.{kind}",
                lambda a: mx.roll(a, a.shape[0] // 2, axis=0),
            )
        run("GEGLU halves swapped", unet)

    def test_sine_first(self, run, monkeypatch):
        from mlx_maple.models.layers import sinusoids

        monkeypatch.setattr(
            "mlx_maple.models.unet.sinusoids",
            lambda times, width: mx.roll(sinusoids(times, width), width // 2, axis=1),
        )
        run("sines before cosines")

    def test_rounded_timesteps(self, run):
        run("timesteps rounded", times=(20.0, 856.0))

    def test_heads(self, run):
        heads = [2 * n if n % 2 == 0 else n for n in self.config["num_attention_heads"]]
        config = UNetConfig(**{**self.config, "num_attention_heads": heads})
        run("twice the heads", parity.fill(UNet(config)))

    def test_skip_before_hidden(self, run, monkeypatch):
        concatenate = mx.concatenate

        def swapped(arrays: list[mx.array], axis: int) -> mx.array:
            return concatenate(arrays[::-1] if arrays[0].ndim == 4 else arrays, axis=axis)

        monkeypatch.setattr("mlx.core.concatenate", swapped)
        run("skip before hidden")

    def test_cut_at_the_wrong_end(self, run, monkeypatch):
        from mlx_maple.models.resnet import double

        # A row and a column too many at the front: what is cut off is then the true last ones.
        monkeypatch.setattr(
            "mlx_maple.models.resnet.double", lambda x: mx.roll(double(x), (1, 1), axis=(1, 2))
        )
        run("doubling one pixel off")

    @pytest.mark.parametrize(
        ("name", "axes"),
        [
            ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.weight", (1, 0)),
            ("down_blocks.0.attentions.0.proj_in.weight", (1, 0)),
            ("conv_in.weight", (0, 2, 1, 3)),
        ],
    )
    def test_transposed(self, run, name: str, axes: tuple[int, ...]):
        unet = parity.fill(UNet(UNetConfig(**self.config)))
        parity.set_weight(unet, name, lambda a: a.transpose(axes))
        run(f"{name.removesuffix('.weight').rsplit('.')[-1]} transposed", unet)

    def test_lost_bias(self, run):
        unet = parity.fill(UNet(UNetConfig(**self.config)))
        parity.set_weight(unet, "up_blocks.1.resnets.0.time_emb_proj.bias", mx.zeros_like)
        run("one time bias lost", unet)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_true_size(parity_record):
    """SD 1.4's UNet: 859,520,964 parameters, 512x512 and an odd size. 8 GB, minutes."""
    cases = {
        "64x64 t=856.286": ((64, 64), 856.286),
        "32x32 t=999": ((32, 32), 999.0),
        "32x32 t=500": ((32, 32), 500.0),
        "32x32 t=20.5": ((32, 32), 20.5),
        "19x27 t=0": ((19, 27), 0.0),
    }
    model = reference.unet(SD1)
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    expected, seconds = {}, {}
    for name, (size, t) in cases.items():
        latents, context = _inputs(SD1, 1, size)
        start = time.perf_counter()
        expected[name] = _reference(model, latents, t, context)
        seconds[name] = time.perf_counter() - start
    del model  # 3.4 GB, before ours are made

    unet = parity.fill(UNet(UNetConfig()))
    assert sum(a.size for _, a in tree_flatten(unet.parameters())) == 859_520_964
    for name, (size, t) in cases.items():
        latents, context = _inputs(SD1, 1, size)
        start = time.perf_counter()
        ours = _ours(unet, latents, t, context)
        mx.eval(ours)
        parity_record(
            f"UNet SD1 {name}, seconds",
            ours=time.perf_counter() - start,
            torch=seconds[name],
        )
        parity.compare(parity_record, f"UNet SD1 {name}", ours, expected[name], NETWORK)

    name = "19x27 t=0"
    latents, context = _inputs(SD1, 1, cases[name][0])
    ours = _ours(parity.half(unet), latents, cases[name][1], context)
    parity.compare_half(parity_record, f"UNet SD1 {name}, fp16", ours, expected[name])
