"""Prompts that change while they are drawn: ``[from:to:when]`` and ``[this|that]``.

Source   What is a change, and when it takes place, is AUTOMATIC1111/stable-diffusion-webui
         @v1.10.1's (modules/prompt_parser.py, a grammar for the lark library), checked against it
         in tests/text/test_prompt_language.py.
Differs  Read with a stack in one pass, where that grammar takes a time that grows with the square
         of the text and more; it has no nesting that is too deep.

How it reads brackets that do not pair up is the grammar's: a bracket without a partner is text, and
so is everything around it, because only the outermost level may hold such a bracket. What is whole
inside is still read. A "|" that separates nothing makes the entire prompt text.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

MOST_CHARACTERS = 1 << 24  # of a changing prompt in all the forms it takes
_TOKEN = re.compile(r"[^\\\[\]():|]*(?:\\.[^\\\[\]():|]*)+|[^\\\[\]():|]+|[\[\]():|]")
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


class Phase(NamedTuple):
    """A prompt as it reads for a while.

    Attributes:
        until: the last step of it; steps are counted as the prompt counts them, the first is 1.
        text: without changes; weights are still in it.
    """

    until: int
    text: str


class _Switch(NamedTuple):
    before: "_Node"
    after: "_Node"
    when: int


class _Turns(NamedTuple):
    options: Sequence["_Node"]


_Node = str | list["_Node"] | _Switch | _Turns


class _Open:
    """A bracket that is not closed yet: what follows it, and where in that its separators stand."""

    def __init__(self, bracket: str) -> None:
        self.items: list[_Node] = [bracket]
        self.colons: list[int] = []
        self.bars: list[int] = []


def phases(text: str, steps: int, first_steps: int | None = None) -> list[Phase]:
    """The forms that a prompt takes in turn; a plain one has one.

    A ``when`` with a point is a share of the steps, as in ``[a:b:0.5]``; without one it is a step.

    Args:
        text: a prompt, or a part of one between two ANDs.
        steps: that are drawn.
        first_steps: of the first drawing, where this is the second and larger one; ``when`` then
            goes on counting, from ``first_steps`` or from 1.0.

    Raises:
        ValueError: if the forms together have too many characters.
    """
    tree, whens, turns = _tree(text, steps, first_steps)
    ends = set(range(1, steps + 1)) if turns else {steps, *(when for when in whens if when >= 1)}
    if len(ends) > 1 and len(ends) * len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"a prompt of {len(text):,} characters that changes {len(ends):,} times is too long."
        )
    return [Phase(end, _at(tree, end)) for end in sorted(ends)]


def phase_at(found: Sequence[Phase], call: int) -> Phase:
    """The phase that a network call belongs to; the first call is 0.

    So A1111 compares them: a change at step 3 is first seen by call 4, the fifth.
    """
    return next((phase for phase in found if call <= phase.until), found[0])


def _tree(text: str, steps: int, first_steps: int | None) -> tuple[_Node, list[int], bool]:
    """The prompt's tree, every ``when`` in it, and whether anything takes turns."""
    outside: list[_Node] = []
    open_: list[_Open] = []
    whens: list[int] = []
    bars = position = 0  # bars that separate nothing so far
    turns = False

    def give_up() -> None:
        for each in open_:
            outside.append(each.items)
        open_.clear()

    for match in _TOKEN.finditer(text):
        if match.start() != position:  # a lone backslash: the grammar knows no such text
            return text, [], False
        position = match.end()
        token = match[0]
        items = open_[-1].items if open_ else outside
        if token in ("[", "("):
            open_.append(_Open(token))
        elif token in ("]", ")"):
            node = _closed(open_[-1], token, steps, first_steps) if open_ else None
            if node is None:
                give_up()
                outside.append(token)
                continue
            bars -= len(open_.pop().bars)
            if isinstance(node, _Switch):
                whens.append(node.when)
            turns = turns or isinstance(node, _Turns)
            (open_[-1].items if open_ else outside).append(node)
        else:
            if token == "|":
                bars += 1
            if open_ and token in (":", "|"):
                (open_[-1].colons if token == ":" else open_[-1].bars).append(len(items))
            items.append(token)
    if position != len(text) or bars:
        return text, [], False
    give_up()
    return outside, whens, turns


def _closed(open_: _Open, bracket: str, steps: int, first_steps: int | None) -> _Node | None:
    """What lies between an open bracket and this one; None where they are no pair."""
    items, colons, bars = open_.items, open_.colons, open_.bars
    if bracket == ")":
        return [*items, bracket] if items[0] == "(" and not bars and len(colons) < 2 else None
    if items[0] == "(" or (bars and colons) or len(colons) > 2:
        return None
    if bars:
        edges = [0, *bars, len(items)]
        return _Turns([items[i + 1 : j] for i, j in pairwise(edges)])
    if not colons:
        return [*items, bracket]
    last = items[colons[-1] + 1 :]
    number = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if number is None:
        return None
    before, after = [], items[1 : colons[0]]
    if len(colons) == 2:
        before, after = after, items[colons[0] + 1 : colons[1]]
    return _Switch(before, after, _when(number[1], steps, first_steps))


def _when(number: str, steps: int, first_steps: int | None) -> int:
    """The last step before a change, at most ``steps``; below 1 it has taken place before all."""
    value = float(number)
    if "." in number:
        value = (value - (first_steps is not None)) * steps
    else:
        value -= first_steps or 0
    return int(max(-1.0, min(value, steps)))


def _at(tree: _Node, step: int) -> str:
    """The text at a step, nested however deep."""
    parts: list[str] = []
    waiting: list[Iterator[_Node]] = [iter([tree])]
    while waiting:
        for node in waiting[-1]:
            if isinstance(node, _Switch):
                node = node.before if step <= node.when else node.after
            elif isinstance(node, _Turns):
                node = node.options[(step - 1) % len(node.options)]
            if isinstance(node, str):
                parts.append(node)
            else:
                assert isinstance(node, list)  # a choice's branches are lists
                waiting.append(iter(node))
                break
        else:
            waiting.pop()
    return "".join(parts)
