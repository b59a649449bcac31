"""/api/v1: our own API, and what the page speaks."""

import asyncio
import dataclasses
import re
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from mlx_maple import __version__, images, metadata
from mlx_maple.adapters.lora import read_choices
from mlx_maple.images import ImageError
from mlx_maple.metadata import Settings
from mlx_maple.serve import studio as insides
from mlx_maple.serve.api import client_of, door_of, schemas, studio_of
from mlx_maple.serve.catalog import Entry
from mlx_maple.serve.door import COOKIE, peer_of
from mlx_maple.serve.draw import LIMITS, Draw
from mlx_maple.serve.errors import ApiError
from mlx_maple.serve.store import Picture as StoredPicture
from mlx_maple.serve.studio import ENDED, Studio, Unready
from mlx_maple.serve.uploads import picture_bytes

FEATURES = [
    *("txt2img", "img2img", "inpaint", "previews", "variations", "loras", "controlnet", "vae"),
    *("token_merging", "deep_cache"),
    *("hires", "tile", "windows", "prompt_weights", "freeu", "refiner", "taesd", "depth", "sizes"),
    *("quantize", "low_memory", "unet", "image_prompts"),
]
ZIP_BYTES = 1 << 30  # of pictures in one archive
_RESIDENT = re.compile(r"VmRSS:\s+(\d+) kB")

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorAnswer, "description": text}
    for code, text in {
        400: "no JSON, or no UTF-8",
        401: "no token, or a wrong one",
        403: "not from this server's own page",
        404: "there is no such thing",
        409: "no more of these are kept",
        413: "too large",
        422: "cannot be used; `details` names the fields",
        429: "too many jobs wait; Retry-After says when to ask again",
        503: "too much is being sent at once, or a question has no answer now",
    }.items()
}
# The same beside a stream of events, whose errors are JSON all the same.
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
EVENT_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": row["description"], "content": _ERROR_CONTENT}
    for code, row in ERRORS.items()
}
router = APIRouter(prefix="/api/v1", responses=ERRORS)

JobId = Annotated[str, Path(pattern="^[0-9a-f]{24}$", examples=["0193f0a1b2c3d4e5f6a7b8c9"])]
PictureId = Annotated[
    str, Path(pattern="^[0-9a-f]{24}-[0-9]{1,3}$", examples=["0193f0a1b2c3d4e5f6a7b8c9-0"])
]
InputName = Annotated[str, Path(pattern="^[a-z_]{1,30}(-[0-9]{1,2})?$", examples=["image"])]
PresetName = Annotated[str, Path(min_length=1, max_length=80)]
Client = Annotated[str | None, Header(alias="X-Maple-Client", max_length=64)]


# System ------------------------------------------------------------------------------------------


@router.get("/health", tags=["system"])
async def health(request: Request) -> schemas.Health:
    """Whether the server answers; takes no token."""
    studio = studio_of(request)
    return schemas.Health(
        version=__version__, queued=studio.waiting, running=studio.current is not None
    )


@router.get("/session", tags=["system"])
async def session(request: Request) -> schemas.Session:
    """Whether a token is needed, and whether this browser has signed in."""
    door = door_of(request)
    return schemas.Session(
        token_needed=door.token is not None,
        signed_in=door.admits(peer_of(request.scope), request.headers),
    )


@router.post("/session", tags=["system"])
async def sign_in(request: Request, asked: schemas.Token, response: Response) -> schemas.Session:
    """Sign a browser in: it holds a cookie from now on, which scripts cannot read."""
    door, is_secure = door_of(request), request.url.scheme == "https"
    if not door.open_session(peer_of(request.scope), asked.token, response, is_secure=is_secure):
        raise ApiError(401, "this is not the server's token", field="token")
    return schemas.Session(token_needed=door.token is not None, signed_in=True)


