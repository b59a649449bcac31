"""Drawing with the UNet of another file than the rest of the model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import save_file

from maple_convert.errors import ConvertError
from maple_convert.layouts import diffusers_config
from mlx_maple import load, metadata

sys.path.insert(0, str(Path(__file__).parent / "convert"))
import families
import gguf_files
import tiny

DRAWING = {"width": 64, "height": 64, "steps": 1, "seed": 7}
PREFIX = "model.diffusion_model."
OTHER = {**tiny_model.CONFIGS["unet"], "block_out_channels": [64, 32]}


def drawn(sd, **more):
    return sd("a leaf", **DRAWING, **more)


def loaded(**more):
    return load(tiny_model.maple_folder(), cache=False, **more)


def arrays(config=OTHER) -> dict[str, np.ndarray]:
    """Another UNet's random native arrays."""
    return tiny.arrays("unet", config, np.float16)


def bare(spelling: str = "compvis", prefix: str = "", config=OTHER) -> dict[str, np.ndarray]:
    return tiny.published("unet", config, arrays(config), spelling, prefix)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("unets")


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The tiny model with the other UNet, in one file."""
    state = {k: v for k, v in tiny_model.compvis().items() if not k.startswith(PREFIX)}
    save_file({**state, **bare(prefix=PREFIX)}, folder / "whole.safetensors")
    return folder / "whole.safetensors"


@pytest.fixture(scope="module")
def expected(whole) -> np.ndarray:
    return drawn(load(whole, cache=False)).latents


def with_config(folder: Path) -> Path:
    """A UNet in a folder of its own, as diffusers saves it."""
    place = folder / "unet"
    place.mkdir()
    save_file(bare("diffusers"), place / "diffusion_pytorch_model.safetensors")
    tiny.write_json(place / "config.json", diffusers_config.write("unet", OTHER, 64))
    return place


BARE = {
    "CompVis names": lambda f: bare(),
    "CompVis names below their prefix": lambda f: bare(prefix=PREFIX),
    "diffusers' names": lambda f: bare("diffusers"),
}


@pytest.mark.parametrize("kind", BARE)
def test_a_bare_unet(kind, folder, expected):
    path = folder / f"{kind}.safetensors"
    save_file(BARE[kind](folder), path)
    own = drawn(loaded())
    result = drawn(loaded(unet=path))
    assert np.array_equal(result.latents, expected)
    assert not np.array_equal(result.latents, own.latents)
    assert (own.settings[0].unet, result.settings[0].unet) == ("", kind)
    assert result.settings[0].model == own.settings[0].model
    with pytest.raises(ConvertError, match=r"holds unet but .*no vae: not a whole .* its --unet"):
        load(path, cache=False)


def test_a_unet_of_a_folder_and_of_a_whole_model(folder, whole, expected):
    for unet in (with_config(folder), whole):
        assert np.array_equal(drawn(loaded(unet=unet)).latents, expected)
    assert np.array_equal(drawn(loaded(unet=whole, low_memory=True)).latents, expected)


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["ComfyUI's add-on", "stable-diffusion.cpp"])
def test_a_quantised_unet(prefix, folder, whole):
    """GGUF files mostly hold the UNet alone."""
    path = folder / f"q{len(prefix)}.gguf"
    settings = {"general.architecture": "sd1"} if not prefix else {}
    state = bare(prefix=prefix)
    held = gguf_files.save(path, state, gguf_files.Q8_0, settings=settings, folded=not prefix)
    rest = {k: v for k, v in tiny_model.compvis().items() if not k.startswith(PREFIX)}
    plain = {PREFIX + k.removeprefix(PREFIX): v.reshape(state[k].shape) for k, v in held.items()}
    save_file({**rest, **plain}, folder / "dequantised.safetensors")
    result = drawn(loaded(unet=path))
    reference = drawn(load(folder / "dequantised.safetensors", cache=False))
    assert np.array_equal(result.latents, reference.latents)
    assert not np.array_equal(result.latents, drawn(loaded(unet=whole)).latents)
    with pytest.raises(ConvertError, match="not a whole model; draw with a whole one"):
        load(path, cache=False)


def test_what_fits_no_text_is_refused(folder):
    wide, large = folder / "wide.safetensors", folder / "large.safetensors"
    save_file(bare(config={**OTHER, "cross_attention_dim": 96}), wide)
    with pytest.raises(ConvertError, match="context is 96 wide and that model's text 64") as caught:
        loaded(unet=wide)
    assert str(wide) in str(caught.value) and caught.value.exit_code == 3
    config = {**families.FAMILIES["sdxl"]["unet"], "cross_attention_dim": 64}
    save_file(bare("compvis_linear", config=config), large)
    with pytest.raises(ConvertError, match="is the UNet of another family than"):
        loaded(unet=large)
    with pytest.raises(ConvertError, match="holds no unet but vae"):
        loaded(unet=tiny_model.folder() / "vae.safetensors")


def test_a_unet_brings_how_it_is_drawn_with(folder, whole):
    quick = folder / "some_lightning_2step_unet.safetensors"
    save_file(bare(), quick)
    plain, sd = loaded(), loaded(unet=quick)
    assert sd.defaults["steps"] == 2 and sd.defaults["guidance_scale"] == 1
    assert any("Lightning" in note for note in sd.info.notes)
    assert {**plain.defaults, **sd.defaults} == sd.defaults != plain.defaults
    distilled = {**OTHER, "mid_transformer_layers": None}
    save_file(bare(config=distilled), folder / "distilled.safetensors")
    assert loaded(unet=folder / "distilled.safetensors").info.family == "sd1-distilled"
    state = {k: v for k, v in tiny_model.compvis().items() if not k.startswith(PREFIX)}
    save_file(state, folder / "rest.safetensors")
    with pytest.raises(ConvertError, match="no unet: not a whole model; --unet takes one"):
        load(folder / "rest.safetensors", cache=False)
    rest = load(folder / "rest.safetensors", unet=whole, cache=False)
    assert np.array_equal(drawn(rest).latents, drawn(loaded(unet=whole)).latents)


def test_what_a_bare_unet_predicts_is_looked_at_where_it_may_be_another_thing(folder):
    """Its mark says v; the rest of the model was made for noise."""
    path = folder / "v.safetensors"
    save_file({**bare(), "v_pred": np.zeros(0, np.float32)}, path)
    sd = loaded(unet=path)
    assert any("predict" in note and "correlation" in note for note in sd.info.notes)
    assert sd.noise_schedule.prediction == "v_prediction"
    assert loaded(unet=path, prediction="epsilon").noise_schedule.prediction == "epsilon"


def test_pictures_say_it(whole):
    settings = drawn(loaded(unet=whole)).settings[0]
    assert settings.unet == "whole"
    text = metadata.to_parameters(settings)
    assert "UNet: whole" in text and metadata.from_parameters(text).settings.unet == "whole"
    assert metadata.from_json(metadata.to_json(settings)).settings.unet == "whole"
    assert "unet" not in settings.arguments()
