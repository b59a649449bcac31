"""/sdapi/v1: as AUTOMATIC1111's web UI, for its clients.

Source   AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/api/api.py and models.py; what its
         clients call: webuiapi 0.9.17.
Differs  What a request leaves out comes from the model, not from 512x512 and 50 steps. Seeds draw
         as on an NVIDIA card (``randn_source``, as there). "Only masked" inpainting redraws within
         the whole picture. Face restoration, hypernetworks, scripts and interrogation are not
         there: a request that asks for them ends in an error that says so. File names are told
         without their folders.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_maple import images, metadata
from mlx_maple.control import IMAGE_GUIDANCE
from mlx_maple.metadata import Settings
from mlx_maple.serve.api import client_of, drawn, machine_memory, studio_of
from mlx_maple.serve.catalog import UnknownName
from mlx_maple.serve.draw import LIMITS, MOST_CONTROLS, Draw
from mlx_maple.serve.enlarging import NOTHING, RESIZERS, Enlarging
from mlx_maple.serve.errors import ApiError
from mlx_maple.serve.store import Picture
from mlx_maple.serve.studio import Job, Studio
from mlx_maple.serve.uploads import picture_bytes

FITS = {0: "stretch", 1: "crop"}
FILLS = ("fill", "original", "noise", "nothing")  # by number
MODEL_OPTION = "sd_model_checkpoint"
NOISE = {"GPU": "nvidia", "NV": "nvidia", "CPU": "torch"}
DEFAULT_OPTIONS: dict[str, Any] = {
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "eta_noise_seed_delta": 0,
    "randn_source": "NV",
    "token_merging_ratio": 0.0,
    "samples_format": "png",
    "show_progress_every_n_steps": 1,
    "live_previews_enable": True,
}
# What a request may ask for that is not there, with the values that do not ask for it. Anything
# else would be passed over, and the picture be another one than was asked for.
NOT_THERE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "restore_faces": ("face restoration is", (None, False)),
    "script_name": ("scripts are", (None, "", "None")),
    "seed_resize_from_w": ("resizing from another size's seed is", (None, -1, 0)),
    "seed_resize_from_h": ("resizing from another size's seed is", (None, -1, 0)),
    "hr_checkpoint_name": (
        "another model for the second pass is",
        (None, "", "Use same checkpoint"),
    ),
    "hr_sampler_name": ("another sampler for the second pass is", (None, "", "Use same sampler")),
    "hr_scheduler": ("another schedule for the second pass is", (None, "", "Use same scheduler")),
    "firstphase_width": ("hires fix of that kind is", (None, 0)),
    "firstphase_height": ("hires fix of that kind is", (None, 0)),
    "s_churn": ("churn is", (None, 0)),
    "s_tmin": ("churn is", (None, 0)),
    "s_tmax": ("churn is", (None, 0)),
    "s_noise": ("another scale of noise is", (None, 1)),
    "s_min_uncond": ("skipping guidance by sigma is", (None, 0)),
    "initial_noise_multiplier": ("another scale of noise is", (None, 1)),
    "latent_mask": ("a mask of latents is", (None, "")),
    "infotext": ("drawing from a picture's text is", (None, "")),
}
# Fields that change no picture.
HARMLESS = {
    *("do_not_save_samples", "do_not_save_grid", "save_images", "send_images", "comments"),
    *("disable_extra_networks", "override_settings_restore_afterwards", "script_args", "styles"),
    *("force_task_id", "mask_round", "session_hash"),
}
# The ControlNet extension's preprocessors that there are here.
PREPROCESSORS = {
    "none": "none",
    "canny": "canny",
    "invert": "invert",
    "invert (from white bg & black line)": "invert",
    "scribble": "scribble",
}


IP_MODULE = "ip-adapter-auto"


class ErrorAnswer(BaseModel):
    """A1111's error."""

    error: str
    detail: Any = ""
    body: Any = ""
    errors: str = ""


RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": text}
    for code, text in {
        400: "no JSON, or no UTF-8",
        401: "no token, or a wrong one",
        404: "no such model, sampler, …",
        422: "cannot be used",
        429: "too many jobs wait",
        500: "the drawing failed",
        503: "too much is being sent at once",
    }.items()
}
router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses=RESPONSES)
root = APIRouter(include_in_schema=False)
controlnet = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"], responses=RESPONSES)


