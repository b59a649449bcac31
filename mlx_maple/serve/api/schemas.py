"""What /api/v1 answers with."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from mlx_maple.serve.draw import Draw

State = Literal["queued", "running", "done", "failed", "cancelled", "offered"]


class ErrorDetail(BaseModel):
    """One field of a request that cannot be used."""

    field: str
    message: str


class Error(BaseModel):
    """Why a request ended in an error."""

    code: str = Field(examples=["invalid"])
    message: str = Field(examples=["unknown sampler 'eular': choose from ddim, plms, euler, …"])
    details: list[ErrorDetail] = []


class ErrorAnswer(BaseModel):
    """Every error of this API."""

    error: Error


class Picture(BaseModel):
    """A finished picture of the history."""

    id: str = Field(examples=["0193f0a1b2c3d4e5f6a7b8c9-0"])
    job: str
    index: int
    created: float
    width: int
    height: int
    url: str
    thumbnail: str
    seed: int | None
    seed_text: str | None
    settings: dict[str, Any]
    draw: dict[str, Any] = Field(description="a Draw that draws it again, without its pictures")


class Progress(BaseModel):
    """How far a running job is."""

    stage: Literal["loading", "text", "encode", "sample", "decode", "saving"]
    step: int
    total: int
    fraction: float
    seconds_per_step: float
    seconds_left: float
    detail: str = ""


class JobError(BaseModel):
    """Why a job failed: no_memory, unusable, invalid, worker_died or failed, and one line."""

    code: str
    message: str


class Job(BaseModel):
    """One request to draw, from its queueing to its pictures."""

    id: str
    state: State
    cancelling: bool = False
    position: int | None = Field(description="jobs before it; null when it does not wait")
    client: str
    mine: bool | None = Field(description="whether X-Maple-Client names its client")
    created: float
    started: float | None
    finished: float | None
    draw: dict[str, Any] = Field(description="what was asked for, with pictures as true")
    progress: Progress | None
    has_preview: bool
    inputs: list[str] = Field(description="pictures that it starts from, while they are kept")
    pictures: list[Picture]
    notes: list[str]
    timings: dict[str, float] | None
    error: JobError | None


class Jobs(BaseModel):
    """Offered, running and waiting jobs, then those that ended last."""

    jobs: list[Job]


class Pictures(BaseModel):
    """A page of the history, newest first."""

    pictures: list[Picture]
    next: int | None = Field(description="`before` of the next page; null on the last one")


class Health(BaseModel):
    """Whether the server answers."""

    status: Literal["ok"] = "ok"
    version: str
    queued: int
    running: bool


class Token(BaseModel):
    """The server's token, to sign in with."""

    token: str = Field(min_length=1, max_length=1000, examples=["correct-horse-battery"])


class Session(BaseModel):
    """Whether this server asks for a token, and whether this browser is let in."""

    token_needed: bool
    signed_in: bool


class Memory(BaseModel):
    """Of the device that draws, in bytes; null where the system does not say."""

    total: int | None
    free: int | None


class WorkerState(BaseModel):
    """The process that draws."""

    state: Literal["stopped", "starting", "loading", "idle", "drawing"]
    model: str | None
    models: list[str]
    resident: int | None


class LimitsAnswer(BaseModel):
    """Bounds of one request."""

    width: tuple[int, int]
    height: tuple[int, int]
    steps: tuple[int, int]
    count: tuple[int, int]
    pixels: int
    upload: int
    queued: int
    queued_each: int


class System(BaseModel):
    """What this server runs on."""

    version: str
    backend: str | None
    device: str | None
    memory: Memory
    worker: WorkerState
    limits: LimitsAnswer
    features: list[str]


class ModelItem(BaseModel):
    """A model that can be named."""

    id: str
    name: str
    source: Literal["embedded", "named", "folder", "hub", "known"]
    is_here: bool
    bytes: int | None
    note: str
    license: str


class Models(BaseModel):
    """Every model, the default one first."""

    default: str
    models: list[ModelItem]


class ModelDetail(ModelItem):
    """A model that was looked into."""

    family: str
    prediction: str
    parameters: int
    defaults: dict[str, Any]
    notes: list[str]


class SamplerItem(BaseModel):
    """A sampler and the schedules that it takes, its usual one first."""

    id: str
    schedules: list[str]
    has_eta: bool


class Samplers(BaseModel):
    """Every sampler, schedule and source of noise."""

    samplers: list[SamplerItem]
    schedules: list[str]
    noise: list[str]


class Named(BaseModel):
    """A network in the model folders."""

    name: str


class Networks(BaseModel):
    """What can be drawn with beside models."""

    loras: list[Named]
    embeddings: list[Named]
    unets: list[Named]
    vaes: list[Named]
    taesds: list[Named]
    controlnets: list[Named]
    ip_adapters: list[Named]
    upscalers: list[Named]


class PlanRequest(BaseModel):
    """What a drawing would be."""

    model: str | None = Field(None, max_length=300, examples=["demo"])
    width: int | None = Field(None, ge=64, le=8192, multiple_of=8)
    height: int | None = Field(None, ge=64, le=8192, multiple_of=8)
    count: int | None = Field(None, ge=1, le=16)
    guidance_scale: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False)
    image: bool = False


class Plan(BaseModel):
    """What it would take in memory."""

    fits: bool | None
    peak: int
    free: int | None
    message: str
    advice: list[str]


class Ids(BaseModel):
    """Pictures by their ids."""

    ids: list[str] = Field(min_length=1, max_length=500)


class PngInfoRequest(BaseModel):
    """A picture with settings inside."""

    image: str = Field(min_length=1, description="a data: URL or bare base64")


class PngInfo(BaseModel):
    """What a picture's file says of its drawing."""

    settings: dict[str, Any]
    draw: dict[str, Any] = Field(description="a Draw to fill a form with")
    notes: list[str]
    parameters: str = Field(description="A1111's text")


class Preset(BaseModel):
    """Settings under a name."""

    name: str
    draw: dict[str, Any]
    changed: float


class Presets(BaseModel):
    """All presets by name."""

    presets: list[Preset]


class PresetDraw(Draw):
    """Settings to keep: a Draw in which the prompt may be left out."""

    prompt: str = Field("", max_length=20_000)
