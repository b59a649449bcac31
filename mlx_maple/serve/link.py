"""The worker process from outside: start it, send to it, hear from it, know when it ended."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mlx_maple.serve.worker import MOST_BYTES

PATIENCE = 5.0  # seconds between asking it to end and ending it

# `-m` would put the current folder before the standard library on its path: it gets ours instead.
_START = (
    "import sys; sys.path[:] = sys.argv[2].split(chr(0x1f)); "
    "from mlx_maple.serve.worker import main; main(int(sys.argv[1]))"
)


class WorkerLink:
    """One worker process, started when it is first needed."""

    def __init__(
        self,
        folder: Path,
        hear: Callable[[dict[str, Any]], None],
        ended: Callable[[str], None],
    ) -> None:
        """Prepare to start a worker.

        Args:
            folder: that it runs in.
            hear: called in the event loop with each message.
            ended: called in the event loop, with how, when it ended without being asked to.
        """
        self._folder = folder
        self._hear = hear
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return None if self._process is None else self._process.pid

    def send(self, kind: str, **values: Any) -> None:
        """Send a message; a worker that is not there is started first.

        In a thread: a worker that loads does not read, and a long prompt fills the line.
        """
        if self._link is None:
            self._start()
        self._outbox.put(json.dumps({"kind": kind, **values}).encode())

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = chr(0x1F).join(entry for entry in sys.path if entry)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=self._folder,
                pass_fds=(theirs.fileno(),),
            )
        finally:
            theirs.close()
        link = Connection(ours.detach())
        self._process, self._link, self._outbox = process, link, SimpleQueue()
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=_send_all, args=(link, self._outbox), name="to worker", daemon=True
        ).start()
        threading.Thread(
            target=self._listen, args=(loop, process, link), name="worker", daemon=True
        ).start()

    def _listen(
        self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes], link: Connection
    ) -> None:
        while True:
            try:
                message = json.loads(link.recv_bytes(MOST_BYTES))
            except (EOFError, OSError):
                break
            if not _call(loop, self._hear_from, process, message):
                return
        _reap(process)
        _call(loop, self._gone, process)

    def _hear_from(self, process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        if process is self._process:
            self._hear(message)

    def _gone(self, process: subprocess.Popen[bytes]) -> None:
        if process is not self._process:
            return  # it was asked to end
        self._forget()
        self._ended(_how(process.returncode))

    def _forget(self) -> None:
        self._outbox.put(None)
        if self._link is not None:
            self._link.close()
        self._process = self._link = None

    def stop(self, *, at_once: bool = False) -> None:
        """Ask it to end, and see to it in the background; a later message starts a fresh one.

        Args:
            at_once: do not wait for its answer.
        """
        process = self._process
        if process is None:
            return
        self._outbox.put(None)
        if self._link is not None:
            # Wakes the thread that listens, too; closing alone would not.
            with socket.socket(fileno=os.dup(self._link.fileno())) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)
        self._process = self._link = None
        patience = 0.0 if at_once else PATIENCE
        threading.Thread(target=_reap, args=(process, patience), name="reap", daemon=True).start()


def _send_all(link: Connection, outbox: "SimpleQueue[bytes | None]") -> None:
    """Send what comes, in its order, until there is no more of it or nobody to hear it."""
    while (data := outbox.get()) is not None:
        try:
            link.send_bytes(data)
        except OSError:
            return  # it is gone: the thread that listens tells


def _reap(process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: Any) -> bool:
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:  # the loop is closed: the server has ended
        return False
    return True


def _how(code: int) -> str:
    """A return code in words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        likely = " (most likely out of memory)" if -code == signal.SIGKILL else ""
        return f"the drawing process was ended by {name}{likely}"
    return f"the drawing process ended with code {code}"
