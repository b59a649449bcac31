"""LoRA files of every dialect: which layer each tensor means, and what is said of those without."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maple_convert import inspect
from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint
from maple_convert.layouts.lora import PREFIXES, ROLES, Names
from maple_convert.lora import open_lora

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "convert"))
from dialects import (
    ALPHA,
    CONFIGS,
    DIALECTS,
    RANK,
    TEXT,
    UNET,
    difference,
    factors,
    names,
    text_attention,
    unet_attention,
    written,
)
from torch_files import write_torch_zip

SDXL = {
    **UNET,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 2,
    "transformer_layers": [0, 2, 3],
    "mid_transformer_layers": 3,
    "cross_attention_dim": 20,
    "num_attention_heads": [1, 2, 2],
}


@pytest.fixture
def saved(tmp_path):
    def save(tensors, metadata=None, name="style.safetensors"):
        arrays = {key: np.asarray(value, order="C") for key, value in tensors.items()}
        save_file(arrays, tmp_path / name, metadata)
        return tmp_path / name

    return save


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(saved, dialect):
    """The same factors under each program's names are the same differences to the same weights."""
    found = open_lora(saved(*written(dialect)), CONFIGS)
    assert not found.unmatched
    wanted = [("unet", n) for n in unet_attention()] + [
        ("text_encoder", n) for n in text_attention()
    ]
    assert found.modules == len(wanted)
    for component, native in wanted:
        update = found.updates[component][f"{native}.weight"]
        expected = difference(component, native)
        assert np.allclose(update.difference(), expected, atol=1e-5), native


def test_a_bare_list_goes_by_the_order_of_its_layers(tmp_path):
    for component, order in (("unet", unet_attention()), ("text_encoder", text_attention())):
        pairs = [factors(component, native) for native in order]
        write_torch_zip(tmp_path / "list.pt", [part for down, up in pairs for part in (up, down)])
        found = open_lora(tmp_path / "list.pt", CONFIGS)
        assert set(found.updates) == {component} and not found.unmatched
        for native in order:
            made = found.updates[component][f"{native}.weight"].difference()
            assert np.allclose(made, difference(component, native), atol=1e-5)


def test_a_bare_list_is_named_where_a_model_was_wanted(tmp_path):
    pairs = [factors("unet", native) for native in unet_attention()]
    write_torch_zip(tmp_path / "list.pt", [part for down, up in pairs for part in (up, down)])
    with pytest.raises(UnsupportedCheckpoint, match="this is a LoRA without names"):
        inspect(tmp_path / "list.pt")
    write_torch_zip(tmp_path / "other.pt", [np.ones((3, 4), "f4"), np.ones((3, 4), "f4")])
    with pytest.raises(UnsupportedCheckpoint, match="no Stable Diffusion component"):
        inspect(tmp_path / "other.pt")


def test_an_order_of_another_length_is_not_guessed(tmp_path):
    pairs = [factors("unet", native) for native in unet_attention()[:-1]]
    write_torch_zip(tmp_path / "list.pt", [part for down, up in pairs for part in (up, down)])
    with pytest.raises(UnsupportedCheckpoint, match="fits no layer of this model"):
        open_lora(tmp_path / "list.pt", CONFIGS)


@pytest.mark.parametrize("spelling", ["diffusers", "compvis"])
@pytest.mark.parametrize("config", [UNET, SDXL], ids=["sd1", "sdxl"])
def test_underscores_are_never_ambiguous(config, spelling):
    """Every layer of a UNet is found by its name with underscores, and no two have one name."""
    table = Names({"unet": config})
    own = names("unet", spelling, {"unet": config})
    under = {native: "lora_unet_" + name.replace(".", "_") for native, (name, _) in own.items()}
    assert len(set(under.values())) == len(own)
    for native, name in under.items():
        module = table.find(name)
        assert module is not None and module.native == native, name


def test_no_name_of_one_spelling_is_another_layers_in_another():
    for config in (UNET, SDXL):
        meant = {}
        for spelling in ("diffusers", "compvis"):
            for native, (name, _) in names("unet", spelling, {"unet": config}).items():
                for form in (name, name.replace(".", "_")):
                    assert meant.setdefault(form, native) == native


TWO = {**CONFIGS, "text_encoder_2": {**TEXT, "hidden_size": 16, "projection_dim": 16}}


