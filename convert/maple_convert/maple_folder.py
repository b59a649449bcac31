"""The maple folder: its config.json, read strictly and written. docs/format.md is the law.

The folder is ours, but the reader trusts it no more than any other: a config.json may have been
edited, cut short or made to hurt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, one_line
from maple_convert.layouts import LAYOUTS
from maple_convert.layouts.diffusers_config import PREDICTIONS, UNKNOWN
from maple_convert.quantized import BITS, COMPONENTS

FORMAT = "mlx-maple"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
TOKENIZER_FILES = {"vocab": "tokenizer/vocab.json", "merges": "tokenizer/merges.txt"}
DTYPES = ("float16", "bfloat16", "float32")
MIXED = "mixed"  # instead of one of them
_LEVELS = 8


@dataclass(frozen=True)
class Count:
    """An integer setting and its bounds; ``many`` for a list of up to ``most``, one per level."""

    low: int = 1
    high: int = 1 << 16
    many: bool = False
    optional: bool = False
    most: int = _LEVELS


# Every setting of every component. The bounds are far above any published model and low enough
# that a lying file cannot make the tables run for long.
SETTINGS: dict[str, Mapping[str, Count | tuple[object, ...] | type[float]]] = {
    "text_encoder": {
        "vocab_size": Count(high=1 << 22),
        "hidden_size": Count(),
        "intermediate_size": Count(high=1 << 18),
        "num_hidden_layers": Count(high=128),
        "num_attention_heads": Count(high=1024),
        "max_position_embeddings": Count(),
        "hidden_act": ("quick_gelu", "gelu"),
        "projection_dim": Count(optional=True),
        "eos_token_id": Count(0, 1 << 22),
        "pad_token_id": Count(0, 1 << 22),
    },
    "unet": {
        "in_channels": Count(high=64),
        "out_channels": Count(high=64),
        "block_out_channels": Count(many=True),
        "layers_per_block": Count(high=8),
        "transformer_layers": Count(0, 16, many=True),
        "num_attention_heads": Count(high=1024, many=True),
        "cross_attention_dim": Count(),
        "mid_transformer_layers": Count(0, 16, optional=True),
        "norm_num_groups": Count(),
        "time_cond_dim": Count(4, optional=True),
        "up_transformer_layers": Count(0, 16, many=True, most=_LEVELS * 9),
        "vector_channels": Count(optional=True),
    },
    "vae": {
        "in_channels": Count(high=64),
        "out_channels": Count(high=64),
        "latent_channels": Count(high=64),
        "block_out_channels": Count(many=True),
        "layers_per_block": Count(high=8),
        "norm_num_groups": Count(),
        "scaling_factor": float,
        "force_upcast": (True, False),
    },
    "taesd": {"latent_channels": Count(high=64), "width": Count()},
}
# Settings that came with later versions: a folder without them is of a model that has no such part.
_LATER_UNET = ("time_cond_dim", "up_transformer_layers", "vector_channels")
LATER: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("pad_token_id",),
    "text_encoder_2": ("pad_token_id",),
    "unet": _LATER_UNET,
    "vae": ("force_upcast",),
    "controlnet": ("vector_channels",),
}
SETTINGS["text_encoder_2"] = SETTINGS["text_encoder"]
SETTINGS["t2i_adapter"] = {
    "hint_channels": Count(high=64),
    "channels": Count(many=True),
    "layers": Count(high=64),
    "downscale": Count(high=64),
    "halves": Count(many=True),
}
SETTINGS["image_encoder"] = {
    "hidden_size": Count(),
    "intermediate_size": Count(high=1 << 18),
    "num_hidden_layers": Count(high=64),
    "num_attention_heads": Count(high=1024),
    "image_size": Count(high=1024),
    "patch_size": Count(high=1024),
    "projection_dim": Count(),
    "hidden_act": ("quick_gelu", "gelu"),
}
SETTINGS["ip_adapter"] = {
    "projection": ("linear", "mlp", "resampler"),
    "image_dim": Count(),
    "cross_attention_dim": Count(),
    "tokens": Count(high=1024, optional=True),
    "inner_dim": Count(optional=True),
    "num_attention_heads": Count(high=1024, optional=True),
    "num_layers": Count(high=64, optional=True),
    "channels": Count(many=True, most=256),
}
# A ControlNet is a UNet's way down, and something more.
SETTINGS["controlnet"] = {
    **{
        k: v
        for k, v in SETTINGS["unet"].items()
        if k not in ("out_channels", "time_cond_dim", "up_transformer_layers")
    },
    "hint_channels": Count(high=64),
    "hint_widths": Count(many=True),
}
_KEYS = frozenset(
    {
        "format",
        "format_version",
        "family",
        "components",
        "prediction",
        "scheduler",
        "defaults",
        "latent_rgb_factors",
        "tokenizer",
        "alphas_cumprod",
        "source",
        "converter",
        "dtype",
        "quantization",
    }
)
_SCHEDULER: Mapping[str, Count | tuple[object, ...] | type[float]] = {
    "beta_schedule": ("scaled_linear", "linear", "cosine"),
    "beta_start": float,
    "beta_end": float,
    "num_train_timesteps": Count(high=100_000),
    "rescale_zero_terminal_snr": (True, False),
}
_SCHEDULER_HINTS: Mapping[str, Count | tuple[object, ...]] = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "steps_offset": Count(0, 1000),
    "set_alpha_to_one": (True, False),
    "clip_sample": (True, False),
}
_DEFAULTS: Mapping[str, Count | type[float] | type[str]] = {
    "width": Count(8, 8192),
    "height": Count(8, 8192),
    "steps": Count(1, 1000),
    "guidance_scale": float,
    "sampler": str,
    "schedule": str,
}
_LATER_DEFAULTS: Mapping[str, type[float]] = {"guidance_rescale": float}


def is_maple(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a maple folder's, of any version."""
    return config.get("format") == FORMAT


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check a whole config.json against the format.

    Raises:
        UnsupportedCheckpoint: another format version.
        InvalidCheckpoint: anything that the format does not allow, named.
    """
    if not is_maple(config):
        raise InvalidCheckpoint(path, f"format is not {FORMAT!r}")
    version = config.get("format_version")
    if version is True or version != FORMAT_VERSION:
        raise UnsupportedCheckpoint(
            path, f"format_version {_shown(version)}; this version reads {FORMAT_VERSION}"
        )
    if missing := sorted(_KEYS - {"alphas_cumprod"} - set(config)):
        raise InvalidCheckpoint(path, f"lacks {', '.join(missing)}")
    if unknown := sorted(set(config) - _KEYS):
        raise InvalidCheckpoint(path, f"unknown key {one_line(unknown[0], 60)!r}")
    if config["prediction"] not in (*PREDICTIONS, UNKNOWN):
        raise InvalidCheckpoint(path, f"prediction is {_shown(config['prediction'])}")
    if not _text(config["family"]):
        raise InvalidCheckpoint(path, f"family is {_shown(config['family'])}")
    components = _table(path, "components", config["components"])
    if not components:
        raise InvalidCheckpoint(path, "components is empty")
    for name, settings in components.items():
        if name not in LAYOUTS:
            raise InvalidCheckpoint(path, f"unknown component {one_line(name, 60)!r}")
        check_component(path, name, _table(path, f"components.{name}", settings))
    _check_quantization(path, config["quantization"], components)
    check_use(path, config["scheduler"], config["defaults"], config["latent_rgb_factors"])
    if config["dtype"] not in (*DTYPES, MIXED):
        raise InvalidCheckpoint(path, f"dtype is {_shown(config['dtype'])}")
    source = _table(path, "source", config["source"])
    if set(source) != {"file", "sha256"} or not _text(source["file"]):
        raise InvalidCheckpoint(path, f"source is {_shown(source)}")
    if source["sha256"] is not None and not _text(source["sha256"]):
        raise InvalidCheckpoint(path, f"source.sha256 is {_shown(source['sha256'])}")
    if not _text(config["converter"]):
        raise InvalidCheckpoint(path, f"converter is {_shown(config['converter'])}")
    if config["tokenizer"] not in (None, "tokenizer/"):
        raise InvalidCheckpoint(path, f"tokenizer is {_shown(config['tokenizer'])}")
    if config.get("alphas_cumprod") is not None:
        check_alphas(path, _numbers(path, "alphas_cumprod", config["alphas_cumprod"]))


def _check_quantization(path: Path, value: object, components: Mapping[str, Any]) -> None:
    """Check what is said of quantised weights: nothing, or the bits and which components."""
    if value is None:
        return
    found = _table(path, "quantization", value)
    if set(found) != {"bits", "components"}:
        raise InvalidCheckpoint(path, f"quantization is {_shown(found)}")
    bits, names = found["bits"], cast(object, found["components"])
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise InvalidCheckpoint(path, f"quantization.bits is {_shown(bits)}")
    listed = cast("list[object]", names) if isinstance(names, list) else []
    known = [name for name in COMPONENTS if name in components]
    if not listed or any(name not in known for name in listed) or len(listed) > len(known):
        raise InvalidCheckpoint(path, f"quantization.components is {_shown(found['components'])}")


def check_component(path: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Check one component's settings: all there, none more, in bounds, and fit for one another."""
    later = {key: SETTINGS[name][key] for key in LATER.get(name, ())}
    needed = {key: rule for key, rule in SETTINGS[name].items() if key not in later}
    _check_table(path, f"components.{name}", settings, needed, later)
    if name in ("unet", "controlnet"):
        per_level = ("block_out_channels", "transformer_layers", "num_attention_heads")
        if len({len(settings[key]) for key in per_level}) != 1:
            raise InvalidCheckpoint(path, f"{name}: {', '.join(per_level)} differ in length")
    if name in ("unet", "vae", "controlnet") and (
        odd := [n for n in settings["block_out_channels"] if n % settings["norm_num_groups"]]
    ):
        groups = settings["norm_num_groups"]
        raise InvalidCheckpoint(path, f"{name}: width {odd[0]} is no multiple of {groups}")
    heads: list[tuple[int, int]] = []
    if name in ("unet", "controlnet"):
        widths = settings["block_out_channels"]
        heads = list(zip(widths, settings["num_attention_heads"], strict=True))
    if name == "unet" and (ups := settings.get("up_transformer_layers")) is not None:
        _check_ups(path, settings, ups)
    if name in ("text_encoder", "text_encoder_2"):
        heads = [(settings["hidden_size"], settings["num_attention_heads"])]
        for key in ("eos_token_id", "pad_token_id"):
            if settings.get(key, 0) >= settings["vocab_size"]:
                raise InvalidCheckpoint(path, f"{name}: {key} lies outside the vocabulary")
    if name == "image_encoder":
        heads = [(settings["hidden_size"], settings["num_attention_heads"])]
        if settings["image_size"] % settings["patch_size"]:
            raise InvalidCheckpoint(path, f"{name}: patches do not divide its image_size")
    if name == "ip_adapter":
        _check_projection(path, settings)
    for width, n in heads:
        if width % n:
            raise InvalidCheckpoint(path, f"{name}: width {width} does not divide into {n} heads")


