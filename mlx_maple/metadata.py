"""What a picture was drawn with, as text inside its file, and back.

Two texts go into every picture. ``parameters`` is the block that AUTOMATIC1111's web UI writes and
most other tools read: prompt, "Negative prompt: …" and a last line of "Key: value" pairs. It says
nearly everything. The JSON text says all of it, and is the one we read back where both are there.

Source   The block's form: AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/processing.py
         (create_infotext) and modules/infotext_utils.py (parse_generation_parameters); what its
         samplers stand for: modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py and
         sd_schedulers.py, before and after version 1.9, which split "DPM++ 2M Karras" in two.
Differs  A value that cannot be true ("Steps: 1e999") is an error here, and whatever is read but
         cannot be drawn again is said in a note; A1111 passes over both.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from mlx_maple import __version__

PROGRAM = "mlx-maple"
MAX_TEXT = 1 << 20  # characters; a block has a few hundred, one with a story for a prompt thousands

# Every number that a drawing takes: its type and the least and the most that it may be.
LIMITS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "width": (int, 64, 4096),
    "height": (int, 64, 4096),
    "steps": (int, 1, 1000),
    "count": (int, 1, 256),
    "guidance_scale": (float, -100, 100),
    "guidance_rescale": (float, 0, 1),
    "guidance_start": (float, 0, 1),
    "guidance_end": (float, 0, 1),
    "freeu": (float, 0, 10),
    "token_merging": (float, 0, 0.9),
    "deep_cache": (int, 1, 100),
    "deep_cache_branch": (int, 0, 63),
    "window": (int, 64, 4096),
    "window_overlap": (float, 0, 0.9),
    "seed": (int, -(2**63), 2**64 - 1),
    "clip_skip": (int, 1, 64),
    "strength": (float, 0, 1),
    "image_guidance_scale": (float, 0, 100),
    "control_weight": (float, -10, 10),
    "control_start": (float, 0, 1),
    "control_end": (float, 0, 1),
    "ip_scale": (float, -10, 10),
    "ip_start": (float, 0, 1),
    "ip_end": (float, 0, 1),
    "mask_blur": (float, 0, 64),
    "only_masked": (int, 0, 4096),
    "variation_seed": (int, -(2**63), 2**64 - 1),
    "variation_strength": (float, 0, 1),
    "ensd": (int, -(2**63), 2**63),
    "eta": (float, 0, 1),
    "hires_scale": (float, 1, 8),
    "hires_strength": (float, 0.01, 1),
    "hires_steps": (int, 1, 1000),
    "bits": (int, 4, 8),
    "refiner_start": (float, 0, 1),
    "aesthetic_score": (float, 0, 100),
    "negative_aesthetic_score": (float, 0, 100),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a picture, but for the picture or noise that it started from.

    What is None was not said; drawing then takes the model's own.

    Attributes:
        prompt: what was asked for.
        negative_prompt: what was not wanted.
        width: in pixels.
        height: in pixels.
        steps: as asked for; an image to start from leaves out some of them.
        sampler: the algorithm, in our word.
        schedule: the choice of times, in our word.
        guidance_scale: how far the prompt is followed; 1 is unguided.
        guidance_rescale: how far guidance was brought back to the prediction's own spread.
        guidance_start: share of the way from which it was guided.
        guidance_end: and up to which.
        tile: the axes along which it continues at the opposite edge: x, y or xy.
        freeu: FreeU's four factors, with spaces between; None where it was not used.
        token_merging: share of the tokens that were merged.
        deep_cache: one call in so many ran the whole network; None where all did.
        deep_cache_branch: how much of it ran in the others.
        window: pixels a side of the windows that the network saw; None where it saw all at once.
        window_overlap: share of a window that its neighbours saw too.
        seed: of this one picture.
        noise: whose random numbers: torch, nvidia, numpy or mlx.
        clip_skip: text layer that was read, counted from the end; 1 is the last.
        syntax: how the prompts were read: a1111 or plain.
        emphasis: what weights on words did: original or no norm, A1111's words.
        loras: that changed the networks, beside those in the prompt: name:weight; name:weight.
        strength: how far the given image was left, 0 to 1; None where there was none.
        fit: how that image came to its size: stretch or crop.
        mask_blur: of the mask's edge in pixels; None where there was no mask.
        mask_content: what it began with inside the mask: original, fill, noise or nothing; None
            where there was no mask.
        only_masked: pixels around the masked part that were drawn with it, at the size above, and
            put back into a picture of another size; None where the whole picture was drawn.
        image_guidance_scale: how far an edit stayed with the picture that it changed; None where
            nothing was edited.
        control: the networks that steered, with their weights and shares of the steps.
        image_prompts: the IP-Adapters that made prompts of pictures, with scales and shares.
        sample_posterior: the image's latents were drawn from their distribution, not its mean.
        variation_seed: of the second noise that was mixed in.
        variation_strength: how much of it.
        ensd: A1111's "eta noise seed delta": the steps' noise is seeded apart, by this much.
        eta: share of fresh noise in each step.
        discard_penultimate: the last noise level but one was left out.
        hires_scale: how many times larger it was drawn again; None where it was not.
        hires_strength: how far that second drawing left the first, 0 to 1.
        hires_steps: that it made.
        hires_upscaler: what enlarged the first: latent, lanczos, or a network's name.
        hires_prompt: what the second drew, where that was something else.
        hires_negative_prompt: likewise, what it avoided.
        zeroed_negative: nothing at all was avoided, not even an empty text (SDXL).
        original_size: of the picture that SDXL was told it is cut from, as 1024x768.
        crop: pixels cut off at the left and at the top, as 0,0.
        target_size: that SDXL was told the picture has.
        aesthetic_score: that SDXL's refiner was told of what is wanted.
        negative_aesthetic_score: likewise, of what is avoided.
        refiner: name of the model that drew the last part.
        refiner_start: share of the way from which it drew.
        injected: what was given as an array instead of drawn from the seed: latents, step_noise.
        model: its name.
        model_hash: the first 10 digits of its file's SHA-256, A1111's way.
        unet: name of a UNet from elsewhere.
        vae: name of a separate autoencoder.
        dtype: of weights and activations.
        bits: that the weights were quantised to.
        version: the program that drew it.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    tile: str | None = None
    freeu: str | None = None
    token_merging: float = 0.0
    deep_cache: int | None = None
    deep_cache_branch: int = 0
    window: int | None = None
    window_overlap: float = 0.5
    seed: int | None = None
    noise: str | None = None
    clip_skip: int | None = None
    syntax: str = "a1111"
    emphasis: str = "original"
    loras: str | None = None
    strength: float | None = None
    fit: str | None = None
    mask_blur: float | None = None
    mask_content: str | None = None
    only_masked: int | None = None
    image_guidance_scale: float | None = None
    control: str = ""
    image_prompts: str = ""
    sample_posterior: bool = False
    variation_seed: int | None = None
    variation_strength: float = 0.0
    ensd: int = 0
    eta: float | None = None
    discard_penultimate: bool = False
    hires_scale: float | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    hires_upscaler: str | None = None
    hires_prompt: str | None = None
    hires_negative_prompt: str | None = None
    zeroed_negative: bool = False
    original_size: str | None = None
    crop: str | None = None
    target_size: str | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    refiner: str = ""
    refiner_start: float | None = None
    injected: str = ""
    model: str = ""
    model_hash: str = ""
    unet: str = ""
    vae: str = ""
    dtype: str = ""
    bits: int | None = None
    version: str = ""

    def arguments(self) -> dict[str, Any]:
        """What is set, as keyword arguments for ``StableDiffusion.generate``."""
        about = ("control", "image_prompts", "injected", "model", "model_hash", "unet", "vae")
        about += ("dtype", "bits", "version", "refiner", "refiner_start", "zeroed_negative")
        found = {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in about
        }
        return {**found, "negative_prompt": None} if self.zeroed_negative else found


class Recipe(NamedTuple):
    """Settings that were read, and one line for each thing that they cannot bring back."""

    settings: Settings
    notes: list[str]


def program() -> str:
    """This program's name and version, as it goes into ``Settings.version``."""
    return f"{PROGRAM} {__version__}"


