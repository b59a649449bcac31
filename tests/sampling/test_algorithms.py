"""Every sampler: the references' steps, exact solutions, and what a plan promises."""

import json
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from synthetic import gaussian_noise, predict

from mlx_maple.sampling import SAMPLERS, NoiseSchedule, make_plan

GOLDEN = json.loads(Path(__file__).with_name("golden_samplers.json").read_text())
STANDARD = NoiseSchedule.from_betas()
SHAPE = (1, 1, 2, 4)

DETERMINISTIC = [name for name in SAMPLERS if make_plan(STANDARD, name, steps=8).draws == 0]
STOCHASTIC = [name for name in SAMPLERS if name not in DETERMINISTIC]
ALONG_SIGMA = [name for name in SAMPLERS if name not in ("ddim", "plms", "lcm", "tcd")]


def network(x, t):
    return mx.array(predict(np.array(x), t).astype(np.float32))


def step_noise(i, shape):
    return gaussian_noise(i + 1, shape)


def run(plan, model=network, noise=None, clean=None):
    noise = gaussian_noise(0, SHAPE) if noise is None else noise
    return list(plan.sample(model, plan.initial(noise, clean), step_noise))


# --- the references' steps -----------------------------------------------------------------------


@pytest.mark.parametrize("key", GOLDEN["runs"])
def test_each_step_is_the_references(key):
    sampler, schedule, prediction = key.split()
    stored = STANDARD.alphas_cumprod.astype(np.float32)
    noise_schedule = NoiseSchedule.from_alphas_cumprod(stored, prediction=prediction)
    plan = make_plan(noise_schedule, sampler, schedule, 6)
    start, *expected = (np.array(row).reshape(SHAPE) for row in GOLDEN["runs"][key])
    np.testing.assert_allclose(plan.initial(gaussian_noise(0, SHAPE)), start, rtol=1e-6)
    steps = run(plan)
    assert len(steps) == len(expected)
    for step, latents in zip(steps, expected, strict=True):
        error = np.abs(np.array(step.latents) - latents).max() / np.abs(latents).max()
        assert error < 3e-5, f"step {step.index}"


# --- exact solutions: data drawn from a normal distribution --------------------------------------

MEAN, STD = 0.3, 0.6


def perfect(noise_schedule):
    """The exact network for N(MEAN, STD**2) data, at any timestep."""

    def model(x, t):
        sigma = float(noise_schedule.sigma_at(np.array(t)))
        root = np.sqrt(1 + sigma**2)
        x = x * root
        clean = (sigma**2 * MEAN + STD**2 * x) / (sigma**2 + STD**2)
        if noise_schedule.prediction == "epsilon":
            return (x - clean) / sigma
        return (x / root**2 - clean) * (root / sigma)

    return model


def solution(x, sigma, target):
    """Where the probability flow takes x from sigma to target: exact for normal data."""
    return MEAN + (x - MEAN) * np.sqrt((STD**2 + target**2) / (STD**2 + sigma**2))


def error_at_the_last_level(sampler, n, prediction):
    """Worst error where the grid ends, before the step to 0 (which is first order in all)."""
    noise_schedule = NoiseSchedule.from_betas(prediction=prediction)
    plan = make_plan(noise_schedule, sampler, "karras", n)
    x = plan.initial(gaussian_noise(0, (1, 8, 8, 4)))
    steps = list(plan.sample(perfect(noise_schedule), x))
    exact = solution(np.array(x, dtype=np.float64), plan.grid.sigmas[0], plan.grid.sigmas[-2])
    return np.abs(np.array(steps[-2].latents) - exact).max()


