"""One guided step of the network as one compiled function.

Between two steps of a sampler only the latents, the time and the level change: the step is traced
once for a size and run again with new arrays. Where ``mx.compile`` does not work, it runs as it is.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_maple.engine.prepare import PreparedUNet

# (latents (B, h, w, C) at the network's input scale, timestep) -> guided prediction, float32
Model = Callable[[mx.array, float], mx.array]


class GuidedSteps:
    """A prepared UNet that follows one prompt and avoids another, whatever the drawing.

    Args:
        unet: made ready.
        compiles: whether to compile; see ``compile_works``.
        one_by_one: run the two halves one after the other: half the memory, at the cost of time.
    """

    def __init__(self, unet: PreparedUNet, *, compiles: bool, one_by_one: bool = False) -> None:
        self.unet = unet
        self.one_by_one = one_by_one
        wrap: Callable[[Any], Any] = mx.compile if compiles else lambda function: function
        self._single = wrap(self._predict)
        self._double = wrap(self._guided)

    def model(
        self,
        positive: mx.array,
        negative: mx.array | None,
        guidance_scale: float,
        timesteps: Iterable[float],
    ) -> Model:
        """A model of the samplers': out = n + scale * (p - n), in float32.

        Both prompts are read now, and the given timesteps' rows made; other times cost more.

        Args:
            positive: (B, T, D) states of the prompts.
            negative: likewise, or None for an unguided drawing.
            guidance_scale: 1 is unguided.
            timesteps: that will be asked for.
        """
        is_guided = negative is not None and guidance_scale != 1
        context = mx.concatenate([negative, positive]) if is_guided else positive
        prompt = self.unet.prompt(context)
        known = sorted(set(timesteps))
        rows = {}
        if known:
            made = self.unet.times(mx.array(known, dtype=mx.float32))
            rows = {time: made[i : i + 1] for i, time in enumerate(known)}
            mx.eval(prompt, list(rows.values()))
        scale = mx.array(guidance_scale, dtype=mx.float32)

        def call(latents: mx.array, timestep: float) -> mx.array:
            row = rows.get(timestep)
            if row is None:
                row = self.unet.times(mx.array([timestep], dtype=mx.float32))
            if is_guided:
                return self._double(latents, row, scale, *prompt)
            return self._single(latents, row, *prompt)

        return call

    def _predict(self, latents: mx.array, row: mx.array, *prompt: mx.array) -> mx.array:
        return self.unet.predict(latents, row, prompt).astype(mx.float32)

    def _guided(
        self, latents: mx.array, row: mx.array, scale: mx.array, *prompt: mx.array
    ) -> mx.array:
        if self.one_by_one:
            count = latents.shape[0]
            avoided = self._predict(latents, row, *(each[:count] for each in prompt))
            # MLX would start both at once: the second half waits for the first.
            later = mx.depends([latents], [avoided])[0]
            wanted = self._predict(later, row, *(each[count:] for each in prompt))
        else:
            both = self._predict(mx.concatenate([latents, latents]), row, *prompt)
            avoided, wanted = mx.split(both, 2)
        return avoided + scale * (wanted - avoided)


@cache
def compile_works(device: str) -> tuple[bool, str]:
    """Whether ``mx.compile`` gives the right numbers on a device, and a line that says so.

    Args:
        device: any name of it; the one that runs is tried.
    """

    def chain(x: mx.array) -> mx.array:
        return mx.sigmoid(x) * x + mx.square(x - 1)

    x = mx.array(np.linspace(-4, 4, 4096, dtype=np.float32))
    try:
        difference = mx.abs(mx.compile(chain)(x) - chain(x)).max().item()
    except Exception as error:  # a compiler's or a driver's: whatever it is, do without
        return False, f"mx.compile fails on this {device} ({str(error).splitlines()[0][:120]})"
    if not difference < 1e-4:
        return False, f"mx.compile differs by {difference:.1e} on this {device}"
    return True, "mx.compile works"
