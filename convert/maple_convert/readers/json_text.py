"""JSON from strangers: bounded, strict, without duplicate keys and without NaN."""

import json
from pathlib import Path
from typing import Any, NoReturn, cast

from maple_convert.errors import InvalidCheckpoint, quoted
from maple_convert.readers.source import SourceFile

MAX_BYTES = 32 << 20  # the largest tokenizer.json of a published pipeline is about 17 MB
MAX_COMMAS = 2_000_000  # bounds what parsing may allocate: lists take twenty times their text
MAX_DEPTH = 32
MAX_DIGITS = 40  # Python's own bound is 4,300 digits, parsed in quadratic time
_DIGITS_ALIKE = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))


class JSONFault(Exception):
    """What is wrong with a JSON text."""


def read_json(path: Path | str, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Read a small JSON file that holds one object, as a folder's config files do.

    Raises:
        UnreadableFile: if the file cannot be read.
        InvalidCheckpoint: if it is larger than ``limit`` bytes, nested deeper than 32, or not a
            JSON object.
    """
    file = SourceFile(path)
    try:
        if file.size > limit:
            reason = f"is {file.size} bytes long, too much for a JSON file (limit {limit})"
            raise InvalidCheckpoint(file.path, reason)
        text = file.read(0, file.size)
    finally:
        file.close()
    try:
        return parse_object(text)
    except JSONFault as fault:
        raise InvalidCheckpoint(file.path, str(fault)) from fault


def parse_object(text: bytes) -> dict[str, Any]:
    """One JSON object from UTF-8 bytes; JSONFault otherwise."""
    if text.count(b",") > MAX_COMMAS:
        raise JSONFault("lists too many things")
    # Looking at every number costs as much as reading it: only where one may be too long.
    may_be_long = b"0" * (MAX_DIGITS + 1) in text.translate(_DIGITS_ALIKE)
    try:
        value: object = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_int=_short_int if may_be_long else None,
        )
    except RecursionError as error:
        raise JSONFault("is JSON nested too deep") from error
    except UnicodeDecodeError as error:
        raise JSONFault(f"is not JSON: not UTF-8 at byte {error.start}") from error
    except ValueError as error:  # json.JSONDecodeError
        raise JSONFault(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise JSONFault(f"holds a JSON {type(value).__name__} where an object was expected")
    result = cast("dict[str, Any]", value)
    _check_depth(result)
    return result


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    kinds: tuple[Any, Any] = dict, list
    a_dict, a_list = kinds  # of type Any, or pyright asks for what is in each
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            for inner in (item.values() if type(item) is a_dict else item)
            if type(inner) is a_list or type(inner) is a_dict
        ]
        if not level:
            return
    raise JSONFault(f"is JSON nested deeper than {MAX_DEPTH}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JSONFault(f"names {quoted(twice)} twice in one JSON object")
    return result


def _short_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JSONFault(f"holds a number of {len(digits)} digits")
    return int(digits)


def _no_constant(word: str) -> NoReturn:
    raise JSONFault(f"holds {word}, which JSON does not have")