class _Asked(BaseModel):
    """What both kinds of drawing take. Fields that mean nothing here are passed over."""

    model_config = ConfigDict(extra="allow")
    prompt: str = Field("", max_length=LIMITS.prompt)
    negative_prompt: str | None = Field("", max_length=LIMITS.prompt)
    styles: list[str] | None = Field(None, max_length=50)
    seed: int | None = Field(-1, ge=-1, le=2**63 - 1)
    subseed: int | None = Field(-1, ge=-1, le=2**63 - 1)
    subseed_strength: float | None = Field(0, ge=0, le=1)
    sampler_name: str | None = Field(None, max_length=80)
    sampler_index: str | None = Field(None, max_length=80)
    scheduler: str | None = Field(None, max_length=80)
    batch_size: int | None = Field(1, ge=1, le=LIMITS.count[1])
    n_iter: int | None = Field(1, ge=1, le=LIMITS.count[1])
    steps: int | None = Field(None, ge=LIMITS.steps[0], le=LIMITS.steps[1])
    cfg_scale: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False)
    width: int | None = Field(None, ge=LIMITS.width[0], le=LIMITS.width[1])
    height: int | None = Field(None, ge=LIMITS.height[0], le=LIMITS.height[1])
    eta: float | None = Field(None, ge=0, le=1)
    restore_faces: bool | None = False
    tiling: bool | None = False
    script_name: str | None = Field(None, max_length=200)
    alwayson_scripts: dict[str, Any] | None = None
    override_settings: dict[str, Any] | None = None
    refiner_checkpoint: str | None = Field(None, max_length=300)
    refiner_switch_at: float | None = Field(None, ge=0, le=1)
    send_images: bool = True


class Txt2Img(_Asked):
    """A drawing from a prompt."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"prompt": "a red maple leaf", "steps": 20, "seed": 7, "sampler_name": "Euler a"}
            ]
        },
    )
    enable_hr: bool | None = False
    denoising_strength: float | None = Field(None, ge=0, le=1)
    hr_scale: float | None = Field(2.0, ge=1, le=4)
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_upscaler: str | None = Field(None, max_length=300)
    hr_second_pass_steps: int | None = Field(0, ge=0, le=LIMITS.steps[1])
    hr_prompt: str | None = Field("", max_length=LIMITS.prompt)
    hr_negative_prompt: str | None = Field("", max_length=LIMITS.prompt)
    hr_checkpoint_name: str | None = Field(None, max_length=300)
    hr_sampler_name: str | None = Field(None, max_length=80)
    hr_scheduler: str | None = Field(None, max_length=80)


class Img2Img(_Asked):
    """A drawing from a picture, or of a part of it."""

    init_images: list[str] | None = Field(None, max_length=8)
    mask: str | None = None
    mask_blur: float | None = Field(None, ge=0, le=64)
    mask_blur_x: float | None = Field(4, ge=0, le=64)
    mask_blur_y: float | None = Field(4, ge=0, le=64)
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1)
    inpainting_fill: int | None = Field(0, ge=0, le=3)
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=4096)
    image_cfg_scale: float | None = Field(None, ge=0, le=100)
    include_init_images: bool = False
    resize_mode: int | None = Field(0, ge=0, le=3)
    denoising_strength: float | None = Field(0.75, ge=0, le=1)


class Drawn(BaseModel):
    """What was drawn."""

    images: list[str] = Field(description="base64 of PNG files")
    parameters: dict[str, Any]
    info: str = Field(description="a JSON object as text")


class Progress(BaseModel):
    """How far the job is that is drawn now."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


# Drawing -----------------------------------------------------------------------------------------


@router.post("/txt2img")
async def txt2img(request: Request, asked: Txt2Img) -> Drawn:
    """Draw from a prompt."""
    extra: dict[str, Any] = {}
    if asked.enable_hr:
        if asked.hr_resize_x or asked.hr_resize_y:
            raise ApiError(422, "hr_resize_x: hr_scale is offered here", field="hr_resize_x")
        strength = asked.denoising_strength
        extra = {
            "hires_scale": asked.hr_scale,
            "hires_strength": None if strength is None else max(0.01, strength),
            "hires_steps": asked.hr_second_pass_steps or None,
            "hires_upscaler": metadata.upscaler_word(asked.hr_upscaler or "Latent"),
        }
        if asked.hr_prompt not in (None, "", asked.prompt):
            extra["hires_prompt"] = asked.hr_prompt
        if asked.hr_negative_prompt not in (None, "", asked.negative_prompt):
            extra["hires_negative_prompt"] = asked.hr_negative_prompt
    return await _draw(request, asked, {}, **extra)


