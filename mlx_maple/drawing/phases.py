"""A drawing from text to pictures, phase by phase.

Only this package evaluates: the networks and samplers below only describe the work. One step is one
evaluation.
"""

from collections.abc import Generator
from contextlib import closing

import mlx.core as mx
import numpy as np

from mlx_maple import enlarge, images
from mlx_maple.drawing.autoencode import decode, encode
from mlx_maple.drawing.clock import Clock
from mlx_maple.drawing.denoise import (
    encode_prompts,
    evaluated,
    guided_unet,
    look_at_images,
    refined,
    shown_beside,
)
from mlx_maple.drawing.jobs import Job
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.drawing.previews import Previews
from mlx_maple.drawing.results import Progress, Result
from mlx_maple.drawing.starts import Outside, Streams, content_noise, start, streams_of
from mlx_maple.drawing.worn import is_on, put_on
from mlx_maple.engine.compiled import room
from mlx_maple.forms import PLAIN
from mlx_maple.guidance import Prompts
from mlx_maple.image_prompt import ImagePrompt
from mlx_maple.models.forms import Form

BOUND = (
    "MLX lets weights be read in the thread alone that opened them: draw there, or evaluate "
    "them there first, mx.eval(network.parameters())."
)


def run(sd: DiffusionModel, job: Job) -> Generator[Progress, None, None]:
    """One drawing. Every ``yield`` may be its end; no network is held beyond it in vain."""
    sd.come_here()
    with sd.networks.drawing(_room(sd, job)):
        try:
            yield from _in_its_form(sd, job, _phases(sd, job))
        except RuntimeError as error:
            if "no Stream" in str(error):
                raise RuntimeError(BOUND) from error
            raise
        finally:
            for model in (sd, job.refiner):
                if model is not None:
                    model.set_form(PLAIN)
                    model.worn_by = None  # or the drawing's pictures would stay in memory
            sd.networks.release(*sd.configs)
            if job.refiner is not None:
                job.refiner.networks.release(*job.refiner.configs)


def _room(sd: DiffusionModel, job: Job) -> int | None:
    """Bytes beside the networks that MLX may take before it waits for the device."""
    if sd.max_memory is not None:
        return sd.networks.room_within(sd.max_memory)
    return room(job.largest.shape, job.guidance_scale != 1)


def _in_its_form(
    sd: DiffusionModel, job: Job, phases: Generator[Progress, None, None]
) -> Generator[Progress, None, None]:
    """The phases, each step of which finds the networks in the drawing's own form, with its LoRAs.

    Drawings of one model may go on in turn, and each leaves the networks in its form meanwhile. A
    refiner merges tokens, and takes no other form. What a LoRA changes is read again for each turn
    where the drawings' LoRAs are not the same.
    """
    was_put_on = False
    with closing(phases):
        while True:
            if was_put_on and not is_on(sd, job):
                put_on(sd, job, [])
            if job.refiner is not None and job.refiner is not sd:
                job.refiner.set_form(Form(merging=job.form.merging))
            sd.set_form(job.form)
            progress = next(phases, None)
            was_put_on = was_put_on or is_on(sd, job)
            if progress is None:
                return
            yield progress


def _phases(sd: DiffusionModel, job: Job) -> Generator[Progress, None, None]:
    """Text, picture, steps, decoding; in low-memory mode each network goes after its phase."""
    clock, total = Clock(), job.plan.total
    total += 0 if job.second is None else job.second.plan.total
    notes = list(job.notes)

    yield from clock.away(Progress(index=0, total=total, stage="text"))
    put_on(sd, job, notes)
    prompts = encode_prompts(sd, job, notes)
    later = None if job.second is None else encode_prompts(sd, job.second, notes)
    streams = streams_of(job)  # drawn here while the device reads the prompts
    mx.eval(prompts.arrays(), [] if later is None else later.arrays())
    sd.networks.release(*sd.text_encoders.tokenizers)
    clock.mark("text")

    seen: list[ImagePrompt] = []
    if job.image_prompts:
        yield from clock.away(Progress(index=0, total=total, stage="encode"))
        seen = look_at_images(sd, job)
        clock.mark("look")

    posterior = None
    if job.picture is not None:
        yield from clock.away(Progress(index=0, total=total, stage="encode"))
        picture = job.picture
        # As in A1111, which fills also what it then covers with noise or nothing.
        if job.mask is not None and job.settings[0].mask_content != "original":
            picture = images.filled(picture, job.mask)
        posterior = encode(sd, picture, notes)
        sd.networks.release("vae")
        clock.mark("encode")

    sampled = _sampled(sd, job, prompts, seen, streams, posterior, notes, clock, 0, total)
    latents, previews = yield from sampled
    if job.second is not None and later is not None:
        clean = yield from _enlarged(sd, job, latents, clock, notes)
        done, job = job.plan.total, job.second
        streams = streams_of(job)
        sampled = _sampled(sd, job, later, seen, streams, clean, notes, clock, done, total)
        latents, previews = yield from sampled

    final = np.array(latents)
    pictures = []
    for i in range(job.count):
        yield from clock.away(
            Progress(
                index=total,
                total=total,
                stage="decode",
                seconds_per_step=clock.seconds_per_step,
                _preview=previews.of(total, latents),
            )
        )
        drawn = decode(sd, latents[i : i + 1], notes)
        if job.area is not None:
            drawn = job.area.pasted(drawn)
        elif job.mask is not None and job.picture is not None:
            drawn = images.composited(drawn, job.picture, job.mask)
        pictures.append(drawn)
    clock.mark("decode")

    yield Progress(
        index=total,
        total=total,
        stage="done",
        seconds_per_step=clock.seconds_per_step,
        result=Result(
            images=pictures,
            latents=final,
            settings=job.settings,
            timings=clock.timings(),
            notes=list(dict.fromkeys(notes)),
        ),
    )