def check_number(name: str, value: object) -> int | float:
    """``value`` as the number that ``name`` takes; numpy's numbers will do.

    Raises:
        ValueError: on another type, NaN, or out of the interval in ``LIMITS``.
    """
    kind, low, high = LIMITS[name]
    is_number = isinstance(value, Integral if kind is int else Real)
    if not is_number or isinstance(value, bool) or not low <= value <= high:  # pyright: ignore[reportOperatorIssue]
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} from {low:,} to {high:,}, got {_short(value)}.")
    return kind(value)  # pyright: ignore[reportArgumentType]


# The JSON text -----------------------------------------------------------------------------------


def to_json(settings: Settings) -> str:
    """All settings that are set, as one line of ASCII."""
    said = {
        field.name: value
        for field in fields(Settings)
        if (value := getattr(settings, field.name)) != field.default
    }
    return json.dumps(said)


def from_json(text: str) -> Recipe:
    """Read what ``to_json`` wrote.

    Raises:
        ValueError: in one line, if it is not that.
    """
    text = _bounded(text)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("the settings are not valid JSON.") from None
    if not isinstance(values, dict):
        raise ValueError("the settings are not a JSON object.")
    return _checked(values)


def _checked(values: Mapping[str, Any]) -> Recipe:
    """Settings from a stranger's mapping: every type and every number is looked at."""
    known = {field.name: field.default for field in fields(Settings)}
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known or value is None:
            continue
        if name in LIMITS and name != "freeu":  # four of them, in a text
            value = check_number(name, value)
        elif not isinstance(value, bool if name in _FLAGS else str):
            kind = "true or false" if name in _FLAGS else "text"
            raise ValueError(f"{name} must be {kind}, got {_short(value)}.")
        if isinstance(value, str):  # JSON can hold halves of characters, which no one can write
            value = value.encode("utf-8", "replace").decode()
        chosen[name] = value
    settings = Settings(**chosen)
    notes = _what_was_given(settings)
    if newer := [name for name in values if name not in known]:
        notes.append(f"settings of a newer version are not read: {_listed(newer)}")
    return Recipe(settings, notes)


