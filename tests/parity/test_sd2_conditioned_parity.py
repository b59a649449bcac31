"""SD 2.x with more than words, beside diffusers' own pipelines: a ControlNet, inpainting, depth.

The models are the tiny SD 2 of test_families_parity.py, with more input channels where a family has
them, each read from a file in CompVis names; diffusers' from the folder that the converter makes of
it. As published, the ControlNet steers a model that predicts v, and the others predict noise.
"""

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
from test_conditioned_parity import BROKEN_CHANNELS, SIDE, drawn, hole, misses, photo, unit_noise
from test_families_parity import PROMPT, Models, configs, families, tiny
from test_sdxl_control_parity import compare, written

import mlx_maple
from maple_convert import convert
from maple_convert.layouts import LAYOUTS, NATIVE
from mlx_maple import images
from mlx_maple.pipeline import StableDiffusion

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = 3
OURS = {"width": SIDE, "height": SIDE, "steps": STEPS, "guidance_scale": 4, "sampler": "ddim"}
THEIRS = {"num_inference_steps": STEPS, "guidance_scale": 4}


@pytest.fixture(scope="module")
def models(family_models) -> Models:
    torch.set_grad_enabled(False)
    yield family_models
    torch.set_grad_enabled(True)


def test_a_controlnet(models, parity_record, tmp_path):
    config = {k: v for k, v in configs("sd2")["unet"].items() if k != "out_channels"}
    config |= {"hint_channels": 3, "hint_widths": [8, 12, 16, 20]}
    network = written(tmp_path / "control", "controlnet", config)
    theirs = diffusers.ControlNetModel.from_pretrained(network, torch_dtype=torch.float32)
    parts = {**models.theirs("sd2").components, "controlnet": theirs}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    scale = {"controlnet_conditioning_scale": 0.7}
    compare(parity_record, "ControlNet", models, pipe, network, family="sd2", **scale)


class Widened:
    """Ours and diffusers' parts of an SD 2 with more input channels; it predicts noise."""

    def __init__(self, channels: int, words: Any, folder: Path) -> None:
        state: tiny.Arrays = {}
        for name, config in configs("sd2").items():
            if name == "unet":
                config = {**config, "in_channels": channels}
            rows = LAYOUTS[name].rows(config, NATIVE)
            arrays = {row.native: recipe.value(row.native, row.native_shape) for row in rows}
            state |= tiny.published(name, config, arrays, *families.spelling("sd2", name))
        file = folder / f"{channels}.safetensors"
        save_file(state, file)
        self.ours: StableDiffusion = mlx_maple.load(
            file, dtype="float32", cache=False, prediction="epsilon"
        )
        out = folder / str(channels)
        convert(file, out, to="diffusers", tokenizer=words)
        self.parts = {
            "unet": diffusers.UNet2DConditionModel.from_pretrained(out / "unet"),
            "vae": diffusers.AutoencoderKL.from_pretrained(out / "vae"),
            "scheduler": diffusers.DDIMScheduler.from_pretrained(out / "scheduler"),
        }


@pytest.fixture(scope="module")
def widened(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("widened")
    text = models.theirs("sd2")

    def made(channels: int, kind: str, **more: Any) -> tuple[StableDiffusion, Any]:
        found = Widened(channels, models.words, folder)
        parts = {**found.parts, "text_encoder": text.text_encoder, "tokenizer": text.tokenizer}
        pipe = getattr(diffusers, kind)(**parts, **more)
        pipe.set_progress_bar_config(disable=True)
        return found.ours, pipe

    return made


def test_inpainting(widened, parity_record):
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    sd, pipe = widened(9, "StableDiffusionInpaintPipeline", **none)
    assert sd.info.family == "sd2-inpainting"
    noise = unit_noise(5)
    arguments = {"image": photo(), "mask": hole(), "mask_blur": 0, "strength": 1.0}
    arguments |= {"latents": noise, **OURS}
    result = sd(PROMPT, **arguments)
    latents, decoded = drawn(
        pipe,
        image=photo(),
        mask_image=hole(),
        strength=1.0,
        height=SIDE,
        width=SIDE,
        latents=pictures.nchw(noise),
        **THEIRS,
    )
    mask = np.asarray(hole(), np.float32) / 255
    reference = latents, [images.composited(one, photo(), mask) for one in decoded]
    pictures.compare(parity_record, "sd2: inpainting, 9 channels", result, *reference)
    for name, break_it in BROKEN_CHANNELS.items():
        with break_it():
            broken = sd(PROMPT, **arguments)
        misses(parity_record, f"sd2: inpainting, {name}", broken, reference)


def test_depth(widened, parity_record):
    none = {"depth_estimator": None, "feature_extractor": None}
    sd, pipe = widened(5, "StableDiffusionDepth2ImgPipeline", **none)
    assert sd.info.family == "sd2-depth"
    depth = Image.linear_gradient("L").resize((SIDE // 8, SIDE // 8))
    arguments = {"image": photo(), "strength": 0.7, "seed": 5, **OURS}
    result = sd(PROMPT, depth_image=depth, **arguments)
    reference = drawn(
        pipe,
        image=photo(),
        depth_map=torch.from_numpy(np.asarray(depth, np.float32))[None],
        strength=0.7,
        generator=torch.Generator().manual_seed(5),
        **THEIRS,
    )
    pictures.compare(parity_record, "sd2: depth, 5 channels", result, *reference)
    turned = sd(PROMPT, depth_image=Image.eval(depth, lambda v: 255 - v), **arguments)
    misses(parity_record, "sd2: depth, far for near", turned, reference)
