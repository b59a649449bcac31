"""A caller's arguments, each checked; what cannot be used is a ValueError of one line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_maple import enlarge, images
from mlx_maple.adapters import Choice, Chosen
from mlx_maple.control import Control, steers_alike
from mlx_maple.drawing.jobs import Job, Picture, StepNoise
from mlx_maple.drawing.masked_area import MaskedArea
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.drawing.results import FloatArray
from mlx_maple.metadata import Settings, check_number
from mlx_maple.models.forms import Form
from mlx_maple.models.unet import attention_channels
from mlx_maple.sampling import SAMPLERS, Plan, make_plan
from mlx_maple.sizes import Sizes, read_pair
from mlx_maple.text.language import Prompt, read_prompt
from mlx_maple.text.prompt import encode_prompt

FAR_APART = ("lcm", "tcd")  # samplers whose steps have too little in common for DeepCache
PREVIEWS = ("linear", "taesd")
MASK_CONTENTS = ("original", "fill", "noise", "nothing")
# img2img without a size: at most this many times the pixels that the model was made for
LARGEST_SHARE = 2.25


def read_size(
    sd: DiffusionModel,
    picture: Image.Image | None,
    width: int | None,
    height: int | None,
    notes: list[str],
) -> tuple[int, int]:
    """The size to draw at."""
    if picture is not None and (width is None or height is None):
        largest = int(LARGEST_SHARE * sd.defaults["width"] * sd.defaults["height"])
        width, height = images.size_like(picture.size, largest, width=width, height=height)
        if (width, height) != picture.size:
            own = f"{picture.width}x{picture.height}"
            notes.append(f"the image of {own} is drawn at {width}x{height}")
    width = whole("width", sd.defaults["width"] if width is None else width)
    height = whole("height", sd.defaults["height"] if height is None else height)
    multiple = sd.configs["vae"].downscale
    for name, value in (("width", width), ("height", height)):
        if value % multiple:
            raise ValueError(f"{name} must be a multiple of {multiple}, got {value}.")
    return width, height


def read_sizes(
    sd: DiffusionModel, is_xl: bool, pairs: Mapping[str, Any], scores: Mapping[str, float | None]
) -> Sizes:
    """What was asked of the sizes and scores that SDXL is told."""
    given = {name: value for name, value in pairs.items() if value is not None}
    if given and not is_xl:
        raise ValueError(f"{next(iter(given))} is for SDXL, which is told sizes.")
    said: dict[str, Any] = {
        name.removesuffix("_size"): read_pair(name, value, 0 if name == "crop" else 1)
        for name, value in given.items()
    }
    for name, value in scores.items():
        if value is not None:
            word = name.replace("score", "aesthetic_score")
            said[name] = float(check_number(word, value))
    return Sizes(**said)


def read_windows(sd: DiffusionModel, window: Any, overlap: Any, tile: str | None) -> dict[str, Any]:
    """The settings of windows, checked."""
    overlap = check_number("window_overlap", overlap)
    if window is None:
        return {"window": None, "window_overlap": overlap}
    if sd.configs["unet"].in_channels != sd.configs["unet"].out_channels:
        raise ValueError("window: this model is shown a whole picture in every step.")
    if sd.control_names or tile is not None:
        raise ValueError("window goes with neither a ControlNet nor tile.")
    multiple = sd.configs["vae"].downscale
    if (window := whole("window", window)) % multiple:
        raise ValueError(f"window must be a multiple of {multiple}, got {window}.")
    return {"window": window, "window_overlap": overlap}


def read_deep_cache(
    sd: DiffusionModel, interval: Any, branch: Any, window: Any, refiner: DiffusionModel | None
) -> dict[str, Any]:
    """The settings of DeepCache, checked."""
    branch = whole("deep_cache_branch", branch)
    interval = None if interval is None else whole("deep_cache", interval)
    if interval in (None, 1):  # every call is full
        return {}
    if window is not None:
        raise ValueError("deep_cache does not go with window: each window has other features.")
    for model in (sd, refiner):
        if model is not None and branch >= (kept := model.configs["unet"].kept_states):
            raise ValueError(f"deep_cache_branch must be from 0 to {kept - 1}, got {branch}.")
    return {"deep_cache": interval, "deep_cache_branch": branch}


def check_form(sd: DiffusionModel, form: Form) -> None:
    """Raise unless the networks can be brought into a form."""
    if form.tile is not None and sd.is_low_memory:
        raise ValueError("tile does not go with low-memory mode: stripes have edges.")


def check_refiner(sd: DiffusionModel, refiner: DiffusionModel) -> None:
    """Whether another model can go on with what this one has begun."""
    ours, theirs = sd.noise_schedule, refiner.noise_schedule
    if refiner.configs["unet"].in_channels != sd.configs["unet"].in_channels:
        raise ValueError("the refiner takes other latents than this model.")
    if ours.prediction != theirs.prediction or ours.train_steps != theirs.train_steps:
        raise ValueError(
            f"the refiner predicts {theirs.prediction} in {theirs.train_steps} steps, "
            f"this model {ours.prediction} in {ours.train_steps}."
        )
    told = {each.configs["unet"].time_cond_dim is not None for each in (sd, refiner)}
    if len(told) > 1:
        raise ValueError("of this model and the refiner only one is told its guidance.")


def steers_both(sd: DiffusionModel, refiner: DiffusionModel) -> bool:
    """Whether what steers this model can steer its refiner, too."""
    return steers_alike(sd.configs["unet"], refiner.configs["unet"])


def sees_alike(sd: DiffusionModel, refiner: DiffusionModel) -> bool:
    """Whether image prompts that are made for this model are of use to its refiner, too."""
    ours, theirs = (each.configs["unet"] for each in (sd, refiner))
    is_same_text = ours.cross_attention_dim == theirs.cross_attention_dim
    return is_same_text and attention_channels(ours) == attention_channels(theirs)


def check_steered(sd: DiffusionModel, controls: Sequence[Control], size: tuple[int, int]) -> None:
    """Raise unless all that steers can steer a drawing of this size."""
    for each in controls:
        if any(side % (cells := sd.configs[each.network].downscale) for side in size):
            name, (width, height) = sd.control_names[each.network], size
            raise ValueError(
                f"{name} steers sizes in multiples of {cells} pixels, not {width}x{height}."
            )


def plan_of(sd: DiffusionModel, settings: Settings) -> Plan:
    """The sampler's plan, with the model's own sampler and schedule where none is named."""
    sampler, schedule = settings.sampler, settings.schedule
    if schedule is None and sampler in (None, sd.defaults["sampler"]):
        schedule = sd.defaults["schedule"]
    sampler = sd.defaults["sampler"] if sampler is None else sampler
    # Redrawing all of a part starts from noise alone, as diffusers' inpainting does.
    is_fresh = settings.mask_blur is not None and settings.strength == 1
    assert settings.steps is not None
    return make_plan(
        sd.noise_schedule,
        sampler,
        schedule,
        settings.steps,
        strength=None if is_fresh else settings.strength,
        eta=settings.eta,
        discard_penultimate=settings.discard_penultimate,
    )


def read_prompts(
    sd: DiffusionModel, settings: Settings, calls: int | None = None, first_calls: int | None = None
) -> dict[str, Any]:
    """Both prompts taken apart; the negative one where the drawing needs it.

    Args:
        sd: whose network is asked.
        settings: complete.
        calls: of the network, as prompts count them; None is by the settings.
        first_calls: likewise of a first drawing, where this is the second.
    """
    assert settings.sampler is not None and settings.steps is not None
    calls = settings.steps * SAMPLERS[settings.sampler].calls if calls is None else calls
    read = partial(read_prompt, steps=calls, first_steps=first_calls, syntax=settings.syntax)
    prompt, negative = read(settings.prompt), None
    is_told = sd.configs["unet"].time_cond_dim is not None
    if (settings.guidance_scale != 1 and not is_told) or len(prompt.parts) > 1:
        negative = read(settings.negative_prompt, is_negative=True)
    return {"prompt": prompt, "negative": negative}


def with_second(
    sd: DiffusionModel,
    job: Job,
    asked: Mapping[str, Any],
    texts: Mapping[str, str | None],
    upscaler: str,
) -> Job:
    """The drawing, and on top of it a larger one.

    Args:
        sd: that draws.
        job: the first drawing.
        asked: scale, strength and steps of the second.
        texts: prompts of the second; None is the first one's.
        upscaler: what enlarges the first.
    """
    own, most = job.settings[0], sd.noise_schedule.train_steps
    assert own.sampler is not None and own.steps is not None
    strength = check_number("hires_strength", asked["strength"])
    kept = asked["steps"]
    if kept is None:
        kept = min(own.steps, max(1, int(most * strength)))
    kept = whole("hires_steps", kept)
    if int(kept / strength) > most:
        raise ValueError(
            f"hires_steps {kept} at hires_strength {strength:g} are the last of "
            f"{int(kept / strength):,} steps, and there are {most:,}: take at most "
            f"{max(1, int(most * strength))} steps, or more strength."
        )
    said = {
        "hires_scale": check_number("hires_scale", asked["scale"]),
        "hires_strength": strength,
        "hires_steps": kept,
    }
    if not isinstance(upscaler, str):
        raise ValueError(f"hires_upscaler must be a name, got {upscaler!r}.")
    upscale = None
    if upscaler not in enlarge.BUILT_IN:
        if sd.upscalers is None:
            listed = ", ".join(enlarge.BUILT_IN)
            raise ValueError(f"unknown hires_upscaler {upscaler!r}: choose from {listed}.")
        upscale = sd.upscalers(upscaler)
        try:
            enlarge.enlarged(job.size, upscale.scale)
        except ValueError as error:
            smaller = "draw at a smaller size, or take another hires_upscaler, such as lanczos."
            reason = str(error).partition(":")[0]
            raise ValueError(f"hires_upscaler {upscaler}: {reason}: {smaller}") from None
    vae = sd.configs["vae"]
    width, height = enlarge.larger(job.size, said["hires_scale"], vae.downscale)
    for name, value in (("width", width), ("height", height)):
        check_number(name, value)
    check_steered(sd, job.controls, (width, height))
    plan = make_plan(
        sd.noise_schedule,
        own.sampler,
        own.schedule,
        min(int(kept / min(strength, 0.999)), most),
        strength=strength,
        eta=own.eta,
        discard_penultimate=own.discard_penultimate,
        last=kept,
    )
    said_texts = {name: text for name, text in texts.items() if text is not None}
    for name, text in said_texts.items():
        if not isinstance(text, str):
            raise ValueError(f"hires_{name} must be text, got {type(text).__name__}.")
    words: dict[str, Any] = {**said, "hires_upscaler": upscaler}
    words |= {f"hires_{name}": text for name, text in said_texts.items()}
    settings = [replace(each, **words) for each in job.settings]
    calls = SAMPLERS[own.sampler].calls
    counts = kept * calls, own.steps * calls
    read = read_prompts(sd, replace(own, **said_texts), *counts)
    for text in texts_of(prompt for prompt in read.values() if prompt is not None):
        encode_prompt(sd.tokenizer, text, syntax=own.syntax)  # or raise, at once
    notes = list(job.notes)
    if "prompt" in said_texts and read["prompt"].tags != job.prompt.tags:
        notes.append("LoRAs named in hires_prompt are not put on: those of the prompt stay")
    second = replace(
        job,
        settings=settings,
        plan=plan,
        size=(width, height),
        shape=(job.count, height // vae.downscale, width // vae.downscale, job.shape[3]),
        **read,
        latents=None,
        is_second=True,
    )
    return replace(job, settings=settings, second=second, upscale=upscale, notes=notes)


def read_loras(sd: DiffusionModel, loras: Any, prompt: Prompt | None) -> Chosen | None:
    """The drawing's LoRAs, those of its prompt among them."""
    tags = [] if prompt is None else [tag for tag in prompt.tags if tag.kind == "lora"]
    if sd.adapters is None:
        if loras or tags:
            raise ValueError("this model takes no LoRAs: it was not made by `load`.")
        return None
    chosen = sd.adapters.choose(loras, [Choice(t.name, t.text, t.unet) for t in tags])
    for worn in chosen.worn:
        for part in worn.lora.updates:
            if not sd.networks.can_load(part):
                raise ValueError(f"the {part} was put in by hand: LoRAs cannot change it.")
    return chosen


