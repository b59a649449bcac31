"""What can be asked for in one job, and its checks before anything is queued."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_maple import enlarge
from mlx_maple.serve.config import Limits

LIMITS = Limits()
MOST_CONTROLS = 3
PICTURES = ("image", "mask")  # fields that are pictures; those of ``controls`` come beside them
# Fields that ``generate`` does not take as they are.
OTHERS = ("model", "vae", "loras", "controls", "previews")


class Undrawable(ValueError):
    """A request that no model could draw; one line."""


def _seed(value: Any) -> Any:
    """A seed as a number; JavaScript sends large ones as text."""
    if isinstance(value, str) and value.lstrip("-").isdigit() and len(value) <= 21:
        return int(value)
    return value


Seed = Annotated[
    int,
    Field(ge=-(2**63), le=2**64 - 1, description="a number, or its digits as text"),
    BeforeValidator(_seed, json_schema_input_type=int | str),
]
PictureIn = Annotated[
    str,
    Field(
        min_length=1,
        max_length=LIMITS.upload,
        description='a data: URL, bare base64, "picture:<id>" of one in the history, or '
        '"input:<job>-<name>" of one that a drawing of it started from',
    ),
]


class Lora(BaseModel):
    """One LoRA by the name that GET /api/v1/networks lists."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=300)
    weight: float = Field(1.0, ge=-4, le=4, allow_inf_nan=False)


class Control(BaseModel):
    """One ControlNet by the name that GET /api/v1/networks lists, and what steers it."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=300)
    image: PictureIn
    weight: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)
    preprocess: Literal["none", "canny", "scribble", "invert"] = "none"


class Draw(BaseModel):
    """What to draw. What is left out or null comes from the model."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "a red maple leaf", "seed": 7},
                {"prompt": "a blue maple leaf", "steps": 4, "sampler": "lcm", "guidance_scale": 1},
            ]
        },
    )

    prompt: str = Field(max_length=LIMITS.prompt)
    negative_prompt: str | None = Field(None, max_length=LIMITS.prompt)
    syntax: Literal["a1111", "plain"] | None = Field(
        None, description="whether brackets in prompts are weights, as A1111 has it"
    )
    model: str | None = Field(None, max_length=300)
    vae: str | None = Field(None, max_length=300)
    loras: list[Lora] | None = Field(None, max_length=16)
    width: int | None = Field(None, ge=LIMITS.width[0], le=LIMITS.width[1], multiple_of=8)
    height: int | None = Field(None, ge=LIMITS.height[0], le=LIMITS.height[1], multiple_of=8)
    steps: int | None = Field(None, ge=LIMITS.steps[0], le=LIMITS.steps[1])
    guidance_scale: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False)
    seed: Seed | None = None
    count: int | None = Field(None, ge=LIMITS.count[0], le=LIMITS.count[1])
    sampler: str | None = Field(None, max_length=40)
    schedule: str | None = Field(None, max_length=40)
    guidance_rescale: float | None = Field(None, ge=0, le=1)
    guidance_start: float | None = Field(None, ge=0, le=1)
    guidance_end: float | None = Field(None, ge=0, le=1)
    tile: Literal["x", "y", "xy"] | None = None
    token_merging: float | None = Field(None, ge=0, le=0.9)
    deep_cache: int | None = Field(None, ge=1, le=100)
    deep_cache_branch: int | None = Field(None, ge=0, le=63)
    window: int | None = Field(None, ge=64, le=2048)
    window_overlap: float | None = Field(None, ge=0, le=0.9)
    hires_scale: float | None = Field(None, ge=1, le=4)
    hires_strength: float | None = Field(None, ge=0.01, le=1)
    hires_steps: int | None = Field(None, ge=LIMITS.steps[0], le=LIMITS.steps[1])
    hires_upscaler: str | None = Field(
        None, max_length=300, description="latent, lanczos, or a name from GET /api/v1/networks"
    )
    eta: float | None = Field(None, ge=0, le=1)
    discard_penultimate: bool | None = None
    noise: Literal["torch", "nvidia", "numpy", "mlx"] | None = None
    clip_skip: int | None = Field(None, ge=1, le=64)
    variation_seed: Seed | None = None
    variation_strength: float | None = Field(None, ge=0, le=1)
    ensd: int | None = Field(None, ge=-(2**63), le=2**63)
    image: PictureIn | None = None
    strength: float | None = Field(None, ge=0, le=1)
    fit: Literal["stretch", "crop"] | None = None
    mask: PictureIn | None = None
    mask_blur: float | None = Field(None, ge=0, le=64)
    image_guidance_scale: float | None = Field(None, ge=0, le=100)
    controls: list[Control] | None = Field(None, max_length=MOST_CONTROLS)
    previews: bool = True

    def said(self) -> dict[str, Any]:
        """What was said, with pictures as true: what is kept of a job."""
        said = self.model_dump(exclude_none=True, exclude={"previews"})
        for control in said.get("controls", ()):
            control["image"] = True
        return {name: True if name in PICTURES else value for name, value in said.items()}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``StableDiffusion.generate``, as JSON, without pictures."""
        found = self.model_dump(exclude_none=True, exclude={*PICTURES, *OTHERS})
        if self.loras is not None:
            found["loras"] = [[lora.name, lora.weight] for lora in self.loras]
        if self.controls:
            for name in ("weight", "start", "end", "preprocess"):
                found[f"control_{name}"] = [getattr(control, name) for control in self.controls]
        return found

    def networks(self) -> list[tuple[str, str]]:
        """Kind and name of each network that it asks for, those named in its prompts among them."""
        from mlx_maple.text.language import without_tags

        found = [("lora", lora.name) for lora in self.loras or ()]
        found += [("controlnet", control.name) for control in self.controls or ()]
        if self.vae:
            found.append(("vae", self.vae))
        if self.hires_upscaler not in (None, *enlarge.BUILT_IN):
            found.append(("upscaler", self.hires_upscaler or ""))
        if self.syntax != "plain":
            for text in (self.prompt, self.negative_prompt or ""):
                found += [("lora", tag.name) for tag in without_tags(text)[1] if tag.kind == "lora"]
        return found

    def check(self) -> None:
        """Refuse what no model could draw.

        Raises:
            Undrawable: in one line.
        """
        from mlx_maple.sampling import SAMPLERS, SCHEDULES, NoiseSchedule, make_plan

        for name, word, known in (
            ("sampler", self.sampler, SAMPLERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if word is not None and word not in known:
                raise Undrawable(f"unknown {name} {word!r}: choose from {', '.join(known)}")
        if self.sampler is not None:
            try:
                make_plan(NoiseSchedule.from_betas(), self.sampler, self.schedule, eta=self.eta)
            except ValueError as error:
                raise Undrawable(str(error).rstrip(".")) from None
        if self.mask is not None and self.image is None:
            raise Undrawable("a mask needs the image that it covers")
        if self.hires_scale is not None and self.image is not None:
            raise Undrawable("hires_scale does not go with an image")
        pixels = (self.width or 512) * (self.height or 512) * (self.count or 1)
        pixels = int(pixels * (self.hires_scale or 1) ** 2)
        if pixels > LIMITS.pixels:
            raise Undrawable(
                f"{pixels:,} pixels in one job; {LIMITS.pixels:,} at most: draw fewer or smaller"
            )
