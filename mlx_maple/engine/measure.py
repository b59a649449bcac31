"""Timing a network on this device, and networks of a published architecture with random weights.

A figure is the median of calls that were each waited for, after a warm-up that is told apart. What
a device can do when nobody waits, which is how pictures are drawn, is measured beside it: many
calls one after the other, each on what the last one made, and one wait at the end.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_maple.engine.compiled import guided_steps
from mlx_maple.engine.prepare import PreparedUNet
from mlx_maple.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    UNet,
    UNetConfig,
    VAEConfig,
)

TOKENS = 77
TIMES = (937.0, 521.25, 41.0)  # timesteps in turn: no call may live off the last one's embedding


@dataclass(frozen=True)
class Timing:
    """What some calls took.

    Attributes:
        warm_up: seconds of the first calls, which compile and fill caches.
        seconds: of each call after them, waited for.
        in_a_row: seconds a call, of whole rows of calls that were waited for once at the end.
        peak_bytes: the most memory that MLX held meanwhile, weights included.
    """

    warm_up: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    in_a_row: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def row(self) -> dict[str, float | int | None]:
        """The figures of a table, in seconds and bytes."""
        return {
            "median_s": statistics.median(self.seconds),
            "fastest_s": min(self.seconds),
            "slowest_s": max(self.seconds),
            "in_a_row_s": statistics.median(self.in_a_row) if self.in_a_row else None,
            "first_s": self.warm_up[0] if self.warm_up else None,
            "runs": len(self.seconds),
            "peak_bytes": self.peak_bytes,
        }


def timed(
    call: Callable[[], mx.array | Sequence[mx.array]],
    *,
    warm_up: int = 5,
    runs: int = 20,
    rows: int = 3,
) -> Timing:
    """Run ``call`` to the end again and again.

    Args:
        call: describes the work; it is evaluated here.
        warm_up: calls that are timed apart.
        runs: calls that are timed one by one, and also the length of a row.
        rows: rows of ``runs`` calls without a wait between them.
    """
    timing = Timing()
    mx.synchronize()
    mx.reset_peak_memory()
    for seconds, count in ((timing.warm_up, warm_up), (timing.seconds, runs)):
        for _ in range(count):
            start = time.perf_counter()
            mx.eval(call())
            mx.synchronize()
            seconds.append(time.perf_counter() - start)
    for _ in range(rows):
        start = time.perf_counter()
        for _ in range(runs):
            mx.async_eval(call())
        mx.synchronize()
        timing.in_a_row.append((time.perf_counter() - start) / runs)
    return Timing(timing.warm_up, timing.seconds, timing.in_a_row, mx.get_peak_memory())


class UNetStep:
    """The UNet's part of a step, on what the last one left where the channels allow it.

    Args:
        unet: of any form with the UNet's signature and ``config``.
        batch: pictures in one call; two for each that is drawn with guidance.
        height: of the picture in pixels.
        width: likewise.
        dtype: of latents and context.
    """

    def __init__(
        self, unet: nn.Module, batch: int, height: int, width: int, dtype: mx.Dtype
    ) -> None:
        config = cast(UNetConfig, unet.config)
        key = mx.random.key(0)
        shape = (batch, height // 8, width // 8, config.in_channels)
        self.unet = unet
        self.latents = mx.random.normal(shape, key=key).astype(dtype)
        context = (batch, TOKENS, config.cross_attention_dim)
        self.context = mx.random.normal(context, key=key).astype(dtype)
        self.times = [mx.full((batch,), t, dtype=mx.float32) for t in TIMES]
        self.told = {}
        vector = getattr(config, "vector_channels", None)  # mlx-examples has no such word
        if vector is not None:
            self.told["vector"] = mx.random.normal((batch, vector), key=key)
        self.index = 0
        mx.eval(self.latents, self.context, self.times, self.told)

    def __call__(self) -> mx.array:
        """Describe the next call."""
        self.index = (self.index + 1) % len(self.times)
        out = self.unet(self.latents, self.times[self.index], self.context, **self.told)
        if out.shape == self.latents.shape:
            self.latents = out
        return out


class GuidedStep:
    """A guided step as pictures are drawn: the network made ready, its prompt read before.

    Args:
        unet: made ready.
        pictures: at once; each is two in the network's batch.
        height: of the picture in pixels.
        width: likewise.
    """

    def __init__(self, unet: PreparedUNet, pictures: int, height: int, width: int) -> None:
        config = unet.config
        keys = mx.random.split(mx.random.key(0), 3)
        shape = (pictures, height // 8, width // 8, config.in_channels)
        context = (pictures, TOKENS, config.cross_attention_dim)
        self.latents = mx.random.normal(shape, key=keys[0])
        wanted, avoided = (
            mx.random.normal(context, key=key).astype(unet.dtype) for key in keys[1:]
        )
        vectors = None
        if config.vector_channels is not None:
            vector = mx.random.normal((pictures, config.vector_channels), key=keys[1])
            vectors = vector, vector
        self.model = guided_steps(unet).model(wanted, avoided, 7.5, TIMES, vectors=vectors)
        self.index = 0
        mx.eval(self.latents)

    def __call__(self) -> mx.array:
        """Describe the next step."""
        self.index = (self.index + 1) % len(TIMES)
        out = self.model(self.latents, TIMES[self.index])
        if out.shape == self.latents.shape:
            self.latents = out
        return out


SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    num_attention_heads=(5, 10, 20),
    mid_transformer_layers=10,
    cross_attention_dim=2048,
    vector_channels=2816,
)


def random_sdxl_unet(dtype: mx.Dtype) -> UNet:
    """SDXL's UNet with random weights, made on the device in ``dtype``."""
    unet = UNet(SDXL)
    randomise(unet, dtype)
    return unet


def random_sd15(dtype: mx.Dtype, *, parts: Sequence[str] = ()) -> dict[str, nn.Module]:
    """SD 1.5's networks with random weights, made on the device in ``dtype``.

    Args:
        dtype: of all weights.
        parts: which of text_encoder, unet and vae; none named are all.
    """
    made: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: CLIPTextEncoder(CLIPTextConfig()),
        "unet": lambda: UNet(UNetConfig()),
        "vae": lambda: AutoencoderKL(VAEConfig()),
    }
    networks = {part: make() for part, make in made.items() if not parts or part in parts}
    for network in networks.values():
        randomise(network, dtype)
    return networks


def randomise(module: nn.Module, dtype: mx.Dtype) -> None:
    """Give a module random weights in ``dtype`` that keep activations near 1.

    The module must be fresh: arrays that it was made with are replaced before they are evaluated,
    so that no second copy in float32 is ever there.
    """
    key = mx.random.key(0)
    filled = []
    for name, old in cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())):
        if old.ndim == 1:
            fill = mx.ones if name.endswith("weight") else mx.zeros
            new = fill(old.shape, dtype=dtype)
        else:
            key, own = mx.random.split(key)
            bound = (old.size // old.shape[0]) ** -0.5
            new = mx.random.uniform(-bound, bound, old.shape, dtype=dtype, key=own)
        mx.eval(new)
        filled.append((name, new))
    module.update(tree_unflatten(filled))
    module.eval()