_FLAGS = ("sample_posterior", "discard_penultimate", "zeroed_negative")


def _what_was_given(settings: Settings) -> list[str]:
    """Notes on what was given to the drawing and is in no settings."""
    notes = []
    if settings.injected:
        notes.append(f"was drawn from arrays that were given ({settings.injected}), not its seed")
    if settings.refiner:
        start = "" if settings.refiner_start is None else f" from {settings.refiner_start:g} on"
        notes.append(f"was refined by {settings.refiner}{start}: it takes that model again")
    if settings.strength is not None:
        given = "a picture" if settings.mask_blur is None else "a picture and a mask"
        notes.append(f"was drawn from {given}: it takes the same again")
    if settings.image_guidance_scale is not None:
        notes.append("was drawn from a picture that it changed: it takes the same again")
    if settings.control:
        notes.append(
            f"was steered by {settings.control}: name the same with --controlnet and "
            "--control-image"
        )
    if settings.image_prompts:
        notes.append(
            f"was prompted with pictures by {settings.image_prompts}: name the same with "
            "--ip-adapter and --ip-image"
        )
    return notes


# A1111's block -----------------------------------------------------------------------------------


class _Sampler(NamedTuple):
    """One sampler in A1111's words.

    Attributes:
        label: A1111's name.
        ours: our word. Of two rows with one word, the first is written.
        automatic: the schedule that "Automatic" stands for since version 1.9.
        unlike: what A1111 does with it and we do not, so that the picture differs.
        discards: A1111 leaves out the last noise level but one.
        aliases: other spellings.
    """

    label: str
    ours: str
    automatic: str
    unlike: str = ""
    discards: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def earlier(self) -> str:
        """The schedule that the bare label stood for before version 1.9."""
        return "uniform" if self.automatic in ("karras", "exponential") else self.automatic

    @property
    def keeps_times(self) -> bool:
        """Whether A1111 takes this sampler's own times, whatever schedule is asked for."""
        return self.automatic in ("leading", "linspace", "trailing")


