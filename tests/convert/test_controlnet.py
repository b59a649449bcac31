"""ControlNets and adapters in every published layout, and UNets with more than latents as input."""

import json

import families
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from maple_convert import convert, inspect, open_model
from maple_convert.errors import InvalidCheckpoint, LayoutMismatch, UnsupportedCheckpoint

UNET = {key: value for key, value in tiny.CONFIGS["unet"].items() if key != "out_channels"}
CONFIG = {**UNET, "hint_channels": 3, "hint_widths": [4, 6, 8]}
NATIVE = tiny.arrays("controlnet", CONFIG)


def published(spelling: str, prefix: str = "") -> tiny.Arrays:
    return tiny.published("controlnet", CONFIG, NATIVE, spelling, prefix)


FILES = {
    "CompVis": published("compvis", "control_model."),
    "CompVis, bare": published("compvis"),
    "diffusers": published("diffusers"),
    "inside a whole model": {**tiny.compvis(), **published("compvis", "control_model.")},
}


def same(model) -> bool:
    part = model.components["controlnet"]
    found = {name: tensor.array for name, tensor in part.tensors()}
    return part.config == CONFIG and tiny.same_bits({"x": found}, {"x": NATIVE})


@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_read(name, tmp_path):
    path = tmp_path / "control.safetensors"
    tiny.save_safetensors(path, FILES[name])
    with open_model(path) as model:
        assert same(model)
        is_whole = name == "inside a whole model"
        assert model.family == ("sd1" if is_whole else "controlnet")
        assert ("unet" in model.components) == is_whole
        assert any("heads" in note and "ControlNet" in note for note in model.notes)
        assert any("ControlNet" in line for line in model.evidence)


@pytest.mark.parametrize("to", ["maple", "compvis", "diffusers"])
def test_what_is_written_is_read_back(to, tmp_path):
    source = tmp_path / "control.safetensors"
    tiny.save_safetensors(source, FILES["CompVis"])
    out = tmp_path / ("out.safetensors" if to == "compvis" else "out")
    convert(source, out, to=to)
    with open_model(out) as model:
        assert same(model)
        assert model.layout == to


def test_a_folder_is_read_with_its_heads(tmp_path):
    source = tmp_path / "control.safetensors"
    tiny.save_safetensors(source, FILES["CompVis"])
    convert(source, tmp_path / "out", to="diffusers")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["_class_name"] == "ControlNetModel"
    assert config["conditioning_embedding_out_channels"] == [4, 6, 8]
    path.write_text(json.dumps({**config, "attention_head_dim": [4, 2, 8]}))
    assert inspect(tmp_path / "out")["components"]["controlnet"]["config"][
        "num_attention_heads"
    ] == [4, 2, 8]


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"),
    [
        ("controlnet_conditioning_channel_order", "bgr", UnsupportedCheckpoint, "only 'rgb'"),
        ("global_pool_conditions", True, UnsupportedCheckpoint, "only False"),
        ("conditioning_channels", 1, InvalidCheckpoint, "the tensors make it 3"),
        ("act_fn", "gelu", UnsupportedCheckpoint, "act_fn"),
        ("stranger", 1, UnsupportedCheckpoint, "unknown setting"),
    ],
)
def test_a_folder_of_another_kind_is_refused(key, value, kind, words, tmp_path):
    source = tmp_path / "control.safetensors"
    tiny.save_safetensors(source, FILES["diffusers"])
    convert(source, tmp_path / "out", to="diffusers")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(kind, match=words):
        open_model(tmp_path / "out")


def test_a_lost_or_foreign_tensor_is_named(tmp_path):
    state = published("compvis", "control_model.")
    del state["control_model.zero_convs.2.0.bias"]
    state["control_model.input_hint_block.99.weight"] = np.zeros(3, np.float32)
    tiny.save_safetensors(tmp_path / "control.safetensors", state)
    with pytest.raises(LayoutMismatch) as caught:
        open_model(tmp_path / "control.safetensors")
    assert caught.value.missing == ("control_model.zero_convs.2.0.bias",)
    assert caught.value.unexpected == ("control_model.input_hint_block.99.weight",)


ADAPTERS = {
    "SD 1": {"hint_channels": 3, "channels": [4, 6, 8, 8], "downscale": 8, "halves": [1, 2, 3]},
    "SDXL, grey": {"hint_channels": 1, "channels": [4, 6, 8, 8], "downscale": 16, "halves": [2]},
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("spelling", ["compvis", "diffusers"])
def test_t2i_adapters(name, spelling, tmp_path):
    config = {**ADAPTERS[name], "layers": 2}
    native = tiny.arrays("t2i_adapter", config)
    state = tiny.published("t2i_adapter", config, native, spelling)
    source = tmp_path / "adapter.safetensors"
    tiny.save_safetensors(source, state)
    outs = {"maple": "maple", "diffusers": "diffusers", "compvis": "compvis.safetensors"}
    for to, out in outs.items():
        convert(source, tmp_path / out, to=to)
    for path in (source, *(tmp_path / out for out in outs.values())):
        with open_model(path) as model:
            part = model.components["t2i_adapter"]
            assert model.family == "t2i_adapter" and part.config == config
            found = {name: tensor.array for name, tensor in part.tensors()}
            assert tiny.same_bits({"x": found}, {"x": native})


def test_a_guidance_embedding_survives_every_layout(tmp_path):
    """An LCM's UNet: in CompVis files the embedding keeps diffusers' name."""
    changes = {"unet": {"time_cond_dim": 10}}
    tiny.save_safetensors(tmp_path / "lcm.safetensors", tiny.compvis(**changes))
    for to in ("maple", "diffusers"):
        convert(tmp_path / "lcm.safetensors", tmp_path / to, to=to)
        convert(tmp_path / to, tmp_path / f"{to}.safetensors", to="compvis")
        with open_model(tmp_path / to) as model:
            assert model.components["unet"].config["time_cond_dim"] == 10
        back = load_file(tmp_path / f"{to}.safetensors")
        name = "model.diffusion_model.time_embedding.cond_proj.weight"
        assert np.array_equal(back[name], load_file(tmp_path / "lcm.safetensors")[name])


@pytest.mark.parametrize(
    ("family", "channels", "found"),
    [
        ("sd1", 9, "sd1-inpainting"),
        ("sd1", 8, "sd1-pix2pix"),
        ("sd2", 9, "sd2-inpainting"),
        ("sd2", 5, "sd2-depth"),
        ("sdxl", 9, "sdxl-inpainting"),
        ("sdxl", 8, "sdxl-pix2pix"),
    ],
)
def test_more_input_channels_tell_what_a_model_is_for(
    family, channels, found, tmp_path, monkeypatch
):
    unet = {"in_channels": channels}
    if family == "sd1":
        state = tiny.compvis(unet=unet)
    else:
        changed = {**families.FAMILIES[family]}
        changed["unet"] = {**changed["unet"], **unet}
        monkeypatch.setitem(families.FAMILIES, family, changed)
        state = families.compvis(family)
    if channels == 5:  # Stability's file brings the network that estimates depth
        state["depth_model.model.pretrained.cls_token"] = np.zeros((1, 1, 8), np.float32)
    path = tmp_path / "model.safetensors"
    tiny.save_safetensors(path, state)
    for to in ("maple", "diffusers"):
        convert(path, tmp_path / to, to=to)
    for place in (path, tmp_path / "maple", tmp_path / "diffusers"):
        with open_model(place) as model:
            assert model.family == found
            assert model.components["unet"].config["in_channels"] == channels
            if place == path:
                assert any(f"takes {channels} channels" in line for line in model.evidence)
