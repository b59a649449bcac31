"""DeepCache while a drawing goes on: which calls are full, and what is kept between them.

Legend, source and the words: models/deep_cache.py.

Every model that a sampler asks keeps its own features: those of a prompt, of a picture, of a pass.
Its calls are counted, and the first of every ``interval`` of them is full, whichever step they
belong to: samplers that ask twice a step have more full calls, as in the reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.engine.compiled import GuidedSteps, Step, away, guided_sum, halves, twice
from mlx_maple.engine.prepare import Keys, Map, PreparedUNet, Resnet, Transformer
from mlx_maple.engine.prepared_forms import set_form
from mlx_maple.engine.traced import Traced
from mlx_maple.models import UNet
from mlx_maple.models.deep_cache import full, place, shallow
from mlx_maple.models.unet import as_times, check_guidance, check_inputs


class DeepCache(NamedTuple):
    """How deep features are used again.

    Attributes:
        interval: one call in so many is full.
        branch: number of the kept state from which on the network is shallow.
    """

    interval: int
    branch: int = 0


class CachedCalls:
    """A plain network's calls, or those of one that is made ready, without a compiled step.

    A call of the model may be several of the network, one for each half of the guidance: each has
    its own features.

    Args:
        cache: how.
        unet: gives the network.
    """

    def __init__(self, cache: DeepCache, unet: Callable[[], UNet | PreparedUNet]) -> None:
        self._cache = cache
        self._unet = unet
        self._calls = 0
        self._deep: list[mx.array | None] = []
        self._half = 0

    def begin(self) -> None:
        """The model is called."""
        if self._calls % self._cache.interval == 0:
            self._deep = []
        self._calls += 1
        self._half = 0

    def __call__(self, *inputs: Any, **told: Any) -> mx.array:
        """A call of the network, with what it takes."""
        self._half += 1
        deep = self._deep[self._half - 1] if self._half <= len(self._deep) else None
        out, made = keeping(self._unet(), self._cache.branch, deep, *inputs, **told)
        if deep is None:
            self._deep.append(made)
        return out


def keeping(
    unet: UNet | PreparedUNet, branch: int, deep: mx.array | None, *inputs: Any, **told: Any
) -> tuple[mx.array, mx.array]:
    """A network's prediction, with the ``deep`` features of another call or its own: and those."""
    if isinstance(unet, PreparedUNet):
        return _prepared(unet, branch, deep, *inputs, **told)
    if deep is None:
        return full(unet, branch, *inputs, **told)
    return shallow(unet, branch, deep, *inputs, **told)


def _prepared(
    unet: PreparedUNet,
    branch: int,
    deep: mx.array | None,
    latents: mx.array,
    timesteps: mx.array | float,
    context: mx.array,
    vector: mx.array | None = None,
    guidance: mx.array | None = None,
    control: Sequence[mx.array] | None = None,
    features: Sequence[mx.array] | None = None,
    image: Sequence[Sequence[mx.array]] = (),
) -> tuple[mx.array, mx.array]:
    check_inputs(unet.config, latents, context, vector)
    check_guidance(unet.config, guidance)
    times = unet.times(as_times(timesteps, latents.shape[0]), vector, guidance)
    prompt, added = unet.prompt(context, image), list(features or ())
    maps = unet.begin(latents, times, prompt, added)
    return climbed(unet, branch, deep, maps, times, prompt, added, control)


