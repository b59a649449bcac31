"""What a drawing's network is shown beside noise, time and words: pictures, depth, a scale.

Legend   n pictures at once; H, W pixel rows and columns; h, w latent ones; C latent channels; T
         prompt tokens; D their width. Channels last.
Source   More input channels: Rombach et al. 2022 (arXiv:2112.10752), section 4.5 (inpainting);
         Brooks et al. 2022 (arXiv:2211.09800), equation 3 (instructions); runwayml/
         stable-diffusion and Stability-AI/stablediffusion for their order. ControlNets: Zhang et
         al. 2023 (arXiv:2302.05543). A scale that is told: Luo et al. 2023 (arXiv:2310.04378). All
         of it as in diffusers 0.42.1's pipelines.
Differs  A picture's latents are its posterior's mean. An inpainting network without a picture is
         shown an empty one that is to be drawn everywhere, as AUTOMATIC1111's web UI does.

What is given is read here and checked before anything runs; the networks are the pipeline's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_maple import images
from mlx_maple.image_prompt import ImagePrompt
from mlx_maple.metadata import check_number
from mlx_maple.models import ControlNet, T2IAdapter, TAESDConfig, UNetConfig, VAEConfig
from mlx_maple.preprocess import PREPROCESSORS

FloatArray = NDArray[np.float32]
Picture = Image.Image | NDArray[Any]
# (latents (B, h, w, C), timesteps (B,), context (B, T, D), …) -> predictions (B, h, w, C)
UNetCall = Callable[..., mx.array]
Model = Callable[[mx.array, float], mx.array]  # (latents, timestep) -> prediction

IMAGE_GUIDANCE = 1.5  # how far an edit stays with its picture, where no one says
PREFIX = "controlnet"  # of the networks' names: controlnet, controlnet_2, …


def control_name(number: int) -> str:
    """What the ``number``-th network that steers is called among a model's, from 0."""
    return PREFIX if number == 0 else f"{PREFIX}_{number + 1}"


def use_of_channels(config: UNetConfig) -> str:
    """What a UNet is shown beside the latents.

    Returns:
        "" (nothing), "depth", "edit" (a picture to change) or "inpainting" (a mask and what
        lies around it).

    Raises:
        ValueError: for a number of channels of no known use.
    """
    more = config.in_channels - config.out_channels
    uses = {
        0: "",
        1: "depth",
        config.out_channels: "edit",
        config.out_channels + 1: "inpainting",
    }
    if more not in uses:
        raise ValueError(
            f"its UNet takes {config.in_channels} channels, of which {more} are of no known use"
        )
    return uses[more]


def steers_alike(one: UNetConfig, other: UNetConfig) -> bool:
    """Whether what steers one UNet can steer another: whether they keep the same states."""
    names = ("block_out_channels", "layers_per_block", "cross_attention_dim", "vector_channels")
    return all(getattr(one, name) == getattr(other, name) for name in names)


# What is given -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Control:
    """A picture that steers a drawing, ready for its network.

    Attributes:
        network: its name among the model's.
        picture: RGB, of the drawing's size, preprocessed.
        weight: how strongly it steers.
        start: share of the steps from which it does.
        end: and to which.
    """

    network: str
    picture: Image.Image
    weight: float
    start: float
    end: float


def read_controls(
    networks: Sequence[str],
    control_image: Any,
    *,
    weight: Any = 1.0,
    start: Any = 0.0,
    end: Any = 1.0,
    preprocess: Any = "none",
    size: tuple[int, int],
    fit: str,
) -> list[Control]:
    """The pictures for a model's networks that steer, one each and in their order.

    Args:
        networks: their names.
        control_image: a picture, or a list of them; None steers nothing.
        weight: one for all, or a list.
        start: likewise.
        end: likewise.
        preprocess: likewise; words of ``PREPROCESSORS``.
        size: width and height of the drawing.
        fit: how the pictures come to it.

    Raises:
        ValueError: in one line, for what does not fit together.
    """
    if control_image is None:
        return []
    pictures = control_image if isinstance(control_image, list | tuple) else [control_image]
    if not networks:
        raise ValueError("control_image needs a ControlNet: load the model with one.")
    if len(pictures) != len(networks):
        raise ValueError(
            f"control_image has {len(pictures)} pictures for {len(networks)} ControlNets."
        )

    def each(name: str, value: Any) -> list[Any]:
        values = list(value) if isinstance(value, list | tuple) else [value] * len(networks)
        if len(values) != len(networks):
            raise ValueError(f"{name} has {len(values)} entries for {len(networks)} ControlNets.")
        return values

    found = []
    rows = zip(
        networks,
        pictures,
        each("control_weight", weight),
        each("control_start", start),
        each("control_end", end),
        each("control_preprocess", preprocess),
        strict=True,
    )
    for network, picture, one_weight, one_start, one_end, word in rows:
        if word not in PREPROCESSORS:
            known = ", ".join(PREPROCESSORS)
            raise ValueError(f"unknown control_preprocess {word!r}: choose from {known}.")
        begins = check_number("control_start", one_start)
        ends = check_number("control_end", one_end)
        if begins >= ends:
            raise ValueError(f"control_start {begins} is not before control_end {ends}.")
        # Lines are found in the drawing's own pixels: thin ones would not survive another size.
        fitted = images.fitted(images.to_rgb(picture), *size, fit)
        found.append(
            Control(
                network=network,
                picture=PREPROCESSORS[word](fitted),
                weight=float(check_number("control_weight", one_weight)),
                start=float(begins),
                end=float(ends),
            )
        )
    return found


