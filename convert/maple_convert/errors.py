"""The errors of the converter: few classes, with the facts as attributes.

Every message is one line that names the file and the reason; the command line prints it as it is
and exits with ``exit_code``.
"""

from collections.abc import Sequence
from pathlib import Path


class ConvertError(Exception):
    """Something about a file, said in one line.

    Attributes:
        path: the file or folder the error is about.
        reason: what is wrong with it, without the path.
    """

    exit_code = 3

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = one_line(reason)
        super().__init__(f"{one_line(str(path))}: {self.reason}")


class UnreadableFile(ConvertError):
    """The input or output could not be read or written: a fault of the disk, not of the content."""

    exit_code = 1


class InvalidCheckpoint(ConvertError):
    """The bytes are not a well-formed file of any container that is read here."""


class UnsupportedCheckpoint(ConvertError):
    """A well-formed file of a kind that cannot be used, which the message names."""


class LayoutMismatch(ConvertError):
    """A recognised family whose keys do not all fit.

    Attributes:
        missing: names that the architecture needs and the file lacks.
        unexpected: names that the file has and no table knows.
        misshapen: ``(name, found shape, expected shape)``.
    """

    def __init__(
        self,
        path: Path | str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)
        shapes = [f"{name} {found} instead of {expected}" for name, found, expected in misshapen]
        parts = [
            f"{len(names)} {word}: {_some(names)}"
            for word, names in (
                ("missing", list(missing)),
                ("unexpected", list(unexpected)),
                ("misshapen", shapes),
            )
            if names
        ]
        super().__init__(path, "keys do not fit the family: " + "; ".join(parts))


def one_line(text: str, limit: int = 400) -> str:
    """Text from a stranger's file made safe to print: one line, no control characters, bounded."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def quoted(name: object) -> str:
    """A name from a stranger's file in quotes, short enough to leave room for the reason."""
    return f"'{one_line(str(name), 100)}'"


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(one_line(name, 120) for name in names[:count])
    return shown if len(names) <= count else f"{shown}, … ({len(names) - count} more)"
