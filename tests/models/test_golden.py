"""The networks against answers of torch's reference implementations, kept in tests/golden."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    TAESDConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

INPUTS = {name: mx.array(array) for name, array in recipe.inputs().items()}
RMS_BAR = 2e-5  # of the tensor's own std: a wrong eps or GELU is 6e-5 and up


class Tap:
    """Stands in a module's place and keeps what it answered."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.output: mx.array | None = None

    def __call__(self, *args: object) -> mx.array:
        self.output = self.module(*args)
        return self.output

    def __getattr__(self, name: str) -> object:
        return getattr(self.module, name)


def _fill(module: nn.Module) -> None:
    shapes = {name: tuple(a.shape) for name, a in tree_flatten(module.parameters())}
    weights = recipe.weights(shapes)
    module.load_weights([(name, mx.array(array)) for name, array in weights.items()])


def _clip() -> dict[str, mx.array]:
    clip = CLIPTextEncoder(CLIPTextConfig(**recipe.CLIP))
    _fill(clip)
    ids = INPUTS["ids"]
    embedded = clip.embeddings(ids)
    return {
        "embedded": embedded,
        "after_layer_1": clip.encoder(embedded)[1],
        **clip(ids)._asdict(),
    }


def _unet() -> dict[str, mx.array]:
    unet = UNet(UNetConfig(**recipe.UNET))
    _fill(unet)
    taps = {
        "time": Tap(unet.time_embedding),
        "conv_in": Tap(unet.conv_in),
        "mid": Tap(unet.mid_block),
        "before_norm": Tap(unet.up_blocks[-1]),
    }
    unet.time_embedding, unet.conv_in, unet.mid_block = (
        taps[name] for name in ("time", "conv_in", "mid")
    )
    unet.up_blocks[-1] = taps["before_norm"]
    output = unet(INPUTS["latents"], INPUTS["timesteps"], INPUTS["context"])
    return {name: tap.output for name, tap in taps.items()} | {"output": output}


def _vae() -> dict[str, mx.array]:
    vae = AutoencoderKL(VAEConfig(**recipe.VAE))
    _fill(vae)
    encoder_mid = vae.encoder.mid_block = Tap(vae.encoder.mid_block)
    decoder_mid = vae.decoder.mid_block = Tap(vae.decoder.mid_block)
    moments = vae.encode(INPUTS["images"])
    decoded = vae.decode(INPUTS["vae_latents"])
    return {
        "encoder_mid": encoder_mid.output,
        "decoder_mid": decoder_mid.output,
        "decoded": decoded,
        **moments._asdict(),
    }


def _taesd() -> dict[str, mx.array]:
    taesd = TAESD(TAESDConfig(**recipe.TAESD))
    _fill(taesd)
    return {
        "latents": taesd.encode(INPUTS["images"]),
        "decoded": taesd.decode(INPUTS["tiny_latents"]),
    }


RUNS = {"clip": _clip, "unet": _unet, "vae": _vae, "taesd": _taesd}


def _errors(network: str) -> dict[str, float]:
    """The rms error of each quantity, as a part of its std."""
    with np.load(GOLDEN / f"{network}.npz") as file:
        golden = {name: file[name] for name in file.files}
    assert {"torch", "diffusers", "transformers"} <= set(json.loads(str(golden.pop("versions"))))
    ours = RUNS[network]()
    assert set(ours) == set(golden)
    errors = {}
    for name, expected in golden.items():
        difference = np.array(ours[name], np.float64) - expected
        errors[name] = np.sqrt(np.mean(difference**2)) / expected.std()
    return errors


@pytest.mark.parametrize("network", RUNS)
def test_golden(network: str):
    for name, rms in _errors(network).items():
        assert rms <= RMS_BAR, f"{network} {name}: rms {rms:.2e} of the std"


BREAKS = {
    "unet, eps of the residual blocks": ("unet", "unet.NORM_EPS", 1e-6),
    "unet, eps of the transformers": ("unet", "attention.TRANSFORMER_NORM_EPS", 1e-5),
    "unet, eps of the layer norms": ("unet", "attention.LAYER_NORM_EPS", 1e-6),
    "unet, GELU by tanh": ("unet", "attention.nn.gelu", nn.gelu_approx),
    "unet, GELU by sigmoid": ("unet", "attention.nn.gelu", nn.gelu_fast_approx),
    "clip, eps": ("clip", "clip.NORM_EPS", 1e-6),
    "clip, exact GELU": ("clip", "clip.ACTIVATIONS", {"quick_gelu": nn.gelu}),
    "vae, eps": ("vae", "vae.NORM_EPS", 1e-5),
    "taesd, no clamp": ("taesd", "taesd.LATENT_LIMIT", 1e4),
}


@pytest.mark.parametrize(("network", "where", "wrong"), BREAKS.values(), ids=BREAKS)
def test_the_golden_tensors_can_fail(network: str, where: str, wrong: object, monkeypatch):
    monkeypatch.setattr(f"mlx_maple.models.{where}", wrong)
    assert max(_errors(network).values()) > 2 * RMS_BAR


def test_files_are_small():
    assert all(path.stat().st_size < 50_000 for path in GOLDEN.glob("*.npz"))
