"""Where pictures go: a file, a folder or a name pattern; nothing is overwritten unless asked.

A picture is written beside its place under a hidden name and then linked to its own: it is there
whole or not at all, and two runs at once cannot take the same name.
"""

import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_maple.cli import FAULT, USAGE, Failure

PATTERN = "{prompt}-{seed}.png"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
FIELDS = {
    "prompt": "the prompt's first words",
    "seed": "the picture's seed",
    "index": "the picture's number in this run, from 1; {index:4} pads it with zeros",
    "model": "the model's name",
    "sampler": "the sampler",
    "schedule": "the schedule",
    "steps": "the number of steps",
    "guidance": "the guidance scale",
    "width": "the width in pixels",
    "height": "the height in pixels",
    "date": "the day, 2031-05-07",
    "time": "the time, 142501",
}

_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2}))?\}")


@dataclass(frozen=True)
class Outputs:
    """The place for the pictures of a run.

    Attributes:
        pattern: a path with fields in braces, ending as a picture file does.
        overwrite: replace files that are there.
    """

    pattern: str
    overwrite: bool = False

    def path(self, fields: Mapping[str, object]) -> Path:
        """The pattern filled in, not looking at what is there."""

        def fill(match: re.Match[str]) -> str:
            value = fields[match[1]]
            if match[2] is not None:
                return str(value).zfill(int(match[2]))
            if isinstance(value, str):
                return slug(value)
            return f"{value:g}" if isinstance(value, float) else str(value)

        return Path(_FIELD.sub(fill, self.pattern))

    def write(self, fields: Mapping[str, object], save: Callable[[Path], object]) -> Path:
        """Let ``save`` write one picture, under the first free name; returns that name."""
        wanted = self.path(fields)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            save(wanted)
            return wanted
        hidden = wanted.with_name(f".{secrets.token_hex(8)}{wanted.suffix}")
        try:
            save(hidden)
            return next(path for path in _names(wanted) if _took(hidden, path))
        finally:
            hidden.unlink(missing_ok=True)


def parse_output(text: str | None, overwrite: bool) -> Outputs:
    """The outputs that ``-o`` names: nothing, a file, a folder (made when needed) or a pattern.

    Raises:
        Failure: for an unknown field or ending, and when nothing can be written there. It is said
            before anything is loaded: minutes of work should not end in a full stop.
    """
    if text is None:
        pattern = PATTERN
    elif text.endswith(("/", os.sep)) or Path(text).is_dir() or not _ending(text):
        pattern = os.path.join(text, PATTERN)
    else:
        pattern = text
    if _ending(pattern).lower() not in ENDINGS:
        known = ", ".join(ENDINGS)
        raise Failure(USAGE, f"-o {text}: pictures are written as {known}, not {_ending(pattern)}")
    for name, _ in _FIELD.findall(pattern):
        if name not in FIELDS:
            raise Failure(USAGE, f"-o {text}: no field {{{name}}}; there are {', '.join(FIELDS)}")
    check_writable(Path(pattern.partition("{")[0] + "x").parent)
    return Outputs(pattern, overwrite)


def check_writable(folder: Path) -> None:
    """Raise where nothing could be written into ``folder``, which need not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise Failure(FAULT, f"{place}: not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise Failure(FAULT, f"{place}: no permission to write there")


def slug(text: str, length: int = 48) -> str:
    """``text`` as a part of a file name: letters and digits of any language, joined by hyphens."""
    plain = unicodedata.normalize("NFC", text[: 8 * length]).lower()
    words = "".join(c if c.isalnum() or c == "_" else " " for c in plain).split()
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:length]
        if len(longer) > length or len(longer.encode()) > 3 * length:
            break
        name = longer
    return name or "untitled"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path`` to write to; it becomes ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        yield hidden
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def _ending(text: str) -> str:
    return Path(_FIELD.sub("x", text)).suffix


def _names(wanted: Path) -> Iterator[Path]:
    yield wanted
    number = 2
    while True:
        yield wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        number += 1


def _took(hidden: Path, path: Path) -> bool:
    """Give the file at ``hidden`` the name ``path``, unless that is taken."""
    try:
        os.link(hidden, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links, such as exFAT: nearly as good
        if path.exists():
            return False
        os.rename(hidden, path)
    return True
