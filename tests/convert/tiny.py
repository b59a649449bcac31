"""Tiny random models of SD 1.x's architecture in every published layout, made without torch.

A model is a dictionary of native arrays per component; ``published`` spells it in a layout, and the
``write_*`` functions put it into files as they lie on people's disks.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch_files import write_legacy, write_torch_zip

from maple_convert.layouts import LAYOUTS, NATIVE, diffusers_config
from maple_convert.tensors import TensorInfo
from maple_convert.write import Entry, write_safetensors

# Uneven on purpose: two levels with transformers and one without, a skip that keeps its width.
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 77,
        "projection_dim": None,
        "num_attention_heads": 1,
        "hidden_act": "quick_gelu",
        "eos_token_id": 119,
    },
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64, 32],
        "layers_per_block": 1,
        "transformer_layers": [1, 2, 0],
        "mid_transformer_layers": 1,
        "cross_attention_dim": 64,
        "num_attention_heads": [8, 8, 8],
        "norm_num_groups": 32,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
}
TAESD = {"latent_channels": 4, "width": 8}

# Component -> spelling and prefix in a CompVis file.
COMPVIS = {
    "text_encoder": ("transformers", "cond_stage_model.transformer."),
    "unet": ("compvis", "model.diffusion_model."),
    "vae": ("compvis", "first_stage_model."),
}
UNET, VAE, TEXT = (COMPVIS[name][1] for name in ("unet", "vae", "text_encoder"))
CLASSES = {
    "text_encoder": ("CLIPTextModel", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
    "taesd": ("AutoencoderTiny", "diffusion_pytorch_model"),
}
NOISE = np.random.default_rng(0).standard_normal(200_003, np.float32) * np.float32(0.02)
Arrays = dict[str, np.ndarray]


def arrays(component: str, config: Mapping[str, Any], dtype: Any = np.float32) -> Arrays:
    """Random native arrays of one component; the same for the same shapes."""
    found = {}
    for n, row in enumerate(LAYOUTS[component].rows(config, NATIVE)):
        start, size = 7919 * n % (NOISE.size // 2), math.prod(row.native_shape)
        values = NOISE[start:][:size]
        if values.size < size:
            values = np.resize(NOISE, size)
        found[row.native] = values.reshape(row.native_shape).astype(dtype)
    return found


def model(dtype: Any = np.float32, **changes: Mapping[str, Any]) -> dict[str, Arrays]:
    """Random native arrays of a whole model; ``changes`` are settings per component."""
    return {name: arrays(name, config, dtype) for name, config in configs(**changes).items()}


def configs(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tiny configs with some settings changed."""
    return {name: {**config, **changes.get(name, {})} for name, config in CONFIGS.items()}


def published(
    component: str, config: Mapping[str, Any], native: Arrays, spelling: str, prefix: str = ""
) -> Arrays:
    """One component in a published spelling, weights as torch lays them out."""
    state: Arrays = {}
    for row in LAYOUTS[component].rows(config, spelling):  # those that share a tensor in order
        name, values = prefix + row.published, row.weights.to_published(native[row.native])
        if name in state:
            values = np.concatenate([state[name], values])
        state[name] = np.ascontiguousarray(values)
    return state


def compvis(dtype: Any = np.float32, **changes: Mapping[str, Any]) -> Arrays:
    """A whole model as a CompVis state dict, without buffers."""
    settings, native = configs(**changes), model(dtype, **changes)
    state: Arrays = {}
    for name, (spelling, prefix) in COMPVIS.items():
        state |= published(name, settings[name], native[name], spelling, prefix)
    return state


def alphas_cumprod(dtype: Any = np.float32) -> np.ndarray:
    """SD 1.x's noise schedule as its checkpoints store it."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas).astype(dtype)


def save_safetensors(path: Path, state: Mapping[str, np.ndarray], dtype: str | None = None) -> Path:
    """Write arrays as safetensors; ``dtype`` "bfloat16" means uint16 arrays are its bits."""

    if dtype is None:
        save_file(dict(state), path)
        return path

    def entry(name: str, array: np.ndarray) -> Entry:
        kind = dtype if dtype == "bfloat16" and array.dtype == np.uint16 else array.dtype.name
        return Entry(name, TensorInfo(kind, array.shape), lambda: [lambda: array])

    write_safetensors(path, [entry(name, array) for name, array in state.items()])
    return path


def save_ckpt(path: Path, state: Mapping[str, np.ndarray], *, legacy: bool = False) -> Path:
    """Write a .ckpt with the usual things beside its ``state_dict``."""
    tree = {"epoch": 3, "global_step": 470000, "state_dict": dict(state)}
    (write_legacy if legacy else write_torch_zip)(path, tree)
    return path


def save_diffusers(
    folder: Path,
    dtype: Any = np.float32,
    *,
    spellings: Mapping[str, str] | None = None,
    variant: str = "",
    binary: bool = False,
    **changes: Mapping[str, Any],
) -> Path:
    """Write a diffusers folder.

    Args:
        folder: made here.
        dtype: of the weights.
        spellings: of components where not today's.
        variant: as in ``model.fp16.safetensors``.
        binary: pickled ``.bin`` files instead of safetensors.
        changes: settings per component.
    """
    settings, native = configs(**changes), model(dtype, **changes)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    index |= {"safety_checker": [None, None], "scheduler": ["diffusers", "PNDMScheduler"]}
    for name, config in settings.items():
        kind, stem = CLASSES[name]
        spelling = (spellings or {}).get(
            name, "transformers" if name == "text_encoder" else "diffusers"
        )
        state = published(name, config, native[name], spelling)
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", kind]
        (folder / name).mkdir(parents=True)
        if binary:
            stem = "pytorch_model" if name == "text_encoder" else stem
            write_torch_zip(folder / name / f"{stem}{variant}.bin", state)
        else:
            save_safetensors(folder / name / f"{stem}{variant}.safetensors", state)
        write_json(folder / name / "config.json", diffusers_config.write(name, config, 64))
    scheduler = {**diffusers_config.write_scheduler(diffusers_config.SD1_SCHEDULER, "epsilon")}
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """A vocabulary of ``size`` words that fits nothing but the check of its ids."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "vocab.json", {f"w{n}": n for n in range(size)})
    (folder / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """JSON as diffusers writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Change some keys of a JSON file; a value of ``...`` removes the key."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value = {k: v for k, v in {**value, **changes}.items() if v is not ...}
    write_json(path, value)


def everything(opened: Any, dtype: str | None = None) -> dict[str, Arrays]:
    """All native arrays of an open model, by component."""
    return {
        name: {key: tensor.array.copy() for key, tensor in part.tensors(dtype)}
        for name, part in opened.components.items()
    }


def same_bits(one: Mapping[str, Arrays], other: Mapping[str, Arrays]) -> bool:
    """Whether two models are equal in names, shapes, types and every bit."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(
            array.dtype == other[name][key].dtype
            and array.shape == other[name][key].shape
            and array.tobytes() == other[name][key].tobytes()
            for key, array in arrays_.items()
        )
        for name, arrays_ in one.items()
    )
