"""Attacks on a real server, and what each gets. Run by `make serve-check`.

As a script it prints them as the table of docs/server.md:

    python tests/serve/check_attacks.py
"""

import base64
import http.client
import json
import select
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from live import Server

from mlx_maple.serve.config import Limits
from mlx_maple.serve.door import TRIES

TOKEN = "correct-horse-battery"
JOB = json.dumps({"prompt": "x", "steps": 1, "width": 64, "height": 64}).encode()
JSON = {"Content-Type": "application/json"}


def asked(port, method, path, body=b"", headers=None, host=None) -> str:
    """The status that a request gets."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{port}")
        for name, value in {
            **({"Content-Length": len(body)} if body else {}),
            **(headers or {}),
        }.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        return str(connection.getresponse().status)
    finally:
        connection.close()


def raw(port, data, seconds=60, drip=0.0) -> str:
    """What bytes on a socket get: a status, or "closed" and when."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        began = time.monotonic()
        try:
            line.sendall(data)
            while drip:
                line.settimeout(drip)
                try:
                    answer = line.recv(65536)
                    break
                except TimeoutError:
                    line.sendall(b"x")
                    if time.monotonic() - began > seconds:
                        return "held open"
            else:
                answer = line.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
        took = time.monotonic() - began
        status = answer.split()[1].decode() if answer[:5] == b"HTTP/" else "closed"
        return f"{status} after {took:.0f} s" if took > 2 else status


