"""Every sampler beside its reference, step by step, with the same noise and the same network.

The network is a smooth nonlinear function (tests/sampling/synthetic.py), so that only samplers and
schedules are compared; test_samplers_trained.py does it again with a trained UNet. The bars: the
start within 1e-6, each step's latents within 5e-5 of their largest value against k-diffusion, which
runs in float64, and 1e-4 against diffusers, which computes its levels in float32 (so timesteps may
differ by 0.02, near t = 0); final cosine 0.9999. A broken step must show five times the wider bar.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import scipy.stats
import torch

from mlx_maple.sampling import SAMPLERS, NoiseSchedule, Step, make_plan, samplers
from mlx_maple.sampling.schedule import SPACINGS, beta_quantile

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
import sampler_references as references
from synthetic import gaussian_noise, predict

pytestmark = [
    pytest.mark.parity,
    # diffusers 0.42.1 mixes torch tensors and numpy arrays in ways that numpy 2 warns of
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SHAPE = (2, 8, 8, 4)
COUNTS = (1, 2, 3, 8, 20)
STORED = NoiseSchedule.from_betas().alphas_cumprod.astype(np.float32).astype(np.float64)
BARS = {"diffusers": 1e-4, "k-diffusion": 5e-5}  # float32 and float64 references
CONTROL = 5 * BARS["diffusers"]
NOISE = gaussian_noise(0, SHAPE)
CLEAN = 0.8 * gaussian_noise(99, SHAPE)


def torch_network(x, t):
    return predict(x, t, torch)


class Network:
    """The same function for MLX, which remembers the timesteps that it was told."""

    def __init__(self, offset=0.0):
        self.offset = offset
        self.timesteps = []

    def __call__(self, x, t):
        self.timesteps.append(t)
        return mx.array(predict(np.array(x), t + self.offset).astype(np.float32))


def draws_for(plan):
    return [gaussian_noise(i + 1, SHAPE) for i in range(plan.draws)]


def relative(ours, theirs):
    return float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max())


def cosine(ours, theirs):
    a, b = np.array(ours, dtype=np.float64).ravel(), theirs.ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class Worst:
    """The largest differences met, and where."""

    def __init__(self):
        self.cases, self.step, self.start, self.timestep, self.cosine = 0, 0.0, 0.0, 0.0, 1.0
        self.where = ""

    def compare(self, where, plan, run, *, network=None, clean=None, start=None, blend=None):
        """Run ``plan`` and take the largest differences from the reference's ``run``."""
        network = Network() if network is None else network
        draws = draws_for(plan)
        x = plan.initial(NOISE, clean) if start is None else start
        self.start = max(self.start, relative(x, run.start))
        generator = plan.sample(network, x, lambda i, shape: draws[i])
        step, errors = next(generator), []
        while step is not None:
            latents = step.latents if blend is None else blend(plan, step)
            errors.append(relative(latents, run.steps[step.index]))
            try:
                step = generator.send(latents)
            except StopIteration:
                step = None
        assert len(errors) == len(run.steps) == plan.total, where
        assert len(network.timesteps) == len(run.timesteps), where
        told = np.abs(np.array(network.timesteps) - run.timesteps).max()
        self.timestep = max(self.timestep, float(told))
        self.cosine = min(self.cosine, cosine(latents, run.steps[-1]))
        self.cases += 1
        if max(errors) > self.step:
            self.step, self.where = max(errors), where
        return max(errors)

    def hold(self, parity_record, name, source):
        parity_record(
            f"{name}: {source}",
            cases=self.cases,
            max_step_error=self.step,
            cosine=self.cosine,
            dt=self.timestep,
            worst=self.where,
            bar=f"step <= {BARS[source]}, cosine >= 0.9999, dt <= 0.02",
        )
        assert self.start <= 1e-6
        assert self.timestep <= 0.02
        assert self.step <= BARS[source]
        assert self.cosine >= 0.9999


