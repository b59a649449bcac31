"""The model that ships draws in four steps without guidance, with the LCM sampler: 4 UNet calls of
one picture, where 20 guided steps make 40.

Its pictures hang on little but the prompt, so that one guess of the clean picture is nearly right;
distilled variants (training/distill.py) measured no better. See training/README.md.
"""

import judge
import numpy as np
import pytest

import mlx_maple as maple

FOUR = {"sampler": "lcm", "steps": 4, "guidance_scale": 1}
NAMES = ("maple leaf", "rocket", "octopus", "pizza", "snail", "sunflower")


@pytest.fixture(scope="module")
def sd():
    return maple.load()


def read(sd, **settings) -> int:
    """How many of the names the judge puts first."""
    pictures = {n: sd(f"a {n}", seed=i, **settings).images[0] for i, n in enumerate(NAMES)}
    return sum(judge.best(picture, 1) == [name] for name, picture in pictures.items())


def test_four_steps_are_enough_for_the_lcm_sampler(sd):
    assert read(sd, **FOUR) >= len(NAMES) - 1


def test_four_guided_steps_of_a_solver_are_not(sd):
    """The control: the judge is not pleased by just any four steps."""
    few = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 4, "guidance_scale": 3}
    assert read(sd, **few) <= len(NAMES) // 2


def test_colours_are_followed_in_four_steps(sd):
    result = sd("a blue maple leaf on a yellow background", seed=1, **FOUR)
    picture = np.asarray(result.images[0], np.float32)
    assert np.linalg.norm(picture[:4].mean((0, 1)) - (255, 219, 51)) < 45
    assert (np.linalg.norm(picture - (20, 90, 230), axis=-1) < 90).mean() > 0.08
