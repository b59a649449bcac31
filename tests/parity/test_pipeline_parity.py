"""Whole drawings beside whole drawings: our pipeline and diffusers' own, with the trial model.

The first part draws the six pictures that came with the model (diffusers, DDIM, float32); the rest
runs diffusers' pipelines live: samplers, seeds, batches, sizes, img2img and inpainting; for karras
it runs k-diffusion over diffusers' UNet. The bars are picture_parity's. Each control breaks one
thing that ports get wrong and must miss a bar.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from picture_parity import (
    compare,
    decoded,
    figures,
    hole,
    nchw,
    network,
    passes,
    photo,
    unit_noise,
)
from PIL import Image

import mlx_maple
from mlx_maple import images
from mlx_maple.drawing import starts
from mlx_maple.sampling import SAMPLERS, NoiseSchedule, make_plan
from mlx_maple.text.prompt import encode_prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
import sampler_references as references

pytestmark = [
    pytest.mark.parity,
    pytest.mark.weights,
    # diffusers 0.42.1 calls deprecated parts of itself, of torch and of numpy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT, NEGATIVE = "a blue maple leaf on a yellow background", "a red rocket"
USUAL = {"width": 128, "height": 128, "steps": 10, "guidance_scale": 5}
THEIRS = {"width": 128, "height": 128, "num_inference_steps": 10, "guidance_scale": 5}


@pytest.fixture(scope="module")
def trial(weights) -> Path:
    return weights / "emoji-trial"


@pytest.fixture(scope="module")
def sd(trial):
    return mlx_maple.load(trial / "diffusers", dtype="float32", cache=False)


@pytest.fixture(scope="module")
def pipe(trial):
    torch.set_grad_enabled(False)
    found = diffusers.StableDiffusionPipeline.from_pretrained(trial / "diffusers")
    found.to(dtype=torch.float32)  # transformers keeps the text encoder as it is stored
    found.set_progress_bar_config(disable=True)
    yield found
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def reference(trial):
    return np.load(trial / "reference" / "ddim20_cfg5_torch_fp32.npz")


def theirs(pipeline, **arguments) -> tuple[np.ndarray, list[Image.Image]]:
    """A diffusers pipeline's final latents (n, h, w, 4) and its pictures of them."""
    latents = pipeline(output_type="latent", **arguments).images
    return np.moveaxis(latents.numpy(), 1, -1), decoded(pipeline, latents)


def argmax(pipeline):
    """The posterior's mean in place of a sample of it."""
    module = sys.modules[type(pipeline).__module__]
    plain = module.retrieve_latents

    def mean(encoded, generator=None, sample_mode="sample"):
        return plain(encoded, generator, "argmax")

    return mock.patch.object(module, "retrieve_latents", mean)


# The six pictures of the model's own reference ---------------------------------------------------


def draw_reference(sd, reference, number: int, **changes):
    arguments = {"sampler": "ddim", "schedule": "leading", **USUAL, "steps": 20, **changes}
    prompt = str(reference["prompts"][number])
    return sd(prompt, latents=reference["noise_nhwc"][number : number + 1], **arguments)


def expected(reference, number: int):
    return reference["latents_nhwc"][number : number + 1], reference["images_u8"][number][None]


@pytest.mark.parametrize("form", ["emoji-trial.ckpt", "diffusers"])
def test_the_six_reference_pictures(parity_record, trial, reference, form):
    sd = mlx_maple.load(trial / form, dtype="float32", cache=False)
    for number, prompt in enumerate(reference["prompts"]):
        result = draw_reference(sd, reference, number)
        assert result.notes == []
        compare(parity_record, f"{form}: {prompt}", result, *expected(reference, number))


def pad_with_zero(sd):
    return mock.patch.object(sd.tokenizer, "pad", 0)


def unpadded(sd):
    """mlx-examples' prompts: as long as they are."""

    def short(tokenizer, text, **options):
        encoded = encode_prompt(tokenizer, text)
        ids = encoded.ids[0]
        return type(encoded)([ids[: ids.index(tokenizer.eos) + 1]], encoded.weights, "")

    return mock.patch("mlx_maple.guidance.encode_prompt", short)


