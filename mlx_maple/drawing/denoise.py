"""What the sampler asks: prompts, pictures and the guided UNet as one function; and its steps."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_maple import images
from mlx_maple.conditioning import Conditioning
from mlx_maple.control import (
    NOTHING,
    Shown,
    Steering,
    image_guided,
    input_channels,
    read_hint,
    use_of_channels,
)
from mlx_maple.drawing.arguments import sees_alike, steers_both
from mlx_maple.drawing.autoencode import moments
from mlx_maple.drawing.jobs import Job
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.engine.compiled import guided_steps
from mlx_maple.engine.deep_cache import CachedCalls, DeepCache, cached_step
from mlx_maple.engine.prepare import PreparedUNet
from mlx_maple.guidance import Prompts, encoded, guided_model
from mlx_maple.image_prompt import ImagePrompt, image_prompt
from mlx_maple.sampling import Step, guided
from mlx_maple.sampling.denoiser import Model
from mlx_maple.sampling.windows import windowed
from mlx_maple.sizes import REFINER, with_vector, zeroed

LEFT_OUT = 200  # characters of a prompt's end that a note repeats


def encode_prompts(sd: DiffusionModel, job: Job, notes: list[str]) -> Prompts:
    """The states of the prompt and, where it is guided, of the negative prompt; under way."""
    prompts = encoded(
        sd.text_encoders,
        job.prompt,
        job.negative,
        syntax=job.settings[0].syntax,
        clip_skip=job.clip_skip,
        emphasis=job.settings[0].emphasis,
        together=not sd.is_on_cpu,  # where a text alone is to be the same as beside others
    )
    for name, text in prompts.truncated.items():
        if text:
            end = " ".join(text.split())
            end = end if len(end) <= LEFT_OUT else f"{end[:LEFT_OUT]}…"
            notes.append(f"the {name} is too long; left out: {end}")
    settings = job.settings[0]
    is_said = job.is_second and settings.hires_negative_prompt is not None
    # The refiner was not trained so: with it an empty text is avoided, as in diffusers.
    if settings.zeroed_negative and not is_said and sd.info.family != REFINER:
        prompts = prompts.avoiding_nothing(zeroed)
    mx.async_eval(prompts.arrays())
    return prompts


def look_at_images(sd: DiffusionModel, job: Job) -> list[ImagePrompt]:
    """What the UNet sees of the pictures that the drawing is prompted with; evaluated."""
    found = []
    encoders = [sd.image_encoders[each.adapter] for each in job.image_prompts]
    for i, each in enumerate(job.image_prompts):
        encoder, adapter = sd.networks[encoders[i]], sd.networks[each.adapter]
        made = image_prompt(each, encoder, adapter, sd.configs["unet"])
        mx.eval(made.wanted, made.avoided)
        found.append(made)
        del encoder, adapter
        is_last = encoders[i] not in encoders[i + 1 :]
        sd.networks.release(each.adapter, *(encoders[i : i + 1] if is_last else ()))
    return found


def shown_beside(
    sd: DiffusionModel, job: Job, images_seen: Sequence[ImagePrompt], notes: list[str]
) -> Shown:
    """All that the UNet is shown beside latents, time and words; evaluated."""
    channels = input_channels(
        use_of_channels(sd.configs["unet"]),
        sd.configs["vae"],
        job.size,
        encode=lambda pixels: moments(sd, pixels, notes)[0],
        picture=job.picture if job.edited is None else job.edited,
        mask=job.mask,
        depth=job.depth,
    )
    sd.networks.release("vae")
    steering = []
    for each in job.controls:
        picture = images.fitted(each.picture, *job.size)
        hint = read_hint(sd.networks[each.network], picture)
        mx.eval(hint)
        steering.append(
            Steering(
                network=lambda name=each.network: sd.networks[name],
                hint=hint,
                weight=each.weight,
                start=each.start,
                end=each.end,
            )
        )
    return Shown(
        channels=channels,
        guidance=job.told,
        steering=steering,
        images=images_seen,
        timesteps=tuple(job.plan.grid.timesteps),
        image_guidance=job.image_guidance,
        holds_mask=use_of_channels(sd.configs["unet"]) == "inpainting",
    )


def guided_unet(
    sd: DiffusionModel, job: Job, prompts: Prompts, shown: Shown = NOTHING, *, first: int = 0
) -> Model:
    """What the sampler asks: (n, h, w, C) latents and a timestep to guided predictions."""
    settings = job.settings[0]
    share = settings.guidance_rescale or 0.0
    # A window's spread is not the picture's. And on a CPU pictures stay what they were: there BLAS
    # rounds both halves in one batch otherwise than each alone. But DeepCache counts the calls of
    # what is avoided with each prompt's, as without rescaling.
    is_in_batch = not sd.is_on_cpu or settings.deep_cache is not None
    is_within = prompts.is_single and settings.window is None and is_in_batch
    within, behind = (share, 0.0) if is_within else (0.0, share)

    def pair(positive: Conditioning, negative: Conditioning | None, scale: float) -> Model:
        if shown.image_guidance is None or negative is None:
            return _pair(sd, job, shown, positive, negative, scale, within)
        return image_guided(
            _pair(sd, job, shown, positive, None, 1.0),
            _pair(sd, job, shown, avoided := replace(negative, is_avoided=True), None, 1.0),
            _pair(sd, job, shown.without_picture(), avoided, None, 1.0),
            scale,
            shown.image_guidance,
        )

    def in_windows(*asked: Any) -> Model:
        if settings.window is None:
            return pair(*asked)
        cells = settings.window // sd.configs["vae"].downscale
        return windowed(pair(*asked), cells, settings.window_overlap)

    return guided_model(
        prompts,
        in_windows,
        job.guidance_scale,
        job.plan.model_calls,
        guidance_rescale=behind,
        interval=(settings.guidance_start, settings.guidance_end),
        first=first,
    )


def refined(sd: DiffusionModel, job: Job, model: Model, shown: Shown, notes: list[str]) -> Model:
    """A model that leaves the last part of the way to the drawing's refiner.

    The border is the timestep at which so much of the way is done, as in diffusers and in
    A1111, whatever the sampler's steps are.
    """
    refiner = job.refiner
    if refiner is None:
        return model
    prompts = encode_prompts(refiner, job, notes)
    mx.eval(prompts.arrays())
    refiner.networks.release(*refiner.text_encoders.tokenizers)
    shown = shown if steers_both(sd, refiner) else replace(shown, steering=())
    if not sees_alike(sd, refiner):
        shown = replace(shown, images=())
    steps = sd.noise_schedule.train_steps
    border = steps - round(job.refiner_start * steps)
    calls, is_refining = 0, False

    def call(latents: mx.array, timestep: float) -> mx.array:
        nonlocal calls, is_refining, model
        calls += 1
        if not is_refining and timestep < border:
            is_refining = True
            del model  # which holds our UNet
            sd.networks.release("unet")
            model = guided_unet(refiner, job, prompts, shown, first=calls - 1)
        return model(latents, timestep)

    return call


def _with_vectors(
    sd: DiffusionModel, job: Job, positive: Conditioning, negative: Conditioning | None
) -> tuple[Conditioning, Conditioning | None]:
    """Both with what SDXL is told beside its prompts; of other models as they are."""
    channels = sd.configs["unet"].vector_channels
    if channels is None:
        return positive, negative
    numbers = partial(job.sizes.numbers, job.size, sd.info.family)
    positive = with_vector(positive, numbers(), channels)
    if negative is not None:
        negative = with_vector(negative, numbers(is_negative=True), channels)
    return positive, negative


def _pair(
    sd: DiffusionModel,
    job: Job,
    shown: Shown,
    positive: Conditioning,
    negative: Conditioning | None,
    scale: float,
    guidance_rescale: float = 0.0,
) -> Model:
    """The UNet for a batch, following one prompt and avoiding another.

    On the CPU pictures go through the network one by one: BLAS rounds differently with the size
    of a batch, and a picture is to be the same alone and among others.
    """
    unet = sd.unet
    cache = _deep_cache(job)
    positive, negative = _with_vectors(sd, job, positive, negative)
    contexts = positive.context, None if negative is None else negative.context
    vectors = positive.vector, None if negative is None else negative.vector
    if isinstance(unet, PreparedUNet) and not shown.is_told:
        wanted, avoided = _repeated(contexts, job.count)
        assert wanted is not None
        timesteps = job.plan.grid.timesteps
        first, second = _repeated(vectors, job.count)
        told = None if first is None else (first, second)
        steps = guided_steps(unet)
        model = steps.model(
            wanted,
            avoided,
            scale,
            timesteps,
            guidance_rescale=guidance_rescale,
            vectors=told,
            step=None if cache is None else cached_step(steps, cache),
            images=_images(shown, positive, job.count),
            shows=shown.images_at,
        )
        return shown.joined(model)
    del unet

    def of(copies: int) -> Model:
        wanted, avoided = _repeated(contexts, copies)
        assert wanted is not None
        first, second = _repeated(vectors, copies)
        calls = None if cache is None else CachedCalls(cache, lambda: sd.unet)
        looked_at = _images(shown, positive, copies)

        def asked(latents: mx.array, timestep: float) -> mx.array:
            if calls is not None:
                calls.begin()
            model = guided(
                shown.call(partial(_predict, sd) if calls is None else calls, timestep),
                wanted,
                avoided,
                scale,
                sd.dtype_of("unet"),
                guidance_rescale=guidance_rescale,
                # In turn where memory is short; but see above for the CPU.
                together=sd.is_on_cpu or not sd.networks.is_low_memory,
                vectors=None if first is None else (first, second),
                images=[looked_at[number] for number in shown.images_at(timestep)],
            )
            return model(latents, timestep)

        return shown.joined(asked)

    if not sd.is_on_cpu:
        return of(job.count)
    # One for each: with DeepCache a picture has features of its own.
    singles = [of(1) for _ in range(job.count)]

    def one_by_one(latents: mx.array, timestep: float) -> mx.array:
        pictures = [single(latents[i : i + 1], timestep) for i, single in enumerate(singles)]
        return mx.concatenate(pictures)

    return one_by_one


def _deep_cache(job: Job) -> DeepCache | None:
    settings = job.settings[0]
    if settings.deep_cache is None:
        return None
    return DeepCache(settings.deep_cache, settings.deep_cache_branch)


def _images(
    shown: Shown, positive: Conditioning, count: int
) -> list[tuple[list[mx.array], list[mx.array]]]:
    """Of each image prompt what goes with the prompt and with what is avoided, for a batch."""

    def batch(arrays: Sequence[mx.array]) -> list[mx.array]:
        return [mx.repeat(array, count, 0) for array in arrays]

    return [
        (batch(each.avoided if positive.is_avoided else each.wanted), batch(each.avoided))
        for each in shown.images
    ]


def _predict(
    sd: DiffusionModel,
    latents: mx.array,
    timesteps: mx.array,
    context: mx.array,
    vector: mx.array | None = None,
    **told: Any,
) -> mx.array:
    """The UNet's answer; in low-memory mode it is loaded now, if it is not held."""
    return sd.unet(latents, timesteps, context, vector, **told)


def _repeated(arrays: Sequence[mx.array | None], count: int) -> list[mx.array | None]:
    """Each array, where there is one, ``count`` times along its first axis."""
    return [None if array is None else mx.repeat(array, count, 0) for array in arrays]


def evaluated(
    sampler: Generator[Step, Any, None],
    blend: Callable[[Step], mx.array] | None,
    ahead: int,
) -> Generator[Step, None, None]:
    """The sampler's steps, blended and evaluated; the device may be ``ahead`` of the caller."""
    running: deque[Step] = deque()
    with closing(sampler):
        step = next(sampler, None)
        while step is not None:
            if blend is not None:
                step = Step(step.index, blend(step), step.denoised)
            if ahead:
                mx.async_eval(step.latents, step.denoised)
            running.append(step)
            if len(running) > ahead:
                yield _waited(running.popleft())
            try:
                step = sampler.send(step.latents)
            except StopIteration:
                step = None
    while running:
        yield _waited(running.popleft())


def _waited(step: Step) -> Step:
    mx.eval(step.latents, step.denoised)
    return step
