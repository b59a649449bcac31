"""The config.json files of a diffusers folder: read against the tensors, and written.

The tensors have said the architecture already; a config may only agree. What it adds is what
tensors cannot say: the number of heads, the activation of the text encoder, the scaling factor, the
noise schedule. Every other key must be known: it must hold the one value that is built here, or be
on the list of those without effect on the result. An unknown key that is set is an error, because
it may well change what the network computes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, one_line
from maple_convert.layouts.parts import LINEAR

Config = Mapping[str, Any]

# ---------------------------------------------------------------------------------------------
# UNet

_UNET_CONSTANTS: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_UNET_WITHOUT_EFFECT = frozenset(
    {
        "addition_embed_type_num_heads",  # of an embedding that is not there
        "class_embeddings_concat",
        "dropout",  # training only
        "sample_size",  # the size that the model was trained at: read as the default size
        "upcast_attention",  # where attention is computed in half precision; here it never is
    }
)


def unet(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete the UNet's architecture ``found`` in the tensors by its config.json."""
    depths: Sequence[int] = found["transformer_layers"]
    widths: Sequence[int] = found["block_out_channels"]
    layers: int = found["layers_per_block"]
    ups = _up_levels(found)
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up = ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in ups]
    handled = {
        "addition_time_embed_dim",  # six of them and the text's state make the vector
        "attention_head_dim",
        "norm_num_groups",
        "num_attention_heads",
        "reverse_transformer_layers_per_block",
        "transformer_layers_per_block",
        "use_linear_projection",  # see check_doors
    }
    vector: int | None = found.get("vector_channels")
    agreeing = {
        **{key: found[key] for key in ("in_channels", "out_channels", "cross_attention_dim")},
        "block_out_channels": list(widths),
        "layers_per_block": found["layers_per_block"],
        "down_block_types": down,
        "up_block_types": up,
        "time_cond_proj_dim": found.get("time_cond_dim"),
        "addition_embed_type": None if vector is None else "text_time",
        "projection_class_embeddings_input_dim": vector,
        "mid_block_type": _middle(found),
    }
    _check(path, config, _UNET_CONSTANTS, _UNET_WITHOUT_EFFECT | handled, agreeing)

    per_block = config.get("transformer_layers_per_block", 1)
    stated = _per_level(per_block, len(depths))
    # The middle block is as deep as the last level says, which may itself have no transformers.
    actual = [*depths[:-1], depths[-1] or found["mid_transformer_layers"] or 0]
    if len(stated) != len(depths) or any(
        depth and not _every(says, [depth] * layers)
        for says, depth in zip(stated, actual, strict=True)
    ):
        _disagree(path, "transformer_layers_per_block", per_block, actual)
    reverse = config.get("reverse_transformer_layers_per_block")
    if reverse is None and "up_transformer_layers" in found:
        _disagree(path, "reverse_transformer_layers_per_block", reverse, ups)
    if reverse is not None:
        stated = _per_level(reverse, len(ups))
        if len(stated) != len(ups) or any(
            any(level) and not _every(says, level) for says, level in zip(stated, ups, strict=True)
        ):
            _disagree(path, "reverse_transformer_layers_per_block", reverse, ups)

    # ``attention_head_dim`` has always meant the number of heads, and cannot be renamed any more.
    key = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    heads = _per_level(config.get(key, 8), len(widths))
    if len(heads) != len(widths) or not all(
        _integer(n) and 0 < n <= width and width % n == 0
        for n, width in zip(heads, widths, strict=True)
    ):
        reason = f"{key} is {_shown(config.get(key))}, which does not divide widths {list(widths)}"
        raise InvalidCheckpoint(path, reason)
    groups = _groups(path, config, widths)
    return {**found, "num_attention_heads": heads, "norm_num_groups": groups}


def check_doors(path: Path, config: Config, spelling: str) -> None:
    """Raise unless a config says of the transformers' doors what the tensors are.

    Args:
        path: the config.json.
        config: its content.
        spelling: that the tensors were found in.

    Raises:
        InvalidCheckpoint: if it does not.
    """
    says = config.get("use_linear_projection", False)
    if not _same(says, spelling.endswith(LINEAR)):
        _disagree(path, "use_linear_projection", says, spelling.endswith(LINEAR))