def unscaled(sd):
    plain = sd.vae.decode
    return mock.patch.object(
        type(sd.vae), "decode", lambda self, latents: plain(latents * self.config.scaling_factor)
    )


def transposed(sd):
    plain = sd.unet.__call__

    def call(self, latents, timesteps, context, *more):
        return plain(latents.transpose(0, 2, 1, 3), timesteps, context, *more).transpose(0, 2, 1, 3)

    return mock.patch.object(type(sd.unet), "__call__", call)


def one_off(sd):
    plain = sd.unet.__call__
    return mock.patch.object(
        type(sd.unet), "__call__", lambda self, x, t, *more: plain(x, t + 1, *more)
    )


CONTROLS = {
    "prompts padded with id 0": (pad_with_zero, {}),
    "latents decoded unscaled": (unscaled, {}),
    "rows and columns exchanged": (transposed, {}),
    "no guidance": (None, {"guidance_scale": 1}),
    "guidance 5.5 for 5": (None, {"guidance_scale": 5.5}),
    "trailing for leading": (None, {"schedule": "trailing"}),
    "the second to last text layer": (None, {"clip_skip": 2}),
    "a negative prompt": (None, {"negative_prompt": "leaf"}),
    "timesteps one too late": (one_off, {}),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_drawing_is_seen(parity_record, sd, reference, name):
    breaks, changes = CONTROLS[name]
    if breaks is None:
        result = draw_reference(sd, reference, 0, **changes)
    else:
        with breaks(sd):
            result = draw_reference(sd, reference, 0, **changes)
    found = figures(result, *expected(reference, 0))
    parity_record(f"control: {name}", **found, bar="must miss one")
    assert not passes(found)


# Samplers, live ----------------------------------------------------------------------------------

LIVE = {  # every deterministic sampler, with a schedule of each reference
    "ddim": ("trailing",),
    "plms": ("leading",),
    "euler": ("linspace", "uniform"),
    "heun": ("linspace",),
    "dpm2": ("karras",),
    "lms": ("linspace",),
    "dpmpp_2m": ("linspace", "karras"),
    "unipc": ("linspace",),
}


def test_every_deterministic_sampler_is_live():
    plans = {name: make_plan(NoiseSchedule.from_betas(), name) for name in SAMPLERS}
    assert set(LIVE) == {name for name, plan in plans.items() if not plan.draws}


@pytest.mark.parametrize(
    ("sampler", "schedule"), [(name, word) for name, words in LIVE.items() for word in words]
)
def test_deterministic_samplers(parity_record, sd, pipe, sampler, schedule):
    noise = unit_noise(11)
    result = sd(PROMPT, latents=noise, sampler=sampler, schedule=schedule, **{**USUAL, "steps": 20})
    run = references.run(
        sampler,
        schedule,
        20,
        network(pipe, PROMPT, "", 5),
        nchw(noise).numpy(),
        [],
        sd.noise_schedule.alphas_cumprod,
    )
    latents = torch.from_numpy(run.steps[-1]).float()
    follows = references.source(sampler, schedule)
    compare(
        parity_record,
        f"{sampler} {schedule}, 20 steps ({follows})",
        result,
        np.moveaxis(latents.numpy(), 1, -1),
        decoded(pipe, latents),
    )


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("euler_a", "karras"),
        ("dpmpp_2m_sde", "exponential"),
        ("lcm", "trailing"),
    ],
)
def test_stochastic_samplers_with_the_same_noise(parity_record, sd, pipe, sampler, schedule):
    draws = np.stack([unit_noise(100 + i) for i in range(7)])
    arguments = {**USUAL, "steps": 8}
    noise = unit_noise(11)
    result = sd(
        PROMPT, latents=noise, step_noise=draws, sampler=sampler, schedule=schedule, **arguments
    )
    run = references.run(
        sampler,
        schedule,
        8,
        network(pipe, PROMPT, "", 5),
        nchw(noise).numpy(),
        [nchw(draw).numpy() for draw in draws],
        sd.noise_schedule.alphas_cumprod,
    )
    latents = torch.from_numpy(run.steps[-1]).float()
    pictures = decoded(pipe, latents)
    latents = np.moveaxis(latents.numpy(), 1, -1)
    compare(parity_record, f"{sampler} {schedule}, 8 steps, injected", result, latents, pictures)


