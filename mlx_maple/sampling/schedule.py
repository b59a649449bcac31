"""Noise schedules: how noisy latents are at each timestep, and which levels a run visits.

Legend   t timestep, 0 .. T-1 (T is 1000), 0 the cleanest; a = alphas_cumprod[t], the share of
         signal; sigma = sqrt((1 - a) / a), the noise's std over the signal's; n steps asked for.
Source   Ho et al. 2020 (arXiv:2006.11239); Nichol & Dhariwal 2021 (arXiv:2102.09672), cosine;
         Lin et al. 2023 (arXiv:2305.08891), table 2 (spacings) and algorithm 1 (zero terminal SNR);
         Karras et al. 2022 (arXiv:2206.00364), equation 5. Grids as in diffusers 0.42.1
         (leading, linspace, trailing), k-diffusion 0.1.1 (karras, exponential, polyexponential,
         uniform) and ComfyUI's comfy/samplers.py (sgm_uniform, simple, beta).
Differs  Everything is float64 here; the references compute in float32. Tolerances:
         tests/parity/test_samplers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import lgamma, log, sqrt

import numpy as np

STEPS_OFFSET = 1  # Stable Diffusion's schedulers shift "leading" timesteps by one
SMALLEST_ALPHA = 2.0**-24  # stands for zero terminal SNR: sigma is 4096, not infinite
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What a model was trained on: its signal share at every timestep, and what it predicts.

    Attributes:
        alphas_cumprod: (T,) float64, strictly falling, within (0, 1).
        prediction: "epsilon", the noise, or "v_prediction", sqrt(a) noise - sqrt(1 - a) clean.
    """

    alphas_cumprod: np.ndarray
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        alphas = np.array(self.alphas_cumprod, dtype=np.float64)
        if alphas.ndim != 1 or len(alphas) < 2:
            raise ValueError(
                f"[NoiseSchedule] alphas_cumprod must be a list of two or more, got {alphas.shape}."
            )
        if alphas[-1] == 0:
            alphas[-1] = SMALLEST_ALPHA
        if not (np.all(np.diff(alphas) < 0) and alphas[0] < 1 and alphas[-1] > 0):  # nor NaN
            raise ValueError(
                "[NoiseSchedule] alphas_cumprod must fall strictly, from below 1 to 0."
            )
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"[NoiseSchedule] prediction must be one of {', '.join(PREDICTIONS)}, "
                f"got {self.prediction!r}."
            )
        alphas.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", alphas)

    @classmethod
    def from_betas(
        cls,
        kind: str = "scaled_linear",
        start: float = 0.00085,
        end: float = 0.012,
        n: int = 1000,
        *,
        zero_terminal_snr: bool = False,
        prediction: str = "epsilon",
    ) -> "NoiseSchedule":
        """The schedule of ``n`` betas that run from ``start`` to ``end``; defaults are SD 1.x.

        Args:
            kind: "linear"; "scaled_linear", linear in sqrt(beta) (Stable Diffusion); "cosine",
                which needs neither end (diffusers calls it squaredcos_cap_v2).
            start: beta of the first timestep.
            end: beta of the last timestep.
            n: T, the timesteps of training.
            zero_terminal_snr: rescale so that the last timestep is all noise.
            prediction: "epsilon" or "v_prediction".

        Raises:
            ValueError: on another kind, or betas outside (0, 1).
        """
        if kind == "scaled_linear":
            betas = np.linspace(sqrt(start), sqrt(end), n) ** 2
        elif kind == "linear":
            betas = np.linspace(start, end, n)
        elif kind == "cosine":
            share = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - share[1:] / share[:-1], 0.999)
        else:
            kinds = "scaled_linear, linear, cosine"
            raise ValueError(f"[NoiseSchedule] kind of betas must be one of {kinds}, got {kind!r}.")
        schedule = cls(np.cumprod(1 - betas), prediction)
        return schedule.with_zero_terminal_snr() if zero_terminal_snr else schedule

    @classmethod
    def from_alphas_cumprod(
        cls, array: np.ndarray, *, prediction: str = "epsilon"
    ) -> "NoiseSchedule":
        """The schedule that a checkpoint stores.

        A file cast to half precision holds Stable Diffusion's schedule rounded to 11 (float16) or
        8 (bfloat16) bits, which no one trained on: such a copy is read as what it came from.

        Raises:
            ValueError: if the values do not fall strictly within (0, 1).
        """
        values = np.array(array, dtype=np.float64)
        if values.ndim == 1 and len(values) > 1:
            standard = cls.from_betas(n=len(values)).alphas_cumprod
            for bits in (11, 8):
                coarse = np.array_equal(values, _round_to_bits(values, bits))
                if coarse and np.all(np.abs(values - standard) <= 2.0**-bits * standard):
                    values = standard
        return cls(values, prediction)

    def with_zero_terminal_snr(self) -> "NoiseSchedule":
        """The same schedule, shifted and scaled in sqrt(a) so that the last timestep is all noise.

        Reference: Lin et al. 2023, algorithm 1. The last value is 2**-24, as in diffusers, so that
        sigma stays finite.
        """
        root = np.sqrt(self.alphas_cumprod)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return replace(self, alphas_cumprod=root**2)

    @property
    def train_steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) noise std over signal std, rising with t."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def sigma_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Sigma at fractional ``timesteps``: linear in log sigma between neighbours."""
        return np.exp(np.interp(timesteps, np.arange(self.train_steps), np.log(self.sigmas)))

    def timestep_of(self, sigma: np.ndarray | float) -> np.ndarray:
        """The fractional timestep of ``sigma``: linear in log sigma, held at both ends."""
        return np.interp(np.log(sigma), np.log(self.sigmas), np.arange(self.train_steps))