def test_sdxls_second_encoder_has_names_of_its_own():
    table = Names(TWO)
    for prefix, component in (("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
        module = table.find(prefix + "text_model_encoder_layers_1_mlp_fc2")
        assert module is not None
        assert (module.component, module.native) == (component, "encoder.layers.1.mlp.fc2")


def test_rows_that_openclip_keeps_together_are_taken_apart(saved):
    """One difference of queries, keys and values, one under the other, is three."""
    generator = np.random.default_rng(5)
    down = generator.standard_normal((2, 16)).astype(np.float32)
    up = generator.standard_normal((48, 2)).astype(np.float32)
    bias = generator.standard_normal(48).astype(np.float32)
    name = "lora_te2_transformer_resblocks_1_attn_in_proj"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    found = open_lora(saved({**tensors, f"{name}.diff_b": bias}), TWO)
    assert found.modules == 1
    for n, layer in enumerate(("q_proj", "k_proj", "v_proj")):
        update = found.updates["text_encoder_2"][f"encoder.layers.1.self_attn.{layer}.weight"]
        mine = slice(16 * n, 16 * n + 16)
        assert np.allclose(update.difference(), up[mine] @ down, atol=1e-5)
        update = found.updates["text_encoder_2"][f"encoder.layers.1.self_attn.{layer}.bias"]
        assert np.array_equal(update.changed(np.zeros(16, np.float32), 1.0), bias[mine])


def test_every_prefix_is_of_a_network():
    assert {component for _, component in PREFIXES} == {"unet", "text_encoder", "text_encoder_2"}


# Scales ---------------------------------------------------------------------------------------


def one_layer(native="mid_block.attentions.0.transformer_blocks.0.attn2.to_k"):
    down, up = factors("unet", native)
    name = "lora_unet_" + names("unet", "diffusers")[native][0].replace(".", "_")
    return name, native, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


@pytest.mark.parametrize(
    ("alpha", "scale"), [(None, 1.0), (ALPHA, ALPHA / RANK), (0.5, 0.25)], ids=["none", "3", "half"]
)
def test_the_scale_is_alpha_over_rank_and_one_without(saved, alpha, scale):
    name, native, tensors = one_layer()
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    found = open_lora(saved(tensors), CONFIGS)
    made = found.updates["unet"][f"{native}.weight"].difference()
    assert np.allclose(made, scale * difference("unet", native), atol=1e-5)


def test_each_layer_has_an_alpha_of_its_own(saved):
    tensors = {}
    layers = unet_attention()[:3]
    for n, native in enumerate(layers):
        name, _, some = one_layer(native)
        tensors |= {**some, f"{name}.alpha": np.array(n + 1.0, np.float32)}
    found = open_lora(saved(tensors), CONFIGS)
    for n, native in enumerate(layers):
        made = found.updates["unet"][f"{native}.weight"].difference()
        assert np.allclose(made, (n + 1) / RANK * difference("unet", native), atol=1e-5)


def test_pefts_settings_lie_in_metadata_or_beside_the_file(saved, tmp_path):
    native = unet_attention()[1]
    down, up = factors("unet", native)
    name = names("unet", "diffusers")[native][0]
    ends = {".lora_A.weight": down, ".lora_B.weight": up}
    meta = (
        '{"unet.lora_alpha": 8, "unet.r": 2, "unet.use_rslora": true,'
        f' "unet.alpha_pattern": {{"{name}": 6}}}}'
    )
    in_metadata = saved(
        {f"unet.{name}{end}": value for end, value in ends.items()}, {"lora_adapter_metadata": meta}
    )
    made = open_lora(in_metadata, CONFIGS).updates["unet"][f"{native}.weight"].difference()
    assert np.allclose(made, 6 / np.sqrt(2) * difference("unet", native), atol=1e-4)

    beside = {f"base_model.model.{name}{end}": value for end, value in ends.items()}
    path = saved(beside, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    made = open_lora(path, CONFIGS).updates["unet"][f"{native}.weight"].difference()
    assert np.allclose(made, 8 / 2 * difference("unet", native), atol=1e-4)


@pytest.mark.parametrize("ending", ["", ".weight", ".default.weight"])
def test_pefts_lengths_are_doras(saved, ending):
    native = "mid_block.resnets.0.conv1"
    name, shape = names("unet", "diffusers")[native]
    down, up = factors("unet", native)
    lengths = np.linspace(1, 2, shape[0], dtype=np.float32)
    start = f"unet.{name}"
    tensors = {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    told = {f"{start}.lora_magnitude_vector{ending}": lengths.reshape(1, -1, 1, 1)}
    made = open_lora(saved({**tensors, **told}), CONFIGS).updates["unet"][f"{native}.weight"]
    after = made.changed(np.ones((shape[0], 3, 3, shape[1]), np.float32), 1.0)
    assert np.allclose(np.sqrt((after**2).sum((1, 2, 3))), lengths, atol=1e-5)


# What does not fit ----------------------------------------------------------------------------


def test_layers_that_the_model_lacks_are_listed_with_the_reason(saved):
    name, _, tensors = one_layer()
    other = name.replace("mid_block", "mud_block")
    wide = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors |= {
        f"{other}.lora_down.weight": np.ones((2, 12), np.float32),
        f"{other}.lora_up.weight": np.ones((16, 2), np.float32),
        f"{wide}.lora_down.weight": np.ones((2, 99), np.float32),
        f"{wide}.lora_up.weight": np.ones((16, 2), np.float32),
    }
    found = open_lora(saved(tensors), CONFIGS)
    assert found.modules == 1
    assert found.unmatched[other] == "the model has no such layer"
    assert "(2, 99)" in found.unmatched[wide] and "(16, 16)" in found.unmatched[wide]


@pytest.mark.parametrize(
    ("width", "family"),
    [
        (768, "Stable Diffusion 1"),
        (1024, "Stable Diffusion 2"),
        (1280, "the refiner of SDXL"),
        (2048, "SDXL"),
    ],
)
def test_a_foreign_familys_lora_says_whose_it_is(saved, width, family):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": np.ones((4, width), np.float32),
        f"{name}.lora_up.weight": np.ones((320, 4), np.float32),
    }
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_lora(saved(tensors), CONFIGS)
    assert f"is for {family} (its text {width} wide)" in str(caught.value)
    assert "this model is a model of a text 12 wide" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (2, 9)}, "is for Flux"),
        ({"emb_params": (2, 12)}, "is a textual inversion and no LoRA: load it with --embedding"),
        (
            {"model.diffusion_model.out.2.weight": (4, 8, 3, 3)},
            "is a whole model and no LoRA: load it with --model",
        ),
        ({"fc.weight": (3, 3, 3)}, "no tensor of it has a LoRA's name, the first are fc.weight"),
        ({"lora_unet_conv_in.oft_blocks": (2, 2, 2)}, "is OFT, which is not read here"),
        ({"lora_unet_x.lora_down.weight": (2, 2)}, "fits no layer of this model: lora_unet_x"),
    ],
    ids=["flux", "embedding", "model", "other", "oft", "unknown"],
)
def test_what_is_no_lora_for_this_model_is_named(saved, tensors, reason):
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_lora(saved({k: np.ones(s, np.float32) for k, s in tensors.items()}), CONFIGS)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_values_that_are_no_numbers_are_refused(saved):
    name, _, tensors = one_layer()
    tensors[f"{name}.lora_up.weight"][3, 1] = np.nan
    with pytest.raises(InvalidCheckpoint, match="holds NaN or infinite values"):
        open_lora(saved(tensors), CONFIGS)
    name, _, tensors = one_layer()
    tensors[f"{name}.lora_up.weight"] = np.ones((16, 2), np.int32)
    with pytest.raises(InvalidCheckpoint, match="is int32, not a weight"):
        open_lora(saved(tensors), CONFIGS)
    name, _, tensors = one_layer()
    tensors[f"{name}.alpha"] = np.ones(3, np.float32)
    with pytest.raises(InvalidCheckpoint, match="alpha that is no number"):
        open_lora(saved(tensors), CONFIGS)


