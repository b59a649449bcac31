"""Hostile models: well-formed files and folders whose contents lie, joined to ``corpus.HOSTILE``.

Cases of stage "layout": the readers open them; ``open_model`` or ``convert`` must refuse. Each is a
good tiny model (tiny.py) with one thing wrong. ``test_layouts_hostile.py`` converts them all, and
every case of the readers' corpus with them.
"""

import json
import os
from pathlib import Path

import numpy as np
import tiny
import torch_files as tf
from corpus import HOSTILE, hostile, hostile_each

from maple_convert import convert

UNET, VAE, TEXT = tiny.UNET, tiny.VAE, tiny.TEXT


def spoiled(folder: Path, **changes: object) -> Path:
    """A CompVis file with some tensors replaced; None leaves one out."""
    state = {**tiny.compvis(np.float16), **changes}
    state = {key: np.asarray(value) for key, value in state.items() if value is not None}
    return tiny.save_safetensors(folder / "model.safetensors", state)


def whole(folder: Path) -> Path:
    return tiny.save_diffusers(folder / "model", np.float16)


def edited(folder: Path, file: str, **changes: object) -> Path:
    """A diffusers folder with some settings of one of its JSON files changed."""
    path = whole(folder)
    tiny.edit_json(path / file, **changes)
    return path


def maple(folder: Path, **changes: object) -> Path:
    """A maple folder with some settings of its config changed."""
    source = tiny.save_safetensors(folder / "source.safetensors", tiny.compvis(np.float16))
    convert(source, folder / "model", digest=False)
    source.unlink()
    tiny.edit_json(folder / "model" / "config.json", **changes)
    return folder / "model"


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


# Keys


@hostile("1 missing", "out_layers.3.bias", stage="layout")
def missing_key(folder):
    """One bias of hundreds is not there: a port that loads leniently draws noise."""
    return spoiled(folder, **{f"{UNET}middle_block.2.out_layers.3.bias": None})


@hostile("1 unexpected", "input_blocks.1.0.in_layers.7.weight", stage="layout")
def extra_key(folder):
    """A key that looks as if it belonged."""
    return spoiled(folder, **{f"{UNET}input_blocks.1.0.in_layers.7.weight": f32(32)})


@hostile("1 misshapen", "(8, 64, 1, 1) instead of (8, 64, 3, 3)", stage="layout")
def misshapen_key(folder):
    """A convolution of the wrong size."""
    return spoiled(folder, **{f"{VAE}encoder.conv_out.weight": f32(8, 64, 1, 1)})


@hostile("misshapen", "(96, 64)", stage="layout")
def transposed_linear(folder):
    """A linear layer saved by a framework that keeps (inputs, outputs)."""
    return spoiled(folder, **{f"{TEXT}text_model.encoder.layers.0.mlp.fc1.weight": f32(64, 96)})


@hostile("misshapen", stage="layout")
def channels_last_convolution(folder):
    """A convolution that someone has already turned: not guessed from its shape, refused."""
    return spoiled(folder, **{f"{UNET}input_blocks.2.0.op.weight": f32(32, 3, 3, 32)})


@hostile("expected 4 axes", stage="layout")
def scalar_where_a_convolution_is(folder):
    """The tensor from which the architecture is read has no axes at all."""
    return spoiled(folder, **{f"{UNET}input_blocks.0.0.weight": np.float32(1)})


@hostile("is int32, not a weight", stage="layout")
def integer_weights(folder):
    """A weight of whole numbers, which would load and draw nothing."""
    return spoiled(folder, **{f"{UNET}out.0.weight": np.zeros(32, np.int32)})


@hostile("not a weight", stage="layout")
def boolean_weights(folder):
    """A weight of true and false."""
    return spoiled(folder, **{f"{VAE}quant_conv.bias": np.zeros(8, bool)})


@hostile("cond_stage_model", "embeddings.token_embedding.weight", stage="layout")
def no_vocabulary(folder):
    """The table of tokens, from which the vocabulary is counted, is missing."""
    return spoiled(folder, **{f"{TEXT}text_model.embeddings.token_embedding.weight": None})


