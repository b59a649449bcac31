"""The trained checkpoint through the command: it draws what it is told, as the reference does."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_maple.cli import main

pytestmark = pytest.mark.weights


@pytest.fixture
def draw(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(model, *arguments):
        given = ["generate", *arguments, "-m", str(weights / "emoji-trial" / model), "--json"]
        code = main(given)
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def picture(name):
    with Image.open(name) as image:
        return np.asarray(image.convert("RGB")).astype(np.float32)


def psnr(one, other):
    return 10 * np.log10(255**2 / max(np.mean((one - other) ** 2), 1e-9))


LIKE_REFERENCE = ("--sampler", "ddim", "--schedule", "leading", "-s", "20", "-g", "5")


def test_a_picture_of_the_reference_run(draw, weights):
    """A prompt and noise of diffusers' run, through --latents; its latents and picture come out."""
    run = np.load(weights / "emoji-trial" / "reference" / "ddim20_cfg5_torch_fp32.npz")
    prompt, theirs = str(run["prompts"][0]), run["latents_nhwc"][0]
    np.save("noise.npy", run["noise_nhwc"][:1])
    options = ("--latents", "noise.npy", "--save-latents", "final.npy", "-o", "a.png")
    draw("diffusers", prompt, *LIKE_REFERENCE, *options)
    ours = np.load("final.npy")[0]
    cosine = np.sum(ours * theirs) / np.sqrt(np.sum(ours**2) * np.sum(theirs**2))
    assert cosine >= 0.9999
    assert psnr(picture("a.png"), run["images_u8"][0].astype(np.float32)) > 40


def test_it_draws_what_it_is_told_and_again_from_the_picture(draw):
    options = ("--seed", "7", "-s", "8", "-g", "5", "--sampler", "ddim", "-o", "leaf.png")
    report = draw("emoji-trial.ckpt", "a red maple leaf on a yellow background", *options)
    assert report["model"]["sha256"].startswith("dd112b6343")
    image = picture("leaf.png")
    red, green, blue = image[:8, :8].mean((0, 1))
    assert red > 200 and green > 180 and blue < 150  # a yellow corner
    red, green, blue = image[56:72, 56:72].mean((0, 1))
    assert red > 120 and green < 110 and blue < 90  # a red leaf
    draw("emoji-trial.ckpt", "--from-image", "leaf.png", "-o", "again.png")
    assert Path("again.png").exists() and np.array_equal(picture("leaf.png"), picture("again.png"))
