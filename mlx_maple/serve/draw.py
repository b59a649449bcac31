"""What can be asked for in one job, and its checks before anything is queued."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_maple import enlarge
from mlx_maple.serve.config import Limits, pixels_of

LIMITS = Limits()
MOST_CONTROLS = 3  # so of each kind
# Fields that are pictures; those of ``controls`` come beside them.
PICTURES = ("image", "mask", "depth_image")
LOADING = ("quantize", "low_memory", "dtype")  # arguments of ``load``
# Fields that ``generate`` does not take as they are.
OTHERS = ("model", "unet", "vae", "taesd", "refiner", "loras", "controls", "image_prompts")
OTHERS += ("previews", "zeroed_negative")
LISTED = {"controls": "control", "image_prompts": "ip_image"}  # fields with pictures, and whose
USUAL_LARGEST = 1024, 1024  # of models: what a drawing without a size has at most, as a rule


class Undrawable(ValueError):
    """A request that no model could draw; one line.

    Attributes:
        field: of the request, that it is about.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        self.field = field
        super().__init__(message)


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
Pair = Annotated[
    str,
    Field(pattern=r"^ *[0-9]{1,5} *[x,] *[0-9]{1,5} *$", max_length=20, examples=["1024x768"]),
]


def _factors(value: Any) -> Any:
    """FreeU's factors as numbers; a picture's settings tell them in one text."""
    is_text = isinstance(value, str) and len(value) < 100
    return value.replace(",", " ").split() if is_text else value


Factor = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
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


