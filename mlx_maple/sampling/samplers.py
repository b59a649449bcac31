"""Samplers: from noise to clean latents, one function an algorithm.

Each algorithm is a generator over a denoiser. It yields a Step and is sent the latents to go on
from, the same or (inpainting) blended ones:

    x = yield Step(index, x, denoised)

Legend   x latents (B, h, w, C) float32, channels last; denoised the clean latents seen in x;
         sigma, target the levels before and after a step; h = log(sigma / target), the step in log
         signal-to-noise; a the signal share at a timestep; draw() one array of unit noise like x.
Source   Named at each function. Reference code: crowsonkb/k-diffusion 0.1.1 sampling.py and
         huggingface/diffusers 0.42.1 src/diffusers/schedulers, which agree on an algorithm wherever
         both have it; they differ in the levels visited, which schedule.py and the table know.
Differs  Coefficients are float64, latents float32. Noise is drawn step by step from the caller,
         not from torchsde's Brownian tree: SDE samplers have the reference's distribution, and its
         latents when fed the same noise. s_churn is 0 and s_noise 1, the references' defaults.
         Tolerances: tests/parity/test_samplers.py.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from math import expm1, inf, log, sqrt

import mlx.core as mx
import numpy as np

from mlx_maple.sampling.denoiser import Denoiser
from mlx_maple.sampling.schedule import (
    SCHEDULES,
    SPACINGS,
    Grid,
    NoiseSchedule,
    SigmaGrid,
    TimestepGrid,
    distilled_grid,
    multistep_grid,
    plms_grid,
    sigma_grid,
    timestep_grid,
    unipc_grid,
)


@dataclass(frozen=True, eq=False)
class Step:
    """What a sampler shows after each step.

    Attributes:
        index: 0 .. total - 1.
        latents: (B, h, w, C) in the sampler's coordinates; after the last step, final latents.
        denoised: (B, h, w, C) the clean latents as the network last saw them, for previews.
    """

    index: int
    latents: mx.array
    denoised: mx.array


Steps = Generator[Step, mx.array, None]
Draw = Callable[[], mx.array]


# --- one call a step, along sigma ----------------------------------------------------------------


def euler(denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw) -> Steps:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without churn, first order.

    Reference: k-diffusion sample_euler; diffusers EulerDiscreteScheduler.
    """
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        x = yield Step(i, _keep(target / sigma, x, denoised), denoised)


def euler_a(
    denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw, *, eta: float = 1.0
) -> Steps:
    """Euler steps that overshoot to a lower level and climb back with fresh noise ("ancestral").

    Reference: k-diffusion sample_euler_ancestral; diffusers EulerAncestralDiscreteScheduler.
    """
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        down, up = _ancestral(sigma, target, eta)
        x = _add(_keep(down / sigma, x, denoised), up, draw)
        x = yield Step(i, x, denoised)


def lms(denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw) -> Steps:
    """Linear multistep: the polynomial through the last four slopes (Adams-Bashforth).

    Reference: k-diffusion sample_lms; diffusers LMSDiscreteScheduler. Image to image starts at
    first order, as k-diffusion does; diffusers there drops terms of the fourth-order formula.
    """
    slopes: list[mx.array] = []  # dx / dsigma, newest first
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x = _keep(target / sigma, x, denoised)  # the newest slope alone, then what others change
        _, *weights = _adams_weights(grid.sigmas[max(0, i - 3) : i + 1][::-1], target)
        for weight, older in zip(weights, slopes, strict=True):
            x = x + weight * (older - slope)
        slopes = [slope, *slopes[:2]]
        x = yield Step(i, x, denoised)


