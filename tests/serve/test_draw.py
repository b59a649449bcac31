"""What a request to draw may say: what the Python API takes, and no more than a job may have."""

import inspect

import pytest

from mlx_maple.loading import load
from mlx_maple.pipeline import StableDiffusion
from mlx_maple.serve.draw import LISTED, Control, Draw, ImagePrompt, Undrawable
from mlx_maple.serve.studio import _input_names

ARRAYS = {"latents", "step_noise"}  # which JSON is no way to send


def test_what_generate_takes_can_be_said():
    taken = set(inspect.signature(StableDiffusion.generate).parameters) - {"self", *ARRAYS}
    said = set(Draw.model_fields)
    for model, prefix in ((Control, "control"), (ImagePrompt, "ip")):
        said |= {f"{prefix}_{name}" for name in model.model_fields}
    assert taken <= said


def test_what_load_takes_can_be_said():
    """But for what a whole server has: its cache, its memory, words and where models come from."""
    taken = set(inspect.signature(load).parameters)
    names = {"source": "model", "controlnet": "controls", "ip_adapter": "image_prompts"}
    servers = {"max_memory", "embeddings", "compile", "cache", "local_files_only", "progress"}
    files = {"variant", "ema", "prediction", "ip_encoder"}
    assert {names.get(name, name) for name in taken - servers - files} <= set(Draw.model_fields)


def test_everything_reaches_generate():
    """Each argument that a drawing says is one of ``generate``, as that takes it."""
    picture = {"image": "aGk="}
    values = {
        "prompt": "a leaf",
        "negative_prompt": None,
        "zeroed_negative": True,
        "freeu": "1.5 1.6 0.9 0.2",
        "loras": [{"name": "a", "weight": 0.5}],
        "controls": [{"name": "a", **picture}, {"name": "b", "weight": 2, **picture}],
        "image_prompts": [{"name": "c", "scale": 0.5, **picture}],
        "original_size": "1024x768",
        "depth_image": "aGk=",
        "refiner": "x",
        "refiner_start": 0.7,
        "quantize": 8,
        "preview": "taesd",
    }
    draw = Draw(**values)
    found = draw.arguments()
    assert found.keys() <= set(inspect.signature(StableDiffusion.generate).parameters)
    assert found["negative_prompt"] is None and found["freeu"] == [1.5, 1.6, 0.9, 0.2]
    assert found["control_weight"] == [1.0, 2.0] and found["ip_scale"] == [0.5]
    assert found["loras"] == [["a", 0.5]] and found["refiner_start"] == 0.7
    assert draw.loading() == {"quantize": 8}
    assert draw.beside()["controlnet"] == ["a", "b"] and draw.beside()["ip_adapter"] == ["c"]
    assert list(draw.pictures()) == ["depth_image", "control-0", "control-1", "ip_image-0"]
    said = draw.said()
    assert said["depth_image"] is True
    assert all(each["image"] is True for name in LISTED for each in said[name])


@pytest.mark.parametrize(
    ("values", "own", "fits"),
    [
        ({"hires_scale": 4}, (512, 512), True),
        ({"hires_scale": 4}, (1024, 1024), True),
        ({"hires_scale": 4, "count": 2}, (1024, 1024), False),
        ({"hires_scale": 4, "count": 2, "width": 512, "height": 512}, (1024, 1024), True),
        ({"count": 16}, (1024, 1024), True),
        ({"count": 16, "width": 1032}, (1024, 1024), False),
    ],
)
def test_an_unnamed_size_counts_as_the_models_own(values, own, fits):
    draw = Draw(prompt="x", **values)
    if fits:
        draw.check_size(own)
    else:
        with pytest.raises(Undrawable, match="pixels in one job"):
            draw.check_size(own)


@pytest.mark.parametrize("factors", ["1.5 1.6 0.9 0.2", "1.5,1.6,0.9,0.2", "1.5, 1.6, 0.9, 0.2"])
def test_factors_are_told_in_one_text(factors):
    assert Draw(prompt="", freeu=factors).freeu == [1.5, 1.6, 0.9, 0.2]


def test_what_is_kept_of_a_request_names_its_pictures():
    """By these names they are found again after a restart."""
    one = {"name": "x", "image": "aGk="}
    draw = Draw(prompt="", image="aGk=", mask="aGk=", controls=[one, one], image_prompts=[one])
    assert sorted(_input_names(draw.said())) == sorted(draw.pictures())
    assert _input_names(Draw(prompt="").said()) == []
