"""Drawings that are given more than words, beside diffusers' own pipelines for each.

The networks are the trial model's, with input channels or an embedding added to its UNet and a
ControlNet made from it; what is added has random weights, large enough to matter. Both sides read
the same folders. Each control breaks one thing and must miss a bar.
"""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import diffusers
import mlx.core as mx
import numpy as np
import picture_parity
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from picture_parity import compare, decoded, figures, nchw, passes
from PIL import Image

import mlx_maple
from mlx_maple import control, images, preprocess
from mlx_maple.drawing import denoise

pytestmark = [
    pytest.mark.parity,
    pytest.mark.weights,
    # diffusers 0.42.1 calls deprecated parts of itself, of torch and of numpy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT = "a blue maple leaf on a yellow background"
STEPS = 3
SIDE = 64  # half of what the model was made for: the numbers are the same test
OURS = {"width": SIDE, "height": SIDE, "steps": STEPS, "guidance_scale": 4, "sampler": "ddim"}
THEIRS = {"num_inference_steps": STEPS, "guidance_scale": 4}


def photo() -> Image.Image:
    return picture_parity.photo().resize((SIDE, SIDE))


def hole() -> Image.Image:
    return picture_parity.hole().resize((SIDE, SIDE), Image.Resampling.NEAREST)


def unit_noise(seed: int) -> np.ndarray:
    return picture_parity.unit_noise(seed, 1, SIDE // 8, SIDE // 8)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def trial(weights) -> Path:
    return weights / "emoji-trial" / "diffusers"


@pytest.fixture(scope="module")
def parts(trial) -> dict:
    """The trial model's networks in torch."""
    found = diffusers.StableDiffusionPipeline.from_pretrained(trial)
    found.to(dtype=torch.float32)
    return {
        **found.components,
        "safety_checker": None,
        "feature_extractor": None,
    }


def widened(unet: UNet2DConditionModel, channels: int, **more) -> UNet2DConditionModel:
    """The UNet with more input channels, or something else that it lacks; those at random."""
    torch.manual_seed(channels)
    config = {**unet.config, "in_channels": channels, **more}
    other = UNet2DConditionModel.from_config(config).eval()
    state = other.state_dict()
    for name, value in unet.state_dict().items():
        if name == "conv_in.weight":
            extra = 0.05 * torch.randn(value.shape[0], channels - 4, 3, 3)
            value = torch.cat([value, extra], 1)
        state[name] = value
    other.load_state_dict(state)
    return other


def folder(trial: Path, place: Path, unet: UNet2DConditionModel, name: str) -> Path:
    """The trial's folder with another UNet, as a pipeline of that class keeps it."""
    shutil.copytree(trial, place)
    shutil.rmtree(place / "unet")
    unet.save_pretrained(place / "unet")
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    return place


def load(path: Path, **more):
    return mlx_maple.load(path, dtype="float32", cache=False, **more)


def made(kind: str, parts: dict, **more):
    """One of diffusers' pipelines of these networks, taking the mean for a sample."""
    found = getattr(diffusers, kind)(**{**parts, **more}, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def drawn(pipe, **arguments) -> tuple[np.ndarray, list[Image.Image]]:
    module = sys.modules[type(pipe).__module__]
    retrieve = getattr(module, "retrieve_latents", None)

    def mean(encoded, generator=None, sample_mode="sample"):
        return retrieve(encoded, generator, "argmax")

    with mock.patch.object(module, "retrieve_latents", mean, create=True):
        latents = pipe(prompt=PROMPT, output_type="latent", **arguments).images
    return np.moveaxis(latents.numpy(), 1, -1), decoded(pipe, latents)


def misses(record, name: str, result, reference) -> None:
    found = figures(result, *reference)
    record(f"control: {name}", **found, bar="must miss one")
    assert not passes(found)


# Nine channels: inpainting -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def inpainting(trial, parts, tmp_path_factory):
    unet = widened(parts["unet"], 9)
    place = tmp_path_factory.mktemp("nine") / "model"
    sd = load(folder(trial, place, unet, "StableDiffusionInpaintPipeline"))
    return sd, made("StableDiffusionInpaintPipeline", parts, unet=unet)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_with_nine_channels(inpainting, parity_record, strength):
    sd, pipe = inpainting
    assert sd.info.family == "sd1-inpainting" and sd.info.notes == ()
    arguments = {"image": photo(), "mask": hole(), "mask_blur": 0, "strength": strength, "seed": 5}
    result = sd(PROMPT, **arguments, **OURS)
    latents, pictures = drawn(
        pipe,
        image=photo(),
        mask_image=hole(),
        strength=strength,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator().manual_seed(5),
        **THEIRS,
    )
    mask = np.asarray(hole(), np.float32) / 255
    reference = latents, [images.composited(one, photo(), mask) for one in pictures]
    compare(parity_record, f"inpainting, 9 channels, strength {strength:g}", result, *reference)
    outside = mask == 0
    assert (np.asarray(result.images[0])[outside] == np.asarray(photo())[outside]).all()
    if strength == 1:
        for name, break_it in BROKEN_CHANNELS.items():
            with break_it():
                misses(
                    parity_record, f"inpainting, {name}", sd(PROMPT, **arguments, **OURS), reference
                )


def _other_channels(change):
    plain = control.input_channels
    return mock.patch.object(denoise, "input_channels", lambda *a, **k: change(plain(*a, **k)))


BROKEN_CHANNELS = {
    "mask behind the picture": lambda: _other_channels(
        lambda x: mx.concatenate([x[..., 1:], x[..., :1]], axis=-1)
    ),
    "mask black for white": lambda: _other_channels(
        lambda x: mx.concatenate([1 - x[..., :1], x[..., 1:]], axis=-1)
    ),
}


# Eight channels: an instruction ------------------------------------------------------------------


@pytest.fixture(scope="module")
def editing(trial, parts, tmp_path_factory):
    unet = widened(parts["unet"], 8)
    place = tmp_path_factory.mktemp("eight") / "model"
    sd = load(folder(trial, place, unet, "StableDiffusionInstructPix2PixPipeline"))
    return sd, made("StableDiffusionInstructPix2PixPipeline", parts, unet=unet)


def test_an_edit_by_instruction(editing, parity_record):
    scale = 1.5
    sd, pipe = editing
    assert sd.info.family == "sd1-pix2pix"
    noise = unit_noise(8)
    result = sd(PROMPT, image=photo(), image_guidance_scale=scale, latents=noise, **OURS)
    reference = drawn(
        pipe, image=photo(), image_guidance_scale=scale, latents=nchw(noise), **THEIRS
    )
    compare(parity_record, f"edit by instruction, image guidance {scale:g}", result, *reference)
    assert result.settings[0].image_guidance_scale == scale
    arguments = {"image": photo(), "latents": noise, **OURS}
    broken = sd(PROMPT, image_guidance_scale=1.6, **arguments)
    misses(parity_record, "edit, image guidance 1.6", broken, reference)
    factor = sd.configs["vae"].scaling_factor
    with _other_channels(lambda x: x * factor):
        broken = sd(PROMPT, **arguments)
    misses(parity_record, "edit, the picture's latents scaled", broken, reference)


# A scale that the network is told ----------------------------------------------------------------


def test_a_latent_consistency_model(trial, parts, parity_record, tmp_path):
    unet = widened(parts["unet"], 4, time_cond_proj_dim=16)
    torch.manual_seed(3)
    unet.time_embedding.cond_proj.weight.copy_(0.3 * torch.randn(64, 16))
    place = folder(trial, tmp_path / "lcm", unet, "LatentConsistencyModelPipeline")
    sd = load(place)
    assert sd.defaults["sampler"] == "lcm" and sd.defaults["steps"] == 4
    scheduler = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    pipe = made("LatentConsistencyModelPipeline", parts, unet=unet, scheduler=scheduler)
    noise = unit_noise(12)
    reference = drawn(
        pipe,
        num_inference_steps=4,
        guidance_scale=6.0,
        height=SIDE,
        width=SIDE,
        latents=nchw(noise),
        generator=torch.Generator().manual_seed(9),
    )
    generator = torch.Generator().manual_seed(9)
    draws = [torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator).numpy() for _ in range(4)]
    arguments = {
        "latents": noise,
        "step_noise": np.stack([np.moveaxis(draw, 1, -1) for draw in draws]),
        "width": SIDE,
        "height": SIDE,
    }
    result = sd(PROMPT, guidance_scale=6.0, **arguments)
    compare(parity_record, "LCM, 4 steps, guidance told", result, *reference)
    assert result.settings[0].guidance_scale == 6
    broken = sd(PROMPT, guidance_scale=7.0, **arguments)
    misses(parity_record, "LCM, told 7 for 6", broken, reference)


# ControlNets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steering(trial, parts, tmp_path_factory):
    place = tmp_path_factory.mktemp("control")
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(8, 8, 16, 16)
        ).eval()
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            layer.weight.copy_(0.03 * torch.randn_like(layer.weight))
        for value in net.controlnet_cond_embedding.parameters():
            value.copy_(torch.randn_like(value) * (1.4 / value[0].numel() ** 0.5))
        net.save_pretrained(place / f"net{seed}")
        nets.append(net)
    paths = [place / "net0", place / "net1"]
    return load(trial, controlnet=paths[0]), load(trial, controlnet=paths), nets


def edges() -> Image.Image:
    return preprocess.canny(photo())


def test_a_controlnet(steering, parts, parity_record):
    sd, _, nets = steering
    noise = unit_noise(4)
    pipe = made("StableDiffusionControlNetPipeline", parts, controlnet=nets[0])
    usual = {"image": edges(), "latents": nchw(noise), **THEIRS}
    arguments = {"control_image": photo(), "control_preprocess": "canny", "latents": noise, **OURS}
    reference = drawn(pipe, **usual, controlnet_conditioning_scale=0.8)
    result = sd(PROMPT, control_weight=0.8, **arguments)
    compare(parity_record, "ControlNet, weight 0.8", result, *reference)
    plain = {**arguments, "control_preprocess": "none"}
    misses(
        parity_record, "ControlNet, no edges", sd(PROMPT, control_weight=0.8, **plain), reference
    )

    part = drawn(pipe, **usual, control_guidance_start=0.2, control_guidance_end=0.7)
    result = sd(PROMPT, control_start=0.2, control_end=0.7, **arguments)
    compare(parity_record, "ControlNet from 0.2 to 0.7 of the steps", result, *part)
    late = sd(PROMPT, control_start=0.2, control_end=1.0, **arguments)
    misses(parity_record, "ControlNet to the end", late, part)


def test_two_controlnets(steering, parts, parity_record):
    _, sd, nets = steering
    noise = unit_noise(4)
    pipe = made("StableDiffusionControlNetPipeline", parts, controlnet=nets)
    pictures = [edges(), photo()]
    reference = drawn(
        pipe,
        image=pictures,
        latents=nchw(noise),
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.3],
        control_guidance_end=[0.6, 1.0],
        **THEIRS,
    )
    arguments = {
        "latents": noise,
        "control_weight": [0.7, 0.4],
        "control_start": [0.0, 0.3],
        "control_end": [0.6, 1.0],
        **OURS,
    }
    result = sd(PROMPT, control_image=pictures, **arguments)
    compare(parity_record, "two ControlNets, each in its part of the steps", result, *reference)
    swapped = sd(PROMPT, control_image=pictures[::-1], **arguments)
    misses(parity_record, "two ControlNets, pictures swapped", swapped, reference)


