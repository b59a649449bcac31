"""The samplers with a trained network in the loop, against diffusers and k-diffusion.

The network is the trial model's UNet in torch, on both sides: what is compared is everything from
the starting noise to the final latents but the network. Guidance is 5; ours runs through `guided`.
The bar is cosine >= 0.9999 after 20 steps, and a largest error of 5e-4 in latents of unit size:
the cosine alone would not see a timestep off by one (1 - cosine is then 1e-5).
"""

import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_maple.sampling import SAMPLERS, NoiseSchedule, guided, make_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
import sampler_references as references

pytestmark = [
    pytest.mark.parity,
    pytest.mark.weights,
    # diffusers 0.42.1 mixes torch tensors and numpy arrays in ways that numpy 2 warns of
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS, GUIDANCE = 20, 5.0
MAX_ERROR = 5e-4
PICTURES = 1  # the first prompt of the trial's own reference
ALPHAS = NoiseSchedule.from_betas().alphas_cumprod.astype(np.float32).astype(np.float64)
DETERMINISTIC = [
    name for name in SAMPLERS if make_plan(NoiseSchedule(ALPHAS), name, steps=8).draws == 0
]


class Trial:
    """The trained UNet, its prompts' states, and the noise and latents of its reference run."""

    def __init__(self, folder):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        stored = np.load(folder / "reference" / "ddim20_cfg5_torch_fp32.npz")
        self.noise = stored["noise_nhwc"][:PICTURES]
        self.latents = stored["latents_nhwc"][:PICTURES]
        tokenizer = CLIPTokenizer.from_pretrained(folder / "diffusers" / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(
            folder / "diffusers" / "text_encoder", dtype=torch.float32
        )
        self.unet = UNet2DConditionModel.from_pretrained(
            folder / "diffusers" / "unet", torch_dtype=torch.float32
        ).eval()

        def states(texts):
            ids = tokenizer(
                texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                return encoder(ids).last_hidden_state

        self.positive = states([str(text) for text in stored["prompts"][:PICTURES]])
        self.negative = states([""] * PICTURES)

    def predict(self, x, t, context):
        """(B, h, w, 4) latents to the raw prediction, both channels last."""
        with torch.no_grad():
            x = x.movedim(-1, 1).float()
            times = torch.full((len(x),), t)
            return self.unet(x, times, encoder_hidden_states=context).sample.movedim(1, -1)

    def torch_model(self, x, t):
        """Guidance as diffusers' pipeline writes it."""
        both = self.predict(torch.cat([x, x]), t, torch.cat([self.negative, self.positive]))
        negative, positive = both.chunk(2)
        return negative + GUIDANCE * (positive - negative)

    def mlx_model(self):
        def unet_call(latents, timesteps, context):
            out = self.predict(
                torch.from_numpy(np.array(latents)),
                float(timesteps[0].item()),
                torch.from_numpy(np.array(context)),
            )
            return mx.array(out.contiguous().numpy())

        positive, negative = (mx.array(s.numpy()) for s in (self.positive, self.negative))
        return guided(unet_call, positive, negative, GUIDANCE, mx.float32)


@cache
def load(folder):
    return Trial(folder)


@pytest.fixture
def trial(weights):
    return load(weights / "emoji-trial")


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def compare(name, ours, theirs, parity_record):
    short = 1 - cosine(ours, theirs)
    error = float(np.abs(ours - theirs).max())
    bar = f"1 - cosine <= 1e-4, max_error <= {MAX_ERROR}"
    parity_record(name, one_minus_cosine=short, max_error=error, std=float(theirs.std()), bar=bar)
    assert short <= 1e-4
    assert error <= MAX_ERROR


def run_ours(trial, plan, x):
    *_, last = plan.sample(trial.mlx_model(), x)
    return np.array(last.latents)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [(name, SAMPLERS[name].schedules[0]) for name in DETERMINISTIC]
    + [("euler", "karras"), ("dpmpp_2m", "trailing"), ("unipc", "karras")],
)
def test_final_latents_of_every_deterministic_sampler(sampler, schedule, trial, parity_record):
    run = references.run(sampler, schedule, STEPS, trial.torch_model, trial.noise, [], ALPHAS)
    plan = make_plan(NoiseSchedule(ALPHAS), sampler, schedule, STEPS)
    ours = run_ours(trial, plan, plan.initial(trial.noise))
    source = references.source(sampler, schedule)
    compare(f"{sampler} {schedule}, trained UNet: {source}", ours, run.steps[-1], parity_record)


def test_the_trials_own_reference_run(trial, parity_record):
    """DDIM, 20 steps, guidance 5: the latents that were stored beside the weights."""
    plan = make_plan(NoiseSchedule.from_betas(), "ddim", "leading", STEPS)
    ours = run_ours(trial, plan, plan.initial(trial.noise))
    compare("ddim leading, the trial's stored latents", ours, trial.latents, parity_record)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_image_to_image(sampler, trial, parity_record):
    schedule = "leading" if sampler == "ddim" else "karras"
    strength = 0.6
    plan = make_plan(NoiseSchedule(ALPHAS), sampler, schedule, STEPS, strength=strength)
    if sampler == "ddim":
        run = references.run_diffusers(
            sampler,
            schedule,
            STEPS,
            trial.torch_model,
            trial.noise,
            [],
            ALPHAS,
            strength=strength,
            clean=trial.latents,
        )
    else:
        sigmas = references.k_sigmas(schedule, STEPS, ALPHAS)[-plan.total - 1 :]
        arguments = (trial.torch_model, trial.noise, [], ALPHAS)
        run = references.run_k_diffusion(sampler, sigmas, *arguments, clean=trial.latents)
    ours = run_ours(trial, plan, plan.initial(trial.noise, trial.latents))
    name = f"{sampler} {schedule}, image to image, trained UNet"
    compare(name, ours, run.steps[-1], parity_record)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_control_a_timestep_off_by_one(sampler, trial, parity_record):
    plan = make_plan(NoiseSchedule(ALPHAS), sampler, "trailing", STEPS)
    model = trial.mlx_model()
    right = run_ours(trial, plan, plan.initial(trial.noise))
    *_, last = plan.sample(lambda x, t: model(x, t - 1), plan.initial(trial.noise))
    wrong = np.array(last.latents)
    error = float(np.abs(wrong - right).max())
    short = 1 - cosine(wrong, right)
    name = f"control: {sampler}, t - 1, trained UNet"
    parity_record(name, one_minus_cosine=short, max_error=error, bar=f"> {20 * MAX_ERROR}")
    assert error > 20 * MAX_ERROR
