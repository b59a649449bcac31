"""Trained models through the command: they draw what they are told, as the reference does."""

import json

import numpy as np
import pytest
from PIL import Image

from mlx_maple.cli import main


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(model, *arguments):
        code = main(["generate", *arguments, "--json", *(["-m", str(model)] if model else [])])
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


@pytest.mark.weights
def test_a_picture_of_the_reference_run(draw, weights):
    """A prompt and noise of diffusers' run, through --latents; its latents and picture come out."""
    run = np.load(weights / "emoji-trial" / "reference" / "ddim20_cfg5_torch_fp32.npz")
    prompt, theirs = str(run["prompts"][0]), run["latents_nhwc"][0]
    np.save("noise.npy", run["noise_nhwc"][:1])
    options = ("--latents", "noise.npy", "--save-latents", "final.npy", "-o", "a.png")
    draw(weights / "emoji-trial" / "diffusers", prompt, *LIKE_REFERENCE, *options)
    ours = np.load("final.npy")[0]
    cosine = np.sum(ours * theirs) / np.sqrt(np.sum(ours**2) * np.sum(theirs**2))
    assert cosine >= 0.9999
    assert psnr(picture("a.png"), run["images_u8"][0].astype(np.float32)) > 40


def test_the_embedded_model_draws_what_it_is_told(draw):
    report = draw(None, "a red maple leaf on a yellow background", "--seed", "7", "-s", "8")
    assert report["model"]["name"] == "demo"
    (note,) = report["notes"]  # which model draws, and how to fetch a full-size one
    assert "the small one that comes with maple draws" in note and "maple models pull sd15" in note
    image = picture(report["files"][0])
    red, green, blue = image[:8, :8].mean((0, 1))
    assert red > 200 and green > 180 and blue < 150  # a yellow corner
    red, green, blue = image[56:72, 56:72].mean((0, 1))
    assert red > 150 and green < 110  # a red leaf
