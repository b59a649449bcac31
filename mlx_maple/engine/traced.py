"""Functions that MLX traces once and runs again, in whichever threads they are called.

MLX 0.32.4 keeps a trace with the thread that made it, under the function's address, and an end of
the compiled function is told to the last thread alone that called it. What another thread traced
stays there with all its weights, and the next function that comes to lie at the same address would
run as that one. So each thread has a compiled function of its own here, and all end together.
"""

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Traced:
    """A function of trees of arrays that is compiled by ``mx.compile``, for each thread anew.

    Args:
        function: what is traced.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._own = threading.local()

    def __call__(self, *given: Any) -> Any:
        """What the function makes of ``given``."""
        try:
            run = self._own.run
        except AttributeError:
            run = self._own.run = mx.compile(self._function)
        return run(*given)
