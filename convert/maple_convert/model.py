"""A model in whatever form it was published, opened as native components.

``open_model`` sniffs, detects and plans: after it every native parameter has its place in a file
and no weight has been read.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from maple_convert import maple_folder
from maple_convert.detect import TEXT_ENCODERS
from maple_convert.errors import InvalidCheckpoint, UnreadableFile, UnsupportedCheckpoint
from maple_convert.layouts import LAYOUTS
from maple_convert.layouts.diffusers_config import PREDICTIONS, size_numbers
from maple_convert.open_file import open_file
from maple_convert.open_folder import open_folder
from maple_convert.recommend import recommended
from maple_convert.source import Component, SourceModel

__all__ = ["Component", "SourceModel", "WrongUse", "inspect", "open_model"]

# Maple Diffusion's linear preview: scaled latent (4 rows) to RGB in 0..1, the last row its bias
# (madebyollin/maple-diffusion maple-convert.py, aux_output_conv). Fitted to SD 1.x's latents.
SD1_LATENT_RGB = [
    [0.14013671875, 0.126220703125, 0.126220703125],
    [0.0711669921875, 0.10101318359375, 0.07733154296875],
    [-0.03271484375, 0.034515380859375, 0.042633056640625],
    [-0.11407470703125, -0.1383056640625, -0.177978515625],
    [0.423828125, 0.471923828125, 0.473876953125],
]
SD1_UNET_WIDTH = 320  # of the published UNet's finest level
SD1_VAE_WIDTHS = [128, 256, 512, 512]
SD1_SIZE = 512
SIZES = {"sd1": SD1_SIZE, "sd2": SD1_SIZE, "sdxl": 1024}  # by how a family's name begins
V_PREDICTION_SIZE = 768  # of SD 2.x, which predicts v at this size only
NARROW_SIZE = 128  # of a model too narrow for SD's own size; a file cannot say it


class WrongUse(ValueError):
    """The caller's arguments are wrong, whatever the file; ends in exit code 2."""

    exit_code = 2