# diffusers' pipelines, live ----------------------------------------------------------------------


def test_a_seed_draws_what_diffusers_draws(parity_record, sd, pipe):
    result = sd(PROMPT, negative_prompt=NEGATIVE, seed=7, sampler="ddim", **USUAL)
    reference = theirs(
        pipe,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        **THEIRS,
        generator=torch.Generator().manual_seed(7),
    )
    compare(parity_record, "text to image by seed, negative prompt", result, *reference)


def test_a_batch_by_seeds(parity_record, sd, pipe):
    result = sd(PROMPT, seed=70, count=3, sampler="ddim", **USUAL)
    reference = theirs(
        pipe,
        prompt=PROMPT,
        num_images_per_prompt=3,
        **THEIRS,
        generator=[torch.Generator().manual_seed(70 + i) for i in range(3)],
    )
    compare(parity_record, "a batch of three by seeds", result, *reference)


def test_a_stochastic_sampler_by_seed(parity_record, sd, pipe):
    """The steps' noise goes on in the stream that the start was drawn from, there and here."""
    euler_a = diffusers.EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace"
    )
    with mock.patch.object(pipe, "scheduler", euler_a):
        reference = theirs(
            pipe,
            prompt=PROMPT,
            **THEIRS,
            generator=torch.Generator().manual_seed(3),
        )
    result = sd(PROMPT, seed=3, sampler="euler_a", schedule="linspace", **USUAL)
    compare(parity_record, "euler_a linspace by seed", result, *reference)


@pytest.mark.parametrize(("width", "height"), [(136, 72), (200, 120), (64, 264)])
def test_any_multiple_of_8(parity_record, sd, pipe, width, height):
    noise = unit_noise(5, 1, height // 8, width // 8)
    arguments = {**USUAL, "width": width, "height": height}
    result = sd(PROMPT, latents=noise, sampler="ddim", **arguments)
    reference = theirs(
        pipe,
        prompt=PROMPT,
        **{**THEIRS, "width": width, "height": height},
        latents=nchw(noise),
    )
    compare(parity_record, f"{width}x{height}", result, *reference)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(parity_record, sd, pipe, skip):
    """Both prompts skip layers, as in A1111; diffusers' own pipeline forgets the negative one."""
    noise = unit_noise(5)
    result = sd(PROMPT, latents=noise, sampler="ddim", clip_skip=skip + 1, **USUAL)
    encoder = pipe.text_encoder
    # diffusers 0.42.1 looks for the norm where transformers had it before 5.6
    inner = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    with mock.patch.object(encoder, "text_model", inner, create=True):
        wanted, avoided = (
            pipe.encode_prompt(prompt, "cpu", 1, False, clip_skip=skip)[0]
            for prompt in (PROMPT, "")
        )
    reference = theirs(
        pipe,
        prompt_embeds=wanted,
        negative_prompt_embeds=avoided,
        **THEIRS,
        latents=nchw(noise),
    )
    compare(parity_record, f"clip skip {skip + 1} (diffusers' {skip})", result, *reference)


def test_guidance_1(parity_record, sd, pipe):
    noise = unit_noise(5)
    arguments = {**USUAL, "guidance_scale": 1}
    result = sd(PROMPT, latents=noise, sampler="ddim", **arguments)
    reference = theirs(
        pipe,
        prompt=PROMPT,
        **{**THEIRS, "guidance_scale": 1},
        latents=nchw(noise),
    )
    compare(parity_record, "guidance 1", result, *reference)


# img2img -----------------------------------------------------------------------------------------


def image_to_image(pipe, **arguments):
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components)
    pipeline.set_progress_bar_config(disable=True)
    usual = {"prompt": PROMPT, "image": photo(), "num_inference_steps": 10, "guidance_scale": 5}
    with argmax(pipeline) if arguments.pop("mean", True) else mock.MagicMock():
        return theirs(pipeline, **{**usual, **arguments})


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image(parity_record, sd, pipe, strength):
    result = sd(PROMPT, image=photo(), strength=strength, seed=5, sampler="ddim", **USUAL)
    reference = image_to_image(pipe, strength=strength, generator=torch.Generator().manual_seed(5))
    compare(parity_record, f"img2img, strength {strength:g}, by seed", result, *reference)


def test_image_to_image_from_a_sample(parity_record, sd, pipe):
    arguments = {"image": photo(), "strength": 0.6, "seed": 5, "sampler": "ddim", **USUAL}
    reference = image_to_image(
        pipe, strength=0.6, generator=torch.Generator().manual_seed(5), mean=False
    )
    result = sd(PROMPT, sample_posterior=True, **arguments)
    compare(parity_record, "img2img from a sample, by seed", result, *reference)
    found = figures(sd(PROMPT, **arguments), *reference)
    parity_record("control: the mean for a sample", **found, bar="must miss one")
    assert not passes(found)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("plms", "PNDMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ],
)
def test_image_to_image_with_other_samplers(parity_record, sd, pipe, sampler, scheduler):
    spacing = "leading" if sampler == "plms" else "linspace"
    options = {"timestep_spacing": spacing}
    if sampler == "plms":
        options["skip_prk_steps"] = True
    other = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    with mock.patch.object(pipe, "scheduler", other):
        reference = image_to_image(pipe, strength=0.6, generator=torch.Generator().manual_seed(5))
    result = sd(
        PROMPT, image=photo(), strength=0.6, seed=5, sampler=sampler, schedule=spacing, **USUAL
    )
    compare(parity_record, f"img2img, {sampler} {spacing}, strength 0.6", result, *reference)


def test_image_to_image_with_karras_as_a1111_does(parity_record, sd, pipe):
    """From the picture's mean with noise of that level; t_enc + 1 of A1111's steps."""
    strength, steps = 0.6, 10
    result = sd(
        PROMPT,
        image=photo(),
        strength=strength,
        seed=5,
        sampler="dpmpp_2m",
        schedule="karras",
        **USUAL,
    )
    pixels = pipe.image_processor.preprocess(photo())
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    alphas = sd.noise_schedule.alphas_cumprod
    sigmas = references.k_sigmas("karras", steps, alphas)
    kept = sigmas[steps - int(min(strength, 0.999) * steps) - 1 :]
    run = references.run_k_diffusion(
        "dpmpp_2m",
        kept,
        network(pipe, PROMPT, "", 5),
        noise.numpy(),
        [],
        alphas,
        clean=clean.numpy(),
    )
    latents = torch.from_numpy(run.steps[-1]).float()
    pictures = decoded(pipe, latents)
    latents = np.moveaxis(latents.numpy(), 1, -1)
    compare(parity_record, "img2img, dpmpp_2m karras (k-diffusion)", result, latents, pictures)


# Inpainting --------------------------------------------------------------------------------------


def inpaint(pipe, **arguments):
    pipeline = diffusers.StableDiffusionInpaintPipeline(**pipe.components)
    pipeline.set_progress_bar_config(disable=True)
    with argmax(pipeline):
        return theirs(
            pipeline,
            prompt=PROMPT,
            image=photo(),
            mask_image=hole(),
            **THEIRS,
            **arguments,
        )


def with_the_original(pictures, mask) -> list[Image.Image]:
    return [images.composited(picture, photo(), mask) for picture in pictures]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "strength"),
    [
        ("ddim", None, 1.0),
        ("ddim", None, 0.7),
        ("plms", "PNDMScheduler", 0.7),
        ("euler", "EulerDiscreteScheduler", 1.0),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", 0.7),
        ("unipc", "UniPCMultistepScheduler", 1.0),
        ("heun", "HeunDiscreteScheduler", 0.7),
    ],
)
def test_inpainting(parity_record, sd, pipe, sampler, scheduler, strength):
    spacing = "leading" if sampler in ("ddim", "plms") else "linspace"
    other = pipe.scheduler
    if scheduler is not None:
        options = {"timestep_spacing": spacing}
        if sampler == "plms":
            options["skip_prk_steps"] = True
        other = getattr(diffusers, scheduler).from_config(other.config, **options)
    with mock.patch.object(pipe, "scheduler", other):
        latents, pictures = inpaint(
            pipe, strength=strength, generator=torch.Generator().manual_seed(5)
        )
    result = sd(
        PROMPT,
        image=photo(),
        mask=hole(),
        mask_blur=0,
        strength=strength,
        seed=5,
        sampler=sampler,
        schedule=spacing,
        **USUAL,
    )
    mask = images.blurred(hole(), 0)
    name = f"inpaint, {sampler} {spacing}, strength {strength:g}"
    compare(parity_record, name, result, latents, with_the_original(pictures, mask))
    outside = mask == 0
    assert np.array_equal(np.asarray(result.images[0])[outside], np.asarray(photo())[outside])