ORDERS = {"euler": 1, "heun": 2, "dpm2": 2, "dpmpp_2m": 2, "lms": 3, "unipc": 2}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ORDERS)
def test_the_error_falls_with_the_order(sampler, prediction):
    """Half the step, 2 ** order less error. Karras grids end at the same level for every n."""
    coarse, fine = (error_at_the_last_level(sampler, n, prediction) for n in (16, 32))
    assert fine < 0.1 / 4 ** (ORDERS[sampler] - 1)
    assert np.log2(coarse / fine) > ORDERS[sampler] - 0.35


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_timestep_samplers_converge_too(sampler):
    noise = gaussian_noise(0, (1, 8, 8, 4))
    errors = []
    for n in (50, 100, 200):
        plan = make_plan(STANDARD, sampler, "trailing", n)
        *_, last = plan.sample(perfect(STANDARD), plan.initial(noise))
        alpha, sigma, _ = plan.grid.level(-1)  # they end at timestep 0's level
        top = STANDARD.sigmas[-1]
        exact = solution(noise * np.sqrt(1 + top**2), top, sigma / alpha) * alpha
        errors.append(np.abs(np.array(last.latents) - exact).max())
    order, final = (0.9, 0.02) if sampler == "ddim" else (1.6, 5e-4)
    assert errors[-1] < final
    assert all(coarse / fine > 2**order for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("sampler", [name for name in STOCHASTIC if name not in ("lcm", "tcd")])
def test_noise_is_put_back_in_the_right_amount(sampler):
    """The distribution of the end is the data's: too much or too little fresh noise shows in it."""
    plan = make_plan(STANDARD, sampler, "karras", 60)
    steps = run(plan, perfect(STANDARD), gaussian_noise(0, (2, 64, 64, 4)))
    end = np.array(steps[-1].latents)
    first_order = sampler in ("euler_a", "dpmpp_sde")  # fall short by as much at 60 steps
    assert end.mean() == pytest.approx(MEAN, abs=0.02)
    assert end.std() == pytest.approx(STD, rel=0.07 if first_order else 0.015)


def test_a_consistency_step_lands_on_the_prediction():
    plan = make_plan(STANDARD, "lcm", steps=1)
    (step,) = run(plan, perfect(STANDARD))
    x = gaussian_noise(0, SHAPE)
    sigma = STANDARD.sigmas[-1]
    denoised = (sigma**2 * MEAN + STD**2 * x * np.sqrt(1 + sigma**2)) / (sigma**2 + STD**2)
    np.testing.assert_allclose(step.latents, denoised, atol=1e-4)


# --- identities between samplers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("stochastic", "deterministic"),
    [("euler_a", "euler"), ("dpm2_a", "dpm2"), ("dpmpp_2m_sde", "dpmpp_2m")],
)
@pytest.mark.parametrize("schedule", ["karras", "trailing"])
def test_without_noise_the_ancestral_sampler_is_the_plain_one(stochastic, deterministic, schedule):
    quiet = make_plan(STANDARD, stochastic, schedule, 9, eta=0.0)
    assert quiet.draws == 0
    plain = run(make_plan(STANDARD, deterministic, schedule, 9))
    for a, b in zip(run(quiet), plain, strict=True):
        np.testing.assert_allclose(a.latents, b.latents, atol=2e-5)


def test_ddim_is_euler_in_other_coordinates():
    """Where the strides match the spacing, x / sqrt(a) walks sigma as Euler does."""
    ddim = run(make_plan(STANDARD, "ddim", "leading", 10))
    plan = make_plan(STANDARD, "euler", "leading", 10)
    euler = run(plan)
    for step, expected in list(zip(ddim, euler, strict=True))[:-1]:
        scale = np.sqrt(1 + plan.grid.sigmas[step.index + 1] ** 2)
        np.testing.assert_allclose(step.latents * scale, expected.latents, atol=2e-5)


@pytest.mark.parametrize(
    "sampler", ["dpmpp_2m", "dpmpp_sde", "dpmpp_3m_sde", "unipc", "lms", "heun"]
)
def test_one_step_is_the_denoised_latents(sampler):
    plan = make_plan(STANDARD, sampler, "karras", 1)
    (step,) = run(plan)
    np.testing.assert_allclose(step.latents, step.denoised, atol=2e-5)


