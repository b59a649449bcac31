"""Jobs from their request to their end: the queue, the worker and the history, put together.

Everything here runs in the event loop's thread, but for the store, which has a thread of its own,
and the look at the disk that the catalog takes. The worker draws one job at a time; what it says
comes in as messages (see worker.py).
"""

import asyncio
import base64
import math
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio

from mlx_maple.serve.bounds import Bound
from mlx_maple.serve.catalog import Catalog, Entry
from mlx_maple.serve.config import Config
from mlx_maple.serve.draw import LISTED, PICTURES, USUAL_LARGEST, Draw, Undrawable
from mlx_maple.serve.enlarging import Enlarging
from mlx_maple.serve.link import WorkerLink
from mlx_maple.serve.queue import Busy, FairQueue
from mlx_maple.serve.store import JobRecord, Picture, Store, new_id
from mlx_maple.serve.uploads import picture_bytes

ENDED = ("done", "failed", "cancelled")
REMEMBERED = 200  # ended jobs that are kept in memory
WATCH_SECONDS = 3.0  # that one look at a job keeps its previews coming
CANCEL_SECONDS = 2.0  # that a cancelled job may go on loading its model
PLANNER_SECONDS = 60.0  # without a question until the planner's process goes
ANSWER_SECONDS = 60.0  # that a plan may take
MOST_ASKED = 32  # questions that wait for the planner
SEEN = 8  # interrupted jobs whose last look is kept in memory
DECODING = 0.95  # share of a job that is done when it is decoded
Value = TypeVar("Value")


