"""The smallest model that draws: tests/data/tiny-model, twelve things on coloured backgrounds.

Trained by training/README.md's recipe with the `tiny` preset: 8 groups in every GroupNorm, 4 heads
and a vocabulary of its own, all of which its config says.
"""

import json
from pathlib import Path

import judge
import numpy as np
import pytest

import mlx_maple as maple
from maple_convert import convert

TINY = Path(__file__).parent / "data" / "tiny-model"
SEED = 2
WANTED = {  # prompt: name, colour of the object, of the background
    "a blue maple leaf on a yellow background": ("maple leaf", (20, 90, 230), (255, 219, 51)),
    "a green frog on a purple background": ("frog", (50, 180, 70), (128, 56, 191)),
    "a red mushroom on a teal background": ("mushroom", (220, 40, 40), (20, 153, 153)),
}


@pytest.fixture(scope="module")
def sd():
    return maple.load(TINY)


def pixels(result):
    return np.asarray(result.images[0], np.float32)


def share_near(picture, colour, distance=90):
    return float((np.linalg.norm(picture - colour, axis=-1) < distance).mean())


def test_it_is_small():
    assert sum(file.stat().st_size for file in TINY.rglob("*")) < 1_000_000


@pytest.mark.parametrize("prompt", WANTED)
def test_the_picture_shows_what_the_prompt_says(sd, prompt):
    name, colour, background = WANTED[prompt]
    result = sd(prompt, seed=SEED)
    assert name in judge.best(result.images[0])
    assert np.linalg.norm(pixels(result)[:4].mean((0, 1)) - background) < 45
    assert share_near(pixels(result), colour) > 0.08


def test_another_prompt_is_another_picture(sd):
    """The control: the colours above are not there unless they are asked for."""
    picture = pixels(sd("a green frog on a purple background", seed=SEED))
    assert share_near(picture, (20, 90, 230)) < 0.04
    assert np.linalg.norm(picture[:4].mean((0, 1)) - (255, 219, 51)) > 90


def test_its_groups_survive_a_trip_through_diffusers(sd, tmp_path):
    def drawn(model):
        how = {"steps": 2, "guidance_scale": 3, "sampler": "ddim", "schedule": "leading"}
        return model("a rocket", seed=1, **how).latents

    folder = tmp_path / "diffusers"
    convert(TINY, folder, to="diffusers")
    assert np.array_equal(drawn(maple.load(folder)), drawn(sd))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "norm_num_groups": 4}))
    assert not np.allclose(drawn(maple.load(folder)), drawn(sd), atol=1e-2)
