"""What a person sees on stderr while a verb works: a bar, notes above it, a preview.

Results go to stdout and never pass through here. Where stderr is no terminal, a bar is silent
unless it is asked for; then it writes a plain line now and then.
"""

import base64
import os
import shutil
import sys
import time
from typing import TextIO

from maple_convert.errors import one_line

BAR_WIDTH = 24
REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 5.0  # between two lines where there is no terminal
PREVIEW_ROWS = 16


class Screen:
    """The one writer to stderr, so that a note never lands in the middle of the bar."""

    def __init__(
        self, *, quiet: bool = False, forced: bool = False, stream: TextIO | None = None
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.is_terminal = self.stream.isatty()
        self.shows_bar = not quiet and (self.is_terminal or forced)
        self._bar = ""
        self._next = 0.0
        self._label = ""
        self._room_made = False

    def progress(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Draw the bar: ``label`` and how much of ``total`` is done, with ``detail`` after it."""
        if not self.shows_bar:
            return
        now, is_last = time.monotonic(), done >= total
        if now < self._next and label == self._label and not is_last:
            return
        share = min(1.0, done / total) if total else 1.0
        if self.is_terminal:
            self._next = now + REDRAW_SECONDS
            full, empty = ("█", "░") if _is_utf8(self.stream) else ("#", "-")
            filled = round(share * BAR_WIDTH)
            line = f"{label}  {full * filled}{empty * (BAR_WIDTH - filled)}  {detail}"
            width = shutil.get_terminal_size().columns - 1
            self._bar = line[:width].rstrip()
            self._write(f"\r\033[K{self._bar}")
        elif label != self._label or now >= self._next or is_last:
            self._next = now + PLAIN_SECONDS
            self._write(f"{label}  {share:4.0%}  {detail}".rstrip() + "\n")
        self._label = label

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._write("\r\033[K")
        self._bar = self._label = ""
        self._next = 0.0

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.quiet:
            return
        bar = self._bar
        if bar:
            self._write("\r\033[K")
        self._write(one_line(text, 2000) + "\n")  # a stranger's file may have had a say in it
        if bar:
            self._write(bar)
        self._room_made = False

    def picture(self, png: bytes) -> None:
        """Show a picture above the bar, in the place of the one before."""
        if self.quiet or not self.is_terminal or (how := image_protocol()) is None:
            return
        if not self._room_made:  # scroll now, so that nothing scrolls while the picture is drawn
            self._write("\r\033[K" + "\n" * PREVIEW_ROWS)
            self._room_made = True
        draw = _iterm_image(png) if how == "iterm" else _kitty_image(png)
        self._write(f"\0337\033[{PREVIEW_ROWS}A\r{draw}\0338")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def image_protocol() -> str | None:
    """How this terminal shows pictures: "iterm", "kitty", or None."""
    if "TMUX" in os.environ or os.environ.get("TERM", "").startswith("screen"):
        return None
    program = os.environ.get("TERM_PROGRAM", "")
    if program in ("iTerm.app", "WezTerm", "vscode"):
        return "iterm"
    is_kitty = "KITTY_WINDOW_ID" in os.environ or os.environ.get("TERM") == "xterm-kitty"
    return "kitty" if is_kitty or program == "ghostty" else None


def _iterm_image(png: bytes) -> str:
    size = f"size={len(png)};height={PREVIEW_ROWS}"
    text = base64.b64encode(png).decode()
    return f"\033]1337;File=inline=1;{size};preserveAspectRatio=1:{text}\a"


def _kitty_image(png: bytes) -> str:
    """Chunks of 4096; always the same image number, so that each replaces the one before."""
    text = base64.b64encode(png).decode()
    chunks = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    out = []
    for i, chunk in enumerate(chunks):
        head = f"a=T,f=100,i=77,p=1,C=1,q=2,r={PREVIEW_ROWS}," if i == 0 else ""
        out.append(f"\033_G{head}m={int(i < len(chunks) - 1)};{chunk}\033\\")
    return "".join(out)


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def seconds(value: float) -> str:
    """A duration as people read one: "0.31 s", "12 s", "3 min 05 s"."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def size(count: float) -> str:
    """A size as disks are sold: "912 B", "52 kB", "4.27 GB"."""
    unit, units = "B", iter(("kB", "MB", "GB", "TB"))
    while count >= 999.5 and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
