"""What files are taken for, by which evidence, and what is said of those that cannot be used."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tiny

from maple_convert import (
    InvalidCheckpoint,
    LayoutMismatch,
    UnreadableFile,
    UnsupportedCheckpoint,
    inspect,
    open_file,
    open_model,
)
from maple_convert.detect import FAMILIES, Facts, UNetFacts, identify
from maple_convert.model import WrongUse
from maple_convert.tensors import TensorInfo

f32 = np.float32


def zeros(*shape):
    return np.zeros(shape, f32)


@pytest.fixture
def save(tmp_path):
    def write(state, name="model.safetensors"):
        return tiny.save_safetensors(tmp_path / name, state)

    return write


def reason(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


# Families


def facts_of(family):
    facts = Facts("x", text=set(family.text))
    facts.unet = UNetFacts(
        channels=family.channels,
        context=128,
        projections=family.projections,
        label=family.label,
        levels=family.levels or 4,
        first_attends=bool(family.first_attends) or family.first_attends is None,
        middle_attends=family.middle_attends,
    )
    return facts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_exactly_one_family_fits_its_own_facts(family):
    fitting = [other.name for other in FAMILIES if other.fits(facts_of(family))]
    assert fitting == [family.name]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_that_cannot_be_used_are_refused_by_name(family):
    if not family.refusal:
        assert identify(facts_of(family)) == (family.name, family.title)
        return
    with pytest.raises(UnsupportedCheckpoint) as caught:
        identify(facts_of(family))
    assert family.title in reason(caught) and family.refusal in reason(caught)


def unet_of(family):
    """The few keys of a UNet from which its family is told, in CompVis names."""
    base = "model.diffusion_model."
    conv = family.projections == "convolution"
    inner = (32, 32, 1, 1) if conv else (32, 32)
    levels = family.levels or 4
    state = {f"{base}input_blocks.0.0.weight": zeros(32, family.channels, 3, 3)}
    block = 1
    for level in range(levels):
        state[f"{base}input_blocks.{block}.0.in_layers.0.weight"] = zeros(32)
        if level or family.first_attends is not False:
            place = f"{base}input_blocks.{block}.1"
            state[f"{place}.proj_in.weight"] = zeros(*inner)
            state[f"{place}.transformer_blocks.0.attn2.to_k.weight"] = zeros(32, 48)
        block += 1
        if level < levels - 1:
            state[f"{base}input_blocks.{block}.0.op.weight"] = zeros(32, 32, 3, 3)
            block += 1
    if family.middle_attends:
        state[f"{base}middle_block.1.transformer_blocks.0.norm1.weight"] = zeros(32)
    if family.label == "vector":
        state[f"{base}label_emb.0.0.weight"] = zeros(128, 48)
    if family.label == "classes":
        state[f"{base}label_emb.weight"] = zeros(10, 128)
    return state


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.refusal], ids=lambda family: family.name
)
def test_files_of_other_families_are_refused_by_name(family, save):
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_model(save(unet_of(family)))
    assert family.title in reason(caught)


def test_sd1_file_with_its_evidence(save):
    with open_model(save(tiny.compvis())) as model:
        assert (model.family, model.layout, model.prediction) == ("sd1", "compvis", "epsilon")
        assert list(model.components) == ["text_encoder", "unet", "vae"]
        evidence = "\n".join(model.evidence)
        assert "input_blocks.0.0.weight takes 4 channels" in evidence
        assert "proj_in.weight has 4 axes: convolution" in evidence
        assert "attn2.to_k.weight is 64 wide: a narrow model" in evidence
        assert model.components["unet"].config == tiny.CONFIGS["unet"]
        assert model.components["vae"].config == tiny.CONFIGS["vae"]
        assert model.components["text_encoder"].config == tiny.CONFIGS["text_encoder"]
        assert any("heads: 8" in note for note in model.notes)
        assert model.defaults["width"] == 128 and not model.has_ema
        assert model.latent_rgb_factors is None


def test_a_narrow_linear_unet_is_not_sd1(save):
    """A context of 64 is told from SD 2 by the projections alone; the same keys, one axis fewer."""
    state = tiny.compvis()
    for key in list(state):
        if key.startswith(tiny.UNET) and key.endswith(("proj_in.weight", "proj_out.weight")):
            state[key] = state[key].reshape(state[key].shape[:2])
    with open_model(save(state)) as model:
        assert (model.family, model.prediction) == ("sd2", "unknown")
        assert model.components["unet"].config["num_attention_heads"] == [1, 1, 1]


def test_sd1_unet_beside_openclip_is_no_family(save):
    state = tiny.compvis()
    for key in [key for key in state if key.startswith(tiny.TEXT)]:
        del state[key]
    state["cond_stage_model.model.ln_final.weight"] = zeros(64)
    with pytest.raises(UnsupportedCheckpoint, match="no known family fits") as caught:
        open_model(save(state))
    assert "OpenCLIP" in reason(caught)


def test_sdxl_conditioner_alone_is_named(save):
    state = {"conditioner.embedders.1.model.ln_final.weight": zeros(64)}
    with pytest.raises(UnsupportedCheckpoint, match="OpenCLIP"):
        open_model(save(state))


@pytest.mark.parametrize("width", [1024, 1280])
def test_openclip_in_hugging_face_names_is_told_by_its_width(width, save):
    """No UNet of SD 1.x reads it."""
    state = tiny.published(
        "text_encoder",
        config := {**tiny.CONFIGS["text_encoder"], "hidden_size": width, "vocab_size": 3},
        tiny.arrays("text_encoder", config, np.float16),
        "transformers",
    )
    whole = {**tiny.compvis(), **{tiny.TEXT + key: value for key, value in state.items()}}
    with pytest.raises(UnsupportedCheckpoint, match=r"no known family fits.*OpenCLIP"):
        open_model(save(whole))


def test_text_encoder_and_unet_of_two_models(save):
    state = tiny.compvis(text_encoder={"hidden_size": 128})
    with pytest.raises(InvalidCheckpoint, match="two models in one: the text encoder is 128 wide"):
        open_model(save(state))


def test_vae_and_unet_of_two_models(save):
    with pytest.raises(InvalidCheckpoint, match="autoencoder has 16 latent channels"):
        open_model(save(tiny.compvis(vae={"latent_channels": 16})))


# Other things that people keep in such files

OTHERS = {
    "LoRA": [
        {"lora_unet_down_blocks_0_x.lora_down.weight": zeros(4, 8)},
        {"unet.down_blocks.0.attentions.0.to_k.lora_A.weight": zeros(4, 8)},
        {"down_blocks.0.attentions.0.attn1.processor.to_k_lora.down.weight": zeros(4, 8)},
        {"unet:121:down": zeros(4, 8), "unet:121:up": zeros(8, 4)},
        {"lora_unet_x.lokr_w1": zeros(2, 2)},
        {"lora_unet_x.hada_w1_a": zeros(2, 2)},
    ],
    "textual inversion": [
        {"emb_params": zeros(2, 768)},
        {"string_to_param.*": zeros(1, 768)},
        {"<cat-toy>": zeros(768)},
    ],
    "ControlNet": [
        {"difference.input_blocks.0.0.weight": zeros(32, 4, 3, 3)},
        {"lora_controlnet": zeros(1), "lora_controlnet.x": zeros(1)},
        {"lllite_unet_input_blocks_4_1_attn1_to_q.up.weight": zeros(8, 4)},
    ],
    "vision model": [{"vision_tower.blocks.0.norm.weight": zeros(768)}],
    "Stable Diffusion 3": [{"model.diffusion_model.joint_blocks.0.x": zeros(4)}],
    "Flux": [{"double_blocks.0.img_attn.qkv.weight": zeros(4)}],
    "codebook": [{"first_stage_model.quantize.embedding.weight": zeros(4, 4)}],
}


@pytest.mark.parametrize(
    "name, state", [(name, state) for name, states in OTHERS.items() for state in states]
)
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_other_things_are_refused_by_name(name, state, beside_a_model, save):
    whole = {**tiny.compvis(), **state} if beside_a_model else state
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_model(save(whole))
    assert name in reason(caught)


@pytest.mark.weights
@pytest.mark.parametrize(
    "file, words",
    [
        ("lora/catundchat_pytorch_lora_weights.safetensors", "LoRA"),
        ("lora/catundchat_pytorch_lora_weights.bin", "LoRA"),
        ("lora/cloneofsimo_analog_svd_rank4.safetensors", "LoRA"),
        ("lora/cloneofsimo_lora_disney.safetensors", "LoRA"),
        ("lora/lycoris_smart_falcon_4_lokr.safetensors", "LoRA"),
        ("textual_inversion/bad-artist.pt", "textual inversion"),
        ("textual_inversion/bad-prompt.pt", "textual inversion"),
        ("textual_inversion/bad-hands-5.pt", "textual inversion"),
        ("textual_inversion/fastai_learned_embeds.bin", "textual inversion"),
        ("textual_inversion/cloneofsimo_lora_kiriko2.ti.pt", "textual inversion"),
        ("keymaps/stable_diffusion_sd2_ldm_base.safetensors", "OpenCLIP"),
        ("checkpoints/mtcnn/pnet.pt", "no Stable Diffusion component"),
        ("checkpoints/lpips/v0.1/alex.pth", "no Stable Diffusion component"),
        ("checkpoints/pl_contactpoint__ckpt_epoch_1.ckpt", "no Stable Diffusion component"),
        ("checkpoints/aesthetic_fantasy.pt", ""),
        ("taesd/taesana_encoder.pth", ""),
    ],
)
def test_real_files_that_are_no_model(weights, file, words):
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_model(weights / file)
    assert words in reason(caught)


def test_a_file_without_tensors(save):
    with pytest.raises(UnsupportedCheckpoint, match="holds no tensors"):
        open_model(save({}))


# One component alone


def part(component, spelling, prefix="", **changes):
    config = {**tiny.CONFIGS[component], **changes}
    return tiny.published(component, config, tiny.arrays(component, config), spelling, prefix)


@pytest.mark.parametrize(
    "component, spelling, prefix, family",
    [
        ("unet", "compvis", "model.diffusion_model.", "sd1"),
        ("unet", "compvis", "", "sd1"),
        ("unet", "diffusers", "", "sd1"),
        ("vae", "compvis", "first_stage_model.", "vae"),
        ("vae", "compvis", "vae.", "vae"),
        ("vae", "compvis", "", "vae"),
        ("vae", "diffusers", "", "vae"),
        ("vae", "diffusers_2022", "", "vae"),
        ("text_encoder", "transformers", "cond_stage_model.transformer.", "text_encoder"),
        ("text_encoder", "transformers", "", "text_encoder"),
        ("text_encoder", "transformers_flat", "", "text_encoder"),
        ("text_encoder", "transformers_flat", "cond_stage_model.transformer.", "text_encoder"),
    ],
)
def test_a_component_alone(component, spelling, prefix, family, save):
    with open_model(save(part(component, spelling, prefix))) as model:
        assert model.family == family
        assert list(model.components) == [component]
        assert tiny.same_bits(
            tiny.everything(model), {component: tiny.arrays(component, tiny.CONFIGS[component])}
        )


def test_projected_text_encoder(save):
    state = part("text_encoder", "transformers", projection_dim=24)
    with open_model(save(state)) as model:
        assert model.components["text_encoder"].config["projection_dim"] == 24


def test_a_vae_alone_says_what_it_cannot_say(save):
    with open_model(save(part("vae", "compvis"))) as model:
        assert any("scaling factor: 0.18215" in note for note in model.notes)
        assert model.latent_rgb_factors is None


@pytest.mark.parametrize("spelling, first", [("upstream", "1"), ("upstream_from_0", "0")])
@pytest.mark.parametrize("asked", ["encoder", "decoder"])
def test_taesd_in_two_files(spelling, first, asked, tmp_path):
    native = tiny.arrays("taesd", tiny.TAESD)
    state = tiny.published("taesd", tiny.TAESD, native, spelling)
    for half in ("encoder", "decoder"):
        mine = {k[8:]: v for k, v in state.items() if k.startswith(half)}
        assert half == "encoder" or f"{first}.weight" in mine
        tiny.save_safetensors(tmp_path / f"my_{half}.safetensors", mine)
    with open_model(tmp_path / f"my_{asked}.safetensors") as model:
        assert model.family == "taesd" and len(model.files) == 2
        assert tiny.same_bits(tiny.everything(model), {"taesd": native})
    (tmp_path / "my_decoder.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=r"decoder \(my_decoder.safetensors\) must"):
        open_model(tmp_path / "my_encoder.safetensors")


@pytest.mark.parametrize("spelling", ["upstream", "upstream_from_0", "diffusers"])
def test_taesd_in_one_file(spelling, save):
    native = tiny.arrays("taesd", tiny.TAESD)
    with open_model(save(tiny.published("taesd", tiny.TAESD, native, spelling))) as model:
        assert model.family == "taesd"
        assert tiny.same_bits(tiny.everything(model), {"taesd": native})


@pytest.mark.weights
@pytest.mark.parametrize("half", ["taesd_encoder", "taesdxl_decoder"])
def test_published_taesd_opens(weights, half):
    with open_model(weights / "taesd" / f"{half}.safetensors") as model:
        part = model.components["taesd"]
        assert part.config == {"latent_channels": 4, "width": 64}
        assert part.parameters == 2_445_063 and part.dtypes == {"bfloat16": 2_445_063}


# Strictness


def mismatch(path, **keywords):
    with pytest.raises(LayoutMismatch) as caught:
        open_model(path, **keywords)
    reason(caught)
    return caught.value


def test_missing_unexpected_and_misshapen_keys_are_listed(save):
    state = tiny.compvis()
    gone = [f"{tiny.UNET}output_blocks.1.0.in_layers.2.bias", f"{tiny.VAE}encoder.norm_out.bias"]
    for key in gone:
        del state[key]
    state[f"{tiny.UNET}input_blocks.1.0.in_layers.9.weight"] = zeros(1)
    state["model.strange"] = zeros(1)
    state[f"{tiny.VAE}encoder.conv_out.weight"] = zeros(8, 64, 3, 1)
    error = mismatch(save(state))
    assert set(error.missing) == set(gone)
    assert set(error.unexpected) == {
        f"{tiny.UNET}input_blocks.1.0.in_layers.9.weight",
        "model.strange",
    }
    assert error.misshapen == (
        (f"{tiny.VAE}encoder.conv_out.weight", (8, 64, 3, 1), (8, 64, 3, 3)),
    )


@pytest.mark.parametrize(
    "key, at",
    [
        (f"{tiny.UNET}input_blocks.1.1.proj_in.weight", (32, 32)),
        (f"{tiny.UNET}input_blocks.2.0.op.weight", (32, 3, 3, 32)),
        (f"{tiny.VAE}decoder.mid.attn_1.q.weight", (64, 64)),
        (f"{tiny.TEXT}text_model.encoder.layers.0.mlp.fc2.weight", (96, 64)),
    ],
)
def test_other_layouts_of_one_weight_are_not_guessed(key, at, save):
    """Squeezed, transposed or already channels-last: an error, even where the bytes would fit."""
    state = tiny.compvis()
    state[key] = zeros(*at)
    with pytest.raises((LayoutMismatch, UnsupportedCheckpoint)):
        open_model(save(state))


def test_any_one_missing_key_is_missed_by_name():
    """Every fourth key of a whole file, taken out alone."""
    whole = {key: TensorInfo("float32", value.shape) for key, value in tiny.compvis().items()}
    for key in list(whole)[::4]:
        with pytest.raises(LayoutMismatch) as caught:
            open_in_memory({name: info for name, info in whole.items() if name != key})
        assert key in caught.value.missing


class InMemory:
    """A checkpoint of names and shapes only."""

    container, objects, metadata = "memory", {}, {}

    def __init__(self, tensors):
        self.path, self.tensors, self.notes = Path("memory"), tensors, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def open_in_memory(tensors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_file, "open_checkpoint", lambda path: InMemory(tensors))
        return open_file.open_file(Path("memory"), ExitStack(), ema=False)


def test_integer_weights_are_refused(save):
    state = tiny.compvis()
    key = f"{tiny.UNET}out.0.bias"
    state[key] = state[key].astype(np.int32)
    with pytest.raises(InvalidCheckpoint, match=r"out\.0\.bias is int32, not a weight"):
        open_model(save(state))


@pytest.mark.parametrize("width", [48, 0])
def test_widths_that_no_group_norm_divides(width, save):
    state = part("vae", "compvis", block_out_channels=[width])
    with pytest.raises(InvalidCheckpoint, match=r"width 48 is no multiple|block_out_channels"):
        open_model(save(state))


def test_two_layouts_of_one_component(save):
    state = {**part("unet", "compvis", tiny.UNET), **part("unet", "diffusers", tiny.UNET)}
    with pytest.raises(UnsupportedCheckpoint, match="holds two of unet") as caught:
        open_model(save(state))
    assert "compvis names" in reason(caught) and "diffusers names" in reason(caught)


def test_one_component_below_two_prefixes(save):
    state = {**part("vae", "compvis", tiny.VAE), **part("vae", "compvis", "vae.")}
    with pytest.raises(UnsupportedCheckpoint, match="holds two of vae"):
        open_model(save(state))


# What published files carry beside the weights

EXTRAS = {
    "betas": zeros(1000),
    "sqrt_one_minus_alphas_cumprod": zeros(1000),
    "posterior_mean_coef1": zeros(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
    "first_stage_model.loss.logvar": zeros(),
    "first_stage_model.loss.discriminator.main.0.weight": zeros(4, 3, 4, 4),
    "cond_stage_model.logit_scale": zeros(),
}


def test_known_extras_are_dropped_with_a_reason(save):
    with open_model(save({**tiny.compvis(), **EXTRAS})) as model:
        assert model.dropped.keys() == EXTRAS.keys()
        assert all(model.dropped.values())
        assert "first_stage_model.loss.logvar" in model.components["vae"].dropped


def test_position_ids_may_be_damaged(save):
    """Merging tools left them as floats; they are not read."""
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    state = {**tiny.compvis(), key: np.linspace(0, 76.4, 77, dtype=f32)[None]}
    with open_model(save(state)) as model:
        assert key in model.dropped


def test_stored_schedule_is_kept_exactly(save):
    stored = tiny.alphas_cumprod() ** f32(1.1)
    with open_model(save({**tiny.compvis(), "alphas_cumprod": stored})) as model:
        assert model.alphas_cumprod.tobytes() == stored.tobytes()
        assert any("not SD 1.x's usual one" in note for note in model.notes)
    with open_model(save({**tiny.compvis(), "alphas_cumprod": tiny.alphas_cumprod()})) as model:
        assert model.alphas_cumprod.tobytes() == tiny.alphas_cumprod().tobytes()
        assert not any("usual" in note for note in model.notes)
    with open_model(save(tiny.compvis())) as model:
        assert model.alphas_cumprod is None


def test_the_usual_schedule_in_half_precision_is_rebuilt(save):
    state = {**tiny.compvis(np.float16), "alphas_cumprod": tiny.alphas_cumprod(np.float16)}
    with open_model(save(state)) as model:
        assert model.alphas_cumprod is None
        assert any("usual schedule rounded" in note for note in model.notes)
    state["alphas_cumprod"] = (tiny.alphas_cumprod() ** 2).astype(np.float16)
    with open_model(save(state)) as model:
        assert model.alphas_cumprod.dtype == np.float16


@pytest.mark.parametrize(
    "schedule",
    [
        zeros(0),
        zeros(4, 4),
        np.arange(4).astype(f32),
        np.array([0.9, np.nan], f32),
        np.array([1.5, 0.5], f32),
        np.array([0.5, -0.1], f32),
        np.array([9, 8, 7]),
    ],
)
def test_no_schedule_at_all(schedule, save):
    with pytest.raises(InvalidCheckpoint, match="alphas_cumprod"):
        open_model(save({**tiny.compvis(), "alphas_cumprod": schedule}))


def test_marks_of_v_prediction_and_zero_terminal_snr(save):
    with open_model(save({**tiny.compvis(), "v_pred": zeros(0), "ztsnr": zeros(0)})) as model:
        assert model.prediction == "v_prediction"
        assert model.scheduler["rescale_zero_terminal_snr"] is True
        assert any("v_pred" in line for line in model.evidence)


# EMA


def with_ema(state):
    copies = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value * f32(2)
        for key, value in state.items()
        if key.startswith(tiny.UNET)
    }
    counters = {"model_ema.decay": zeros(), "model_ema.num_updates": np.array(7, np.int32)}
    return {**state, **copies, **counters}


def test_ema_copy_is_taken_when_asked_for(save):
    path = save(with_ema(tiny.compvis()))
    plain = tiny.model()
    with open_model(path) as model:
        assert model.has_ema and not model.uses_ema
        assert tiny.same_bits(tiny.everything(model), plain)
        assert sum("EMA copy of the weights" in why for why in model.dropped.values())
    doubled = {**plain, "unet": {k: v * f32(2) for k, v in plain["unet"].items()}}
    with open_model(path, ema=True) as model:
        assert model.uses_ema
        assert tiny.same_bits(tiny.everything(model), doubled)
        assert f"{tiny.UNET}out.2.bias" in model.dropped
    assert inspect(path)["ema"] is True


def test_ema_copy_must_be_whole(save):
    state = with_ema(tiny.compvis())
    del state["model_ema.diffusion_modelout2bias"]
    with open_model(save(state)):
        pass
    error = mismatch(save(state), ema=True)
    assert error.missing == ("model_ema.diffusion_modelout2bias",)


def test_no_ema_copy_to_take(save, tmp_path):
    with pytest.raises(UnsupportedCheckpoint, match="no EMA copy"):
        open_model(save(tiny.compvis()), ema=True)
    with pytest.raises(UnsupportedCheckpoint, match="no EMA copy"):
        open_model(tiny.save_diffusers(tmp_path / "folder"), ema=True)


# diffusers folders


@pytest.fixture
def folder(tmp_path):
    return tiny.save_diffusers(tmp_path / "folder")


def test_a_folder_and_what_its_configs_add(tmp_path):
    heads = {"num_attention_heads": [4, 8, 2]}
    text = {"num_attention_heads": 4, "hidden_act": "gelu", "eos_token_id": 7}
    path = tiny.save_diffusers(
        tmp_path / "f", unet=heads, text_encoder=text, vae={"scaling_factor": 0.5}
    )
    tiny.edit_json(
        path / "scheduler" / "scheduler_config.json",
        prediction_type="v_prediction",
        beta_schedule="linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    tiny.save_tokenizer(path / "tokenizer", 120)
    tiny.edit_json(path / "unet" / "config.json", sample_size=24)
    with open_model(path) as model:
        assert (model.family, model.layout) == ("sd1", "diffusers")
        assert model.components["unet"].config["num_attention_heads"] == [4, 8, 2]
        assert model.components["text_encoder"].config | text == (
            model.components["text_encoder"].config
        )
        assert model.components["vae"].config["scaling_factor"] == 0.5
        assert model.prediction == "v_prediction"
        assert model.scheduler["beta_schedule"] == "linear"
        assert model.scheduler["rescale_zero_terminal_snr"] is True
        assert model.scheduler["timestep_spacing"] == "trailing"
        assert model.tokenizer_files["vocab"] == path / "tokenizer" / "vocab.json"
        assert model.defaults["width"] == model.defaults["height"] == 192
        assert tiny.same_bits(tiny.everything(model), tiny.model())


@pytest.mark.parametrize(
    "changes, heads",
    [
        ({"attention_head_dim": 4, "num_attention_heads": ...}, [4, 4, 4]),
        ({"attention_head_dim": ..., "num_attention_heads": ...}, [8, 8, 8]),
        ({"attention_head_dim": 4, "num_attention_heads": 2}, [2, 2, 2]),
        ({"attention_head_dim": 4, "num_attention_heads": None}, [4, 4, 4]),
        ({"attention_head_dim": [1, 2, 4]}, [1, 2, 4]),
    ],
)
def test_attention_head_dim_means_the_number_of_heads(folder, changes, heads):
    tiny.edit_json(folder / "unet" / "config.json", **changes)
    with open_model(folder) as model:
        assert model.components["unet"].config["num_attention_heads"] == heads


@pytest.mark.parametrize("eos", [2, ...])
def test_the_hubs_wrong_eos_is_not_believed(folder, eos):
    tiny.edit_json(folder / "text_encoder" / "config.json", eos_token_id=eos)
    with open_model(folder) as model:
        assert model.components["text_encoder"].config["eos_token_id"] == 119


def test_old_folders_lack_the_scaling_factor(folder):
    tiny.edit_json(folder / "vae" / "config.json", scaling_factor=...)
    with open_model(folder) as model:
        assert model.components["vae"].config["scaling_factor"] == 0.18215


def test_betas_listed_in_a_scheduler_config(folder):
    betas = list(np.linspace(0.001, 0.02, 50))
    tiny.edit_json(folder / "scheduler" / "scheduler_config.json", trained_betas=betas)
    with open_model(folder) as model:
        assert np.allclose(model.alphas_cumprod, np.cumprod(1 - np.array(betas)), rtol=1e-12)


def test_a_folder_without_scheduler_or_tokenizer(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with open_model(folder) as model:
        assert any("scheduler_config.json" in note for note in model.notes)
        assert model.tokenizer_files == {}


LIES = [
    ("unet", {"block_out_channels": [-32, 64, 32]}, "but the tensors make it"),
    ("unet", {"block_out_channels": [32, 64]}, "but the tensors make it"),
    ("unet", {"block_out_channels": "wide"}, "but the tensors make it"),
    ("unet", {"layers_per_block": 10**39}, "but the tensors make it"),
    ("unet", {"layers_per_block": True}, "but the tensors make it"),
    ("unet", {"cross_attention_dim": 768}, "but the tensors make it [64]"),
    ("unet", {"transformer_layers_per_block": [1, 2]}, "but the tensors make it"),
    ("unet", {"attention_head_dim": 7}, "does not divide"),
    ("unet", {"attention_head_dim": -8}, "does not divide"),
    ("unet", {"attention_head_dim": "8"}, "does not divide"),
    ("unet", {"attention_head_dim": [8, 8]}, "does not divide"),
    ("unet", {"act_fn": "gelu"}, "only 'silu' is built here"),
    ("unet", {"norm_eps": 1e-6}, "only 1e-05 is built here"),
    ("unet", {"use_linear_projection": True}, "but the tensors make it False"),
    ("unet", {"class_embed_type": "timestep"}, "only None is built here"),
    ("unet", {"only_cross_attention": [True, True, False]}, "only False is built here"),
    ("unet", {"mid_block_type": "UNetMidBlock2D"}, "but the tensors make it"),
    ("unet", {"mid_block_type": None}, "but the tensors make it"),
    ("unet", {"addition_embed_type": "text_time"}, "but the tensors make it None"),
    ("unet", {"freq_shift": 1}, "only 0 is built here"),
    ("unet", {"a_new_setting": "on"}, "unknown setting 'a_new_setting'"),
    ("unet", {"down_block_types": ["DownBlock2D"] * 3}, "but the tensors make it"),
    ("unet", {"sample_size": -1}, "sample_size is"),
    ("vae", {"norm_num_groups": 24}, "does not divide"),
    ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
    ("vae", {"scaling_factor": "0.18"}, "scaling_factor is '0.18'"),
    ("vae", {"scaling_factor": 1e300}, "scaling_factor is"),
    ("vae", {"latents_mean": [0, 0, 0, 0]}, "only None is built here"),
    ("vae", {"shift_factor": 0.1}, "is built here"),
    ("text_encoder", {"hidden_act": "swish"}, "known are quick_gelu, gelu"),
    ("text_encoder", {"num_attention_heads": 5}, "does not divide 64"),
    ("text_encoder", {"vocab_size": 49408}, "but the tensors make it 120"),
    ("text_encoder", {"layer_norm_eps": 1e-6}, "is built here"),
    ("text_encoder", {"eos_token_id": 120}, "in a vocabulary of 120"),
    ("text_encoder", {"model_type": "bert"}, "only 'clip_text_model' is built here"),
    ("scheduler", {"beta_schedule": "exp"}, "known are scaled_linear"),
    ("scheduler", {"beta_start": -1}, "beta_start is -1"),
    ("scheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps is"),
    ("scheduler", {"prediction_type": "sample"}, "known are epsilon, v_prediction"),
    ("scheduler", {"trained_betas": [2.0]}, "trained_betas is"),
    ("scheduler", {"rescale_betas_zero_snr": "yes"}, "expected true or false"),
]


@pytest.mark.parametrize("component, changes, words", LIES)
def test_lying_configs(folder, component, changes, words):
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    tiny.edit_json(folder / component / name, **changes)
    with pytest.raises((InvalidCheckpoint, UnsupportedCheckpoint)) as caught:
        open_model(folder)
    assert words.replace("[64]", "64") in reason(caught)
    assert f"{component}/{name}" in reason(caught)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.5, "_name_or_path": "x", "_diffusers_version": "0.6.0"},
        {"upcast_attention": True},
        {"a_new_setting": None},
        {"mid_block_scale_factor": 1.0},
    ],
)
def test_settings_without_effect_are_no_matter(folder, changes):
    tiny.edit_json(folder / "unet" / "config.json", **changes)
    with open_model(folder):
        pass


def test_index_names_a_component_that_is_not_there(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(InvalidCheckpoint, match="names vae, which has no folder"):
        open_model(folder)


def test_index_names_what_is_no_part_of_sd1(folder):
    tiny.edit_json(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    with pytest.raises(UnsupportedCheckpoint, match="a pipeline with text_encoder_3"):
        open_model(folder)


def test_a_folder_of_another_family_is_named_after_it(tmp_path):
    """A third text encoder is strange here, but the UNet says what the whole is."""
    path = tiny.save_diffusers(tmp_path / "f")
    state = {
        "conv_in.weight": zeros(32, 7, 3, 3),
        "down_blocks.0.resnets.0.norm1.weight": zeros(32),
        "down_blocks.1.attentions.0.proj_in.weight": zeros(32, 32),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": zeros(32, 48),
        "down_blocks.2.resnets.0.norm1.weight": zeros(32),
        "mid_block.attentions.0.transformer_blocks.0.norm1.weight": zeros(32),
        "class_embedding.linear_1.weight": zeros(8, 8),
    }
    tiny.save_safetensors(path / "unet" / "diffusion_pytorch_model.safetensors", state)
    tiny.edit_json(path / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    with pytest.raises(UnsupportedCheckpoint, match="Stable Diffusion x4 upscaler"):
        open_model(path)


def test_an_autoencoder_with_its_own_ema_copy(save):
    state = {**part("vae", "compvis"), "model_ema.encoderconv_inweight": zeros(1)}
    with open_model(save(state)) as model:
        assert not model.has_ema and "model_ema.encoderconv_inweight" in model.dropped
    with pytest.raises(UnsupportedCheckpoint, match="no EMA copy of the UNet"):
        open_model(save(state), ema=True)


@pytest.mark.parametrize("name", ["../unet", "/etc", "a b", "."])
def test_index_names_are_no_paths(folder, name):
    tiny.edit_json(folder / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(InvalidCheckpoint, match=r"model_index\.json"):
        open_model(folder)


def test_weights_of_another_component(folder):
    name = "diffusion_pytorch_model.safetensors"
    (folder / "vae" / name).replace(folder / "unet" / name)
    with pytest.raises((InvalidCheckpoint, UnsupportedCheckpoint), match="should hold a UNet2D"):
        open_model(folder)


def test_two_spellings_before_and_after_2023(tmp_path):
    path = tiny.save_diffusers(
        tmp_path / "f", spellings={"vae": "diffusers_2022", "text_encoder": "transformers_flat"}
    )
    with open_model(path) as model:
        assert tiny.same_bits(tiny.everything(model), tiny.model())


def test_one_component_folders(folder):
    for component in tiny.CONFIGS:
        with open_model(folder / component) as model:
            assert list(model.components) == [component]
            assert model.family == ("sd1" if component == "unet" else component)
    tiny.edit_json(folder / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(UnsupportedCheckpoint, match="is of 'VQModel'"):
        open_model(folder / "vae")


def test_variants(tmp_path):
    both = tiny.save_diffusers(tmp_path / "both")
    halves = tiny.save_diffusers(tmp_path / "half", np.float16, variant=".fp16")
    for component in ("unet", "vae"):
        name = "diffusion_pytorch_model.fp16.safetensors"
        (both / component / name).write_bytes((halves / component / name).read_bytes())
    with open_model(both) as model:
        assert model.components["unet"].dtypes.keys() == {"float32"}
    with open_model(both, variant="fp16") as model:
        assert model.components["unet"].dtypes.keys() == {"float16"}
        assert model.components["text_encoder"].dtypes.keys() == {"float32"}
        assert any("text_encoder has no variant fp16" in note for note in model.notes)
    with open_model(halves) as model:
        assert any("has only the variant fp16" in note for note in model.notes)
    with pytest.raises(UnsupportedCheckpoint, match="no component has a variant 'ema'"):
        open_model(both, variant="ema")
    for bad in ("../x", "a/b", ""):
        with pytest.raises(UnsupportedCheckpoint, match="no variant name"):
            open_model(both, variant=bad)
    with pytest.raises(UnsupportedCheckpoint, match="a single file has no variants"):
        open_model(both / "unet" / "diffusion_pytorch_model.safetensors", variant="fp16")


def test_a_choice_of_variants_is_listed(folder):
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    for name in ("fp16", "bf16"):
        (unet / f"diffusion_pytorch_model.{name}.safetensors").write_bytes(weights.read_bytes())
    weights.unlink()
    with pytest.raises(UnsupportedCheckpoint, match="choose a variant: bf16, fp16"):
        open_model(folder)


def test_sharded_components(folder):
    unet = folder / "unet"
    whole = unet / "diffusion_pytorch_model.safetensors"
    state = tiny.published("unet", tiny.CONFIGS["unet"], tiny.model()["unet"], "diffusers")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        tiny.save_safetensors(unet / shard, {key: state[key] for key in keys})
    whole.unlink()
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    tiny.write_json(index, {"metadata": {}, "weight_map": weight_map})
    with open_model(folder) as model:
        assert tiny.same_bits(tiny.everything(model), tiny.model())
        read = [file.name for file in model.files if file.parent == unet]
        assert read == [index.name, "a.safetensors", "b.safetensors"]
    with open_model(index) as model:
        assert list(model.components) == ["unet"] and len(model.files) == 3
    tiny.write_json(index, {"weight_map": weight_map | {names[0]: "../../x.safetensors"}})
    with pytest.raises(InvalidCheckpoint):
        open_model(folder)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UnsupportedCheckpoint, match=r"neither model_index\.json nor config\.json"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InvalidCheckpoint):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match="is of None"):
        open_model(tmp_path)
    with pytest.raises(UnreadableFile):
        open_model(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("ids", [{"a": 120}, {"a": -1}, {"a": "3"}, {"a": 10**30}])
def test_a_vocabulary_that_the_embedding_has_no_rows_for(folder, ids):
    tiny.save_tokenizer(folder / "tokenizer", 120)
    tiny.write_json(folder / "tokenizer" / "vocab.json", ids)
    with pytest.raises(InvalidCheckpoint, match="the text encoder has 120 rows"):
        open_model(folder)


def test_half_a_tokenizer(folder):
    tiny.save_tokenizer(folder / "tokenizer", 120)
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"holds vocab.json alone"):
        open_model(folder)


# Overrides


def test_overrides_of_what_tensors_cannot_say(save):
    path = save(tiny.compvis())
    config = {
        "prediction": "v_prediction",
        "unet": {"num_attention_heads": [4, 4, 4]},
        "vae": {"scaling_factor": 0.13025},
        "text_encoder": {"hidden_act": "gelu"},
        "scheduler": {"beta_schedule": "linear"},
        "defaults": {"width": 256, "steps": 8},
        "latent_rgb_factors": [[0.1, 0.2, 0.3]] * 5,
    }
    with open_model(path, config=config) as model:
        assert model.prediction == "v_prediction"
        assert model.components["unet"].config["num_attention_heads"] == [4, 4, 4]
        assert model.components["vae"].config["scaling_factor"] == 0.13025
        assert model.components["text_encoder"].config["hidden_act"] == "gelu"
        assert model.scheduler["beta_schedule"] == "linear"
        assert (model.defaults["width"], model.defaults["steps"]) == (256, 8)
        assert model.latent_rgb_factors == [[0.1, 0.2, 0.3]] * 5


@pytest.mark.parametrize(
    "config",
    [
        {"colour": 1},
        {"unet": {"in_channels": 9}},
        {"unet": 5},
        {"prediction": "x0"},
        {"defaults": {"height_": 4}},
    ],
)
def test_overrides_that_do_not_exist(save, config):
    with pytest.raises(WrongUse):
        open_model(save(tiny.compvis()), config=config)


@pytest.mark.parametrize(
    "config",
    [
        {"unet": {"num_attention_heads": [5, 5, 5]}},
        {"unet": {"num_attention_heads": [8]}},
        {"unet": {"num_attention_heads": 8}},
        {"defaults": {"width": -8}},
        {"scheduler": {"num_train_timesteps": 0}},
        {"latent_rgb_factors": [[1, 2, 3]]},
    ],
)
def test_overrides_out_of_bounds(save, config):
    with pytest.raises(InvalidCheckpoint):
        open_model(save(tiny.compvis()), config=config)


# inspect


def test_inspect_is_json(save, folder):
    for path in (save(tiny.compvis()), folder):
        found = inspect(path, keys=True)
        assert json.loads(json.dumps(found)) == found
        assert found["parameters"] == sum(p["parameters"] for p in found["components"].values())
        assert found["keys"]["unet"]["conv_in.weight"]["shape"] == [32, 3, 3, 4]
    assert "keys" not in inspect(folder)
