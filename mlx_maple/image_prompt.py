"""Pictures as prompts: what an IP-Adapter makes of them for one drawing.

Legend   n pictures; S side in pixels; T tokens of them all; C channels of an attention.
Source   Ye et al. 2023 (arXiv:2308.06721). What CLIP is shown: transformers 5.23.0 models/clip/
         image_processing_pil_clip.py. What stands for no picture: diffusers 0.42.1's
         StableDiffusionPipeline.encode_image: zeros, for an adapter that reads the projection of
         a whole picture; else what the encoder says of a picture in CLIP's mean colour.
Differs  Several pictures for one adapter are looked at side by side, as in diffusers without masks.
         A share of the steps is our own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_maple import images
from mlx_maple.metadata import check_number
from mlx_maple.models import CLIPVisionEncoder, ImageStates, IPAdapter, UNetConfig

PREFIX = "ip_adapter"  # of the networks' names: ip_adapter, ip_adapter_2, …
ENCODER = "image_encoder"  # likewise
# Of the pictures that CLIP was trained on, in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MOST_PICTURES = 16  # for one adapter
LONGEST = 64  # times as long as it is wide is a picture whose ends are not looked at


def numbered(prefix: str, number: int) -> str:
    """What the ``number``-th network of a kind is called among a model's, from 0."""
    return prefix if number == 0 else f"{prefix}_{number + 1}"


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Pictures for one adapter.

    Attributes:
        adapter: its name among the model's networks.
        pictures: RGB, of any sizes.
        scale: how strongly they count.
        start: share of the steps from which they do.
        end: and to which.
    """

    adapter: str
    pictures: Sequence[Image.Image]
    scale: float
    start: float
    end: float


def read_image_prompts(
    adapters: Sequence[str], ip_image: Any, *, scale: Any = 1.0, start: Any = 0.0, end: Any = 1.0
) -> list[ImageRequest]:
    """The pictures for a model's IP-Adapters, in their order.

    Args:
        adapters: their names.
        ip_image: for one adapter a picture, or a list of some that are looked at together; for
            several a list of such, one each. None prompts nothing.
        scale: one for all, or a list.
        start: likewise.
        end: likewise.

    Raises:
        ValueError: in one line, for what does not fit together.
    """
    if ip_image is None:
        return []
    if not adapters:
        raise ValueError("ip_image needs an IP-Adapter: load the model with one.")
    several = list(ip_image) if isinstance(ip_image, list | tuple) else [ip_image]
    if len(adapters) == 1 and not any(isinstance(each, list | tuple) for each in several):
        several = [several]
    if len(several) != len(adapters):
        raise ValueError(f"ip_image has {len(several)} entries for {len(adapters)} IP-Adapters.")

    def each(name: str, value: Any) -> Iterator[float]:
        values = list(value) if isinstance(value, list | tuple) else [value] * len(adapters)
        if len(values) != len(adapters):
            raise ValueError(f"{name} has {len(values)} entries for {len(adapters)} IP-Adapters.")
        return (float(check_number(name, one)) for one in values)

    found = []
    scales, starts = each("ip_scale", scale), each("ip_start", start)
    for adapter, given, one, begins, ends in zip(
        adapters, several, scales, starts, each("ip_end", end), strict=True
    ):
        pictures = list(given) if isinstance(given, list | tuple) else [given]
        if not 1 <= len(pictures) <= MOST_PICTURES:
            raise ValueError(f"ip_image has {len(pictures)} pictures, not 1 to {MOST_PICTURES}.")
        if begins >= ends:
            raise ValueError(f"ip_start {begins} is not before ip_end {ends}.")
        shown = [images.to_rgb(picture) for picture in pictures]
        found.append(
            ImageRequest(adapter=adapter, pictures=shown, scale=one, start=begins, end=ends)
        )
    return found


def describe_image_prompts(requests: Sequence[ImageRequest], names: Mapping[str, str]) -> str:
    """The image prompts in a line, for a picture's settings.

    Args:
        requests: of the drawing.
        names: what each adapter is called by people.
    """
    return "; ".join(
        f"{names.get(each.adapter, each.adapter)} (scale {each.scale:g}, "
        f"{each.start:g} to {each.end:g})"
        for each in requests
    )


def clip_pixels(picture: Image.Image, side: int) -> NDArray[np.float32]:
    """What CLIP is shown of a picture: its middle, (S, S, 3), less the mean, by the deviation."""
    # Its short side is brought to S: of one pixel, a few thousand long, that would be gigabytes.
    width, height = (min(length, LONGEST * min(picture.size)) for length in picture.size)
    if (width, height) != picture.size:
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    short = min(width, height)
    # Whole pixels, rounded down, as there.
    size = [int(side * length / short) if length != short else side for length in (width, height)]
    small = picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    middle = np.asarray(small.crop((left, top, left + side, top + side)), np.float32) / 255
    normed = (middle - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    return normed.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """What a UNet's cross-attentions see of one adapter's pictures in a drawing.

    Attributes:
        wanted: keys and values (1, T, 2C) of each attention, in the order of their use, beside what
            is followed.
        avoided: likewise, beside what is avoided.
        start: share of the steps from which they are seen.
        end: and to which.
    """

    wanted: list[mx.array]
    avoided: list[mx.array]
    start: float
    end: float


def image_prompt(
    request: ImageRequest, encoder: CLIPVisionEncoder, adapter: IPAdapter, unet: UNetConfig
) -> ImagePrompt:
    """Look at the pictures, each by itself; not evaluated."""
    side = encoder.config.image_size
    pixels = [mx.array(clip_pixels(picture, side))[None] for picture in request.pictures]
    wanted = mx.concatenate([adapter.prompt(encoder(each)) for each in pixels], axis=1)
    if adapter.sees_patches:
        nothing = encoder(mx.zeros_like(pixels[0]))
    else:
        empty = mx.zeros((1, encoder.config.projection_dim), wanted.dtype)
        nothing = ImageStates(penultimate=empty, projected=empty)
    # As often as there are pictures: as many keys, and no more weight.
    avoided = mx.concatenate([adapter.prompt(nothing)] * len(pixels), axis=1)
    return ImagePrompt(
        wanted=adapter.keys_values(wanted, unet, request.scale),
        avoided=adapter.keys_values(avoided, unet, request.scale),
        start=request.start,
        end=request.end,
    )