@router.post("/img2img")
async def img2img(request: Request, asked: Img2Img) -> Drawn:
    """Draw from a picture, or a part of one again."""
    if not asked.init_images:
        raise ApiError(404, "Init image not found")
    if len(asked.init_images) > 1:
        raise ApiError(422, "one picture is drawn from at a time", field="init_images")
    if (mode := asked.resize_mode or 0) not in FITS:
        raise ApiError(422, "resize_mode: 0 and 1 are offered here", field="resize_mode")
    pixels = studio_of(request).config.limits.upload_pixels
    inputs = await asyncio.to_thread(_inputs, asked, pixels)
    extra: dict[str, Any] = {"strength": asked.denoising_strength, "fit": FITS[mode]}
    if "mask" in inputs:
        extra |= {"mask_blur": _mask_blur(asked), "mask_content": FILLS[asked.inpainting_fill or 0]}
        if asked.inpaint_full_res:
            extra["only_masked"] = asked.inpaint_full_res_padding or 0
    # What models that edit take where nobody says is also what clients send to all others.
    if asked.image_cfg_scale not in (None, 0, IMAGE_GUIDANCE):
        extra["image_guidance_scale"] = asked.image_cfg_scale
    return await _draw(request, asked, inputs, **extra)


def _mask_blur(asked: Img2Img) -> float | None:
    """One blur for both axes; where it is said it counts before those of each, as there."""
    if asked.mask_blur is not None:
        return asked.mask_blur
    if asked.mask_blur_x != asked.mask_blur_y:
        raise ApiError(422, "mask_blur_x: one blur for both axes is offered", field="mask_blur_x")
    return asked.mask_blur_x


def _inputs(asked: Img2Img, pixels: int) -> dict[str, bytes]:
    assert asked.init_images
    inputs = {"image": picture_bytes(asked.init_images[0], pixels)}
    if asked.mask:
        data = picture_bytes(asked.mask, pixels)
        if asked.inpainting_mask_invert:
            grey = ImageOps.invert(images.to_grey(images.decode_image(data, pixels)))
            data = _png(grey)
        inputs["mask"] = data
    return inputs


async def _draw(request: Request, asked: _Asked, inputs: dict[str, bytes], **extra: Any) -> Drawn:
    studio = studio_of(request)
    _refuse(asked)
    options = {**await _options(studio), **(asked.override_settings or {})}
    asked = await _with_styles(studio, asked)
    draw = _translated(asked, options, extra)
    kept = asked.model_dump(include={"include_init_images"}).get("include_init_images")
    parameters = asked.model_dump(exclude=set() if kept else {"init_images", "mask"})
    _check_text(parameters)
    job = await studio.submit(client_of(request, "a1111"), draw, files=inputs, only_watched=True)
    await drawn(request, job)
    _raise_failure(job)
    encoded = [await _encoded(studio, picture) for picture in job.pictures]
    if job.seen is not None:  # interrupted: what was seen of it
        encoded = [job.seen]
    return Drawn(
        images=encoded if asked.send_images else [],
        parameters=parameters,
        info=json.dumps(_info(asked, job)),
    )


def _raise_failure(job: Job) -> None:
    if job.state == "failed":
        error = job.error or {"code": "failed", "message": ""}
        status = 422 if error["code"] in ("invalid", "unusable") else 500
        raise ApiError(status, error["message"], code=error["code"])


def _refuse(asked: _Asked) -> None:
    """An error for what would otherwise be passed over, and change the picture."""
    said = {**(asked.model_extra or {}), **asked.model_dump(include=set(NOT_THERE))}
    if isinstance(asked, Txt2Img) and not asked.enable_hr:
        said = {name: value for name, value in said.items() if not name.startswith("hr_")}
    for name, (what, usual) in NOT_THERE.items():
        if name in said and said[name] not in usual:
            raise ApiError(422, f"{name}: {what} not offered here", field=name)
    for name in _scripts(asked).keys() - {"controlnet", "refiner"}:
        raise ApiError(422, f"always on script {name[:80]} not found", field="alwayson_scripts")


def _passed_over(asked: _Asked) -> list[str]:
    """One line for each thing that was asked for and had no effect."""
    extra = asked.model_extra or {}
    unknown = sorted(extra.keys() - NOT_THERE.keys() - HARMLESS)
    notes = [f"not known here: {', '.join(name[:40] for name in unknown[:10])}"] if unknown else []
    foreign = sorted((asked.override_settings or {}).keys() - {*DEFAULT_OPTIONS, MODEL_OPTION})
    if foreign:
        listed = ", ".join(name[:40] for name in foreign[:10])
        notes.append(f"options that mean nothing here: {listed}")
    units = _scripts(asked).get("controlnet", [])
    if any(isinstance(unit, dict) and (unit.get("threshold_a") or -1) > 0 for unit in units):
        notes.append("thresholds of preprocessors are the usual ones")
    return notes