# --- sigma schedules: (NoiseSchedule, n) -> n falling sigmas; the run then ends at 0 -------------


def karras(schedule: NoiseSchedule, n: int, rho: float = 7.0) -> np.ndarray:
    """Even in sigma ** (1 / rho), over the model's whole range (k-diffusion get_sigmas_karras)."""
    low, high = schedule.sigmas[0] ** (1 / rho), schedule.sigmas[-1] ** (1 / rho)
    return np.linspace(high, low, n) ** rho


def exponential(schedule: NoiseSchedule, n: int) -> np.ndarray:
    """Even in log sigma (k-diffusion get_sigmas_exponential)."""
    return np.exp(np.linspace(log(schedule.sigmas[-1]), log(schedule.sigmas[0]), n))


def polyexponential(schedule: NoiseSchedule, n: int, rho: float = 1.0) -> np.ndarray:
    """Log sigma along a ramp to the power ``rho`` (k-diffusion get_sigmas_polyexponential).

    With k-diffusion's and A1111's own ``rho`` of 1 it is `exponential`.
    """
    low, high = log(schedule.sigmas[0]), log(schedule.sigmas[-1])
    return np.exp(np.linspace(1, 0, n) ** rho * (high - low) + low)


def uniform(schedule: NoiseSchedule, n: int) -> np.ndarray:
    """Even timesteps from T-1 to 0, both visited (k-diffusion get_sigmas; A1111's Automatic)."""
    return schedule.sigma_at(np.linspace(schedule.train_steps - 1, 0, n))


def sgm_uniform(schedule: NoiseSchedule, n: int) -> np.ndarray:
    """Even timesteps from T-1, the last one above 0 (ComfyUI normal_scheduler with sgm=True)."""
    return schedule.sigma_at(np.linspace(schedule.train_steps - 1, 0, n + 1)[:-1])


def simple(schedule: NoiseSchedule, n: int) -> np.ndarray:
    """Every (T / n)-th of the model's own sigmas, from the top (ComfyUI simple_scheduler)."""
    stride = schedule.train_steps / n
    return schedule.sigmas[[-1 - int(i * stride) for i in range(n)]]


