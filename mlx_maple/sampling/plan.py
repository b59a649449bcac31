"""Plans: one run decided before it starts, its sampler, levels, counts and starting latents.

Legend   x latents (B, h, w, C) float32, channels last; noise and step noise of unit variance.
Source   Which steps image to image makes: diffusers 0.42.1 StableDiffusionImg2ImgPipeline
         get_timesteps; AUTOMATIC1111/stable-diffusion-webui sd_samplers_common.py
         setup_img2img_steps. What inpainting blends: StableDiffusionInpaintPipeline.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx

from mlx_maple.sampling.denoiser import Denoiser, Model
from mlx_maple.sampling.samplers import SAMPLERS, Step
from mlx_maple.sampling.schedule import SCHEDULES, SPACINGS, Grid, NoiseSchedule, SigmaGrid

DEFAULT_SAMPLER = "dpmpp_2m"


@dataclass(frozen=True)
class Plan:
    """One run, decided: the sampler, the levels, the counts. Holds no latents and can run again.

    Attributes:
        sampler: its name in SAMPLERS.
        schedule: its word in SCHEDULES.
        grid: the levels visited.
        eta: share of fresh noise, None for samplers without that setting.
        partial: whether the run starts below the top (image to image).
    """

    sampler: str
    schedule: str
    grid: Grid
    eta: float | None
    partial: bool

    @property
    def total(self) -> int:
        """Steps, each ending in one Step."""
        return self.grid.steps

    @property
    def model_calls(self) -> int:
        """Network calls of the whole run; a guided call with its two halves counts once."""
        calls = SAMPLERS[self.sampler].calls
        return calls * len(self.grid) - (calls - 1)

    @property
    def draws(self) -> int:
        """Noise arrays that the steps draw; 0 for a deterministic run."""
        sampler = SAMPLERS[self.sampler]
        if self.eta == 0:
            return 0
        return sampler.draws * (self.total if sampler.draws_at_end else self.total - 1)

    def initial(self, noise: Any, clean: Any = None) -> mx.array:
        """The latents to start from, in the sampler's coordinates.

        Args:
            noise: (B, h, w, C) of unit variance.
            clean: (B, h, w, C) scaled latents of the image to start from; None for text to image.

        Raises:
            ValueError: without ``clean`` where the run starts below the top.
        """
        noise = _float32(noise)
        if clean is not None:
            return self._mix(clean, noise, 0)
        if self.partial:
            raise ValueError("[Plan] a run of less than full strength starts from clean latents.")
        return self.grid.noise_scale * noise

    def noised(self, clean: Any, noise: Any, index: int) -> mx.array:
        """``clean`` with ``noise`` as latents are after step ``index``; after the last, as it is.

        What inpainting blends in outside its mask.

        Raises:
            ValueError: if there is no such step.
        """
        if not 0 <= index < self.total:
            raise ValueError(f"[Plan] expected a step from 0 to {self.total - 1}, got {index}.")
        return self._mix(clean, noise, len(self.grid) - (self.total - 1 - index))

    def sample(
        self,
        model: Model,
        x: mx.array,
        step_noise: Callable[[int, tuple[int, ...]], Any] | None = None,
    ) -> Generator[Step, mx.array | None, None]:
        """Run the plan: a generator of ``total`` Steps, lazily; nothing is evaluated here.

        Send latents back to go on from those instead of the Step's own (a plain for loop sends
        none); close the generator to stop.

        Args:
            model: (latents at the network's input scale, timestep) -> guided raw prediction.
            x: (B, h, w, C) as `initial` made them.
            step_noise: (i, shape) -> the i-th array of unit noise; called ``draws`` times in order.

        Raises:
            ValueError: if the plan draws noise and there is none.
        """
        if self.draws and step_noise is None:
            raise ValueError(f"[Plan] {self.sampler} draws noise: step_noise is needed.")
        return self._run(model, _float32(x), step_noise)

    def _run(
        self, model: Model, x: mx.array, step_noise: Callable[[int, tuple[int, ...]], Any] | None
    ) -> Generator[Step, mx.array | None, None]:
        numbers = count()

        def draw() -> mx.array:
            assert step_noise is not None
            noise = _float32(step_noise(next(numbers), tuple(x.shape)))
            if noise.shape != x.shape:
                raise ValueError(f"[Plan] expected step noise {x.shape}, got {noise.shape}.")
            return noise

        settings = {} if self.eta is None else {"eta": self.eta}
        denoise = Denoiser(model, self.grid)
        steps = SAMPLERS[self.sampler].algorithm(denoise, x, self.grid, draw, **settings)
        step = next(steps)
        while True:
            blended = yield step
            try:
                step = steps.send(step.latents if blended is None else blended)
            except StopIteration:
                return

    def _mix(self, clean: Any, noise: Any, position: int) -> mx.array:
        alpha, sigma = self.grid.mix(position)
        clean = _float32(clean)
        return alpha * clean + sigma * _float32(noise) if sigma > 0 else clean


def make_plan(
    noise_schedule: NoiseSchedule,
    sampler: str | None = None,
    schedule: str | None = None,
    steps: int = 20,
    *,
    strength: float | None = None,
    eta: float | None = None,
    discard_penultimate: bool = False,
    last: int | None = None,
) -> Plan:
    """Decide a run.

    Args:
        noise_schedule: what the model was trained on.
        sampler: a name in SAMPLERS; None is dpmpp_2m.
        schedule: a word in SCHEDULES; None is the sampler's usual one.
        steps: how many for the whole way; "beta" may merge some.
        strength: None for text to image; for image to image, how much of the way to go. The counts
            are the references': int(steps * strength) steps after diffusers; int(steps * strength)
            + 1, at most all, after A1111 (its k-diffusion samplers). At least one step is made.
        eta: 0 to 1, share of fresh noise; None is the sampler's usual: 1 for ancestral and SDE
            samplers, 0 for ddim, 0.3 for tcd.
        discard_penultimate: leave out the last level above 0 of one step more, as A1111 does for
            its "DPM2", "DPM2 a" and "DPM++ 3M SDE".
        last: make this many steps, the last ones, instead of the references' counts.

    Raises:
        ValueError: on an unknown name or unsupported combination (the message lists what there
            is), or a number out of range.
    """
    sampler = DEFAULT_SAMPLER if sampler is None else sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}.")
    entry = SAMPLERS[sampler]
    schedule = entry.schedules[0] if schedule is None else schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose from {', '.join(SCHEDULES)}.")
    if schedule not in entry.schedules:
        raise ValueError(
            f"{sampler} has no {schedule!r}: choose from {', '.join(entry.schedules)}."
        )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ValueError(f"steps must be a whole number, got {steps!r}.")
    most = noise_schedule.train_steps
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be from 1 to {most}, got {steps}.")
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength}.")
    if eta is not None and entry.eta is None:
        raise ValueError(f"{sampler} has no eta: leave it out.")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}.")

    grid = entry.grid(noise_schedule, schedule, steps + 1 if discard_penultimate else steps)
    if discard_penultimate:
        if not isinstance(grid, SigmaGrid):
            raise ValueError(f"{sampler} visits timesteps: it has no level to discard.")
        grid = grid.without_penultimate()
    skipped = 0
    if strength is not None:
        n = grid.steps
        if entry.follows == "diffusers" or schedule in SPACINGS:
            kept = max(1, int(n * strength))
        else:
            kept = int(min(strength, 0.999) * n) + 1
        skipped = max(0, n - (kept if last is None else last))
        grid = grid.tail(skipped)
    return Plan(sampler, schedule, grid, entry.eta if eta is None else eta, skipped > 0)


def _float32(values: Any) -> mx.array:
    return (
        values.astype(mx.float32) if isinstance(values, mx.array) else mx.array(values, mx.float32)
    )