def dpmpp_2m(denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw) -> Steps:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), algorithm 2; first and last order 1.

    Reference: k-diffusion sample_dpmpp_2m; diffusers DPMSolverMultistepScheduler.
    """
    return dpmpp_2m_sde(denoise, x, grid, draw, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw, *, eta: float = 1.0
) -> Steps:
    """DPM-Solver++(2M) of the reverse SDE, midpoint form; without noise (eta 0) it is dpmpp_2m.

    Reference: k-diffusion sample_dpmpp_2m_sde; diffusers DPMSolverMultistepScheduler with
    algorithm_type "sde-dpmsolver++".
    """
    earlier, h_earlier = None, inf
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, target)
        estimate = denoised
        if earlier is not None and target > 0:
            estimate = denoised + h / (2 * h_earlier) * (denoised - earlier)
        earlier, h_earlier = denoised, h
        x = _keep((target / sigma) ** (1 + eta), x, estimate)
        x = yield Step(i, _add(x, _sde_noise(sigma, target, eta), draw), denoised)


def dpmpp_3m_sde(
    denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw, *, eta: float = 1.0
) -> Steps:
    """DPM-Solver++(3M) of the reverse SDE: third order once three predictions are there.

    Reference: k-diffusion sample_dpmpp_3m_sde, whatever the schedule: the third-order SDE update of
    diffusers' DPMSolverMultistepScheduler has the opposite sign at its constant of 1/2.
    """
    history: list[tuple[mx.array, float]] = []  # (denoised, the step taken from it), newest first
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, target)
        x = _keep((target / sigma) ** (1 + eta), x, denoised)
        if history and target > 0:
            reach = (1 + eta) * h
            phi_2 = expm1(-reach) / reach + 1
            phi_3 = phi_2 / reach - 0.5
            (last, h_last), *older = history
            r0 = h_last / h
            first = (denoised - last) / r0
            if older:
                (before_last, h_older) = older[0]
                r1 = h_older / h
                difference = first - (last - before_last) / r1
                first = first + r0 / (r0 + r1) * difference
                x = x - phi_3 / (r0 + r1) * difference
            x = x + phi_2 * first
        history = [(denoised, h), *history[:1]]
        x = yield Step(i, _add(x, _sde_noise(sigma, target, eta), draw), denoised)


def unipc(denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw) -> Steps:
    """UniPC, Zhao et al. 2023 (arXiv:2302.04867): order 2, B2(h), predicting the clean latents.

    Every new prediction first corrects the step that led to it, then the next level is predicted.
    Reference: diffusers UniPCMultistepScheduler (solver_type "bh2", lower_order_final).
    """
    sigmas = grid.sigmas
    history: list[mx.array] = []  # denoised, newest first
    start, order = x, 1
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if history:  # the corrector, from the level above to this one
            last = history[0]
            if order == 1:
                estimate = last + 0.5 * (denoised - last)
            else:
                h = _log_ratio(sigmas[i - 1], sigma)
                r = -_log_ratio(sigmas[i - 2], sigmas[i - 1]) / h
                b = expm1(-h)
                phi_2 = -b / h - 1
                first, second = phi_2 / b, (-2 * phi_2 / h - 1) / b
                share = (first - second) / (1 - r)
                estimate = last + share / r * (history[1] - last)
                estimate = estimate + (first - share) * (denoised - last)
            x = _keep(sigma / sigmas[i - 1], start, estimate)
        start = x
        order = min(2, i + 1, len(grid) - i)
        estimate = denoised
        if order == 2:  # the predictor
            r = -_log_ratio(sigmas[i - 1], sigma) / _log_ratio(sigma, target)
            estimate = denoised + 0.5 / r * (history[0] - denoised)
        history = [denoised, *history[:1]]
        x = yield Step(i, _keep(target / sigma, x, estimate), denoised)


# --- two calls a step, along sigma; the last step, to 0, has no second ---------------------------


def heun(denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw) -> Steps:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without churn: the mean of two slopes.

    Said of clean latents: the second prediction counts sigma / (2 target).
    Reference: k-diffusion sample_heun; diffusers HeunDiscreteScheduler.
    """
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        ahead = _keep(target / sigma, x, denoised)
        if target > 0:
            first, denoised = denoised, denoise(ahead, target)
            estimate = first + sigma / (2 * target) * (denoised - first)
            ahead = _keep(target / sigma, x, estimate)
        x = yield Step(i, ahead, denoised)


