"""A tiny model of SD 1's architecture with random weights, in the files that people have.

Its pictures are noise, but every road from a file to a picture can be walked with it in a moment.
"""

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from maple_convert.layouts import LAYOUTS

sys.path.insert(0, str(Path(__file__).resolve().parent / "convert"))
import gguf_files
from torch_files import write_legacy, write_torch_zip

__all__ = ["compvis", "folder", "maple_folder", "weights", "write_legacy"]

CONFIGS = {
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": None,
        "eos_token_id": 49407,
    },
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "transformer_layers": [1, 0],
        "num_attention_heads": [8, 8],
        "cross_attention_dim": 64,
        "mid_transformer_layers": 1,
        "norm_num_groups": 32,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [32, 32, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "taesd": {"latent_channels": 4, "width": 8},
}
CONFIGS["controlnet"] = {
    **{key: value for key, value in CONFIGS["unet"].items() if key != "out_channels"},
    "hint_channels": 3,
    "hint_widths": [4, 6, 8, 10],
}
CONFIGS["t2i_adapter"] = {
    "hint_channels": 3,
    "channels": CONFIGS["unet"]["block_out_channels"],
    "layers": 2,
    "downscale": 8,
    "halves": [1],
}
PREFIXES = {
    "text_encoder": ("transformers", "cond_stage_model.transformer."),
    "unet": ("compvis", "model.diffusion_model."),
    "vae": ("compvis", "first_stage_model."),
}


def weights(component: str, spelling: str, prefix: str = "", dtype: str = "float16") -> dict:
    """Random weights of one component that keep activations near 1, by published name."""
    generator = np.random.default_rng(sum(map(ord, component)))
    found = {}
    for row in LAYOUTS[component].rows(CONFIGS[component], spelling):
        shape = row.published_shape
        if len(shape) == 1:
            values = np.ones(shape) if row.native.endswith("weight") else np.zeros(shape)
        else:
            values = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        found[prefix + row.published] = values.astype(dtype)
    return found


def compvis(dtype: str = "float16") -> dict:
    """A whole checkpoint as one flat dictionary."""
    return {
        name: value
        for component, (spelling, prefix) in PREFIXES.items()
        for name, value in weights(component, spelling, prefix, dtype).items()
    }


@functools.cache
def folder() -> Path:
    """A folder with the model, its parts and two pictures."""
    made = Path(tempfile.mkdtemp(prefix="tiny-model-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    state = compvis()
    write_torch_zip(made / "model.ckpt", {"state_dict": state, "global_step": 840000})
    save_file(state, made / "model.safetensors")
    save_file(weights("vae", "diffusers"), made / "vae.safetensors")
    gguf_files.save(made / "unet.gguf", weights("unet", "compvis"))
    save_file(weights("taesd", "diffusers"), made / "taesd.safetensors")
    control = weights("controlnet", "compvis", "control_model.")
    save_file(control, made / "control.safetensors")
    save_file(weights("t2i_adapter", "compvis"), made / "adapter.safetensors")
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    photo = np.stack(
        [np.tile(ramp, (128, 1)), np.tile(ramp[:, None], (1, 128)), np.full((128, 128), 90)], -1
    )
    Image.fromarray(photo.astype(np.uint8)).save(made / "photo.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    Image.fromarray(mask).save(made / "mask.png")
    return made


@functools.cache
def maple_folder() -> Path:
    """The same model as a maple folder, which loads in a moment."""
    from maple_convert import convert

    convert(folder() / "model.ckpt", folder() / "maple")
    return folder() / "maple"
