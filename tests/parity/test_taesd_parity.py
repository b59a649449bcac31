"""TAESD against diffusers' AutoencoderTiny, live, both ways, on its published weights."""

from pathlib import Path

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from network_parity import AUTOENCODER
from PIL import Image
from safetensors.torch import load_file

from mlx_maple.models import TAESD, TAESDConfig

pytestmark = pytest.mark.parity


def _inputs(weights: Path) -> tuple[np.ndarray, np.ndarray]:
    """A photo's middle, and latents with some beyond the clamp."""
    photo = Image.open(sorted((weights / "photos").glob("*.png"))[0]).convert("RGB")
    left, top = photo.width // 2 - 36, photo.height // 2 - 32
    image = np.asarray(photo.crop((left, top, left + 72, top + 64)), np.float32) / 127.5 - 1
    latents = 2 * np.random.default_rng(8).standard_normal((2, 7, 9, 4), np.float32)
    return image[None], latents


def _reference(model: AutoencoderTiny, images, latents) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {
            "encoded": reference.nhwc(model.encode(reference.nchw(images)).latents),
            "decoded": reference.nhwc(model.decode(reference.nchw(latents)).sample),
        }


def _ours(taesd: TAESD, images, latents) -> dict[str, mx.array]:
    return {
        "encoded": taesd.encode(mx.array(images)),
        "decoded": taesd.decode(mx.array(latents)),
    }


def _published(weights: Path, kind: str) -> tuple[TAESD, AutoencoderTiny]:
    """One pair of files in both implementations, renamed from upstream's indices by hand."""
    theirs = {}
    for part, offset in (("encoder", 0), ("decoder", -1)):  # upstream's decoder counts its clamp
        for name, tensor in load_file(weights / "taesd" / f"{kind}_{part}.safetensors").items():
            index, rest = name.split(".", 1)
            theirs[f"{part}.layers.{int(index) + offset}.{rest}"] = tensor.float()
    model = AutoencoderTiny()
    model.load_state_dict(theirs)
    native = {
        name: tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        for name, tensor in theirs.items()
    }
    taesd = TAESD(TAESDConfig())
    taesd.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in native.items()])
    return taesd, model.eval()


@pytest.mark.parametrize("kind", ["taesd", "taesdxl"])
def test_published(kind: str, weights: Path, parity_record):
    taesd, model = _published(weights, kind)
    inputs = _inputs(weights)
    expected = _reference(model, *inputs)
    for name, ours in _ours(taesd, *inputs).items():
        parity.compare(parity_record, f"{kind} {name}", ours, expected[name], AUTOENCODER)
    for name, ours in _ours(parity.half(taesd), *inputs).items():
        parity.compare_half(parity_record, f"{kind} {name}, fp16", ours, expected[name])


class TestControls:
    """One thing wrong at a time; each must miss the bar that the right network passes."""

    def _check(self, record, name: str, what: str, weights: Path, change) -> None:
        taesd, model = _published(weights, "taesd")
        inputs = _inputs(weights)
        expected = _reference(model, *inputs)[what]
        change(taesd)
        ours = _ours(taesd, *inputs)[what]
        parity.control(record, f"TAESD {what}, {name}", ours, expected, AUTOENCODER)

    def test_no_clamp(self, weights: Path, parity_record, monkeypatch):
        monkeypatch.setattr("mlx_maple.models.taesd.LATENT_LIMIT", 1e4)
        self._check(parity_record, "no clamp", "decoded", weights, lambda taesd: None)

    @pytest.mark.parametrize(("part", "what"), [("encoder", "encoded"), ("decoder", "decoded")])
    def test_rows_and_columns_swapped(self, part: str, what: str, weights: Path, parity_record):
        """The first convolution, 3 or 4 channels: the case where a layout is guessed wrong."""
        name = f"{part}.layers.0.weight"

        def change(taesd: TAESD) -> None:
            parity.set_weight(taesd, name, lambda a: a.transpose(0, 2, 1, 3))

        self._check(parity_record, "first kernel transposed", what, weights, change)

    def test_lost_bias(self, weights: Path, parity_record):
        def change(taesd: TAESD) -> None:
            parity.set_weight(taesd, "encoder.layers.3.conv.0.bias", mx.zeros_like)

        self._check(parity_record, "one bias lost", "encoded", weights, change)


def test_tiny(parity_record):
    taesd = parity.fill(TAESD(TAESDConfig(**recipe.TAESD)))
    random = np.random.default_rng(9)
    images = random.uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)
    latents = random.standard_normal((2, 3, 5, 4)).astype(np.float32)
    expected = _reference(reference.taesd(recipe.TAESD), images, latents)
    for name, ours in _ours(taesd, images, latents).items():
        parity.compare(parity_record, f"TAESD {name}, tiny", ours, expected[name], AUTOENCODER)
