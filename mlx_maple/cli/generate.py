"""`maple generate`: from a prompt, or many, to pictures."""

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_maple.cli import (
    CANCELLED,
    DONE,
    FAULT,
    UNUSABLE,
    USAGE,
    Failure,
    _default_model,
    _machine,
    _memory,
    _outputs,
    _terminal,
    is_out_of_memory,
)
from mlx_maple.cli._outputs import Outputs
from mlx_maple.cli._terminal import Screen

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from mlx_maple.metadata import Settings
    from mlx_maple.pipeline import Progress, Result, StableDiffusion

# Options whose names differ from the settings that they set; the others are called the same.
SETTING_OF = {
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "lora": "loras",
    "image_guidance": "image_guidance_scale",
}
OPTIONS = (
    *("negative", "width", "height", "steps", "guidance", "seed", "count", "sampler", "schedule"),
    *("eta", "noise", "clip_skip", "syntax", "emphasis", "variation_seed", "variation_strength"),
    *("guidance_rescale", "guidance_start", "guidance_end", "tile", "freeu", "window"),
    *("window_overlap", "token_merging", "deep_cache", "deep_cache_branch"),
    *("hires_scale", "hires_strength", "hires_steps", "hires_upscaler"),
    *("hires_prompt", "hires_negative_prompt", "mask_content"),
    "only_masked",
    *("image", "strength", "fit", "mask", "mask_blur", "lora"),
    *("original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score"),
    "refiner_start",
    *("image_guidance", "depth_image", "control_image", "control_preprocess"),
    *("control_weight", "control_start", "control_end"),
    *("ip_image", "ip_scale", "ip_start", "ip_end"),
)
PICTURES = ("image", "mask", "depth_image", "control_image", "ip_image")  # settings that name files
LISTED = ("control_image", "ip_image")  # of these, those that may name several
# Settings of which one is for all networks.
ONE_FOR_ALL = (
    *("control_preprocess", "control_weight", "control_start", "control_end"),
    *("ip_scale", "ip_start", "ip_end"),
)
NO_LORA = "none"  # what --lora says for none, also of those that a picture names
PREVIEW_SECONDS = 0.25  # between two previews
MOST_PROMPTS = 1 << 24  # characters of a file of prompts