def _check_projection(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that an IP-Adapter has the numbers of its kind of projection, and no others."""
    kind: str = settings["projection"]
    needed = {"linear": {"tokens"}, "mlp": set[str]()}
    said = {
        key
        for key in ("tokens", "inner_dim", "num_attention_heads", "num_layers")
        if settings[key] is not None
    }
    if said != needed.get(kind, {"tokens", "inner_dim", "num_attention_heads", "num_layers"}):
        listed = ", ".join(sorted(said)) or "none of its numbers"
        raise InvalidCheckpoint(path, f"ip_adapter: a {kind} projection with {listed}")


def _check_ups(path: Path, settings: Mapping[str, Any], ups: Sequence[int]) -> None:
    """Check the depths on the way up: one a residual block, and a level has all or none."""
    layers: int = settings["layers_per_block"] + 1
    levels = [ups[start : start + layers] for start in range(0, len(ups), layers)]
    if len(ups) != layers * len(settings["block_out_channels"]) or any(
        min(level) == 0 < max(level) for level in levels
    ):
        raise InvalidCheckpoint(path, f"unet: up_transformer_layers is {_shown(list(ups))}")


def known_settings(table: str) -> list[str]:
    """The settings of ``scheduler`` or ``defaults``."""
    if table == "scheduler":
        return [*_SCHEDULER, *_SCHEDULER_HINTS]
    return [*_DEFAULTS, *_LATER_DEFAULTS]


def check_use(
    path: Path, scheduler: Mapping[str, Any], defaults: Mapping[str, Any], factors: object
) -> None:
    """Check how a model is to be used: noise schedule, defaults and preview factors."""
    _check_table(path, "scheduler", scheduler, _SCHEDULER, _SCHEDULER_HINTS)
    _check_table(path, "defaults", defaults, _DEFAULTS, _LATER_DEFAULTS)
    check_factors(path, factors)


def check_factors(path: Path, factors: object) -> None:
    """Check preview factors: None, or four rows of weights and one of biases, each for RGB."""
    if factors is None:
        return
    rows = cast("list[object]", factors) if isinstance(factors, list) else []
    if len(rows) != 5 or any(len(_numbers(path, "latent_rgb_factors", row)) != 3 for row in rows):
        raise InvalidCheckpoint(path, "latent_rgb_factors is not 5 rows of 3 numbers")


def check_alphas(path: Path, alphas: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Check a stored noise schedule: falling, within 0 to 1.

    Raises:
        InvalidCheckpoint: if it is none.
    """
    values = np.asarray(alphas, np.float64)
    if (
        values.ndim != 1
        or not 1 <= values.size <= 100_000
        or not np.isfinite(values).all()
        or values.min() < 0
        or values.max() > 1
        or (np.diff(values) > 0).any()
    ):
        raise InvalidCheckpoint(path, "alphas_cumprod is no noise schedule, falling from 1 to 0")
    return values


def _check_table(
    path: Path,
    name: str,
    value: object,
    required: Mapping[str, object],
    optional: Mapping[str, object] | None = None,
) -> None:
    found = _table(path, name, value)
    known = {**required, **(optional or {})}
    if missing := [key for key in required if key not in found]:
        raise InvalidCheckpoint(path, f"{name} lacks {missing[0]}")
    for key, setting in found.items():
        if key not in known:
            raise InvalidCheckpoint(path, f"{name}: unknown key {one_line(key, 60)!r}")
        if not _allowed(setting, known[key]):
            raise InvalidCheckpoint(path, f"{name}.{key} is {_shown(setting)}")


def _allowed(value: object, rule: object) -> bool:
    if isinstance(rule, Count):
        if rule.many:
            items = cast("list[object]", value) if isinstance(value, list | tuple) else []
            one = Count(rule.low, rule.high)
            return 1 <= len(items) <= rule.most and all(_allowed(item, one) for item in items)
        if value is None:
            return rule.optional
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and rule.low <= cast(int, value) <= rule.high
    if rule is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= cast(float, value) < 1e6
    if rule is str:
        return isinstance(value, str) and value.isprintable() and len(value) < 64
    return any(value is good or (value == good and isinstance(good, str)) for good in _tuple(rule))


def _text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1024


def _tuple(rule: object) -> tuple[object, ...]:
    assert isinstance(rule, tuple)
    return cast("tuple[object, ...]", rule)


def _table(path: Path, name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidCheckpoint(path, f"{name} is {_shown(value)}, expected an object")
    return cast("Mapping[str, Any]", value)


def _numbers(path: Path, name: str, value: object) -> list[float]:
    items = cast("list[object]", value) if isinstance(value, list) else None
    if items is None or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(float(x))
        for x in items
    ):
        raise InvalidCheckpoint(path, f"{name} is not a list of numbers")
    return cast("list[float]", items)


def _shown(value: object) -> str:
    try:
        return one_line(repr(value), 80)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return "a giant number"


__all__ = [
    "CONFIG_NAME",
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "LATER",
    "MIXED",
    "SETTINGS",
    "TOKENIZER_FILES",
    "check_alphas",
    "check_component",
    "check_config",
    "check_use",
    "is_maple",
    "known_settings",
]
