"""The prompt language that most people write: AUTOMATIC1111's, taken apart.

A prompt is read from the outside in, each layer by the module that knows it: tags such as
``<lora:name:0.8>`` and prompts joined by AND here, ``[from:to:when]`` in editing.py, weights in
emphasis.py, and chunks of ids in prompt.py. docs/prompts.md tells it to who writes prompts.

Source   AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/extra_networks.py (tags),
         modules/prompt_parser.py (AND), extensions-builtin/Lora/extra_networks_lora.py (weights of
         a LoRA). Several prompts at once: Liu et al. 2022 (arXiv:2206.01714).
Differs  "prompt :1.2" has that weight beside an AND only: alone it would make "in 16:9" one of 9.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_maple.text.editing import Phase, phases

SYNTAXES = ("a1111", "plain")
MOST_PROMPTS = 32  # joined by AND; each is one more pass through the network in every step
MOST_WEIGHT = 100  # of one of those prompts, and of a LoRA

_TAG = re.compile(r"<(\w{1,32}):([^<>]{1,300})>")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*([-+]?(?:[0-9]+\.?|[0-9]*\.[0-9]+))\s*")


class Tag(NamedTuple):
    """``<lora:name:text:unet>``: a named thing that changes the model while this is drawn.

    Attributes:
        kind: lora, or another word before the first colon.
        name: of the file, without its ending.
        text: how strongly it changes text encoders.
        unet: and the UNet.
    """

    kind: str
    name: str
    text: float = 1.0
    unet: float = 1.0


class Part(NamedTuple):
    """One of the prompts that AND joins, with its share and the forms it takes in turn."""

    weight: float
    phases: Sequence[Phase]


class Prompt(NamedTuple):
    """A prompt taken apart; weights of words are still in the phases' texts."""

    parts: Sequence[Part]
    tags: Sequence[Tag] = ()


def read_prompt(
    text: str,
    steps: int,
    first_steps: int | None = None,
    *,
    syntax: str = "a1111",
    is_negative: bool = False,
) -> Prompt:
    """Take a prompt apart.

    Args:
        text: as it was written.
        steps: network calls of the drawing; see ``editing.phases``.
        first_steps: likewise, of a first and smaller drawing.
        syntax: "plain" reads nothing into the text.
        is_negative: it has no AND there: the word is a word.

    Raises:
        ValueError: in one line: unknown syntax, a weight that cannot be, too much of anything.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"unknown syntax {syntax!r}: choose from {', '.join(SYNTAXES)}.")
    if syntax == "plain":
        return Prompt([Part(1.0, [Phase(steps, text)])])
    rest, tags = without_tags(text)
    pieces = [rest] if is_negative else _AND.split(rest)
    if len(pieces) > MOST_PROMPTS:
        raise ValueError(f"{len(pieces)} prompts are joined by AND: {MOST_PROMPTS} are the most.")
    weighed = [(1.0, rest)] if len(pieces) == 1 else [_weighed(piece) for piece in pieces]
    return Prompt([Part(weight, phases(s, steps, first_steps)) for weight, s in weighed], tags)


def without_tags(
    text: str, which: Callable[[Tag], bool] = lambda tag: True
) -> tuple[str, list[Tag]]:
    """The prompt less its tags, and those tags.

    Args:
        text: as it was written.
        which: says of each tag whether it is meant; all are if not said.

    Raises:
        ValueError: for a weight that is no number.
    """
    taken: list[Tag] = []

    def take(match: re.Match[str]) -> str:
        tag = _tag(match[1].lower(), match[2])
        if not which(tag):
            return match[0]
        taken.append(tag)
        return ""

    return _TAG.sub(take, text), taken


def left_out(prompt: Prompt, negative: Prompt | None) -> list[str]:
    """A note for each tag that changes nothing, safe to print in one line."""
    notes = [
        f"<{tag.kind}:{_printable(tag.name)}> is left out: there are only LoRAs here"
        for tag in prompt.tags
        if tag.kind != "lora"
    ]
    for tag in () if negative is None else negative.tags:
        name = f"<{tag.kind}:{_printable(tag.name)}>"
        notes.append(f"{name} is left out of the negative prompt: it belongs into the prompt")
    return notes


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:80])


def _tag(kind: str, inside: str) -> Tag:
    """Of ``name:text:unet`` and ``te=``, ``unet=``; the UNet's weight is the text's if not said."""
    placed: list[str] = []
    named: dict[str, str] = {}
    for item in inside.split(":"):
        key, is_named, value = item.partition("=")
        if is_named and placed:
            named[key.strip().lower()] = value
        else:
            placed.append(item)
    if kind not in ("lora", "lyco"):
        return Tag(kind, placed[0].strip())
    text = named.get("te", placed[1] if len(placed) > 1 else "1")
    unet = named.get("unet", placed[2] if len(placed) > 2 else text)
    try:
        return Tag("lora", placed[0].strip(), _bounded(text), _bounded(unet))
    except ValueError:
        shown = ascii(f"<{kind}:{inside[:60]}>")
        raise ValueError(f"{shown}: a weight there is no number from -100 to 100.") from None


def _bounded(text: str) -> float:
    value = float(text)
    if not abs(value) <= MOST_WEIGHT:
        raise ValueError
    return value


def _weighed(piece: str) -> tuple[float, str]:
    """Of ``a cat :1.2`` the 1.2 and the cat."""
    text, colon, end = piece.rpartition(":")
    number = _WEIGHT.fullmatch(end) if colon else None
    if number is None:
        return 1.0, piece
    try:
        return _bounded(number[1]), text.rstrip()
    except ValueError:
        shown = ascii(piece.strip()[-60:])
        raise ValueError(f"{shown}: the weight of a prompt must be from -100 to 100.") from None
