"""A picture of a benchmark's rows: bars in groups, one group a case, drawn with Pillow alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH = 1280
MARGIN = 48
LABELS = 400  # pixels for the names of the bars
FIGURES = 210  # pixels for the numbers behind them
BAR, GAP, GROUP_GAP = 26, 10, 30
INK, FAINT, PAPER = (38, 38, 42), (120, 120, 128), (255, 255, 255)
OURS, OTHERS, PUBLISHED = (178, 60, 44), (92, 122, 158), (205, 205, 210)


@dataclass(frozen=True)
class Bar:
    """One figure.

    Attributes:
        label: whose it is.
        seconds: how long its bar is; None where there is no figure.
        figure: the number in words, or why there is none.
        colour: of the bar.
    """

    label: str
    seconds: float | None
    figure: str
    colour: tuple[int, int, int]


def plot(
    title: str, facts: str, groups: Sequence[tuple[str, Sequence[Bar]]], footer: str
) -> Image.Image:
    """The picture: each group on a scale of its own, from zero."""
    scale = 2  # drawn twice as large as its units, for sharp screens
    heights = [28 + len(bars) * (BAR + GAP) + GROUP_GAP for _, bars in groups]
    height = 120 + sum(heights) + 70
    image = Image.new("RGB", (WIDTH * scale, height * scale), PAPER)
    draw = ImageDraw.Draw(image)

    def text(
        x: float, y: float, words: str, size: int, ink: tuple[int, int, int], anchor: str = "ls"
    ) -> None:
        font = ImageFont.load_default(size * scale)
        draw.text((x * scale, y * scale), words, fill=ink, font=font, anchor=anchor)

    text(MARGIN, 56, title, 26, INK)
    text(MARGIN, 84, facts, 14, FAINT)
    room = WIDTH - 2 * MARGIN - LABELS - FIGURES
    y = 120.0
    for (name, bars), group_height in zip(groups, heights, strict=True):
        text(MARGIN, y + 14, name, 16, INK)
        longest = max((bar.seconds for bar in bars if bar.seconds), default=1.0)
        top = y + 28
        for bar in bars:
            middle = top + BAR / 2
            text(MARGIN + LABELS - 12, middle, _shorten(bar.label), 14, INK, "rm")
            left = MARGIN + LABELS
            right = left
            if bar.seconds:
                right = left + max(2.0, room * bar.seconds / longest)
                box = [left * scale, top * scale, right * scale, (top + BAR) * scale]
                draw.rounded_rectangle(box, radius=3 * scale, fill=bar.colour)
            ink = INK if bar.seconds else FAINT
            text(right + 10, middle, bar.figure, 14, ink, "lm")
            top += BAR + GAP
        y += group_height
    draw.line(
        [(MARGIN + LABELS) * scale, 112 * scale, (MARGIN + LABELS) * scale, y * scale - 30],
        fill=(225, 225, 230),
        width=scale,
    )
    text(MARGIN, y + 24, footer, 13, FAINT)
    return image


def bars_of(
    rows: Sequence[Mapping[str, Any]],
    published: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
) -> list[tuple[str, list[Bar]]]:
    """Groups of bars: a group for each case, our own figure first.

    Args:
        rows: of a benchmark's run.
        published: figures of others, which are labelled so.
        names: what each case is called in words.
    """
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        seconds = row.get("median_s")
        if seconds is None:
            figure = row.get("error", "not measured")[:30]
        else:
            figure = milliseconds(seconds)
        colour = OURS if row["rival"].startswith("mlx-maple") else OTHERS
        groups.setdefault(row["case"], []).append(Bar(row["rival"], seconds, figure, colour))
    for each in published:
        if each["case"] in groups and each["seconds"]:
            family = " (SD 2.1)" if "2.1" in each["work"] else ""
            label = f"published: {each['device']}, {each['stack']}{family}"
            bar = Bar(label, each["seconds"], milliseconds(each["seconds"]), PUBLISHED)
            groups[each["case"]].append(bar)
    return [(names.get(case, case), bars) for case, bars in groups.items()]


def milliseconds(seconds: float) -> str:
    """A duration with three digits that count."""
    if seconds < 10:
        value = 1e3 * seconds
        return (
            f"{value:.2f} ms"
            if value < 10
            else f"{value:.1f} ms"
            if value < 100
            else f"{value:.0f} ms"
        )
    return f"{seconds:.1f} s"


def _shorten(label: str) -> str:
    return label if len(label) <= 56 else f"{label[:55]}…"