def _check_text(values: Any) -> None:
    """Refuse what JSON can hold and no answer can: halves of characters (lone surrogates)."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(422, "a text that is no Unicode") from None


def _scripts(asked: _Asked) -> dict[str, list[Any]]:
    """The scripts that do something, by name in small letters, with their arguments."""
    found = {}
    for name, script in (asked.alwayson_scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else None
        if isinstance(arguments, list) and any(arguments):
            found[name.lower()] = arguments
    return found


def _controls(asked: _Asked) -> dict[str, list[dict[str, Any]]]:
    """Units of the ControlNet extension (sd-webui-controlnet's API): IP-Adapters are some, too."""
    controls, image_prompts = [], []
    for unit in _scripts(asked).get("controlnet", []):
        if not isinstance(unit, dict) or not unit.get("enabled", True):
            continue
        module = str(unit.get("module") or "none").lower()
        if unit.get("control_mode") not in (None, 0, "Balanced"):
            raise ApiError(422, "control_mode: Balanced is offered here", field="alwayson_scripts")
        is_adapter = module.startswith("ip-adapter")
        if not is_adapter and module not in PREPROCESSORS:
            raise ApiError(404, f"module {module[:80]!r} not found", field="alwayson_scripts")
        common = {
            "name": unit.get("model"),
            "image": _unit_image(asked, unit),
            "start": unit.get("guidance_start", 0.0),
            "end": unit.get("guidance_end", 1.0),
        }
        weight = unit.get("weight", 1.0)
        if is_adapter:
            image_prompts.append({**common, "scale": weight})
        else:
            controls.append({**common, "weight": weight, "preprocess": PREPROCESSORS[module]})
    found = {"controls": controls, "image_prompts": image_prompts}
    return {name: units for name, units in found.items() if units}


def _unit_image(asked: _Asked, unit: dict[str, Any]) -> str:
    """What a unit looks at; where it has nothing of its own, the picture that is drawn from."""
    image, masks = unit.get("image") or unit.get("input_image"), [unit.get("mask")]
    if isinstance(image, dict):
        masks.append(image.get("mask"))
        image = image.get("image")
    if any(masks) or unit.get("effective_region_mask"):
        refusal = "mask: a ControlNet unit of its own mask is not offered here"
        raise ApiError(422, refusal, field="alwayson_scripts")
    if not image and isinstance(asked, Img2Img) and asked.init_images:
        image = asked.init_images[0]
    if not isinstance(image, str):
        raise ApiError(422, "a ControlNet unit needs an image", field="alwayson_scripts")
    return image


async def _with_styles(studio: Studio, asked: Any) -> Any:
    """The request with the prompts of its styles, which are presets here, put in."""
    if not asked.styles:
        return asked
    found = {name: draw for name, draw, _ in await studio.stored(studio.store.presets)}
    prompts = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt or ""}
    for style in asked.styles:
        for name in prompts:
            text = found.get(style, {}).get(name, "")
            if "{prompt}" in text:
                prompts[name] = text.replace("{prompt}", prompts[name])
            elif text:
                prompts[name] = f"{prompts[name]}, {text}" if prompts[name] else text
    return asked.model_copy(update=prompts)


