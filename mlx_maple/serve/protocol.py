"""HTTP/1.1 that waits bounded times, over a bounded number of connections, as uvicorn does not.

A head that never ends, an answer that nobody reads and a client with a thousand connections each
hold something of the server; what each may hold is bounded here.
"""

import asyncio
import socket
import struct
from contextlib import suppress

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_maple.serve.bounds import Bound
from mlx_maple.serve.config import Limits
from mlx_maple.serve.door import peer_of

LINGER = 1.0  # seconds that a connection with no room may take to hear so
_NO_ROOM = "too many connections are open: close some, or try again later\n"
_REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\n"
    f"content-length: {len(_NO_ROOM)}\r\nretry-after: 5\r\nconnection: close\r\n\r\n{_NO_ROOM}"
).encode()


class PatientProtocol(H11Protocol):
    """One connection; see ``protocol_of`` for the bounds."""

    limits = Limits()
    connections_open = Bound(limits.connections, limits.connections_each)

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Expect a request, if there is room for one."""
        self._timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._peer = peer_of({"client": transport.get_extra_info("peername")})
        self._is_refused = not self.connections_open.take(self._peer)
        if self._is_refused:
            self.transport = transport
            transport.write(_REFUSAL)
            # A moment later: closed at once, with what came in unread, it would only be reset.
            self.loop.call_later(LINGER, transport.abort)
            return
        super().connection_made(transport)
        self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        """Expect the rest of a head that has begun."""
        if not self._is_refused:
            super().data_received(data)
            self._expect_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        if self._is_refused:
            return
        self.connections_open.give(self._peer)
        self._stop_waiting()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What was sent is not read: wait for that a bounded time, too."""
        if self._is_refused:
            return
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """It was read."""
        if not self._is_refused:
            self._stop_waiting_for_reader()
            super().resume_writing()

    def on_response_complete(self) -> None:
        """Go on with the next request; what the last answer left unread is dropped in time."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait_for_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is not used; what it does not read of the last is dropped."""
        super().timeout_keep_alive_handler()
        if self.transport.is_closing():
            self._wait_for_reader()

    def _expect_a_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.header_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_for_reader(self, unread: int | None = None) -> None:
        """Look in a while whether less is unread than now, or the connection ends."""
        self._stop_waiting_for_reader()
        now = self.transport.get_write_buffer_size()
        if unread is not None and now >= unread > 0:
            self._drop()
        elif now:
            seconds = self.limits.read_seconds
            self._reader_timer = self.loop.call_later(seconds, self._wait_for_reader, now)

    def _stop_waiting_for_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _drop(self) -> None:
        """End the connection and what was sent over it, also what the system holds of that."""
        line = self.transport.get_extra_info("socket")
        if line is not None:
            with suppress(OSError):  # it is closed already
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


def protocol_of(limits: Limits) -> type[PatientProtocol]:
    """The protocol of one server, with its own bounds."""

    class Protocol(PatientProtocol):
        pass

    Protocol.limits = limits
    Protocol.connections_open = Bound(limits.connections, limits.connections_each)
    return Protocol