# --- what a plan promises ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 13])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_counts_are_what_happens(sampler, n):
    for schedule in SAMPLERS[sampler].schedules:
        for strength in (None, 0.6):
            plan = make_plan(STANDARD, sampler, schedule, n, strength=strength)
            called, drawn = [], []

            def model(x, t, called=called):
                called.append(t)
                return network(x, t)

            def noise(i, shape, drawn=drawn):
                drawn.append(i)
                return step_noise(i, shape)

            clean = None if strength is None else gaussian_noise(9, SHAPE)
            x = plan.initial(gaussian_noise(0, SHAPE), clean)
            steps = list(plan.sample(model, x, noise))
            assert [step.index for step in steps] == list(range(plan.total))
            assert len(called) == plan.model_calls
            assert drawn == list(range(plan.draws))
            assert all(0 <= t <= 999 for t in called)
            final = steps[-1].latents
            assert final.dtype == mx.float32
            assert np.isfinite(np.array(final)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_repeats_bit_for_bit(sampler):
    plan = make_plan(STANDARD, sampler, steps=5)
    for a, b in zip(run(plan), run(plan), strict=True):
        np.testing.assert_array_equal(a.latents, b.latents)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_alone_and_in_a_batch_is_the_same(sampler):
    plan = make_plan(STANDARD, sampler, steps=4)
    noise = gaussian_noise(0, (3, 2, 2, 4))

    def draws(i, shape):
        return gaussian_noise(i + 1, (3, 2, 2, 4))[: shape[0]]

    *_, batch = plan.sample(network, plan.initial(noise), draws)
    *_, alone = plan.sample(network, plan.initial(noise[:1]), draws)
    np.testing.assert_array_equal(batch.latents[:1], alone.latents)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_sent_back_are_gone_on_from(sampler):
    """Inpainting with nothing masked: every step is replaced by the known latents."""
    plan = make_plan(STANDARD, sampler, steps=6)
    clean, noise = gaussian_noise(5, SHAPE), gaussian_noise(0, SHAPE)
    seen = []

    def model(x, t):
        seen.append(np.array(x))
        return network(x, t)

    steps = plan.sample(model, plan.initial(noise), step_noise)
    step = next(steps)
    while step.index < plan.total - 1:
        step = steps.send(plan.noised(clean, noise, step.index))
    seen.clear()
    # the last step began from the latents that were sent
    steps = plan.sample(model, plan.initial(noise), step_noise)
    for step in steps:
        if step.index == plan.total - 2:
            calls = len(seen)
            known = plan.noised(clean, noise, step.index)
            steps.send(known)
            break
    at = plan.grid.timesteps[-1]
    a = STANDARD.alphas_cumprod[round(at)]
    if sampler in ALONG_SIGMA:
        a = 1 / (1 + plan.grid.sigmas[-2] ** 2)
    expected = np.sqrt(a) * clean + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(seen[calls], expected, atol=1e-5)


def test_closing_the_generator_stops_the_run():
    called = []

    def model(x, t):
        called.append(t)
        return network(x, t)

    plan = make_plan(STANDARD, "euler", steps=10)
    steps = plan.sample(model, plan.initial(gaussian_noise(0, SHAPE)))
    next(steps)
    steps.close()
    assert len(called) == 1
    assert list(steps) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noised_reaches_each_level_and_ends_clean(sampler):
    plan = make_plan(STANDARD, sampler, steps=6)
    clean, noise = np.full(SHAPE, 2.0, np.float32), np.full(SHAPE, 1.0, np.float32)
    levels = [np.array(plan.noised(clean, noise, i)).flat[0] for i in range(plan.total)]
    assert levels[-1] == 2.0
    for i, value in enumerate(levels[:-1]):
        if sampler in ALONG_SIGMA:
            assert value == pytest.approx(2 + plan.grid.sigmas[i + 1])
        else:
            following = plan.grid.timesteps[i + 1 + (sampler == "plms")]
            a = STANDARD.alphas_cumprod[following]
            assert value == pytest.approx(2 * np.sqrt(a) + np.sqrt(1 - a))
    for index in (-1, plan.total):
        with pytest.raises(ValueError, match="expected a step from 0 to 5"):
            plan.noised(clean, noise, index)


# --- image to image ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "schedule", "n", "strength", "total", "first"),
    [
        ("ddim", "leading", 8, 0.6, 4, 376),  # int(8 * 0.6) = 4
        ("ddim", "leading", 20, 1.0, 20, 951),
        ("ddim", "leading", 20, 0.01, 1, 1),  # diffusers would make none, and fail
        ("euler", "trailing", 8, 0.6, 4, 499),
        ("heun", "linspace", 8, 0.5, 4, 428.143),
        ("plms", "leading", 8, 0.6, 4, 501),  # one further up: the repeated timestep is cut off
        ("euler", "karras", 20, 0.75, 16, 826.79),  # A1111: t_enc = 15, and one more
        ("dpmpp_2m", "karras", 20, 1.0, 20, 999),
        ("dpmpp_2m", "karras", 20, 0.0, 1, 0),
        ("unipc", "karras", 20, 0.75, 15, 772),  # unipc is diffusers' throughout
        ("lcm", "trailing", 4, 0.5, 2, 499),
    ],
)
def test_strength_keeps_the_references_steps(sampler, schedule, n, strength, total, first):
    plan = make_plan(STANDARD, sampler, schedule, n, strength=strength)
    assert plan.total == total
    assert plan.grid.timesteps[0] == pytest.approx(first, abs=0.05)