class Unready(Exception):
    """A question to the worker that it did not answer; one line.

    Attributes:
        code: as in a job's error.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(eq=False)
class Job:
    """One request to draw.

    Attributes:
        id: 24 hexadecimal digits that sort by time.
        client: who asked.
        draw: what was asked for, with pictures as true.
        how: the arguments of ``load``.
        arguments: of ``generate``, without pictures; of ``Enlarging``.
        inputs: files of the pictures that it starts from, by argument.
        kind: "draw", or "enlarge": a job that the history does not keep.
        refiner: the arguments of ``load`` for the model that draws the last part, or None.
        previews: whether previews are wanted even while nobody looks.
        created: seconds since 1970; so are ``started`` and ``finished``.
        state: queued, running, offered, done, failed or cancelled.
        progress: of a running job.
        preview: the latest one, a JPEG in base64.
        pictures: when it is done.
        files: likewise, of a job that enlarges.
        error: code and message, when it failed.
        cancelling: whether it was asked to end, and has not yet.
        seen: what an interrupted job had drawn so far, a PNG in base64.
        watched: the progress at which the worker was last told that someone looks.
        ended: set when it has ended and the history knows.
    """

    id: str
    client: str
    draw: dict[str, Any]
    how: dict[str, Any]
    arguments: dict[str, Any]
    inputs: dict[str, str]
    kind: str = "draw"
    refiner: dict[str, Any] | None = None
    previews: bool = True
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    state: str = "queued"
    progress: dict[str, Any] | None = None
    preview: str | None = None
    preview_step: int = 0
    pictures: list[Picture] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] | None = None
    error: dict[str, str] | None = None
    cancelling: bool = False
    seen: str | None = None
    watched: object = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """What one listener has not been told yet: the latest of each kind, so that it stays small."""

    def __init__(self, job: str | None = None) -> None:
        """Listen to one job, or to all."""
        self.job = job
        self._pending: OrderedDict[tuple[str, str], Job] = OrderedDict()
        self._wake = asyncio.Event()

    def tell(self, kind: str, job: Job) -> None:
        """Something of this kind has changed."""
        if self.job in (None, job.id):
            self._pending[kind, job.id] = job
            self._pending.move_to_end((kind, job.id))
            self._wake.set()

    async def next(self) -> tuple[str, Job]:
        """Wait for the next thing to tell."""
        while not self._pending:
            self._wake.clear()
            await self._wake.wait()
        (kind, _), job = self._pending.popitem(last=False)
        return kind, job


class Studio:
    """The server's insides; the APIs are views of it."""

    def __init__(self, config: Config) -> None:
        """Open the history.

        Raises:
            InUse: another server has the data folder.
            OSError: it cannot be written.
        """
        self.config = config
        self.catalog = Catalog(config)
        self.store = Store(config.data)
        self.device: dict[str, Any] = {}
        self.models: list[str] = []  # in the worker's memory
        self.current: Job | None = None
        self._queue: FairQueue[Job] = FairQueue(config.limits.queued, config.limits.queued_each)
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._feeds: set[Feed] = set()
        self._streams = Bound(config.limits.streams, config.limits.streams_each)
        self._archives = Bound(config.limits.archives, config.limits.archives_each)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._submitting = asyncio.Lock()
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._worker = WorkerLink(config.data, self._hear, self._worker_ended)
        self._is_ready = False
        self._is_loading = False
        self._planner = WorkerLink(config.data, self._hear_plan, self._planner_ended)
        self._asked: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._unload_timer: asyncio.TimerHandle | None = None
        self._planner_timer: asyncio.TimerHandle | None = None
        self._seconds_each = 10.0  # of a job, as it has turned out lately
        self._secret = b""

    async def start(self) -> None:
        """Take up what was left, and have the default model loaded."""
        for record in await self.stored(self.store.recover):
            try:
                self._jobs[record.id] = self._taken_up(record)
            except ValueError:  # written by a version that had other settings
                message = "this version cannot read what was asked for"
                outcome = {"error": {"code": "invalid", "message": message}}
                await self.stored(self.store.finish, record.id, "failed", outcome, [])
        options = await self.stored(self.store.options)
        secret = options.get("secret") or secrets.token_hex(32)
        if "secret" not in options:
            await self.stored(self.store.set_options, {"secret": secret})
        self._secret = bytes.fromhex(secret)
        entry = await asyncio.to_thread(self.catalog.find, None)
        self._is_loading = True
        # Who started the server may have a model fetched; requests may not.
        how = {**self.catalog.how(entry), "local_files_only": entry.source != "named"}
        self._worker.send("load", model=how)

    async def close(self) -> None:
        """End the worker and let go of the folder."""
        for timer in (self._unload_timer, self._planner_timer):
            if timer is not None:
                timer.cancel()
        self._worker.stop()
        self._planner.stop()
        for task in list(self._tasks):
            await asyncio.wait([task], timeout=5)
        self._store_thread.shutdown()
        self.store.close()

    @property
    def secret(self) -> bytes:
        """Known to this server only, and to its next start: signs addresses of pictures."""
        return self._secret

    async def stored(self, function: Callable[..., Value], *values: Any) -> Value:
        """Call a function of the store, in its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._store_thread, lambda: function(*values))

    # Jobs --------------------------------------------------------------------------------------

    async def submit(
        self,
        client: str,
        draw: Draw,
        *,
        files: Mapping[str, bytes] | None = None,
        only_watched: bool = False,
    ) -> Job:
        """Queue a job.

        Args:
            client: whose turn it takes.
            draw: what to draw; its pictures are decoded here.
            files: pictures that came as files instead, by argument.
            only_watched: make previews only while someone looks.

        Raises:
            Busy: too many jobs wait.
            UnknownName: no such model.
            ImageError: a picture that cannot be used.
            Undrawable: settings that cannot be drawn.
        """
        self._queue.check(client, self._retry_after())
        entry, how, refiner = await asyncio.to_thread(self._chosen, draw)
        pictures: dict[str, bytes | Path] = dict(files or {})
        if draw.image is None and "image" not in pictures:  # else its size counts: see worker.py
            await self._check_size(draw, how)
        for name, text in draw.pictures().items():
            pictures[name] = await self._picture(text)
        job = Job(
            id=new_id(),
            client=client,
            draw={**draw.said(), **dict.fromkeys(files or (), True), "model": entry.id},
            how=how,
            refiner=refiner,
            arguments=draw.arguments(),
            inputs={},
            previews=draw.previews and not only_watched,
        )
        await self._queued(job, pictures)
        return job

    async def enlarge(self, client: str, how: Enlarging, files: Sequence[bytes]) -> Job:
        """Queue a job that enlarges pictures; ``Job.files`` are the caller's to remove.

        Raises:
            Busy: too many jobs wait.
        """
        self._queue.check(client, self._retry_after())
        job = Job(
            id=new_id(),
            client=client,
            draw={"prompt": ""},
            kind="enlarge",
            how={},
            arguments=asdict(how),
            inputs={},
            previews=False,
        )
        await self._queued(job, {f"image-{number:02}": data for number, data in enumerate(files)})
        return job

    async def _queued(self, job: Job, pictures: Mapping[str, bytes | Path]) -> None:
        """Keep what a job starts from, and put it at the end of its client's line."""
        async with self._submitting:
            self._queue.check(job.client, self._retry_after())
            for name, data in pictures.items():
                try:
                    await self.stored(self.store.keep_input, job.id, name, data)
                except FileNotFoundError:
                    await self.stored(self.store.drop_inputs, job.id)
                    raise Undrawable(f"{name}: the picture's file is gone") from None
                job.inputs[name] = str(self.store.input_path(job.id, name).absolute())
            if job.kind == "draw":
                await self.stored(self.store.add_job, _record(job))
            self._jobs[job.id] = job
            self._queue.put(job.client, job)
        self._tell("job", job)
        self._next()

    def _chosen(self, draw: Draw) -> tuple[Entry, dict[str, Any], dict[str, Any] | None]:
        """The model that a request names, how it and its refiner are loaded: all is looked at."""
        draw.check()
        entry, refiner = self.catalog.find(draw.model), None
        for kind, name in draw.networks():
            self.catalog.network(kind, name)
        if draw.refiner:
            refiner = self.catalog.how(self.catalog.find(draw.refiner), **draw.loading())
        return entry, self.catalog.how(entry, beside=draw.beside(), **draw.loading()), refiner

    async def _check_size(self, draw: Draw, how: dict[str, Any]) -> None:
        """Refuse more pixels than one job may have; the model is looked into where that counts."""
        own = USUAL_LARGEST
        try:
            draw.check_size(own)
        except Undrawable:
            if draw.width is None or draw.height is None:
                try:
                    defaults = (await self.ask("describe", model=how))["defaults"]
                except Unready:
                    return  # whatever is wrong with the model, the job will say
                own = defaults["width"], defaults["height"]
            draw.check_size(own)

    async def _picture(self, text: str) -> bytes | Path:
        """A picture that came as text, or the file of one that the history has, or began with."""
        if text.startswith("input:"):
            path = await self.stored(self.store.kept_input, text.removeprefix("input:"))
            if path is None:
                raise Undrawable(f"no picture {text[6:60]!r} is kept: its drawing was deleted")
            return path
        kind, _, picture_id = text[:120].partition("picture:")
        if not kind and picture_id:
            picture = await self.stored(self.store.picture, text.removeprefix("picture:"))
            if picture is None:
                raise Undrawable(f"no picture {text[8:60]!r} is in the history")
            return self.store.picture_path(picture)
        return await asyncio.to_thread(picture_bytes, text, self.config.limits.upload_pixels)

    async def job(self, job_id: str) -> Job | None:
        """A job by its id, from memory or from the history."""
        if (job := self._jobs.get(job_id)) is not None:
            return job
        record = await self.stored(self.store.job, job_id)
        return None if record is None else await self._remembered(record)

    async def jobs(self, count: int = 50) -> list[Job]:
        """Offered, running and waiting drawings, then the last ones that ended."""
        live = [job for job in self._jobs.values() if job.state == "offered"]
        live += [self.current] if self.current is not None else []
        live += list(self._queue)
        live = [job for job in live if job.kind == "draw"]
        ended = []
        for record in await self.stored(self.store.recent_jobs, count):
            ended.append(self._jobs.get(record.id) or await self._remembered(record))
        shown = {job.id for job in live}
        return live + [job for job in ended if job.id not in shown]

    async def remove(self, picture: Picture) -> None:
        """Take a picture out of the history, and of the job that is remembered."""
        await self.stored(self.store.remove_picture, picture)
        if (job := self._jobs.get(picture.job)) is not None:
            job.pictures = [one for one in job.pictures if one.id != picture.id]
            if not job.pictures:
                job.inputs = {}

    async def cancel(self, job: Job) -> None:
        """End a job: one that waits at once, the one that is drawn between two steps.

        While its model is loaded the worker does not listen: it is replaced soon, if it must.
        """
        if job.cancelling:
            return  # the worker reads between two steps: what is sent again only fills its line
        if job is self.current:
            job.cancelling = True
            self._worker.send("cancel", job=job.id)
            self._tell("job", job)
            loop = asyncio.get_running_loop()
            loop.call_later(CANCEL_SECONDS, self._replace_loading_worker, job)
        elif job.state == "offered" or self._queue.remove(job.client, job):
            job.cancelling = True
            self._tell_waiting()
            # It is written also where who asked for it has left meanwhile.
            await asyncio.shield(self._spawn(self._end(job, "cancelled")))

    def _replace_loading_worker(self, job: Job) -> None:
        """End the worker where it still loads a model for a job that was cancelled."""
        if job is self.current and self.worker_state in ("starting", "loading"):
            self._worker.stop(at_once=True)
            self._worker_ended("the drawing process was replaced")

    async def resume(self, job: Job) -> None:
        """Put an offered job back into the queue.

        Raises:
            Busy: too many jobs wait.
            Undrawable: it was not offered.
            UnknownName: its model is gone.
        """
        if job.state != "offered" or job.cancelling:
            raise Undrawable(f"the job is {job.state}, not offered")
        draw = _again(job.draw)
        _, job.how, job.refiner = await asyncio.to_thread(self._chosen, draw)
        if job.state == "offered" and not job.cancelling:
            self._queue.check(job.client, self._retry_after())
            job.state = "queued"
            self._queue.put(job.client, job)
            await self.stored(self.store.set_state, job.id, "queued")
            self._tell("job", job)
            self._next()

    def position(self, job: Job) -> int | None:
        """How many jobs come before one that waits, the running one among them; else None."""
        if job.state != "queued":
            return None
        ahead = 0 if self.current is None else 1
        return ahead + next((i for i, other in enumerate(self._queue) if other is job), 0)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._queue)

    def watch(self, job: Job) -> None:
        """Someone looks: previews of the job for some seconds.

        Told once for each progress that is heard, and not while a model is loaded: the worker reads
        between two steps only, and what it has not read piles up.
        """
        if job is not self.current or job.previews or job.progress is job.watched:
            return
        if job.progress is None or job.progress["stage"] != "loading":
            job.watched = job.progress
            self._worker.send("watch", job=job.id, seconds=WATCH_SECONDS)

    def _retry_after(self) -> int:
        return max(1, min(600, math.ceil(self._seconds_each)))

    def _taken_up(self, record: JobRecord) -> Job:
        """A job of a server that was killed, to be offered again."""
        return Job(
            id=record.id,
            client=record.client,
            draw=record.draw,
            how={},
            arguments=_again(record.draw).arguments(),
            inputs=self.store.inputs_of(record.id, _input_names(record.draw)),
            created=record.created,
            state="offered",
        )

    async def _remembered(self, record: JobRecord) -> Job:
        """A job that has ended, from the history."""
        job = Job(
            id=record.id,
            client=record.client,
            draw=record.draw,
            how={},
            arguments={},
            inputs=await self.stored(self.store.inputs_of, record.id, _input_names(record.draw)),
            created=record.created,
            started=record.started,
            finished=record.finished,
            state=record.state,
            pictures=await self.stored(self.store.pictures_of, record.id),
            notes=record.outcome.get("notes", []),
            timings=record.outcome.get("timings"),
            error=record.outcome.get("error"),
        )
        job.ended.set()
        return job

    # The worker ----------------------------------------------------------------------------------

    @property
    def worker_state(self) -> str:
        """stopped, starting, loading, idle or drawing."""
        if not self._worker.is_running:
            return "stopped"
        if not self._is_ready:
            return "starting"
        stage = (self.current.progress or {}).get("stage") if self.current else None
        # The default model is loaded before any job: the first may wait for it without a word.
        if stage == "loading" or (self._is_loading and stage is None):
            return "loading"
        return "idle" if self.current is None else "drawing"

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id."""
        return self._worker.pid

    def unload(self) -> None:
        """Give the worker's memory back, by ending its process; the next job starts another."""
        if self.current is None:
            self._worker.stop()
            self._forget_worker()

    def _forget_worker(self) -> None:
        self.models, self._is_ready, self._is_loading = [], False, False

    def _next(self) -> None:
        """Give the worker the next job, if it has none."""
        if self._unload_timer is not None:
            self._unload_timer.cancel()
            self._unload_timer = None
        if self.current is not None:
            return
        job = self._queue.pop()
        if job is None:
            if self.config.idle_unload is not None:
                loop = asyncio.get_running_loop()
                self._unload_timer = loop.call_later(self.config.idle_unload, self.unload)
            return
        self.current = job
        job.state, job.started = "running", time.time()
        order: dict[str, Any] = {"job": job.id, "arguments": job.arguments, "inputs": job.inputs}
        if job.kind == "draw":
            order |= {"model": job.how, "refiner": job.refiner, "previews": job.previews}
            folder = self.store.pictures
        else:
            folder = self.store.enlarged
        self._worker.send(job.kind, folder=str(folder.absolute()), **order)
        self._tell("job", job)
        self._tell_waiting()

    def _hear(self, message: dict[str, Any]) -> None:
        kind, job = message.pop("kind"), self.current
        if kind == "ready":
            self.device, self._is_ready = message, True
        elif kind == "model":
            self.models, self._is_loading = message["models"], False
            self._next()  # where nothing waits, the time until it is let go begins
        elif message.get("job") == "":
            self._is_loading = kind == "progress"
            if kind == "failed":
                print(f"maple: {message['error']['message']}", file=sys.stderr)
        elif job is None or message.get("job") != job.id:
            return  # of a job that has ended
        elif kind == "progress":
            job.progress = _progress(message)
            self._tell("job", job)
        elif kind == "preview":
            job.preview, job.preview_step = message["image"], message["step"]
            self._tell("preview", job)
        else:
            self._drawn(job, kind, message)

    def _drawn(self, job: Job, kind: str, message: Mapping[str, Any]) -> None:
        """The worker is through with a job."""
        self.current = None
        now = time.time()
        taken = now - (job.started or now)
        self._seconds_each += 0.3 * (taken - self._seconds_each)
        if kind == "done" and job.kind == "enlarge":
            job.files = [Path(name) for name in message["files"]]
            self._spawn(self._end(job, "done"))
        elif kind == "done":
            job.notes, job.timings = message["notes"], message["timings"]
            pictures = [
                Picture(id=f"{job.id}-{index}", job=job.id, index=index, created=now, **picture)
                for index, picture in enumerate(message["pictures"])
            ]
            self._spawn(self._end(job, "done", pictures))
        elif kind == "cancelled":
            job.seen = message["picture"]
            self._spawn(self._end(job, "cancelled"))
        else:
            job.error = message["error"]
            self._spawn(self._end(job, "failed"))
        self._next()

    def _worker_ended(self, how: str) -> None:
        """The worker has died: its job has failed, and the next one gets a new worker."""
        self._forget_worker()
        if (job := self.current) is None:
            print(f"maple: {how}; the next job starts another", file=sys.stderr)
            return
        state = "cancelled" if job.cancelling else "failed"
        self.current = None
        if state == "failed":
            job.error = {"code": "worker_died", "message": how}
        self._spawn(self._end(job, state))
        self._next()

    async def _end(self, job: Job, state: str, pictures: list[Picture] | None = None) -> None:
        """Write a job's end into the history, then tell."""
        outcome = {"notes": job.notes, "timings": job.timings, "error": job.error}
        try:
            await self.stored(
                self.store.finish, job.id, state, outcome, pictures or [], job.started
            )
        except Exception as error:  # a full disk: the job is at its end all the same
            job.error = {"code": "failed", "message": f"the history cannot be written: {error}"}
            state = "failed"
        else:
            job.pictures = pictures or []
        job.state, job.finished = state, time.time()
        job.progress, job.preview, job.cancelling = None, None, False
        job.arguments, job.inputs = {}, job.inputs if job.pictures else {}
        self._jobs.move_to_end(job.id)
        job.ended.set()
        self._tell("job", job)
        ended = [other.id for other in self._jobs.values() if other.state in ENDED]
        for job_id in ended[:-SEEN]:
            self._jobs[job_id].seen = None  # megabytes each
        for job_id in ended[:-REMEMBERED]:
            del self._jobs[job_id]

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Listeners -----------------------------------------------------------------------------------

    @contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """A stream of events of a peer's that is open for a while.

        Raises:
            Busy: too many are.
        """
        with _taken(self._streams, peer, "too many streams of events are open: close some"):
            yield

    @contextmanager
    def archive(self, peer: str) -> Iterator[None]:
        """An archive of pictures that is made and sent: it lies on the disk for so long.

        Raises:
            Busy: too many are.
        """
        with _taken(self._archives, peer, "too many archives are being sent: try again later"):
            yield

    @asynccontextmanager
    async def listening(self, job: str | None = None) -> AsyncIterator[Feed]:
        """A feed of what happens from now on, to one job or to all."""
        feed = Feed(job)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)

    def _tell(self, kind: str, job: Job) -> None:
        for feed in self._feeds if job.kind == "draw" else ():
            feed.tell(kind, job)

    def _tell_waiting(self) -> None:
        if self._feeds:
            for job in self._queue:
                self._tell("job", job)

    # Plans ---------------------------------------------------------------------------------------

    async def ask(self, kind: str, **question: Any) -> dict[str, Any]:
        """Ask "describe" or "plan" of a second worker, which reads no weights and never draws.

        Raises:
            Unready: it cannot say.
            Busy: too many questions wait.
        """
        key = repr((kind, sorted(question.items(), key=repr)))
        if key in self._answers:
            return self._answers[key]
        if len(self._asked) >= MOST_ASKED:
            raise Busy(f"{MOST_ASKED} questions are waiting already: try again later", 1)
        request = secrets.token_hex(8)
        future = asyncio.get_running_loop().create_future()
        self._asked[request] = future
        if self._planner_timer is not None:  # else it could end it before it has answered
            self._planner_timer.cancel()
        self._planner.send(kind, request=request, **question)
        try:
            with anyio.fail_after(ANSWER_SECONDS):
                answer = await future
        except TimeoutError:
            self._planner.stop()
            raise Unready("failed", "this took too long to work out") from None
        finally:
            self._asked.pop(request, None)
            self._let_planner_go_later()
        if kind == "describe":
            self._answers[key] = answer
            while len(self._answers) > 64:
                self._answers.popitem(last=False)
        return answer

    def _let_planner_go_later(self) -> None:
        if self._planner_timer is not None:
            self._planner_timer.cancel()
        loop = asyncio.get_running_loop()
        self._planner_timer = loop.call_later(PLANNER_SECONDS, self._planner.stop)

    def _hear_plan(self, message: dict[str, Any]) -> None:
        if message["kind"] == "ready":
            self.device = self.device or {k: v for k, v in message.items() if k != "kind"}
            return
        future = self._asked.get(message.get("request", ""))
        if future is None or future.done():
            return
        if (error := message.get("error")) is not None:
            future.set_exception(Unready(error["code"], error["message"]))
        else:
            future.set_result(message["answer"])

    def _planner_ended(self, how: str) -> None:
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Unready("failed", how))