@router.delete("/session", tags=["system"], status_code=204)
async def sign_out(response: Response) -> None:
    """Sign a browser out: its cookie is taken away."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


@router.get("/system", tags=["system"])
async def system(request: Request) -> schemas.System:
    """What this server runs on, and how much it takes at once."""
    studio = studio_of(request)
    limits = {
        name: value
        for name, value in dataclasses.asdict(studio.config.limits).items()
        if name in schemas.LimitsAnswer.model_fields
    }
    free = await asyncio.to_thread(_free_memory)
    return schemas.System(
        version=__version__,
        backend=studio.device.get("backend"),
        device=studio.device.get("device"),
        memory=schemas.Memory(total=studio.device.get("memory"), free=free),
        worker=schemas.WorkerState(
            state=studio.worker_state,  # pyright: ignore[reportArgumentType]
            model=studio.models[-1] if studio.models else None,
            models=studio.models,
            resident=await asyncio.to_thread(resident, studio.worker_pid),
        ),
        limits=schemas.LimitsAnswer(**limits),
        features=FEATURES,
    )


def _free_memory() -> int | None:
    from mlx_maple.cli import _machine

    free = _machine.free_memory()
    return None if free is None else int(free)


def resident(pid: int | None) -> int | None:
    """Resident memory of a process in bytes, where the system says it (Linux)."""
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/status") as file:
            match = _RESIDENT.search(file.read())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


@router.post("/plan", tags=["system"])
async def plan(request: Request, asked: schemas.PlanRequest) -> schemas.Plan:
    """What a drawing would take in memory, and whether that fits."""
    studio = studio_of(request)
    entry = await asyncio.to_thread(studio.catalog.find, asked.model)
    arguments = asked.model_dump(exclude_none=True, exclude={"model", "image"})
    if asked.image:
        arguments["image"] = True
    answer = await _asked(studio.ask("plan", model=studio.catalog.how(entry), arguments=arguments))
    return schemas.Plan(**answer)


async def _asked(question: Any) -> dict[str, Any]:
    try:
        return await question
    except Unready as error:
        status = 503 if error.code == "failed" else 422
        raise ApiError(status, str(error), code=error.code) from None


# Models ------------------------------------------------------------------------------------------


@router.get("/models", tags=["models"])
async def models(request: Request) -> schemas.Models:
    """What can be drawn with."""
    return await _models(studio_of(request), again=False)


@router.post("/models/refresh", tags=["models"])
async def refresh_models(request: Request) -> schemas.Models:
    """The same, looked up on the disk again."""
    return await _models(studio_of(request), again=True)


async def _models(studio: Studio, *, again: bool) -> schemas.Models:
    entries = await asyncio.to_thread(lambda: studio.catalog.entries(again=again))
    items = [schemas.ModelItem(**_item(entry)) for entry in entries]
    return schemas.Models(default=studio.catalog.default, models=items)


def _item(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "name": entry.id,
        "source": entry.source,
        "is_here": entry.is_here,
        "bytes": entry.bytes,
        "note": entry.note,
        "license": entry.license,
    }


@router.get("/models/{model:path}", tags=["models"])
async def model_detail(
    request: Request, model: Annotated[str, Path(max_length=300, examples=["demo"])]
) -> schemas.ModelDetail:
    """One model: its family, and what it draws with where nothing else is said."""
    studio = studio_of(request)
    entry = await asyncio.to_thread(studio.catalog.find, model)
    answer = await _asked(studio.ask("describe", model=studio.catalog.how(entry)))
    return schemas.ModelDetail(**{**_item(entry), **answer, "bytes": entry.bytes})


@router.get("/samplers", tags=["models"])
async def samplers() -> schemas.Samplers:
    """Samplers, the schedules that each takes, and sources of noise."""
    from mlx_maple.sampling import SAMPLERS, SCHEDULES
    from mlx_maple.sampling.noise import NOISE_SOURCES

    items = [
        schemas.SamplerItem(
            id=name, schedules=list(sampler.schedules), has_eta=sampler.eta is not None
        )
        for name, sampler in SAMPLERS.items()
    ]
    return schemas.Samplers(samplers=items, schedules=list(SCHEDULES), noise=list(NOISE_SOURCES))


@router.get("/networks", tags=["models"])
async def networks(request: Request) -> schemas.Networks:
    """Networks beside models: in the model folders, and known ones in the hub's cache."""
    catalog = studio_of(request).catalog

    def look() -> dict[str, list[schemas.Named]]:
        kinds = (
            "lora",
            "embedding",
            "unet",
            "vae",
            "taesd",
            "controlnet",
            "ip_adapter",
            "upscaler",
        )
        return {f"{k}s": [schemas.Named(name=n) for n in catalog.networks(k)] for k in kinds}

    return schemas.Networks(**await asyncio.to_thread(look))


# Jobs --------------------------------------------------------------------------------------------


@router.post("/jobs", tags=["jobs"], status_code=202)
async def submit(request: Request, draw: Draw, client: Client = None) -> schemas.Job:
    """Queue a drawing. Watch it at /jobs/{id}/events; its pictures come with the last event."""
    studio = studio_of(request)
    job = await studio.submit(client_of(request, "v1"), draw)
    return shown(studio, job, client_of(request, "v1"))


