"""Token merging and DeepCache in drawings: what they change and leave, which calls are full."""

import numpy as np
import pytest
import tiny_model
from PIL import Image

from mlx_maple import images, load
from mlx_maple.engine import deep_cache
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import prepare_unet
from mlx_maple.metadata import from_json, from_parameters, to_json, to_parameters

SMALL = {"seed": 1, "steps": 4, "width": 64, "height": 64, "sampler": "dpmpp_2m"}
BOTH = {"token_merging": 0.5, "deep_cache": 2}


@pytest.fixture(scope="module")
def leaf(sd):
    return sd("a leaf", **SMALL).latents


@pytest.fixture
def forms(monkeypatch):
    """Whether each call of the network was full."""
    found = []
    plain = deep_cache.keeping

    def spy(unet, branch, deep, *inputs, **told):
        found.append(deep is None)
        return plain(unet, branch, deep, *inputs, **told)

    monkeypatch.setattr(deep_cache, "keeping", spy)
    return found


def test_switched_off_they_change_nothing(sd, leaf):
    off = sd("a leaf", token_merging=0, deep_cache=1, **SMALL)
    assert np.array_equal(off.latents, leaf)
    assert (off.settings[0].token_merging, off.settings[0].deep_cache) == (0, None)


@pytest.mark.parametrize(
    "more",
    [{"token_merging": 0.5}, {"deep_cache": 2}, {"deep_cache": 3, "deep_cache_branch": 2}, BOTH],
)
def test_they_change_the_picture_and_leave_the_model(sd, leaf, more):
    changed = sd("a leaf", **more, **SMALL)
    assert not np.allclose(changed.latents, leaf, atol=1e-3)
    settings = changed.settings[0]
    assert more.items() <= vars(settings).items()
    assert np.array_equal(sd(**settings.arguments()).latents, changed.latents)
    stopped = sd.generate("a leaf", **more, **SMALL)
    [next(stopped) for _ in range(3)]
    stopped.close()
    assert np.array_equal(sd("a leaf", **SMALL).latents, leaf)
    for written, read in ((to_json, from_json), (to_parameters, from_parameters)):
        again = read(written(settings))
        assert more.items() <= vars(again.settings).items() and not again.notes


def test_a111s_word_is_read():
    text = "a\nSteps: 20, Sampler: Euler, CFG scale: 7, RNG: CPU, Token merging ratio: 0.5"
    recipe = from_parameters(text + ", Version: v1.10.1")
    assert recipe.settings.token_merging == 0.5 and recipe.notes == []


def test_pictures_are_the_same_alone_and_among_others(sd):
    both = sd("a leaf", count=2, **BOTH, **SMALL).latents
    for i in range(2):
        alone = sd("a leaf", **BOTH, **{**SMALL, "seed": 1 + i}).latents
        assert np.array_equal(alone[0], both[i])


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, "f..f"),
        ({"sampler": "heun"}, "f..f..f"),  # two calls a step, but for the last
        ({"guidance_end": 0.5}, "f.f."),  # another batch, and features of its own
        ({"image": Image.new("RGB", (64, 64), "red"), "strength": 0.5}, "f.."),
        ({"steps": 2, "hires_scale": 2, "hires_steps": 2}, "f.f."),
        ({"count": 2, "steps": 2}, "ff.."),  # one by one on the CPU
        ({"prompt": "a leaf AND snow", "steps": 2}, "fff..."),
        ({"prompt": "a [leaf|snow]"}, "f.f."),
    ],
    ids=["steps", "two calls", "interval", "image", "hires", "count", "and", "changing"],
)
def test_which_calls_are_full(sd, forms, more, wanted):
    sd(**{"prompt": "a leaf", "deep_cache": 3, **SMALL, **more})
    assert "".join(".f"[is_full] for is_full in forms) == wanted


@pytest.mark.parametrize(("prompt", "compiles"), [("a leaf", True), ("a leaf AND snow", False)])
def test_networks_made_ready_draw_the_same(build, prompt, compiles):
    arguments = {**SMALL, "count": 2, "guidance_end": 0.8, **BOTH}
    sd = build()
    expected = sd(prompt, **arguments).latents
    plain = sd(prompt, **SMALL, count=2, guidance_end=0.8).latents
    ready = prepare_unet(sd.unet)
    ready.steps = GuidedSteps(ready, compiles=compiles)
    sd.unet = ready
    found = sd(prompt, **arguments).latents
    assert np.allclose(found, expected, rtol=0, atol=1e-3)
    again = sd(prompt, **SMALL, count=2, guidance_end=0.8).latents
    assert np.allclose(again, plain, rtol=0, atol=1e-3)
    assert not np.allclose(found, plain, rtol=0, atol=1e-2)


def test_with_a_controlnet_and_in_low_memory_mode(forms):
    """The ControlNet's own body is not asked for what a shallow call does not read."""
    control = tiny_model.folder() / "control.safetensors"
    photo = images.open_image(tiny_model.folder() / "photo.png")
    arguments = {**SMALL, **BOTH, "control_image": photo, "sampler": "euler"}
    found = []
    for low_memory in (False, True):
        sd = load(tiny_model.maple_folder(), controlnet=control, low_memory=low_memory)
        found.append(sd("a", **arguments).latents)
    assert np.array_equal(*found)
    assert forms == [True, False] * 4
    assert not np.allclose(found[0], sd("a", **arguments, control_weight=0.0).latents, atol=1e-3)


def test_samplers_whose_steps_are_far_apart_are_told(sd):
    notes = {
        sampler: sd("a", deep_cache=2, **{**SMALL, "sampler": sampler, "steps": 2}).notes
        for sampler in ("lcm", "euler")
    }
    assert notes["lcm"] == ["lcm's steps are far apart: deep_cache spoils the picture"]
    assert notes["euler"] == []


def test_what_cannot_be_asked_for(sd):
    for more, words in (
        ({"token_merging": 1}, "token_merging must be a number from 0 to 0.9"),
        ({"deep_cache": 0}, "deep_cache must be a whole number from 1 to 100"),
        ({"deep_cache": 2, "deep_cache_branch": 4}, "deep_cache_branch must be from 0 to 3, got 4"),
        ({"deep_cache": 2, "window": 64}, "deep_cache does not go with window"),
    ):
        with pytest.raises(ValueError, match=words):
            sd.generate("a", **more)