_SDE = "its steps' noise is torchsde's, which is not drawn here"
_SAMPLERS = (
    _Sampler("DPM++ 2M", "dpmpp_2m", "karras", aliases=("k_dpmpp_2m",)),
    _Sampler("DPM++ SDE", "dpmpp_sde", "karras", _SDE, aliases=("k_dpmpp_sde",)),
    _Sampler("DPM++ 2M SDE", "dpmpp_2m_sde", "exponential", _SDE, aliases=("k_dpmpp_2m_sde",)),
    _Sampler("DPM++ 2M SDE Heun", "dpmpp_2m_sde", "exponential", f"drawn without Heun; {_SDE}"),
    _Sampler("DPM++ 3M SDE", "dpmpp_3m_sde", "exponential", _SDE, discards=True),
    _Sampler("DPM++ 2S a", "dpmpp_2s_a", "karras", aliases=("dpmpp_2s_ancestral",)),
    _Sampler("Euler a", "euler_a", "uniform", aliases=("k_euler_a", "euler_ancestral")),
    _Sampler("Euler", "euler", "uniform", aliases=("k_euler",)),
    _Sampler("LMS", "lms", "uniform", aliases=("k_lms",)),
    _Sampler("Heun", "heun", "uniform", aliases=("k_heun",)),
    _Sampler("DPM2", "dpm2", "karras", discards=True, aliases=("k_dpm_2", "dpm_2")),
    _Sampler("DPM2 a", "dpm2_a", "karras", discards=True, aliases=("dpm_2_ancestral",)),
    _Sampler("DDIM", "ddim", "leading"),
    _Sampler("PLMS", "plms", "leading"),
    _Sampler("UniPC", "unipc", "linspace", "A1111's is of another order and takes other times"),
    _Sampler("LCM", "lcm", "trailing", "A1111's takes other times"),
    _Sampler("TCD", "tcd", "trailing"),
)

_SCHEDULES = {  # our word to A1111's label; the last three are not A1111's
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "beta": "Beta",
    "ays": "Align Your Steps",
    "leading": "Leading",
    "linspace": "Linspace",
    "trailing": "Trailing",
}
_SCHEDULE_ALIASES = {"normal": "uniform", "ddim": "leading", "sgmuniform": "sgm_uniform"}
_SCHEDULES_UNLIKE = {
    "beta": "A1111's spaces sigmas, not times",
    "ays": "A1111's keeps a level above 0 at the end",
}

_AREA, _ONLY_MASKED, _PADDING = "Inpaint area", "Only masked", "Masked area padding"
_NOISE = {"GPU": "nvidia", "NV": "nvidia", "CPU": "torch"}
_NAMED = {"Model": "model", "Model hash": "model_hash", "UNet": "unet", "VAE": "vae"}
_PLAIN = {  # numbers of the last line and the settings that they are
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "ENSD": "ensd",
    "Mask blur": "mask_blur",
    _PADDING: "only_masked",
    "Eta": "eta",
    "Eta DDIM": "eta",
    "Guidance rescale": "guidance_rescale",
    "Guidance start": "guidance_start",
    "Guidance end": "guidance_end",
    "Token merging ratio": "token_merging",
    "DeepCache": "deep_cache",
    "DeepCache branch": "deep_cache_branch",
    "Window": "window",
    "Window overlap": "window_overlap",
    "Hires upscale": "hires_scale",
    "Hires steps": "hires_steps",
}
_UPSCALERS = {  # A1111's, and what is nearest here
    "latent": "latent",
    "lanczos": "lanczos",
    **{f"latent ({word})": "latent" for word in ("antialiased", "bicubic", "nearest")},
    **{f"latent ({word})": "latent" for word in ("bicubic antialiased", "nearest-exact")},
    "nearest": "lanczos",
    "none": "lanczos",
}
_MASKED = {  # A1111's words; "original" is not said
    "fill": "fill",
    "noise": "latent noise",
    "nothing": "latent nothing",
}
_DISCARD, _FIRST_PASS = "Discard penultimate sigma", "First pass size"
_SYNTAX = "Prompt syntax"
_DOWNCAST = "Downcast alphas_cumprod"
_HARMLESS = {  # facts about a picture that decide nothing of it, or that another key says again
    *("Batch size", "Batch pos", "Civitai metadata", "Civitai resources", "Created Date", "Hashes"),
    *("Init image hash", "User", "VAE hash"),
}
_KEY = re.compile(r"\s*([^\s:,\"][^:,\"\n]{0,99}):[ \t]*")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,4})?")