def test_words_that_come_with_a_lora_are_found(saved):
    _, _, tensors = one_layer()
    tensors |= {
        "<s1>": np.ones(12, np.float32),
        "bundle_emb.cat.emb_params": np.ones((2, 12), "f4"),
    }
    found = open_lora(saved(tensors, {"<s1>": "<embed>"}), CONFIGS)
    assert {name: next(iter(v.values())).shape for name, v in found.vectors.items()} == {
        "<s1>": (12,),
        "cat": (2, 12),
    }


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_shapes_only_our_errors_come_out(saved, seed):
    """Roles taken away, mixed up and bent: every update that is left can be computed."""
    generator = np.random.default_rng(seed)
    tensors, _ = written("kohya" if seed % 2 else "diffusers PEFT")
    keys, roles = list(tensors), list(ROLES)
    for _ in range(20):
        key = keys[generator.integers(len(keys))]
        match generator.integers(5):
            case 0:
                tensors.pop(key, None)
            case 1:
                shape = generator.integers(0, 20, generator.integers(0, 5))
                tensors[key] = np.ones(shape, np.float32)
            case 2:
                tensors[key] = np.atleast_1d(tensors.get(key, np.ones((2, 3), "f4"))).T[:2]
            case 3:
                tensors[key.partition(".lora")[0] + roles[generator.integers(len(roles))]] = (
                    np.ones(generator.integers(1, 17, generator.integers(0, 5)), np.float32)
                )
            case _:
                tensors["".join(map(chr, generator.integers(32, 99, 9)))] = np.ones(2, np.float32)
    try:
        found = open_lora(saved(tensors), CONFIGS)
    except (InvalidCheckpoint, UnsupportedCheckpoint) as error:
        assert "\n" not in str(error)
        return
    for updates in found.updates.values():
        for update in updates.values():
            values = np.ones(update.row.native_shape, np.float32)
            assert update.changed(values, 0.5).shape == update.row.native_shape