def read_mask(
    sd: DiffusionModel,
    mask: Picture,
    size: tuple[int, int],
    fit: str,
    blur: float,
    area: MaskedArea | None,
    notes: list[str],
) -> FloatArray:
    """The mask at the drawing's size, blurred."""
    if area is not None:
        values = area.drawn_mask
    else:
        values = images.blurred(images.fitted(images.to_grey(mask), *size, fit), blur)
    if not images.latent_mask(values, sd.configs["vae"].downscale).any():
        notes.append("the mask is black, or its white parts are too small: nothing is redrawn")
    return values


def preview_kind(sd: DiffusionModel, preview: str | None) -> str:
    """What previews are decoded with: as asked, or the better one there is."""
    if preview is None:
        return "taesd" if "taesd" in sd.networks else "linear"
    if one_of("preview", preview, PREVIEWS) == "taesd" and "taesd" not in sd.networks:
        raise ValueError("preview 'taesd' needs a TAESD, and none was loaded.")
    return preview


def read_step_noise(step_noise: Any, plan: Plan, shape: tuple[int, ...]) -> StepNoise:
    """The steps' noise that was given, as a callable that checks what it hands on."""
    if callable(step_noise):
        return lambda i, shape: read_array("step_noise", step_noise(i, shape), shape)
    found = np.shape(step_noise)
    steps = max(plan.draws, found[0] if found else 0)
    noise = read_array("step_noise", step_noise, (steps, *shape))
    return lambda i, shape: noise[i]