def _translated(asked: _Asked, options: dict[str, Any], extra: dict[str, Any]) -> Draw:
    """A1111's request in our words."""
    values: dict[str, Any] = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt or "",
        "model": options.get(MODEL_OPTION) or None,
        "width": None if asked.width is None else asked.width // 8 * 8,
        "height": None if asked.height is None else asked.height // 8 * 8,
        "steps": asked.steps,
        "guidance_scale": asked.cfg_scale,
        "count": (asked.batch_size or 1) * (asked.n_iter or 1),
        "seed": None if asked.seed in (None, -1) else asked.seed,
        "noise": NOISE.get(str(options.get("randn_source")), "nvidia"),
        "clip_skip": options.get("CLIP_stop_at_last_layers") or None,
        "ensd": options.get("eta_noise_seed_delta") or None,
        "tile": "xy" if asked.tiling else None,
        "token_merging": options.get("token_merging_ratio") or None,
        **_controls(asked),
        **extra,
    }
    if asked.subseed_strength:
        values["variation_strength"] = asked.subseed_strength
        values["variation_seed"] = None if asked.subseed in (None, -1) else asked.subseed
    values |= _refiner(asked)
    if options.get("sd_vae") not in (None, "", "Automatic", "None"):
        values["vae"] = options["sd_vae"]
    if sampler := asked.sampler_name or asked.sampler_index:
        words, _ = metadata.sampler_words(sampler, asked.scheduler or "", asked.steps or 20)
        if "sampler" not in words:
            raise ApiError(404, f"Sampler not found: {sampler}", field="sampler_name")
        if "schedule" not in words and asked.scheduler:
            raise ApiError(404, f"Scheduler not found: {asked.scheduler}", field="scheduler")
        values |= words
        if asked.eta is not None and _has_eta(words["sampler"]):
            values["eta"] = asked.eta
    elif asked.scheduler and asked.scheduler.lower() != "automatic":  # of the model's own sampler
        values["schedule"] = metadata.schedule_word(asked.scheduler)
        if values["schedule"] is None:
            raise ApiError(404, f"Scheduler not found: {asked.scheduler}", field="scheduler")
    try:
        return Draw(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        raise ApiError(422, f"{name}: {fault['msg']}", field=name) from None


def _refiner(asked: _Asked) -> dict[str, Any]:
    """The model that draws the last part: named in the request, or in the script of that name."""
    name, start = asked.refiner_checkpoint, asked.refiner_switch_at
    script = _scripts(asked).get("refiner", [])
    if len(script) == 3 and script[0] is True:
        _, name, start = script
    if name in (None, "", "None"):
        return {}
    return {"refiner": name, "refiner_start": 0.8 if start is None else start}


def _has_eta(sampler: str) -> bool:
    from mlx_maple.sampling import SAMPLERS

    return SAMPLERS[sampler].eta is not None


async def _encoded(studio: Studio, picture: Picture) -> str:
    return await asyncio.to_thread(_base64_of, studio.store.picture_path(picture))


def _base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _info(asked: _Asked, job: Job) -> dict[str, Any]:
    """The JSON text that tells of a drawing."""
    every = [_settings(picture) for picture in job.pictures]
    first = every[0] if every else Settings(prompt=asked.prompt)
    notes = [*job.notes, *_passed_over(asked)]
    return {
        "prompt": first.prompt,
        "all_prompts": [settings.prompt for settings in every],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [settings.negative_prompt for settings in every],
        "seed": first.seed,
        "all_seeds": [settings.seed for settings in every],
        "subseed": _subseed(first),
        "all_subseeds": [_subseed(settings) for settings in every],
        "subseed_strength": first.variation_strength,
        "width": first.width,
        "height": first.height,
        "sampler_name": metadata.sampler_label(first.sampler or ""),
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": first.model,
        "sd_model_hash": first.model_hash,
        "sd_vae_name": first.vae or None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength,
        "extra_generation_params": {"Notes": "; ".join(notes)} if notes else {},
        "index_of_first_image": 0,
        "infotexts": [metadata.to_parameters(settings) for settings in every],
        "styles": asked.styles or [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": first.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": first.version,
    }


def _subseed(settings: Settings) -> int:
    return -1 if settings.variation_seed is None else settings.variation_seed


def _settings(picture: Picture) -> Settings:
    known = {field.name for field in fields(Settings)}
    return Settings(**{k: v for k, v in picture.settings.items() if k in known})


# While it is drawn -------------------------------------------------------------------------------


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> Progress:
    """How far the job is that is drawn now; asking keeps its previews coming."""
    studio = studio_of(request)
    job = studio.current
    if job is None:
        return Progress(progress=0, eta_relative=0, state=_state(None, studio.waiting))
    if not skip_current_image:
        studio.watch(job)
    far = job.progress or {}
    return Progress(
        progress=max(0.01, min(1.0, far.get("fraction", 0.0))),
        eta_relative=far.get("seconds_left", 0.0),
        state=_state(job, studio.waiting),
        current_image=None if skip_current_image else job.preview,
        textinfo=far.get("detail") or None,
    )


def _state(job: Job | None, waiting: int) -> dict[str, Any]:
    far = (job.progress or {}) if job is not None else {}
    is_sampling = far.get("stage") in ("sample", "decode")
    created = time.localtime(job.created) if job is not None else None
    return {
        "skipped": False,
        "interrupted": bool(job and job.cancelling),
        "stopping_generation": bool(job and job.cancelling),
        "job": job.id if job else "",
        "job_count": (1 if job else 0) + waiting,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", created) if created else "0",
        "job_no": 0,
        "sampling_step": far.get("step", 0) if is_sampling else 0,
        "sampling_steps": far.get("total", 0) if is_sampling else 0,
    }


@router.post("/interrupt")
async def interrupt(request: Request) -> dict[str, Any]:
    """End the job that is drawn now; its request is answered with what was seen of it."""
    studio = studio_of(request)
    if studio.current is not None:
        await studio.cancel(studio.current)
    return {}


@router.post("/skip")
async def skip(request: Request) -> dict[str, Any]:
    """The same: a job is one drawing here."""
    return await interrupt(request)


# Options and lists -------------------------------------------------------------------------------


async def _options(studio: Studio) -> dict[str, Any]:
    stored = await studio.stored(studio.store.options)
    stored.pop("secret", None)
    return {MODEL_OPTION: studio.catalog.default, **DEFAULT_OPTIONS, **stored}


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The options that mean something here."""
    return await _options(studio_of(request))


@router.post("/options")
async def set_options(
    request: Request,
    asked: Annotated[dict[str, Any], Body(examples=[{"sd_model_checkpoint": "demo"}])],
) -> dict[str, Any]:
    """Set options; those that mean nothing here are passed over."""
    studio = studio_of(request)
    known = {
        name: value
        for name, value in asked.items()
        if name in DEFAULT_OPTIONS or name == MODEL_OPTION
    }
    _check_text(known)
    for name, value in known.items():
        expected = type(DEFAULT_OPTIONS.get(name, ""))
        low, high = (0, 64) if name == "CLIP_stop_at_last_layers" else (-(2**53), 2**53)
        if name == MODEL_OPTION:
            if not isinstance(value, str):
                raise ApiError(422, "sd_model_checkpoint: a model's title", field=name)
            entry = await asyncio.to_thread(studio.catalog.find, value)
            known[name] = entry.id
        elif name == "token_merging_ratio":
            if not isinstance(value, int | float) or not 0 <= value <= 0.9:
                raise ApiError(422, f"{name}: takes a number from 0 to 0.9", field=name)
        elif name == "randn_source" and value not in NOISE:
            raise ApiError(422, f"randn_source: one of {', '.join(NOISE)}", field=name)
        elif not isinstance(value, expected) or (isinstance(value, str) and len(value) > 300):
            raise ApiError(422, f"{name}: takes {expected.__name__}", field=name)
        elif expected is int and isinstance(value, int) and not low <= value <= high:
            raise ApiError(422, f"{name}: out of bounds", field=name)
    await studio.stored(studio.store.set_options, known)
    return {}


@router.get("/cmd-flags")
async def flags() -> dict[str, Any]:
    """What A1111 was started with; nothing of it applies."""
    return {}


@router.get("/sd-models")
async def models(request: Request) -> list[dict[str, Any]]:
    """Models that can be drawn with."""
    entries = await asyncio.to_thread(studio_of(request).catalog.entries)
    return [
        {
            "title": entry.id,
            "model_name": entry.id,
            "hash": None,
            "sha256": None,
            "filename": entry.file or entry.id,
            "config": None,
        }
        for entry in entries
        if entry.is_here
    ]


@router.get("/sd-vae")
async def vaes(request: Request) -> list[dict[str, str]]:
    """Autoencoders in the model folders."""
    found = await asyncio.to_thread(studio_of(request).catalog.networks, "vae")
    return [{"model_name": name, "filename": name} for name in found]


@router.get("/loras")
@router.get("/lycos")
async def loras(request: Request) -> list[dict[str, Any]]:
    """LoRAs in the model folders."""
    found = await asyncio.to_thread(studio_of(request).catalog.networks, "lora")
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in found]


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, Any]:
    """Textual inversions in the model folders; what is in them is not looked at here."""
    found = await asyncio.to_thread(studio_of(request).catalog.networks, "embedding")
    item = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {
        "loaded": {name: {**item, "shape": 0, "vectors": 0} for name in found},
        "skipped": {},
    }


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """Samplers under A1111's names."""
    return [
        {"name": label, "aliases": list(aliases), "options": {}}
        for label, aliases in metadata.sampler_labels().items()
    ]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """Schedules under A1111's names."""
    labels = {"automatic": "Automatic", **metadata.schedule_labels()}
    return [
        {
            "name": name,
            "label": label,
            "aliases": None,
            "default_rho": 7.0 if name == "karras" else -1,
            "need_inner_model": False,
        }
        for name, label in labels.items()
    ]


@router.get("/upscalers")
async def upscalers(request: Request) -> list[dict[str, Any]]:
    """What extra-single-image can enlarge with."""
    networks = await asyncio.to_thread(studio_of(request).catalog.networks, "upscaler")
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        for name in (NOTHING, *RESIZERS, *networks)
    ]


@router.get("/prompt-styles")
async def styles(request: Request) -> list[dict[str, Any]]:
    """Presets, as A1111's styles."""
    studio = studio_of(request)
    return [
        {
            "name": name,
            "prompt": draw.get("prompt", ""),
            "negative_prompt": draw.get("negative_prompt", ""),
        }
        for name, draw, _ in await studio.stored(studio.store.presets)
    ]


@root.get("/login_check")
async def login_check() -> bool:
    """Whether a client is let in; who is not has had a 401 already."""
    return True


@router.get("/latent-upscale-modes")
async def latent_modes() -> list[dict[str, str]]:
    """What hires fix enlarges latents with."""
    return [{"name": "Latent"}]


@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/script-info")
@router.get("/extensions")
async def nothing() -> list[dict[str, Any]]:
    """Things that A1111 has and this server does not."""
    return []


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """Scripts: none but the ControlNet extension, under the names that clients look for."""
    return {"txt2img": ["controlnet", "controlnet m2m"], "img2img": ["controlnet"]}


@controlnet.get("/version")
async def controlnet_version() -> dict[str, int]:
    """The version of the extension's API that is spoken."""
    return {"version": 2}


@controlnet.get("/model_list")
async def controlnet_models(request: Request) -> dict[str, list[str]]:
    """ControlNets and IP-Adapters, which the extension takes alike."""
    return {"model_list": await asyncio.to_thread(_steering, studio_of(request))}


@controlnet.get("/module_list")
async def controlnet_modules() -> dict[str, list[str]]:
    """Preprocessors."""
    return {"module_list": [*PREPROCESSORS, IP_MODULE]}


def _steering(studio: Studio) -> list[str]:
    return [name for kind in ("controlnet", "ip_adapter") for name in studio.catalog.networks(kind)]


@controlnet.get("/control_types")
async def control_types(request: Request) -> dict[str, dict[str, Any]]:
    """ControlNets and preprocessors by kind; they are not sorted here."""
    found = await asyncio.to_thread(_steering, studio_of(request))
    every = {
        "module_list": [*PREPROCESSORS, IP_MODULE],
        "model_list": ["None", *found],
        "default_option": "none",
        "default_model": "None",
    }
    return {"control_types": {"All": every}}


@controlnet.get("/settings")
async def controlnet_settings() -> dict[str, int]:
    """How many ControlNets one drawing takes."""
    return {"control_net_unit_count": MOST_CONTROLS}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-lycos")
@router.post("/refresh-vae")
@router.post("/refresh-embeddings")
async def refresh(request: Request) -> dict[str, Any]:
    """Look at the disk again."""
    catalog = studio_of(request).catalog
    await asyncio.to_thread(lambda: catalog.entries(again=True))
    return {}


@router.post("/unload-checkpoint")
async def unload(request: Request) -> dict[str, Any]:
    """Give the memory of models back, if nothing is drawn."""
    studio_of(request).unload()
    return {}


@router.post("/reload-checkpoint")
async def reload() -> dict[str, Any]:
    """Nothing: the next job loads what it needs."""
    return {}


@router.get("/memory")
async def memory(request: Request) -> dict[str, Any]:
    """Memory of the machine and of the worker's device, in bytes."""
    studio = studio_of(request)
    total, free = await asyncio.to_thread(machine_memory)
    used = None if free is None or total is None else max(0, total - free)
    answer: dict[str, Any] = {"ram": {"free": free, "used": used, "total": total}}
    if studio.device.get("backend") == "cuda":
        whole = studio.device.get("memory")
        answer["cuda"] = {"system": {"free": None, "used": None, "total": whole}}
    else:  # a Mac's memory is one
        answer["cuda"] = {"error": "unavailable"}
    return answer


# Pictures ----------------------------------------------------------------------------------------


class PngInfoRequest(BaseModel):
    """A picture with settings inside."""

    image: str = Field(min_length=1)


@router.post("/png-info")
async def png_info(request: Request, asked: PngInfoRequest) -> dict[str, Any]:
    """A1111's text of a picture, and what it says."""
    pixels = studio_of(request).config.limits.upload_pixels

    def read() -> dict[str, Any]:
        image = images.decode_image(picture_bytes(asked.image.strip(), pixels))
        texts = images.texts_of(image)
        info = texts.get("parameters", "")
        return {"info": info, "items": texts, "parameters": metadata.pairs_of(info)}

    return await asyncio.to_thread(read)


class _Extras(BaseModel):
    """How to enlarge. Fields that mean nothing here are passed over."""

    model_config = ConfigDict(extra="allow")
    resize_mode: Literal[0, 1] = 0
    upscaling_resize: float = Field(2, gt=0, le=8)
    upscaling_resize_w: int = Field(512, ge=1, le=8192)
    upscaling_resize_h: int = Field(512, ge=1, le=8192)
    upscaling_crop: bool = True
    upscaler_1: str | None = Field(NOTHING, max_length=300)
    upscaler_2: str | None = Field(NOTHING, max_length=300)
    extras_upscaler_2_visibility: float = Field(0, ge=0, le=1)
    gfpgan_visibility: float = Field(0, ge=0, le=1)
    codeformer_visibility: float = Field(0, ge=0, le=1)


class ExtrasRequest(_Extras):
    """A picture to enlarge."""

    image: str = Field(min_length=1)


class NamedFile(BaseModel):
    """A picture, and what its owner calls it."""

    data: str = Field(min_length=1)
    name: str = Field("", max_length=300)


class ExtrasBatchRequest(_Extras):
    """Pictures to enlarge."""

    imageList: list[NamedFile] = Field(max_length=16)


@router.post("/extra-single-image")
async def extra_single_image(request: Request, asked: ExtrasRequest) -> dict[str, str]:
    """Enlarge a picture."""
    (image,) = await _enlarged(request, asked, [asked.image])
    return {"html_info": "", "image": image}


@router.post("/extra-batch-images")
async def extra_batch_images(request: Request, asked: ExtrasBatchRequest) -> dict[str, Any]:
    """Enlarge pictures."""
    texts = [file.data for file in asked.imageList]
    return {"html_info": "", "images": await _enlarged(request, asked, texts)}


async def _enlarged(request: Request, asked: _Extras, texts: Sequence[str]) -> list[str]:
    """Pictures in base64, larger, in base64; it is a job like any other."""
    studio = studio_of(request)
    for name in ("gfpgan_visibility", "codeformer_visibility"):
        if getattr(asked, name):
            raise ApiError(422, f"{name}: face restoration is not offered here", field=name)
    how = await asyncio.to_thread(_enlarging, studio, asked)
    pixels = studio.config.limits.upload_pixels

    def read() -> list[bytes]:
        found = [picture_bytes(text, pixels) for text in texts]
        sizes = [how.target(images.check_header(data, pixels)) for data in found]
        if (total := sum(width * height for width, height in sizes)) > pixels:
            raise ValueError(f"{total:,} pixels together; {pixels:,} at most: send fewer at once")
        return found

    try:
        files = await asyncio.to_thread(read)
    except ValueError as error:
        raise ApiError(422, str(error).rstrip("."), field="upscaling_resize") from None
    job = await studio.enlarge(client_of(request, "a1111"), how, files)
    try:
        await drawn(request, job)
        _raise_failure(job)
        if job.state != "done":
            raise ApiError(422, "the job was interrupted", code="cancelled")
        return [await asyncio.to_thread(_base64_of, path) for path in job.files]
    finally:
        for path in job.files:
            path.unlink(missing_ok=True)


def _enlarging(studio: Studio, asked: _Extras) -> Enlarging:
    wanted = [(asked.upscaler_1 or NOTHING, 1.0)]
    if asked.upscaler_2 not in (None, "", NOTHING) and asked.extras_upscaler_2_visibility:
        wanted.append((asked.upscaler_2 or NOTHING, asked.extras_upscaler_2_visibility))
    upscalers = []
    for name, share in wanted:
        if name not in (NOTHING, *RESIZERS):
            try:
                name = studio.catalog.network("upscaler", name)
            except UnknownName:
                raise ApiError(404, f"Upscaler not found: {name}", field="upscaler_1") from None
        upscalers.append((name, share))
    by_size = asked.resize_mode == 1
    return Enlarging(
        upscalers=upscalers,
        factor=asked.upscaling_resize,
        size=(asked.upscaling_resize_w, asked.upscaling_resize_h) if by_size else None,
        is_cut=by_size and asked.upscaling_crop,
        most_pixels=studio.config.limits.upload_pixels,
    )


class InterrogateRequest(BaseModel):
    """A picture to describe."""

    image: str = ""
    model: str = "clip"


@router.post("/interrogate")
async def interrogate(asked: InterrogateRequest) -> dict[str, Any]:
    """Describe a picture: there is no model for that here."""
    raise ApiError(404, "Model not found: pictures are not described here", field="model")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