@contextmanager
def _taken(bound: Bound, peer: str, refusal: str) -> Iterator[None]:
    if not bound.take(peer):
        raise Busy(refusal, 5)
    try:
        yield
    finally:
        bound.give(peer)


def _record(job: Job) -> JobRecord:
    return JobRecord(
        id=job.id,
        client=job.client,
        state=job.state,
        created=job.created,
        started=None,
        finished=None,
        draw=job.draw,
        outcome={},
    )


def _again(said: Mapping[str, Any]) -> Draw:
    """The request that ``Draw.said`` tells of; its pictures are names only."""
    draw = {name: value for name, value in said.items() if name not in PICTURES}
    for name in LISTED:
        if name in draw:
            draw[name] = [{**each, "image": "kept"} for each in draw[name]]
    return Draw(**draw)


def _input_names(said: Mapping[str, Any]) -> list[str]:
    """What the pictures are called that the request started from which ``Draw.said`` tells of."""
    found = [name for name in PICTURES if said.get(name)]
    for several, name in LISTED.items():
        found += [f"{name}-{number}" for number in range(len(said.get(several) or ()))]
    return found


def _progress(message: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's word on how far a job is, as the APIs show it."""
    step, total, pace = message["index"], message["total"], message["pace"]
    share = step / total if total else 0.0
    stage = message["stage"]
    return {
        "stage": stage,
        "step": step,
        "total": total,
        "fraction": 0.0 if stage == "loading" else round(DECODING * share, 4),
        "seconds_per_step": round(pace, 6),
        "seconds_left": round((total - step) * pace, 3) if stage != "loading" else 0.0,
        "detail": message.get("detail", ""),
    }


def preview_bytes(job: Job) -> bytes:
    """A job's latest preview as a JPEG file's bytes."""
    return base64.b64decode(job.preview or "")
