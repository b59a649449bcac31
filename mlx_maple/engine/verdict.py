"""What a check of this device came to, kept from one process to the next.

A check may take half a second, or bring the process down: a driver that fails leaves no error to
catch. So a check that begins is noted down; where the next process finds a note and no end, the
thing that was checked is not touched again.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

UNFINISHED = "unfinished"


def folder() -> Path:
    """Where kernels and verdicts are kept: beside all else that can be made again, see twins.py."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("MAPLE_CACHE") or Path(shared) / "mlx-maple")
    try:
        return path.expanduser() / "kernels"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"mlx-maple-{os.getuid()}" / "kernels"


def kept(key: str, check: Callable[[], str | None]) -> str | None:
    """What ``check`` says is wrong, or None; asked once for a key on this machine.

    Args:
        key: of what is checked, and of all that the answer depends on; a file's name.
        check: says what is wrong in a few words, None if nothing is.
    """
    path = folder() / f"{key}.verdict"
    try:
        found = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found = None
    if found is not None and not found.startswith(UNFINISHED):
        return found or None
    if found is not None and not _is_running(found.removeprefix(UNFINISHED).strip()):
        return f"a check did not come to its end; delete {path} to try again"
    _write(path, f"{UNFINISHED} {os.getpid()}")
    fault = check()
    _write(path, fault or "")
    return fault


def _is_running(pid: str) -> bool:
    """Whether the process that noted a check down is still at it."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return int(pid) != os.getpid()


def _write(path: Path, text: str) -> None:
    """Whole or not at all; a folder that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass
