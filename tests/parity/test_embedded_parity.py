"""Every sampler draws, redraws and inpaints with the embedded model as its reference does.

The weights that ship with the package, converted to a diffusers folder, draw in torch; the same
weights draw here; starting noise and step noise are the same arrays. Which reference a sampler
follows is design's rule: diffusers' schedulers, or k-diffusion over diffusers' UNet. Everything is
compared: tokenizer, text encoder, UNet, guidance, sampler, decoder, and for a picture to start from
the encoder. The bars are picture_parity's; each control breaks one thing and must miss the 40 dB.
"""

import sys
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from picture_parity import (
    PSNR,
    compare,
    decoded,
    figures,
    hole,
    nchw,
    network,
    photo,
    unit_noise,
)

import mlx_maple
from mlx_maple import images, loading
from mlx_maple.cli import main
from mlx_maple.drawing import starts
from mlx_maple.sampling import SAMPLERS, make_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
import sampler_references as references

pytestmark = [
    pytest.mark.parity,
    # diffusers 0.42.1 calls deprecated parts of itself, of torch and of numpy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT, NEGATIVE, GUIDANCE = "a blue maple leaf on a yellow background", "a red rocket", 5
STRENGTH = 0.6
SIZE = {"width": 128, "height": 128}
SAMPLER_NAMES = list(SAMPLERS)


@pytest.fixture(scope="module")
def sd():
    return mlx_maple.load(dtype="float32")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "diffusers"
    demo = str(loading.DEMO)
    assert main(["convert", demo, str(folder), "--to", "diffusers", "--quiet"]) == 0
    torch.set_grad_enabled(False)
    found = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    found.to(dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    yield found
    torch.set_grad_enabled(True)


class Case:
    """One drawing: a sampler with its usual schedule, its noise, and what it starts from."""

    def __init__(self, sd, pipe, sampler: str, mode: str) -> None:
        self.sd, self.pipe, self.sampler, self.mode = sd, pipe, sampler, mode
        self.schedule = SAMPLERS[sampler].schedules[0]
        self.source = references.source(sampler, self.schedule)
        self.steps = 8 if SAMPLERS[sampler].calls == 1 else 5
        self.strength = STRENGTH if mode == "img2img" else None
        self.plan = make_plan(
            sd.noise_schedule, sampler, self.schedule, self.steps, strength=self.strength
        )
        if sampler == "lms" and mode == "img2img":
            self.source = "k-diffusion"  # diffusers drops terms of its formula there
        self.noise = unit_noise(11)
        self.draws = np.stack([unit_noise(100 + i) for i in range(max(1, self.plan.draws))])

    def ours(self, **changes):
        arguments = {
            "negative_prompt": NEGATIVE,
            "guidance_scale": GUIDANCE,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "steps": self.steps,
            "latents": self.noise,
            "step_noise": self.draws if self.plan.draws else None,
            **SIZE,
        }
        if self.mode != "txt2img":
            arguments |= {"image": photo(), "strength": self.strength or 1.0}
        if self.mode == "inpaint":
            arguments |= {"mask": hole(), "mask_blur": 0}
        return self.sd(PROMPT, **{**arguments, **changes})

    def theirs(self):
        """Final latents (1, h, w, C) and the picture of the reference."""
        model = network(self.pipe, PROMPT, NEGATIVE, GUIDANCE)
        alphas = self.sd.noise_schedule.alphas_cumprod
        noise, draws = nchw(self.noise).numpy(), [nchw(draw).numpy() for draw in self.draws]
        inside = None
        clean = self.clean() if self.mode != "txt2img" else None
        if self.mode == "inpaint":
            inside = nchw(images.latent_mask(images.blurred(hole(), 0), 8)[None]) > 0

        def blend(latents, known):
            return torch.where(inside, latents, known.to(latents.dtype))

        if self.source == "diffusers":
            more = {}
            if self.mode == "img2img":
                more = {"strength": STRENGTH, "clean": clean}
            elif self.mode == "inpaint":
                more = {"clean": clean, "blend": blend}
            run = references.run_diffusers(
                self.sampler, self.schedule, self.steps, model, noise, draws, alphas, **more
            )
        else:
            sigmas, more = self.levels(alphas), {}
            if self.mode == "img2img":
                more = {"clean": clean}
            elif self.mode == "inpaint":
                more = {"kept": clean, "blend": blend}
            run = references.run_k_diffusion(
                self.sampler, sigmas, model, noise, draws, alphas, **more
            )
        latents = torch.from_numpy(run.steps[-1]).float()
        pictures = decoded(self.pipe, latents)
        if self.mode == "inpaint":
            mask = images.blurred(hole(), 0)
            pictures = [images.composited(picture, photo(), mask) for picture in pictures]
        return np.moveaxis(latents.numpy(), 1, -1), pictures

    def levels(self, alphas: np.ndarray) -> np.ndarray:
        """The levels that k-diffusion visits; of image to image the last ones, as in A1111."""
        if self.sampler == "lms":
            return np.array(self.plan.grid.sigmas)
        sigmas = references.k_sigmas(self.schedule, self.steps, alphas)
        if self.mode != "img2img":
            return sigmas
        return sigmas[self.steps - int(min(STRENGTH, 0.999) * self.steps) - 1 :]

    def clean(self) -> np.ndarray:
        pixels = self.pipe.image_processor.preprocess(photo())
        mode = self.pipe.vae.encode(pixels).latent_dist.mode()
        return (mode * self.pipe.vae.config.scaling_factor).numpy()


@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler(parity_record, sd, pipe, sampler, mode):
    case = Case(sd, pipe, sampler, mode)
    result = case.ours()
    assert result.settings[0].schedule == case.schedule
    name = f"embedded, {mode}, {sampler} {case.schedule} ({case.source})"
    compare(parity_record, name, result, *case.theirs())


def fresh_noise(monkeypatch):
    """Inpainting that noises the kept part anew."""
    plain = starts.Outside.__init__

    def init(self, plan, inside, noise, clean):
        plain(self, plan, inside, mx.array(unit_noise(77)), clean)

    monkeypatch.setattr(starts.Outside, "__init__", init)


CONTROLS = {
    "guidance 5.5 for 5": ("txt2img", {"guidance_scale": 5.5}, None),
    "no negative prompt": ("txt2img", {"negative_prompt": ""}, None),
    "another schedule": ("txt2img", {"schedule": "exponential"}, None),
    "strength 0.75 for 0.6": ("img2img", {"strength": 0.75}, None),
    "the kept part under fresh noise": ("inpaint", {}, fresh_noise),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_drawing_misses_the_bar(parity_record, sd, pipe, monkeypatch, name):
    mode, changes, break_it = CONTROLS[name]
    case = Case(sd, pipe, "dpmpp_2m", mode)
    expected = case.theirs()
    if break_it is not None:
        break_it(monkeypatch)
    found = figures(case.ours(**changes), *expected)
    parity_record(f"control: embedded, {mode}, {name}", **found, bar=f"PSNR <= {PSNR:g} dB")
    assert found["psnr"] <= PSNR
