"""Prompts whose words have weights: ``(word)``, ``(word:1.2)``, ``[word]``.

Source   AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/prompt_parser.py,
         parse_prompt_attention, checked against it in tests/text/test_prompt_language.py; what a
         weight does to the states is mlx_maple/conditioning.py's business.
Differs  One pass, so that ten thousand brackets take no longer than ten thousand letters; a weight
         is multiplied from the outside in, which may change its last bit. BREAK within brackets
         breaks too, where A1111 reads it as a word. A weight that is no number ("(a:1.2.3)") is
         text, and one beyond all reason an error.
"""

import re
from typing import NamedTuple

ROUND = 1.1  # what a pair of round brackets multiplies by
SQUARE = 1 / 1.1  # and of square ones
MOST = 1000.0  # the largest weight; far below it a picture is noise
_TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?[.0-9]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Fragment(NamedTuple):
    """A run of text of one weight; what follows a BREAK starts a new chunk.

    Attributes:
        text: without the brackets and escapes.
        weight: 1 changes nothing.
        breaks: whether a BREAK stands before it.
    """

    text: str
    weight: float
    breaks: bool = False


def fragments(text: str) -> list[Fragment]:
    """A prompt's runs of equal weight, in order; "" has one.

    A bracket that is not closed reaches to the end; one that was not opened is text.

    Raises:
        ValueError: if a weight is beyond ``MOST``.
    """
    tokens = list(_TOKEN.finditer(text))
    factors = _factors(tokens)
    runs = _Runs()
    products = {"(": [1.0], "[": [1.0]}  # of the pairs that are open here, by their shape
    closes = {")": "(", "]": "["}
    for index, match in enumerate(tokens):
        token, factor = match[0], factors.get(index)
        if factor is None:
            weight = products["("][-1] * products["["][-1]
            if token.startswith("\\"):  # as A1111 does, a backslash before other letters is dropped
                runs.add(token[1:], weight)
            else:
                runs.add_breaking(token, weight)
        elif token in products:
            products[token].append(products[token][-1] * factor)
        else:
            products[closes[token[-1]]].pop()
    return runs.fragments()


def _factors(tokens: list[re.Match[str]]) -> dict[int, float]:
    """What each bracket that has a meaning multiplies by; the closing ones have their pair's."""
    factors: dict[int, float] = {}
    open_: dict[str, list[int]] = {"(": [], "[": []}
    for index, match in enumerate(tokens):
        token = match[0]
        if token in open_:
            open_[token].append(index)
            factors[index] = ROUND if token == "(" else SQUARE
        elif match[1] is not None and open_["("]:
            try:
                factors[index] = factors[open_["("][-1]] = float(match[1])
            except ValueError:
                continue
            open_["("].pop()
        elif token in (")", "]") and open_[shape := "(" if token == ")" else "["]:
            factors[index] = factors[open_[shape].pop()]
    return factors


class _Runs:
    """Pieces of text, joined where neighbours have one weight."""

    def __init__(self) -> None:
        self._runs: list[tuple[list[str], float, bool]] = []

    def add(self, text: str, weight: float, breaks: bool = False) -> None:
        if not abs(weight) <= MOST:
            raise ValueError(f"the weight of {_short(text)} is {weight:g}: {MOST:g} is the most.")
        if self._runs and self._runs[-1][1] == weight and not breaks:
            self._runs[-1][0].append(text)
        else:
            self._runs.append(([text], weight, breaks))

    def add_breaking(self, text: str, weight: float) -> None:
        """Text in which the word BREAK starts a new chunk."""
        first, *others = _BREAK.split(text)
        self.add(first, weight)
        for part in others:
            self.add(part, weight, breaks=True)

    def fragments(self) -> list[Fragment]:
        found = [Fragment("".join(parts), weight, breaks) for parts, weight, breaks in self._runs]
        return found or [Fragment("", 1.0)]


def _short(text: str) -> str:
    return ascii(text if len(text) <= 40 else f"{text[:40]}...")
