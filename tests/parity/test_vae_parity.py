"""The autoencoder against diffusers, live, both ways, on identical weights."""

import math
import time
from pathlib import Path

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as TorchAutoencoderKL
from mlx.utils import tree_flatten
from network_parity import AUTOENCODER

from mlx_maple.models import AutoencoderKL, VAEConfig

pytestmark = pytest.mark.parity

FOUR_LEVELS = {
    **recipe.VAE,
    "block_out_channels": [8, 8, 16, 24],
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}
ONE_LEVEL = {**recipe.VAE, "block_out_channels": [12], "latent_channels": 3}
TINY = {"three levels": recipe.VAE, "four levels": FOUR_LEVELS, "one level": ONE_LEVEL}
SD1 = vars(VAEConfig())


def _inputs(config: dict, batch: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images, smooth and full of contrast as pictures are, and latents, for a latent ``size``."""
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    random = np.random.default_rng(6)
    coarse = random.uniform(-1, 1, (batch, *size, 3))
    images = coarse.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.clip(images + 0.1 * random.standard_normal(images.shape), -1, 1)
    latents = random.standard_normal((batch, *size, config["latent_channels"]))
    return images.astype(np.float32), latents.astype(np.float32)


def _reference(model: torch.nn.Module, images, latents) -> dict[str, np.ndarray]:
    scale = model.config.scaling_factor
    with torch.no_grad():
        posterior = model.encode(reference.nchw(images)).latent_dist
        decoded = model.decode(reference.nchw(latents) / scale).sample
        return {
            "mean": reference.nhwc(posterior.mean * scale),
            "logvar": reference.nhwc(posterior.logvar + 2 * math.log(scale)),
            "decoded": reference.nhwc(decoded),
        }


def _ours(vae: AutoencoderKL, images, latents) -> dict[str, mx.array]:
    return {**vae.encode(mx.array(images))._asdict(), "decoded": vae.decode(mx.array(latents))}


def _compare(record, label: str, vae, model, images, latents, half: bool = True) -> None:
    expected = _reference(model, images, latents)
    for name, ours in _ours(vae, images, latents).items():
        parity.compare(record, f"VAE {name}, {label}", ours, expected[name], AUTOENCODER)
    if half:
        for name, ours in _ours(parity.half(vae), images, latents).items():
            parity.compare_half(record, f"VAE {name}, {label}, fp16", ours, expected[name])


@pytest.mark.parametrize("size", [(8, 8), (5, 9)], ids=["8x8", "5x9"])
def test_trained(size: tuple[int, int], weights: Path, parity_record):
    trial = weights / "emoji-trial"
    vae = parity.trained(trial / "emoji-trial.ckpt", "vae", lambda c: AutoencoderKL(VAEConfig(**c)))
    model = TorchAutoencoderKL.from_pretrained(
        trial / "diffusers" / "vae", torch_dtype=torch.float32
    )
    images, latents = _inputs(vars(vae.config), 2, size)
    label = f"emoji-trial, latents {size[0]}x{size[1]}"
    _compare(parity_record, label, vae, model.eval(), images, latents)


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_tiny(config: dict, parity_record, request):
    vae = parity.fill(AutoencoderKL(VAEConfig(**config)))
    images, latents = _inputs(config, 2, (3, 5))
    label = f"tiny, {request.node.callspec.id}"
    _compare(parity_record, label, vae, reference.vae(config), images, latents)


@pytest.fixture(scope="module")
def control_reference():
    images, latents = _inputs(recipe.VAE, 1, (4, 3))
    inputs = images, 0.2 * latents  # a quiet stream in the decoder, in which eps counts
    return inputs, _reference(reference.vae(recipe.VAE), *inputs)


class TestControls:
    """One thing wrong at a time; each must miss the bar that the right network passes."""

    @pytest.fixture
    def run(self, parity_record, control_reference):
        inputs, expected = control_reference

        def run(name: str, what: str, vae: AutoencoderKL) -> None:
            ours = _ours(vae, *inputs)[what]
            parity.control(parity_record, f"VAE {what}, {name}", ours, expected[what], AUTOENCODER)

        return run

    def _vae(self, **changes: object) -> AutoencoderKL:
        return parity.fill(AutoencoderKL(VAEConfig(**{**recipe.VAE, **changes})))

    @pytest.mark.parametrize("what", ["mean", "decoded"])
    def test_eps(self, run, monkeypatch, what: str):
        monkeypatch.setattr("mlx_maple.models.vae.NORM_EPS", 1e-5)
        run("eps 1e-5", what, self._vae())

    def test_symmetric_padding(self, run):
        vae = self._vae()
        for block in vae.encoder.down_blocks[:-1]:
            block.downsamplers[0].symmetric = True
        run("padded on all sides", "mean", vae)

    @pytest.mark.parametrize("what", ["mean", "decoded"])
    def test_lost_query_bias(self, run, what: str):
        vae = self._vae()
        side = "encoder" if what == "mean" else "decoder"
        parity.set_weight(vae, f"{side}.mid_block.attentions.0.to_q.bias", mx.zeros_like)
        parity.set_weight(vae, f"{side}.mid_block.attentions.0.to_v.bias", mx.zeros_like)
        run("no bias of q and v", what, vae)

    @pytest.mark.parametrize(
        ("name", "axes", "what"),
        [
            ("decoder.mid_block.attentions.0.to_out.weight", (1, 0), "decoded"),
            ("post_quant_conv.weight", (1, 0), "decoded"),
            ("quant_conv.weight", (1, 0), "mean"),
            ("encoder.conv_in.weight", (0, 2, 1, 3), "mean"),
        ],
    )
    def test_transposed(self, run, name: str, axes: tuple[int, ...], what: str):
        vae = self._vae()
        parity.set_weight(vae, name, lambda a: a.transpose(axes))
        run(f"{name.split('.')[-2]} transposed", what, vae)

    @pytest.mark.parametrize("what", ["mean", "logvar", "decoded"])
    def test_scaling_factor(self, run, what: str):
        run("SDXL's scaling factor", what, self._vae(scaling_factor=0.13025))

    def test_order_of_moments(self, run, control_reference):
        vae = self._vae()
        for kind in ("weight", "bias"):
            parity.set_weight(vae, f"quant_conv.{kind}", lambda a: mx.roll(a, 4, axis=0))
        run("log variance before mean", "mean", vae)


def test_logvar_is_clipped(parity_record):
    """As the reference's posterior: to [-30, 20], before it is scaled."""
    vae, model = parity.fill(AutoencoderKL(VAEConfig(**recipe.VAE))), reference.vae(recipe.VAE)
    bias = np.array([0, 0, 0, 0, 50, -50, 0, 1], np.float32)
    parity.set_weight(vae, "quant_conv.bias", lambda _: mx.array(bias))
    model.quant_conv.bias.data = torch.from_numpy(bias)
    inputs = _inputs(recipe.VAE, 1, (2, 2))
    expected = _reference(model, *inputs)["logvar"]
    ours = _ours(vae, *inputs)["logvar"]
    assert expected.max() == pytest.approx(20 + 2 * math.log(0.18215))
    parity.compare(parity_record, "VAE logvar, clipped", ours, expected, AUTOENCODER)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_true_size(parity_record):
    """SD 1.x's autoencoder: 83,653,863 parameters, 512x512 and an odd size. Minutes."""
    cases = {"512x512": (64, 64), "152x216": (19, 27)}
    model = reference.vae(SD1)
    vae = parity.fill(AutoencoderKL(VAEConfig()))
    assert sum(a.size for _, a in tree_flatten(vae.parameters())) == 83_653_863
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    for name, size in cases.items():
        images, latents = _inputs(SD1, 1, size)
        start = time.perf_counter()
        expected = _reference(model, images, latents)
        middle = time.perf_counter()
        ours = _ours(vae, images, latents)
        mx.eval(ours)
        end = time.perf_counter()
        parity_record(f"VAE SD1 {name}, seconds both ways", ours=end - middle, torch=middle - start)
        for what, array in ours.items():
            parity.compare(
                parity_record, f"VAE {what}, SD1 {name}", array, expected[what], AUTOENCODER
            )
    for what, array in _ours(parity.half(vae), images, latents).items():
        parity.compare_half(parity_record, f"VAE {what}, SD1 {name}, fp16", array, expected[what])
