"""What a server was started with, and how much one request may ask of it."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORT = 7860  # where A1111's clients look first
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_TOKEN = 12  # characters


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request and of the queue; what a drawing itself takes is wider.

    Attributes:
        width: least and most, in pixels.
        height: likewise.
        steps: likewise.
        count: pictures of one job, likewise.
        pixels: of all pictures of one job together.
        prompt: characters of a prompt.
        upload: bytes of a request's body.
        upload_pixels: of a picture that comes in.
        whole_pixels: of all pictures of one job whose masked part alone is drawn.
        queued: jobs that wait, of all clients.
        queued_each: jobs that wait, of one peer (address).
        body_seconds: until a request's body must be there.
        header_seconds: until a request's head must be there.
        read_seconds: that a client may leave what it was sent unread.
        connections: that are open.
        connections_each: of one peer, so are the next two.
        streams: of events that are open.
        streams_each: likewise.
        archives: of pictures that are made or sent.
        archives_each: likewise.
        bodies: bytes of requests that are in memory.
        bodies_each: likewise.
        presets: that are kept.
    """

    width: tuple[int, int] = (64, 2048)
    height: tuple[int, int] = (64, 2048)
    steps: tuple[int, int] = (1, 200)
    count: tuple[int, int] = (1, 16)
    pixels: int = 16 * 1024 * 1024
    prompt: int = 20_000
    upload: int = 32 << 20
    upload_pixels: int = 40_000_000
    whole_pixels: int = 160_000_000
    queued: int = 64
    queued_each: int = 32
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    read_seconds: float = 30.0
    connections: int = 768
    connections_each: int = 512
    streams: int = 128
    streams_each: int = 48
    archives: int = 8
    archives_each: int = 2
    bodies: int = 512 << 20
    bodies_each: int = 256 << 20
    presets: int = 500


@dataclass(frozen=True, kw_only=True)
class Config:
    """One server.

    Attributes:
        host: address that it listens on.
        port: likewise.
        token: that every request must know; None on the loopback address only.
        is_behind_proxy: whether a proxy on this machine says whom requests come from.
        allowed_hosts: names that it may be asked for by, beside addresses and localhost.
        model: that draws where none is named: what ``load`` takes; None is the embedded one.
        low_memory: hold one network at a time.
        dtype: of weights and activations; None is the device's usual.
        quantize: bits to keep weights in.
        idle_unload: seconds without a job until the worker's memory is given back; None is never.
        data: folder of pictures, history and presets.
        limits: of requests.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    token: str | None = None
    is_behind_proxy: bool = False
    allowed_hosts: tuple[str, ...] = ()
    model: str | None = None
    low_memory: bool = False
    dtype: str | None = None
    quantize: int | None = None
    idle_unload: float | None = None
    data: Path = field(default_factory=lambda: data_folder())
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse to be reachable from elsewhere without a token.

        Raises:
            ValueError: in one line.
        """
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ValueError(f"a token has {SHORTEST_TOKEN} characters or more.")
        if self.token is not None and not self.token.isascii():
            raise ValueError("a token is ASCII: headers carry nothing else.")
        if self.host not in LOOPBACK and self.token is None:
            raise ValueError(f"{self.host} can be reached from other machines: it takes a token.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


def pixels_of(width: int, height: int, arguments: Mapping[str, Any]) -> int:
    """Pixels of all pictures of one job, of the larger drawing where there is a second."""
    scale = arguments.get("hires_scale") or 1
    return int(width * height * (arguments.get("count") or 1) * scale**2)


def data_folder() -> Path:
    """Where pictures and history are kept: $MAPLE_DATA, else the user's data folder."""
    shared = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    path = Path(os.environ.get("MAPLE_DATA") or Path(shared) / "mlx-maple")
    try:
        return path.expanduser()
    except RuntimeError:  # a container's user without a name or a home
        return Path(tempfile.gettempdir()) / f"mlx-maple-{os.getuid()}" / "data"
