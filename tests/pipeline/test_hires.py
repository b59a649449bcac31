"""A second, larger drawing on top of the first."""

import numpy as np
import pytest
from PIL import Image

from mlx_maple.enlarge import bilinear, larger
from mlx_maple.metadata import from_parameters, to_parameters
from mlx_maple.sampling import make_plan

ARGUMENTS = {"seed": 1, "steps": 3, "width": 64, "height": 64, "hires_scale": 2}


def test_bilinear_is_torchs():
    """torch 2.13: F.interpolate(x, size, mode="bilinear", align_corners=False)."""
    x = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32).reshape(1, 2, 2, 1)
    assert np.allclose(
        bilinear(x, 4, 4)[0, :, :, 0],
        [
            [0.0, 0.25, 0.75, 1.0],
            [0.5, 0.75, 1.25, 1.5],
            [1.5, 1.75, 2.25, 2.5],
            [2.0, 2.25, 2.75, 3.0],
        ],
    )
    assert np.allclose(bilinear(x, 2, 3)[0, 0, :, 0], [0.0, 0.5, 1.0])
    assert np.array_equal(bilinear(x, 2, 2), x)


def test_larger_sizes_are_multiples():
    assert larger((512, 768), 2, 8) == (1024, 1536)
    assert larger((512, 512), 1.7, 8) == (864, 864)


def test_the_second_drawing_has_its_size_its_steps_and_its_settings(sd):
    told = list(sd.generate("a leaf", hires_steps=2, hires_strength=0.6, **ARGUMENTS))
    result = told[-1].result
    assert result.images[0].size == (128, 128) and result.latents.shape == (1, 16, 16, 4)
    sampled = [(p.index, p.total) for p in told if p.stage == "sample"]
    assert sampled == [(i, 5) for i in (1, 2, 3, 4, 5)]
    settings = result.settings[0]
    assert (settings.width, settings.height, settings.steps) == (64, 64, 3)
    assert (settings.hires_scale, settings.hires_strength, settings.hires_steps) == (2, 0.6, 2)
    assert settings.hires_upscaler == "latent"
    assert {"sample", "enlarge", "decode"} <= result.timings.keys()


def test_it_makes_the_steps_that_it_is_asked_for(sd):
    """As A1111 counts them: 20 steps at strength 0.5 are the last 20 of 40."""
    plan = make_plan(sd.noise_schedule, "dpmpp_2m", "karras", 40, strength=0.5, last=20)
    whole = make_plan(sd.noise_schedule, "dpmpp_2m", "karras", 40)
    assert plan.total == 20 and plan.partial
    assert plan.grid.sigmas == whole.grid.sigmas[20:]


def test_its_steps_are_those_that_its_strength_leaves(sd):
    """Strength decides where it begins: the last 2 of 200 steps, however many are asked for."""
    weak = {**ARGUMENTS, "sampler": "euler", "steps": 20, "hires_strength": 0.01}
    result = sd("a leaf", **weak)
    assert result.settings[0].hires_steps == 10  # as many as there are, and not 20
    job = sd.generate("a leaf", **{**weak, "hires_steps": 2}).gi_frame.f_locals["job"]
    whole = make_plan(sd.noise_schedule, "euler", job.plan.schedule, 200)
    assert job.second.plan.grid.sigmas == whole.grid.sigmas[-len(job.second.plan.grid.sigmas) :]
    assert sd("a", **{**ARGUMENTS, "hires_strength": 1, "hires_steps": 2}).settings


def test_it_begins_with_the_first_drawing(sd):
    """Barely left, the second is the first enlarged; wholly left, it is not."""
    arguments = {**ARGUMENTS, "sampler": "euler"}
    start = bilinear(sd("a leaf", **{**arguments, "hires_scale": None}).latents, 16, 16)
    near, far = (sd("a leaf", hires_strength=s, **arguments).latents for s in (0.01, 1.0))

    def distance(latents):
        return np.abs(latents - start).mean() / start.std()

    assert distance(near) < 0.3 < distance(far)


def test_pictures_of_a_batch_are_those_drawn_alone(sd):
    both = sd("a leaf", count=2, hires_steps=1, hires_upscaler="lanczos", **ARGUMENTS)
    alone = sd("a leaf", hires_steps=1, hires_upscaler="lanczos", **{**ARGUMENTS, "seed": 2})
    assert np.array_equal(both.latents[1:], alone.latents)


