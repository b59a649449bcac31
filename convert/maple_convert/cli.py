"""The command ``maple-convert``, and the same verbs for ``maple convert`` and ``maple inspect``.

    maple-convert IN OUT [--to maple|compvis|diffusers] [--dtype D] [--ema] …
    maple-convert inspect FILE [--keys] [--json]

Results on stdout, progress on stderr. Exit 0 done, 1 input or output, 2 wrong usage, 3 the file
cannot be used, 130 cancelled; every error is one line.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from maple_convert.errors import ConvertError, one_line
from maple_convert.layouts.diffusers_config import UNKNOWN
from maple_convert.quantized import Quantizer

FAULT, USAGE, NO_MEMORY, CANCELLED = 1, 2, 4, 130
EPILOG = """exit codes: 0 done, 1 input or output, 2 wrong usage, 3 the file cannot be used,
4 out of memory, 130 cancelled"""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{message} (see {self.prog} --help)")


class _Usage(Exception):
    """The arguments do not make sense; one line."""


# ---------------------------------------------------------------------------------------------
# Verbs


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of converting."""
    parser.add_argument("source", metavar="IN", help="checkpoint file or model folder")
    parser.add_argument(
        "out", metavar="OUT", help="folder to make; a .safetensors file for --to compvis"
    )
    parser.add_argument(
        "--to",
        choices=("maple", "compvis", "diffusers"),
        default="maple",
        help="layout to write (default: maple)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type to write (default: as stored)",
    )
    parser.add_argument("--ema", action="store_true", help="take the EMA copy of the UNet")
    parser.add_argument("--variant", help="which files of a diffusers folder, such as fp16")
    parser.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts, where the file does not say",
    )
    parser.add_argument(
        "--config",
        metavar="JSON",
        type=Path,
        help="file with settings that tensors cannot say (docs/format.md, Overrides)",
    )
    parser.add_argument(
        "--no-digest", action="store_true", help="leave out the sha256 of the source"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no notes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_convert(
    args: argparse.Namespace,
    *,
    tokenizer: Mapping[str, Path] | None = None,
    quantizer: Quantizer | None = None,
) -> int:
    """Convert and say what was written.

    Args:
        args: of ``add_convert_arguments``.
        tokenizer: "vocab" and "merges" files for a diffusers folder whose source brings none.
        quantizer: of a maple folder's weights.
    """
    from maple_convert.conversion import convert
    from maple_convert.readers import read_json

    config: dict[str, Any] = {} if args.config is None else dict(read_json(args.config))
    if args.prediction is not None:
        config["prediction"] = args.prediction
    bar = _Bar(sys.stderr.isatty() and not args.quiet)
    try:
        report = convert(
            args.source,
            args.out,
            to=args.to,
            dtype=args.dtype,
            ema=args.ema,
            variant=args.variant,
            config=config or None,
            tokenizer=tokenizer,
            progress=bar.draw,
            digest=not args.no_digest,
            quantizer=quantizer,
        )
    finally:
        bar.clear()
    if args.json:
        print(
            json.dumps(
                {
                    "path": str(report.path),
                    "layout": report.layout,
                    "bytes": report.bytes,
                    "components": report.components,
                    "dtype": report.dtype,
                    "bits": report.bits,
                    "seconds": round(report.seconds, 3),
                    "notes": report.notes,
                }
            )
        )
        return 0
    if not args.quiet:
        for note in report.notes:
            print(f"note: {one_line(note)}", file=sys.stderr)
    quantised = "" if report.bits is None else f" and {report.bits} bits"
    print(
        f"{one_line(str(report.path))}: {report.layout} layout, {', '.join(report.components)}, "
        f"{_size(report.bytes)} of {report.dtype}{quantised}, in {report.seconds:.1f} s"
    )
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of inspecting."""
    parser.add_argument("file", metavar="FILE", help="checkpoint file or model folder")
    parser.add_argument("--variant", help="which files of a diffusers folder, such as fp16")
    parser.add_argument("--keys", action="store_true", help="list every parameter, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a file or folder holds."""
    from maple_convert.model import inspect

    found = inspect(args.file, variant=args.variant, keys=args.keys)
    print(json.dumps(found) if args.json else "\n".join(describe(found)))
    return 0


def describe(found: Mapping[str, Any]) -> list[str]:
    """What ``inspect`` found, as lines for a person."""
    ema = "yes, --ema uses it" if found["ema"] else "no"
    lines = [
        one_line(found["path"]),
        f"  container    {found['container']}",
        f"  family       {found['title']} ({found['family']})",
        f"  layout       {found['layout']}",
        f"  prediction   {_prediction(found['prediction'])}",
    ]
    if found["in_channels"] is not None:
        lines.append(f"  in channels  {found['in_channels']}")
    lines.append(f"  EMA copy     {ema}")
    lines.append(f"  schedule     {_schedule(found)}")
    lines.append(f"  drawn at     {found['defaults']['width']}x{found['defaults']['height']}")
    lines.append(f"  size         {_count(found['parameters'])}, {_size(found['bytes'])}")
    lines += ["", "components"]
    for name, part in found["components"].items():
        types = ", ".join(
            dtype if len(part["dtypes"]) == 1 else f"{dtype} {_count(n)}"
            for dtype, n in part["dtypes"].items()
        )
        lines.append(
            f"  {name:<14} {_count(part['parameters'])} in {part['tensors']} tensors, "
            f"{_size(part['bytes'])}, {types}"
        )
        lines.append(f"  {'':<14} {_settings(part['config'])}")
    lines += ["", "evidence", *(f"  {one_line(line)}" for line in found["evidence"])]
    if found["dropped"]:
        lines += ["", "left out"]
        lines += [
            f"  {n} {'key' if n == 1 else 'keys'}: {reason}"
            for reason, n in found["dropped"].items()
        ]
    if found["notes"]:
        lines += ["", "notes", *(f"  {one_line(note)}" for note in found["notes"])]
    for name, keys in found.get("keys", {}).items():
        lines += ["", f"{name}: name here, type, shape, name in the file"]
        lines += [
            f"  {one_line(key)}  {key_['dtype']}  {key_['shape']}  {one_line(key_['key'], 300)}"
            for key, key_ in keys.items()
        ]
    return lines


def _prediction(found: str) -> str:
    return found if found != UNKNOWN else "not said: `maple generate` looks at what the UNet does"


def _schedule(found: Mapping[str, Any]) -> str:
    s = found["scheduler"]
    stored = ", stored in the file" if found["stored_schedule"] else ""
    zero = ", zero terminal SNR" if s["rescale_zero_terminal_snr"] else ""
    betas = f"{s['beta_start']:g} to {s['beta_end']:g}"
    return f"{s['beta_schedule']} {betas}, {s['num_train_timesteps']} steps{zero}{stored}"


def _settings(config: Mapping[str, Any]) -> str:
    shown: list[str] = []
    for key, value in config.items():
        if value is not None:
            text = "x".join(map(str, value)) if isinstance(value, list) else f"{value}"  # pyright: ignore[reportUnknownArgumentType]
            shown.append(f"{key} {text}")
    return ", ".join(shown)


def _count(n: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit} parameters"
    return f"{n} parameters"


def _size(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} bytes"


class _Bar:
    """A progress bar on stderr with its rate; silent where nobody looks."""

    WIDTH = 24
    REDRAW_SECONDS = 0.1

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._started = time.monotonic()
        self._next = 0.0

    def draw(self, done: int, total: int, label: str) -> None:
        """Draw how much of ``total`` bytes is written."""
        now = time.monotonic()
        if not self._shown or (now < self._next and done < total):
            return
        self._next = now + self.REDRAW_SECONDS
        share = done / total if total else 1.0
        bar = "#" * round(share * self.WIDTH)
        rate = done / max(now - self._started, 1e-3)
        text = f"{label:<28.28} {bar:-<{self.WIDTH}} {share:4.0%}  {_size(rate)}/s"
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# The command of its own


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``maple-convert`` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        before = signal.signal(signal.SIGTERM, _interrupt)
    except ValueError:  # not the main thread: signals are not ours to handle
        before = None
    try:
        args = _parse(arguments)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # --help
        return end.code if isinstance(end.code, int) else USAGE
    except BrokenPipeError:  # whoever read stdout has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except (Exception, KeyboardInterrupt) as error:
        code, line = _described(error)
        if "--debug" in arguments:
            traceback.print_exception(error)
        if "--json" in arguments:
            print(json.dumps({"error": line, "exit_code": code}))
        print(f"maple-convert: {line}", file=sys.stderr)
        return code
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    inspecting = arguments[:1] == ["inspect"]
    parser = _Parser(
        prog="maple-convert inspect" if inspecting else "maple-convert",
        description=(
            "Say what a checkpoint holds."
            if inspecting
            else "Convert a checkpoint into another layout, without torch. "
            "`maple-convert inspect FILE` says what a checkpoint holds."
        ),
        epilog=EPILOG,
        allow_abbrev=False,
    )
    (add_inspect_arguments if inspecting else add_convert_arguments)(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments[1:] if inspecting else arguments)
    args.run = run_inspect if inspecting else run_convert
    return args


def _described(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error."""
    if isinstance(error, ConvertError):
        return error.exit_code, one_line(str(error), 1000)
    if isinstance(error, _Usage):
        return USAGE, one_line(str(error), 1000)
    if isinstance(error, KeyboardInterrupt):
        return CANCELLED, "cancelled"
    if isinstance(error, MemoryError):
        return NO_MEMORY, "out of memory: close other programs, or convert on a larger machine"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return FAULT, one_line(f"{place}{error.strerror}")
    if (code := getattr(error, "exit_code", None)) is not None:
        return int(code), one_line(str(error), 1000)
    name = type(error).__name__
    return FAULT, one_line(f"unexpected {name}: {error} (a fault here; --debug shows where)")


if __name__ == "__main__":
    sys.exit(main())
