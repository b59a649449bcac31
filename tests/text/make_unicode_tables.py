"""Write mlx_maple/text/unicode_tables.py from the behaviour of the tokenizers library itself.

    python tests/text/make_unicode_tables.py && ruff format mlx_maple/text

Needs the parity extra and Python 3.11 or later with ``unicodedata2==17.0.0`` installed (for the
marks younger than the library's normaliser). tests/parity/test_tokenizer.py compares the result
with the library, code point by code point, and needs neither.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
import unicodedata2  # pyright: ignore[reportMissingImports]
from tokenizers import Regex, normalizers

TARGET = Path(__file__).parents[2] / "mlx_maple" / "text" / "unicode_tables.py"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
OLDEST_MARK = "\u1d7b\u0345"  # an uncomposable letter and a mark of class 240, which sorts last
LATER_CASED = (0x1C80, 0x2C00, 0xA7C0, 0x10570, 0x10D50, 0x16EA0)  # blocks cased since Unicode 14

HEADER = '''\
r"""Rust's Unicode tables, so that tokens do not depend on Python's, which vary by version.

Made by tests/text/make_unicode_tables.py from tokenizers {version}; not edited by hand. Each of the
first four is the inside of a regular expression's character class.

    SPACE LETTER NUMBER   the split pattern's \\s, \\p{{L}}, \\p{{N}}: Oniguruma's, of Unicode 16.
                          U+001C to U+001F, white space to Python, are none of these.
    YOUNGER_MARK          characters with a combining class or a composition that came after
                          Unicode 9, where the library's NFC stands: to it they are inert.
    LATER_LOWER           lower case of letters cased since Unicode 14 (first, last, distance,
                          step): Python 3.10 has Unicode 13, Rust's standard library 17.
"""
'''


def main() -> None:
    classes = {
        "SPACE": matching(r"\s"),
        "LETTER": matching(r"\p{L}"),
        "NUMBER": matching(r"\p{N}"),
        "YOUNGER_MARK": younger_marks(),
    }
    text = HEADER.format(version=tokenizers.__version__)
    for name, points in classes.items():
        text += f"\n{name} = (\n{literal(points)})\n"
    text += "\nLATER_LOWER = (\n"
    for first, last, distance, step in lower_ranges():
        text += f"    (0x{first:04X}, 0x{last:04X}, {distance}, {step}),\n"
    TARGET.write_text(text + ")\n")


def matching(pattern: str) -> list[int]:
    mark = normalizers.Replace(Regex(pattern), "<match>").normalize_str
    return [c for c in CODE_POINTS if mark(chr(c)) == "<match>"]


def younger_marks() -> list[int]:
    """Characters that Unicode 17 reorders or composes and the library leaves where they are."""
    nfc = normalizers.NFC().normalize_str
    young: set[int] = set()
    for c in CODE_POINTS:
        char = chr(c)
        combining = unicodedata2.combining(char)
        if combining and combining < 240 and nfc(OLDEST_MARK + char) == OLDEST_MARK + char:
            young.add(c)
        parts = unicodedata2.normalize("NFD", char)
        if parts != char and nfc(parts) != unicodedata2.normalize("NFC", parts):
            young |= {c, ord(parts[0])}
    return sorted(young)


def lower_ranges() -> list[list[int]]:
    """(first, last, distance, step) of every one-to-one lower case in the later blocks."""
    lower = normalizers.Lowercase().normalize_str
    ranges: list[list[int]] = []
    for block in LATER_CASED:
        for c in range(block, block + 0x60):
            to = lower(chr(c))
            if len(to) != 1 or ord(to) == c:
                continue
            distance = ord(to) - c
            last = ranges[-1] if ranges else [0, 0, 0, 0]
            gap = c - last[1]
            if distance == last[2] and gap in (1, 2) and last[3] in (0, gap):
                last[1], last[3] = c, gap
            else:
                ranges.append([c, c, distance, 0])
    return [[first, last, distance, step or 1] for first, last, distance, step in ranges]


def literal(points: Iterable[int]) -> str:
    """Ranges as escapes, in lines of a Python string literal."""
    ranges: list[list[int]] = []
    for c in points:
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    lines, line = "", ""
    for first, last in ranges:
        item = escape(first) + ("" if first == last else "-" + escape(last))
        if len(line) + len(item) > 92:
            lines += f'    "{line}"\n'
            line = ""
        line += item
    return lines + f'    "{line}"\n'


def escape(c: int) -> str:
    return f"\\x{c:02X}" if c < 0x100 else f"\\u{c:04X}" if c < 0x10000 else f"\\U{c:08X}"


if __name__ == "__main__":
    main()
