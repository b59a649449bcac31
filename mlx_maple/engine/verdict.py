"""What a check of this device came to, kept from one process to the next.

A check may take half a second, or bring the process down: a driver that fails leaves no error to
catch. So a check that begins is noted down; where two processes in turn have left a note and no
end, the thing that was checked is not touched again.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

PASSED, UNFINISHED = "passed", "unfinished"
TRIES = 2  # a process may be killed for other reasons while it checks


def folder() -> Path:
    """Where kernels and verdicts are kept: beside all else that can be made again, see twins.py."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("MAPLE_CACHE") or Path(shared) / "mlx-maple")
    try:
        return path.expanduser() / "kernels"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"mlx-maple-{os.getuid()}" / "kernels"


def kept(key: str, check: Callable[[], str | None]) -> str | None:
    """What ``check`` says is wrong, or None. Where nothing is, it is not asked again.

    What is wrong may pass, as a lack of memory does: that is asked again by the next process.

    Args:
        key: of what is checked, and of all that the answer depends on; a file's name.
        check: says what is wrong in a few words, None if nothing is.
    """
    path = folder() / f"{key}.verdict"
    try:
        found = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        found = []
    if found == [PASSED]:
        return None
    tries = 0
    if len(found) == 3 and found[0] == UNFINISHED and found[2].isdecimal():
        tries = 0 if _is_running(found[1]) else int(found[2])
    if tries >= TRIES:
        return f"{tries} checks did not come to their end; delete {path} to try again"
    write(path, f"{UNFINISHED} {os.getpid()} {tries + 1}".encode())
    try:
        fault = check()
    except BaseException:  # Ctrl-C too: it says nothing of the device
        _forget(path)
        raise
    if fault is None:
        write(path, PASSED.encode())
    else:
        _forget(path)
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


def write(path: Path, content: bytes) -> None:
    """Keep a file, whole or not at all; a folder that cannot be written only costs time."""
    hidden = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            hidden = Path(file.name)
            file.write(content)
        os.replace(hidden, path)
    except OSError:
        if hidden is not None:
            _forget(hidden)


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