def climbed(
    unet: PreparedUNet,
    branch: int,
    deep: mx.array | None,
    maps: list[Map],
    times: mx.array,
    prompt: Sequence[Keys],
    features: list[mx.array] | None = None,
    control: Sequence[mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """From the first level's maps to the prediction (B, h, w, C); and the deep map.

    Args:
        unet: the network.
        branch: number of the kept state.
        deep: pixels of the map that meets it, of another call; None for a full call.
        maps: what ``begin`` has left, which is used up.
        times: as ``begin`` was told.
        prompt: likewise.
        features: likewise.
        control: what a ControlNet adds.
    """
    x, skips, stack = unet.descend(maps, times, prompt, features, control)
    steps = unet.way_up
    blocks = [i for i, step in enumerate(steps) if isinstance(step, Resnet)]
    level, layer = place(branch, len(skips), unet.config.layers_per_block + 1)
    cut = blocks[level * (unet.config.layers_per_block + 1) + layer]
    if deep is None:
        x = unet.climb(x, skips, times, stack, steps[:cut])
        x.settle()  # the norm behind it would leave the skip in it, too
        deep = x.value
    else:
        skips = skips[: branch + 1]
        stack = stack[: _prompts_read(steps[cut:])]
        x = Map(deep, None, skips[-1].size)
    return unet.leave(unet.climb(x, skips, times, stack, steps[cut:])), deep


def _prompts_read(steps: Sequence[nn.Module]) -> int:
    return sum(len(step.blocks) for step in steps if isinstance(step, Transformer))


class CachedSteps:
    """Guided steps, compiled, in their full and their shallow form.

    Args:
        steps: the network's.
        branch: number of the kept state.
    """

    def __init__(self, steps: GuidedSteps, branch: int) -> None:
        self.branch = branch
        self._steps = steps
        wrap: Callable[[Any], Any] = Traced if steps.compiles else lambda function: function
        self._full = wrap(partial(self._step, None))
        self._finish = wrap(self._finished)
        self._shallow = wrap(lambda deep, *given: self._step(deep, *given)[0])

    def step(self, interval: int) -> Step:
        """A step for one model, which keeps its features; see ``GuidedSteps.model``."""
        calls = 0
        deep: Any = None  # or that of both halves

        def one(
            kept: mx.array | None,
            latents: mx.array,
            row: mx.array,
            prompt: list[Keys],
            scale: mx.array | None,
        ) -> tuple[mx.array, mx.array]:
            if kept is not None:
                return self._shallow(kept, latents, row, prompt, scale), kept
            return self._full(latents, row, prompt, scale)

        def run(
            latents: mx.array, row: mx.array, prompt: list[Keys], scale: mx.array | None
        ) -> mx.array:
            nonlocal calls, deep
            is_full = calls % interval == 0
            calls += 1
            if scale is not None and self._steps.one_by_one:
                kept = (None, None) if is_full else deep
                first, second = halves(latents.shape[0], row, prompt)
                avoided, deep_avoided = one(kept[0], latents, *first, None)
                later = mx.depends([latents], [avoided])[0]
                wanted, deep_wanted = one(kept[1], later, *second, None)
                deep = deep_avoided, deep_wanted
                return away(avoided, wanted, scale)
            if not is_full or not self._steps.in_parts:
                out, deep = one(None if is_full else deep, latents, row, prompt, scale)
                return out
            parts = self._steps.begin(latents, row, prompt, scale is not None)
            mx.async_eval(parts)
            out, deep = self._finish(latents, parts, row, prompt, scale)
            return out

        return run

    def _finished(
        self,
        latents: mx.array,
        parts: list[mx.array],
        row: mx.array,
        prompt: list[Keys],
        scale: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        set_form(self._steps.unet, self._steps.form)
        maps = self._steps.maps(latents, parts, scale is not None)
        out, deep = climbed(self._steps.unet, self.branch, None, maps, row, prompt)
        return guided_sum(out, scale), deep

    def _step(
        self,
        deep: mx.array | None,
        latents: mx.array,
        row: mx.array,
        prompt: list[Keys],
        scale: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        unet = self._steps.unet
        set_form(unet, self._steps.form)
        maps = unet.begin(twice(latents, scale is not None), row, prompt)
        out, deep = climbed(unet, self.branch, deep, maps, row, prompt)
        return guided_sum(out, scale), deep


def cached_step(steps: GuidedSteps, cache: DeepCache) -> Step:
    """What ``GuidedSteps.model`` makes its steps with, for one model."""
    if steps.cached is None or steps.cached.branch != cache.branch:
        steps.cached = CachedSteps(steps, cache.branch)
    return steps.cached.step(cache.interval)