# Real files -----------------------------------------------------------------------------------

SD1 = {
    "unet": {
        **UNET,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "transformer_layers": [1, 1, 1, 0],
        "cross_attention_dim": 768,
        "num_attention_heads": [8] * 4,
    },
    "text_encoder": {
        **TEXT,
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
    },
}
SD2 = {
    "unet": {**SD1["unet"], "cross_attention_dim": 1024},
    "text_encoder": {
        **SD1["text_encoder"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
    },
}


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "configs", "modules"),
    [
        ("catundchat_pytorch_lora_weights.safetensors", SD1, {"unet": 128}),
        ("catundchat_pytorch_lora_weights.bin", SD1, {"unet": 128}),
        ("cloneofsimo_analog_svd_rank4.safetensors", SD1, {"unet": 144, "text_encoder": 48}),
        ("cloneofsimo_lora_disney.safetensors", SD1, {"unet": 144, "text_encoder": 48}),
        ("lycoris_smart_falcon_4_lokr.safetensors", SD1, {"unet": 278, "text_encoder": 72}),
        ("cloneofsimo_lora_disney.unet.pt", SD2, {"unet": 128}),
        ("cloneofsimo_lora_kiriko.text_encoder.pt", SD2, {"text_encoder": 92}),
    ],
)
def test_a_real_file_matches_in_every_layer(weights, name, configs, modules):
    found = open_lora(weights / "lora" / name, configs)
    assert not found.unmatched
    assert {part: len(updates) for part, updates in found.updates.items()} == modules
    other = SD2 if configs is SD1 else SD1
    theirs = "Stable Diffusion 1" if configs is SD1 else "Stable Diffusion 2"
    with pytest.raises(UnsupportedCheckpoint, match=f"is for {theirs}"):
        open_lora(weights / "lora" / name, other)


@pytest.mark.weights
def test_a_real_files_numbers_mean_these_layers(weights):
    """By number: attention to itself, the feed-forward's gate, attention to the text; k, v, q."""
    path = weights / "lora" / "cloneofsimo_analog_svd_rank4.safetensors"
    raw, found = load_file(path), open_lora(path, SD1)
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    last = "mid_block.attentions.0.transformer_blocks.0"
    for place, native in {
        "unet:0": f"{first}.attn1.to_q",
        "unet:4": f"{first}.ff.proj_in",
        "unet:6": f"{first}.attn2.to_k",
        "unet:143": f"{last}.attn2.to_out",
        "text_encoder:0": "encoder.layers.0.self_attn.k_proj",
        "text_encoder:2": "encoder.layers.0.self_attn.q_proj",
        "text_encoder:47": "encoder.layers.11.self_attn.out_proj",
    }.items():
        expected = raw[f"{place}:up"].astype(float) @ raw[f"{place}:down"].astype(float)
        update = found.updates[place.partition(":")[0]][f"{native}.weight"]
        assert np.allclose(update.difference(), expected, atol=1e-6), place
        assert np.abs(expected).max() > 1e-4