# --- text to image -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_of_every_schedule(sampler, prediction, parity_record):
    noise_schedule = NoiseSchedule(STORED, prediction)
    worst = {"diffusers": Worst(), "k-diffusion": Worst()}
    for schedule in SAMPLERS[sampler].schedules:
        for n in COUNTS:
            plan = make_plan(noise_schedule, sampler, schedule, n)
            run = references.run(
                sampler, schedule, n, torch_network, NOISE, draws_for(plan), STORED, prediction
            )
            worst[references.source(sampler, schedule)].compare(f"{schedule} {n}", plan, run)
    for source, differences in worst.items():
        if differences.cases:
            differences.hold(parity_record, f"{sampler}, {prediction}", source)


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("ddim", 1.0), ("ddim", 0.4), ("tcd", 0.0), ("tcd", 1.0), ("euler_a", 0.5), ("dpm2_a", 0.5)]
    + [(name, 0.5) for name in ("dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")],
)
def test_other_shares_of_fresh_noise(sampler, eta, parity_record):
    worst = Worst()
    schedule = {"ddim": "leading", "tcd": "trailing"}.get(sampler, "karras")
    for n in (2, 9):
        plan = make_plan(NoiseSchedule(STORED), sampler, schedule, n, eta=eta)
        run = references.run(
            sampler, schedule, n, torch_network, NOISE, draws_for(plan), STORED, eta=eta
        )
        worst.compare(f"{n}", plan, run)
    worst.hold(parity_record, f"{sampler}, eta {eta}", references.source(sampler, schedule))


@pytest.mark.parametrize("sampler", ["ddim", "plms", *references.K_DIFFUSION, "unipc"])
def test_zero_terminal_snr(sampler, parity_record):
    """v-prediction, trailing, from sigma 4096, where float32 slopes lose four digits.

    Samplers along sigma are held against k-diffusion in float64, on diffusers' levels, and plms
    against its scheduler in float64: diffusers' own float32 is further from that than the bar (1e-3
    for heun), and ours is not.
    """
    noise_schedule = NoiseSchedule.from_betas(zero_terminal_snr=True, prediction="v_prediction")
    alphas = noise_schedule.alphas_cumprod.astype(np.float32).astype(np.float64)
    noise_schedule = NoiseSchedule(alphas, "v_prediction")
    worst = Worst()
    for n in (4, 20):
        plan = make_plan(noise_schedule, sampler, "trailing", n)
        arguments = (torch_network, NOISE, draws_for(plan), alphas, "v_prediction")
        if sampler in references.K_DIFFUSION:
            scale, sigmas = plan.grid.noise_scale, plan.grid.sigmas
            run = references.run_k_diffusion(sampler, sigmas, *arguments, scale=scale)
        else:
            network, noise, *rest = arguments
            noise = noise.astype(np.float64) if sampler == "plms" else noise
            run = references.run(sampler, "trailing", n, network, noise, *rest)
        worst.compare(f"{n}", plan, run)
    source = "k-diffusion" if sampler in references.K_DIFFUSION else "diffusers"
    worst.hold(parity_record, f"{sampler}, zero terminal SNR", source)


def test_zero_terminal_snr_schedule_is_diffusers(parity_record):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    ).alphas_cumprod.double()
    ours = NoiseSchedule.from_betas(zero_terminal_snr=True).alphas_cumprod
    error = float(np.abs(ours / theirs.numpy() - 1).max())
    parity_record("zero terminal SNR alphas_cumprod", max_relative=error, bar="<= 1e-4 (float32)")
    assert error <= 1e-4
    assert ours[-1] == theirs[-1] == 2**-24


@pytest.mark.parametrize(
    ("kind", "theirs", "bar"),
    [
        ("scaled_linear", "scaled_linear", 2e-6),
        ("linear", "linear", 2e-6),
        ("cosine", "squaredcos_cap_v2", 1e-4),
    ],
)
def test_betas_are_diffusers(kind, theirs, bar, parity_record):
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=theirs)
    ours = NoiseSchedule.from_betas(kind, 0.00085, 0.012).alphas_cumprod
    error = float(np.abs(ours / reference.alphas_cumprod.double().numpy() - 1).max())
    parity_record(f"alphas_cumprod, {kind}", max_relative=error, bar=f"<= {bar} (float32)")
    assert error <= bar


# --- image to image ------------------------------------------------------------------------------

STRENGTHS = ((8, 0.6), (20, 0.3), (20, 1.0), (3, 0.5))


@pytest.mark.parametrize("sampler", [name for name in references.DIFFUSERS if name != "lms"])
def test_image_to_image_as_diffusers(sampler, parity_record):
    worst = Worst()
    for schedule in SPACINGS:
        if schedule not in SAMPLERS[sampler].schedules:
            continue
        for n, strength in STRENGTHS:
            plan = make_plan(NoiseSchedule(STORED), sampler, schedule, n, strength=strength)
            run = references.run_diffusers(
                sampler,
                schedule,
                n,
                torch_network,
                NOISE,
                draws_for(plan),
                STORED,
                strength=strength,
                clean=CLEAN,
            )
            worst.compare(f"{schedule} {n} x {strength}", plan, run, clean=CLEAN)
    worst.hold(parity_record, f"{sampler}, image to image", "diffusers")


