"""The key tables against third parties' key lists, against themselves, and against real files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from maple_convert import open_model
from maple_convert.errors import LayoutMismatch
from maple_convert.layouts import LAYOUTS, NATIVE, View, files, taesd
from maple_convert.layouts.markdown import pages
from maple_convert.layouts.parts import AS_IS, OIHW_TO_OHWI, POINTWISE_TO_LINEAR
from maple_convert.readers import open_checkpoint
from maple_convert.tensors import TensorInfo

DOCS = Path(__file__).resolve().parents[2] / "docs" / "layouts"


def view(rows, prefix="", **changes):
    tensors = {prefix + r.published: TensorInfo("float32", r.published_shape) for r in rows}
    tensors.update(changes)
    return View(Path("x"), {k: v for k, v in tensors.items() if v is not None}, prefix)


# Published sizes


@pytest.mark.parametrize(
    "component, keys, parameters",
    [
        ("text_encoder", 196, 123_060_480),
        ("text_encoder_2", 517, 694_659_840),
        ("unet", 686, 859_520_964),
        ("vae", 248, 83_653_863),
        ("taesd", 134, 2_445_063),
        ("controlnet", 340, 361_279_120),
        ("t2i_adapter", 38, 77_369_280),
        ("image_encoder", 520, 632_076_800),
        ("ip_adapter", 83, 49_087_488),
    ],
)
def test_published_sizes(component, keys, parameters):
    layout = LAYOUTS[component]
    for spelling in (NATIVE, *layout.spellings):
        rows = layout.rows(layout.published_config, spelling)
        assert len(rows) == keys
        assert sum(math.prod(row.native_shape) for row in rows) == parameters
        shares = (math.prod(row.published_shape) // row.share[1] for row in rows)
        assert sum(shares) == parameters


@pytest.mark.weights
def test_every_name_of_a_third_partys_map(weights):
    """All 1,130 names of ``stable_diffusion_sd1.json``, from CompVis to diffusers and back."""
    oracle = json.loads((weights / "keymaps" / "stable_diffusion_sd1.json").read_text())
    expected = oracle["ldm_diffusers_keymap"]
    ours, shapes = {}, {}
    for name, (spelling, prefix) in tiny.COMPVIS.items():
        layout = LAYOUTS[name]
        theirs = "transformers" if name == "text_encoder" else "diffusers"
        short = {"text_encoder": "te", "unet": "unet", "vae": "vae"}[name]
        for one, other in zip(
            layout.rows(layout.published_config, spelling),
            layout.rows(layout.published_config, theirs),
            strict=True,
        ):
            assert one.native == other.native
            ours[prefix + one.published] = f"{short}_{other.published}"
            if one.published_shape != other.published_shape:
                shapes[prefix + one.published] = [
                    list(one.published_shape),
                    list(other.published_shape),
                ]
    assert ours == expected
    assert shapes == oracle["ldm_diffusers_shape_map"]


@pytest.mark.weights
@pytest.mark.parametrize("size", ["taesd", "taesdxl"])
def test_every_name_of_the_published_taesd(weights, size):
    found = {}
    for half in ("encoder", "decoder"):
        with open_checkpoint(weights / "taesd" / f"{size}_{half}.safetensors") as checkpoint:
            found |= {f"{half}.{key}": info.shape for key, info in checkpoint.tensors.items()}
    rows = LAYOUTS["taesd"].rows(taesd.PUBLISHED_CONFIG, "upstream")
    assert {row.published: row.published_shape for row in rows} == found


# The walk reads back what the places say

widths = st.lists(st.sampled_from([32, 64, 96, 320]), min_size=1, max_size=5)


@st.composite
def unets(draw):
    levels = draw(widths)
    return {
        "in_channels": draw(st.integers(1, 9)),
        "out_channels": draw(st.integers(1, 9)),
        "block_out_channels": levels,
        "layers_per_block": draw(st.integers(1, 4)),
        "transformer_layers": [draw(st.integers(0, 3)) for _ in levels],
        "mid_transformer_layers": draw(st.integers(1, 3)),
        "cross_attention_dim": draw(st.sampled_from([8, 128, 768])),
        **draw(st.sampled_from([{}, {"time_cond_dim": 6}])),
    }


@st.composite
def controlnets(draw):
    found = draw(unets())
    del found["out_channels"]
    found.pop("time_cond_dim", None)
    return {
        **found,
        "hint_channels": draw(st.integers(1, 5)),
        "hint_widths": draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)),
    }


@st.composite
def vaes(draw):
    return {
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 5)),
        "latent_channels": draw(st.integers(1, 16)),
        "block_out_channels": draw(widths),
        "layers_per_block": draw(st.integers(1, 4)),
    }


@st.composite
def encoders(draw):
    return {
        "vocab_size": draw(st.integers(2, 999)),
        "hidden_size": draw(st.sampled_from([8, 64, 128])),
        "intermediate_size": draw(st.integers(1, 99)),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "max_position_embeddings": draw(st.integers(1, 99)),
        "projection_dim": draw(st.none() | st.integers(1, 99)),
    }


def reads_back(component, config):
    layout = LAYOUTS[component]
    for spelling in layout.spellings:
        rows = layout.rows(config, spelling)
        assert layout.infer(view(rows), spelling) == config
        # What is found is what was meant, wherever it lies in a file.
        for where in files.WHERE:
            if where.component == component and where.spelling == spelling:
                for prefix in where.prefixes:
                    views = {p: view(rows, prefix) for p in files.PREFIXES if p != prefix}
                    views[prefix] = view(rows, prefix)
                    for p in views:
                        views[p] = View(Path("x"), _whole(rows, prefix), p)
                    assert [(w.component, w.spelling, p) for w, p in files.find(views)] == [
                        (component, spelling, prefix)
                    ]


def _whole(rows, prefix):
    return {prefix + r.published: TensorInfo("float32", r.published_shape) for r in rows}


@settings(max_examples=12, deadline=None)
@given(unets())
def test_unet_is_read_back(config):
    reads_back("unet", config)


@settings(max_examples=12, deadline=None)
@given(controlnets())
def test_controlnet_is_read_back(config):
    reads_back("controlnet", config)


@settings(max_examples=12, deadline=None)
@given(vaes())
def test_vae_is_read_back(config):
    reads_back("vae", config)


@settings(max_examples=12, deadline=None)
@given(encoders())
def test_text_encoder_is_read_back(config):
    reads_back("text_encoder", config)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 99))
def test_taesd_is_read_back(latent, width):
    reads_back("taesd", {"latent_channels": latent, "width": width})


def test_a_level_without_a_gap_counts_and_a_far_number_does_not():
    """``transformer_blocks.999999999`` must not make a table of a billion places."""
    rows = LAYOUTS["unet"].rows(tiny.CONFIGS["unet"], "compvis")
    far = "input_blocks.1.1.transformer_blocks.999999999.norm1.weight"
    found = LAYOUTS["unet"].infer(view(rows, **{far: TensorInfo("float32", (32,))}), "compvis")
    assert found["transformer_layers"] == [1, 2, 0]


def test_the_tensor_that_the_architecture_is_read_from_is_missed_by_name():
    rows = LAYOUTS["unet"].rows(tiny.CONFIGS["unet"], "compvis")
    prefix = "model.diffusion_model."
    lacking = view(rows, prefix, **{f"{prefix}input_blocks.0.0.weight": None})
    with pytest.raises(LayoutMismatch) as caught:
        LAYOUTS["unet"].infer(lacking, "compvis")
    assert caught.value.missing == ("model.diffusion_model.input_blocks.0.0.weight",)


# Transforms


@pytest.mark.parametrize("weights", [AS_IS, OIHW_TO_OHWI, POINTWISE_TO_LINEAR])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint16])
def test_transforms_are_exactly_inverse(weights, dtype):
    native = {OIHW_TO_OHWI: (5, 3, 2, 4), POINTWISE_TO_LINEAR: (5, 4)}.get(weights, (5, 4))
    count = math.prod(native)
    published = np.arange(count).astype(dtype).reshape(weights.published_shape(native))
    there = weights.to_native(published)
    assert there.shape == native
    assert np.array_equal(weights.to_published(there), published)


def test_convolution_layout_is_not_a_reshape():
    """Element (o, i, h, w) of the file is element (o, h, w, i) here."""
    published = np.arange(2 * 3 * 3 * 3).reshape(2, 3, 3, 3)  # square: shapes alone prove nothing
    native = OIHW_TO_OHWI.to_native(published)
    for o, i, h, w in np.ndindex(2, 3, 3, 3):
        assert native[o, h, w, i] == published[o, i, h, w]


# Native names


def test_native_names_are_diffusers_names_without_torchs_artefacts():
    for name in ("unet", "vae"):
        layout = LAYOUTS[name]
        for row in layout.rows(layout.published_config, "diffusers"):
            plain = row.published.replace(".to_out.0.", ".to_out.")
            plain = plain.replace(".ff.net.0.proj.", ".ff.proj_in.")
            assert row.native == plain.replace(".ff.net.2.", ".ff.proj_out.")


def test_ema_names_have_no_dots_and_do_not_collide():
    layout = LAYOUTS["unet"]
    rows = layout.rows(layout.published_config, "compvis")
    names = {files.ema_name(row) for row in rows}
    assert len(names) == len(rows)
    assert "model_ema.diffusion_modelinput_blocks00weight" in names
    assert all(name.count(".") == 1 for name in names)


def test_dropped_keys_are_exact_names_or_named_prefixes():
    assert files.dropped_reason("betas")
    assert files.dropped_reason("model_ema.diffusion_modelout2bias")
    assert files.dropped_reason("first_stage_model.loss.discriminator.main.0.weight")
    for stranger in ("betas2", "xmodel_ema.decay", "model.diffusion_model.betas", "optimizer"):
        assert files.dropped_reason(stranger) is None


# Pages


def test_pages_are_not_stale():
    """``python -m maple_convert.layouts docs/layouts`` writes them anew."""
    assert {path.name for path in DOCS.glob("*.md")} == set(pages())
    for name, text in pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"docs/layouts/{name} is stale"


# The trained model, published in two layouts


@pytest.mark.weights
def test_emoji_trial_is_the_same_in_both_layouts(weights):
    folder = weights / "emoji-trial"
    with (
        open_model(folder / "emoji-trial.ckpt") as ckpt,
        open_model(folder / "diffusers") as diffusers,
    ):
        one, other = tiny.everything(ckpt), tiny.everything(diffusers)
        assert ckpt.components["unet"].config == diffusers.components["unet"].config
        assert ckpt.components["unet"].config["block_out_channels"] == [64, 128, 64, 64]
        assert ckpt.components["text_encoder"].config["num_attention_heads"] == 2
        assert diffusers.components["text_encoder"].config["eos_token_id"] == 6544
        assert diffusers.tokenizer_files.keys() == {"vocab", "merges"}
        assert ckpt.defaults["width"] == diffusers.defaults["width"] == 128
    # The .ckpt has the whole vocabulary: its embedding table alone differs.
    table = "embeddings.token_embedding.weight"
    assert one["text_encoder"].pop(table).shape == (49408, 128)
    assert other["text_encoder"].pop(table).shape == (6545, 128)
    assert tiny.same_bits(one, other)


# Views of a file


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(st.text("ab.", min_size=1, max_size=6), max_size=8),
    prefix=st.sampled_from(["", "a.", "b.a", "ab."]),
    under=st.sampled_from(["", "a.", "a.b."]),
    place=st.text("ab.", max_size=5),
)
def test_what_a_view_finds_is_what_lies_below_it(names, prefix, under, place):
    """Against the sentence itself, name by name; views of one file share one sorted list."""
    tensors = {name: TensorInfo("float32", (n,)) for n, name in enumerate(names)}
    found = View(Path("x"), tensors).below(prefix, under)
    below = [under + name[len(prefix) :] for name in tensors if name.startswith(prefix)]
    assert list(found.tensors) == below
    assert [found.key(name) for name in below] == [n for n in tensors if n.startswith(prefix)]
    assert found.begins(place) == any(name.startswith(place) for name in below)
    assert found.holds(place) == any(name.startswith(place + ".") for name in below)
