"""One call's arguments, checked and complete."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from mlx_maple import enlarge
from mlx_maple.adapters import Chosen
from mlx_maple.control import Control
from mlx_maple.drawing.masked_area import MaskedArea
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.drawing.results import FloatArray
from mlx_maple.image_prompt import ImageRequest
from mlx_maple.metadata import Settings
from mlx_maple.models.forms import Form
from mlx_maple.sampling import Plan
from mlx_maple.sizes import Sizes
from mlx_maple.text.language import Prompt

Picture = Image.Image | NDArray[Any]
StepNoise = Callable[[int, tuple[int, ...]], Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call's arguments, checked and complete.

    Attributes:
        settings: of each picture.
        plan: the sampler's.
        size: width and height in pixels.
        shape: (n, h, w, C).
        guidance_scale: 1 is unguided.
        clip_skip: 1 is the last layer.
        form: of the networks.
        prompt: taken apart.
        negative: likewise; None where nothing is avoided.
        loras: that the networks carry; None where the model takes none.
        latents: of ``shape``: starting noise that was given.
        step_noise: the steps' noise that was given.
        picture: RGB, at the size to draw.
        mask: (H, W) of 0 to 1, blurred.
        area: where only the masked part is drawn: it, and the whole that it goes back into.
        edited: RGB, at the size to draw: what an instruction changes.
        depth: grey: what the network is to follow.
        controls: pictures that steer.
        image_prompts: pictures that are looked at beside the text.
        told: the guidance scale where the network is told it, else None.
        image_guidance: how far an edit stays with its picture.
        sizes: that SDXL is told; other models are told none.
        refiner: the model that draws the last part, or None.
        refiner_start: share of the way from which it does.
        preview: how to preview.
        notes: what is already known to go otherwise than asked.
        second: a larger drawing that begins with what this one ends with.
        upscale: what enlarges this one's pictures for it; None takes latents or Lanczos.
        is_second: whether it is such a drawing.
    """

    settings: list[Settings]
    plan: Plan
    size: tuple[int, int]
    shape: tuple[int, int, int, int]
    guidance_scale: float
    clip_skip: int
    form: Form
    prompt: Prompt
    negative: Prompt | None
    loras: Chosen | None
    latents: FloatArray | None
    step_noise: StepNoise | None
    picture: Image.Image | None
    mask: FloatArray | None
    area: MaskedArea | None
    edited: Image.Image | None
    depth: Image.Image | None
    controls: list[Control]
    image_prompts: list[ImageRequest]
    told: float | None
    image_guidance: float | None
    sizes: Sizes
    refiner: DiffusionModel | None
    refiner_start: float
    preview: str
    notes: list[str]
    second: "Job | None" = None
    upscale: enlarge.Upscaler | None = None
    is_second: bool = False

    @property
    def count(self) -> int:
        """How many pictures."""
        return self.shape[0]

    @property
    def is_fresh(self) -> bool:
        """Whether the starting latents are noise alone.

        So also where a masked part is redrawn with strength 1, as in diffusers.
        """
        if self.is_second:
            return False
        return self.picture is None or (self.mask is not None and self.settings[0].strength == 1)

    @property
    def largest(self) -> "Job":
        """The drawing whose size the pictures have."""
        return self if self.second is None else self.second

    @property
    def prompts(self) -> list[Prompt]:
        """All that is to be encoded for it."""
        own = [prompt for prompt in (self.prompt, self.negative) if prompt is not None]
        return own if self.second is None else own + self.second.prompts
