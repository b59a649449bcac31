"""Networks ready to draw, and one guided step of the UNet as one compiled function.

Between two steps of a sampler only the latents, the time and the level change: the step is traced
once for a size and run again with new arrays. Where ``mx.compile`` does not work, it runs as it is.
A step is two functions, so that the device need not wait until all of it is described.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_maple.engine.attention import LOW_MEMORY_SCORE_BYTES, SCORE_BYTES, running_backend
from mlx_maple.engine.kernels import Size
from mlx_maple.engine.prepare import Keys, Map, PreparedUNet, PreparedVAE, Recipe, prepare_unet
from mlx_maple.engine.prepared_control import prepare_controlnet
from mlx_maple.engine.prepared_forms import set_form
from mlx_maple.engine.traced import Traced
from mlx_maple.models import AutoencoderKL, ControlNet, UNet
from mlx_maple.sampling.denoiser import rescale

ROOM = 256 << 20  # bytes that may be in use beside the networks, and for each cell of the latents
ROOM_PER_CELL = 88 << 10

# (latents (B, h, w, C) at the network's input scale, timestep) -> guided prediction, float32
Model = Callable[[mx.array, float], mx.array]
# (latents, row of its time, prompt, scale of ``away`` or None) -> guided prediction, float32
Step = Callable[[mx.array, mx.array, list[Keys], mx.array | None], mx.array]


class GuidedSteps:
    """A prepared UNet that follows one prompt and avoids another, whatever the drawing.

    They are steps of the form that the network is in when they are made, and bring it back into
    that one where they are traced after another drawing had it in its own.

    Args:
        unet: made ready.
        compiles: whether to compile; see ``compile_works``.
        one_by_one: run the two halves one after the other, each as a function of its own: half the
            memory, at the cost of time.
        in_parts: let the device begin with the first level while this side describes the others.
    """

    def __init__(
        self,
        unet: PreparedUNet,
        *,
        compiles: bool,
        one_by_one: bool = False,
        in_parts: bool = True,
    ) -> None:
        self.unet = unet
        self.form = unet.form
        self.compiles = compiles
        self.one_by_one = one_by_one
        self.in_parts = in_parts and not one_by_one
        self.cached: Any = None  # engine.deep_cache's form of them
        wrap: Callable[[Any], Any] = Traced if compiles else lambda function: function
        self._whole = wrap(self._step)
        self.begin = wrap(self._begun)
        self._finish = wrap(self._finished)
        # What ``begin`` leaves for latents of a shape, once or twice: of each map its size, and
        # whether a residual comes with it.
        self._maps: dict[tuple[int, ...], list[tuple[Size, bool]]] = {}

    def model(
        self,
        positive: mx.array,
        negative: mx.array | None,
        guidance_scale: float,
        timesteps: Iterable[float],
        *,
        guidance_rescale: float = 0.0,
        vectors: tuple[mx.array, mx.array | None] | None = None,
        images: Sequence[tuple[list[mx.array], list[mx.array]]] = (),
        shows: Callable[[float], Sequence[int]] | None = None,
        step: Step | None = None,
    ) -> Model:
        """A model of the samplers': out = n + scale * (p - n), in float32.

        Both prompts are read now, and the given timesteps' rows made; other times cost more.

        Args:
            positive: (B, T, D) states of the prompts.
            negative: likewise, or None for an unguided drawing.
            guidance_scale: 1 is unguided.
            timesteps: that will be asked for.
            guidance_rescale: share of the result that is brought back to the spread of p.
            vectors: (B, V) of the prompts and of what is avoided, for networks that take one.
            images: of each image prompt, for the prompts and for what is avoided, the keys and
                values (B, S, 2 C) of every cross-attention.
            shows: a timestep to the numbers of those that are seen then; None sees all.
            step: what makes each; None is the network itself.
        """
        step = self.step if step is None else step
        is_guided = negative is not None and guidance_scale != 1
        context = positive
        if negative is not None and is_guided:
            context = mx.concatenate([negative, positive])
        vector = None
        if vectors is not None:
            wanted, avoided = vectors
            vector = (
                wanted if avoided is None or not is_guided else mx.concatenate([avoided, wanted])
            )
        seen = [
            [mx.concatenate([a, w]) for w, a in zip(*each, strict=True)] if is_guided else each[0]
            for each in images
        ]
        prompt = self.unet.prompt(context, seen)

        def rows_at(times: list[float]) -> list[mx.array]:
            """What each time tells the network: one row for all samples, or one for each."""
            each = 1 if vector is None else vector.shape[0]
            repeated = mx.repeat(mx.array(times, dtype=mx.float32), each)
            more = None if vector is None else mx.tile(vector, (len(times), 1))
            return list(mx.split(self.unet.times(repeated, more), len(times)))

        known = sorted(set(timesteps))
        rows = {}
        if known:  # made now, and all at once
            rows = dict(zip(known, rows_at(known), strict=True))
            mx.eval(prompt, list(rows.values()))
        far = [guidance_scale, guidance_rescale] if guidance_rescale else guidance_scale
        scale = mx.array(far, dtype=mx.float32)
        every = tuple(range(len(images)))
        forms = {every: prompt}  # by what is seen of the images

        def call(latents: mx.array, timestep: float) -> mx.array:
            row = rows.get(timestep)
            if row is None:
                (row,) = rows_at([timestep])
            which = every if shows is None else tuple(shows(timestep))
            if which not in forms:
                forms[which] = [_some(keys, which) for keys in prompt]
            return step(latents, row, forms[which], scale if is_guided else None)

        return call

    def step(
        self, latents: mx.array, row: mx.array, prompt: list[Keys], scale: mx.array | None
    ) -> mx.array:
        """One step: of latents, a time's row, a prompt and, where it is guided, how far."""
        if scale is not None and self.one_by_one:
            first, second = halves(latents.shape[0], row, prompt)
            avoided = self._whole(latents, *first, None)
            # MLX would start both at once: the second half waits for the first.
            later = mx.depends([latents], [avoided])[0]
            return away(avoided, self._whole(later, *second, None), scale)
        if not self.in_parts:
            return self._whole(latents, row, prompt, scale)
        parts = self.begin(latents, row, prompt, scale is not None)
        mx.async_eval(parts)
        return self._finish(latents, parts, row, prompt, scale)

    def _step(
        self, latents: mx.array, row: mx.array, prompt: list[Keys], scale: mx.array | None
    ) -> mx.array:
        set_form(self.unet, self.form)
        maps = self.unet.begin(twice(latents, scale is not None), row, prompt)
        return guided_sum(self.unet.finish(maps, row, prompt), scale)

    def again(self) -> "GuidedSteps":
        """Others for the same network in the form that it is in now, to be traced anew."""
        parts = self.in_parts
        return GuidedSteps(
            self.unet, compiles=self.compiles, one_by_one=self.one_by_one, in_parts=parts
        )

    def _begun(
        self, latents: mx.array, row: mx.array, prompt: list[Keys], is_guided: bool
    ) -> list[mx.array]:
        set_form(self.unet, self.form)
        maps = self.unet.begin(twice(latents, is_guided), row, prompt)
        key = (*latents.shape, is_guided)
        self._maps[key] = [(each.size, each.residual is not None) for each in maps]
        return [part for each in maps for part in each.parts]

    def _finished(
        self,
        latents: mx.array,
        parts: list[mx.array],
        row: mx.array,
        prompt: list[Keys],
        scale: mx.array | None,
    ) -> mx.array:
        set_form(self.unet, self.form)
        maps = self.maps(latents, parts, scale is not None)
        return guided_sum(self.unet.finish(maps, row, prompt), scale)

    def maps(self, latents: mx.array, parts: list[mx.array], is_guided: bool) -> list[Map]:
        """The maps whose parts ``begin`` has made for such latents."""
        left, key = iter(parts), (*latents.shape, is_guided)
        return [
            Map(next(left), next(left) if has_residual else None, size)
            for size, has_residual in self._maps[key]
        ]


