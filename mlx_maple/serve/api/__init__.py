"""The HTTP APIs: ours (v1), AUTOMATIC1111's and OpenAI's, each a thin view of the studio."""

import os

import anyio
from fastapi import Request

from mlx_maple.serve.door import Door, peer_of
from mlx_maple.serve.studio import Job, Studio


def studio_of(request: Request) -> Studio:
    """The server's insides."""
    return request.app.state.studio


def door_of(request: Request) -> Door:
    """Who is let in."""
    return request.app.state.door


def client_of(request: Request, api: str) -> str:
    """Whose turn a request takes: its address, and there what it calls itself or else the API."""
    address = peer_of(request.scope)
    name = request.headers.get("x-maple-client", "")
    is_name = 0 < len(name) <= 64 and all(c.isalnum() or c in "-_" for c in name)
    return f"{address}/{name if is_name and name.isascii() else api}"


async def drawn(request: Request, job: Job) -> Job:
    """Wait for a job's end; one whose client has left is cancelled."""
    studio = studio_of(request)
    async with anyio.create_task_group() as tasks:

        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            await studio.cancel(job)

        tasks.start_soon(leave)
        await job.ended.wait()
        tasks.cancel_scope.cancel()
    return job


def machine_memory() -> tuple[int | None, int | None]:
    """All of the machine's memory and what of it is free, in bytes; None where it does not say."""
    from mlx_maple.cli import _machine

    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        total = None
    free = _machine.free_memory()
    return total, None if free is None else int(free if total is None else min(free, total))
