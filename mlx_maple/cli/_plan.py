"""What a drawing will take in memory, as `maple doctor --plan` and the errors tell it."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_maple.cli import DONE, USAGE, Failure, _default_model, _machine, _terminal

if TYPE_CHECKING:
    from mlx_maple.engine.memory import Plan, Request
    from mlx_maple.pipeline import StableDiffusion

LARGEST = 8192  # pixels a side
NAMES = {
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "ip_adapter": "IP-Adapter",
    "unet": "UNet",
    "vae_encoder": "autoencoder's encoder",
    "vae_decoder": "autoencoder's decoder",
    "taesd": "TAESD's decoder",
    "controlnet": "ControlNet",
}
PHASES = {
    "text": "reading the prompt",
    "look": "looking at pictures",
    "encode": "encoding the image",
    "control": "reading what steers",
    "step": "a step",
    "preview": "a preview",
    "decode": "decoding",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; the model, its size and --json are the verb's own."""
    add = parser.add_argument_group("of --plan").add_argument
    add("--plan", action="store_true", help="say what a drawing will take in memory")
    add("--count", type=int, default=1, metavar="N", help="pictures at once")
    add("--image", action="store_true", help="from a picture")
    add("--ip-adapter", action="append", metavar="MODEL", help="prompted with a picture by this")
    add("--controlnet", action="append", metavar="MODEL", help="steered by this; again for several")
    add("--taesd", metavar="MODEL", help="with previews by this one")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of weights and activations")
    add("--quantize", type=int, choices=(8, 4), help="bits to keep the weights in")
    add("--low-memory", action="store_true", help="one network at a time")


def run(args: argparse.Namespace) -> int:
    """Print the plan of the model that would draw."""
    from mlx_maple import loading
    from mlx_maple.engine.memory import Plan

    if args.count < 1:
        raise Failure(USAGE, f"--count must be at least 1, got {args.count}")
    # In low-memory mode loading reads what the networks are made of, and no weights.
    sd = loading.load(
        args.model or _default_model.chosen()[0],
        dtype=args.dtype,
        quantize=args.quantize,
        low_memory=True,
        ip_adapter=args.ip_adapter,
        controlnet=args.controlnet,
        taesd=args.taesd,
        cache=False,
        local_files_only=True,
    )
    request = request_of(sd, vars(args), low_memory=args.low_memory)
    request = replace(
        request,
        from_picture=args.image,
        looks=bool(args.ip_adapter),
        steered=args.controlnet is not None,
        previewed=args.taesd is not None,
    )
    check_size(request.width, request.height)
    plan, free = Plan(request), _machine.device_memory()
    if args.json:
        print(json.dumps({"model": sd.info.name, **as_json(plan), "memory": free}))
        return DONE
    print("\n".join(table(plan, sd.info.name, free)))
    return DONE


def check_size(width: int, height: int) -> None:
    """Raise unless a picture can have this size, in pixels.

    Raises:
        Failure: for wrong usage.
    """
    for side in (width, height):
        if side % 8 or not 8 <= side <= LARGEST:
            raise Failure(USAGE, f"a size must be a multiple of 8 up to {LARGEST}, got {side}")


def request_of(
    sd: "StableDiffusion", arguments: Mapping[str, Any], *, low_memory: bool
) -> "Request":
    """A drawing's request: the arguments of ``generate``, as far as they are said."""
    import mlx.core as mx

    from mlx_maple.engine.attention import running_backend
    from mlx_maple.engine.memory import Request
    from mlx_maple.enlarge import larger

    def value(name: str) -> Any:
        said = arguments.get(name)
        return sd.defaults[name] if said is None else said

    size, scale = (value("width"), value("height")), arguments.get("hires_scale")
    width, height = size if scale is None else larger(size, scale, sd.configs["vae"].downscale)
    unet = sd.info.components["unet"]
    return Request(
        configs=sd.configs,
        width=width,
        height=height,
        count=1 if arguments.get("count") is None else arguments["count"],
        guided=value("guidance_scale") != 1,
        from_picture=bool(arguments.get("image") is not None),
        looks=bool(arguments.get("ip_image") is not None),
        steered=arguments.get("control_image") is not None,
        previewed=arguments.get("preview") == "taesd",
        dtype=getattr(mx, unet.dtype),
        bits=unet.bits,
        low_memory=low_memory,
        backend=running_backend(),
        max_memory=sd.max_memory,
    )


def table(plan: "Plan", name: str, free: int | None) -> list[str]:
    """The plan for a person."""
    request = plan.request
    how = [f"{request.width}x{request.height}", str(request.dtype).rpartition(".")[2]]
    how += [f"{request.count} at once"] if request.count > 1 else []
    how += [f"{request.bits} bits"] if request.bits else []
    how += ["low-memory"] if request.low_memory else []
    lines = [f"{name}, {', '.join(how)}, on {request.backend}", ""]
    size = _terminal.size
    for part, nbytes in plan.components.items():
        if part != "vae_encoder" or request.from_picture:
            lines.append(f"  {_named(part):<24} {size(nbytes):>9}")
    lines += ["", f"  {'':<24} {'weights':>9} {'beside':>9} {'in all':>9}"]
    for phase in plan.phases:
        columns = (phase.weights, phase.working, phase.total)
        lines.append(f"  {PHASES[phase.name]:<24} " + " ".join(f"{size(n):>9}" for n in columns))
    of = "" if free is None else f", of {size(free)} that this device has"
    lines += ["", f"  at most {size(plan.peak)}{of}"]
    lines += [f"  with {words}: {size(peak)}" for words, peak in less(plan)]
    return lines


def less(plan: "Plan") -> list[tuple[str, int]]:
    """What would take less: options to add, and what it takes with them."""
    from mlx_maple.engine.memory import Plan

    request, found = plan.request, []
    if not request.low_memory:
        found.append(("--low-memory", replace(request, low_memory=True)))
    if request.bits is None:
        words = "--low-memory --quantize 4"
        found.append((words, replace(request, low_memory=True, bits=4)))
    peaks = [(words, Plan(other).peak) for words, other in found]
    return [(words, peak) for words, peak in peaks if peak < plan.peak]


def as_json(plan: "Plan") -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes."""
    request = plan.request
    return {
        "width": request.width,
        "height": request.height,
        "count": request.count,
        "dtype": str(request.dtype).rpartition(".")[2],
        "bits": request.bits,
        "low_memory": request.low_memory,
        "backend": request.backend,
        "components": plan.components,
        "phases": [
            {"name": p.name, "weights": p.weights, "working": p.working} for p in plan.phases
        ],
        "peak": plan.peak,
        "less": [{"options": words, "peak": peak} for words, peak in less(plan)],
    }


def _named(part: str) -> str:
    """A network's name for people; the second of a kind keeps its number."""
    kind, _, number = part.rpartition("_")
    return f"{NAMES[kind]} {number}" if part not in NAMES and kind in NAMES else NAMES[part]


def in_words(plan: "Plan") -> str:
    """What each part takes, in one clause."""
    size = _terminal.size
    beside = ", ".join(f"{PHASES[p.name]} {size(p.working)}" for p in plan.phases)
    weights = weights_in_words(plan)
    return f"weights: {weights}; beside them: {beside}; {size(plan.peak)} at most"


def weights_in_words(plan: "Plan") -> str:
    """The size of each network, in one clause."""
    return ", ".join(
        f"{_named(part)} {_terminal.size(nbytes)}"
        for part, nbytes in plan.components.items()
        if part != "vae_encoder" or plan.request.from_picture
    )