def dpm2(denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw) -> Steps:
    """DPM-Solver-2, Lu et al. 2022 (arXiv:2206.00927): the slope half-way in log sigma.

    Reference: k-diffusion sample_dpm_2; diffusers KDPM2DiscreteScheduler.
    """
    return dpm2_a(denoise, x, grid, draw, eta=0.0)


def dpm2_a(
    denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw, *, eta: float = 1.0
) -> Steps:
    """DPM-Solver-2 steps that overshoot and climb back with fresh noise; with eta 0 it is dpm2.

    Said of clean latents: the prediction half-way counts sigma / middle.
    Reference: k-diffusion sample_dpm_2_ancestral; diffusers KDPM2AncestralDiscreteScheduler.
    """
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = estimate = denoise(x, sigma)
        down, up = _ancestral(sigma, target, eta)
        if down > 0:
            middle = sqrt(sigma * down)
            first, denoised = denoised, denoise(_keep(middle / sigma, x, denoised), middle)
            estimate = first + sigma / middle * (denoised - first)
        x = _add(_keep(down / sigma, x, estimate), up, draw)
        x = yield Step(i, x, denoised)


def dpmpp_2s_a(
    denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw, *, eta: float = 1.0
) -> Steps:
    """DPM-Solver++(2S), Lu et al. 2022 (arXiv:2211.01095), algorithm 1, in ancestral steps.

    Reference: k-diffusion sample_dpmpp_2s_ancestral, whatever the schedule (diffusers has none).
    """
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        down, up = _ancestral(sigma, target, eta)
        if down > 0:
            middle = sqrt(sigma * down)
            denoised = denoise(_keep(middle / sigma, x, denoised), middle)
        x = _add(_keep(down / sigma, x, denoised), up, draw)
        x = yield Step(i, x, denoised)


def dpmpp_sde(
    denoise: Denoiser, x: mx.array, grid: SigmaGrid, draw: Draw, *, eta: float = 1.0
) -> Steps:
    """DPM-Solver++ of the reverse SDE, single step with a midpoint: two draws of noise a step.

    Reference: k-diffusion sample_dpmpp_sde (r = 1/2); diffusers DPMSolverSDEScheduler.
    """
    for i, (sigma, target) in enumerate(pairwise(grid.sigmas)):
        denoised = denoise(x, sigma)
        if target > 0:
            middle = sqrt(sigma * target)
            down, up = _ancestral(sigma, middle, eta)
            halfway = _add(_keep(down / sigma, x, denoised), up, draw)
            denoised = denoise(halfway, middle)
        down, up = _ancestral(sigma, target, eta)
        x = _add(_keep(down / sigma, x, denoised), up, draw)
        x = yield Step(i, x, denoised)


# --- along whole timesteps -----------------------------------------------------------------------


def ddim(
    denoise: Denoiser, x: mx.array, grid: TimestepGrid, draw: Draw, *, eta: float = 0.0
) -> Steps:
    """DDIM, Song et al. 2020 (arXiv:2010.02502), equations 12 and 16; eta 1 is DDPM.

    Every step goes T // n timesteps down, even where the spacing's next timestep is a few away, and
    the last one stops at timestep 0's level, not at none.
    Reference: diffusers DDIMScheduler (steps_offset 1, set_alpha_to_one and clip_sample False).
    """
    for i, t in enumerate(grid.timesteps):
        denoised = denoise(x, t)
        a, a_next = grid.signal(t), grid.signal(t - grid.stride)
        fresh = eta * sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        noise = (x - sqrt(a) * denoised) / sqrt(1 - a)
        x = sqrt(a_next) * denoised + sqrt(1 - a_next - fresh**2) * noise
        x = yield Step(i, _add(x, fresh, draw), denoised)