def _sampled(
    sd: DiffusionModel,
    job: Job,
    prompts: Prompts,
    seen: list[ImagePrompt],
    streams: list[Streams],
    posterior: tuple[mx.array, mx.array] | None,
    notes: list[str],
    clock: Clock,
    done: int,
    total: int,
) -> Generator[Progress, None, tuple[mx.array, Previews]]:
    """The steps of one drawing, from ``done`` of ``total`` on: its latents, evaluated."""
    shown = shown_beside(sd, job, seen, notes)
    model = guided_unet(sd, job, prompts, shown)  # not before: it loads the UNet
    model = refined(sd, job, model, shown, notes)
    noise, clean, draw = start(job, streams, posterior)
    blend, begun = None, clean
    if job.mask is not None and clean is not None:
        inside = mx.array(images.latent_mask(job.mask, sd.configs["vae"].downscale)) > 0
        if (content := job.settings[0].mask_content) == "noise":
            begun = mx.where(inside, content_noise(job, noise), clean)
        elif content == "nothing":
            begun = mx.where(inside, 0.0, clean)
        if not shown.holds_mask:
            outside = Outside(job.plan, inside, noise, clean)
            model, blend = outside.watched(model), outside.kept
    x = job.plan.initial(noise, None if job.is_fresh else begun)
    # A GPU works on one step while this side describes the next and the caller looks at the
    # last; a CPU would only get in its own way, and two steps take more memory than one.
    ahead = 0 if sd.is_on_cpu or sd.networks.is_low_memory else 1
    latents, previews = x, Previews(sd, job)
    with closing(evaluated(job.plan.sample(model, x, draw), blend, ahead)) as steps:
        for step in steps:
            latents, done = step.latents, done + 1
            clock.step()
            yield from clock.away(
                Progress(
                    index=done,
                    total=total,
                    stage="sample",
                    seconds_per_step=clock.seconds_per_step,
                    _preview=previews.of(done, step.denoised),
                )
            )
    del model, steps
    sd.networks.release("unet", *sd.control_names)
    if job.refiner is not None:
        job.refiner.networks.release("unet")
    clock.mark("sample")
    return latents, previews


def _enlarged(
    sd: DiffusionModel, job: Job, latents: mx.array, clock: Clock, notes: list[str]
) -> Generator[Progress, None, tuple[mx.array, mx.array]]:
    """A drawing's latents at the size of the second; each with a deviation of nothing."""
    assert job.second is not None
    name, (rows, columns) = job.settings[0].hires_upscaler or "", job.second.shape[1:3]
    total = job.plan.total + job.second.plan.total
    if name == "latent":
        found = mx.array(enlarge.bilinear(np.array(latents), rows, columns))
        clock.mark("enlarge")
        return found, mx.zeros_like(found)
    means = []
    for i in range(job.count):
        yield from clock.away(Progress(index=job.plan.total, total=total, stage="encode"))
        drawn = decode(sd, latents[i : i + 1], notes)
        drawn = drawn if job.upscale is None else job.upscale(drawn)
        means.append(encode(sd, images.fitted(drawn, *job.second.size), notes)[0])
    sd.networks.release("vae")
    clock.mark("enlarge")
    found = mx.concatenate(means)
    return found, mx.zeros_like(found)
