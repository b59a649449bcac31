"""Seconds by part of the work."""

import time
from collections.abc import Iterator

from mlx_maple.drawing.results import Progress


class Clock:
    """Seconds by part of the work; what passes in the caller's hands does not count."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._steps: list[float] = []
        self._elapsed = 0.0  # own time until the clock was last looked at
        self._since = time.perf_counter()
        self._last_mark = self._last_step = 0.0

    def away(self, progress: Progress) -> Iterator[Progress]:
        """Hand ``progress`` to the caller, and let no time pass until the answer."""
        self._own()
        yield progress
        self._since = time.perf_counter()

    def mark(self, part: str) -> None:
        """``part`` ends here, and the next one begins."""
        now = self._own()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last_mark
        self._last_mark = self._last_step = now

    def step(self) -> None:
        """A step ends here."""
        now = self._own()
        self._steps.append(now - self._last_step)
        self._last_step = now

    @property
    def seconds_per_step(self) -> float:
        """The mean; the first step also warms up, and counts only while it is alone."""
        steps = self._steps[1:] or self._steps
        return sum(steps) / len(steps) if steps else 0.0

    def timings(self) -> dict[str, float]:
        """Each part, the step and the total."""
        return {**self._parts, "step": self.seconds_per_step, "total": sum(self._parts.values())}

    def _own(self) -> float:
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._since = now
        return self._elapsed