def to_parameters(settings: Settings) -> str:
    """The settings as A1111 writes them; ``from_parameters`` reads them back.

    A schedule or a source of noise that A1111 does not have is written in a word of its own.
    """
    pairs: list[tuple[str, object]] = [("Steps", settings.steps)]
    if settings.sampler is not None:
        row = next((row for row in _SAMPLERS if row.ours == settings.sampler), None)
        pairs.append(("Sampler", row.label if row else settings.sampler))
        if settings.schedule is not None:
            is_automatic = row is not None and settings.schedule == row.automatic == row.earlier
            label = _SCHEDULES.get(settings.schedule, settings.schedule)
            pairs.append(("Schedule type", "Automatic" if is_automatic else label))
    has_size = settings.width is not None and settings.height is not None
    pairs += [
        ("CFG scale", settings.guidance_scale),
        ("Seed", settings.seed),
        ("Size", f"{settings.width}x{settings.height}" if has_size else None),
        ("Model hash", settings.model_hash or None),
        ("Model", settings.model or None),
        ("UNet", settings.unet or None),
        ("VAE", settings.vae or None),
    ]
    if settings.variation_strength:
        pairs += [
            ("Variation seed", settings.variation_seed),
            ("Variation seed strength", settings.variation_strength),
        ]
    pairs += [
        (
            "Denoising strength",
            settings.hires_strength if settings.strength is None else settings.strength,
        ),
        ("Mask blur", settings.mask_blur),
        (_AREA, None if settings.only_masked is None else _ONLY_MASKED),
        (_PADDING, settings.only_masked),
        ("Masked content", _MASKED.get(settings.mask_content or "")),
        ("Clip skip", settings.clip_skip if settings.clip_skip != 1 else None),
        ("Hires upscale", settings.hires_scale),
        ("Hires steps", settings.hires_steps),
        ("Hires upscaler", _hires_label(settings.hires_upscaler)),
        ("Hires prompt", settings.hires_prompt),
        ("Hires negative prompt", settings.hires_negative_prompt),
        ("Guidance rescale", settings.guidance_rescale or None),
        ("Guidance start", settings.guidance_start or None),
        ("Guidance end", settings.guidance_end if settings.guidance_end != 1 else None),
        ("FreeU", settings.freeu),
        ("Token merging ratio", settings.token_merging or None),
        ("DeepCache", settings.deep_cache),
        ("DeepCache branch", settings.deep_cache_branch or None),
        ("Window", settings.window),
        ("Window overlap", settings.window_overlap if settings.window else None),
        ("Tiling", {None: None, "xy": "True"}.get(settings.tile, settings.tile)),
        ("Emphasis", "No norm" if settings.emphasis == "no norm" else None),
        (_SYNTAX, settings.syntax if settings.syntax == "plain" else None),
        ("ENSD", settings.ensd or None),
        ("Eta DDIM" if settings.sampler == "ddim" else "Eta", settings.eta),
        (_DISCARD, settings.discard_penultimate or None),
    ]
    if settings.noise is not None:
        is_theirs = settings.noise in ("torch", "nvidia")
        source = {"torch": "CPU", "nvidia": "NV"}.get(settings.noise, settings.noise)
        pairs.append(("RNG" if is_theirs else "Noise source", source))
    pairs.append(("Version", settings.version or None))

    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs if value is not None))
    return "\n".join(lines)


