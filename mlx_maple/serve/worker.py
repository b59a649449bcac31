"""The process that draws: models in memory, one job at a time, in its one thread.

It is started by link.py and speaks JSON over a socket, one message each way at a time:

    in    draw, enlarge, cancel, watch, load, describe, plan
    out   ready, model, progress, preview, done, failed, cancelled, answered

Between two steps, and while a model is downloaded or converted, it looks at what came in, so that
it can be cancelled, and finds out there when the server is gone; then it ends. MLX ties weights
that are still to be read to the thread that loaded them: this process has one thread.
"""

import base64
import gc
import io
import json
import os
import re
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_maple import images
from mlx_maple.serve import enlarging
from mlx_maple.serve.config import Limits, pixels_of

if TYPE_CHECKING:
    from PIL import Image

    from mlx_maple.pipeline import Progress, StableDiffusion

NICENESS = 5  # of drawing on the CPU: the server answers first
PREVIEW_PIXELS = 512  # longer side of a preview
PREVIEW_SECONDS = 0.1  # between two previews
PROGRESS_SECONDS = 0.02  # between two messages that tell of steps
LIMITS = Limits()
MOST_BYTES = 64 << 20  # of one message
OTHERS = ("vae", "taesd", "controlnet")  # that a model in memory can be given others of
_FOLDERS = re.compile(r"(?<![^\s'\"(=])/(?:[^\s/]+/)+")  # of absolute paths
CODES = {1: "failed", 2: "invalid", 3: "unusable", 4: "no_memory", 130: "cancelled"}


class Cancelled(Exception):
    """The job that is being drawn shall end."""


class ServerGone(Exception):
    """Nobody is at the other end of the line."""


