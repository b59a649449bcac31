"""The model that the command draws with when none is named: what `maple models use` keeps.

It is one line of text in the user's configuration, not in the cache, which may be emptied at any
time. $MAPLE_MODEL goes before it. ``load()`` knows neither: a program says what it wants.
"""

import os
import tempfile
from pathlib import Path

from mlx_maple.cli import _outputs

VARIABLE = "MAPLE_MODEL"


def config_file() -> Path:
    """Where it is kept: in $XDG_CONFIG_HOME, else in ~/.config."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "mlx-maple"
    try:
        return folder.expanduser() / "model"
    except RuntimeError:  # a container's user without a name or a home
        return Path(tempfile.gettempdir()) / f"mlx-maple-{os.getuid()}" / "model"


def chosen() -> tuple[str | None, str]:
    """The model to draw with where none is named, or None, and where that was said."""
    if name := os.environ.get(VARIABLE):
        return name, f"${VARIABLE}"
    file = config_file()
    try:
        name = os.fsdecode(file.read_bytes()).strip("\n")
    except OSError:  # not there; or a container's user who may not look into HOME: nothing is set
        name = ""
    return name or None, str(file)


def keep(name: str | None) -> None:
    """Make ``name`` the default from now on; None is the model that comes with maple.

    Raises:
        OSError: when it cannot be written.
    """
    file = config_file()
    if name is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _outputs.whole_file(file) as hidden:
        hidden.write_bytes(os.fsencode(name) + b"\n")