def test_a_network_enlarges_where_one_is_named(build):
    seen = []

    class Fourfold:
        scale = 4.0

        def __init__(self, name):
            self.name = name

        def __call__(self, image: Image.Image) -> Image.Image:
            seen.append((self.name, image.size))
            return image.resize((image.width * 4, image.height * 4))

    sd = build(upscalers=Fourfold)
    with pytest.raises(ValueError, match="8192x16384 are more than 120,000,000 pixels: draw at a"):
        sd.generate("a", hires_scale=1, hires_upscaler="x4", width=2048, height=4096)
    result = sd("a leaf", hires_steps=1, hires_upscaler="some-x4", **ARGUMENTS)
    assert seen == [("some-x4", (64, 64))] and result.images[0].size == (128, 128)
    assert result.settings[0].hires_upscaler == "some-x4"


def test_a_changing_prompt_goes_on_counting(sd):
    arguments = {**ARGUMENTS, "hires_steps": 2}
    plain = sd("leaf", **arguments).latents
    assert np.array_equal(plain, sd("[leaf:snow:2.0]", **arguments).latents)
    changed = sd("[leaf:snow:1.0]", **arguments).latents  # the second drawing is of snow
    assert not np.array_equal(plain, changed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": Image.new("RGB", (64, 64))}, "neither an image"),
        ({"hires_scale": 0.5}, "hires_scale must be a number from 1"),
        ({"hires_scale": 8, "width": 1024}, "width must be a whole number from 64 to 4,096"),
        ({"hires_strength": 0}, "hires_strength must be"),
        ({"hires_strength": 0.1, "hires_steps": 101}, "take at most 100 steps, or more strength"),
        ({"hires_upscaler": "x4"}, "choose from latent, lanczos"),
    ],
)
def test_what_cannot_be_is_refused(sd, arguments, words):
    with pytest.raises(ValueError, match=words):
        sd.generate("a", **{**ARGUMENTS, **arguments})


BLOCK = (
    "a leaf\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, "
    "Denoising strength: 0.6, Hires upscale: 2, Hires steps: 12, Hires upscaler: {}, RNG: CPU, "
    "Version: v1.10.1"
)


def test_a1111s_hires_fix_is_read():
    settings, notes = from_parameters(BLOCK.format("Latent"))
    assert (settings.hires_scale, settings.hires_strength, settings.hires_steps) == (2, 0.6, 12)
    assert settings.hires_upscaler == "latent" and settings.strength is None
    assert not any("enlarged" in note for note in notes)
    settings, notes = from_parameters(BLOCK.format("R-ESRGAN 4x+"))
    assert settings.hires_upscaler == "R-ESRGAN 4x+"
    settings, notes = from_parameters(BLOCK.format("Latent (nearest-exact)"))
    assert settings.hires_upscaler == "latent"
    assert any("was enlarged by 'Latent (nearest-exact)'" in note for note in notes)


def test_ours_comes_back_from_the_block(sd):
    settings = sd("a leaf", hires_steps=1, **ARGUMENTS).settings[0]
    back = from_parameters(to_parameters(settings)).settings
    for name in ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler"):
        assert getattr(back, name) == getattr(settings, name)


def test_the_second_drawing_can_have_prompts_of_its_own(sd):
    arguments = {**ARGUMENTS, "hires_steps": 2, "hires_strength": 0.9}
    same, other, avoided = (
        sd("a leaf", **arguments, **more)
        for more in ({}, {"hires_prompt": "a ship"}, {"hires_negative_prompt": "a ship"})
    )
    assert not np.array_equal(same.latents, other.latents)
    assert not np.array_equal(same.latents, avoided.latents)
    again = sd("a leaf", **arguments, hires_prompt="a leaf", hires_negative_prompt="")
    assert np.array_equal(same.latents, again.latents)
    without = sd("a leaf", **{**arguments, "hires_scale": None}, hires_prompt="a ship")
    assert any("no hires_scale" in note for note in without.notes)
    settings = other.settings[0]
    assert (settings.prompt, settings.hires_prompt) == ("a leaf", "a ship")
    assert from_parameters(to_parameters(settings)).settings.hires_prompt == "a ship"