def from_parameters(text: str) -> Recipe:
    """Read A1111's block, or ours in its form.

    Raises:
        ValueError: in one line: too long, no settings in it, or a number that cannot be true.
    """
    prompt, negative, pairs = _split(_bounded(text).replace("\r\n", "\n").strip())
    if not pairs:
        raise ValueError("the text holds no settings of A1111's kind (Steps: …, Sampler: …).")
    version = pairs.get("Version", "")
    is_ours = version.startswith(PROGRAM)
    hires = any(key.startswith(("Hires", _FIRST_PASS)) for key in pairs)
    notes: list[str] = []
    # A layer that is not said is the model's own: the last of SD 1, the one before it of SDXL.
    values: dict[str, Any] = {"version": version}
    used = {"Version", "Sampler", "Schedule type", "Size", _FIRST_PASS, "RNG", _SYNTAX}
    used.add("Tiling")

    for key, name in _PLAIN.items():
        if key in pairs:
            used.add(key)
            values[name] = _number(key, name, pairs[key])
    for key, name in _NAMED.items():
        if key in pairs:
            used.add(key)
            values[name] = pairs[key]
    if values.get("seed") == -1:
        del values["seed"]  # A1111's word for "any"
    # In the oldest form of the hires fix, Size is that of its second drawing.
    first_pass = pairs.get(_FIRST_PASS, "0x0")
    if size := pairs.get("Size") if first_pass == "0x0" else first_pass:
        if not (sides := _SIZE.fullmatch(size)):
            raise ValueError(f"Size must be WIDTHxHEIGHT, got {_short(size)}.")
        for name, digits in zip(("width", "height"), sides.groups(), strict=True):
            values[name] = check_number(name, int(digits))
    if "Denoising strength" in pairs:
        used.add("Denoising strength")
        strength = _number("Denoising strength", "strength", pairs["Denoising strength"])
        values["hires_strength" if hires else "strength"] = strength
    values.update(_sampler(pairs, is_ours, values.get("steps"), notes))
    if _DISCARD in pairs:
        used.add(_DISCARD)
        values["discard_penultimate"] = pairs[_DISCARD] == "True"

    source = pairs.get("RNG", "GPU")
    if is_ours and "Noise source" in pairs:
        used.add("Noise source")
        values["noise"] = pairs["Noise source"]
    elif source in _NOISE:
        values["noise"] = _NOISE[source]
    else:
        notes.append(f"RNG {_short(source)} is not known here; taken as an NVIDIA card's")
        values["noise"] = "nvidia"
    if source == "GPU" and not is_ours:
        notes.append(
            "no RNG is named: A1111 then drew on its own GPU. Taken as an NVIDIA card's (nvidia); "
            "on a Mac it was the CPU's (torch)"
        )

    values["prompt"], values["negative_prompt"] = prompt, negative
    if (tiling := pairs.get("Tiling", "False")) != "False":
        values["tile"] = "xy" if tiling == "True" else tiling
    if (emphasis := pairs.get("Emphasis", "Original").lower()) in ("original", "no norm"):
        used.add("Emphasis")
        values["emphasis"] = emphasis
    if pairs.get(_AREA) == _ONLY_MASKED:
        used.add(_AREA)
        values.setdefault("only_masked", 0)
        values.setdefault("mask_blur", 0.0)  # A1111 does not say that there is none
    else:  # a padding that went unused
        values.pop("only_masked", None)
    if "mask_blur" in values:
        theirs = {label: ours for ours, label in _MASKED.items()}
        values["mask_content"] = theirs.get(pairs.get("Masked content", ""), "original")
        used.add("Masked content")
    if is_ours and "FreeU" in pairs:
        values["freeu"] = pairs["FreeU"]
        used.add("FreeU")
    if is_ours and _SYNTAX in pairs:
        values["syntax"] = pairs[_SYNTAX]
    if hires:
        _hires(pairs, is_ours, values, notes)
    if pairs.get(_DOWNCAST) == "True" or (version and not is_ours and not _is_since(version, 1, 8)):
        used.add(_DOWNCAST)
        notes.append("A1111 rounded its noise schedule to float16 (before 1.8): details may differ")
    if "strength" in values and not is_ours:
        notes.append("A1111 starts from a random sample of the image's latents, we from their mean")
    if "mask_blur" in values and not is_ours:
        notes.append("A1111 blends a mask into each prediction, we into each step's latents")
    unread = [key for key in pairs if key not in used and key not in _HARMLESS]
    if unread := [key for key in unread if not key.startswith("Hires")]:
        notes.append(f"not read, and perhaps part of the picture: {_listed(unread)}")
    settings = Settings(**values)
    return Recipe(settings, [*notes, *_what_was_given(settings)])


