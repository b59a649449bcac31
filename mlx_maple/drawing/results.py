"""What is known of a model, how far a drawing is, and what it ends with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_maple.metadata import Settings

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a model: how large it is and what it computes in.

    Attributes:
        parameters: how many numbers.
        bytes: that they take.
        dtype: what it computes in.
        bits: of its quantised weights, 8 or 4; None where they are not quantised.
    """

    parameters: int
    bytes: int
    dtype: str
    bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is known of a loaded model.

    Attributes:
        name: to call it by.
        sha256: of the file it came from, in hexadecimal; "" where that is not known.
        family: such as sd1.
        layout: of the file it came from.
        prediction: what its UNet predicts, epsilon or v_prediction.
        parameters: of all networks together.
        bytes: that their weights take.
        width: in pixels, of the pictures it was made for.
        height: likewise.
        components: each network by name.
        notes: what the loader had to say.
    """

    name: str
    sha256: str
    family: str
    layout: str
    prediction: str
    parameters: int
    bytes: int
    width: int
    height: int
    components: Mapping[str, Component]
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call has drawn.

    Attributes:
        images: RGB.
        latents: (n, h, w, C) float32, the final scaled latents.
        settings: of each image, complete: ``images.save_image`` writes them into its file.
        timings: seconds: text, look (with pictures as prompts), encode (with an image to start
            from), sample, step (the mean, but for the first of several), decode and total. Time in
            the caller's hands is not counted.
        notes: one line for each thing that went otherwise than asked.
    """

    images: list[Image.Image]
    latents: FloatArray
    settings: list[Settings]
    timings: dict[str, float]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a drawing is.

    Attributes:
        index: steps that are done.
        total: steps in all.
        stage: "text", "encode", "sample" (a step was done), "decode" or "done".
        seconds_per_step: so far; 0.0 before the first.
        result: with the stage "done", else None.
    """

    index: int
    total: int
    stage: str
    seconds_per_step: float = 0.0
    result: Result | None = None
    _preview: Callable[[int], Image.Image] | None = None

    def preview(self, image: int = 0) -> Image.Image | None:
        """What is seen so far of one of the images, full size; None before the first step."""
        if self.result is not None:
            return self.result.images[image]
        return None if self._preview is None else self._preview(image)