@hostile("missing", "post_quant_conv.weight", stage="layout")
def vae_without_post_quant(folder):
    """An autoencoder of another family, which has no convolution before its decoder."""
    return spoiled(folder, **{f"{VAE}post_quant_conv.weight": None})


@hostile("missing", stage="layout")
def half_an_unet(folder):
    """A file whose upward path was cut off by a clumsy tool."""
    keys = [key for key in tiny.compvis(np.float16) if key.startswith(f"{UNET}output_blocks")]
    return spoiled(folder, **dict.fromkeys(keys))


@hostile("block_out_channels", stage="layout")
def empty_widths(folder):
    """Every shape holds a nought, so that all shapes agree and nothing is there."""
    config = {"block_out_channels": [32, 0, 32]}
    return tiny.save_safetensors(
        folder / "model.safetensors",
        tiny.published(
            "vae",
            {**tiny.CONFIGS["vae"], **config},
            tiny.arrays("vae", {**tiny.CONFIGS["vae"], **config}),
            "compvis",
        ),
    )


@hostile("multiple of 32", stage="layout")
def width_that_no_group_divides(folder):
    """Groups of 32 channels in a network of 48."""
    config = {**tiny.CONFIGS["vae"], "block_out_channels": [48]}
    state = tiny.published("vae", config, tiny.arrays("vae", config), "diffusers")
    return tiny.save_safetensors(folder / "model.safetensors", state)


# Names that cost


@hostile("unexpected", stage="layout")
def far_index(folder):
    """transformer_blocks.999999999 must not make a table of a billion blocks."""
    key = f"{UNET}input_blocks.1.1.transformer_blocks.999999999.norm1.weight"
    return spoiled(folder, **{key: f32(32)})


@hostile("missing", ".0.in_layers.2.bias", stage="layout")
def ten_thousand_levels(folder):
    """A downsampler after every block, without an end."""
    many = {f"{UNET}input_blocks.{n}.0.op.weight": f32(1) for n in range(4, 10_000)}
    return spoiled(folder, **many)


@hostile("no Stable Diffusion component", stage="layout")
def a_hundred_thousand_strangers(folder):
    """A hundred thousand tensors, none of them known; the message lists three."""
    state = {f"layer.{n}.weight": f32(0) for n in range(100_000)}
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("no Stable Diffusion component", stage="layout")
def names_of_a_million_dots(folder):
    """Names nested deeper than any module, to make trees of them costly."""
    state = {"a." * 250_000 + str(n): f32(1) for n in range(4)}
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("unexpected", stage="layout")
def names_that_play_with_the_terminal(folder):
    """The unexpected key's name holds escape codes and line ends, and is printed."""
    return spoiled(folder, **{f"{UNET}\x1b[2J\r\nall is well": f32(1)})


# Families


@hostile("keys do not fit", "proj_in.weight", stage="layout")
def half_an_sd2(folder):
    """SD 2's linear projections in the first transformer and SD 1's convolutions in the others."""
    state = tiny.compvis(np.float16)
    for key, value in state.items():
        if key.startswith(f"{UNET}input_blocks.1.1.proj_in.weight"):
            state[key] = value[:, :, 0, 0]
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("no known family fits", "OpenCLIP", stage="layout")
def two_families_in_one(folder):
    """SD 1's UNet beside SD 2's text encoder."""
    state = {k: v for k, v in tiny.compvis(np.float16).items() if not k.startswith(TEXT)}
    state["cond_stage_model.model.transformer.resblocks.0.ln_1.weight"] = f32(64)
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("no known family fits", "vector", stage="layout")
def sd1_with_a_label_embedding(folder):
    """SDXL's size embedding on SD 1's UNet."""
    return spoiled(folder, **{f"{UNET}label_emb.0.0.weight": f32(128, 16)})


@hostile("takes 6 channels", stage="layout")
def six_channels(folder):
    """A UNet of no known use."""
    return tiny.save_safetensors(
        folder / "model.safetensors", tiny.compvis(np.float16, unet={"in_channels": 6})
    )