def png_of(width, height) -> str:
    """A PNG's head that declares a size, in base64; a few hundred bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def post(path, values, headers=None, **options):
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    return lambda port: asked(port, "POST", path, body, {**JSON, **(headers or {})}, **options)


def get(path, headers=None, **options):
    return lambda port: asked(port, "GET", path, b"", headers, **options)


def head(port, length):
    return (
        f"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def many_connections(port) -> str:
    """What the last of many connections that say nothing gets."""
    with ExitStack() as stack:
        for _ in range(Limits.connections_each + 1):
            line = socket.create_connection(("127.0.0.1", port), timeout=10)
            stack.enter_context(line)
        return line.recv(65536).split()[1].decode()


def many_streams(port) -> str:
    """What the last of many streams of events gets."""
    request = f"GET /api/v1/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with ExitStack() as stack:
        for _ in range(Limits.streams_each + 1):
            line = socket.create_connection(("127.0.0.1", port), timeout=10)
            stack.enter_context(line)
            line.sendall(request)
            status = line.recv(65536).split()[1].decode()
        return status


def unread(port) -> str:
    """When a connection is ended that asks for megabytes and reads nothing."""
    request = f"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", port))
        line.sendall(request * 100)
        began = time.monotonic()
        ends = select.poll()
        ends.register(line, 0)  # errors and the end are told in any case
        if not ends.poll(60_000):
            return "held open"
        took = time.monotonic() - began
        return f"closed after {30 if 29 < took < 50 else took:.0f} s"  # a busy machine is late


def many_wrong_tokens(port) -> str:
    """What the right token gets after many wrong ones."""
    for number in range(TRIES):
        asked(port, "GET", "/api/v1/system", headers={"Authorization": f"Bearer wrong{number:08}"})
    return asked(port, "GET", "/api/v1/system", headers={"Authorization": f"Bearer {TOKEN}"})


Attack = tuple[str, Callable[[int], str], str]
# What is tried, how, and what it must get.
OPEN: list[Attack] = [
    ("control: a job from a program", post("/api/v1/jobs", JOB), "202"),
    ("Host of another name (DNS rebinding)", get("/api/v1/system", host="evil.example"), "403"),
    ("Host that begins like ours", get("/api/v1/system", host="127.0.0.1.evil.example"), "403"),
    ("Host: an address of the network", get("/api/v1/system", host="192.168.1.5:7860"), "403"),
    (
        "job from another site's page",
        post("/api/v1/jobs", JOB, {"Origin": "https://evil.example"}),
        "403",
    ),
    ("job from a sandboxed page", post("/api/v1/jobs", JOB, {"Origin": "null"}), "403"),
    (
        "job from another port of this machine",
        post("/api/v1/jobs", JOB, {"Origin": "http://127.0.0.1:1"}),
        "403",
    ),
    (
        "a form's text/plain as JSON",
        post("/api/v1/jobs", JOB, {"Content-Type": "text/plain"}),
        "422",
    ),
    (
        "a preflight for CORS",
        lambda port: asked(
            port,
            "OPTIONS",
            "/api/v1/jobs",
            b"",
            {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        ),
        "403",
    ),
    (
        "a picture shown in another site's page",
        get("/api/v1/pictures", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
        "403",
    ),
    ("traversal in a picture's id", get("/api/v1/pictures/..%2f..%2fhistory.sqlite3/file"), "404"),
    ("traversal in the page's files", get("/page/..%2f..%2f..%2f..%2fetc/passwd"), "404"),
    ("traversal, not normalised", get("/page/../../../../etc/passwd"), "404"),
    ("a model by its path", post("/api/v1/jobs", {"prompt": "x", "model": "/etc/passwd"}), "404"),
    (
        "a model by its path, A1111's way",
        post(
            "/sdapi/v1/txt2img", {"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}
        ),
        "404",
    ),
    (
        "an autoencoder by its path",
        post("/api/v1/jobs", {"prompt": "x", "vae": "../../../etc/passwd"}),
        "404",
    ),
    (
        "a LoRA by its path",
        post("/api/v1/jobs", {"prompt": "x", "loras": [{"name": "/etc/passwd"}]}),
        "404",
    ),
    (
        "a LoRA by its path, in a prompt",
        post("/api/v1/jobs", {"prompt": "x <lora:../../etc/passwd:1>"}),
        "404",
    ),
    (
        "a ControlNet by its path",
        post(
            "/api/v1/jobs",
            {"prompt": "x", "controls": [{"name": "/etc/passwd", "image": png_of(8, 8)}]},
        ),
        "404",
    ),
    (
        "an upscaler by its path",
        post("/api/v1/jobs", {"prompt": "x", "hires_scale": 2, "hires_upscaler": "/etc/passwd"}),
        "404",
    ),
    (
        "a picture from a URL (SSRF)",
        post("/sdapi/v1/img2img", {"init_images": ["http://169.254.169.254/"]}),
        "422",
    ),
    (
        "a picture from a file: URL",
        post("/api/v1/jobs", {"prompt": "x", "image": "file:///etc/passwd"}),
        "422",
    ),
    (
        "a PNG of 30000x30000 in 150 bytes",
        post("/api/v1/jobs", {"prompt": "x", "image": png_of(30000, 30000)}),
        "422",
    ),
    (
        "the same to A1111's API",
        post("/sdapi/v1/img2img", {"init_images": [png_of(30000, 30000)]}),
        "422",
    ),
    ("the same to png-info", post("/sdapi/v1/png-info", {"image": png_of(30000, 30000)}), "422"),
    ("1,000,000 pixels wide", post("/api/v1/jobs", {"prompt": "x", "width": 1000000}), "422"),
    ("a billion steps", post("/api/v1/jobs", {"prompt": "x", "steps": 10**9}), "422"),
    (
        "16 pictures of 2048x2048",
        post("/api/v1/jobs", {"prompt": "x", "width": 2048, "height": 2048, "count": 16}),
        "422",
    ),
    ("a prompt of a million letters", post("/api/v1/jobs", {"prompt": "x" * 10**6}), "422"),
    ("NaN for a number", post("/api/v1/jobs", b'{"prompt": "x", "guidance_scale": NaN}'), "422"),
    ("JSON 100,000 deep", post("/api/v1/jobs", b"[" * 100_000), "400"),
    (
        "half a character, which no answer can hold",
        post("/sdapi/v1/options", b'{"sd_vae": "\\ud800"}'),
        "422",
    ),
    ("an address of 60 fields", get("/api/v1/health?" + "a&" * 60), "400"),
    ("bytes that are no UTF-8", post("/api/v1/jobs", b'{"prompt": "\xff\xfe"}'), "400"),
    ("a body of 40 MB, as it says", lambda port: raw(port, head(port, 40 << 20)), "413"),
    (
        "a body of 40 MB in pieces",
        lambda port: raw(
            port,
            head(port, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + b"100000\r\n"
            + b"x" * (1 << 20)
            + b"\r\n" * 1
            + (b"100000\r\n" + b"x" * (1 << 20) + b"\r\n") * 40,
        ),
        "closed",
    ),
    ("a body that never comes", lambda port: raw(port, head(port, 100)), "408 after 30 s"),
    (
        "a body that drips, a byte a second",
        lambda port: raw(port, head(port, 1000), drip=1.0),
        "408 after 30 s",
    ),
    (
        "a head that never ends",
        lambda port: raw(port, b"GET / HTTP/1.1\r\nHost: x"),
        "closed after 10 s",
    ),
    ("a head of 100 kB", lambda port: raw(port, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000), "400"),
    (
        "two lengths (request smuggling)",
        lambda port: raw(
            port,
            head(port, 5).replace(
                b"Content-Length: 5", b"Content-Length: 5\r\nTransfer-Encoding: chunked"
            )
            + b"0\r\n\r\n",
        ),
        "422",
    ),
    ("513 connections of one address, the last", many_connections, "503"),
    ("49 streams of events of one address, the last", many_streams, "429"),
    ("an answer of megabytes that is not read", unread, "closed after 30 s"),
    ("control: it still draws", post("/sdapi/v1/txt2img", JOB), "200"),
]
LOCKED: list[Attack] = [
    ("no token", get("/api/v1/system"), "401"),
    (
        "a wrong token",
        get("/api/v1/system", {"Authorization": "Bearer wrong-horse-battery"}),
        "401",
    ),
    (
        "the beginning of the token",
        get("/api/v1/system", {"Authorization": f"Bearer {TOKEN[:-1]}"}),
        "401",
    ),
    ("the token in an API's address", get(f"/api/v1/system?token={TOKEN}"), "401"),
    (
        "a picture with a made-up signature",
        get(f"/api/v1/pictures/{'0' * 24}-0/file?expires=99999999999&key={'0' * 64}"),
        "401",
    ),
    (
        "signing in from another site's page",
        post("/api/v1/session", {"token": TOKEN}, {"Origin": "https://evil.example"}),
        "403",
    ),
    ("signing in with a wrong token", post("/api/v1/session", {"token": "wrong-horse"}), "401"),
    (
        "a made-up session",
        get("/api/v1/system", {"Cookie": f"maple_session=99999999999.{'0' * 64}"}),
        "401",
    ),
    ("control: the page, which asks for it", get("/"), "200"),
    ("control: the token", get("/api/v1/system", {"Authorization": f"Bearer {TOKEN}"}), "200"),
    ("the right token after ten wrong ones", many_wrong_tokens, "429"),
]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("attacks") / "data") as server:
        yield server.port


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("locked") / "data", "--token", TOKEN) as server:
        yield server.port


@pytest.mark.parametrize(
    ("attack", "expected"), [row[1:] for row in OPEN], ids=[r[0] for r in OPEN]
)
def test_open(port, attack, expected):
    assert attack(port) == expected


@pytest.mark.parametrize(
    ("attack", "expected"), [row[1:] for row in LOCKED], ids=[r[0] for r in LOCKED]
)
def test_locked(locked, attack, expected):
    assert attack(locked) == expected


def table(rows) -> Iterator[str]:
    """What was tried and what it got, for docs/server.md; controls are left out."""
    yield "| tried | got |"
    yield "|---|---|"
    for name, _, got in rows:
        if not name.startswith("control:"):
            yield f"| {name} | {got} |"


def main() -> int:
    """Print the table."""
    wrong, found = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for rows, options in ((OPEN, ()), (LOCKED, ("--token", TOKEN))):
            with Server(Path(folder) / str(len(options)), *options) as server:
                for name, attack, expected in rows:
                    got = attack(server.port)
                    wrong += got != expected
                    found.append((name, attack, f"{got}{'' if got == expected else ' (!)'}"))
    print("\n".join(table(found)))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
