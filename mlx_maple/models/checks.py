"""What a config and an input must satisfy, and the one-line messages when they do not.

A config may come from a stranger's file, so every number has a type and a bound: a count of layers
in the millions must end as a message, not as an hour of building modules.
"""

from collections.abc import Sequence

import mlx.core as mx

MAX_LEVELS = 8  # resolutions; published models have 3 or 4
MAX_LAYERS = 64  # blocks in a row; the deepest published transformer here has 32
MAX_WIDTH = 16_384  # channels; published models stay below 11 thousand


def integer(owner: str, name: str, value: object, low: int, high: int) -> int:
    """``value`` itself, if it is an int within [low, high] and not a bool.

    Raises:
        ValueError: naming the owner, the field, the interval and what was found.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        found = repr(value)[:60]
        raise ValueError(f"[{owner}] {name} must be an integer from {low} to {high}, got {found}.")
    return value


def integers(
    owner: str, name: str, value: object, low: int, high: int, length: int | None = None
) -> tuple[int, ...]:
    """``value`` as a tuple (JSON has only lists), each entry as ``integer`` wants it.

    Args:
        owner: the config's name, for the message.
        name: the field's name, for the message.
        value: a list or tuple of one entry a level.
        low: the least that an entry may be.
        high: the most that an entry may be.
        length: how many entries there must be; None asks for 1 to ``MAX_LEVELS``.

    Raises:
        ValueError: on anything else.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"[{owner}] {name} must be a list of integers, got {repr(value)[:60]}.")
    if length is None and not 1 <= len(value) <= MAX_LEVELS:
        raise ValueError(f"[{owner}] {name} must have 1 to {MAX_LEVELS} entries, got {len(value)}.")
    if length is not None and len(value) != length:
        raise ValueError(f"[{owner}] {name} must have {length} entries, got {len(value)}.")
    return tuple(integer(owner, f"{name}[{i}]", n, low, high) for i, n in enumerate(value))


def number(owner: str, name: str, value: object, low: float, high: float) -> float:
    """``value`` as a float within [low, high].

    Raises:
        ValueError: on anything else, NaN included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        found = repr(value)[:60]
        raise ValueError(f"[{owner}] {name} must be a number from {low} to {high}, got {found}.")
    return float(value)


def multiples(owner: str, name: str, values: Sequence[int], divisor: int, reason: str) -> None:
    """Raise unless each of ``values`` is a multiple of ``divisor``, which ``reason`` names."""
    if bad := [n for n in values if n % divisor]:
        raise ValueError(f"[{owner}] {name} must be multiples of {divisor} ({reason}), got {bad}.")


def channels_last(owner: str, name: str, x: mx.array, channels: int) -> None:
    """Raise unless ``x`` is (B, rows, columns, channels).

    Raises:
        ValueError: naming both shapes; an array that would fit with its axes moved is called NCHW.
    """
    if x.ndim == 4 and x.shape[-1] == channels:
        return
    hint = (
        " It looks like NCHW: move axis 1 last." if x.ndim == 4 and x.shape[1] == channels else ""
    )
    rows = "(B, rows, columns, " + f"{channels})"
    raise ValueError(f"[{owner}] expected {name} {rows}, got {tuple(x.shape)}.{hint}")