def _gigabytes(text: str) -> int:
    """Bytes of so many gigabytes."""
    found = float(text)
    if not 0.1 <= found <= 10_000:
        raise ValueError(text)
    return int(found * 1e9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; what is left out comes from the model."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")

    add = parser.add_argument_group("the model").add_argument
    where = "a checkpoint file, a diffusers or maple folder, a hub name (owner/name) or a short one"
    add(
        "-m",
        "--model",
        metavar="MODEL",
        help=f"{where} (see `maple models`); without it $MAPLE_MODEL, else what `maple models use` "
        "has set, else the small one that comes with maple",
    )
    add(
        "--unet",
        metavar="MODEL",
        help="take the UNet from here instead: a bare one, as most GGUF files hold, will do",
    )
    add("--vae", metavar="MODEL", help="take the autoencoder from here instead")
    add("--taesd", metavar="MODEL", help="a small autoencoder, for --preview taesd")
    add(
        "--lora",
        action="append",
        metavar="LORA[:WEIGHT]",
        help="change the model by this file, or one of that name in $MAPLE_MODELS; weights as in "
        "style:0.8 or style:unet=0.8,te=0.5; again for several; none is none, also of those that "
        "--from-image brings",
    )
    add(
        "--embedding",
        action="append",
        metavar="FILE",
        help="a textual inversion: its name then stands for it in prompts; again for several",
    )
    add(
        "--controlnet",
        action="append",
        metavar="MODEL",
        help="steer by a picture, with this network; again for several (see --control-image)",
    )
    add(
        "--ip-adapter",
        action="append",
        metavar="MODEL",
        help="take pictures as prompts, with this network; again for several (see --ip-image)",
    )
    add(
        "--ip-encoder",
        metavar="MODEL",
        help="the image encoder that looks at them; if not said, the one beside the adapter, in "
        "$MAPLE_MODELS or on the hub",
    )
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of weights and activations")
    add("--quantize", type=int, choices=(8, 4), help="bits to keep the weights in")
    add(
        "--low-memory",
        action="store_true",
        help="hold one network at a time and decode in stripes: less memory, more time",
    )
    add(
        "--max-memory",
        type=_gigabytes,
        metavar="GB",
        help="wait for the GPU rather than take more than this: some time for some memory",
    )
    add("--variant", metavar="NAME", help="which weights of a diffusers folder, such as fp16")
    add("--ema", action="store_true", help="use the EMA copy of the UNet's weights")
    add(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts, where its files do not say it rightly",
    )
    add("--no-cache", action="store_true", help="keep no converted twin of a raw checkpoint")

    add = parser.add_argument_group("the picture").add_argument
    add("-n", "--negative", metavar="TEXT", help="what not to draw")
    add("-W", "--width", type=int, metavar="PIXELS", help="a multiple of 8")
    add("-H", "--height", type=int, metavar="PIXELS", help="a multiple of 8")
    add("-s", "--steps", type=int, metavar="N", help="number of steps")
    add("-g", "--guidance", type=float, metavar="SCALE", help="how far to follow the prompt")
    add("--guidance-rescale", type=float, metavar="F", help="soften its colours, 0 to 1")
    add("--guidance-start", type=float, metavar="F", help="guide from this share of the steps on")
    add("--guidance-end", type=float, metavar="F", help="and up to this one")
    add("--tile", choices=("x", "y", "xy"), help="continue the picture at the opposite edge")
    add(
        "--freeu",
        nargs=4,
        type=float,
        metavar=("B1", "B2", "S1", "S2"),
        help="FreeU's factors; for SD 1.5 its authors take 1.5 1.6 0.9 0.2",
    )
    add("--seed", type=int, metavar="N", help="of the first picture; without it a random one")
    add("--count", type=int, metavar="N", help="how many pictures, seeded seed, seed+1, …")
    add("--sampler", metavar="SAMPLER", help="the algorithm, such as dpmpp_2m, euler_a or ddim")
    add("--schedule", metavar="SCHEDULE", help="the choice of times, such as karras or trailing")
    add("--eta", type=float, metavar="F", help="share of fresh noise in each step, 0 to 1")
    add("--noise", metavar="NOISE", help="whose random numbers: torch, nvidia, numpy or mlx")
    add("--clip-skip", type=int, metavar="N", help="text layer from the end; 1 is the last")
    add(
        "--syntax",
        choices=("a1111", "plain"),
        help="how prompts are written: a1111 with (word:1.2), [a:b:0.5], AND and BREAK, or plain",
    )
    add("--emphasis", choices=("original", "no norm"), help="what weights on words do")
    add("--variation-seed", type=int, metavar="N", help="mix in the noise of this seed")
    add("--variation-strength", type=float, metavar="F", help="how much of it, 0 to 1")

    add = parser.add_argument_group("less work for nearly the same").add_argument
    add("--token-merging", type=float, metavar="F", help="merge this share of like pixels, to 0.75")
    add("--deep-cache", type=int, metavar="N", help="run the whole network in one call of N")
    add(
        "--deep-cache-branch", type=int, metavar="N", help="how much runs in the others; 0 is least"
    )

    add = parser.add_argument_group("large pictures").add_argument
    add("--window", type=int, metavar="PIXELS", help="show the network windows of this size")
    add("--window-overlap", type=float, metavar="F", help="share that neighbours see too, to 0.9")

    add = parser.add_argument_group("a second, larger drawing").add_argument
    add("--hires-scale", type=float, metavar="F", help="draw again, this many times larger")
    add("--hires-strength", type=float, metavar="F", help="how far to leave the first, to 1")
    add("--hires-steps", type=int, metavar="N", help="steps of the second; as many if not said")
    add(
        "--hires-prompt", metavar="TEXT", help="what the second is to draw; the same where not said"
    )
    add("--hires-negative-prompt", metavar="TEXT", help="likewise, what it is to stay away from")
    add(
        "--hires-upscaler",
        metavar="WHAT",
        help="what enlarges the first: latent, lanczos, or an ESRGAN's file or name",
    )

    add = parser.add_argument_group("what SDXL takes").add_argument
    add("--refiner", metavar="MODEL", help="a model that draws the last part, such as its refiner")
    add("--refiner-start", type=float, metavar="F", help="share of the way from which; 0.8")
    add("--no-negative", action="store_true", help="avoid nothing at all, not even an empty text")
    add("--original-size", metavar="WxH", help="of the picture that this is said to be cut from")
    add("--crop", metavar="X,Y", help="pixels said to be cut off at the left and at the top")
    add("--target-size", metavar="WxH", help="that the picture is said to have")
    add("--aesthetic-score", type=float, metavar="F", help="that the refiner is told; 6")
    add("--negative-aesthetic-score", type=float, metavar="F", help="of what is avoided; 2.5")

    add = parser.add_argument_group("from a picture").add_argument
    add("--image", metavar="IMAGE", help="start from this picture")
    add("--strength", type=float, metavar="F", help="how far to leave it, 0 to 1")
    add("--fit", choices=("stretch", "crop"), help="how it comes to the size that is drawn")
    add("--mask", metavar="IMAGE", help="redraw only where this is white")
    add("--mask-blur", type=float, metavar="PIXELS", help="soften the mask's edge")
    add(
        "--mask-content",
        choices=("original", "fill", "noise", "nothing"),
        help="what the drawing begins with inside the mask (default original)",
    )
    add(
        "--only-masked",
        type=int,
        metavar="PIXELS",
        help="draw the masked part alone, with so much around it, at full size; put it back",
    )
    add("--image-guidance", type=float, metavar="SCALE", help="how far an edit stays with --image")
    add("--depth-image", metavar="IMAGE", help="follow this depth map, for models that do")
    add("--from-image", metavar="IMAGE", help="draw again what is written in this picture")
    add("--latents", metavar="FILE", help="starting noise, .npy of (count, height/8, width/8, 4)")

    group = parser.add_argument_group(
        "steered by pictures", "Once for all --controlnet, or once for each in their order."
    )
    add = group.add_argument
    add("--control-image", action="append", metavar="IMAGE", help="what the network looks at")
    add(
        "--control-preprocess",
        action="append",
        choices=("none", "canny", "scribble", "invert"),
        help="what is made of it first: nothing, edges, white lines, or light for dark",
    )
    add("--control-weight", action="append", type=float, metavar="F", help="how strongly; 1")
    add("--control-start", action="append", type=float, metavar="F", help="share of the steps; 0")
    add("--control-end", action="append", type=float, metavar="F", help="likewise; 1")

    add = parser.add_argument_group(
        "prompted with pictures", "Once for all --ip-adapter, or once for each in their order."
    ).add_argument
    add(
        "--ip-image",
        action="append",
        metavar="IMAGE",
        help="a picture to look at beside the prompt; for one adapter several may be given",
    )
    add("--ip-scale", action="append", type=float, metavar="F", help="how strongly it counts; 1")
    add("--ip-start", action="append", type=float, metavar="F", help="share of the steps; 0")
    add("--ip-end", action="append", type=float, metavar="F", help="likewise; 1")

    add = parser.add_argument_group("output").add_argument
    fields = ", ".join(f"{{{name}}}" for name in _outputs.FIELDS)
    add(
        *("-o", "--output"),
        metavar="OUT",
        help="a .png, .jpg or .webp file, a folder, or a pattern with "
        f"{fields}; default {_outputs.PATTERN}",
    )
    add("--overwrite", action="store_true", help="replace files, instead of numbering new ones")
    add("--save-latents", metavar="FILE", help="write the final latents, as .npy")
    add("--prompts", metavar="FILE", help="draw each line: a prompt or a JSON object; - is stdin")
    add(
        "--preview",
        choices=("none", "linear", "taesd"),
        default="none",
        help="show the picture while it is drawn: in NAME.preview.png beside it, and in terminals "
        "that can show pictures",
    )
    add("--json", action="store_true", help="print one JSON object instead of file names")
    add("--progress", action="store_true", help="show progress where stderr is no terminal")
    add("--quiet", action="store_true", help="print nothing but results and errors")