def test_a_partial_run_starts_from_noised_clean_latents():
    clean, noise = gaussian_noise(1, SHAPE), gaussian_noise(0, SHAPE)
    plan = make_plan(STANDARD, "euler", "karras", 20, strength=0.5)
    np.testing.assert_allclose(
        plan.initial(noise, clean), clean + plan.grid.sigmas[0] * noise, rtol=1e-6
    )
    plan = make_plan(STANDARD, "ddim", "leading", 20, strength=0.5)
    a = STANDARD.alphas_cumprod[plan.grid.timesteps[0]]
    np.testing.assert_allclose(
        plan.initial(noise, clean),
        np.sqrt(a) * clean + np.sqrt(1 - a) * noise,
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="starts from clean latents"):
        plan.initial(noise)


def test_full_strength_may_start_from_noise_alone():
    """Inpainting at strength 1 begins as text to image does."""
    noise = gaussian_noise(0, SHAPE)
    full = make_plan(STANDARD, "ddim", "leading", 20, strength=1.0)
    np.testing.assert_array_equal(full.initial(noise), noise)


# --- choices and refusals ------------------------------------------------------------------------


def test_defaults_are_resolved():
    plan = make_plan(STANDARD)
    assert (plan.sampler, plan.schedule, plan.total) == ("dpmpp_2m", "karras", 20)
    assert make_plan(STANDARD, "ddim").schedule == "leading"
    assert make_plan(STANDARD, "dpmpp_2m_sde").schedule == "exponential"
    assert (make_plan(STANDARD, "euler_a").eta, make_plan(STANDARD, "tcd").eta) == (1.0, 0.3)
    assert make_plan(STANDARD, "euler").eta is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ddmi"}, "unknown sampler 'ddmi': choose from ddim, plms, .*tcd"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose from leading, .*ays"),
        (
            {"sampler": "ddim", "schedule": "karras"},
            "ddim .*'karras'.* leading, linspace, trailing",
        ),
        ({"sampler": "lcm", "schedule": "leading"}, "lcm .*'leading'.*: choose from trailing"),
        ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"strength": 1.5}, "strength must be from 0 to 1, got 1.5"),
        ({"strength": float("nan")}, "strength must be from 0 to 1, got nan"),
        ({"sampler": "euler_a", "eta": -1}, "eta must be from 0 to 1, got -1"),
        ({"sampler": "euler", "eta": 0.5}, "euler has no eta"),
        ({"sampler": "ddim", "discard_penultimate": True}, "ddim .*no level to discard"),
    ],
)
def test_refusals_say_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(STANDARD, **arguments)


def test_a_stochastic_run_asks_for_noise():
    plan = make_plan(STANDARD, "euler_a", steps=3)
    x = plan.initial(gaussian_noise(0, SHAPE))
    with pytest.raises(ValueError, match="euler_a draws noise: step_noise is needed"):
        plan.sample(network, x)
    with pytest.raises(ValueError, match=r"expected step noise \(1, 1, 2, 4\), got \(1, 4, 1, 2\)"):
        list(plan.sample(network, x, lambda i, shape: np.zeros((1, 4, 1, 2), np.float32)))


def test_the_penultimate_level_can_be_left_out():
    """A1111's DPM2: one level more, then the last above 0 dropped."""
    plan = make_plan(STANDARD, "dpm2", "karras", 10, discard_penultimate=True)
    longer = make_plan(STANDARD, "dpm2", "karras", 11)
    assert plan.total == 10
    assert plan.grid.sigmas == [*longer.grid.sigmas[:-2], 0.0]


def test_nothing_is_evaluated_while_sampling():
    """Steps are lazy: the caller decides when to compute. MLX refuses to evaluate inside vmap."""
    plan = make_plan(STANDARD, "heun", "karras", 3)

    def last_latents(x):
        *_, last = plan.sample(lambda latents, t: latents * t / 1000, x)
        return last.latents

    def evaluating(x):
        *_, last = plan.sample(lambda latents, t: latents * latents.sum().item(), x)
        return last.latents

    x = mx.ones((2, *SHAPE))
    assert mx.vmap(last_latents)(x).shape == x.shape
    with pytest.raises(ValueError, match="eval"):
        mx.vmap(evaluating)(x)
