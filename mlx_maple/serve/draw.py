"""What can be asked for in one job, and its checks before anything is queued."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_maple.serve.config import Limits

LIMITS = Limits()
# Fields that are pictures, and those that say which networks draw: no arguments of ``generate``.
PICTURES = ("image", "mask")
NETWORKS = ("model", "vae", "loras")
ABOUT = ("previews",)


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
        description='a data: URL, bare base64, or "picture:<id>" of one in the history',
    ),
]


class Lora(BaseModel):
    """One LoRA by the name that GET /api/v1/networks lists."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=300)
    weight: float = Field(1.0, ge=-4, le=4, allow_inf_nan=False)


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
    previews: bool = True

    def said(self) -> dict[str, Any]:
        """What was said, with pictures as true: what is kept of a job."""
        said = self.model_dump(exclude_none=True, exclude={"previews"})
        return {name: True if name in PICTURES else value for name, value in said.items()}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``StableDiffusion.generate``, without pictures."""
        return self.model_dump(exclude_none=True, exclude={*PICTURES, *NETWORKS, *ABOUT})

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
        pixels = (self.width or 512) * (self.height or 512) * (self.count or 1)
        if pixels > LIMITS.pixels:
            raise Undrawable(
                f"{pixels:,} pixels in one job; {LIMITS.pixels:,} at most: draw fewer or smaller"
            )