@dataclass
class _Request:
    """One call of the pipeline.

    Attributes:
        prompt: what to draw.
        arguments: of ``StableDiffusion.generate``; pictures are still names of files.
        origin: the file that the arguments come from, for errors; "" for the command line.
    """

    prompt: str
    arguments: dict[str, Any]
    origin: str = ""


@dataclass
class _Session:
    """What a run has done so far.

    Attributes:
        files: the pictures that are written.
        settings: of each.
        timings: seconds: load, and the sums over all requests of what the pipeline times.
        steps: seconds per step of each request.
        notes: what a person should know.
    """

    files: list[str] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: "Result") -> None:
        """Count one result's time."""
        for part, seconds in result.timings.items():
            if part not in ("step", "total"):
                self.timings[part] = self.timings.get(part, 0.0) + seconds
        self.steps.append(result.timings["step"])

    def report(self) -> dict[str, object]:
        """The object that ``--json`` prints."""
        import mlx.core as mx

        mean = sum(self.steps) / len(self.steps) if self.steps else 0.0
        total = time.perf_counter() - self.started
        timings = {**self.timings, "seconds_per_step": mean, "total": total}
        return {
            "files": self.files,
            "settings": self.settings,
            "model": self.model,
            "timings": {name: round(value, 4) for name, value in timings.items()},
            "peak_memory": {"mlx": mx.get_peak_memory(), "resident": _machine.resident()},
            "notes": self.notes,
        }