def open_model(
    path: Path | str,
    *,
    variant: str | None = None,
    ema: bool = False,
    config: Mapping[str, Any] | None = None,
) -> SourceModel:
    """Open any model file or folder and plan every parameter; reads no weights.

    Args:
        path: a checkpoint file, a sharded ``*.index.json``, a diffusers folder (of a model or of
            one component) or a maple folder.
        variant: which files of a diffusers folder, as in ``model.fp16.safetensors``.
        ema: read the EMA copy of the UNet's weights; the file must hold a whole one.
        config: what tensors cannot say, said by the caller; see ``apply_overrides``.

    Raises:
        ConvertError: if it cannot be used; the message says why.
        WrongUse: if ``config`` has settings that do not exist.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            if path.is_dir():
                model = open_folder(path, stack, variant, ema)
            elif variant is not None and path.exists():
                raise UnsupportedCheckpoint(path, "a single file has no variants")
            else:
                model = open_file(path, stack, ema)
        except OSError as error:
            raise UnreadableFile(path, error.strerror or "cannot be read") from error
        _set_defaults(model)
        if config is not None:
            apply_overrides(model, config)
        _check_together(model)
        model.components = {n: model.components[n] for n in LAYOUTS if n in model.components}
        model.stack = stack.pop_all()
    return model


def _set_defaults(model: SourceModel) -> None:
    """Fill in how the model is best used, where its source did not say."""
    unet, vae = model.components.get("unet"), model.components.get("vae")
    if model.layout == "maple":
        return
    family = model.family.partition("-")[0]
    if "width" not in model.defaults:
        size = next((n for name, n in SIZES.items() if family == name), SD1_SIZE)
        if family == "sd2" and model.prediction == "v_prediction":
            size = V_PREDICTION_SIZE
        if unet is not None and unet.config["block_out_channels"][0] < SD1_UNET_WIDTH:
            size = NARROW_SIZE
            model.notes.append(f"A narrow UNet: drawn at {size}x{size} unless told otherwise.")
        model.defaults |= {"width": size, "height": size}
    model.defaults |= {
        "steps": 20,
        "guidance_scale": 7.0 if family == "sdxl" else 7.5,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
    }
    if unet is not None:
        settings, notes = recommended(
            model.path,
            unet.config,
            scheduler=model.scheduler,
            scheduler_class=model.scheduler_class,
        )
        model.defaults |= settings
        model.notes += notes
    is_sd1s = family != "sdxl"  # SD 2.x shares the autoencoder; SDXL's has other latents
    if vae is not None and is_sd1s and list(vae.config["block_out_channels"]) == SD1_VAE_WIDTHS:
        model.latent_rgb_factors = SD1_LATENT_RGB


# What a caller may say of each component: facts that are in no tensor.
_OVERRIDES = {
    "unet": ("num_attention_heads",),
    "vae": ("scaling_factor", "force_upcast"),
    "text_encoder": ("num_attention_heads", "hidden_act", "eos_token_id", "pad_token_id"),
    "text_encoder_2": ("num_attention_heads", "hidden_act", "eos_token_id", "pad_token_id"),
}


def apply_overrides(model: SourceModel, config: Mapping[str, Any]) -> None:
    """Replace what no tensor says by what the caller says.

    Args:
        model: changed in place.
        config: any of ``prediction``; ``scheduler`` and ``defaults`` (some of their settings);
            ``latent_rgb_factors``; and per component, ``unet`` {num_attention_heads}, ``vae``
            {scaling_factor, force_upcast}, ``text_encoder`` and ``text_encoder_2``
            {num_attention_heads, hidden_act, eos_token_id, pad_token_id}.

    Raises:
        WrongUse: a setting that does not exist or that the tensors decide.
        InvalidCheckpoint: a value out of bounds.
    """
    for key, value in config.items():
        if key == "prediction":
            if value not in PREDICTIONS:
                raise WrongUse(f"prediction must be one of {PREDICTIONS}, got {value!r}.")
            model.prediction = value
        elif key == "latent_rgb_factors":
            model.latent_rgb_factors = value
        elif key in ("scheduler", "defaults", *_OVERRIDES):
            if not isinstance(value, Mapping):
                raise WrongUse(f"config {key!r} must be a mapping, got {value!r}.")
            if key in _OVERRIDES:
                known, target = _OVERRIDES[key], None
                if key in model.components:
                    target = model.components[key].config
            else:
                target = model.scheduler if key == "scheduler" else model.defaults
                known = tuple(maple_folder.known_settings(key))
            for name, setting in value.items():  # pyright: ignore[reportUnknownVariableType]
                if name not in known:
                    raise WrongUse(f"config {key!r} has no {name!r}; it has {', '.join(known)}.")
                if target is not None:
                    target[name] = setting
        else:
            raise WrongUse(f"config has no {key!r}.")
    model.notes.append("Settings given by the caller: " + ", ".join(sorted(config)) + ".")


def _check_together(model: SourceModel) -> None:
    """Check each component's settings, and that the components are of one model."""
    for name, component in model.components.items():
        maple_folder.check_component(model.path, name, component.config)
    maple_folder.check_use(model.path, model.scheduler, model.defaults, model.latent_rgb_factors)
    unet, vae = (model.components.get(n) for n in ("unet", "vae"))
    if unet is None:
        return
    context = unet.config["cross_attention_dim"]
    texts = [part.config for name in TEXT_ENCODERS if (part := model.components.get(name))]
    if texts and (width := sum(text["hidden_size"] for text in texts)) != context:
        encoders = "encoder is" if len(texts) == 1 else "encoders are together"
        raise InvalidCheckpoint(
            model.path,
            f"two models in one: the text {encoders} {width} wide and the UNet takes {context}",
        )
    if texts and (vector := unet.config.get("vector_channels")) is not None:
        pooled, numbers = texts[-1]["projection_dim"], size_numbers(model.family)
        rest = vector - (pooled or 0)
        if pooled is None or rest < 2 * numbers or rest % (2 * numbers):
            raise InvalidCheckpoint(
                model.path,
                f"the UNet takes a vector of {vector}, which the text's state of {pooled or 0} and "
                f"{numbers} numbers do not make",
            )
    latent = unet.config["out_channels"]
    if vae is not None and vae.config["latent_channels"] != latent:
        raise InvalidCheckpoint(
            model.path,
            f"two models in one: the autoencoder has {vae.config['latent_channels']} latent "
            f"channels and the UNet {latent}",
        )


def inspect(path: Path | str, *, variant: str | None = None, keys: bool = False) -> dict[str, Any]:
    """Everything that is known of a model without reading its weights, as plain JSON values.

    Args:
        path: anything that ``open_model`` takes.
        variant: which files of a diffusers folder.
        keys: list every parameter, too: its name here and in the file, type and native shape.
    """
    with open_model(path, variant=variant) as model:
        listed = {
            name: {
                slot.row.native: {
                    "dtype": slot.info.dtype,
                    "shape": list(slot.info.shape),
                    "key": slot.key,
                }
                for slot in part.slots
            }
            for name, part in model.components.items()
        }
        reasons: dict[str, int] = {}
        for reason in model.dropped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        unet = model.components.get("unet")
        return {
            "path": str(model.path),
            "container": model.container,
            "family": model.family,
            "title": model.title,
            "layout": model.layout,
            "evidence": model.evidence,
            "prediction": model.prediction,
            "in_channels": None if unet is None else unet.config["in_channels"],
            "ema": model.has_ema,
            "parameters": sum(part.parameters for part in model.components.values()),
            "bytes": sum(part.nbytes for part in model.components.values()),
            "components": {
                name: {
                    "parameters": part.parameters,
                    "bytes": part.nbytes,
                    "tensors": len(part.slots),
                    "dtypes": part.dtypes,
                    "bits": part.bits,
                    "config": part.config,
                }
                for name, part in model.components.items()
            },
            "scheduler": model.scheduler,
            "stored_schedule": model.alphas_cumprod is not None,
            "defaults": model.defaults,
            "tokenizer": {name: str(file) for name, file in model.tokenizer_files.items()},
            "dropped": reasons,
            "notes": model.notes,
            **({"keys": listed} if keys else {}),
        }
