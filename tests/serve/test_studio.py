"""Jobs between their request and their end, with a worker that only listens."""

import asyncio
import os
import threading
from contextlib import ExitStack

import anyio
import pytest

from mlx_maple.serve import studio as module
from mlx_maple.serve.config import Config
from mlx_maple.serve.link import WorkerLink
from mlx_maple.serve.queue import Busy
from mlx_maple.serve.store import JobRecord, new_id
from mlx_maple.serve.studio import MOST_ASKED, Job, Studio


def job(**values):
    given = {"draw": {"prompt": "a leaf"}, "how": {}, "arguments": {}, "inputs": {}}
    return Job(id=new_id(), client="someone", **given, **values)


def within(tmp_path, act):
    """Run ``act`` with a studio whose messages to its workers are kept instead of sent."""

    async def run():
        studio = Studio(Config(data=tmp_path / "data"))
        sent = []
        for link in (studio._worker, studio._planner):
            link.send = lambda kind, **values: sent.append(kind)
        try:
            await act(studio, sent)
        finally:
            await studio.close()

    asyncio.run(run())


def test_who_looks_does_not_fill_the_workers_line(tmp_path):
    """The worker reads between two steps: what is sent to it meanwhile must stay small."""

    async def act(studio, sent):
        running = studio.current = job(previews=False)
        for stage, expected in (
            (None, 1),
            ("loading", 1),
            ("sample", 2),
            ("sample", 3),
        ):
            running.progress = None if stage is None else {"stage": stage}
            for _ in range(50):
                studio.watch(running)
            assert sent.count("watch") == expected
        for _ in range(50):
            await studio.cancel(running)
        assert sent.count("cancel") == 1

    within(tmp_path, act)


def test_a_job_is_cancelled_also_where_who_asked_has_left(tmp_path):
    async def act(studio, sent):
        waiting = job()
        studio._jobs[waiting.id] = waiting
        studio._queue.put(waiting.client, waiting)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await studio.cancel(waiting)
        await asyncio.wait_for(waiting.ended.wait(), 10)
        assert waiting.state == "cancelled" and studio.waiting == 0

    within(tmp_path, act)


@pytest.mark.parametrize("stage", ["loading", "sample", None])
def test_a_cancelled_job_does_not_wait_for_its_model(tmp_path, monkeypatch, stage):
    """A worker that loads does not listen: it is replaced. One that draws is not."""
    monkeypatch.setattr(module, "CANCEL_SECONDS", 0.05)

    async def act(studio, sent):
        stopped = []
        monkeypatch.setattr(WorkerLink, "is_running", True)
        studio._worker.stop = lambda **how: stopped.append(how)
        studio._is_ready = True
        running, after = job(), job()
        studio.current = running
        studio._jobs[running.id] = studio._jobs[after.id] = running
        running.state, running.progress = "running", stage and {"stage": stage}
        studio._is_loading = stage is None  # the default model, before the first job
        studio._queue.put(after.client, after)
        await studio.cancel(running)
        assert running.cancelling and running.state == "running"  # which the state says meanwhile
        await asyncio.sleep(0.2)
        if stage != "sample":
            assert stopped == [{"at_once": True}]
            assert running.state == "cancelled" and running.error is None
            assert studio.current is after and sent[-1] == "draw"
        else:
            assert stopped == [] and studio.current is running
        studio.current = None

    within(tmp_path, act)


def test_a_worker_that_does_not_read_holds_up_nobody(tmp_path, monkeypatch):
    """One that loads a model; a long prompt is more than its line holds."""

    class Deaf:
        returncode = 0

        def __init__(self, command, *, pass_fds, **values):
            self.line = os.dup(pass_fds[0])

        def wait(self, patience=None):
            return 0

    monkeypatch.setattr("subprocess.Popen", Deaf)
    sent = []

    async def run():
        link = WorkerLink(tmp_path, lambda message: None, lambda how: None)
        link.send("draw", prompt="a leaf" * 1_000_000)
        link.send("cancel")
        sent.append(link._process)
        link.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    thread.join(20)
    assert sent and not thread.is_alive()
    os.close(sent[0].line)


def test_questions_are_bounded(tmp_path):
    async def act(studio, sent):
        asked = [asyncio.ensure_future(studio.ask("plan", width=n)) for n in range(MOST_ASKED)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await studio.ask("plan", width=-1)
        assert len(sent) == MOST_ASKED
        for question in asked:
            question.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    within(tmp_path, act)


def test_streams_are_bounded(tmp_path):
    async def act(studio, sent):
        most = studio.config.limits.streams_each
        with ExitStack() as stack:
            for _ in range(most):
                stack.enter_context(studio.stream("10.0.0.1"))
            with pytest.raises(Busy), studio.stream("10.0.0.1"):
                pass
            with studio.stream("10.0.0.2"):
                pass
        with studio.stream("10.0.0.1"):
            pass

    within(tmp_path, act)


def test_an_offered_job_that_cannot_be_read_does_not_keep_the_server_from_starting(tmp_path):
    async def act(studio, sent):
        record = JobRecord(
            id=new_id(),
            client="someone",
            state="queued",
            created=1.0,
            started=None,
            finished=None,
            draw={"prompt": "a leaf", "setting_of_another_version": 1},
            outcome={},
        )
        studio.store.add_job(record)
        await studio.start()
        (shown,) = await studio.jobs()
        assert shown.state == "failed" and shown.error["code"] == "invalid"

    within(tmp_path, act)
