"""`maple serve` in a process of its own, as people run it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
from known import TINY

_ADDRESS = re.compile(r"http://\S+:(\d+)/")


class Server:
    """A server on a free port.

    Attributes:
        port: that it listens on.
        pid: of its process.
        lines: what it said on stderr until it answered.
    """

    def __init__(self, data: Path, *options: str, model: str | None = str(TINY)) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlx_maple", "serve", "--port", "0", "--data", str(data)]
        command += ["-m", model] if model else []
        self._log = open(data.parent / f"{data.name}.log", "w+")
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, *options],
            stderr=self._log,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.pid = self._process.pid
        self.port = self._wait()
        self.base = f"http://127.0.0.1:{self.port}"

    def _wait(self) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if match := _ADDRESS.search(self.said()):
                return int(match[1])
            assert self._process.poll() is None, self.said()
            time.sleep(0.01)
        raise AssertionError(f"it does not answer: {self.said()}")

    def said(self) -> str:
        """Everything that it said on stderr."""
        return Path(self._log.name).read_text()

    def client(self, **values) -> httpx2.Client:
        """A client of it."""
        return httpx2.Client(base_url=self.base, timeout=120, **values)

    def kill(self) -> None:
        """SIGKILL, and nothing before it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        code = self._process.wait(30)
        self._log.close()
        return code

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
