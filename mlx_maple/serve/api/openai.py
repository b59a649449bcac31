"""/v1: as OpenAI's images API, for its clients.

Source   The OpenAI API reference, images and models (openai-python 3.57: resources/images.py,
         types/image_generate_params.py, types/images_response.py).
Differs  ``model`` is one of ours; without it the default model draws. Prompts are not revised, no
         tokens are counted. ``n`` goes to 10 as there. A picture to edit is redrawn where the mask
         is transparent, or where it is transparent itself; one without either is redrawn as a
         whole. ``url`` answers are signed addresses of this server, good for an hour.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Path, Request, UploadFile
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_maple import images
from mlx_maple.serve.api import client_of, door_of, drawn, studio_of
from mlx_maple.serve.draw import LIMITS, Draw
from mlx_maple.serve.errors import ApiError
from mlx_maple.serve.store import Picture
from mlx_maple.serve.studio import Job, Studio

MOST_IMAGES = 16  # files of one edit request
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
STATUS = {"no_memory": 500, "worker_died": 500, "failed": 500, "unusable": 400, "invalid": 400}


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every error of this API."""

    error: ErrorBody


router = APIRouter(
    prefix="/v1",
    tags=["OpenAI"],
    responses={
        code: {"model": ErrorAnswer, "description": text}
        for code, text in {
            400: "cannot be used",
            401: "no token, or a wrong one",
            404: "no such model",
            429: "too many jobs wait",
            500: "the drawing failed",
            503: "too much is being sent at once",
        }.items()
    },
)

Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{2,4}x[0-9]{2,4})$", max_length=9)]


class Generation(BaseModel):
    """What OpenAI's clients send to draw. Fields that mean nothing here are passed over."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"prompt": "a red maple leaf", "n": 1, "response_format": "b64_json"}]
        },
    )
    prompt: str = Field(min_length=1, max_length=LIMITS.prompt)
    model: str | None = Field(None, max_length=300)
    n: int | None = Field(None, ge=1, le=10)
    size: Size | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    user: str | None = None


class ImageItem(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """What was drawn."""

    created: int
    data: list[ImageItem]
    output_format: str = "png"
    size: str


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "mlx-maple"


class ModelList(BaseModel):
    """Every model that is on this disk."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models")
async def models(request: Request) -> ModelList:
    """Models that can be drawn with."""
    entries = await asyncio.to_thread(studio_of(request).catalog.entries)
    return ModelList(data=[Model(id=entry.id) for entry in entries if entry.is_here])


@router.get("/models/{model:path}")
async def model(
    request: Request, model: Annotated[str, Path(max_length=300, examples=["demo"])]
) -> Model:
    """One model."""
    entry = await asyncio.to_thread(studio_of(request).catalog.find, model)
    return Model(id=entry.id)


STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@router.post("/images/generations", response_model=Images, responses=STREAM)
async def generations(request: Request, asked: Generation) -> Any:
    """Draw from a prompt."""
    draw = _draw(prompt=asked.prompt, model=asked.model, count=asked.n, size=asked.size)
    return await _answer(request, draw, asked, {}, "image_generation")


@router.post("/images/edits", response_model=Images, responses=STREAM)
async def edits(
    request: Request,
    prompt: Annotated[str, Form(min_length=1, max_length=LIMITS.prompt)],
    image: Annotated[list[UploadFile] | None, File()] = None,
    images_: Annotated[list[UploadFile] | None, File(alias="image[]")] = None,
    mask: Annotated[UploadFile | None, File()] = None,
    model: Annotated[str | None, Form(max_length=300)] = None,
    n: Annotated[int | None, Form(ge=1, le=10)] = None,
    size: Annotated[str | None, Form(pattern=r"^(auto|[0-9]{2,4}x[0-9]{2,4})$")] = None,
    response_format: Annotated[Literal["url", "b64_json"] | None, Form()] = None,
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, Form()] = None,
    output_compression: Annotated[int | None, Form(ge=0, le=100)] = None,
    stream: Annotated[bool | None, Form()] = None,
    partial_images: Annotated[int | None, Form(ge=0, le=3)] = None,
) -> Any:
    """Redraw a picture, or a part of it."""
    files = [*(image or []), *(images_ or [])]
    if not files:
        raise ApiError(422, "an edit takes an image", field="image")
    if len(files) > 1:
        raise ApiError(422, "one image is edited at a time", field="image")
    pixels = studio_of(request).config.limits.upload_pixels
    data = await files[0].read()
    mask_data = None if mask is None else await mask.read()
    inputs = await asyncio.to_thread(_inputs, data, mask_data, pixels)
    asked = Generation(
        prompt=prompt,
        model=model,
        n=n,
        response_format=response_format,
        output_format=output_format,
        output_compression=output_compression,
        stream=stream,
        partial_images=partial_images,
    )
    draw = _draw(prompt=prompt, model=model, count=n, size=size)
    return await _answer(request, draw, asked, inputs, "image_edit")


