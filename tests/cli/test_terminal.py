"""The bar and the previews on stderr."""

import io

import pytest

from mlx_maple.cli import _terminal
from mlx_maple.cli._terminal import Screen


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def test_without_a_terminal_there_is_no_bar_but_notes_remain():
    stream = io.StringIO()
    screen = Screen(stream=stream)
    screen.progress("drawing", 1, 2, "0.5 s/step")
    screen.say("note")
    screen.clear()
    assert stream.getvalue() == "note\n"


def test_a_bar_that_is_asked_for_writes_plain_lines():
    stream = io.StringIO()
    screen = Screen(stream=stream, forced=True)
    for done in range(1, 5):
        screen.progress("drawing", done, 4, f"{done}/4")
    assert stream.getvalue().splitlines() == ["drawing   25%  1/4", "drawing  100%  4/4"]


def test_quiet_says_nothing():
    stream = Terminal()
    screen = Screen(quiet=True, forced=True, stream=stream)
    screen.progress("drawing", 1, 2)
    screen.say("note")
    screen.picture(b"png")
    assert stream.getvalue() == ""


def test_a_note_goes_above_the_bar():
    stream = Terminal()
    screen = Screen(stream=stream)
    screen.progress("drawing", 1, 2, "0.5 s/step")
    screen.say("note")
    screen.clear()
    bar = "drawing  ████████████░░░░░░░░░░░░  0.5 s/step"
    assert stream.getvalue() == f"\r\033[K{bar}\r\033[Knote\n{bar}\r\033[K"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "x"}, None),
        ({"TERM": "xterm-256color"}, None),
    ],
)
def test_terminals_that_show_pictures_are_known(monkeypatch, variables, expected):
    for name in ("TERM", "TERM_PROGRAM", "TMUX", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _terminal.image_protocol() == expected


def test_pictures_take_each_others_place(monkeypatch):
    monkeypatch.setattr(_terminal, "image_protocol", lambda: "kitty")
    stream = Terminal()
    screen = Screen(stream=stream)
    screen.picture(b"x" * 5000)
    first = stream.getvalue()
    assert first.count("\n") == _terminal.PREVIEW_ROWS  # room is made once
    assert first.count("\033_G") == 2 and first.endswith("\033\\\0338")  # two chunks, cursor back
    screen.picture(b"y")
    assert "\n" not in stream.getvalue()[len(first) :]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.314, "0.31 s"), (12.3, "12 s"), (185, "3 min 05 s")],
)
def test_durations(value, text):
    assert _terminal.seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (912, "912 B"),
        (52_300, "52.3 kB"),
        (999_600, "1 MB"),
        (4_265_380_512, "4.27 GB"),
        (1.37e12, "1.37 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(count, text):
    assert _terminal.size(count) == text