@router.get("/jobs", tags=["jobs"])
async def jobs(request: Request, client: Client = None) -> schemas.Jobs:
    """Offered, running and waiting jobs, then the last 50 that ended."""
    studio, me = studio_of(request), client_of(request, "v1")
    return schemas.Jobs(jobs=[shown(studio, job, me) for job in await studio.jobs()])


async def _job(request: Request, job_id: JobId) -> insides.Job:
    """The job that the address names; looked up before a stream of events begins."""
    job = await studio_of(request).job(job_id)
    if job is None:
        raise ApiError(404, f"there is no job {job_id}")
    return job


FoundJob = Annotated[insides.Job, Depends(_job)]


@router.get("/jobs/{job_id}", tags=["jobs"])
async def job(request: Request, found: FoundJob, client: Client = None) -> schemas.Job:
    """One job."""
    studio = studio_of(request)
    studio.watch(found)
    return shown(studio, found, client_of(request, "v1"))


@router.post("/jobs/{job_id}/cancel", tags=["jobs"])
async def cancel(request: Request, found: FoundJob, client: Client = None) -> schemas.Job:
    """End a job: at once where it waits, between two steps where it is drawn."""
    studio = studio_of(request)
    await studio.cancel(found)
    return shown(studio, found, client_of(request, "v1"))


@router.post("/jobs/{job_id}/resume", tags=["jobs"])
async def resume(request: Request, found: FoundJob, client: Client = None) -> schemas.Job:
    """Queue a job again that was waiting or being drawn when the server was killed."""
    studio = studio_of(request)
    await studio.resume(found)
    return shown(studio, found, client_of(request, "v1"))


@router.get(
    "/jobs/{job_id}/preview",
    tags=["jobs"],
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
async def preview(request: Request, found: FoundJob) -> Response:
    """The latest preview of a job that is being drawn."""
    studio = studio_of(request)
    studio.watch(found)
    if found.preview is None:
        raise ApiError(404, "there is no preview of this job now")
    return Response(
        insides.preview_bytes(found), media_type="image/jpeg", headers={"cache-control": "no-store"}
    )


@router.get(
    "/jobs/{job_id}/inputs/{name}",
    tags=["jobs"],
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
async def job_input(request: Request, job_id: JobId, name: InputName) -> Response:
    """A picture that a job starts from: "image", "mask", "control-0"."""
    studio = studio_of(request)
    path = await studio.stored(studio.store.kept_input, f"{job_id}-{name}")
    if path is None:
        raise ApiError(404, f"no {name} of job {job_id} is kept")
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    # Its bytes are those of a picture, whichever kind: a browser looks at them, not at the name.
    return FileResponse(path, media_type="image/png", headers=headers)


async def _stream(request: Request) -> AsyncIterator[None]:
    """Room for one more stream, until it has ended."""
    with studio_of(request).stream(peer_of(request.scope)):
        yield


@router.get(
    "/jobs/{job_id}/events",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses=EVENT_ERRORS,
    dependencies=[Depends(_stream)],
)
async def job_events(
    request: Request, found: FoundJob, client: Client = None
) -> AsyncIterator[ServerSentEvent]:
    """One job as it goes: events `job` (a Job) and `preview`; ends with the job."""
    studio, me = studio_of(request), client_of(request, "v1")
    async with studio.listening(found.id) as feed:
        yield _event(studio, "job", found, me)
        while found.state not in ENDED:
            studio.watch(found)
            kind, found = await feed.next()
            yield _event(studio, kind, found, me)


@router.get(
    "/events",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses=EVENT_ERRORS,
    dependencies=[Depends(_stream)],
)
async def events(request: Request, client: Client = None) -> AsyncIterator[ServerSentEvent]:
    """Every job as it goes: events `job` (a Job) and `preview`; does not end."""
    studio, me = studio_of(request), client_of(request, "v1")
    async with studio.listening() as feed:
        yield ServerSentEvent(comment="listening")
        while True:
            kind, found = await feed.next()
            studio.watch(found)
            yield _event(studio, kind, found, me)


def _event(studio: Studio, kind: str, job: insides.Job, me: str) -> ServerSentEvent:
    if kind == "preview":
        image = f"data:image/jpeg;base64,{job.preview or ''}"
        data: Any = {"job": job.id, "step": job.preview_step, "image": image}
    else:
        data = shown(studio, job, me)
    return ServerSentEvent(event=kind, data=data)


def shown(studio: Studio, job: insides.Job, me: str) -> schemas.Job:
    """A job as this API shows it to the client ``me``."""
    return schemas.Job(
        id=job.id,
        state=job.state,  # pyright: ignore[reportArgumentType]
        cancelling=job.cancelling,
        position=studio.position(job),
        client=job.client.rpartition("/")[2],
        mine=job.client == me,
        created=job.created,
        started=job.started,
        finished=job.finished,
        draw=job.draw,
        progress=None if job.progress is None else schemas.Progress(**job.progress),
        has_preview=job.preview is not None,
        inputs=sorted(job.inputs),
        pictures=[shown_picture(picture) for picture in job.pictures],
        notes=job.notes,
        timings=job.timings,
        error=None if job.error is None else schemas.JobError(**job.error),
    )


# Pictures ----------------------------------------------------------------------------------------


@router.get("/pictures", tags=["pictures"])
async def pictures(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    q: Annotated[str, Query(max_length=200, description="words in the settings")] = "",
) -> schemas.Pictures:
    """The history, newest first."""
    studio = studio_of(request)
    found = await studio.stored(studio.store.history, limit + 1, before, q)
    page = found[:limit]
    return schemas.Pictures(
        pictures=[shown_picture(picture) for picture in page],
        next=page[-1].number if len(found) > limit else None,
    )


async def _archive(request: Request) -> AsyncIterator[None]:
    """Room for one more archive, until it is sent."""
    with studio_of(request).archive(peer_of(request.scope)):
        yield


@router.post(
    "/pictures/zip",
    tags=["pictures"],
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}}},
    dependencies=[Depends(_archive)],
)
async def zipped(request: Request, asked: schemas.Ids) -> Response:
    """Pictures in one archive."""
    studio = studio_of(request)
    paths = []
    for picture_id in dict.fromkeys(asked.ids):
        picture = await studio.stored(studio.store.picture, picture_id)
        if picture is None:
            raise ApiError(404, "one of these pictures is not in the history")
        paths.append(studio.store.picture_path(picture))

    def pack(packed: IO[bytes]) -> None:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # PNG is packed already
            for path in paths:
                archive.write(path, path.name)
                if packed.tell() > ZIP_BYTES:
                    raise ApiError(413, "these pictures are too many for one archive: take fewer")

    def pieces(packed: IO[bytes]) -> Iterator[bytes]:
        with packed:
            packed.seek(0)
            while piece := packed.read(1 << 20):
                yield piece

    # On the disk, not in memory; a file without a name, which no kill leaves behind.
    packed = tempfile.TemporaryFile(dir=studio.store.folder)
    try:
        await asyncio.to_thread(pack, packed)
    except FileNotFoundError:
        packed.close()
        raise ApiError(404, "the file of one of these pictures is gone") from None
    except ApiError:
        packed.close()
        raise
    headers = {"content-disposition": 'attachment; filename="maple-pictures.zip"'}
    return StreamingResponse(pieces(packed), media_type="application/zip", headers=headers)


