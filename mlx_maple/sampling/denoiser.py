"""From what the network predicts to the clean latents it implies, and guidance between prompts.

Legend   B images; h, w latent rows and columns; T prompt tokens; D their width. Channels last.
         Latents x = alpha * clean + sigma * noise; samplers of the sigma family have alpha = 1,
         those of the timestep family alpha**2 + sigma**2 = 1.
Source   Karras et al. 2022 (arXiv:2206.00364), equation 7, as crowsonkb/k-diffusion external.py has
         it; Salimans & Ho 2022 (arXiv:2202.00512), v-prediction; Ho & Salimans 2022
         (arXiv:2207.12598), guidance; Lin et al. 2023 (arXiv:2305.08891), equations 15 and 16,
         rescaled guidance.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

import mlx.core as mx

from mlx_maple.sampling.schedule import Grid

# (latents (B, h, w, C) at the network's input scale, timestep) -> raw prediction (B, h, w, C)
Model = Callable[[mx.array, float], mx.array]
# (latents (B, h, w, C), timesteps (B,), context (B, T, D), perhaps a vector (B, V)) -> prediction
UNetCall = Callable[..., mx.array]


class Scalings(NamedTuple):
    """clean = c_skip * x + c_out * network(c_in * x, timestep)."""

    c_in: float
    c_skip: float
    c_out: float


def scalings(prediction: str, alpha: float, sigma: float) -> Scalings:
    """The three factors for latents x = alpha * clean + sigma * noise.

    The network was trained on x / sqrt(alpha**2 + sigma**2), whatever the sampler's coordinates.
    With alpha = 1 these are k-diffusion's for sigma_data = 1; with alpha**2 + sigma**2 = 1 they are
    (x - sigma * noise) / alpha and alpha * x - sigma * v.
    """
    total = sqrt(alpha**2 + sigma**2)
    if prediction == "v_prediction":
        return Scalings(1 / total, alpha / total**2, -sigma / total)
    return Scalings(1 / total, 1 / alpha, -sigma / alpha)


class Denoiser:
    """``denoise(x, at)``: the clean latents that the network sees in ``x`` at a level of the grid.

    No sampler asks what the network predicts. ``at`` is a sigma or a timestep, as the grid has it.
    """

    def __init__(self, model: Model, grid: Grid) -> None:
        self.model = model
        self.grid = grid
        self.prediction = grid.schedule.prediction

    def __call__(self, x: mx.array, at: float) -> mx.array:
        """The clean latents that the network sees in ``x``."""
        return self.clean(x, self.predict(x, at), at)

    def predict(self, x: mx.array, at: float) -> mx.array:
        """What the network says of ``x``: its raw prediction."""
        alpha, sigma, timestep = self.grid.level(at)
        c_in, _, _ = scalings(self.prediction, alpha, sigma)
        return self.model(c_in * x, timestep)

    def clean(self, x: mx.array, raw: mx.array, at: float) -> mx.array:
        """The clean latents that a ``raw`` prediction implies for ``x``."""
        alpha, sigma, _ = self.grid.level(at)
        _, c_skip, c_out = scalings(self.prediction, alpha, sigma)
        return c_skip * x + c_out * raw


def guided(
    unet_call: UNetCall,
    positive: mx.array,
    negative: mx.array | None,
    guidance_scale: float,
    dtype: mx.Dtype,
    *,
    guidance_rescale: float = 0.0,
    together: bool = True,
    vectors: tuple[mx.array, mx.array | None] | None = None,
    images: Sequence[tuple[list[mx.array], list[mx.array]]] = (),
) -> Model:
    """A model that follows ``positive`` and avoids ``negative``: out = n + scale * (p - n).

    Both prompts go through the network in one batch, [negative, positive] along axis 0 as in
    diffusers. Without a negative, or at scale 1 where its share is exactly zero, only the positive
    half runs. The arithmetic is float32 whatever the network's dtype, because the scale multiplies
    the difference of two nearly equal numbers.

    Args:
        unet_call: the network; the timestep reaches it as a float32 array, never as a Python
            number, so that a compiled function is traced once.
        positive: (B, T, D) states of the prompts.
        negative: (B, T, D) states of the negative prompts, or None.
        guidance_scale: 1 follows the prompt as trained; Stable Diffusion's habit is 7.5.
        dtype: what the network computes in; its input is cast to it.
        guidance_rescale: 0 to 1, how far the result's std is brought back to the positive
            prediction's. For models of zero terminal SNR, which overexpose without it (0.7).
        together: both prompts in one batch; else one after the other, so that the network's
            activations take half the memory.
        vectors: (B, V) of the prompts and of the negative prompts, for a network that takes them.
        images: of each image prompt, for the prompts and for the negative prompts, what every
            cross-attention sees of it (B, S, 2C): the network's ``image``.

    Raises:
        ValueError: if the two prompts' shapes differ.
    """
    if negative is not None and negative.shape != positive.shape:
        raise ValueError(
            f"[guided] expected negative and positive states of one shape, "
            f"got {negative.shape} and {positive.shape}."
        )
    if negative is None or guidance_scale == 1:
        context = positive.astype(dtype)
        more = [] if vectors is None else [vectors[0]]
        seen = {"image": [wanted for wanted, _ in images]} if images else {}

        def single(latents: mx.array, timestep: float) -> mx.array:
            timesteps = mx.full((latents.shape[0],), timestep, dtype=mx.float32)
            return unet_call(latents.astype(dtype), timesteps, context, *more, **seen).astype(
                mx.float32
            )

        return single

    contexts = mx.concatenate([negative, positive]).astype(dtype)
    halves: list[list[mx.array]] = [[], []]  # what each half is told beside its prompt
    if vectors is not None:
        assert vectors[1] is not None
        halves = [[vectors[1]], [vectors[0]]]
    joined = [mx.concatenate([a, b]) for a, b in zip(*halves, strict=True)]
    shown: list[dict[str, list[list[mx.array]]]] = [{}, {}, {}]  # to each half, and to both
    if images:
        wanted, avoided = ([each[i] for each in images] for i in (0, 1))
        both = [
            [mx.concatenate([a, b]) for a, b in zip(*pair, strict=True)]
            for pair in zip(avoided, wanted, strict=True)
        ]
        shown = [{"image": avoided}, {"image": wanted}, {"image": both}]

    def double(latents: mx.array, timestep: float) -> mx.array:
        timesteps = mx.full((2 * latents.shape[0],), timestep, dtype=mx.float32)
        if together:
            both = mx.concatenate([latents, latents]).astype(dtype)
            out = unet_call(both, timesteps, contexts, *joined, **shown[2]).astype(mx.float32)
            avoided, wanted = mx.split(out, 2)
        else:
            times, (negatives, positives) = timesteps[: latents.shape[0]], mx.split(contexts, 2)
            avoided = unet_call(latents.astype(dtype), times, negatives, *halves[0], **shown[0])
            avoided = avoided.astype(mx.float32)
            latents = mx.depends([latents], [avoided])[0]  # not both at once, whoever evaluates
            wanted = unet_call(latents.astype(dtype), times, positives, *halves[1], **shown[1])
            wanted = wanted.astype(mx.float32)
        out = avoided + guidance_scale * (wanted - avoided)
        return rescale(out, wanted, guidance_rescale) if guidance_rescale else out

    return double


def rescale(guided_out: mx.array, wanted: mx.array, share: float | mx.array) -> mx.array:
    """``guided_out`` with ``share`` of it brought to the std of ``wanted``, image by image.

    Reference: Lin et al. 2023, equations 15 and 16; diffusers rescale_noise_cfg.
    """
    axes = list(range(1, wanted.ndim))
    ratio = mx.std(wanted, axis=axes, keepdims=True) / mx.std(guided_out, axis=axes, keepdims=True)
    return guided_out * (share * ratio + (1 - share))