def test_inpainting_with_dpm2_but_for_a_slip_of_diffusers(parity_record, sd, pipe):
    """Within a step KDPM2DiscreteScheduler.add_noise takes the level of the step's end."""

    def at_the_end(self, timestep):
        middle = float(self._plan.grid.schedule.sigma_at(np.array(timestep)))
        end = max(sigma for sigma in self._plan.grid.sigmas if sigma < middle)
        return (self._clean + end * self._noise) / (1 + middle**2) ** 0.5

    other = diffusers.KDPM2DiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace"
    )
    with mock.patch.object(pipe, "scheduler", other):
        latents, pictures = inpaint(pipe, strength=0.7, generator=torch.Generator().manual_seed(5))
    arguments = {"image": photo(), "mask": hole(), "mask_blur": 0, "strength": 0.7, "seed": 5}
    arguments |= {"sampler": "dpm2", "schedule": "linspace", **USUAL}
    pictures = with_the_original(pictures, images.blurred(hole(), 0))
    with mock.patch.object(starts.Outside, "_at", at_the_end):
        result = sd(PROMPT, **arguments)
    compare(parity_record, "inpaint, dpm2 linspace, with that slip", result, latents, pictures)
    found = figures(sd(PROMPT, **arguments), latents, pictures)
    parity_record("inpaint, dpm2 linspace, without it", **found, bar="none: another picture")


def test_inpainting_with_another_noise_is_seen(parity_record, sd, pipe):
    """Blending in the picture under fresh noise, as some ports do, misses the bar."""
    latents, pictures = inpaint(pipe, strength=1.0, generator=torch.Generator().manual_seed(5))
    arguments = {"image": photo(), "mask": hole(), "mask_blur": 0, "strength": 1, "seed": 5}
    plain = starts.Outside.__init__

    def fresh(self, plan, inside, noise, clean):
        plain(self, plan, inside, mx.array(unit_noise(77)), clean)

    with mock.patch.object(starts.Outside, "__init__", fresh):
        result = sd(PROMPT, sampler="ddim", **arguments, **USUAL)
    found = figures(result, latents, with_the_original(pictures, images.blurred(hole(), 0)))
    parity_record("control: inpaint with fresh noise", **found, bar="must miss one")
    assert not passes(found)


# Pictures in and out -----------------------------------------------------------------------------


def test_pixels_are_diffusers_pixels(parity_record):
    processor = VaeImageProcessor(vae_scale_factor=8)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    for size in ((128, 88), (64, 64), (256, 200)):
        expected = processor.preprocess(image, height=size[1], width=size[0])
        ours = images.to_pixels(images.fitted(images.to_rgb(image), *size))
        assert np.array_equal(ours, np.moveaxis(expected[0].numpy(), 0, -1))
    values = generator.uniform(-1.3, 1.3, (64, 64, 3)).astype(np.float32)
    values[0] = np.linspace(-1, 1, 64)[:, None]
    expected = processor.postprocess(nchw(values[None]), output_type="pil")[0]
    assert np.array_equal(np.asarray(images.to_image(values)), np.asarray(expected))
    parity_record("pixels in and out", max_error=0.0, bar="bit-equal")


def test_latent_masks_are_diffusers_masks(parity_record):
    processor = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    generator = np.random.default_rng(0)
    for height, width in ((128, 128), (72, 136), (200, 64)):
        grey = Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8))
        binary = processor.preprocess(grey, height=height, width=width)
        expected = torch.nn.functional.interpolate(binary, size=(height // 8, width // 8))
        ours = images.latent_mask(images.blurred(grey, 0), 8)
        assert np.array_equal(ours[..., 0], expected[0, 0].numpy())
    parity_record("latent masks", max_error=0.0, bar="bit-equal")