@pytest.mark.parametrize("sampler", references.K_DIFFUSION)
def test_image_to_image_as_a1111(sampler, parity_record):
    """A1111 runs the last int(min(strength, 0.999) * n) + 1 of n steps."""
    worst = Worst()
    for schedule in ("karras", "exponential"):
        for n, strength in STRENGTHS:
            plan = make_plan(NoiseSchedule(STORED), sampler, schedule, n, strength=strength)
            t_enc = int(min(strength, 0.999) * n)
            sigmas = references.k_sigmas(schedule, n, STORED)[n - t_enc - 1 :]
            run = references.run_k_diffusion(
                sampler, sigmas, torch_network, NOISE, draws_for(plan), STORED, clean=CLEAN
            )
            worst.compare(f"{schedule} {n} x {strength}", plan, run, clean=CLEAN)
    worst.hold(parity_record, f"{sampler}, image to image as A1111", "k-diffusion")


def test_lms_starts_over_in_image_to_image(parity_record):
    """diffusers drops terms of its fourth-order formula there; k-diffusion's start is followed."""
    worst = Worst()
    plan = make_plan(NoiseSchedule(STORED), "lms", "trailing", 8, strength=0.6)
    run = references.run_k_diffusion(
        "lms", plan.grid.sigmas, torch_network, NOISE, [], STORED, clean=CLEAN
    )
    worst.compare("trailing 8 x 0.6", plan, run, clean=CLEAN)
    worst.hold(parity_record, "lms, image to image on diffusers' levels", "k-diffusion")
    theirs = references.run_diffusers(
        "lms", "trailing", 8, torch_network, NOISE, [], STORED, strength=0.6, clean=CLEAN
    )
    np.testing.assert_allclose(theirs.start, run.start, atol=1e-5)
    assert relative(theirs.steps[0], run.steps[0]) > 0.05  # not a solver's step


@pytest.mark.parametrize("sampler", ["dpm2", "dpm2_a", "dpmpp_3m_sde"])
def test_a1111_discards_the_penultimate_level(sampler, parity_record):
    worst = Worst()
    plan = make_plan(NoiseSchedule(STORED), sampler, "karras", 9, discard_penultimate=True)
    sigmas = references.k_sigmas("karras", 10, STORED)
    sigmas = np.concatenate([sigmas[:-2], sigmas[-1:]])
    run = references.run_k_diffusion(sampler, sigmas, torch_network, NOISE, draws_for(plan), STORED)
    worst.compare("karras 9", plan, run)
    worst.hold(parity_record, f"{sampler}, penultimate discarded", "k-diffusion")


# --- inpainting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    ["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "lms", "unipc", "lcm", "tcd"],
)
def test_inpainting_blends_as_diffusers(sampler, parity_record):
    """After each step the kept part is the clean latents with the first noise, at the next level.

    Left out are samplers of two calls a step, and plms with its doubled first one: diffusers blends
    between the two calls as well, which a sampler of whole steps does not show.
    """
    mask = (np.random.RandomState(3).random_sample(SHAPE) < 0.5).astype(np.float32)
    worst = Worst()

    def theirs(latents, known):
        return torch.from_numpy(mask) * latents + torch.from_numpy(1 - mask) * known

    def ours(plan, step):
        known = plan.noised(CLEAN, NOISE, step.index)
        return mx.array(mask) * step.latents + mx.array(1 - mask) * known

    for schedule in SPACINGS:
        if schedule not in SAMPLERS[sampler].schedules:
            continue
        for n, strength in ((8, None), (8, 0.6)):
            if sampler == "lms" and strength is not None:
                continue  # see test_lms_starts_over_in_image_to_image
            plan = make_plan(NoiseSchedule(STORED), sampler, schedule, n, strength=strength)
            run = references.run_diffusers(
                sampler,
                schedule,
                n,
                torch_network,
                NOISE,
                draws_for(plan),
                STORED,
                strength=strength,
                clean=CLEAN,
                blend=theirs,
            )
            clean = None if strength is None else CLEAN
            worst.compare(f"{schedule} {n} x {strength}", plan, run, clean=clean, blend=ours)
            kept = 1 - mask
            np.testing.assert_array_equal(run.steps[-1] * kept, CLEAN * kept)
    worst.hold(parity_record, f"{sampler}, inpainting", "diffusers")


# --- the beta distribution -----------------------------------------------------------------------