def _draw(*, size: str | None, **values: Any) -> Draw:
    if size not in (None, "auto"):
        width, _, height = (size or "").partition("x")
        values |= {"width": int(width), "height": int(height)}
    try:
        return Draw(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        field = "size" if name in ("width", "height") else name
        raise ApiError(422, f"{field}: {fault['msg']}", field=field) from None


def _inputs(data: bytes, mask: bytes | None, pixels: int) -> dict[str, bytes]:
    """The picture and, where some of it shall stay, a mask that is white where it shall not.

    OpenAI's masks are transparent where the picture is redrawn.
    """
    source = images.decode_image(mask if mask is not None else data, pixels)
    images.check_header(data, pixels)
    if source.mode not in ("RGBA", "LA", "PA") and "transparency" not in source.info:
        if mask is not None:
            raise ApiError(422, "the mask has no transparent part to redraw", field="mask")
        return {"image": data}
    alpha = source.convert("RGBA").getchannel("A")
    low, _ = alpha.getextrema()
    if mask is None and low == 255:  # nothing of it is transparent
        return {"image": data}
    buffer = BytesIO()
    Image.eval(alpha, lambda value: 255 - value).save(buffer, "PNG")
    return {"image": data, "mask": buffer.getvalue()}


async def _answer(
    request: Request, draw: Draw, asked: Generation, inputs: dict[str, bytes], kind: str
) -> Any:
    studio = studio_of(request)
    partial = asked.partial_images or 0
    job = await studio.submit(
        client_of(request, "openai"),
        draw.model_copy(update={"previews": bool(asked.stream and partial)}),
        files=inputs,
    )
    if asked.stream:
        events = _streamed(request, job, asked, partial, kind)
        return StreamingResponse(events, media_type="text/event-stream")
    await drawn(request, job)
    return await _result(studio, request, job, asked)


async def _result(studio: Studio, request: Request, job: Job, asked: Generation) -> Images:
    if job.state != "done":
        error = job.error or {"code": "failed", "message": "the drawing was cancelled"}
        raise ApiError(STATUS.get(error["code"], 500), error["message"], code=error["code"])
    # An address is that of the file in the history.
    kind = "png" if asked.response_format == "url" else asked.output_format or "png"
    data = []
    for picture in job.pictures:
        if asked.response_format == "url":
            path = door_of(request).signed(f"/api/v1/pictures/{picture.id}/file")
            base = f"{request.url.scheme}://{request.headers['host']}"
            data.append(ImageItem(url=f"{base}{path}"))
        else:
            data.append(ImageItem(b64_json=await _encoded(studio, picture, kind, asked)))
    size = f"{job.pictures[0].width}x{job.pictures[0].height}"
    return Images(created=int(job.created), data=data, output_format=kind, size=size)


async def _encoded(studio: Studio, picture: Picture, kind: str, asked: Generation) -> str:
    path = studio.store.picture_path(picture)

    def encode() -> str:
        data = path.read_bytes()
        if kind != "png":
            quality = 100 if asked.output_compression is None else asked.output_compression
            buffer = BytesIO()
            images.decode_image(data).convert("RGB").save(buffer, FORMATS[kind], quality=quality)
            data = buffer.getvalue()
        return base64.b64encode(data).decode("ascii")

    return await asyncio.to_thread(encode)


async def _streamed(
    request: Request, job: Job, asked: Generation, partial: int, kind: str
) -> AsyncIterator[str]:
    """Up to three previews as the drawing goes on, then each picture."""
    studio = studio_of(request)
    sent = 0
    try:
        async with studio.listening(job.id) as feed:
            while not job.ended.is_set():
                what, _ = await feed.next()
                progress = job.progress or {}
                total = progress.get("total") or 1
                width, height = job.draw.get("width"), job.draw.get("height")
                is_due = progress.get("step", 0) * (partial + 1) >= total * (sent + 1)
                if what == "preview" and job.preview and sent < partial and is_due:
                    yield _sse(
                        f"{kind}.partial_image",
                        b64_json=job.preview,
                        partial_image_index=sent,
                        output_format="jpeg",
                        size=f"{width}x{height}" if width and height else "auto",
                    )
                    sent += 1
        result = await _result(studio, request, job, asked)
        for item in result.data:
            yield _sse(
                f"{kind}.completed",
                b64_json=item.b64_json,
                url=item.url,
                output_format=result.output_format,
                size=result.size,
            )
    except ApiError as error:
        yield _sse("error", error={"message": error.message, "code": error.code})
    finally:
        if not job.ended.is_set():
            await studio.cancel(job)


def _sse(kind: str, **values: Any) -> str:
    content = {"type": kind, "created_at": int(time.time()), **values}
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n"