async def _picture(request: Request, picture_id: str) -> StoredPicture:
    studio = studio_of(request)
    picture = await studio.stored(studio.store.picture, picture_id)
    if picture is None:
        raise ApiError(404, f"there is no picture {picture_id}")
    return picture


@router.get("/pictures/{picture_id}", tags=["pictures"])
async def picture(request: Request, picture_id: PictureId) -> schemas.Picture:
    """One picture's settings."""
    return shown_picture(await _picture(request, picture_id))


@router.get(
    "/pictures/{picture_id}/file",
    tags=["pictures"],
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}}},
)
async def picture_file(
    request: Request, picture_id: PictureId, download: bool = False
) -> FileResponse:
    """The picture, with its settings inside."""
    found = await _picture(request, picture_id)
    path = studio_of(request).store.picture_path(found)
    if not path.is_file():
        raise ApiError(404, "the file of this picture is gone")
    return FileResponse(
        path,
        media_type="image/png",
        headers={"cache-control": "private, max-age=31536000, immutable"},
        filename=path.name if download else None,
    )


@router.get(
    "/pictures/{picture_id}/thumbnail",
    tags=["pictures"],
    response_class=FileResponse,
    responses={200: {"content": {"image/jpeg": {}}}},
)
async def thumbnail(request: Request, picture_id: PictureId) -> FileResponse:
    """The picture, small."""
    found = await _picture(request, picture_id)
    studio = studio_of(request)
    try:
        path = await studio.stored(studio.store.thumbnail, found)
    except (OSError, ImageError):
        raise ApiError(404, "the file of this picture is gone") from None
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    return FileResponse(path, media_type="image/jpeg", headers=headers)


@router.delete("/pictures/{picture_id}", tags=["pictures"], status_code=204)
async def remove_picture(request: Request, picture_id: PictureId) -> None:
    """Take a picture out of the history, and its file off the disk."""
    found = await _picture(request, picture_id)
    await studio_of(request).remove(found)