def read_array(name: str, values: Any, shape: tuple[int, ...]) -> FloatArray:
    """A caller's array as float32 of ``shape``; numpy's, MLX's or nested lists."""
    if isinstance(values, mx.array):
        values = np.array(values.astype(mx.float32))
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers of shape {shape}.") from None
    if array.shape != shape:
        is_nchw = array.shape == (*shape[:-3], shape[-1], *shape[-3:-1])
        hint = " It looks like NCHW: move axis 1 last." if is_nchw else ""
        raise ValueError(f"{name} must have the shape {shape}, got {array.shape}.{hint}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers; there is NaN or infinity among them.")
    return array


def seeded(settings: Settings, count: int) -> list[Settings]:
    """Each picture's settings. With a variation the seed stays and the variation's counts up."""
    name = "variation_seed" if settings.variation_strength else "seed"
    first = getattr(settings, name)
    return [replace(settings, **{name: whole(name, first + i)}) for i in range(count)]


def texts_of(prompts: Iterable[Prompt]) -> set[str]:
    """All forms that prompts take."""
    return {phase.text for prompt in prompts for part in prompt.parts for phase in part.phases}


def pair_text(pair: tuple[int, int] | None, between: str) -> str | None:
    """Two numbers as settings write them."""
    return None if pair is None else between.join(map(str, pair))


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """A word, which must be one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}.")
    return value


def whole(name: str, value: Any) -> int:
    """A setting that is a whole number, in its range."""
    return int(check_number(name, value))