def _hires(
    pairs: Mapping[str, str], is_ours: bool, values: dict[str, Any], notes: list[str]
) -> None:
    """A second, larger drawing: what is said of it, put into ``values``."""
    if "hires_scale" not in values or "hires_strength" not in values:
        for name in ("hires_scale", "hires_strength", "hires_steps"):
            values.pop(name, None)
        notes.append("was enlarged by A1111's hires fix in a form that is not read: left out")
        return
    label = pairs.get("Hires upscaler", "Latent").strip()
    ours = _UPSCALERS.get(label.lower(), label)
    values["hires_upscaler"] = ours
    values.setdefault("hires_steps", values.get("steps"))
    if not is_ours and label.lower() not in ("latent", "lanczos"):
        notes.append(f"was enlarged by {_short(label)}, and here by {_short(ours)}")
    elif not is_ours and ours != "latent":
        notes.append("A1111 starts its second drawing from a random sample, we from the mean")
    for key, what in (("Hires sampler", "sampler"), ("Hires schedule type", "schedule type")):
        if not is_ours and key in pairs:
            notes.append(f"its second drawing had a {what} of its own, {_short(pairs[key])}")
    for name in ("hires_prompt", "hires_negative_prompt"):
        if (key := name.capitalize().replace("_", " ")) in pairs:
            values[name] = pairs[key]
    if "Hires checkpoint" in pairs:
        notes.append("its second drawing had another checkpoint, which is not read")


def _hires_label(name: str | None) -> str | None:
    """A1111's word for what enlarges a picture."""
    return name.capitalize() if name in ("latent", "lanczos") else name


def _sampler(
    pairs: Mapping[str, str], is_ours: bool, steps: int | None, notes: list[str]
) -> dict[str, Any]:
    """Our words for the sampler and its schedule, as far as there are any."""
    if "Sampler" not in pairs:
        return {}
    label, asked = pairs["Sampler"].strip(), pairs.get("Schedule type", "").strip()
    row = _LABELS.get(label.lower())
    head, _, tail = label.rpartition(" ")
    if row is None and tail.lower() in _SCHEDULE_WORDS:  # before 1.9: "DPM++ 2M Karras"
        row = _LABELS.get(head.lower())
        asked = tail if asked.lower() in ("", "automatic") else asked
    if row is None:
        notes.append(f"sampler {_short(label)} is not known here; the model's default is taken")
        return {}
    if row.unlike and not is_ours:
        notes.append(f"sampler {row.label}: {row.unlike}; the picture will differ")
    if row.automatic == "leading" and not is_ours and steps and len(_times(steps)) != steps:
        notes.append(f"A1111 takes {len(_times(steps))} times where {steps} steps are asked of it")
    chosen: dict[str, Any] = {"sampler": row.ours}
    if row.discards and not is_ours:
        chosen["discard_penultimate"] = True
    if asked.lower() in ("", "automatic") or (row.keeps_times and not is_ours):
        is_old = not asked and not _is_since(pairs.get("Version", ""), 1, 9)
        return {**chosen, "schedule": row.earlier if is_old else row.automatic}
    schedule = _SCHEDULE_WORDS.get(asked.lower())
    if schedule is None:
        notes.append(f"schedule {_short(asked)} is not known here; the sampler's usual is taken")
        return chosen
    if schedule in _SCHEDULES_UNLIKE and not is_ours:
        notes.append(f"schedule {asked}: {_SCHEDULES_UNLIKE[schedule]}; the picture will differ")
    return {**chosen, "schedule": schedule}


def upscaler_word(label: str) -> str:
    """A1111's name of what enlarges a first drawing, in our word; others are networks' names."""
    return _UPSCALERS.get(label.strip().lower(), label.strip())


def pairs_of(text: str) -> dict[str, str]:
    """What the last line of A1111's block says, unread; nothing where there is no such line."""
    return _split(_bounded(text).replace("\r\n", "\n").strip())[2]


def sampler_words(sampler: str, schedule: str, steps: int) -> tuple[dict[str, Any], list[str]]:
    """A1111's names of a sampler and a schedule type in our words, and notes on what differs.

    An unknown sampler leaves "sampler" out, an unknown schedule "schedule".
    """
    notes: list[str] = []
    pairs = {"Sampler": sampler, "Schedule type": schedule or "Automatic"}
    return _sampler(pairs, False, steps, notes), notes


def sampler_labels() -> dict[str, tuple[str, ...]]:
    """A1111's name of every sampler that there is here, with its other spellings."""
    return {row.label: (row.ours, *row.aliases) for row in _SAMPLERS}


def sampler_label(ours: str) -> str:
    """A1111's name of a sampler of ours; ours where A1111 has none."""
    return _LABELS[ours].label if ours in _LABELS else ours