class Worker:
    """Takes messages, draws, answers."""

    def __init__(self, link: Connection) -> None:
        """Speak over ``link``."""
        self._link = link
        # Each model and what it draws with beside its own; the latest used last.
        self._models: OrderedDict[str, tuple[StableDiffusion, dict[str, Any]]] = OrderedDict()
        self._job = ""
        self._cancelled = ""  # the job that was asked to end last
        self._watched_until = 0.0
        self._later: list[dict[str, Any]] = []  # what came in while a job was drawn

    def run(self) -> None:
        """Serve until the other side is gone."""
        self._say("ready", **_device())
        while True:
            message = self._later.pop(0) if self._later else self._next()
            getattr(self, f"_on_{message.pop('kind')}")(**message)

    def _next(self) -> dict[str, Any]:
        try:
            return json.loads(self._link.recv_bytes(MOST_BYTES))
        except (EOFError, OSError) as error:
            # By a name of its own: a model file that ends early is an EOFError, too.
            raise ServerGone from error

    def _say(self, kind: str, **values: Any) -> None:
        try:
            self._link.send_bytes(json.dumps({"kind": kind, **values}).encode())
        except OSError as error:
            raise ServerGone from error

    # What is asked for -------------------------------------------------------------------------

    def _on_load(self, *, model: Mapping[str, Any]) -> None:
        """Have a model ready before the first job asks for it."""
        try:
            self._model(model)
        except ServerGone:
            raise
        except Exception as error:
            code, line = _described(error)
            self._say("failed", job="", error={"code": code, "message": line})

    def _on_cancel(self, *, job: str) -> None:
        """End a job: the one that is drawn, or the next, where another model is loaded yet."""
        self._cancelled = job

    def _on_watch(self, *, job: str, seconds: float) -> None:
        """Someone looks at a job's previews for some seconds more."""
        if job == self._job:
            self._watched_until = max(self._watched_until, time.monotonic() + seconds)

    def _on_describe(self, *, request: str, model: Mapping[str, Any]) -> None:
        """Say what a model is, without reading its weights."""
        self._answer(request, partial(_description, model))

    def _on_plan(
        self, *, request: str, model: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> None:
        """Say what a drawing will take in memory."""
        self._answer(request, partial(_plan_of, model, arguments))

    def _answer(self, request: str, work: Callable[[], dict[str, Any]]) -> None:
        """Answer a question, or say why not."""
        try:
            answer = work()
        except Exception as error:
            code, line = _public(error)
            self._say("answered", request=request, error={"code": code, "message": line})
        else:
            self._say("answered", request=request, answer=answer)

    def _on_draw(
        self,
        *,
        job: str,
        model: Mapping[str, Any],
        arguments: dict[str, Any],
        inputs: Mapping[str, str],
        folder: str,
        previews: bool,
        refiner: Mapping[str, Any] | None = None,
    ) -> None:
        """Draw one job and write its pictures."""
        self._watched_until = float("inf") if previews else 0.0
        models = (model, refiner)
        self._do(job, partial(self._draw, job, models, arguments, inputs, Path(folder)))

    def _on_enlarge(
        self, *, job: str, arguments: dict[str, Any], inputs: Mapping[str, str], folder: str
    ) -> None:
        """Enlarge one job's pictures and write them."""
        self._watched_until = 0.0
        self._do(job, partial(self._enlarge, job, arguments, inputs, Path(folder)))

    def _do(self, job: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do one job; whatever goes wrong is told, and ends only it."""
        self._job = job
        try:
            outcome = work()
        except Cancelled as end:
            picture = end.args[0] if end.args else None
            self._say("cancelled", job=job, picture=picture)
        except ServerGone:
            raise
        except Exception as error:
            code, line = _public(error)
            del error
            if code == "no_memory":
                self._models.clear()
            _free()
            self._say("failed", job=job, error={"code": code, "message": line})
        else:
            self._say("done", job=job, **outcome)
        finally:
            self._job = ""

    # Drawing -----------------------------------------------------------------------------------

    def _draw(
        self,
        job: str,
        models: tuple[Mapping[str, Any], Mapping[str, Any] | None],
        arguments: dict[str, Any],
        inputs: Mapping[str, str],
        folder: Path,
    ) -> dict[str, Any]:
        from mlx_maple.cli import _memory, is_out_of_memory

        model, refiner = models

        opened: dict[str, Any] = {name: _opened(name, path) for name, path in inputs.items()}
        for several, argument in (("control-", "control_image"), ("ip_image-", "ip_image")):
            found = [opened.pop(name) for name in sorted(opened) if name.startswith(several)]
            if found:
                opened[argument] = found
        if refiner is not None:
            opened["refiner"] = self._model(refiner)
        sd = self._model(model)
        is_part = "mask" in opened and arguments.get("only_masked") is not None
        if is_part:
            _check_whole(opened["image"], arguments.get("count") or 1)
        size = _bounded_size(sd, None if is_part else opened.get("image"), arguments)
        self._look(None)
        drawing = sd.generate(**arguments, **opened)
        _memory.check(sd, {**arguments, **opened, **size})
        result = None
        try:
            with closing(drawing):
                told = shown = 0.0
                for progress in drawing:
                    result = progress.result
                    if result is not None:
                        break
                    self._look(progress)
                    now = time.monotonic()
                    is_step = progress.stage == "sample"
                    if not is_step or now - told >= PROGRESS_SECONDS:
                        self._say("progress", job=job, **_told(progress))
                        told = now
                    is_seen = is_step and now < self._watched_until
                    if is_seen and now - shown >= PREVIEW_SECONDS:
                        self._say(
                            "preview",
                            job=job,
                            step=progress.index,
                            image=_small_jpeg(progress.preview()),
                        )
                        shown = time.monotonic()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise _memory.refused(sd, {**arguments, **opened}, error) from error
            raise
        assert result is not None
        return {
            "pictures": [
                _saved(folder / f"{job}-{index}.png", image, settings)
                for index, (image, settings) in enumerate(
                    zip(result.images, result.settings, strict=True)
                )
            ],
            "notes": result.notes,
            "timings": result.timings,
        }

    def _enlarge(
        self, job: str, arguments: Mapping[str, Any], inputs: Mapping[str, str], folder: Path
    ) -> dict[str, Any]:
        how = enlarging.Enlarging(**arguments)
        names, files = sorted(inputs), []

        def told(done: int, total: int) -> None:
            self._look(None)
            told_of = {"stage": "sample", "index": done, "total": total, "pace": 0.0}
            self._say("progress", job=job, **told_of)

        for number, name in enumerate(names):
            told(number, len(names))
            enlarged = enlarging.enlarged(
                _opened(name, inputs[name]), how, lambda *_: self._look(None)
            )
            path = folder / f"{job}-{name}.png"
            buffer = io.BytesIO()
            enlarged.save(buffer, "PNG")
            images.write_whole(path, buffer.getvalue())
            files.append(str(path))
        return {"files": files}

    def _look(self, progress: "Progress | None") -> None:
        """Take what came in; raise ``Cancelled``, with what is seen so far, when that was it."""
        while self._link.poll():
            message = self._next()
            kind = message.get("kind")
            if kind in ("cancel", "watch"):
                message.pop("kind")
                getattr(self, f"_on_{kind}")(**message)
            else:
                self._later.append(message)
        if self._job and self._job == self._cancelled:
            seen = None if progress is None else progress.preview()
            raise Cancelled(None if seen is None else _base64(seen, "PNG"))

    def _model(self, how: Mapping[str, Any]) -> "StableDiffusion":
        """A model that is in memory, or is loaded now, beside the others where that fits."""
        from mlx_maple import loading

        others = {name: how.get(name) for name in OTHERS}
        key = _key(how)
        if key in self._models:
            self._models.move_to_end(key)
            sd, now = self._models[key]
            if now != others:  # a small network beside the large ones, which stay
                self._say("progress", job=self._job, stage="loading", index=0, total=0, pace=0.0)
                sd.exchange(**others)
                self._models[key] = sd, others
            return sd
        self._say("progress", job=self._job, stage="loading", index=0, total=0, pace=0.0)
        self._make_room(how)
        told = 0.0

        def progress(done: int, total: int, label: str) -> None:
            nonlocal told
            self._look(None)
            if (now := time.monotonic()) - told >= PREVIEW_SECONDS:
                told = now
                self._say(
                    "progress",
                    job=self._job,
                    stage="loading",
                    index=done,
                    total=total,
                    pace=0.0,
                    detail=label,
                )

        sd = loading.load(**how, progress=progress)
        self._models[key] = sd, others
        self._say("model", models=[model.info.name for model, _ in self._models.values()])
        return sd

    def _make_room(self, how: Mapping[str, Any]) -> None:
        """Let the models go that were not used for longest, until the new one has room."""
        from mlx_maple.cli import _memory, _plan

        if not self._models:
            return
        low = bool(how.get("low_memory"))
        needed = _memory.plan_of(_plan.request_of(_skeleton(how), {}, low_memory=low)).peak
        while self._models and needed > _available():
            self._models.popitem(last=False)
            _free()


def _description(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is and draws with where nothing else is said."""
    sd = _skeleton(model)
    info = asdict(sd.info)
    return {
        "family": info["family"],
        "prediction": info["prediction"],
        "parameters": info["parameters"],
        "bytes": info["bytes"],
        "defaults": sd.defaults,
        "notes": [_FOLDERS.sub("", note) for note in info["notes"]],
    }


def _plan_of(model: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a drawing will take in memory."""
    from mlx_maple.cli import _machine, _memory, _plan, _terminal
    from mlx_maple.engine.memory import advice

    low = bool(model.get("low_memory"))
    plan = _memory.plan_of(_plan.request_of(_skeleton(model), arguments, low_memory=low))
    free = _machine.device_memory()
    fits = None if free is None else plan.peak <= free
    of = "" if free is None else f" of {_terminal.size(free)}"
    tries = [] if fits is not False or free is None else advice(plan.request, int(free))
    return {
        "fits": fits,
        "peak": plan.peak,
        "free": free,
        "message": f"takes about {_terminal.size(plan.peak)}{of}",
        "advice": [f"{words}: {_terminal.size(peak)}" for words, peak in tries],
    }


def _key(how: Mapping[str, Any]) -> str:
    """What of a model stays in memory whatever it draws with beside."""
    kept = {k: v for k, v in how.items() if k not in (*OTHERS, "local_files_only")}
    return json.dumps(kept, sort_keys=True)


def _skeleton(how: Mapping[str, Any]) -> "StableDiffusion":
    """A model without its weights."""
    from mlx_maple import loading

    return loading.load(**{**how, "low_memory": True})


def _available() -> float:
    """Bytes that one more model and its drawing may take."""
    import mlx.core as mx

    from mlx_maple.cli import _machine

    if mx.default_device() == mx.Device(mx.DeviceType.cpu):
        free = _machine.free_memory()
        return float("inf") if free is None else free
    has = _machine.device_memory()
    return float("inf") if has is None else has - mx.get_active_memory()


def _free() -> None:
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _told(progress: "Progress") -> dict[str, Any]:
    return {
        "stage": progress.stage,
        "index": progress.index,
        "total": progress.total,
        "pace": progress.seconds_per_step,
    }


def _described(error: BaseException) -> tuple[str, str]:
    """An error's code and its line."""
    from mlx_maple.cli import describe

    if isinstance(error, ValueError) and not hasattr(error, "exit_code"):
        return "invalid", str(error).rstrip(".")
    exit_code, line = describe(error)
    return CODES.get(exit_code, "failed"), line


def _public(error: BaseException) -> tuple[str, str]:
    """An error's code and its line as clients may see it: files without their folders."""
    code, line = _described(error)
    return code, _FOLDERS.sub("", line)


def _opened(name: str, path: str) -> "Image.Image":
    """A picture that a job starts from."""
    try:
        return images.open_image(path)
    except images.ImageError as error:
        raise images.ImageError(f"{name}: {error.reason}") from None


def _bounded_size(
    sd: "StableDiffusion", picture: "Image.Image | None", arguments: Mapping[str, Any]
) -> dict[str, int]:
    """Width and height that will be drawn, with the model's own and the picture's counted in.

    Raises:
        ValueError: that is larger than what may be asked for.
    """
    from mlx_maple.drawing.arguments import LARGEST_SHARE

    width, height = arguments.get("width"), arguments.get("height")
    own = sd.defaults["width"], sd.defaults["height"]
    if picture is not None and (width is None or height is None):
        largest = int(LARGEST_SHARE * own[0] * own[1])
        if (width is None) != (height is None):
            largest = 1  # it follows the side that is named
        width, height = images.size_like(picture.size, largest, width=width, height=height)
    width = own[0] if width is None else width
    height = own[1] if height is None else height
    pixels = pixels_of(width, height, arguments)
    if max(width, height) > max(LIMITS.width[1], *own) or pixels > LIMITS.pixels:
        count = arguments.get("count") or 1
        what = f"{count} pictures of {width}x{height}" if count > 1 else f"{width}x{height}"
        raise ValueError(f"{what} ({pixels:,} pixels) would be drawn: name a smaller size.")
    return {"width": width, "height": height}


def _check_whole(picture: "Image.Image", count: int) -> None:
    """Refuse more pixels than the pictures may have into which a part is put back."""
    pixels = count * picture.width * picture.height
    if pixels > LIMITS.whole_pixels:
        what = f"{count} pictures of {picture.width}x{picture.height}"
        raise ValueError(f"{what} ({pixels:,} pixels) would come back: draw fewer at once.")


def _saved(path: Path, image: "Image.Image", settings: Any) -> dict[str, Any]:
    """Write a finished picture; returns what the history keeps of it."""
    images.save_image(image, path, settings)
    return {"width": image.width, "height": image.height, "settings": asdict(settings)}


def _small_jpeg(image: "Image.Image | None") -> str:
    """A preview as base64 of a JPEG."""
    assert image is not None
    image = image.convert("RGB")
    image.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    return _base64(image, "JPEG", quality=75)


def _base64(image: "Image.Image", kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _device() -> dict[str, Any]:
    """What this process draws on."""
    import mlx.core as mx

    from mlx_maple.cli import _machine
    from mlx_maple.engine.attention import running_backend

    backend = running_backend()
    if backend == "cpu":
        os.nice(NICENESS)
    name = mx.device_info().get("device_name") or ("CPU" if backend == "cpu" else backend)
    return {"backend": backend, "device": str(name), "memory": _machine.device_memory()}


def main(descriptor: int) -> None:
    """Run in a process of its own, over the socket with this descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    with Connection(descriptor) as link:
        try:
            Worker(link).run()
        except ServerGone:
            return