def plms(denoise: Denoiser, x: mx.array, grid: TimestepGrid, draw: Draw) -> Steps:
    """PLMS, Liu et al. 2022 (arXiv:2202.09778): DDIM steps with the last four predictions combined.

    The first step is taken twice: to the second timestep, and again with the mean of the
    predictions at both ends, so n steps make n + 1 calls. Image to image starts inside this list of
    calls; where the repeated timestep is cut off, the second step tells the network a timestep
    further down than the latents are. That is diffusers' way, and its pictures.
    Reference: diffusers PNDMScheduler (skip_prk_steps True, steps_offset 1, set_alpha_to_one
    False).
    """

    def step(start: mx.array, combined: mx.array, t: int) -> tuple[mx.array, mx.array]:
        denoised = denoise.clean(start, combined, t)
        a, a_next = grid.signal(t), grid.signal(t - grid.stride)
        noise = (start - sqrt(a) * denoised) / sqrt(1 - a)
        return sqrt(a_next) * denoised + sqrt(1 - a_next) * noise, denoised

    first, *calls = grid.timesteps
    e = [denoise.predict(x, first)]  # raw predictions, newest first
    ahead, denoised = step(x, e[0], first)
    if calls:
        mean = (denoise.predict(ahead, calls[0]) + e[0]) / 2
        ahead, denoised = step(x, mean, calls[0] + grid.stride)
    x = yield Step(0, ahead, denoised)
    for i, t in enumerate(calls[1:], start=1):
        e = [denoise.predict(x, t), *e[:3]]
        if len(e) == 2:
            combined = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            combined = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            combined = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x, denoised = step(x, combined, t)
        x = yield Step(i, x, denoised)


LCM_SIGMA_DATA = 0.5
LCM_TIMESTEP_SCALING = 10.0


def lcm(denoise: Denoiser, x: mx.array, grid: TimestepGrid, draw: Draw) -> Steps:
    """Consistency sampling, Luo et al. 2023 (arXiv:2310.04378), algorithm 1: jump, add noise.

    Reference: diffusers LCMScheduler.
    """
    for i, t in enumerate(grid.timesteps):
        scaled = LCM_TIMESTEP_SCALING * t
        c_skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)
        c_out = scaled / sqrt(scaled**2 + LCM_SIGMA_DATA**2)
        denoised = c_out * denoise(x, t) + c_skip * x
        alpha, sigma = grid.mix(i + 1)  # nothing but the clean latents after the last
        x = yield Step(i, _add(alpha * denoised, sigma, draw), denoised)


def tcd(
    denoise: Denoiser, x: mx.array, grid: TimestepGrid, draw: Draw, *, eta: float = 0.3
) -> Steps:
    """Trajectory consistency, Zheng et al. 2024 (arXiv:2402.19159), algorithm 4.

    Jumps along the trajectory below the next timestep t' to (1 - eta) t', and climbs back with
    fresh noise; eta is the paper's gamma. The last step ends at timestep 0's level.
    Reference: diffusers TCDScheduler.
    """
    for i, (t, following) in enumerate(pairwise([*grid.timesteps, 0])):
        denoised = denoise(x, t)
        a, a_next = grid.signal(t), grid.signal(following)
        a_below = grid.signal(int((1 - eta) * following))
        noise = (x - sqrt(a) * denoised) / sqrt(1 - a)
        x = sqrt(a_below) * denoised + sqrt(1 - a_below) * noise
        x = sqrt(a_next / a_below) * x
        x = yield Step(i, _add(x, sqrt(1 - a_next / a_below), draw), denoised)


# --- shared arithmetic ---------------------------------------------------------------------------


def _keep(share: float, x: mx.array, clean: mx.array) -> mx.array:
    """``x`` with ``share`` of its noise kept, the rest made clean.

    Every step along sigma comes down to this, with share = target / sigma and an estimate of the
    clean latents. x + (target - sigma) * slope is the same number, but loses digits to cancellation
    where sigma is large.
    """
    return share * x + (1 - share) * clean


def _log_ratio(sigma: float, target: float) -> float:
    """The step h in log signal-to-noise; infinite to 0."""
    return log(sigma / target) if target > 0 else inf