def _some(keys: Keys, which: Sequence[int]) -> Keys:
    """A cross-attention's keys and values with some of its image prompts."""
    if isinstance(keys, mx.array) or not which:
        return keys if isinstance(keys, mx.array) else keys[0]
    return [keys[0], *[keys[1 + number] for number in which]]


Half = tuple[mx.array, list[Keys]]


def halves(count: int, row: mx.array, prompt: list[Keys]) -> tuple[Half, Half]:
    """The row of a time and the prompt for what is avoided, and both for what is wanted.

    Each is for a call of its own: in one compiled function MLX would find that both halves turn
    the same stored weights into numbers, and keep all of them for the second.

    Args:
        count: pictures.
        row: one for all samples, or one for each.
        prompt: keys and values of both.
    """
    parts = slice(count), slice(count, None)
    rows = (row, row) if row.shape[0] == 1 else (row[parts[0]], row[parts[1]])
    keys = [
        [k[part] if isinstance(k, mx.array) else [each[part] for each in k] for k in prompt]
        for part in parts
    ]
    return (rows[0], keys[0]), (rows[1], keys[1])


def twice(latents: mx.array, is_guided: bool) -> mx.array:
    """The latents for what is avoided and for what is wanted."""
    return mx.concatenate([latents, latents]) if is_guided else latents