class ImagePrompt(BaseModel):
    """One IP-Adapter by the name that GET /api/v1/networks lists, and the picture it looks at."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=300)
    image: PictureIn
    scale: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)


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
    zeroed_negative: bool | None = Field(
        None, description="avoid nothing at all, not even an empty text (SDXL)"
    )
    model: str | None = Field(None, max_length=300)
    unet: str | None = Field(None, max_length=300)
    vae: str | None = Field(None, max_length=300)
    taesd: str | None = Field(None, max_length=300, description="a small autoencoder for previews")
    refiner: str | None = Field(
        None, max_length=300, description="a model that draws the last part of the way"
    )
    refiner_start: float | None = Field(None, ge=0, le=1)
    quantize: Literal[0, 4, 8] | None = Field(
        None, description="bits to keep the weights in; 0 is as they are stored"
    )
    low_memory: bool | None = Field(None, description="hold one network at a time")
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
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
    freeu: Annotated[
        list[Factor] | None,
        Field(min_length=4, max_length=4, description="b1, b2, s1, s2"),
        BeforeValidator(_factors, json_schema_input_type=list[float] | str | None),
    ] = None
    emphasis: Literal["original", "no norm"] | None = None
    window: int | None = Field(None, ge=64, le=2048)
    window_overlap: float | None = Field(None, ge=0, le=0.9)
    hires_scale: float | None = Field(None, ge=1, le=4)
    hires_strength: float | None = Field(None, ge=0.01, le=1)
    hires_steps: int | None = Field(None, ge=LIMITS.steps[0], le=LIMITS.steps[1])
    hires_upscaler: str | None = Field(
        None, max_length=300, description="latent, lanczos, or a name from GET /api/v1/networks"
    )
    hires_prompt: str | None = Field(None, max_length=LIMITS.prompt)
    hires_negative_prompt: str | None = Field(None, max_length=LIMITS.prompt)
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
    mask_content: Literal["original", "fill", "noise", "nothing"] | None = None
    only_masked: int | None = Field(
        None, ge=0, le=4096, description="draw the masked part alone, with so many pixels around it"
    )
    sample_posterior: bool | None = None
    image_guidance_scale: float | None = Field(None, ge=0, le=100)
    depth_image: PictureIn | None = Field(
        None, description="a depth map, bright is near, for models that follow one"
    )
    original_size: Pair | None = None
    crop: Pair | None = None
    target_size: Pair | None = None
    aesthetic_score: float | None = Field(None, ge=0, le=20)
    negative_aesthetic_score: float | None = Field(None, ge=0, le=20)
    preview: Literal["linear", "taesd"] | None = None
    controls: list[Control] | None = Field(None, max_length=MOST_CONTROLS)
    image_prompts: list[ImagePrompt] | None = Field(None, max_length=MOST_CONTROLS)
    previews: bool = True

    def said(self) -> dict[str, Any]:
        """What was said, with pictures as true: what is kept of a job."""
        said = self.model_dump(exclude_none=True, exclude={"previews"})
        for each in (each for name in LISTED for each in said.get(name, ())):
            each["image"] = True
        return {name: True if name in PICTURES else value for name, value in said.items()}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``StableDiffusion.generate``, as JSON, without pictures."""
        found = self.model_dump(exclude_none=True, exclude={*PICTURES, *OTHERS, *LOADING})
        if self.zeroed_negative:
            found["negative_prompt"] = None
        if self.loras is not None:
            found["loras"] = [[lora.name, lora.weight] for lora in self.loras]
        if self.controls:
            for name in ("weight", "start", "end", "preprocess"):
                found[f"control_{name}"] = [getattr(control, name) for control in self.controls]
        if self.image_prompts:
            for name in ("scale", "start", "end"):
                found[f"ip_{name}"] = [getattr(each, name) for each in self.image_prompts]
        return found

    def loading(self) -> dict[str, Any]:
        """The keyword arguments of ``Catalog.how`` beside networks: what this drawing says."""
        return self.model_dump(exclude_none=True, include=set(LOADING))

    def beside(self) -> dict[str, Any]:
        """The keyword arguments of ``Catalog.how`` that are networks, by their names."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            "taesd": self.taesd,
            "controlnet": [control.name for control in self.controls or ()],
            "ip_adapter": [each.name for each in self.image_prompts or ()],
        }

    def pictures(self) -> dict[str, str]:
        """Every picture that it starts from, by the name of its file."""
        found = {name: text for name in PICTURES if (text := getattr(self, name)) is not None}
        for field, name in LISTED.items():
            for number, each in enumerate(getattr(self, field) or ()):
                found[f"{name}-{number}"] = each.image
        return found

    def networks(self) -> list[tuple[str, str]]:
        """Kind and name of each network that it asks for, those named in its prompts among them."""
        from mlx_maple.text.language import without_tags

        found = [("lora", lora.name) for lora in self.loras or ()]
        found += [("controlnet", control.name) for control in self.controls or ()]
        found += [("ip_adapter", each.name) for each in self.image_prompts or ()]
        for kind in ("unet", "vae", "taesd"):
            if name := getattr(self, kind):
                found.append((kind, name))
        if self.hires_upscaler not in (None, *enlarge.BUILT_IN):
            found.append(("upscaler", self.hires_upscaler or ""))
        if self.syntax != "plain":
            texts = (self.prompt, self.negative_prompt, self.hires_prompt)
            for text in (*texts, self.hires_negative_prompt):
                tags = without_tags(text or "")[1]
                found += [("lora", tag.name) for tag in tags if tag.kind == "lora"]
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
                raise Undrawable(f"unknown {name} {word!r}: choose from {', '.join(known)}", name)
        if self.sampler is not None:
            try:
                make_plan(NoiseSchedule.from_betas(), self.sampler, self.schedule, eta=self.eta)
            except ValueError as error:
                raise Undrawable(str(error).rstrip(".")) from None
        if self.mask is not None and self.image is None:
            raise Undrawable("a mask needs the image that it covers")
        if self.hires_scale is not None and self.image is not None:
            raise Undrawable("hires_scale does not go with an image", "hires_scale")
        if self.zeroed_negative and self.negative_prompt:
            refusal = "zeroed_negative does not go with a negative_prompt"
            raise Undrawable(refusal, "zeroed_negative")

    def check_size(self, own: tuple[int, int]) -> None:
        """Refuse more pixels than one job may have.

        Args:
            own: width and height that the model draws where none are named.

        Raises:
            Undrawable: in one line.
        """
        width = own[0] if self.width is None else self.width
        height = own[1] if self.height is None else self.height
        pixels = pixels_of(width, height, self.model_dump(include={"count", "hires_scale"}))
        if pixels > LIMITS.pixels:
            raise Undrawable(
                f"{pixels:,} pixels in one job; {LIMITS.pixels:,} at most: draw fewer or smaller"
            )