def run(args: argparse.Namespace) -> int:
    """Draw."""
    from mlx_maple import images

    screen = Screen(quiet=args.quiet, forced=args.progress)
    session = _Session()
    if args.lora == [NO_LORA]:
        args.lora = []
    outputs = _outputs.parse_output(args.output, args.overwrite)
    written = None
    if args.from_image is not None:
        recipe = images.read_settings(args.from_image)
        written, missing = _drawable(recipe.settings, args)
        for note in [*recipe.notes, *missing]:
            _note(note, session, screen)
    requests = _requests(args, written)
    if args.save_latents is not None:
        if len(requests) > 1:
            raise Failure(USAGE, "--save-latents: there are several prompts; draw one at a time")
        if not args.save_latents.endswith(".npy"):
            raise Failure(USAGE, f"--save-latents {args.save_latents}: name it .npy")
        _outputs.check_writable(Path(args.save_latents).parent)
    for request in requests:
        _check(request)
        _open_pictures(request)
    try:
        sd = _load(args, written, session, screen)
        if args.refiner is not None:
            refiner = _load_refiner(args, sd, session, screen)
            for request in requests:
                request.arguments["refiner"] = refiner
        for number, request in enumerate(requests, 1):
            label = "drawing" if len(requests) == 1 else f"drawing {number}/{len(requests)}"
            result = _draw(sd, request, outputs, args, session, screen, label)
            if args.save_latents is not None:
                _save_latents(Path(args.save_latents), result.latents)
    except KeyboardInterrupt:
        finished = f"; {len(session.files)} finished before" if session.files else ""
        raise Failure(CANCELLED, f"cancelled{finished}", session.report()) from None
    except Exception as error:
        raise _with_report(error, session) from error
    finally:
        screen.clear()
    report = session.report()
    if args.json:
        print(json.dumps(report))
    else:
        screen.say(_summary(report))
    return DONE


# What to draw -----------------------------------------------------------------------------------


def _requests(args: argparse.Namespace, written: "Settings | None") -> list[_Request]:
    """The picture's own settings, then the flags, then each line of the file of prompts."""
    given = {
        SETTING_OF.get(name, name): value
        for name in OPTIONS
        if (value := getattr(args, name)) is not None
    }
    if args.no_negative:
        if args.negative is not None:
            raise Failure(USAGE, "--no-negative does not go with --negative")
        given["negative_prompt"] = None
    for name in ONE_FOR_ALL:
        if len(given.get(name, ())) == 1:  # one for all
            given[name] = given[name][0]
    _check(_Request("", given))
    if args.latents is not None:
        given = {**_latents(Path(args.latents), given), **given}
    if args.prompts is not None:
        if args.prompt is not None or written is not None:
            raise Failure(USAGE, "--prompts does not go with a PROMPT or --from-image")
        return _lines(args.prompts, given)
    if written is not None:
        prompt = written.prompt if args.prompt is None else args.prompt
        own = written.arguments()
        del own["prompt"]
        return [_Request(prompt, {**own, **given}, args.from_image)]
    if args.prompt is None:
        raise Failure(USAGE, "give a PROMPT, --prompts FILE or --from-image IMAGE")
    return [_Request(args.prompt, given)]


