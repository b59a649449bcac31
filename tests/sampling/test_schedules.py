"""Noise schedules and the levels that runs visit, against the references' own numbers."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlx_maple.sampling import SAMPLERS, SCHEDULES, NoiseSchedule, make_plan
from mlx_maple.sampling.schedule import SPACINGS, beta_quantile

GOLDEN = json.loads(Path(__file__).with_name("golden_samplers.json").read_text())
STANDARD = NoiseSchedule.from_betas()


def float32_schedule(prediction="epsilon"):
    """What the golden file was made with: the standard schedule as a checkpoint stores it."""
    stored = STANDARD.alphas_cumprod.astype(np.float32)
    return NoiseSchedule.from_alphas_cumprod(stored, prediction=prediction)


# --- training schedules ----------------------------------------------------------------------


def test_stable_diffusion_by_its_known_numbers():
    assert STANDARD.train_steps == 1000
    assert STANDARD.alphas_cumprod[[0, -1]] == pytest.approx([0.99915, 0.00466010], rel=1e-6)
    assert STANDARD.sigmas[[0, -1]] == pytest.approx([0.02916716, 14.6146412], rel=1e-6)


def test_linear_and_cosine_betas():
    linear = NoiseSchedule.from_betas("linear", 1e-4, 0.02)
    assert linear.alphas_cumprod[0] == pytest.approx(0.9999)
    assert linear.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    cosine = NoiseSchedule.from_betas("cosine")
    assert cosine.alphas_cumprod[[0, 500]] == pytest.approx([0.99995872, 0.49228517], rel=1e-6)
    assert cosine.alphas_cumprod[-1] == pytest.approx(2.4287e-9, rel=1e-4)  # as capped, not floored


def test_zero_terminal_snr_keeps_the_top_and_silences_the_end():
    rescaled = NoiseSchedule.from_betas(zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[0] == pytest.approx(STANDARD.alphas_cumprod[0])
    assert rescaled.alphas_cumprod[-1] == 2**-24
    assert rescaled.sigmas[-1] == pytest.approx(4096, rel=1e-6)
    assert rescaled.alphas_cumprod[-2] == pytest.approx(1.96789e-7, rel=1e-4)


@pytest.mark.parametrize("bits", [11, 8])
def test_a_half_precision_copy_is_read_as_what_it_came_from(bits):
    mantissa, exponent = np.frexp(STANDARD.alphas_cumprod)
    rounded = np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent)
    if bits == 8:  # bfloat16 cannot tell all neighbours apart
        assert (np.diff(rounded) == 0).any()
    else:
        np.testing.assert_array_equal(rounded, STANDARD.alphas_cumprod.astype(np.float16))
    read = NoiseSchedule.from_alphas_cumprod(rounded.astype(np.float32))
    np.testing.assert_array_equal(read.alphas_cumprod, STANDARD.alphas_cumprod)


def test_stored_alphas_are_honoured():
    stored = STANDARD.alphas_cumprod.astype(np.float32)
    np.testing.assert_array_equal(float32_schedule().alphas_cumprod, stored.astype(np.float64))
    other = NoiseSchedule.from_betas(end=0.0125).alphas_cumprod.astype(np.float16)
    read = NoiseSchedule.from_alphas_cumprod(other)  # another schedule, coarse: as it is
    np.testing.assert_array_equal(read.alphas_cumprod, other.astype(np.float64))


@pytest.mark.parametrize(
    "values",
    [[0.5], [[0.9, 0.1]], [0.1, 0.9], [0.9, 0.9, 0.1], [1.0, 0.5], [0.9, np.nan], [0.9, -0.1]],
)
def test_nonsense_is_refused(values):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule.from_alphas_cumprod(np.array(values))


def test_unknown_kinds_are_refused_by_name():
    with pytest.raises(ValueError, match=r"scaled_linear, linear, cosine.*'sigmoid'"):
        NoiseSchedule.from_betas("sigmoid")
    with pytest.raises(ValueError, match=r"epsilon, v_prediction.*'sample'"):
        NoiseSchedule.from_betas(prediction="sample")


def test_a_schedule_cannot_be_changed_behind_its_back():
    mine = STANDARD.alphas_cumprod.copy()
    schedule = NoiseSchedule(mine)
    mine[0] = 0.5
    assert schedule.alphas_cumprod[0] == STANDARD.alphas_cumprod[0]
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5


def test_sigma_and_timestep_are_inverses_between_and_at_the_grid():
    t = np.array([0, 0.25, 17.5, 500, 998.9, 999])
    np.testing.assert_allclose(STANDARD.timestep_of(STANDARD.sigma_at(t)), t, atol=1e-9)
    assert STANDARD.timestep_of(1e-9) == 0
    assert STANDARD.timestep_of(1e9) == 999


# --- grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", GOLDEN["grids"])
def test_levels_are_the_references(key):
    sampler, schedule, n = key.split()
    expected = GOLDEN["grids"][key]
    grid = make_plan(float32_schedule(), sampler, schedule, int(n)).grid
    # 0.002: float32 log sigma cannot place a timestep near 0 better
    np.testing.assert_allclose(grid.timesteps, expected["timesteps"], atol=2e-3)
    if "sigmas" in expected:
        np.testing.assert_allclose(grid.sigmas, expected["sigmas"], rtol=2e-7)


def test_whole_timesteps_are_exactly_whole():
    for sampler, schedule in [
        ("euler", "leading"),
        ("euler", "trailing"),
        ("dpmpp_2m", "linspace"),
    ]:
        told = make_plan(STANDARD, sampler, schedule, 7).grid.timesteps
        assert all(t == round(t) for t in told)


def test_facts_that_ports_get_wrong():
    def told(sampler, schedule, n=8):
        return [round(t, 3) for t in make_plan(STANDARD, sampler, schedule, n).grid.timesteps]

    assert told("ddim", "leading") == [876, 751, 626, 501, 376, 251, 126, 1]
    assert told("plms", "leading")[:4] == [876, 751, 751, 626]
    assert told("euler", "linspace")[:2] == [999, 856.286]
    assert told("dpmpp_2m", "linspace")[:5] == [999, 874, 749, 624, 500]
    assert told("dpmpp_2m", "leading")[:2] == [889, 778]
    assert told("euler", "karras")[1] == 889.546  # fractional in k-diffusion
    assert told("lcm", "trailing", 4) == [999, 759, 499, 259]


@pytest.mark.parametrize(
    ("sampler", "schedule", "scale"),
    [
        ("euler", "linspace", 14.614641),
        ("euler", "trailing", 14.614641),
        ("euler", "leading", np.sqrt(7.371844**2 + 1)),
        ("euler", "karras", 14.614641),
        ("dpmpp_2m", "karras", 14.614641),
        ("dpmpp_2m", "trailing", np.sqrt(14.614641**2 + 1)),
        ("unipc", "karras", np.sqrt(14.614641**2 + 1)),
        ("ddim", "leading", 1.0),
        ("lcm", "trailing", 1.0),
    ],
)
def test_starting_noise_has_the_references_scale(sampler, schedule, scale):
    plan = make_plan(STANDARD, sampler, schedule, 8)
    assert plan.grid.noise_scale == pytest.approx(scale, rel=1e-6)


def test_uniform_and_linspace_differ_only_between_timesteps():
    linspace = make_plan(STANDARD, "euler", "linspace", 20).grid.sigmas
    uniform = make_plan(STANDARD, "euler", "uniform", 20).grid.sigmas
    difference = np.abs(np.array(linspace[:-1]) / uniform[:-1] - 1).max()
    assert 1e-6 < difference < 3e-5


def test_beta_visits_a_level_once():
    plan = make_plan(STANDARD, "euler", "beta", 400)
    assert plan.total < 400
    assert plan.total == len(plan.grid.sigmas) - 1 == len(set(plan.grid.timesteps))


@pytest.mark.parametrize("word", SPACINGS)
def test_every_count_of_steps_gives_that_many_levels(word):
    """diffusers' trailing has one too many at 62 counts (61, 103, ...), by float rounding."""
    for n in range(1, 1001):
        timesteps = make_plan(STANDARD, "ddim", word, n).grid.timesteps
        assert len(timesteps) == n
        assert all(0 <= below < above <= 999 for above, below in pairwise(timesteps))


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be from 1 to 1000, got 1001"):
        make_plan(STANDARD, "euler", "karras", 1001)
    with pytest.raises(ValueError, match="at most 50 steps, got 51"):
        make_plan(STANDARD, "lcm", "trailing", 51)
    with pytest.raises(ValueError, match="share a noise level"):
        make_plan(STANDARD, "dpmpp_2m", "leading", 1000)


# --- the beta distribution without scipy ------------------------------------------------------


def test_beta_quantiles_against_closed_forms():
    p = np.linspace(0.001, 0.999, 97)
    np.testing.assert_allclose(beta_quantile(p, 0.5, 0.5), np.sin(np.pi * p / 2) ** 2, rtol=1e-12)
    np.testing.assert_allclose(beta_quantile(p, 3.0, 1.0), p ** (1 / 3), rtol=1e-12)
    np.testing.assert_allclose(beta_quantile(p, 1.0, 2.5), 1 - (1 - p) ** 0.4, rtol=1e-10)
    np.testing.assert_array_equal(beta_quantile(np.array([0.0, 1.0]), 0.6, 0.6), [0.0, 1.0])


def test_words_and_tables_agree():
    assert len(set(SCHEDULES)) == len(SCHEDULES)
    for entry in SAMPLERS.values():
        assert set(entry.schedules) <= set(SCHEDULES)