@hostile("two models in one", stage="layout")
def text_encoder_of_another_model(folder):
    """A text encoder of another width than the UNet's context: merged by hand."""
    state = tiny.compvis(np.float16, text_encoder={"hidden_size": 128})
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("two models in one", stage="layout")
def vae_of_another_model(folder):
    """An autoencoder of 16 latent channels beside a UNet of four."""
    state = tiny.compvis(np.float16, vae={"latent_channels": 16})
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("holds two of unet", stage="layout")
def mixed_layouts(folder):
    """The same UNet in two layouts: which one is meant?"""
    config = tiny.CONFIGS["unet"]
    other = tiny.published("unet", config, tiny.arrays("unet", config), "diffusers")
    return spoiled(folder, **other)


@hostile("holds two of vae", stage="layout")
def one_component_twice(folder):
    """Two autoencoders below two prefixes."""
    config = tiny.CONFIGS["vae"]
    other = tiny.published("vae", config, tiny.arrays("vae", config), "compvis", "vae.")
    return spoiled(folder, **other)


@hostile("LoRA", stage="layout")
def lora_hidden_in_a_model(folder):
    """A whole model with the tensors of a LoRA beside it."""
    return spoiled(folder, **{"lora_unet_mid_block_x.lora_up.weight": f32(4, 4)})


@hostile("textual inversion", stage="layout")
def embedding_named_model(folder):
    """A textual inversion under the name of a model."""
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": np.ones((2, 64), np.float32)}}
    return tf.write_torch_zip(folder / "model.ckpt", tree)


@hostile("decoder", "must lie beside it", stage="layout")
def half_of_taesd(folder):
    """TAESD's encoder without its decoder."""
    state = tiny.published("taesd", tiny.TAESD, tiny.arrays("taesd", tiny.TAESD), "upstream")
    mine = {key[8:]: value for key, value in state.items() if key.startswith("encoder.")}
    return tiny.save_safetensors(folder / "model_encoder.safetensors", mine)


@hostile("not the decoder of TAESD", stage="layout")
def two_encoders_of_taesd(folder):
    """The file beside TAESD's encoder is the encoder again."""
    path = half_of_taesd(folder)
    (folder / "model_decoder.safetensors").write_bytes(path.read_bytes())
    return path


# Values


@hostile_each(["nan", "inf", "-inf"], "input_blocks.1.0.in_layers.2.weight", stage="layout")
def weights_that_are_not_finite(folder, value):
    """One bad number in a million: a network that learnt too fast, or a damaged disk."""
    state = tiny.compvis(np.float16)
    state[f"{UNET}input_blocks.1.0.in_layers.2.weight"].reshape(-1)[77] = float(value)
    return tiny.save_safetensors(folder / "model.safetensors", state)


@hostile("NaN or infinite", stage="layout")
def bfloat16_nan(folder):
    """The same in a type that numpy does not know."""
    state = tiny.compvis()
    state = {key: (v.view(np.uint32) >> 16).astype(np.uint16) for key, v in state.items()}
    state[f"{VAE}decoder.conv_out.bias"][0] = 0x7FC0
    return tiny.save_safetensors(folder / "model.safetensors", state, "bfloat16")


SCHEDULES = [[0.9, np.nan], [0.5, 0.9], [1.5, 0.5], [0.5, -0.5], [[0.9]], 0.9, [0.9] * 100_001]


@hostile_each(range(len(SCHEDULES)), "alphas_cumprod", stage="layout")
def no_noise_schedule(folder, which):
    """A stored noise schedule that is none; the sampler would divide by it."""
    return spoiled(folder, alphas_cumprod=np.array(SCHEDULES[which], np.float32))


# diffusers folders

