"""What a drawing starts from: seeded noise, and the picture that stays outside a mask."""

import math

import mlx.core as mx
import numpy as np

from mlx_maple.drawing.jobs import Job, StepNoise
from mlx_maple.drawing.results import FloatArray
from mlx_maple.metadata import Settings
from mlx_maple.sampling import Plan, Step
from mlx_maple.sampling.denoiser import Model
from mlx_maple.sampling.noise import (
    initial_noise,
    noise_generator,
    step_noise_generator,
)
from mlx_maple.sampling.schedule import SigmaGrid


def streams_of(job: Job) -> list["Streams"]:
    """Random numbers for each picture."""
    return [Streams(settings, job.shape[1:]) for settings in job.settings]


def start(
    job: Job, streams: list["Streams"], posterior: tuple[mx.array, mx.array] | None
) -> tuple[mx.array, mx.array | None, StepNoise]:
    """Starting noise (n, h, w, C), the picture's latents likewise or None, the steps' noise."""
    noise = np.stack([stream.initial for stream in streams])
    clean = None
    if posterior is not None:
        mean, std = posterior
        clean = mean if job.is_second else mx.repeat(mean, job.count, 0)
        if job.settings[0].sample_posterior:
            clean = clean + std * mx.array(np.stack([stream.posterior for stream in streams]))

    def draw(index: int, shape: tuple[int, ...]) -> FloatArray:
        return np.stack([stream.steps.normal(shape[1:]) for stream in streams])

    return (
        mx.array(noise if job.latents is None else job.latents),
        clean,
        draw if job.step_noise is None else job.step_noise,
    )


def content_noise(job: Job, noise: mx.array) -> mx.array:
    """What "noise" puts inside a mask, (n, h, w, C): the starting noise, but without a variation.

    A1111's "latent noise" is drawn by the seeds alone (modules/processing.py @v1.10.1, class
    StableDiffusionProcessingImg2Img: ``create_random_tensors`` without subseeds). Differs: its
    later batches of one request take the first batch's seeds, against its own record of them.
    """
    if job.latents is not None or not job.settings[0].variation_strength:
        return noise
    plain = []
    for settings in job.settings:
        assert settings.noise is not None and settings.seed is not None
        plain.append(initial_noise(settings.noise, settings.seed, job.shape[1:]))
    return mx.array(np.stack(plain))


class Streams:
    """One picture's random numbers: for the posterior, for the start, and what the steps draw."""

    def __init__(self, settings: Settings, shape: tuple[int, int, int]) -> None:
        kind, seed = settings.noise, settings.seed
        assert kind is not None and seed is not None
        if settings.sample_posterior:  # diffusers' order: one stream for all
            self.steps = noise_generator(kind, seed)
            self.posterior = self.steps.normal(shape)
            self.initial = self.steps.normal(shape)
            return
        self.posterior = np.zeros(shape, np.float32)
        self.initial = initial_noise(
            kind,
            seed,
            shape,
            variation_seed=settings.variation_seed or 0,
            variation_strength=settings.variation_strength,
        )
        self.steps = step_noise_generator(kind, seed, shape, ensd=settings.ensd)


class Outside:
    """Outside the mask stands the picture, noised to the level of each moment.

    That is all a network without a mask channel needs: samplers work on each number by itself, so
    what it sees outside decides how the inside goes on. The noise is the starting noise every time,
    and the last step leaves the clean latents. Some samplers call the network again within a step;
    it sees the picture there too. All of it as in diffusers' inpainting with a 4-channel UNet, but
    that diffusers' KDPM2 (dpm2) takes the wrong level within a step.
    """

    def __init__(self, plan: Plan, inside: mx.array, noise: mx.array, clean: mx.array) -> None:
        self._plan = plan
        self._inside = inside
        self._noise = noise
        self._clean = clean
        self._is_within_a_step = False
        self._sigmas: dict[float, float] = {}
        if isinstance(plan.grid, SigmaGrid):
            self._sigmas = dict(zip(plan.grid.timesteps, plan.grid.sigmas, strict=False))

    def kept(self, step: Step) -> mx.array:
        """The latents to go on from after a step."""
        self._is_within_a_step = False
        known = self._plan.noised(self._clean, self._noise, step.index)
        return mx.where(self._inside, step.latents, known)

    def watched(self, model: Model) -> Model:
        """The model, seeing the picture in calls within a step too."""

        def call(latents: mx.array, timestep: float) -> mx.array:
            if self._is_within_a_step:
                known = self._at(timestep)
                latents = mx.where(self._inside, latents, known)
            self._is_within_a_step = True
            return model(latents, timestep)

        return call

    def _at(self, timestep: float) -> mx.array:
        """The picture at a timestep's level, in the network's scale of unit variance."""
        sigma = self._sigmas.get(timestep)
        if sigma is None:  # a level between the plan's own
            sigma = float(self._plan.grid.schedule.sigma_at(np.array(timestep)))
        return (self._clean + sigma * self._noise) / math.sqrt(1 + sigma**2)
