"""What SDXL is told beside the prompt and the time: sizes, and its refiner a score.

Legend   P width of the prompt's pooled state; V width of the vector.
Source   Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3; Stability-AI/
         generative-models sgm/modules/encoders/modules.py (ConcatTimestepEmbedderND); the order of
         the numbers as in diffusers 0.42.1 pipelines/stable_diffusion_xl (_get_add_time_ids).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_maple.conditioning import Conditioning
from mlx_maple.models.layers import sinusoids

Pair = tuple[int, int]
LARGEST = 1 << 16  # pixels along a side
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # diffusers' and A1111's
REFINER = "sdxl-refiner"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that a picture is said to have; None is that of the drawing itself.

    Attributes:
        original: width and height of the picture that it is cut from: small ones look coarse.
        crop: pixels cut off at the left and at the top.
        target: width and height of the picture.
        score: how much it is to please, about 1 to 10; read by the refiner instead of ``target``.
        negative_score: likewise, of what is avoided.
    """

    original: Pair | None = None
    crop: Pair = (0, 0)
    target: Pair | None = None
    score: float = AESTHETIC_SCORE
    negative_score: float = NEGATIVE_AESTHETIC_SCORE

    def numbers(self, size: Pair, family: str, *, is_negative: bool = False) -> list[float]:
        """All numbers in the network's order, heights before widths.

        Args:
            size: width and height of the drawing.
            family: of the model.
            is_negative: of what is avoided.
        """
        width, height = size if self.original is None else self.original
        left, top = self.crop
        if family == REFINER:
            return [height, width, top, left, self.negative_score if is_negative else self.score]
        to_width, to_height = size if self.target is None else self.target
        return [height, width, top, left, to_height, to_width]


def with_vector(
    conditioning: Conditioning, numbers: Sequence[float], channels: int
) -> Conditioning:
    """The same with its vector (1, V): the pooled state (1, P), then each number as waves.

    Args:
        conditioning: of one prompt, with its pooled state.
        numbers: that the network is told.
        channels: V.
    """
    pooled = conditioning.pooled
    assert pooled is not None
    width = (channels - pooled.shape[-1]) // len(numbers)
    waves = sinusoids(mx.array(list(numbers), dtype=mx.float32), width).reshape(1, -1)
    vector = mx.concatenate([pooled.astype(mx.float32), waves], axis=-1)
    return replace(conditioning, vector=vector)


def zeroed(conditioning: Conditioning) -> Conditioning:
    """A prompt of nothing at all, which SDXL was trained with where a prompt was left out."""
    pooled = conditioning.pooled
    return Conditioning(
        context=mx.zeros_like(conditioning.context),
        pooled=None if pooled is None else mx.zeros_like(pooled),
    )


def read_pair(name: str, value: object, low: int) -> Pair | None:
    """Two whole numbers, as a pair or written "1024x768" or "0,0"; None stays None.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    parts: Sequence[object] = ()
    if isinstance(value, str):
        words = value.lower().replace("x", ",").split(",")
        parts = [int(word) if word.strip().isdecimal() else word for word in words]
    elif isinstance(value, list | tuple):
        parts = value
    numbers = [n for n in parts if isinstance(n, int) and not isinstance(n, bool)]
    if len(parts) != 2 or len(numbers) != 2 or not all(low <= n <= LARGEST for n in numbers):
        raise ValueError(
            f"{name} must be two whole numbers from {low} to {LARGEST}, such as 1024x768, "
            f"got {repr(value)[:60]}."
        )
    return numbers[0], numbers[1]