def schedule_labels() -> dict[str, str]:
    """Each schedule by our word, with A1111's name, or one in its manner."""
    return dict(_SCHEDULES)


def schedule_word(label: str) -> str | None:
    """Our word for A1111's name of a schedule; None for an unknown one."""
    return _SCHEDULE_WORDS.get(label.lower())


_LABELS = {row.ours: row for row in reversed(_SAMPLERS)}
_LABELS |= {name.lower(): row for row in _SAMPLERS for name in (row.label, *row.aliases)}
_SCHEDULE_WORDS = {label.lower(): ours for ours, label in _SCHEDULES.items()}
_SCHEDULE_WORDS |= {ours: ours for ours in _SCHEDULES} | _SCHEDULE_ALIASES


def _times(steps: int) -> range:
    """A1111's times for DDIM and PLMS: more than asked for where 1000 does not divide evenly."""
    return range(0, 1000, max(1000 // steps, 1))


def _is_since(version: str, major: int, minor: int) -> bool:
    """Whether an A1111 of that version wrote it; other programs' versions count as new."""
    found = re.match(r"v?(\d{1,4})\.(\d{1,4})", version)
    return bool(version) and (found is None or (int(found[1]), int(found[2])) >= (major, minor))


def _split(text: str) -> tuple[str, str, dict[str, str]]:
    """The block's three parts. The last line with three or more pairs is the settings' line."""
    lines = text.split("\n")
    pairs: dict[str, str] = {}
    for number in range(len(lines) - 1, -1, -1):
        is_candidate = number == len(lines) - 1 or lines[number].startswith("Steps: ")
        if is_candidate and len(found := _pairs(lines[number])) >= 3:
            pairs = found
            del lines[number:]
            break
    prompt, negative = [], None
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            negative = [] if negative is None else negative
            line = line.removeprefix("Negative prompt:").strip()
        (prompt if negative is None else negative).append(line)
    return "\n".join(prompt), "\n".join(negative or []), pairs


def _pairs(line: str) -> dict[str, str]:
    """A line such as 'Steps: 20, Model: "a, b", Hashes: {"vae": "c"}' as a mapping, in one pass."""
    pairs: dict[str, str] = {}
    position = 0
    while position < len(line):
        key = _KEY.match(line, position)
        if key:
            position = key.end()
            end, value = _value(line, position)
            pairs.setdefault(key[1].strip(), value)
            position = end
        comma = line.find(",", position)
        position = len(line) if comma < 0 else comma + 1
    return pairs


def _value(line: str, start: int) -> tuple[int, str]:
    """Where the value that starts there ends, and what it says."""
    first = line[start : start + 1]
    if first == '"' and (quoted := _QUOTED.match(line, start)):
        try:
            value = json.loads(quoted[0], strict=False)
        except ValueError:
            value = quoted[0]
        return quoted.end(), value
    if first in ("{", "["):
        try:
            _, end = json.JSONDecoder().raw_decode(line, start)
        except (ValueError, RecursionError):
            pass
        else:
            return end, line[start:end]
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return end, line[start:end].strip()


def _number(key: str, name: str, text: str) -> int | float:
    """The number that A1111's ``key`` says, within the bounds of the setting ``name``."""
    kind = LIMITS[name][0]
    is_whole = re.fullmatch(r"[+-]?\d{1,30}", text) is not None
    if (kind is int and not is_whole) or not _NUMBER.fullmatch(text):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key} must be {what}, got {_short(text)}.")
    value = int(text) if is_whole else float(text)
    return check_number(name, value)


def _quoted(value: object) -> str:
    """A value as A1111 writes it: quoted where a comma, a colon or a line end would break it."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    text = str(value)
    is_plain = not any(c in text for c in ',:\n\r"') and text == text.strip()
    return text if is_plain and text[:1] not in ("{", "[") else json.dumps(text, ensure_ascii=False)


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"the text has {len(text):,} characters; settings have {MAX_TEXT:,} at most."
        )
    return text


def _listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(_short(name, 40, bare=True) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _short(value: object, limit: int = 60, *, bare: bool = False) -> str:
    """A stranger's value, safe to print in one line."""
    text = value if isinstance(value, str) else repr(value)[: limit + 1]
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return f"'{text}'" if isinstance(value, str) and not bare else text