def beta(schedule: NoiseSchedule, n: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Timesteps at even quantiles of a Beta(a, b), dense at both ends (ComfyUI beta_scheduler).

    Lee et al. 2024 (arXiv:2407.12173). Quantiles that round to the same timestep are visited once,
    so many steps may give fewer. A1111's schedule of this name spaces sigmas, not timesteps.
    """
    quantiles = beta_quantile(1 - np.linspace(0, 1, n, endpoint=False), a, b)
    timesteps = np.rint(quantiles * (schedule.train_steps - 1)).astype(int)
    return schedule.sigmas[timesteps[np.diff(timesteps, prepend=-1) != 0]]


# Sabour et al. 2024 (arXiv:2404.14507): NVIDIA's list for Stable Diffusion 1, 10 steps.
_AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def ays(schedule: NoiseSchedule, n: int) -> np.ndarray:
    """Align Your Steps: NVIDIA's 10 steps for SD 1, log-linear in between for other counts.

    Its eleventh level gives way to 0, as in ComfyUI and diffusers; A1111 keeps it, so its 11 steps
    are these 10 and one more.
    """
    levels = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, 11), np.log(_AYS_SD1))
    return np.exp(levels[:-1])


SIGMA_SCHEDULES: dict[str, Callable[[NoiseSchedule, int], np.ndarray]] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "beta": beta,
    "ays": ays,
    "uniform": uniform,
}
SPACINGS = ("leading", "linspace", "trailing")
SCHEDULES = (*SPACINGS, *SIGMA_SCHEDULES)


# --- spacings: falling timesteps, as diffusers' schedulers choose them ---------------------------


def spaced(word: str, train_steps: int, n: int, *, drop_last: bool = False) -> np.ndarray:
    """(n,) falling timesteps, fractional for linspace (Lin et al. 2023, table 2).

    Args:
        word: "leading" stops short of the top, "linspace" visits both ends, "trailing" stops short
            of the bottom. One step of the first two is taken at the bottom, as diffusers does, and
            leaves the noise as it was: with few steps only "trailing" makes sense.
        train_steps: T.
        n: how many.
        drop_last: space n + 1 and leave the last one out, as multistep solvers do: their final step
            goes from the n-th level straight to 0.
    """
    count = n + 1 if drop_last else n
    if word == "leading":
        timesteps = np.arange(count)[::-1] * (train_steps // count) + float(STEPS_OFFSET)
        timesteps -= max(0, timesteps[0] - (train_steps - 1))  # T steps: no room for the offset
    elif word == "linspace":
        timesteps = np.linspace(0, train_steps - 1, count)[::-1]
    else:  # trailing starts at the top whatever is dropped
        timesteps = np.round(np.arange(train_steps, 0, -train_steps / n)) - 1
    return timesteps[:n]  # float rounding gives some trailing counts one too many


# --- grids: the levels of one run, and the coordinates of the latents that walk them -------------


@dataclass(frozen=True, eq=False)
class SigmaGrid:
    """A walk down sigma; latents are x = clean + sigma * noise.

    Attributes:
        schedule: what the model was trained on.
        timesteps: (n,) what the network is told at each level, fractions included.
        sigmas: (n + 1,) the levels, falling; the last is 0.
        noise_scale: std of the starting noise: sigmas[0], or sqrt(sigmas[0]**2 + 1) where the
            reference starts with unit noise at the network's input.
    """

    schedule: NoiseSchedule
    timesteps: list[float]
    sigmas: list[float]
    noise_scale: float

    def __post_init__(self) -> None:
        if any(above <= below for above, below in pairwise(self.sigmas)):
            n = len(self.timesteps)
            raise ValueError(f"[sampling] {n} steps are too many: some share a noise level.")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        """Steps of the walk: one a level."""
        return len(self.timesteps)

    def tail(self, start: int) -> "SigmaGrid":
        """The same walk without its first ``start`` levels."""
        return replace(self, timesteps=self.timesteps[start:], sigmas=self.sigmas[start:])

    def without_penultimate(self) -> "SigmaGrid":
        """The same walk without the last level above 0."""
        return replace(self, timesteps=self.timesteps[:-1], sigmas=[*self.sigmas[:-2], 0.0])

    def level(self, sigma: float) -> tuple[float, float, float]:
        """(alpha, sigma, timestep) of latents alpha * clean + sigma * noise.

        A level between the grid's own (second-order samplers visit some) has the timestep that
        log sigma interpolates to, as in k-diffusion and diffusers alike.
        """
        timestep = self._timestep_of.get(sigma)
        if timestep is None:
            timestep = float(self.schedule.timestep_of(sigma))
        return 1.0, sigma, timestep

    def mix(self, position: int) -> tuple[float, float]:
        """(alpha, sigma) at the ``position``-th level."""
        return 1.0, self.sigmas[position]

    @cached_property
    def _timestep_of(self) -> dict[float, float]:
        return dict(zip(self.sigmas, self.timesteps, strict=False))


@dataclass(frozen=True, eq=False)
class TimestepGrid:
    """A walk down whole timesteps; latents are x = sqrt(a) clean + sqrt(1 - a) noise.

    Attributes:
        schedule: what the model was trained on.
        timesteps: where the network is called, in order.
        stride: how far down diffusers' DDIM and PNDM step, T // n whatever the spacing.
        repeats: calls beyond one a step, made in the first step.
        noise_scale: std of the starting noise.
    """

    schedule: NoiseSchedule
    timesteps: list[int]
    stride: int
    repeats: int = 0
    noise_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        """Steps of the walk."""
        return max(1, len(self.timesteps) - self.repeats)

    def tail(self, start: int) -> "TimestepGrid":
        """The same walk without its first ``start`` calls."""
        return replace(self, timesteps=self.timesteps[start:])

    def signal(self, timestep: int) -> float:
        """The signal share a; below 0 it stays at timestep 0's (set_alpha_to_one is False)."""
        return float(self.schedule.alphas_cumprod[max(timestep, 0)])

    def level(self, timestep: float) -> tuple[float, float, float]:
        """(alpha, sigma, timestep) of latents alpha * clean + sigma * noise."""
        a = self.signal(int(timestep))
        return sqrt(a), sqrt(1 - a), float(timestep)

    def mix(self, position: int) -> tuple[float, float]:
        """(alpha, sigma) at the ``position``-th call; past the last, of clean latents."""
        if position >= len(self.timesteps):
            return 1.0, 0.0
        return self.level(self.timesteps[position])[:2]


Grid = SigmaGrid | TimestepGrid


def sigma_grid(schedule: NoiseSchedule, word: str, n: int) -> SigmaGrid:
    """The levels of a one-step solver: diffusers' EulerDiscrete and its kin for the spacings.

    linspace is then `uniform` but for what lies between two timesteps: diffusers interpolates
    sigma there, k-diffusion its logarithm, 3e-5 apart at most (20 steps).
    """
    if word not in SPACINGS:
        return _listed_grid(schedule, word, n)
    timesteps = spaced(word, schedule.train_steps, n)
    sigmas = np.interp(timesteps, np.arange(schedule.train_steps), schedule.sigmas)
    return _grid(schedule, timesteps, sigmas, unit_start=word == "leading")


def multistep_grid(schedule: NoiseSchedule, word: str, n: int) -> SigmaGrid:
    """The levels of diffusers' DPMSolverMultistep for the spacings: n of n + 1, whole timesteps."""
    if word not in SPACINGS:
        return _listed_grid(schedule, word, n)
    timesteps = np.rint(spaced(word, schedule.train_steps, n, drop_last=True))
    return _grid(schedule, timesteps, schedule.sigmas[timesteps.astype(int)], unit_start=True)


def unipc_grid(schedule: NoiseSchedule, word: str, n: int) -> SigmaGrid:
    """The levels of diffusers' UniPCMultistep, which starts at unit noise whatever the schedule.

    It rounds karras' timesteps and truncates exponential's, where float32 has left the first one
    just below T - 1. Other lists are not diffusers', and keep their fractions.
    """
    grid = multistep_grid(schedule, word, n)
    timesteps = np.array(grid.timesteps)
    if word == "karras":
        timesteps = np.rint(timesteps)
    elif word == "exponential":
        timesteps = np.maximum(np.floor(timesteps - 1e-4), 0)
    return _grid(schedule, timesteps, np.array(grid.sigmas[:-1]), unit_start=True)


def timestep_grid(schedule: NoiseSchedule, word: str, n: int) -> TimestepGrid:
    """The calls of diffusers' DDIM."""
    timesteps = np.rint(spaced(word, schedule.train_steps, n)).astype(int).tolist()
    return TimestepGrid(schedule, timesteps, schedule.train_steps // n)


def plms_grid(schedule: NoiseSchedule, word: str, n: int) -> TimestepGrid:
    """The calls of diffusers' PNDM without Runge-Kutta steps: the second timestep comes twice."""
    grid = timestep_grid(schedule, word, n)
    first, second, rest = grid.timesteps[:1], grid.timesteps[1:2], grid.timesteps[2:]
    return replace(grid, timesteps=first + second + second + rest, repeats=1)


DISTILLED_STEPS = 50  # consistency models are distilled on this many trailing timesteps


def distilled_grid(schedule: NoiseSchedule, word: str, n: int) -> TimestepGrid:
    """``n`` of the 50 timesteps of distillation (diffusers' LCM and TCD, original_inference_steps).

    Raises:
        ValueError: on more than 50 steps.
    """
    if n > DISTILLED_STEPS:
        raise ValueError(
            f"[sampling] consistency samplers take at most {DISTILLED_STEPS} steps, got {n}."
        )
    stride = schedule.train_steps // DISTILLED_STEPS
    trained = np.arange(DISTILLED_STEPS, 0, -1) * stride - 1
    chosen = trained[np.floor(np.linspace(0, DISTILLED_STEPS, n, endpoint=False)).astype(int)]
    return TimestepGrid(schedule, chosen.tolist(), stride)


def _listed_grid(schedule: NoiseSchedule, word: str, n: int) -> SigmaGrid:
    sigmas = SIGMA_SCHEDULES[word](schedule, n)
    return _grid(schedule, schedule.timestep_of(sigmas), sigmas, unit_start=False)


def _grid(
    schedule: NoiseSchedule, timesteps: np.ndarray, sigmas: np.ndarray, *, unit_start: bool
) -> SigmaGrid:
    top = float(sigmas[0])
    scale = sqrt(top**2 + 1) if unit_start else top
    return SigmaGrid(schedule, timesteps.tolist(), [*sigmas.tolist(), 0.0], scale)


# --- numerics ------------------------------------------------------------------------------------


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """The x in [0, 1] below which a Beta(a, b) variable falls with probability ``p``, elementwise.

    Bisection on the distribution function; scipy.stats.beta.ppf without scipy.
    """
    low, high = np.zeros_like(p), np.ones_like(p)
    with np.errstate(divide="ignore"):  # log(0) where p is 0: the limit is right
        for _ in range(60):  # halves the interval below float64's last bit
            middle = (low + high) / 2
            above = _beta_distribution(middle, a, b) > p
            low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where(p >= 1, 1.0, np.where(p <= 0, 0.0, (low + high) / 2))


def _beta_distribution(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """Regularised incomplete beta function I_x(a, b), 0 < x < 1 (DLMF 8.17.22 and 8.17.4)."""
    mirrored = x > (a + 1) / (a + b + 2)  # where the fraction would converge slowly
    y = np.where(mirrored, 1 - x, x)
    p, q = np.where(mirrored, b, a), np.where(mirrored, a, b)
    fraction = np.ones_like(y)  # evaluated from the inside out
    for m in range(40, 0, -1):
        even = m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m))
        fraction = 1 + even / fraction
        k = m - 1
        odd = -(p + k) * (p + q + k) * y / ((p + 2 * k) * (p + 2 * k + 1))
        fraction = 1 + odd / fraction
    log_beta = lgamma(a) + lgamma(b) - lgamma(a + b)
    below = np.exp(p * np.log(y) + q * np.log1p(-y) - log_beta) / (p * fraction)
    return np.where(mirrored, 1 - below, below)


def _round_to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
