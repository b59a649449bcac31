"""TAESD's published weights against a reference run of its author's code in torch, float32."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_maple.models import TAESD, TAESDConfig

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def taesd(weights: Path) -> TAESD:
    native = {}
    for part, offset in (("encoder", 0), ("decoder", -1)):  # upstream's decoder counts its clamp
        for name, array in mx.load(str(weights / "taesd" / f"taesd_{part}.safetensors")).items():
            index, rest = name.split(".", 1)
            array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
            native[f"{part}.layers.{int(index) + offset}.{rest}"] = array.astype(mx.float32)
    module = TAESD(TAESDConfig())
    module.load_weights(list(native.items()))
    return module


def _psnr(a: mx.array, b: np.ndarray, peak: float) -> float:
    return float(20 * np.log10(peak / np.sqrt(np.mean((np.array(a, np.float64) - b) ** 2))))


@pytest.mark.parametrize("photo", ["astronaut", "chelsea"])
def test_reference_run(taesd: TAESD, weights: Path, photo: str):
    with np.load(weights / "taesd" / f"{photo}_256_torch_fp32.npz") as file:
        image, latent, decoded = file["image_u8"], file["latent"], file["decoded"]
    latent, decoded = latent.transpose(0, 2, 3, 1), decoded.transpose(0, 2, 3, 1)

    ours = taesd.encode(mx.array(image[None].astype(np.float32) / 127.5 - 1))
    assert _psnr(ours, latent, peak=float(np.ptp(latent))) > 100
    ours = (taesd.decode(mx.array(latent)) + 1) / 2
    assert _psnr(ours, decoded, peak=1) > 100
