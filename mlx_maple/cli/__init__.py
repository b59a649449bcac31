"""The command `maple`: one file a verb, and the one place where errors become exit codes.

Nothing heavy is imported before a verb runs: `maple --help` answers without MLX.
"""

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

from mlx_maple import __version__

VERBS = {  # the file of the same name in this folder holds add_arguments(parser) and run(args)
    "generate": "draw pictures from a prompt",
    "upscale": "enlarge a picture with a network of ESRGAN's kind",
    "convert": "convert a checkpoint into another layout",
    "inspect": "say what a checkpoint holds",
    "models": "list, fetch and clear models, and choose the default one",
    "serve": "draw from a browser, and from programs over HTTP",
    "bench": "measure this machine, and what others take on it",
    "doctor": "say what this machine offers, and what is slow and why",
    "completion": "print the completion script of a shell",
}

DONE, FAULT, USAGE, UNUSABLE, NO_MEMORY, CANCELLED = 0, 1, 2, 3, 4, 130

EPILOG = """exit codes: 0 done, 1 input, output or network, 2 wrong usage, 3 the file cannot be
used, 4 out of memory, 130 cancelled"""


class Failure(Exception):
    """An end that is no bug: one line for the person, one exit code for the shell.

    Attributes:
        report: what was finished before, for ``--json``.
    """

    def __init__(self, exit_code: int, message: str, report: dict[str, object] | None = None):
        self.exit_code = exit_code
        self.report = report or {}
        super().__init__(message)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        raise Failure(USAGE, f"{message} (see {self.prog} --help)")


def build_parser(verbs: Iterable[str]) -> Parser:
    """The parser of the command; only ``verbs`` get their options, which imports their files."""
    parser = Parser(
        prog="maple",
        description="Stable Diffusion on MLX: any checkpoint file in, pictures out.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"maple {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verb = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=EPILOG,
            allow_abbrev=False,
        )
        if name in verbs:
            module = import_module(f"{__name__}.{name}")
            module.add_arguments(verb)
            verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
            verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors end as one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), "")
    with _terminate_as_interrupt():
        try:
            args = build_parser([verb]).parse_args(arguments)
            code = args.run(args)
            sys.stdout.flush()
            return code
        except SystemExit as end:  # --help and --version
            return end.code if isinstance(end.code, int) else USAGE
        except BaseException as error:
            return _fail(error, arguments)


def _fail(error: BaseException, arguments: Sequence[str]) -> int:
    if isinstance(error, BrokenPipeError):  # whoever read stdout has left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    code, line = describe(error)
    if "--debug" in arguments:
        traceback.print_exception(error)
    print(f"maple: {line}", file=sys.stderr)
    if "--json" in arguments:
        report = error.report if isinstance(error, Failure) else {}
        print(json.dumps({**report, "error": line, "exit_code": code}))
    return code


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error."""
    from maple_convert.errors import one_line

    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code, one_line(str(error), 2000)
    if isinstance(error, KeyboardInterrupt):
        return CANCELLED, "cancelled"
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return NO_MEMORY, one_line(f"out of memory ({error or 'no more to be had'})")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return FAULT, one_line(f"{place}{error.strerror}")
    if isinstance(error, RuntimeError) and "[read]" in str(error):  # MLX reads weights when used
        return FAULT, "a file of the model could not be read to its end: did it change meanwhile?"
    name = type(error).__name__
    return FAULT, one_line(f"unexpected {name}: {error} (a fault in maple; --debug shows where)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX ended because an allocation failed; it has no error class of its own for that."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    words = ("unable to allocate", "attempting to allocate", "out of memory", "outofmemory")
    return any(word in text for word in words)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are not ours to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