def test_beta_quantiles_are_scipys(parity_record):
    p = np.linspace(0, 1, 1001)
    for a, b in ((0.6, 0.6), (0.5, 2.0), (3.0, 0.7)):
        error = float(np.abs(beta_quantile(p, a, b) - scipy.stats.beta.ppf(p, a, b)).max())
        parity_record(f"beta quantile, a {a} b {b}: scipy", max_error=error, bar="<= 1e-13")
        assert error <= 1e-13


# --- negative controls: each break must be seen --------------------------------------------------


def step_error(plan, run, **more):
    return Worst().compare("", plan, run, **more)


def reference(sampler, schedule, n=8, prediction="epsilon"):
    plan = make_plan(NoiseSchedule(STORED, prediction), sampler, schedule, n)
    draws = draws_for(plan)
    return plan, references.run(
        sampler, schedule, n, torch_network, NOISE, draws, STORED, prediction
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_control_a_timestep_off_by_one(sampler, parity_record):
    plan, run = reference(sampler, SAMPLERS[sampler].schedules[0])
    error = step_error(plan, run, network=Network(offset=1.0))
    parity_record(f"control: {sampler}, t + 1", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


@pytest.mark.parametrize("sampler", ["ddim", "plms", "tcd"])
def test_control_a_final_level_of_no_noise(sampler, parity_record):
    """set_alpha_to_one True instead of False."""
    plan, run = reference(sampler, SAMPLERS[sampler].schedules[0])
    grid = type(plan.grid)

    def clean_below(self, timestep):
        last = timestep < 0 or (sampler == "tcd" and timestep == 0)
        return 1.0 if last else float(self.schedule.alphas_cumprod[timestep])

    with mock.patch.object(grid, "signal", clean_below):
        error = step_error(plan, run)
    parity_record(f"control: {sampler}, final alpha 1", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


def test_control_a_last_step_of_full_order(parity_record):
    """DPM++ 2M that extrapolates into its last step too."""
    plan, run = reference("dpmpp_2m", "trailing")

    def without_lower_order_final(denoise, x, grid, draw):
        steps, earlier = samplers.dpmpp_2m(denoise, x, grid, draw), None
        step = next(steps)
        for _ in range(len(grid) - 1):
            earlier = step.denoised
            step = steps.send((yield step))
        extrapolated = step.latents + 0.5 * (step.denoised - earlier)
        yield Step(step.index, extrapolated, step.denoised)

    broken = replace(SAMPLERS["dpmpp_2m"], algorithm=without_lower_order_final)
    with mock.patch.dict(SAMPLERS, {"dpmpp_2m": broken}):
        error = step_error(plan, run)
    parity_record("control: dpmpp_2m, last order 2", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


def test_control_rounded_karras_timesteps(parity_record):
    """diffusers rounds them for DPM++; k-diffusion, which is followed, does not."""
    plan, run = reference("dpmpp_2m", "karras")
    rounded = replace(plan.grid, timesteps=[round(t) for t in plan.grid.timesteps])
    error = step_error(replace(plan, grid=rounded), run)
    parity_record("control: dpmpp_2m, karras rounded", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


def test_control_leading_noise_of_the_wrong_scale(parity_record):
    plan, run = reference("euler", "leading")
    error = step_error(plan, run, start=mx.array(NOISE * plan.grid.sigmas[0]))
    parity_record("control: euler leading from sigma", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


def test_control_noise_drawn_in_another_order(parity_record):
    plan, run = reference("dpmpp_sde", "karras")
    draws = draws_for(plan)
    swapped = [draws[i ^ 1] for i in range(len(draws))]
    with mock.patch(f"{__name__}.draws_for", lambda plan: swapped):
        error = step_error(plan, run)
    parity_record("control: dpmpp_sde, draws swapped", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


def test_control_one_prediction_read_as_the_other(parity_record):
    _, run = reference("euler", "trailing", prediction="v_prediction")
    plan = make_plan(NoiseSchedule(STORED), "euler", "trailing", 8)
    error = step_error(plan, run)
    parity_record("control: euler, v read as eps", max_step_error=error, bar=f"> {CONTROL}")
    assert error > CONTROL


def test_why_diffusers_third_order_sde_is_not_followed(parity_record):
    """Its factor of the second difference tends to -1 as the step shrinks; it has to vanish."""
    h = 1e-3
    theirs = (1 - np.exp(-2 * h) - 2 * h) / (2 * h) ** 2 - 0.5
    k_diffusion = -((np.expm1(-2 * h) / (2 * h) + 1) / (2 * h) - 0.5)
    parity_record("3M SDE, D2 factor at h = 0.001", diffusers=theirs, k_diffusion=k_diffusion)
    assert theirs == pytest.approx(-1, abs=1e-3)
    assert k_diffusion == pytest.approx(0, abs=1e-3)