def shown_picture(picture: StoredPicture) -> schemas.Picture:
    """A picture as this API shows it."""
    seed = picture.settings.get("seed")
    base = f"/api/v1/pictures/{picture.id}"
    said = {k: v for k, v in picture.settings.items() if v not in (None, "")}
    return schemas.Picture(
        id=picture.id,
        job=picture.job,
        index=picture.index,
        created=picture.created,
        width=picture.width,
        height=picture.height,
        url=f"{base}/file",
        thumbnail=f"{base}/thumbnail",
        seed=seed,
        seed_text=None if seed is None else str(seed),
        settings=said,
        draw=draw_again(said),
    )


def draw_again(settings: dict[str, Any]) -> dict[str, Any]:
    """A Draw, as JSON, from settings that were written into a picture."""
    known = {field.name for field in dataclasses.fields(Settings)}
    arguments = Settings(**{k: v for k, v in settings.items() if k in known}).arguments()
    draw = {k: v for k, v in arguments.items() if k in Draw.model_fields and v != ""}
    for name in ("width", "height", "steps"):
        low, high = getattr(LIMITS, name)
        if name in draw and not low <= draw[name] <= high:
            del draw[name]
    draw.setdefault("prompt", "")
    if isinstance(loras := draw.pop("loras", None), str):
        with suppress(ValueError):  # a stranger's file may hold anything
            draw["loras"] = [
                {"name": choice.name, "weight": choice.unet} for choice in read_choices(loras)
            ]
    if settings.get("control"):  # it takes the pictures again
        for name in [name for name in draw if name.startswith("control")]:
            del draw[name]
    draw |= {name: settings[name] for name in ("model", "unet", "vae") if settings.get(name)}
    if settings.get("refiner"):
        draw["refiner"], draw["refiner_start"] = settings["refiner"], settings.get("refiner_start")
    if settings.get("zeroed_negative"):
        draw["zeroed_negative"] = bool(draw.pop("negative_prompt", None) is None)
    for name in ("seed", "variation_seed"):
        if abs(draw.get(name) or 0) > 2**53:  # more than a number in JavaScript holds
            draw[name] = str(draw[name])
    return draw


@router.post("/png-info", tags=["pictures"])
async def png_info(request: Request, asked: schemas.PngInfoRequest) -> schemas.PngInfo:
    """What a picture's file says of its drawing: ours, A1111's, or any that is written like it."""
    limits = studio_of(request).config.limits

    def read() -> schemas.PngInfo:
        image = images.decode_image(picture_bytes(asked.image, limits.upload_pixels))
        texts = images.texts_of(image)
        if not texts:
            raise ApiError(422, "no settings are written in this picture", code="no_settings")
        try:
            recipe = images.recipe_of(image)
        except ImageError as error:  # a camera's comment, for one
            raise ApiError(422, str(error).rstrip("."), code="no_settings") from None
        said = {k: v for k, v in dataclasses.asdict(recipe.settings).items() if v not in (None, "")}
        parameters = texts.get("parameters") or metadata.to_parameters(recipe.settings)
        return schemas.PngInfo(
            settings=said, draw=draw_again(said), notes=recipe.notes, parameters=parameters
        )

    return await asyncio.to_thread(read)


# Presets -----------------------------------------------------------------------------------------


@router.get("/presets", tags=["presets"])
async def presets(request: Request) -> schemas.Presets:
    """Settings that were kept under a name."""
    studio = studio_of(request)
    found = await studio.stored(studio.store.presets)
    return schemas.Presets(
        presets=[schemas.Preset(name=n, draw=draw, changed=at) for n, draw, at in found]
    )


@router.put("/presets/{name:path}", tags=["presets"])
async def put_preset(
    request: Request, name: PresetName, draw: schemas.PresetDraw
) -> schemas.Preset:
    """Keep settings under a name."""
    if draw.pictures():
        raise ApiError(422, "a preset holds no pictures")
    studio = studio_of(request)
    said = draw.said()
    most = studio.config.limits.presets
    changed = await studio.stored(studio.store.put_preset, name, said, most)
    if changed is None:
        raise ApiError(409, f"{most} presets are kept already: remove one first")
    return schemas.Preset(name=name, draw=said, changed=changed)


@router.delete("/presets/{name:path}", tags=["presets"], status_code=204)
async def remove_preset(request: Request, name: PresetName) -> None:
    """Forget a preset."""
    studio = studio_of(request)
    if not await studio.stored(studio.store.remove_preset, name):
        raise ApiError(404, f"there is no preset {name!r}")