def _middle(config: Config) -> str | None:
    depth: int | None = config["mid_transformer_layers"]
    if depth is None:
        return None
    return "UNetMidBlock2DCrossAttn" if depth else "UNetMidBlock2D"


def _up_levels(config: Config) -> list[list[int]]:
    """The depths on the way up, level by level from the coarsest, one for each residual block."""
    layers: int = config["layers_per_block"] + 1
    flat: Sequence[int] | None = config.get("up_transformer_layers")
    if flat is None:
        return [[depth] * layers for depth in reversed(config["transformer_layers"])]
    return [list(flat[start : start + layers]) for start in range(0, len(flat), layers)]


def _every(says: object, depths: list[int]) -> bool:
    """Whether a level's setting, one for all of its blocks or a list, is what they are."""
    listed = _list(says)
    return _same(listed if listed is not None else [says] * len(depths), list(depths))


def write_unet(
    config: Config, size: int, *, is_linear: bool = False, size_width: int | None = None
) -> dict[str, Any]:
    """The config.json of a UNet for diffusers.

    Args:
        config: ours.
        size: native, in latents.
        is_linear: whether its transformers' doors are written as linear layers.
        size_width: of each embedded number in the vector, of a network that takes one.
    """
    depths: Sequence[int] = config["transformer_layers"]
    heads: Sequence[int] = config["num_attention_heads"]
    vector: int | None = config.get("vector_channels")
    # A level without transformers says nothing; the last one speaks for the middle block.
    layers = [n or 1 for n in depths[:-1]] + [depths[-1] or config["mid_transformer_layers"] or 1]
    reverse = None
    if "up_transformer_layers" in config:
        reverse = [level if any(level) else 1 for level in _up_levels(config)]
        layers = [[n] * config["layers_per_block"] for n in layers]
    return {
        "_class_name": "UNet2DConditionModel",
        **{key: values[0] for key, values in _UNET_CONSTANTS.items()},
        "addition_embed_type": None if vector is None else "text_time",
        "addition_time_embed_dim": size_width,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),
        "block_out_channels": list(config["block_out_channels"]),
        "cross_attention_dim": config["cross_attention_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths],
        "in_channels": config["in_channels"],
        "layers_per_block": config["layers_per_block"],
        "mid_block_type": _middle(config),
        "norm_num_groups": config["norm_num_groups"],
        "out_channels": config["out_channels"],
        "projection_class_embeddings_input_dim": vector,
        "reverse_transformer_layers_per_block": reverse,
        "sample_size": size,
        "time_cond_proj_dim": config.get("time_cond_dim"),
        "transformer_layers_per_block": layers[0]
        if layers.count(layers[0]) == len(layers)
        else layers,
        "up_block_types": [
            "CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in _up_levels(config)
        ],
        "use_linear_projection": is_linear,
    }


# ---------------------------------------------------------------------------------------------
# ControlNet

_CONTROLNET_CONSTANTS: Mapping[str, tuple[object, ...]] = {
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}