def input_channels(
    use: str,
    vae: VAEConfig | TAESDConfig,
    size: tuple[int, int],
    *,
    encode: Callable[[FloatArray], mx.array],
    picture: Image.Image | None,
    mask: FloatArray | None,
    depth: Image.Image | None,
) -> mx.array | None:
    """What stands behind the latents' own channels in every step: (1, h, w, C'), or None.

    Args:
        use: of those channels, as ``use_of_channels`` says.
        vae: config of the autoencoder.
        size: width and height of the drawing.
        encode: pixels (H, W, 3) in [-1, 1] to scaled latents (1, h, w, C).
        picture: to be edited or filled in, of that size.
        mask: (H, W), white where there is something to draw; None is everywhere.
        depth: grey, bright is near.
    """
    width, height = size
    if use == "depth" and depth is not None:
        return depth_channel(depth, height // vae.downscale, width // vae.downscale)
    if use == "edit" and picture is not None:
        # Not scaled, unlike the latents before it. (TAESD has no factor: SD 1's are its own.)
        factor = getattr(vae, "scaling_factor", VAEConfig.scaling_factor)
        return encode(images.to_pixels(picture)) / factor
    if use != "inpainting":
        return None
    mask = np.ones((height, width), np.float32) if mask is None else mask
    # Without a picture, and where something is to be drawn, there is a middle grey.
    pixels = np.zeros((height, width, 3), np.float32)
    if picture is not None:
        pixels = images.to_pixels(picture) * (mask < 0.5)[..., None]
    cells = mx.array(images.latent_mask(mask, vae.downscale))[None]
    return mx.concatenate([cells, encode(pixels)], axis=-1)


def depth_channel(depth: Image.Image, rows: int, columns: int) -> mx.array:
    """A depth map as a network takes it: (1, h, w, 1) from -1 (far) to 1."""
    grey = depth.convert("F").resize((columns, rows), Image.Resampling.BICUBIC)
    values = np.asarray(grey, np.float32)
    low, high = values.min(), values.max()
    values = np.zeros_like(values) if high <= low else 2 * (values - low) / (high - low) - 1
    return mx.array(values)[None, ..., None]


# While a drawing goes on -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Steering:
    """A control with its network at hand: what ``Shown`` asks for maps.

    Attributes:
        network: gives the ControlNet; it may load it.
        hint: what it has made of the picture: (1, h, w, C) for the ControlNet to look at in every
            step, or a T2I-Adapter's features, which stay the same.
        weight: of the maps.
        start: share of the steps from which it steers.
        end: and to which.
    """

    network: Callable[[], ControlNet]
    hint: mx.array | list[mx.array]
    weight: float
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Shown:
    """All that the UNet is shown in one drawing beside latents, time and words.

    Attributes:
        channels: (1, h, w, C') to stand behind the latents' own, or None.
        guidance: the scale that the network is told, or None.
        steering: what steers.
        images: pictures that are looked at beside the text.
        timesteps: of the drawing's steps, falling; shares of them are counted in it.
        image_guidance: how far an edit stays with its picture; None where nothing is edited.
        holds_mask: whether the channels say where there is something to draw.
    """

    channels: mx.array | None = None
    guidance: float | None = None
    steering: Sequence[Steering] = ()
    images: Sequence[ImagePrompt] = ()
    timesteps: Sequence[float] = ()
    image_guidance: float | None = None
    holds_mask: bool = False

    @property
    def is_told(self) -> bool:
        """Whether the network is told more than numbers that stand beside the latents."""
        return self.guidance is not None or bool(self.steering)

    def without_picture(self) -> "Shown":
        """The same with nothing in the channels: what an edit is compared with."""
        assert self.channels is not None
        return replace(self, channels=mx.zeros_like(self.channels))

    def beside(self, latents: mx.array) -> mx.array:
        """The latents (B, h, w, C) with the channels behind them."""
        if self.channels is None:
            return latents
        shape = (*latents.shape[:3], self.channels.shape[-1])
        channels = mx.broadcast_to(self.channels, shape).astype(latents.dtype)
        return mx.concatenate([latents, channels], axis=-1)

    def joined(self, model: Model) -> Model:
        """A model of a UNet with more channels as one of latents alone."""
        if self.channels is None:
            return model
        return lambda latents, timestep: model(self.beside(latents), timestep)

    def call(self, unet: UNetCall, timestep: float) -> UNetCall:
        """The UNet as it is called at one timestep, with everything that it is told."""
        steering = self.steering_at(timestep)
        if self.guidance is None and not steering:
            return unet

        def predict(
            latents: mx.array, timesteps: mx.array, context: mx.array, *more: Any, **seen: Any
        ) -> mx.array:
            told: dict[str, Any] = seen
            if self.guidance is not None:
                told["guidance"] = mx.full((latents.shape[0],), self.guidance, mx.float32)
            controls = [each for each in steering if not isinstance(each.hint, list)]
            if controls:
                told["control"] = control_maps(controls, latents, timesteps, context, *more)
            if len(controls) < len(steering):
                told["features"] = features(steering, latents.shape[0])
            return unet(latents, timesteps, context, *more, **told)

        return predict

    def steering_at(self, timestep: float) -> list[Steering]:
        """What steers at a timestep."""
        return [each for each in self.steering if self._counts(each, timestep)]

    def images_at(self, timestep: float) -> list[int]:
        """The numbers of the image prompts that are seen at a timestep."""
        return [i for i, each in enumerate(self.images) if self._counts(each, timestep)]

    def _counts(self, each: Steering | ImagePrompt, timestep: float) -> bool:
        """Whether a timestep is in its share: step i of m where start <= i / m, (i + 1) / m <= end.

        A call between two steps counts as of the one before it.
        """
        steps = len(self.timesteps)
        index = max(0, sum(time >= timestep for time in self.timesteps) - 1)
        return each.start <= index / steps and (index + 1) / steps <= each.end


NOTHING = Shown()


def control_maps(
    steering: Sequence[Steering],
    latents: mx.array,
    timesteps: mx.array,
    context: mx.array,
    *more: Any,
) -> list[mx.array]:
    """What all that steers adds to the UNet's kept states, each by its weight."""
    total: list[mx.array] = []
    for each in steering:
        assert isinstance(each.hint, mx.array)
        network = each.network()
        seen = latents[..., : network.config.in_channels]
        maps = network(seen, timesteps, context, each.hint, *more)
        weighted = [each.weight * one for one in maps]
        total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
    return total


def features(steering: Sequence[Steering], batch: int) -> list[mx.array]:
    """What the T2I-Adapters among what steers add to the UNet's way down, each by its weight."""
    total: list[mx.array] = []
    for each in steering:
        if isinstance(each.hint, list):
            weighted = [each.weight * one for one in each.hint]
            total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
    return [mx.broadcast_to(one, (batch, *one.shape[1:])) for one in total]


def read_hint(network: ControlNet | T2IAdapter, picture: Image.Image) -> mx.array | list[mx.array]:
    """What a network makes of the picture that steers, once a drawing."""
    if isinstance(network, T2IAdapter):
        is_grey = network.config.hint_channels == 1
        pixels = np.asarray(picture.convert("L") if is_grey else picture, np.float32) / 255
        return network(mx.array(pixels.reshape(1, *pixels.shape[:2], -1)))
    pixels = (images.to_pixels(picture) + 1) / 2
    return network.embed_hint(mx.array(pixels)[None])


def image_guided(
    followed: Model, plain: Model, blank: Model, guidance_scale: float, image_guidance: float
) -> Model:
    """An edit's three-way guidance: away from nothing to the picture, and on to the instruction.

    Args:
        followed: with the instruction and the picture.
        plain: with the picture, without the instruction.
        blank: with neither.
        guidance_scale: how far to follow the instruction.
        image_guidance: how far to stay with the picture; 1 makes ``blank`` count for nothing.
    """

    def call(latents: mx.array, timestep: float) -> mx.array:
        # One after the other, whoever evaluates: one network's memory.
        wanted = followed(latents, timestep)
        avoided = plain(mx.depends([latents], [wanted])[0], timestep)
        out = avoided + guidance_scale * (wanted - avoided)
        if image_guidance == 1:
            return out
        empty = blank(mx.depends([latents], [avoided])[0], timestep)
        return out + (image_guidance - 1) * (avoided - empty)

    return call


def describe_controls(controls: Sequence[Control], names: Mapping[str, str]) -> str:
    """The controls in a line, for a picture's settings.

    Args:
        controls: of the drawing.
        names: what each network is called by people.
    """
    return "; ".join(
        f"{names.get(each.network, each.network)} (weight {each.weight:g}, "
        f"{each.start:g} to {each.end:g})"
        for each in controls
    )
