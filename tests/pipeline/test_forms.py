"""Forms in drawings: a GPU's networks take them as plain ones do, and each drawing has its own."""

import numpy as np
import pytest
import tiny_model
from interleaved import in_turn

from mlx_maple import images, load
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import PreparedUNet, PreparedVAE, prepare_unet, prepare_vae
from mlx_maple.models import TAESD
from mlx_maple.models.seamless import WrappedConv2d
from mlx_maple.pipeline import StableDiffusion

SMALL = {"seed": 1, "steps": 2, "width": 64, "height": 64, "sampler": "euler"}
FREEU = {"freeu": (1.5, 1.6, 0.9, 0.2)}
ALL = {**FREEU, "tile": "xy", "token_merging": 0.5}


def as_on_a_gpu(sd, monkeypatch):
    """The model with networks made ready, drawing as where there is a GPU."""
    ready = prepare_unet(sd.unet)
    ready.steps = GuidedSteps(ready, compiles=False)
    sd.unet, sd.vae = ready, prepare_vae(sd.vae)
    monkeypatch.setattr(StableDiffusion, "is_on_cpu", False)
    return sd


def is_same(found, expected):
    return np.array_equal(found.latents, expected.latents) and all(
        np.array_equal(a, b) for a, b in zip(found.images, expected.images, strict=True)
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, ALL), (FREEU, {"tile": "x"}), ({"token_merging": 0.5}, {"token_merging": 0.2})],
    ids=["plain-and-all", "freeu-and-tile", "two-shares"],
)
def test_drawings_in_turn_are_those_alone(sd, first, second):
    """Bit for bit: each step draws with its own drawing's form."""
    alone = [sd("a leaf", **SMALL, **more) for more in (first, second)]
    assert not np.allclose(alone[0].latents, alone[1].latents, atol=1e-3)  # the control
    longer = {**SMALL, "steps": 3}  # the first ends while the second goes on
    alone[1] = sd("a leaf", **longer, **second)
    found = in_turn(
        sd.generate("a leaf", **SMALL, **first), sd.generate("a leaf", **longer, **second)
    )
    assert all(is_same(each, other) for each, other in zip(found, alone, strict=True))
    assert is_same(sd("a leaf", **SMALL, **first), alone[0])  # and nothing is left behind


def test_so_they_are_on_a_gpu(build, monkeypatch):
    sd = as_on_a_gpu(build(), monkeypatch)
    every = ({}, FREEU, {"tile": "x", "token_merging": 0.5})
    alone = [sd("a leaf", **SMALL, **more) for more in every]
    found = in_turn(*(sd.generate("a leaf", **SMALL, **more) for more in every))
    assert all(is_same(each, other) for each, other in zip(found, alone, strict=True))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not np.allclose(alone[one].latents, alone[other].latents, atol=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        {**FREEU, "prompt": "a [leaf|snow] AND rain", "count": 2},
        {"tile": "y", "deep_cache": 2, "steps": 4, **FREEU},
        {"prompt": "a [leaf|snow]", "deep_cache": 2, "steps": 4, "guidance_rescale": 0.7, **FREEU},
        {"tile": "xy", "hires_scale": 2, "hires_steps": 1, "hires_upscaler": "lanczos"},
        {**ALL, "guidance_rescale": 0.7, "image": np.full((64, 64, 3), 90, np.uint8)},
    ],
    ids=["prompts", "deep-cache", "rescaled", "hires", "image"],
)
def test_networks_made_ready_draw_the_same(build, monkeypatch, more):
    arguments = {"prompt": "a leaf", **SMALL, **more}
    sd = build()
    expected = sd(**arguments)
    as_on_a_gpu(sd, monkeypatch)
    found = sd(**arguments)
    assert isinstance(sd.unet, PreparedUNet) and isinstance(sd.vae, PreparedVAE)
    assert np.allclose(found.latents, expected.latents, rtol=0, atol=1e-3)
    for one, other in zip(found.images, expected.images, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 2
    for left in {"freeu", "tile"} & more.keys():  # the control: each is seen
        assert not np.allclose(
            sd(**{**arguments, left: None}).latents, found.latents, rtol=0, atol=1e-2
        )


def test_with_a_controlnet_and_a_refiner(monkeypatch):
    control = tiny_model.folder() / "control.safetensors"
    photo = images.open_image(tiny_model.folder() / "photo.png")
    sd = load(tiny_model.maple_folder(), controlnet=control)
    refiner = load(tiny_model.maple_folder())
    steered = {**SMALL, "tile": "xy", "guidance_rescale": 0.7, **FREEU, "control_image": photo}
    refined = {**SMALL, **FREEU, "token_merging": 0.5, "refiner": refiner, "refiner_start": 0.5}
    expected = [sd("a leaf", **more) for more in (steered, refined)]
    unrefined = sd("a leaf", **{**refined, "refiner": None})
    as_on_a_gpu(sd, monkeypatch)
    as_on_a_gpu(refiner, monkeypatch)
    # A drawing of the refiner's own goes on meanwhile, in a form of its own.
    found = in_turn(
        sd.generate("a leaf", **steered),
        sd.generate("a leaf", **refined),
        refiner.generate("a leaf", **{**SMALL, "steps": 4}, **FREEU),
    )
    for each, other in zip(found, expected, strict=False):
        assert np.allclose(each.latents, other.latents, rtol=0, atol=1e-3)
    assert not np.allclose(unrefined.latents, expected[1].latents, rtol=0, atol=1e-2)


def test_no_network_is_read_again_for_a_form(build, monkeypatch):
    """Not even of a model put together by hand, which could not be."""
    read = []
    renew = {part: lambda part=part: read.append(part) for part in ("unet", "vae")}
    sd = as_on_a_gpu(build(renew=renew), monkeypatch)
    held = [sd.networks.held(part) for part in ("unet", "vae")]
    sd("a leaf", **SMALL, **ALL)
    assert [sd.networks.held(part) for part in ("unet", "vae")] == held and not read


def test_what_is_read_within_a_drawing_has_its_form_and_previews_have_none(build):
    sd = build(renew={part: lambda part=part: getattr(build(), part) for part in ("vae", "taesd")})
    expected = sd("a leaf", **SMALL, tile="xy")
    sd.networks.drop("vae", "taesd")
    drawing = sd.generate("a leaf", **SMALL, tile="xy", preview="taesd")
    for progress in drawing:
        if progress.stage == "sample":
            progress.preview()
    assert is_same(progress.result, expected)
    assert isinstance(sd.taesd, TAESD)
    assert not any(isinstance(layer, WrappedConv2d) for layer in sd.taesd.modules())
