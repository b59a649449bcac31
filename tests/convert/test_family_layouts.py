"""SD 2.x, SDXL, its refiner and distilled networks: told from their tensors, every bit kept."""

import json
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
from families import FAMILIES

from maple_convert import InvalidCheckpoint, LayoutMismatch, convert, inspect, open_model
from maple_convert.layouts import LAYOUTS, View
from maple_convert.readers import open_checkpoint
from maple_convert.tensors import TensorInfo


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def file(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / f"{family}.safetensors"
    return tiny.save_safetensors(path, families.compvis(family, np.float16))


def test_a_file_is_told_from_its_tensors(family, file):
    with open_model(file) as model:
        assert (model.family, model.layout) == (family, "compvis")
        assert {name: part.config for name, part in model.components.items()} == FAMILIES[family]
        assert model.prediction == ("unknown" if family == "sd2" else "epsilon")
        assert model.evidence
        assert tiny.same_bits(tiny.everything(model), families.native(family, np.float16))


def test_a_folder_is_told_from_its_tensors_and_configs(family, tmp_path):
    with open_model(families.save_diffusers(tmp_path / "folder", family)) as model:
        assert (model.family, model.layout) == (family, "diffusers")
        assert {name: part.config for name, part in model.components.items()} == FAMILIES[family]
        assert model.prediction == ("v_prediction" if family == "sd2" else "epsilon")
        assert tiny.same_bits(tiny.everything(model), families.native(family))


def test_round_trips_are_exact(family, file, tmp_path):
    """CompVis, maple, diffusers, maple and back: the same names and bits."""
    with open_checkpoint(file) as opened:
        original = {key: opened.read(key).array for key in opened.tensors}
    convert(file, tmp_path / "maple", digest=False)
    convert(tmp_path / "maple", tmp_path / "diffusers", to="diffusers")
    convert(tmp_path / "diffusers", tmp_path / "again", digest=False)
    for source in ("maple", "again", "diffusers"):
        out = tmp_path / f"{source}.safetensors"
        convert(tmp_path / source, out, to="compvis")
        with open_checkpoint(out) as opened:
            found = {key: opened.read(key).array for key in opened.tensors}
        assert tiny.same_bits({"": found}, {"": original}), source
    said = json.loads((tmp_path / "maple" / "config.json").read_text())
    assert said["family"] == family and said["components"] == FAMILIES[family]


def test_a_missing_key_is_no_other_family(family, file, tmp_path):
    state = families.compvis(family)
    lost = next(key for key in state if "output_blocks" in key and key.endswith("to_v.weight"))
    del state[lost]
    with pytest.raises(LayoutMismatch, match="1 missing"):
        open_model(tiny.save_safetensors(tmp_path / "x.safetensors", state))


def test_inspect_names_both_encoders(tmp_path):
    found = inspect(families.save_diffusers(tmp_path / "xl", "sdxl"))
    assert list(found["components"]) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert found["components"]["text_encoder_2"]["config"]["projection_dim"] == 40


@pytest.mark.parametrize("name", ["VEGA", "KOALA"])
def test_other_distilled_networks_are_read_from_their_names(name):
    config = getattr(families, name)
    for spelling in ("compvis_linear", "diffusers_linear"):
        rows = LAYOUTS["unet"].rows(config, spelling)
        tensors = {row.published: TensorInfo("float16", row.published_shape) for row in rows}
        found = LAYOUTS["unet"].infer(View(Path("x"), tensors), spelling)
        expected = {k: v for k, v in config.items() if k in found}
        assert found == expected and "up_transformer_layers" not in found


# SD 2.x


def test_the_last_layer_of_openclip_is_left_out(tmp_path):
    state = {**families.compvis("sd2"), **families.whole_openclip()}
    with open_model(tiny.save_safetensors(tmp_path / "x.safetensors", state)) as model:
        assert model.components["text_encoder"].config == FAMILIES["sd2"]["text_encoder"]
        left_out = [key for key, why in model.dropped.items() if "behind the layer" in why]
        assert "cond_stage_model.model.text_projection" in left_out
        assert all("resblocks.2." in key for key in left_out if "projection" not in key)
        native = families.native("sd2")["text_encoder"]
        assert tiny.same_bits({"": tiny.everything(model)["text_encoder"]}, {"": native})


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_queries_keys_and_values_are_in_openclips_order(order):
    """The control: rows in any other order are other numbers."""
    config = FAMILIES["sd2"]["text_encoder"]
    native = families.native("sd2")["text_encoder"]
    packed = tiny.published("text_encoder", config, native, "openclip")
    name = "transformer.resblocks.0.attn.in_proj_weight"
    layer = "encoder.layers.0.self_attn.{}_proj.weight"
    rows = [native[layer.format(letter)] for letter in "qkv"]
    assert np.array_equal(packed[name], np.concatenate(rows))
    assert not np.array_equal(packed[name], np.concatenate([rows[n] for n in order]))


def test_a_mark_says_what_sd2_predicts(tmp_path):
    state = {**families.compvis("sd2"), "v_pred": np.zeros(0, np.float32)}
    with open_model(tiny.save_safetensors(tmp_path / "x.safetensors", state)) as model:
        assert model.prediction == "v_prediction"
    path = tiny.save_safetensors(tmp_path / "y.safetensors", families.compvis("sd2"))
    with open_model(path, config={"prediction": "epsilon"}) as model:
        assert model.prediction == "epsilon"


@pytest.mark.weights
def test_every_name_of_a_third_partys_map_of_sd2(weights):
    """All names of ``stable_diffusion_sd2.json``, packed ones and shapes included."""
    oracle = json.loads((weights / "keymaps" / "stable_diffusion_sd2.json").read_text())
    expected = oracle["ldm_diffusers_keymap"]
    packed = {
        theirs: (operation["slice"][0], operation["slice"][1])
        for theirs, operation in oracle["diffusers_ldm_operator_map"].items()
    }
    text = {
        **LAYOUTS["text_encoder"].published_config,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
    }
    unet = {**LAYOUTS["unet"].published_config, "cross_attention_dim": 1024}
    configs = {"text_encoder": text, "unet": unet, "vae": LAYOUTS["vae"].published_config}
    short = {"text_encoder": "te", "unet": "unet", "vae": "vae"}
    ours, shapes, shares = {}, {}, {}
    for name, config in configs.items():
        spelling, prefix = families.spelling("sd2", name)
        theirs = {"text_encoder": "transformers", "unet": "diffusers_linear", "vae": "diffusers"}[
            name
        ]
        one, other = (LAYOUTS[name].rows(config, s) for s in (spelling, theirs))
        for a, b in zip(one, other, strict=True):
            there = f"{short[name]}_{b.published}"
            if a.share[1] == 1:
                ours[prefix + a.published] = there
                if a.published_shape != b.published_shape:
                    pair = [list(a.published_shape), list(b.published_shape)]
                    shapes[prefix + a.published] = pair
            else:
                start = a.share[0] * 1024
                end = "" if a.share[0] == 2 else start + 1024
                shares[there] = (prefix + a.published, f"{start}:{end}, :")
    assert ours == {key: name for key, name in expected.items() if key in ours}
    assert expected.keys() - ours.keys() <= {key for key, _ in packed.values()}
    assert shares == packed
    assert shapes == oracle["ldm_diffusers_shape_map"]


@pytest.mark.weights
def test_a_real_layer_of_openclip(weights):
    """Block 23 of the published SD 2 base file: its packed rows and its transposed projection."""
    prefix = "cond_stage_model.model."
    with open_checkpoint(weights / "keymaps" / "stable_diffusion_sd2_ldm_base.safetensors") as file:
        real = {k.removeprefix(prefix): file.read(k).array for k in file.tensors if prefix in k}
    config = {
        **LAYOUTS["text_encoder"].published_config,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "projection_dim": 1024,
    }
    rows = [r for r in LAYOUTS["text_encoder"].rows(config, "openclip") if r.published in real]
    assert {row.published for row in rows} == real.keys() - {"logit_scale"}
    for row in rows:
        array = real[row.published]
        assert array.shape == row.published_shape
        if row.share[1] == 1:
            assert row.weights.to_native(array).shape == row.native_shape
    projection = next(row for row in rows if row.native == "text_projection.weight")
    values = real["text_projection"]
    assert np.array_equal(projection.weights.to_native(values), values.T)
    assert not np.array_equal(values, values.T)


# SDXL


def test_sdxls_use(tmp_path):
    path = tiny.save_safetensors(tmp_path / "x.safetensors", families.compvis("sdxl"))
    with open_model(path) as model:
        vae = model.components["vae"].config
        assert vae["scaling_factor"] == 0.13025 and vae["force_upcast"]
        assert model.latent_rgb_factors is None and model.defaults["guidance_scale"] == 7


@pytest.mark.parametrize("stated, kept", [(True, True), (False, False), (None, True)])
def test_an_autoencoder_that_was_mended_says_so(tmp_path, stated, kept):
    folder = families.save_diffusers(tmp_path / "xl", "sdxl")
    tiny.edit_json(folder / "vae" / "config.json", force_upcast=... if stated is None else stated)
    with open_model(folder) as model:
        assert model.components["vae"].config.get("force_upcast", False) is kept


def test_sd1s_autoencoder_needs_no_float32(tmp_path):
    folder = tiny.save_diffusers(tmp_path / "sd1")
    tiny.edit_json(folder / "vae" / "config.json", force_upcast=True)
    with open_model(folder) as model:
        assert "force_upcast" not in model.components["vae"].config


def test_a_vector_of_another_text_encoder(tmp_path):
    state = families.compvis("sdxl")
    name = "model.diffusion_model.label_emb.0.0.weight"
    state[name] = np.ascontiguousarray(state[name][:, :-2])
    with pytest.raises(InvalidCheckpoint, match="takes a vector of 86"):
        open_model(tiny.save_safetensors(tmp_path / "x.safetensors", state))


@pytest.mark.parametrize("token, number", [("w0", 0), ("w119", None), ("strange", 0)])
def test_the_padding_is_the_tokenizers(tmp_path, token, number):
    folder = families.save_diffusers(tmp_path / "xl", "sdxl")
    for name in ("tokenizer", "tokenizer_2"):
        tiny.save_tokenizer(folder / name, families.TOKENS)
    tiny.write_json(
        folder / "tokenizer_2" / "special_tokens_map.json", {"pad_token": {"content": token}}
    )
    with open_model(folder) as model:
        assert model.components["text_encoder_2"].config.get("pad_token_id") == number
        assert "pad_token_id" not in model.components["text_encoder"].config


def test_the_refiners_words_are_the_seconds(tmp_path):
    folder = families.save_diffusers(tmp_path / "refiner", "sdxl-refiner")
    tiny.save_tokenizer(folder / "tokenizer_2", families.TOKENS)
    with open_model(folder) as model:
        assert model.tokenizer_files["vocab"] == folder / "tokenizer_2" / "vocab.json"


# Distilled networks


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reverse_transformer_layers_per_block": None}, "reverse_transformer_layers_per_block"),
        ({"reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 1]}, "reverse"),
        ({"transformer_layers_per_block": [1, [2, 2], [4, 4]]}, "transformer_layers_per_block"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"use_linear_projection": False}, "use_linear_projection"),
        ({"projection_class_embeddings_input_dim": 2816}, "projection_class_embeddings_input_dim"),
    ],
)
def test_configs_that_say_otherwise(tmp_path, changes, words):
    folder = families.save_diffusers(tmp_path / "f", "sdxl-distilled", **changes)
    with pytest.raises(InvalidCheckpoint, match=words):
        open_model(folder)


def test_the_published_way_of_stating_depths(tmp_path):
    """SSD-1B's folder states a list for each block on both ways, and 1 where there are none."""
    folder = families.save_diffusers(
        tmp_path / "f",
        "sdxl-distilled",
        transformer_layers_per_block=[1, [2, 2], [3, 3]],
        reverse_transformer_layers_per_block=[[3, 3, 5], [2, 1, 1], 1],
    )
    with open_model(folder) as model:
        config = model.components["unet"].config
        assert config["up_transformer_layers"] == [3, 3, 5, 2, 1, 1, 0, 0, 0]
