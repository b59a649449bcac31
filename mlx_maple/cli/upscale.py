"""`maple upscale`: a picture enlarged by a network of ESRGAN's kind."""

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path

from mlx_maple.cli import CANCELLED, DONE, USAGE, Failure, _outputs, _terminal
from mlx_maple.cli._terminal import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("image", metavar="IN", help="the picture to enlarge")
    parser.add_argument("output", metavar="OUT", help="the .png, .jpg or .webp file to write")
    parser.add_argument(
        *("-m", "--model"),
        required=True,
        metavar="MODEL",
        help="an ESRGAN: a .pth or .safetensors file, or a name in $MAPLE_MODELS",
    )
    parser.add_argument("--side", type=int, metavar="PIXELS", help="of the pieces it works in")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="print nothing but results and errors")


def run(args: argparse.Namespace) -> int:
    """Enlarge one picture; its settings, where it carries some, go along."""
    out = Path(args.output)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise Failure(USAGE, f"{out}: name it .png, .jpg or .webp")
    if args.side is not None and not 16 <= args.side <= 4096:
        raise Failure(USAGE, f"--side must be from 16 to 4096, got {args.side}")
    if out.exists() and not args.overwrite:
        raise Failure(USAGE, f"{out}: is there already; --overwrite replaces it")
    _outputs.check_writable(out.parent)

    from mlx_maple import images, upscalers

    image = images.open_image(args.image)
    settings = None
    with suppress(images.ImageError):  # without settings, or with some that are not ours to judge
        settings = images.read_settings(args.image).settings
    screen = Screen(quiet=args.quiet, forced=False)
    started = time.perf_counter()
    upscaler = upscalers.open_named(args.model)

    def progress(done: int, total: int) -> None:
        screen.progress("enlarging", done, total, f"{done}/{total}")

    try:
        made = upscaler(image, progress, args.side)
    except ValueError as error:
        raise Failure(USAGE, f"{args.image}: {error}") from None
    except KeyboardInterrupt:
        raise Failure(CANCELLED, "cancelled") from None
    finally:
        screen.clear()
    images.save_image(made, out, settings)
    seconds = time.perf_counter() - started
    if args.json:
        report = {"file": str(out), "model": upscaler.name, "scale": upscaler.scale}
        size = {"width": made.width, "height": made.height}
        print(json.dumps({**report, **size, "seconds": round(seconds, 3)}))
    else:
        print(out)
        size = f"{image.width}x{image.height} to {made.width}x{made.height}"
        screen.say(f"{size} in {_terminal.seconds(seconds)}")
    return DONE
