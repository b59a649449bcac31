"""SDXL under a ControlNet and with a T2I-Adapter, beside diffusers' own pipelines, live.

The model is the tiny SDXL of test_families_parity.py; what steers it is made of the same recipe.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import picture_parity as pictures
import pytest
import torch
from network_parity import recipe
from PIL import Image
from safetensors.numpy import save_file
from test_families_parity import NEGATIVE, NOISE, PROMPT, SIZE, Models, configs, families

import mlx_maple
from maple_convert import convert
from maple_convert.layouts import LAYOUTS

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = 3


@pytest.fixture(scope="module")
def models(family_models) -> Models:
    torch.set_grad_enabled(False)
    yield family_models
    torch.set_grad_enabled(True)


def written(folder: Path, component: str, config: dict[str, Any], **config_json: Any) -> Path:
    """A random network as a diffusers folder."""
    is_control = component == "controlnet"
    rows = LAYOUTS[component].rows(config, "diffusers_linear" if is_control else "diffusers")
    state = {}
    for row in rows:
        value = recipe.value(row.native, row.native_shape)
        state[row.published] = np.ascontiguousarray(row.weights.to_published(value))
    folder.mkdir()
    save_file(state, folder / "x.safetensors")
    convert(folder / "x.safetensors", folder / "out", to="diffusers")
    path = folder / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config_json}))
    return folder / "out"


def compare(
    record, name: str, models: Models, pipe: Any, network: Path, family="sdxl", **theirs: Any
) -> None:
    """A drawing of either side that the network steers, and ours without it."""
    pipe.set_progress_bar_config(disable=True)
    picture = Image.effect_mandelbrot((128, 64), (-2, -1, 1, 1), 50).convert("RGB")
    usual = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    latents = pipe(
        PROMPT,
        image=picture,
        latents=pictures.nchw(NOISE),
        output_type="latent",
        **usual,
        **SIZE,
        **theirs,
    ).images
    expected = np.moveaxis(latents.numpy(), 1, -1), pictures.decoded(pipe, latents)
    path = models.file(family)
    sd = mlx_maple.load(path, dtype="float32", cache=False, controlnet=network)
    arguments = {
        "steps": STEPS,
        "guidance_scale": 5.0,
        "negative_prompt": NEGATIVE,
        "sampler": "ddim",
        "schedule": "leading",
        "latents": NOISE,
        "control_image": picture,
        **SIZE,
    }
    result = sd(PROMPT, control_weight=0.7, **arguments)
    pictures.compare(record, f"{family}: {name}, weight 0.7", result, *expected)
    found = pictures.figures(sd(PROMPT, control_weight=0.0, **arguments), *expected)
    record(f"control: {family} without its {name}", **found, bar="must miss one")
    assert not pictures.passes(found)


def test_a_controlnet(models, parity_record, tmp_path):
    unet = configs("sdxl")["unet"]
    config = {k: v for k, v in unet.items() if k != "out_channels"}
    config |= {"hint_channels": 3, "hint_widths": [8, 12, 16, 20]}
    network = written(tmp_path / "control", "controlnet", config, addition_time_embed_dim=8)
    theirs = diffusers.ControlNetModel.from_pretrained(network, torch_dtype=torch.float32)
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **models.theirs("sdxl").components, controlnet=theirs
    )
    scale = {"controlnet_conditioning_scale": 0.7}
    compare(parity_record, "ControlNet", models, pipe, network, **scale)


def test_a_t2i_adapter(models, parity_record, tmp_path):
    widths = families.FAMILIES["sdxl"]["unet"]["block_out_channels"]
    config = {"hint_channels": 3, "channels": [*widths, widths[-1]], "layers": 2}
    network = written(
        tmp_path / "adapter", "t2i_adapter", {**config, "downscale": 16, "halves": [2]}
    )
    theirs = diffusers.T2IAdapter.from_pretrained(network, torch_dtype=torch.float32)
    pipe = diffusers.StableDiffusionXLAdapterPipeline(
        **models.theirs("sdxl").components, adapter=theirs
    )
    scale = {"adapter_conditioning_scale": 0.7}
    compare(parity_record, "T2I-Adapter", models, pipe, network, **scale)
