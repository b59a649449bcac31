"""Low-memory mode: the network in use is in memory, and no other; MLX keeps little for later.

A drawing goes through its networks one after the other (text encoder, perhaps the autoencoder's
first half, UNet, the autoencoder's second half). Each is loaded when its turn comes and let go of
afterwards, which costs reading it again for the next drawing, as a rule from the system's file
cache.

MLX itself trades memory for speed in four ways, all of them bounded here:

- it keeps freed buffers for reuse: ``mx.set_cache_limit``;
- it prepares operations before the device has finished those before them, so that the buffers of
  several are alive at once. Above ``mx.set_memory_limit`` it waits for the device instead;
- on a GPU it hands operations over in batches, up to a hundred at once, and no buffer of a batch is
  given back before all of it is done: ``MLX_MAX_OPS_PER_BUFFER``, which MLX reads once, before its
  first work on a GPU;
- on Metal a Winograd convolution may take three quarters of the device's working set, or of
  ``MLX_CONV_WINOGRAD_WORKING_SET`` bytes; where that is too little MLX takes another algorithm.
"""

import gc
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

CACHE_BYTES = 32 << 20  # of freed buffers that MLX may keep
AHEAD_BYTES = 64 << 20  # beside what is held, before MLX waits for the device
BATCH = 8  # operations that a GPU is handed at once
ENVIRONMENT = {
    "MLX_MAX_OPS_PER_BUFFER": str(BATCH),
    "MLX_CONV_WINOGRAD_WORKING_SET": str(128 << 20),
}

USUAL = {"MLX_MAX_OPS_PER_BUFFER": "20"}  # of mlx_maple/__init__.py, which is not the user's

Reload = Callable[[], nn.Module]


def set_environment() -> None:
    """Bound what only the environment bounds, but for what the user has set.

    For the whole process, and before its first work on a GPU; afterwards it comes too late for the
    batches.
    """
    for name, value in ENVIRONMENT.items():
        if os.environ.get(name) in (None, USUAL.get(name)):
            os.environ[name] = value


class Networks:
    """A model's networks by name. Those that can be loaded again are held only while in use.

    Attributes:
        configs: of each network, held or not.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        reload: Mapping[str, Reload] | None = None,
        renew: Mapping[str, Reload] | None = None,
    ) -> None:
        """Hold ``networks``, but for those in ``reload``, of which only the configs are taken.

        Args:
            networks: by name; each has a ``config``.
            reload: functions that load a network anew, each time that it is used.
            renew: functions that load a network that is held anew, after ``drop``.
        """
        self._renew = dict(renew or {})
        self.configs: dict[str, Any] = {n: module.config for n, module in networks.items()}
        self._reload = dict(reload or {})
        self._held = {n: module for n, module in networks.items() if n not in self._reload}
        self._counted: dict[str, tuple[weakref.ref[nn.Module], int]] = {}
        self._bounded = 0  # drawings that go on in low-memory mode

    @property
    def is_low_memory(self) -> bool:
        """Whether some network is held only while it is in use."""
        return bool(self._reload)

    def __contains__(self, name: str) -> bool:
        return name in self.configs

    def __getitem__(self, name: str) -> Any:
        """The network, loaded now if it is not held."""
        if name not in self._held:
            load = self._reload.get(name) or self._renew[name]
            self._held[name] = load()
            self._bound()
        return self._held[name]

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        """Hold another network by this name, from now on and always; None is none."""
        self._reload.pop(name, None)
        self._renew.pop(name, None)
        self._held.pop(name, None)
        config = getattr(module, "config", self.configs.pop(name, None))
        if module is not None:
            self._held[name] = module
            self.configs[name] = config
        gc.collect()  # the one before; see release

    def exchange(self, name: str, module: nn.Module | None, load: Reload | None) -> None:
        """Hold another network by this name, which ``load`` loads anew; None is none."""
        is_low_memory = self.is_low_memory
        self[name] = module
        if module is None:
            self.configs.pop(name, None)
        elif load is not None:
            (self._reload if is_low_memory else self._renew)[name] = load
            if is_low_memory:
                del self._held[name]

    def can_load(self, name: str) -> bool:
        """Whether a network can be loaded anew; not one that was put in by hand."""
        return name in self._reload or name in self._renew

    def held(self, name: str) -> Any:
        """The network, where it is held just now; else None."""
        return self._held.get(name)

    def drop(self, *names: str) -> None:
        """Let go of networks that can be loaded anew; each is when it is asked for next."""
        gone = [self._held.pop(name) for name in names if self.can_load(name) and self.held(name)]
        if gone:
            gone.clear()
            gc.collect()
            mx.clear_cache()

    def release(self, *names: str) -> None:
        """Let go of what can be loaded again; the caller keeps no reference to it either."""
        for name in names:
            if name in self._reload:
                self._held.pop(name, None)
        if self._reload:
            gc.collect()  # a network and its compiled steps know of each other
            mx.clear_cache()
            self._bound()

    @contextmanager
    def drawing(self, room: int | None = None) -> Iterator[None]:
        """Have MLX keep and prepare little for a while.

        Args:
            room: of a model that is held whole: bytes that MLX may take beside it before it waits
                for the device; None bounds nothing.
        """
        if self._reload:
            with _bounds.set(self._held_bytes() + AHEAD_BYTES, CACHE_BYTES):
                self._bounded += 1
                try:
                    yield
                finally:
                    self._bounded -= 1
        elif room:
            # Beside what else is in memory: MLX's limit is for all of the process.
            with _bounds.set(max(self._held_bytes(), mx.get_active_memory()) + room):
                yield
        else:
            yield

    def _bound(self) -> None:
        if self._bounded:
            mx.set_memory_limit(self._held_bytes() + AHEAD_BYTES)

    def room_within(self, bytes_in_all: int) -> int:
        """What is left of so many bytes beside the networks, and no less than it takes to work."""
        return max(bytes_in_all - self._held_bytes(), AHEAD_BYTES)

    def _held_bytes(self) -> int:
        # Counted once a network: to walk over a UNet's weights takes 1.4 ms, and a LoRA changes
        # their values, not their number.
        for name, module in self._held.items():
            known, _ = self._counted.get(name, (None, 0))
            if known is None or known() is not module:
                self._counted[name] = weakref.ref(module), _bytes(module)
        return sum(self._counted[name][1] for name in self._held)


class _Bounds:
    """MLX's limits while drawings go on, and what they were before.

    They are the process's. Drawings are generators: one may end after another that began later,
    and must not bring back that one's limits. The last to end brings back the first ones.
    """

    def __init__(self) -> None:
        self._open = 0
        self._memory: int | None = None
        self._cache: int | None = None

    @contextmanager
    def set(self, memory: int, cache: int | None = None) -> Iterator[None]:
        """Set limits in bytes for a while; without ``cache`` that one stays."""
        before = mx.set_memory_limit(memory)
        self._memory = before if self._memory is None else self._memory
        if cache is not None:
            before = mx.set_cache_limit(cache)
            self._cache = before if self._cache is None else self._cache
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._restore()

    def _restore(self) -> None:
        if self._memory is not None:
            mx.set_memory_limit(self._memory)
        if self._cache is not None:
            mx.set_cache_limit(self._cache)
        self._memory = self._cache = None


_bounds = _Bounds()


def _bytes(module: nn.Module) -> int:
    found = tree_flatten(module.parameters())
    assert isinstance(found, list)
    return sum(value.nbytes for _, value in found)