def controlnet(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete a ControlNet's architecture by its config.json, which is a UNet's and more."""
    agreeing = {
        "conditioning_channels": found["hint_channels"],
        "conditioning_embedding_out_channels": found["hint_widths"],
    }
    own = {k: v for k, v in config.items() if k in agreeing or k in _CONTROLNET_CONSTANTS}
    _check(path, own, _CONTROLNET_CONSTANTS, frozenset(), agreeing)
    shared = {key: value for key, value in config.items() if key not in own}
    completed = unet(path, shared, {**found, "out_channels": found["in_channels"]})
    return {key: value for key, value in completed.items() if key != "out_channels"}


def write_controlnet(
    config: Config, *, is_linear: bool = False, size_width: int | None = None
) -> dict[str, Any]:
    """The config.json of a ControlNetModel for diffusers; see ``write_unet``."""
    as_unet = {**config, "out_channels": config["in_channels"]}
    shared = write_unet(as_unet, 0, is_linear=is_linear, size_width=size_width)
    theirs = ("sample_size", "up_block_types", "out_channels", *_NOT_A_CONTROLNETS)
    return {
        **{key: value for key, value in shared.items() if key not in theirs},
        "_class_name": "ControlNetModel",
        **{key: values[0] for key, values in _CONTROLNET_CONSTANTS.items()},
        "conditioning_channels": config["hint_channels"],
        "conditioning_embedding_out_channels": list(config["hint_widths"]),
    }


# Arguments of diffusers' UNet that its ControlNet does not take.
_NOT_A_CONTROLNETS = (
    *("attention_type", "center_input_sample", "class_embeddings_concat", "conv_in_kernel"),
    *("conv_out_kernel", "cross_attention_norm", "dual_cross_attention", "dropout"),
    *("mid_block_only_cross_attention", "resnet_out_scale_factor", "resnet_skip_time_act"),
    *("reverse_transformer_layers_per_block", "time_cond_proj_dim", "time_embedding_act_fn"),
    *("time_embedding_dim", "time_embedding_type", "timestep_post_act"),
)


# ---------------------------------------------------------------------------------------------
# T2I-Adapter


def t2i_adapter(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete an adapter's architecture by its config.json, which can only agree."""
    _check(path, config, {}, frozenset(), _adapter_facts(found))
    return dict(found)


def write_t2i_adapter(config: Config) -> dict[str, Any]:
    """The config.json of a T2IAdapter for diffusers."""
    return {"_class_name": "T2IAdapter", **_adapter_facts(config)}


def _adapter_facts(config: Config) -> dict[str, Any]:
    is_xl = list(config["halves"]) == [2] and len(config["channels"]) > 2
    return {
        "adapter_type": "full_adapter_xl" if is_xl else "full_adapter",
        "channels": list(config["channels"]),
        "downscale_factor": config["downscale"],
        "in_channels": config["hint_channels"],
        "num_res_blocks": config["layers"],
    }


# ---------------------------------------------------------------------------------------------
# Autoencoders

SD1_SCALING_FACTOR = 0.18215  # configs from before 2023 do not state it
SDXL_SCALING_FACTOR = 0.13025

_VAE_CONSTANTS: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_VAE_WITHOUT_EFFECT = frozenset({"force_upcast", "sample_size"})


def vae(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete the autoencoder's architecture by its config.json."""
    levels = len(found["block_out_channels"])
    agreeing = {
        **{key: found[key] for key in ("in_channels", "out_channels", "latent_channels")},
        "block_out_channels": list(found["block_out_channels"]),
        "layers_per_block": found["layers_per_block"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    handled = {"norm_num_groups", "scaling_factor"}
    _check(path, config, _VAE_CONSTANTS, _VAE_WITHOUT_EFFECT | handled, agreeing)
    groups = _groups(path, config, found["block_out_channels"])
    factor = config.get("scaling_factor", SD1_SCALING_FACTOR)
    return {**found, "norm_num_groups": groups, "scaling_factor": _positive(path, factor)}


def write_vae(config: Config, size: int) -> dict[str, Any]:
    """The config.json of an autoencoder for diffusers; ``size`` is the native size in pixels."""
    levels = len(config["block_out_channels"])
    return {
        "_class_name": "AutoencoderKL",
        **{key: values[0] for key, values in _VAE_CONSTANTS.items()},
        "block_out_channels": list(config["block_out_channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config["in_channels"],
        "latent_channels": config["latent_channels"],
        "layers_per_block": config["layers_per_block"],
        "norm_num_groups": config["norm_num_groups"],
        "out_channels": config["out_channels"],
        "force_upcast": config.get("force_upcast", False),
        "sample_size": size,
        "scaling_factor": config["scaling_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


_TAESD_CONSTANTS: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("relu",),
    "in_channels": (3,),
    "latent_magnitude": (3,),
    "latent_shift": (0.5,),
    "num_decoder_blocks": ([3, 3, 3, 1],),
    "num_encoder_blocks": ([1, 3, 3, 3],),
    "out_channels": (3,),
    "scaling_factor": (1.0,),
    "shift_factor": (0.0, None),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


def taesd(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete TAESD's architecture by its config.json."""
    widths = [found["width"]] * 4
    agreeing = {
        "latent_channels": found["latent_channels"],
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "block_out_channels": widths,
    }
    _check(path, config, _TAESD_CONSTANTS, frozenset({"force_upcast"}), agreeing)
    return dict(found)


def write_taesd(config: Config) -> dict[str, Any]:
    """The config.json of an AutoencoderTiny for diffusers."""
    widths = [config["width"]] * 4
    return {
        "_class_name": "AutoencoderTiny",
        **{key: values[0] for key, values in _TAESD_CONSTANTS.items()},
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "latent_channels": config["latent_channels"],
    }


# ---------------------------------------------------------------------------------------------
# Text encoder

HEAD_WIDTH = 64  # of every published CLIP text encoder: a bare file's heads are width / 64
FULL_VOCABULARY = 49408
OPEN_CLIP_PAD = 0  # OpenCLIP fills up with its first token, which is "!"; CLIP with the end of text

_TEXT_CONSTANTS: Mapping[str, tuple[object, ...]] = {
    "layer_norm_eps": (1e-5,),
    "model_type": ("clip_text_model",),
}
_TEXT_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dropout",
        "dtype",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",  # the tokenizer says it
        "problem_type",
        "projection_dim",  # stated with and without a projection: the tensors say
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_attn_implementation_autoset",
    }
)


def text_encoder(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete the text encoder's architecture by its config.json."""
    agreeing = {
        key: found[key]
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "max_position_embeddings",
        )
    }
    handled = {"num_attention_heads", "hidden_act", "eos_token_id"}
    _check(path, config, _TEXT_CONSTANTS, _TEXT_WITHOUT_EFFECT | handled, agreeing)
    rules = _transformer_rules(path, config, found, heads=8)
    return {
        **found,
        **rules,
        "eos_token_id": eos_token(path, config.get("eos_token_id"), found["vocab_size"]),
        **({"pad_token_id": OPEN_CLIP_PAD} if rules["hidden_act"] == "gelu" else {}),
    }


def _transformer_rules(path: Path, config: Config, found: Config, *, heads: int) -> dict[str, Any]:
    """What no tensor of one of CLIP's encoders says: its heads and its activation."""
    width: int = found["hidden_size"]
    stated = config.get("num_attention_heads", heads)
    if not _integer(stated) or not 0 < stated <= width or width % stated:
        reason = f"num_attention_heads is {_shown(stated)}, which does not divide {width}"
        raise InvalidCheckpoint(path, reason)
    act = config.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise UnsupportedCheckpoint(path, f"hidden_act {_shown(act)}: known are quick_gelu, gelu")
    return {"num_attention_heads": stated, "hidden_act": act}


def eos_token(path: Path, stated: object, vocabulary: int) -> int:
    """The id of the end of a text.

    Configs on the hub say 2, which was never true and is kept by transformers for old behaviour.
    CLIP's own is 49407, also where textual inversion added rows after it; a pruned vocabulary
    keeps it last.
    """
    if stated is None or _same(stated, 2):
        return min(vocabulary, FULL_VOCABULARY) - 1
    if not _integer(stated) or not 0 <= stated < vocabulary:
        reason = f"eos_token_id is {_shown(stated)} in a vocabulary of {vocabulary}"
        raise InvalidCheckpoint(path, reason)
    return stated


def write_text_encoder(config: Config) -> dict[str, Any]:
    """The config.json of a CLIPTextModel for transformers."""
    projection = config["projection_dim"]
    eos = config["eos_token_id"]
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        **{key: values[0] for key, values in _TEXT_CONSTANTS.items()},
        "attention_dropout": 0.0,
        "bos_token_id": eos - 1,  # CLIP's two special tokens are neighbours
        "eos_token_id": eos,
        "hidden_act": config["hidden_act"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "pad_token_id": config.get("pad_token_id", eos),
        "projection_dim": config["hidden_size"] if projection is None else projection,
        "vocab_size": config["vocab_size"],
    }


# ---------------------------------------------------------------------------------------------
# Image encoder

_VISION_CONSTANTS: Mapping[str, tuple[object, ...]] = {
    "layer_norm_eps": (1e-5,),
    "model_type": ("clip_vision_model",),
    "num_channels": (3,),
}
_VISION_FACTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("image_size", "patch_size", "projection_dim"),
)


def image_encoder(path: Path, config: Config, found: Config) -> dict[str, Any]:
    """Complete the image encoder's architecture by its config.json."""
    handled = {"num_attention_heads", "hidden_act"}
    agreeing = {key: found[key] for key in _VISION_FACTS}
    without_effect = _TEXT_WITHOUT_EFFECT - {"projection_dim"}
    _check(path, config, _VISION_CONSTANTS, without_effect | handled, agreeing)
    return {**found, **_transformer_rules(path, config, found, heads=12)}


def write_image_encoder(config: Config) -> dict[str, Any]:
    """The config.json of a CLIPVisionModelWithProjection for transformers."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        **{key: values[0] for key, values in _VISION_CONSTANTS.items()},
        "attention_dropout": 0.0,
        **{key: config[key] for key in _VISION_FACTS},
        "hidden_act": config["hidden_act"],
        "num_attention_heads": config["num_attention_heads"],
    }


# ---------------------------------------------------------------------------------------------
# Noise schedule

SD1_SCHEDULER: Mapping[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "rescale_zero_terminal_snr": False,
}
_BETA_SCHEDULES = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
}
_HINTS = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample")
PREDICTIONS = ("epsilon", "v_prediction")
UNKNOWN = "unknown"  # of a file whose tensors are the same for both: its values must be looked at
_MOST_TIMESTEPS = 100_000


def alphas_cumprod(scheduler: Config) -> npt.NDArray[np.float64] | None:
    """The noise schedule of linear or scaled linear betas; None for the others."""
    low, high = float(scheduler["beta_start"]), float(scheduler["beta_end"])
    steps = int(scheduler["num_train_timesteps"])
    if scheduler["rescale_zero_terminal_snr"]:
        return None
    if scheduler["beta_schedule"] == "scaled_linear":
        return _falling(np.square(np.linspace(math.sqrt(low), math.sqrt(high), steps)))
    if scheduler["beta_schedule"] == "linear":
        return _falling(np.linspace(low, high, steps))
    return None


def _falling(betas: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    falling: npt.NDArray[np.float64] = np.cumprod(1 - betas, dtype=np.float64)
    return falling


def trained_alphas(path: Path, config: Config) -> npt.NDArray[np.float64] | None:
    """The noise schedule of a config that lists its betas, or None."""
    betas = config.get("trained_betas")
    if betas is None:
        return None
    listed = _list(betas) or []
    if not 1 <= len(listed) <= _MOST_TIMESTEPS or not all(
        isinstance(beta, int | float) and not isinstance(beta, bool) and 0 <= beta <= 1
        for beta in listed
    ):
        raise InvalidCheckpoint(path, f"trained_betas is {_shown(betas)}")
    return _falling(np.asarray(cast("list[float]", listed), np.float64))


def scheduler(path: Path, config: Config) -> tuple[dict[str, Any], str]:
    """The noise schedule and the prediction type of a scheduler_config.json.

    Which sampler a folder names does not bind anyone; only what the model was trained with and the
    hints of how its sampler places the steps are kept.
    """
    found = dict(SD1_SCHEDULER)
    # A scheduler's own defaults where its config is silent are the class's: linear, 0.0001, 0.02.
    kind = config.get("beta_schedule", "linear")
    if not isinstance(kind, str) or kind not in _BETA_SCHEDULES:
        known = ", ".join(_BETA_SCHEDULES)
        raise UnsupportedCheckpoint(path, f"beta_schedule {_shown(kind)}: known are {known}")
    found["beta_schedule"] = _BETA_SCHEDULES[kind]
    for key, default in (("beta_start", 0.0001), ("beta_end", 0.02)):
        found[key] = _positive(path, config.get(key, default), key, below=1.0)
    steps = config.get("num_train_timesteps", 1000)
    if not _integer(steps) or not 0 < steps <= _MOST_TIMESTEPS:
        raise InvalidCheckpoint(path, f"num_train_timesteps is {_shown(steps)}")
    found["num_train_timesteps"] = steps
    found["rescale_zero_terminal_snr"] = _flag(path, config, "rescale_betas_zero_snr")
    for key in _HINTS:
        if isinstance(value := config.get(key), str | int):
            found[key] = one_line(value, 40) if isinstance(value, str) else value
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UnsupportedCheckpoint(
            path, f"prediction_type {_shown(prediction)}: known are epsilon, v_prediction"
        )
    return found, prediction


def write_scheduler(scheduler: Config, prediction: str) -> dict[str, Any]:
    """The scheduler_config.json of a folder: DDIM, as it samples SD 1.x."""
    kinds = {ours: theirs for theirs, ours in _BETA_SCHEDULES.items()}
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": scheduler["beta_end"],
        "beta_schedule": kinds[scheduler["beta_schedule"]],
        "beta_start": scheduler["beta_start"],
        "clip_sample": scheduler.get("clip_sample", False),
        "num_train_timesteps": scheduler["num_train_timesteps"],
        "prediction_type": "epsilon" if prediction == UNKNOWN else prediction,
        "rescale_betas_zero_snr": scheduler["rescale_zero_terminal_snr"],
        "set_alpha_to_one": scheduler.get("set_alpha_to_one", False),
        "steps_offset": scheduler.get("steps_offset", 1),
        "timestep_spacing": scheduler.get("timestep_spacing", "leading"),
        "trained_betas": None,
    }


def size_numbers(family: str) -> int:
    """How many numbers stand in SDXL's vector behind the text's state.

    Two each for the original size, the corner and the target size; the refiner is told a score
    instead of the last two.
    """
    return 5 if family == "sdxl-refiner" else 6


def write(
    component: str,
    config: Config,
    size: int,
    *,
    family: str = "sd1",
    is_linear: bool = False,
    pooled: int | None = None,
) -> dict[str, Any]:
    """The config.json of one component for diffusers.

    Args:
        component: its name.
        config: ours.
        size: native size in pixels.
        family: of the model.
        is_linear: whether the transformers' doors are written as linear layers.
        pooled: width of the text's share of the vector, of a model that takes one.
    """
    if component in ("unet", "controlnet"):
        width = None
        if (vector := config.get("vector_channels")) is not None:
            numbers = size_numbers(family)
            width = 256 if pooled is None else (vector - pooled) // numbers
        if component == "unet":
            return write_unet(config, size // 8, is_linear=is_linear, size_width=width)
        return write_controlnet(config, is_linear=is_linear, size_width=width)
    if component == "vae":
        return write_vae(config, size)
    if component == "t2i_adapter":
        return write_t2i_adapter(config)
    if component == "image_encoder":
        return write_image_encoder(config)
    return write_taesd(config) if component == "taesd" else write_text_encoder(config)


# ---------------------------------------------------------------------------------------------
# Checks


def _check(
    path: Path,
    config: Config,
    constants: Mapping[str, tuple[object, ...]],
    without_effect: frozenset[str],
    agreeing: Config,
) -> None:
    for key, value in config.items():
        if key in agreeing:
            if not _same(value, agreeing[key]):
                _disagree(path, key, value, agreeing[key])
        elif key in constants:
            if not any(_same(value, good) for good in constants[key]):
                expected = " or ".join(_shown(good) for good in constants[key])
                raise UnsupportedCheckpoint(
                    path, f"{key} is {_shown(value)}; only {expected} is built here"
                )
        elif key.startswith("_") or key in without_effect or value is None:
            continue
        else:
            raise UnsupportedCheckpoint(
                path, f"unknown setting {one_line(key, 60)!r} is {_shown(value)}"
            )


def _groups(path: Path, config: Config, widths: Sequence[int]) -> int:
    """The groups of every GroupNorm: 32 in all published models, fewer in tiny ones."""
    groups = config.get("norm_num_groups", 32)
    if not _integer(groups) or groups < 1 or any(width % groups for width in widths):
        reason = f"norm_num_groups is {_shown(groups)}, which does not divide widths {list(widths)}"
        raise InvalidCheckpoint(path, reason)
    return groups


def _disagree(path: Path, key: str, says: object, tensors: object) -> None:
    raise InvalidCheckpoint(
        path, f"{key} is {_shown(says)}, but the tensors make it {_shown(tensors)}"
    )


def _same(one: object, other: object) -> bool:
    """Equal in value and kind: 1 is 1.0, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    ours, theirs = _list(one), _list(other)
    if ours is not None and theirs is not None:
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return one == other


def _integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _list(value: object) -> list[object] | None:
    return cast("list[object]", value) if isinstance(value, list) else None


def _per_level(value: object, levels: int) -> list[object]:
    """A setting that may be one for all levels or a list of one each."""
    listed = _list(value)
    return [value] * levels if listed is None else listed


def _positive(path: Path, value: object, key: str = "scaling_factor", below: float = 1e6) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) < 1e30 else math.inf
        if 0 < number < below:
            return number
    raise InvalidCheckpoint(path, f"{key} is {_shown(value)}, expected a number in 0 to {below:g}")


def _flag(path: Path, config: Config, key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise InvalidCheckpoint(path, f"{key} is {_shown(value)}, expected true or false")
    return value


def _shown(value: object) -> str:
    try:
        return one_line(repr(value), 80)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return "a giant number"