def _add(x: mx.array, std: float, draw: Draw) -> mx.array:
    """``x`` with fresh noise of ``std``; draws only where there is any to add."""
    return x + std * draw() if std > 0 else x


def _ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """(down, up): step down to ``down``, then add noise of std ``up`` to reach ``target``."""
    up = min(target, eta * target * sqrt(sigma**2 - target**2) / sigma)
    return sqrt(target**2 - up**2), up


def _sde_noise(sigma: float, target: float, eta: float) -> float:
    """Std of the noise that an SDE step ends with."""
    return target * sqrt(-expm1(-2 * eta * _log_ratio(sigma, target))) if target > 0 else 0.0


def _adams_weights(nodes: list[float], target: float) -> list[float]:
    """Integrals from ``nodes[0]`` to ``target`` of the Lagrange polynomials on ``nodes``."""
    span = target - nodes[0]
    points, weights = np.polynomial.legendre.leggauss(4)  # exact up to degree 7; ours have 3
    at = nodes[0] + span * (points + 1) / 2

    def basis(node: float) -> np.ndarray:
        return np.prod([(at - n) / (node - n) for n in nodes if n != node], axis=0)

    return [float(np.sum(weights * basis(node))) * span / 2 for node in nodes]


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """One algorithm and the facts that a plan needs of it.

    Attributes:
        algorithm: the generator function.
        grid: (NoiseSchedule, schedule word, n) -> the levels that it visits.
        schedules: the words that it takes, its usual one first.
        calls: network calls a step; where there are two, the last step makes one.
        draws: noise arrays a step, where eta is not 0.
        draws_at_end: whether the last step draws too. Most end with no noise to add.
        follows: "diffusers"; or "k-diffusion", and diffusers for leading, linspace and trailing.
    """

    algorithm: Callable[..., Steps]
    grid: Callable[[NoiseSchedule, str, int], Grid]
    schedules: tuple[str, ...]
    calls: int = 1
    draws: int = 0
    draws_at_end: bool = False
    follows: str = "k-diffusion"

    @property
    def eta(self) -> float | None:
        """The usual share of fresh noise; None where the algorithm has no such setting."""
        setting = signature(self.algorithm).parameters.get("eta")
        return None if setting is None else setting.default


def _usually(word: str) -> tuple[str, ...]:
    return (word, *(other for other in SCHEDULES if other != word))


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, timestep_grid, SPACINGS, draws=1, draws_at_end=True, follows="diffusers"),
    "plms": Sampler(plms, plms_grid, SPACINGS, follows="diffusers"),
    "euler": Sampler(euler, sigma_grid, _usually("linspace")),
    "euler_a": Sampler(euler_a, sigma_grid, _usually("linspace"), draws=1),
    "heun": Sampler(heun, sigma_grid, _usually("linspace"), calls=2),
    "dpm2": Sampler(dpm2, sigma_grid, _usually("karras"), calls=2),
    "dpm2_a": Sampler(dpm2_a, sigma_grid, _usually("karras"), calls=2, draws=1),
    "dpmpp_2s_a": Sampler(dpmpp_2s_a, sigma_grid, _usually("karras"), calls=2, draws=1),
    "dpmpp_2m": Sampler(dpmpp_2m, multistep_grid, _usually("karras")),
    "dpmpp_sde": Sampler(dpmpp_sde, sigma_grid, _usually("karras"), calls=2, draws=2),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, multistep_grid, _usually("exponential"), draws=1),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, multistep_grid, _usually("exponential"), draws=1),
    "lms": Sampler(lms, sigma_grid, _usually("linspace")),
    "unipc": Sampler(unipc, unipc_grid, _usually("linspace"), follows="diffusers"),
    "lcm": Sampler(lcm, distilled_grid, ("trailing",), draws=1, follows="diffusers"),
    "tcd": Sampler(tcd, distilled_grid, ("trailing",), draws=1, follows="diffusers"),
}