CONFIG_LIES = [
    {"block_out_channels": [-32, 64, 32]},
    {"block_out_channels": [32, 64, 32, 10**30]},
    {"block_out_channels": "32"},
    {"block_out_channels": {"0": 32}},
    {"block_out_channels": [[[[32]]]]},
    {"layers_per_block": 10**39},
    {"layers_per_block": -1},
    {"layers_per_block": 1.5},
    {"attention_head_dim": 0},
    {"attention_head_dim": [8] * 100_000},
    {"attention_head_dim": 1e308},
    {"cross_attention_dim": "64"},
    {"down_block_types": ["os.system"]},
    {"act_fn": "relu"},
    {"norm_eps": 0},
    {"norm_num_groups": 0},
    {"sample_size": [[1]]},
    {"encoder_hid_dim": 4096},
    {"__class__": "x", "a\nb": 1},
]


@hostile_each(range(len(CONFIG_LIES)), "config.json", stage="layout")
def lying_config(folder, which):
    """A config that does not agree with the tensors, or asks for what is not built."""
    return edited(folder, "unet/config.json", **CONFIG_LIES[which])


@hostile_each([0, -1, 1e300, "x", [], True], "scaling_factor", stage="layout")
def lying_scaling_factor(folder, value):
    """The number that every latent is divided by."""
    return edited(folder, "vae/config.json", scaling_factor=value)


@hostile_each(
    [
        {"beta_start": -1},
        {"beta_end": 2},
        {"beta_schedule": ["linear"]},
        {"num_train_timesteps": 10**12},
        {"prediction_type": "sample"},
        {"trained_betas": [0.5, "x"]},
        {"trained_betas": [5]},
    ],
    "scheduler_config.json",
    stage="layout",
)
def lying_scheduler(folder, changes):
    """A noise schedule that is none."""
    return edited(folder, "scheduler/scheduler_config.json", **changes)


PATHS = ["../unet", "/etc", ".", "a/b", "unet\x00", ""]


@hostile_each(range(len(PATHS)), "model_index.json", stage="layout")
def component_named_as_a_path(folder, which):
    """A component whose folder would lie elsewhere."""
    kind = ["diffusers", "UNet2DConditionModel"]
    return edited(folder, "model_index.json", **{PATHS[which]: kind})


@hostile_each([["diffusers"], [1, 2], ["diffusers", None]], "unet is", stage="layout")
def component_that_is_no_pair(folder, entry):
    """model_index.json must name a library and a class."""
    return edited(folder, "model_index.json", unet=entry)


@hostile("a pipeline with", stage="layout")
def component_of_a_strange_class(folder):
    """A class that this version does not know, such as a program that hides as a model."""
    return edited(folder, "model_index.json", unet=["os", "system"])


@hostile("has no folder", stage="layout")
def component_without_a_folder(folder):
    """model_index.json promises more than there is."""
    path = whole(folder)
    (path / "vae").rename(path / "elsewhere")
    return path


@hostile("twice", stage="layout")
def component_named_twice(folder):
    """The same key twice in model_index.json: readers disagree about which one counts."""
    path = whole(folder)
    text = (path / "model_index.json").read_text().rstrip()[:-1]
    (path / "model_index.json").write_text(text + ', "unet": ["diffusers", "AutoencoderKL"]}')
    return path


@hostile("should hold a UNet2DConditionModel", stage="layout")
def swapped_weights(folder):
    """The autoencoder's weights in the UNet's folder."""
    path, name = whole(folder), "diffusion_pytorch_model.safetensors"
    (path / "unet" / name).write_bytes((path / "vae" / name).read_bytes())
    return path


@hostile("unknown setting", stage="layout")
def swapped_configs(folder):
    """The autoencoder's config in the UNet's folder."""
    path = whole(folder)
    (path / "unet" / "config.json").write_bytes((path / "vae" / "config.json").read_bytes())
    return path


@hostile("no such file", exit_code=1, stage="layout")
def no_config(folder):
    """A component without its config."""
    path = whole(folder)
    (path / "unet" / "config.json").unlink()
    return path


TEXTS = ["", "[]", "{", "null", '{"a": NaN}', "[" * 100_000, "{}" * 2]


@hostile_each(range(len(TEXTS)), "text_encoder/config.json", stage="layout")
def config_that_is_no_object(folder, which):
    """A config cut short, empty, nested without end."""
    path = whole(folder)
    (path / "text_encoder" / "config.json").write_text(TEXTS[which])
    return path


