"""Where components lie inside one file, and which other keys published files carry.

A CompVis checkpoint is one flat dictionary: every component below its own prefix, beside the
buffers of the noise schedule and, in files that were not pruned, EMA copies and optimiser state.
Files of one component may come with or without the prefix.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from maple_convert.layouts.parts import Row, View
from maple_convert.tensors import TensorInfo


@dataclass(frozen=True)
class Where:
    """One way in which a file may hold a component.

    Attributes:
        component: a key of ``LAYOUTS``.
        spelling: one of its spellings.
        prefixes: what may stand before its names.
        marks: the component is there when any tensor lies below one of these.
        never: but not when one lies below one of these.
        under: what the tables put before the names that the file leaves out.
    """

    component: str
    spelling: str
    prefixes: tuple[str, ...]
    marks: tuple[str, ...]
    never: tuple[str, ...] = ()
    under: str = ""


_ATTENTION_2022 = tuple(
    f"{half}.mid_block.attentions.0.{name}"
    for half in ("encoder", "decoder")
    for name in ("query", "key", "value", "proj_attn")
)
_CONTROL_COMPVIS = ("input_hint_block", "zero_convs")
_CONTROL_DIFFUSERS = ("controlnet_cond_embedding", "controlnet_down_blocks")
_CONTROLNET = ("control_model.", "")
_UNET = ("model.diffusion_model.", "")
_VAE = ("first_stage_model.", "vae.", "")
_CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "")
# SDXL's refiner has the second of SDXL's encoders, and no other.
_OPEN_CLIP = ("cond_stage_model.model.",)
_OPEN_CLIP_2 = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
_SDCPP_2 = ("cond_stage_model.1.transformer.",)
# A half of TAESD by itself; stable-diffusion.cpp puts the prefix before it in GGUF files.
_TAESD_ENCODER = ("", "first_stage_model.encoder.")
_TAESD_DECODER = ("", "first_stage_model.decoder.")

WHERE = (
    Where("unet", "compvis", _UNET, ("input_blocks", "output_blocks"), _CONTROL_COMPVIS),
    Where("unet", "diffusers", _UNET, ("down_blocks", "up_blocks"), _CONTROL_DIFFUSERS),
    Where("t2i_adapter", "compvis", ("",), ("body.0.block1",)),
    Where("t2i_adapter", "diffusers", ("",), ("adapter.body.0.resnets",)),
    Where("image_encoder", "transformers", ("",), ("vision_model.encoder",)),
    Where("image_encoder", "openclip", ("visual.",), ("transformer.resblocks",)),
    Where("ip_adapter", "original", ("",), ("image_proj", "ip_adapter")),
    Where("controlnet", "compvis", _CONTROLNET, _CONTROL_COMPVIS),
    Where("controlnet", "diffusers", _CONTROLNET, _CONTROL_DIFFUSERS),
    Where("vae", "compvis", _VAE, ("encoder.down", "decoder.up")),
    Where("vae", "diffusers", _VAE, ("encoder.down_blocks", "decoder.up_blocks"), _ATTENTION_2022),
    Where("vae", "diffusers_2022", _VAE, _ATTENTION_2022),
    Where("text_encoder", "transformers", _CLIP, ("text_model.encoder", "text_model.embeddings")),
    Where(
        "text_encoder",
        "transformers_flat",
        _CLIP,
        ("encoder.layers.0.self_attn", "embeddings.token_embedding"),
    ),
    Where("text_encoder", "openclip", _OPEN_CLIP, ("token_embedding",)),
    Where("text_encoder_2", "openclip", _OPEN_CLIP_2, ("token_embedding",)),
    Where("text_encoder_2", "sdcpp", _SDCPP_2, ("text_model.encoder", "text_model.embeddings")),
    Where("taesd", "diffusers", ("",), ("decoder.layers",)),
    Where("taesd", "upstream", ("",), ("encoder.1.conv", "decoder.3.conv"), ("decoder.2",)),
    Where("taesd", "upstream_from_0", ("",), ("decoder.2.conv",)),
    # One half alone in its file; the other half lies beside it.
    Where("taesd encoder", "upstream", _TAESD_ENCODER, ("1.conv",), (), "encoder."),
    Where(
        "taesd decoder", "upstream", _TAESD_DECODER, ("3.conv",), ("1.conv", "2.conv"), "decoder."
    ),
    Where("taesd decoder", "upstream_from_0", _TAESD_DECODER, ("2.conv",), ("1.conv",), "decoder."),
)

SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "lvlb_weights",
    "log_snr",
    "denoiser.sigmas",
    "denoiser.log_sigmas",
    "model_sampling.sigmas",
    "model_sampling.log_sigmas",
)
# Of a whole CLIP, in transformers' names and in OpenCLIP's; its image encoder needs none of it.
TEXT_HALF = (
    *("text_model.", "text_projection", "logit_scale", "logit_bias", "attn_mask"),
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final."),
)
EMA_PREFIX = "model_ema."
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
POSITION_IDS = (
    *(
        f"{prefix}{inner}embeddings.position_ids"
        for prefix in (*_CLIP, *_SDCPP_2)
        for inner in ("", "text_model.")
    ),
    "vision_model.embeddings.position_ids",
)
LOGIT_SCALES = tuple(
    f"{prefix}logit_scale"
    for prefix in ("cond_stage_model.", "cond_stage_model.1.", *_CLIP, *_OPEN_CLIP, *_OPEN_CLIP_2)
)
V_PREDICTION_MARK = "v_pred"
ZERO_SNR_MARK = "ztsnr"
ALPHAS = "alphas_cumprod"

# Every key that is left out, and why; a name here is exact, a name in DROPPED_BELOW is a prefix.
DROPPED: Mapping[str, str] = {
    **dict.fromkeys(SCHEDULE_BUFFERS, "noise schedule, rebuilt from alphas_cumprod or the betas"),
    **dict.fromkeys(EMA_COUNTERS, "counter of the EMA copy"),
    **dict.fromkeys(POSITION_IDS, "position_ids, which only count"),
    ALPHAS: "kept as the model's noise schedule, not as a weight",
    V_PREDICTION_MARK: "mark, read as v-prediction",
    ZERO_SNR_MARK: "mark, read as zero terminal SNR",
    "scale_factor": "training buffer",
    **dict.fromkeys(LOGIT_SCALES, "logit_scale, used in CLIP's training only"),
}
DROPPED_BELOW: Mapping[str, str] = {
    EMA_PREFIX: "EMA copy of the weights (a UNet's is used with --ema)",
    "depth_model.": "network that estimates depth; a depth map is given instead",
    "first_stage_model.loss.": "loss of the autoencoder's training",
    "loss.": "loss of the autoencoder's training",
    "optimizer_states.": "optimiser state",
    "optimizer.": "optimiser state",
    "lr_schedulers.": "learning rate schedule",
    "callbacks.": "state of the training framework",
    "loops.": "state of the training framework",
}


def find(views: Mapping[str, View]) -> list[tuple[Where, str]]:
    """Every component that a file holds: its entry above and the prefix it was found below.

    Args:
        views: a view of the file for each prefix of ``PREFIXES``.
    """
    return [
        (where, prefix)
        for where in WHERE
        for prefix in where.prefixes
        if any(map(views[prefix].holds, where.marks))
        and not any(map(views[prefix].holds, where.never))
    ]


PREFIXES = tuple(dict.fromkeys(prefix for where in WHERE for prefix in where.prefixes))


def dropped_reason(key: str) -> str | None:
    """Why a key of a file is left out, or None where it is not one of the known ones."""
    if key in DROPPED:
        return DROPPED[key]
    for prefix, reason in DROPPED_BELOW.items():
        if key.startswith(prefix):
            return reason
    return None


def ema_name(row: Row) -> str:
    """The name of the EMA copy of one of the UNet's parameters: dots removed.

    CompVis ldm/modules/ema.py names a copy after the parameter of ``model``, whose one child is
    ``diffusion_model``.
    """
    return EMA_PREFIX + f"diffusion_model.{row.published}".replace(".", "")


def holds_ema(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a file carries EMA copies of a UNet."""
    return any(key.startswith(f"{EMA_PREFIX}diffusion_model") for key in tensors)