def _drawable(written: "Settings", args: argparse.Namespace) -> tuple["Settings", list[str]]:
    """A picture's settings less what they name and is not here, and notes on that.

    Raises:
        Failure: where a LoRA is not here, and no --lora stands for those of the picture.
    """
    from maple_convert.errors import one_line
    from mlx_maple import enlarge, model_folders
    from mlx_maple.adapters import read_choices
    from mlx_maple.text.language import without_tags

    where = f"which is not in ${model_folders.VARIABLE}"

    def is_missing(name: str) -> bool:
        return model_folders.find("lora", name) is None

    try:
        prompt, tags = without_tags(
            written.prompt, lambda tag: tag.kind == "lora" and is_missing(tag.name)
        )
        missing = [tag.name for tag in tags] if args.prompt is None else []
        if args.lora is None:
            named = [choice.name for choice in read_choices(written.loras or "")]
            missing = [name for name in named if is_missing(name)] + missing
    except ValueError:  # nothing that can be read: drawing will say so
        return written, []
    names = list(dict.fromkeys(one_line(name, 80) for name in missing))
    if names and args.lora is None:
        folders = ", ".join(str(folder) for folder in model_folders.folders("lora"))
        several = f", nor are {len(names) - 1} more" if names[1:] else ""
        raise Failure(
            FAULT,
            f"{args.from_image}: was drawn with the LoRA {names[0]}, {where} "
            f"({folders or 'which names no folder of LoRAs'}){several}: put it there, name its "
            f"file with --lora, or draw without by --lora {NO_LORA}",
        )
    notes = [f"was drawn with the LoRA {name}, {where}: left out" for name in names]
    upscaler = written.hires_upscaler
    if upscaler not in (None, *enlarge.BUILT_IN) and not Path(upscaler).is_file():
        if model_folders.find("upscaler", upscaler) is None:
            notes.append(f"was enlarged by {one_line(upscaler, 80)}, {where}: here by lanczos")
            upscaler = "lanczos"
    return replace(written, prompt=prompt, hires_upscaler=upscaler), notes


def _lines(path: str, given: Mapping[str, Any]) -> list[_Request]:
    """One request a line: a prompt, or a JSON object of settings that go over the flags."""
    name = "stdin" if path == "-" else path
    try:
        with nullcontext(sys.stdin) if path == "-" else open(path, encoding="utf-8-sig") as file:
            text = file.read(MOST_PROMPTS + 1)
    except UnicodeDecodeError:
        raise Failure(UNUSABLE, f"{name}: not a UTF-8 text of prompts") from None
    if len(text) > MOST_PROMPTS:
        raise Failure(UNUSABLE, f"{name}: more than {MOST_PROMPTS:,} characters of prompts")
    known = {"prompt", *(SETTING_OF.get(option, option) for option in OPTIONS)}
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line, origin = line.strip(), f"{name}, line {number}"
        if not line:
            continue
        if not line.startswith("{"):
            found.append(_Request(line, dict(given), origin))
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise Failure(UNUSABLE, f"{origin}: not a JSON object") from None
        if unknown := [key for key in values if key not in known]:
            listed = ", ".join(sorted(known))
            raise Failure(UNUSABLE, f"{origin}: no setting {unknown[0]!r}; there are {listed}")
        if not isinstance(values.get("prompt"), str):
            raise Failure(UNUSABLE, f"{origin}: no prompt")
        found.append(_Request(values.pop("prompt"), {**given, **values}, origin))
    if not found:
        raise Failure(UNUSABLE, f"{name}: no prompt in it")
    return found


