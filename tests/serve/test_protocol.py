"""What a connection may hold of the server, over real sockets."""

import asyncio
import contextlib
import socket

import pytest
import uvicorn

from mlx_maple.serve.bounds import Bound
from mlx_maple.serve.config import Limits
from mlx_maple.serve.protocol import protocol_of

LARGE = b"x" * (8 << 20)  # more than the system's buffers take
OPENED = []  # connections of one test
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def inside(scope, receive, send):
    body = LARGE if scope["path"] == "/large" else b"small"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def within(act, **limits):
    """Run ``act`` with the port of a server of these limits."""

    async def run():
        config = uvicorn.Config(
            inside,
            http=protocol_of(Limits(**limits)),
            ws="none",
            lifespan="off",
            log_level="critical",
            timeout_keep_alive=30,
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                await asyncio.wait_for(act(listener.getsockname()[1]), 20)
            finally:
                for writer in OPENED:
                    writer.transport.abort()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
                OPENED.clear()
                server.should_exit = server.force_exit = True
                await task

    asyncio.run(run())


async def connected(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    OPENED.append(writer)
    return reader, writer


async def status(port, request=GET):
    """What one request on a connection of its own gets, and the connection."""
    reader, writer = await connected(port)
    writer.write(request)
    return (await reader.readline()).split()[1], reader, writer


def test_connections_are_bounded_and_a_503_says_so():
    async def act(port):
        opened = [await status(port) for _ in range(3)]
        assert [each[0] for each in opened] == [b"200"] * 3
        code, reader, _ = await status(port)
        assert code == b"503"
        rest = await reader.read()  # to its end: the connection is closed
        assert b"too many connections" in rest and b"retry-after" in rest
        opened.pop()[2].close()
        await asyncio.sleep(0.1)
        assert (await status(port))[0] == b"200"

    within(act, connections=3, connections_each=3)


def test_who_does_not_read_is_let_go_of():
    large = GET.replace(b"/ ", b"/large ")

    async def act(port):
        _, reader, _ = await status(port, large)
        reader._transport.pause_reading()
        await asyncio.sleep(0.6)
        reader._transport.resume_reading()
        with pytest.raises(ConnectionResetError):  # and the system holds nothing of it either
            await reader.read()
        # Who reads gets it all, and be it slowly.
        _, reader, _ = await status(port, large)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(16):
            await reader.readexactly(len(LARGE) // 16)
            await asyncio.sleep(0.1)

    within(act, read_seconds=0.3)


def test_a_head_is_waited_for_a_bounded_time():
    async def act(port):
        reader, writer = await connected(port)
        writer.write(b"GET / HT")
        assert await asyncio.wait_for(reader.read(), 5) == b""

    within(act, header_seconds=0.2)


def test_what_a_bound_gives_back_can_be_taken_again():
    bound = Bound(5, 3)
    assert bound.take("a", 3) and not bound.take("a") and bound.take("b", 2)
    assert not bound.take("c") and len(bound) == 5
    bound.give("a", 2)
    assert bound.take("c", 2) and not bound.take("c") and len(bound) == 5
    for peer, count in (("a", 1), ("b", 2), ("c", 2)):
        bound.give(peer, count)
    assert len(bound) == 0 and not bound._open
