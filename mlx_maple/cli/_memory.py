"""Whether a picture fits into memory, asked before it is drawn, and what would fit.

On a GPU MLX raises an error when an allocation fails, and the plan (engine/memory.py) then says
what each part takes. On the CPU nothing does: MLX ends in a segmentation fault where the system
refuses memory, and the system kills the process where it does not. So the two large demands of a
CPU run are estimated: the self-attention scores of the UNet's finest level, which are stored whole
there, and the decoder's last convolutions, which MLX's CPU backend unfolds. Measured on SD 1.5 in
float32 on Linux: 1.34 GB beside the weights for a guided step at 512x512, and 3.6 GB of resident
memory for the decoder. (The plan counts what MLX asks for, not all of which the CPU touches. In
low-memory mode the two are nearly the same, and the plan is asked.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mlx_maple.cli import NO_MEMORY, Failure, _machine, _plan, _terminal

if TYPE_CHECKING:
    from mlx_maple.engine.memory import Plan, Request
    from mlx_maple.pipeline import StableDiffusion

SCORES = 1.25  # what a guided step needs for each byte of its scores
UNFOLDED = 13  # values at each pixel for each channel of the decoder's finest input: 9 + 2 * 2
STEP = 64  # pixels between the sizes that are tried


@dataclass(frozen=True)
class Demand:
    """What decides how much memory a picture takes on the CPU.

    Attributes:
        heads: of the UNet's finest self-attention; 0 where it has none.
        channels: of the decoder's finest block, on its way in.
        itemsize: bytes of an activation.
        batch: pictures in one UNet call, twice their number when guided.
        window: pixels a side that the UNet is shown at once; None is all.
    """

    heads: int
    channels: int
    itemsize: int
    batch: int
    window: int | None = None

    def bytes(self, width: int, height: int) -> float:
        """Peak beside the weights, for one size in pixels."""
        seen = [side if self.window is None else min(side, self.window) for side in (width, height)]
        tokens = (seen[0] // 8) * (seen[1] // 8)
        scores = SCORES * self.batch * self.heads * tokens**2 * self.itemsize
        return max(scores, UNFOLDED * self.channels * width * height * self.itemsize)

    def largest(self, width: int, height: int, free: float) -> tuple[int, int] | None:
        """The largest size of about the same proportions that fits, or None."""
        for divisor in range(1, max(width, height) // STEP + 1):
            scale = 1 - divisor * STEP / max(width, height)
            smaller = (int(width * scale) // 8 * 8, int(height * scale) // 8 * 8)
            if min(smaller) >= STEP and self.bytes(*smaller) <= free:
                return smaller
        return None


def check(sd: "StableDiffusion", arguments: Mapping[str, Any]) -> None:
    """End before MLX does, on the CPU, when a picture is certain not to fit."""
    import mlx.core as mx

    free = _machine.free_memory()
    if free is None or mx.default_device() != mx.Device(mx.DeviceType.cpu):
        return
    width, height = _size(sd, arguments)
    demand = _demand(sd, arguments)
    if not sd.is_low_memory and demand.bytes(width, height) <= free:
        return
    plan = plan_of(_plan.request_of(sd, arguments, low_memory=sd.is_low_memory))
    needed = plan.peak if sd.is_low_memory else demand.bytes(width, height)
    if needed <= free:
        return
    fits = [f"{words} ({_terminal.size(peak)} in all)" for words, peak in _fits(sd, plan, free)]
    if not sd.is_low_memory and (size := demand.largest(width, height, free)):
        fits.append(f"-W {size[0]} -H {size[1]}")
    advice = f"{' or '.join(fits)} would fit" if fits else "close other programs"
    beside = "" if sd.is_low_memory else " beside the model's"
    raise Failure(
        NO_MEMORY,
        f"{width}x{height} needs about {_terminal.size(needed)} of memory{beside} and "
        f"{_terminal.size(free)} are free: {advice} (the weights: {_plan.weights_in_words(plan)})",
    )


def plan_of(request: "Request") -> "Plan":
    """A request's plan, kept: each new one takes 0.4 MB that MLX 0.32.4 does not return."""
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    return _kept_plan(**{**values, "configs": tuple(request.configs.items())})


@lru_cache(maxsize=64)
def _kept_plan(configs: tuple[tuple[str, Any], ...], **values: Any) -> "Plan":
    from mlx_maple.engine.memory import Plan, Request

    return Plan(Request(configs=dict(configs), **values))


def _fits(sd: "StableDiffusion", plan: "Plan", free: float) -> list[tuple[str, int]]:
    """What takes less and fits, the least change first."""
    from mlx_maple.engine.memory import advice

    if sd.is_low_memory:
        return advice(plan.request, int(free))
    return [(words, peak) for words, peak in _plan.less(plan) if peak <= free][:1]


def _demand(sd: "StableDiffusion", arguments: Mapping[str, Any]) -> Demand:
    from mlx_maple.models import TAESDConfig

    unet, vae = sd.configs["unet"], sd.configs["vae"]
    widths = (vae.width,) if isinstance(vae, TAESDConfig) else vae.block_out_channels
    guidance = arguments.get("guidance_scale")
    guidance = sd.defaults["guidance_scale"] if guidance is None else guidance
    return Demand(
        heads=unet.num_attention_heads[0] if unet.transformer_layers[0] else 0,
        channels=widths[min(1, len(widths) - 1)],
        itemsize=4 if sd.info.components["unet"].dtype == "float32" else 2,
        batch=1 if guidance == 1 else 2,
        window=arguments.get("window"),
    )


def _size(sd: "StableDiffusion", arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The largest size that is drawn, as far as the command says it; else the model's own."""
    from mlx_maple.enlarge import larger

    width, height = arguments.get("width"), arguments.get("height")
    own = sd.defaults["width"], sd.defaults["height"]
    size = own[0] if width is None else width, own[1] if height is None else height
    scale = arguments.get("hires_scale")
    return size if scale is None else larger(size, scale, sd.configs["vae"].downscale)


def refused(sd: "StableDiffusion", arguments: Mapping[str, Any], error: RuntimeError) -> Failure:
    """What each part takes and what would fit, in words."""
    from mlx_maple.engine.memory import Plan, advice

    plan = Plan(_plan.request_of(sd, arguments, low_memory=sd.is_low_memory))
    has = _machine.device_memory()
    # It did not fit, whatever the device is said to have.
    free = plan.peak - 1 if has is None else min(has, plan.peak - 1)
    tries = [f"{words} ({_terminal.size(n)})" for words, n in advice(plan.request, free)]
    if sd.info.components["unet"].dtype == "float32":
        tries.append("--dtype float16")
    tries = tries or ["a smaller size, or closing other programs"]
    width, height, count = plan.request.width, plan.request.height, plan.request.count
    what = f"{width}x{height}" + (f", {count} at once" if count > 1 else "")
    return Failure(
        NO_MEMORY,
        f"out of memory drawing {what}: try {' or '.join(tries)}; {_plan.in_words(plan)} ({error})",
    )
