"""The trained trial model draws what diffusers draws with it: one picture of tests/parity's."""

import numpy as np
import pytest

import mlx_maple

pytestmark = pytest.mark.weights


def test_a_reference_picture_is_drawn_again(weights):
    folder, number = weights / "emoji-trial", 1
    reference = np.load(folder / "reference" / "ddim20_cfg5_torch_fp32.npz")
    sd = mlx_maple.load(folder / "emoji-trial.ckpt", dtype="float32", cache=False)
    result = sd(
        str(reference["prompts"][number]),
        sampler="ddim",
        schedule="leading",
        steps=20,
        guidance_scale=5,
        latents=reference["noise_nhwc"][number : number + 1],
        width=128,
        height=128,
    )
    expected = reference["latents_nhwc"][number]
    cosine = (result.latents[0] * expected).sum()
    cosine /= np.linalg.norm(result.latents) * np.linalg.norm(expected)
    pixels = np.asarray(result.images[0]).astype(float)
    error = np.square(pixels - reference["images_u8"][number]).mean()
    assert cosine >= 0.9999
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 40
    assert result.notes == []