def guided_sum(out: mx.array, scale: mx.array | None) -> mx.array:
    """In float32 what ``away`` makes of both halves, [n, p]; without a scale what there is."""
    out = out.astype(mx.float32)
    if scale is None:
        return out
    avoided, wanted = mx.split(out, 2)
    return away(avoided, wanted, scale)


def away(avoided: mx.array, wanted: mx.array, scale: mx.array) -> mx.array:
    """Guide from n, what is avoided, to p and beyond it: n + scale * (p - n), float32.

    Args:
        avoided: n.
        wanted: p.
        scale: (), or (2,) with the share of the result that is brought back to the spread of p.
    """
    if not scale.ndim:
        return avoided + scale * (wanted - avoided)
    return rescale(avoided + scale[0] * (wanted - avoided), wanted, scale[1])


def made_ready(
    network: nn.Module,
    *,
    compiles: bool = True,
    low_memory: bool = False,
    consumes: bool = False,
) -> nn.Module:
    """A UNet, a ControlNet or an autoencoder as the device that runs draws fastest with.

    Any other network stays as it is.

    On the CPU that is as it is, too: there BLAS rounds by the size of its matrices, and the same
    picture is to come out whatever is drawn beside it. What has been made ready, stays.

    Args:
        network: with its weights.
        compiles: whether ``mx.compile`` may be used.
        low_memory: whether memory matters more than time; the autoencoder's own ways to save it
            are kept then.
        consumes: whether the plain network may be emptied. Its weights then go one by one as they
            are joined, where both would be held for a moment otherwise (0.2 GB of SD 1's 1.7).
    """
    backend = running_backend()
    if backend == "cpu":
        return network
    works = compiles and compile_works(backend)[0]
    score_bytes = LOW_MEMORY_SCORE_BYTES if low_memory else SCORE_BYTES
    if type(network) is UNet or type(network) is ControlNet:
        recipe = replace(Recipe.usual(network.conv_in.weight.dtype), score_bytes=score_bytes)
        if isinstance(network, UNet):
            ready = prepare_unet(network, recipe)
            ready.steps = GuidedSteps(ready, compiles=works, one_by_one=low_memory)
        else:
            ready = prepare_controlnet(network, recipe)
            if works:
                ready.compile()
        if consumes:
            network.clear()
        parameters = tree_flatten(ready.parameters())
        assert isinstance(parameters, list)
        for some in [[pair] for pair in parameters] if consumes else [parameters]:
            mx.eval([value for _, value in some])
        ready.fix()
    elif type(network) is AutoencoderKL and not low_memory:
        # Each half is read when it is first used: a picture from text alone needs no encoder.
        ready = PreparedVAE(network, Recipe.usual(network.post_quant_conv.weight.dtype))
        ready.encoder.in_stages = ready.decoder.in_stages = True
        if works:
            ready.compile()
    else:
        return network
    return ready


def guided_steps(unet: PreparedUNet) -> GuidedSteps:
    """The steps of a UNet that was made ready, compiled where that works."""
    if unet.steps is None:
        unet.steps = GuidedSteps(unet, compiles=compile_works(running_backend())[0])
    return unet.steps


def room(shape: tuple[int, ...], is_guided: bool, backend: str | None = None) -> int | None:
    """Bytes beside the networks that a drawing may take before MLX waits for the device.

    MLX prepares a step while the one before it runs, and what is prepared holds memory: without a
    bound two steps' of it. A hundred operations ahead of the device are as good for speed; this is
    what they take. None where MLX need not be bounded: a Mac's batches are small.

    Args:
        shape: of the latents, (n, h, w, C).
        is_guided: whether each picture goes through the network twice.
        backend: that is asked for; None is the one that runs.
    """
    if (running_backend() if backend is None else backend) != "cuda":
        return None
    pictures, rows, columns, _ = shape
    return ROOM + ROOM_PER_CELL * rows * columns * pictures * (2 if is_guided else 1)


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
        difference = float(np.abs(np.array(mx.compile(chain)(x)) - np.array(chain(x))).max())
    except Exception as error:  # a compiler's or a driver's: whatever it is, do without
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        return False, f"mx.compile fails on this {device} ({reason})"
    if not difference < 1e-4:
        return False, f"mx.compile differs by {difference:.1e} on this {device}"
    return True, "mx.compile works"