def test_a_controlnet_from_a_picture(steering, parts, parity_record):
    """Image to image under control: shares count the steps that are made."""
    sd, _, nets = steering
    pipe = made("StableDiffusionControlNetImg2ImgPipeline", parts, controlnet=nets[0])
    reference = drawn(
        pipe,
        image=photo(),
        control_image=edges(),
        strength=0.7,
        control_guidance_end=0.5,
        controlnet_conditioning_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        **THEIRS,
    )
    arguments = {"image": photo(), "control_image": edges(), "strength": 0.7, "seed": 5, **OURS}
    result = sd(PROMPT, control_end=0.5, **arguments)
    compare(parity_record, "img2img under control, to half of its steps", result, *reference)
    misses(parity_record, "img2img under control to the end", sd(PROMPT, **arguments), reference)


def test_a_t2i_adapter(trial, parts, parity_record, tmp_path):
    torch.manual_seed(2)
    adapter = diffusers.T2IAdapter(channels=[64, 128, 64, 64], adapter_type="full_adapter").eval()
    adapter.save_pretrained(tmp_path / "adapter")
    sd = load(trial, controlnet=tmp_path / "adapter")
    taken = {k: v for k, v in parts.items() if k != "image_encoder"}
    pipe = made("StableDiffusionAdapterPipeline", taken, adapter=adapter)
    noise = unit_noise(4)
    reference = drawn(
        pipe,
        image=photo(),
        latents=nchw(noise),
        height=SIDE,
        width=SIDE,
        adapter_conditioning_scale=0.6,
        **THEIRS,
    )
    arguments = {"control_image": photo(), "latents": noise, **OURS}
    result = sd(PROMPT, control_weight=0.6, **arguments)
    compare(parity_record, "T2I-Adapter, weight 0.6", result, *reference)
    broken = sd(PROMPT, control_weight=0.5, **arguments)
    misses(parity_record, "T2I-Adapter, weight 0.5", broken, reference)