@hostile("too much for a JSON file", stage="layout")
def config_of_a_gigabyte(folder):
    """A sparse file of a gigabyte."""
    path = whole(folder)
    os.truncate(path / "unet" / "config.json", 1 << 30)
    return path


@hostile("holds no diffusion_pytorch_model.safetensors", stage="layout")
def weights_that_are_a_folder(folder):
    """A folder where the weights should be a file."""
    path = whole(folder)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.mkdir()
    return path


@hostile_each(["../../x.safetensors", "/etc/passwd", "..", "a/../../x"], "", stage="layout")
def shards_outside_the_folder(folder, shard):
    """An index of shards that points elsewhere."""
    path = whole(folder)
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": shard}}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (path / "unet" / name).write_text(json.dumps(index))
    return path


@hostile_each([{"a": 120}, {"a": -1}, {"a": None}, {"a": {"b": 1}}], "120 rows", stage="layout")
def vocabulary_beyond_the_table(folder, words):
    """Token ids for which the embedding has no row: reading beyond an array on a GPU."""
    path = whole(folder)
    tiny.save_tokenizer(path / "tokenizer", 120)
    tiny.write_json(path / "tokenizer" / "vocab.json", words)
    return path


# Maple folders

MAPLE_LIES = [
    {"format_version": 99},
    {"format_version": "1"},
    {"components": {"../../etc": {}}},
    {"components": {"unet": []}},
    {"components": None},
    {"family": {"\x1b[31m": 1}},
    {"source": {"file": ["\x1b"], "sha256": None}},
    {"quantization": {"bits": 4}},
    {"quantization": {"bits": 4, "components": {"unet": {}}}},
    {"tokenizer": "/etc/"},
    {"tokenizer": "tokenizer/"},
    {"prediction": ["epsilon"]},
    {"scheduler": {"beta_schedule": "linear"}},
    {"defaults": {}},
    {"alphas_cumprod": [2.0]},
    {"alphas_cumprod": [[0.5]]},
    {"alphas_cumprod": {}},
    {"latent_rgb_factors": [[1e400]]},
    {"source": ...},
    {"extra": 1},
]


@hostile_each(range(len(MAPLE_LIES)), "config.json", stage="layout")
def lying_maple_config(folder, which):
    """Our own folder, edited: trusted no more than any other."""
    return maple(folder, **MAPLE_LIES[which])


@hostile_each(
    [
        {"layers_per_block": 10**9},
        {"block_out_channels": [32] * 1000},
        {"block_out_channels": [-32, 64, 32]},
        {"transformer_layers": [10**9, 1, 0]},
        {"num_attention_heads": [0, 8, 8]},
        {"norm_num_groups": 24},
        {"cross_attention_dim": "64"},
    ],
    "unet",
    stage="layout",
)
def lying_maple_component(folder, changes):
    """Settings that would make the tables run for hours."""
    path = maple(folder)
    config = json.loads((path / "config.json").read_text())
    config["components"]["unet"].update(changes)
    tiny.write_json(path / "config.json", config)
    return path


@hostile("lacks vae.safetensors", stage="layout")
def maple_folder_without_a_file(folder):
    """A folder copied by halves."""
    path = maple(folder)
    (path / "vae.safetensors").unlink()
    return path


@hostile("truncated", stage="layout")
def maple_folder_cut_short(folder):
    """A file of the folder copied by halves."""
    path = maple(folder)
    os.truncate(path / "unet.safetensors", 40_000)
    return path


@hostile("misshapen", stage="layout")
def maple_folder_in_torchs_order(folder):
    """Convolutions as torch has them, in a folder that says otherwise."""
    path = maple(folder)
    config = tiny.CONFIGS["vae"]
    state = tiny.published("vae", config, tiny.arrays("vae", config), "diffusers")
    native = tiny.arrays("vae", config)
    for key in native:
        if native[key].ndim == 4:
            native[key] = np.ascontiguousarray(state[key])
    tiny.save_safetensors(path / "vae.safetensors", native)
    return path


LAYOUT_CASES = {case.name: case for case in HOSTILE if case.stage == "layout"}