def _check(request: _Request) -> None:
    """Refuse what no model could draw, before one is loaded."""
    from mlx_maple import metadata
    from mlx_maple.adapters import read_choices
    from mlx_maple.forms import read_form
    from mlx_maple.sampling import SAMPLERS, SCHEDULES, NoiseSchedule, make_plan
    from mlx_maple.sampling.noise import NOISE_SOURCES

    arguments = request.arguments
    try:
        read_form(arguments.get("tile"), arguments.get("freeu"))
        for name in set(metadata.LIMITS) - {"freeu"}:
            value = arguments.get(name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    metadata.check_number(name, one)
        words = (("sampler", SAMPLERS), ("schedule", SCHEDULES), ("noise", NOISE_SOURCES))
        for name, known in words:
            if (word := arguments.get(name)) is not None and word not in known:
                raise ValueError(f"unknown {name} {word!r}: choose from {', '.join(known)}")
        if (sampler := arguments.get("sampler")) is not None:
            usual = NoiseSchedule.from_betas()
            make_plan(usual, sampler, arguments.get("schedule"), eta=arguments.get("eta"))
        if arguments.get("loras") is not None:
            read_choices(arguments["loras"])
        if arguments.get("mask") is not None and arguments.get("image") is None:
            raise ValueError("--mask needs --image, the picture to redraw a part of.")
    except (TypeError, ValueError) as error:
        raise _refused(error, request) from None


def _refused(error: Exception, request: _Request) -> Failure:
    """A setting that cannot be drawn: the file's fault where a file said it."""
    line = str(error).rstrip(".")
    return (
        Failure(UNUSABLE, f"{request.origin}: {line}") if request.origin else Failure(USAGE, line)
    )


def _open_pictures(request: _Request) -> None:
    from mlx_maple import images

    for name in PICTURES:
        given = request.arguments.get(name)
        if given is not None:
            several = isinstance(given, list) and name in LISTED
            paths: list[Any] = list(given) if several else [given]
            if not all(isinstance(path, str) for path in paths):
                raise _refused(ValueError(f"{name} must be a file's name"), request)
            opened = [images.open_image(path) for path in paths]
            request.arguments[name] = opened if name in LISTED else opened[0]


def _latents(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Starting noise from a .npy file, and the count and size that go with it."""
    import numpy as np

    try:
        array = np.lib.format.open_memmap(path, mode="r")  # of no pickles, as long as it says
        if array.dtype.kind != "f" or array.ndim != 4 or not 1 <= len(array) <= 256:
            raise ValueError(
                f"{array.dtype} {array.shape}, not (count, height/8, width/8, 4) floats"
            )
    except (ValueError, EOFError) as error:
        text = " ".join(str(error).split())
        raise Failure(UNUSABLE, f"{path}: not a .npy file of starting noise ({text})") from None
    found: dict[str, Any] = {"latents": array, "count": len(array)}
    if "image" not in given:
        found |= {"height": 8 * array.shape[1], "width": 8 * array.shape[2]}
    return found


# Drawing ----------------------------------------------------------------------------------------


def _load_refiner(
    args: argparse.Namespace, sd: "StableDiffusion", session: _Session, screen: Screen
) -> "StableDiffusion":
    """The model that draws the last part, in the form that the first one is in."""
    from mlx_maple import loading

    def progress(done: int, total: int, label: str) -> None:
        screen.progress(label, done, total, f"{_terminal.size(done)} of {_terminal.size(total)}")

    started = time.perf_counter()
    refiner = loading.load(
        args.refiner,
        dtype=sd.info.components["unet"].dtype,
        quantize=args.quantize,
        low_memory=args.low_memory,
        cache=not args.no_cache,
        progress=progress,
    )
    session.timings["load"] += time.perf_counter() - started
    screen.clear()
    for note in refiner.info.notes:
        _note(note, session, screen)
    return refiner


def _load(
    args: argparse.Namespace, written: "Settings | None", session: _Session, screen: Screen
) -> "StableDiffusion":
    from mlx_maple import loading

    dtype = args.dtype
    if dtype is None and written is not None and loading.default_dtype() == "float16":
        dtype = written.dtype if written.dtype in loading.DTYPES else None

    loras = args.lora
    if loras is None and written is not None:
        loras = written.loras
    bits = args.quantize
    if bits is None and written is not None and written.bits in (4, 8):
        bits = written.bits

    def progress(done: int, total: int, label: str) -> None:
        screen.progress(label, done, total, f"{_terminal.size(done)} of {_terminal.size(total)}")

    started = time.perf_counter()
    screen.progress("loading", 0, 1)
    source, origin = (args.model, "") if args.model else _default_model.chosen()

    def load(bits: int | None) -> "StableDiffusion":
        return loading.load(
            source,
            dtype=dtype,
            quantize=bits,
            low_memory=args.low_memory,
            max_memory=args.max_memory,
            unet=args.unet,
            vae=args.vae,
            taesd=args.taesd,
            controlnet=args.controlnet,
            ip_adapter=args.ip_adapter,
            ip_encoder=args.ip_encoder,
            loras=loras or (),
            embeddings=args.embedding or (),
            variant=args.variant,
            ema=args.ema,
            prediction=args.prediction,
            cache=not args.no_cache,
            progress=progress,
        )

    try:
        try:
            sd = load(bits)
        except loading.UnsupportedCheckpoint:
            if bits == args.quantize:
                raise
            sd = load(None)  # stored in other bits than the picture's: a note will say so
    except loading.NoModel as error:
        if source is None or not origin:
            raise
        raise Failure(error.exit_code, f"{error} (the default model, from {origin})") from None
    session.timings["load"] = time.perf_counter() - started
    screen.clear()
    info = sd.info
    session.model = {
        "name": info.name,
        "sha256": info.sha256,
        "family": info.family,
        "prediction": info.prediction,
        "parameters": info.parameters,
        "bytes": info.bytes,
        "dtype": info.components["unet"].dtype,
        "bits": info.components["unet"].bits,
        "low_memory": args.low_memory,
        "notes": list(info.notes),
    }
    for note in info.notes:
        _note(note, session, screen)
    if written is not None:
        for note in _differences(written, sd, args):
            _note(note, session, screen)
    return sd


def _differences(written: "Settings", sd: "StableDiffusion", args: argparse.Namespace) -> list[str]:
    """Why a picture that is drawn again will not be the same."""
    notes = []
    own = sd.info.sha256[:10]
    if written.model_hash and own:
        is_other = not own.startswith(written.model_hash[:10])
    else:
        is_other = bool(written.model) and written.model != sd.info.name
    if is_other:
        theirs = f"{written.model} {written.model_hash}".strip()
        notes.append(
            f"was drawn with the model {theirs}, and this is {sd.info.name} {own}".rstrip()
        )
    if written.unet and args.unet is None:
        notes.append(f"was drawn with the UNet {written.unet}: name it with --unet")
    if written.vae and args.vae is None:
        notes.append(f"was drawn with the autoencoder {written.vae}: name it with --vae")
    bits = sd.info.components["unet"].bits
    if written.bits != bits and (written.bits or written.version.startswith("mlx-maple")):
        theirs, ours = (f"{n} bits" if n else "whole weights" for n in (written.bits, bits))
        notes.append(f"was drawn with {theirs}, and this has {ours}: another picture")
    dtype = sd.info.components["unet"].dtype
    if written.dtype and written.dtype != dtype:
        notes.append(f"was drawn in {written.dtype}, and this is {dtype}: small differences")
    return notes


def _draw(
    sd: "StableDiffusion",
    request: _Request,
    outputs: Outputs,
    args: argparse.Namespace,
    session: _Session,
    screen: Screen,
    label: str,
) -> "Result":
    """Draw one request and write its pictures."""
    preview = None if args.preview == "none" else args.preview
    try:
        drawing = sd.generate(request.prompt, **request.arguments, preview=preview)
    except (TypeError, ValueError) as error:
        if hasattr(error, "exit_code"):
            raise
        raise _refused(error, request) from None
    asked = {**request.arguments, "preview": preview}
    _memory.check(sd, asked)
    previews = _Previews(outputs, sd, request, screen) if preview else None
    result = None
    try:
        for progress in drawing:
            _show(progress, label, screen)
            if previews is not None and progress.stage == "sample":
                previews.show(progress)
            result = progress.result
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _memory.refused(sd, asked, error) from error
        raise
    finally:
        drawing.close()
        if previews is not None:
            previews.remove()
    assert result is not None
    screen.clear()
    for note in result.notes:
        _note(note, session, screen)
    session.add(result)
    for image, settings in zip(result.images, result.settings, strict=True):
        path = _write(image, settings, outputs, len(session.files) + 1)
        session.files.append(str(path))
        session.settings.append(_said(settings))
        if not args.json:
            print(path, flush=True)
    return result


def _show(progress: "Progress", label: str, screen: Screen) -> None:
    done, total, pace = progress.index, progress.total, progress.seconds_per_step
    if progress.stage == "sample":
        left = _terminal.seconds((total - done) * pace)
        detail = f"{done}/{total}  {_terminal.seconds(pace)}/step  {left} left"
        screen.progress(label, done, total, detail)
    elif progress.stage in ("text", "encode"):
        screen.progress(label, done, total, "reading the prompt" if done == 0 else "")
    elif progress.stage == "decode":
        screen.progress(f"{label}, decoding", total, total, f"{_terminal.seconds(pace)}/step")


class _Previews:
    """The picture as far as it is drawn, beside the place where it will be, and in the terminal."""

    def __init__(
        self, outputs: Outputs, sd: "StableDiffusion", request: _Request, screen: Screen
    ) -> None:
        fields = {**dict.fromkeys(_outputs.FIELDS, "preview"), "prompt": request.prompt}
        fields |= {name: value for name, value in request.arguments.items() if name in fields}
        wanted = outputs.path({**fields, "model": sd.info.name, **_moment()})
        self.path = wanted.with_name(f"{wanted.stem}.preview.png")
        number = 0
        while self.path.exists():  # someone's own, or another run's
            number += 1
            self.path = wanted.with_name(f"{wanted.stem}.preview-{number}.png")
        self.screen = screen
        self._next = 0.0

    def show(self, progress: "Progress") -> None:
        """Write and show one preview, unless the last one is quite new."""
        from mlx_maple import images

        now = time.monotonic()
        if now < self._next or (image := progress.preview()) is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        images.save_image(image, self.path)
        self.screen.picture(_png(image))
        self._next = time.monotonic() + PREVIEW_SECONDS

    def remove(self) -> None:
        """Take the file away: the picture is there, or will never be."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Writing ----------------------------------------------------------------------------------------


def _write(image: "Image.Image", settings: "Settings", outputs: Outputs, index: int) -> Path:
    from mlx_maple import images

    fields = {
        "prompt": settings.prompt,
        "seed": settings.seed,
        "index": index,
        "model": settings.model,
        "sampler": settings.sampler,
        "schedule": settings.schedule,
        "steps": settings.steps,
        "guidance": settings.guidance_scale,
        "width": settings.width,
        "height": settings.height,
        **_moment(),
    }
    return outputs.write(fields, lambda path: images.save_image(image, path, settings))


def _moment() -> dict[str, str]:
    return {"date": time.strftime("%Y-%m-%d"), "time": time.strftime("%H%M%S")}


def _save_latents(path: Path, latents: "np.ndarray") -> None:
    import numpy as np

    with _outputs.whole_file(path) as hidden:
        np.save(hidden, latents)


def _said(settings: "Settings") -> dict[str, Any]:
    """Settings as JSON, less what was not said."""
    return {name: value for name, value in asdict(settings).items() if value not in (None, "")}


def _note(text: str, session: _Session, screen: Screen) -> None:
    session.notes.append(text)
    screen.say(f"note: {text}")


def _summary(report: Mapping[str, Any]) -> str:
    timings, count = report["timings"], len(report["files"])
    what = "1 picture" if count == 1 else f"{count} pictures"
    memory = _terminal.size(report["peak_memory"]["resident"])
    return (
        f"{what} in {_terminal.seconds(timings['total'])}: load "
        f"{_terminal.seconds(timings['load'])}, "
        f"{_terminal.seconds(timings['seconds_per_step'])}/step, decode "
        f"{_terminal.seconds(timings['decode'])}; {memory} of memory"
    )


def _with_report(error: Exception, session: _Session) -> Exception:
    """The same end, carrying what was finished before it."""
    from mlx_maple.cli import describe

    code, line = describe(error)
    return Failure(code, line, session.report())
