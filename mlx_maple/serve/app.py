"""The ASGI application, and the server that runs it."""

import logging
import resource
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from mlx_maple import __version__
from mlx_maple.images import ImageError
from mlx_maple.serve.api import a1111, openai, v1
from mlx_maple.serve.catalog import UnknownName
from mlx_maple.serve.config import Config
from mlx_maple.serve.door import Door
from mlx_maple.serve.draw import Undrawable
from mlx_maple.serve.errors import ApiError, error_response
from mlx_maple.serve.protocol import protocol_of
from mlx_maple.serve.queue import Busy
from mlx_maple.serve.security import Security
from mlx_maple.serve.studio import Studio

PAGE = Path(__file__).with_name("page")
DESCRIPTION = """Stable Diffusion on MLX. `/api/v1` is the server's own API; `/sdapi/v1` speaks as
AUTOMATIC1111's web UI does, `/v1` as OpenAI does, as far as pictures go."""


def make_app(config: Config) -> FastAPI:
    """The application; its history is opened, and its worker started, when it starts.

    Raises:
        InUse: another server has the data folder.
        OSError: it cannot be written.
    """
    studio = Studio(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await studio.start()
        yield
        await studio.close()

    door = Door(config.token, lambda: studio.secret)
    app = _Guarded(
        title="mlx-maple",
        version=__version__,
        description=DESCRIPTION,
        license_info={"name": "MIT"},
        lifespan=lifespan,
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
    )
    app.guard = lambda inside: Security(inside, config, door)
    app.state.studio, app.state.door = studio, door
    for router in (v1.router, a1111.router, a1111.controlnet, a1111.root, openai.router):
        app.include_router(router)
    _answer_errors(app)
    if (PAGE / "index.html").is_file():
        app.mount("/page", _PageFiles(directory=PAGE), name="page")

        @app.get("/", include_in_schema=False)
        async def index() -> FileResponse:
            return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    return app


class _Guarded(FastAPI):
    """An application with a guard around all of it, also around its answers to its own faults."""

    guard: Callable[[ASGIApp], ASGIApp]

    def build_middleware_stack(self) -> ASGIApp:
        return self.guard(super().build_middleware_stack())


class _PageFiles(StaticFiles):
    """The page's files, of which a browser asks each time whether they are still the same.

    Without this it may keep some from before an update, and those of one version fit together.
    """

    def file_response(self, *args: Any, **values: Any) -> Response:
        response = super().file_response(*args, **values)
        response.headers["cache-control"] = "no-cache"
        return response


def _answer_errors(app: FastAPI) -> None:
    """Errors in the form of the API that was asked."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        details = [{"field": error.field, "message": error.message}] if error.field else []
        return error_response(
            request.url.path,
            error.status,
            error.message,
            code=error.code,
            details=details,
            headers=error.headers,
        )

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(
            request.url.path, error.status_code, str(error.detail), headers=error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        details = [
            {
                "field": ".".join(str(part) for part in fault["loc"] if part != "body") or "body",
                "message": _printable(fault["msg"]),
            }
            for fault in error.errors()[:20]
        ]
        message = "; ".join(f"{d['field']}: {d['message']}" for d in details[:3])
        return error_response(request.url.path, 422, message, details=details)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        headers = {"retry-after": str(error.retry_after)}
        return error_response(request.url.path, 429, str(error), headers=headers)

    @app.exception_handler(UnknownName)
    async def unknown(request: Request, error: UnknownName) -> Response:
        return error_response(request.url.path, 404, _printable(str(error)))

    @app.exception_handler(ImageError)
    @app.exception_handler(Undrawable)
    async def unusable(request: Request, error: ValueError) -> Response:
        message, field = _printable(str(error).rstrip(".")), getattr(error, "field", None)
        details = [{"field": field, "message": message}] if field else []
        return error_response(request.url.path, 422, message, details=details)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        name = type(error).__name__
        return error_response(request.url.path, 500, f"a fault in the server ({name}); see its log")


def _printable(text: str) -> str:
    """One line that holds no control characters and no lone surrogates."""
    line = " ".join(text[:1000].split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


class NotStarted(Exception):
    """The server ended before it answered; its log has told why."""

    exit_code = 1


class _Server(uvicorn.Server):
    """Says where it is, and opens a browser, when it answers."""

    def __init__(self, config: uvicorn.Config, addresses: list[str], *, opens: bool) -> None:
        super().__init__(config)
        self._addresses = addresses
        self._opens = opens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            where = " and ".join(self._addresses)
            print(f"maple: drawing at {where} (Ctrl-C ends it)", file=sys.stderr)
            if self._opens:
                # In a thread: a browser in a terminal would hold up the server.
                open_page = partial(webbrowser.open, self._addresses[0])
                threading.Thread(target=open_page, daemon=True).start()


class _WithoutToken(logging.Filter):
    """Keeps the token out of the log of requests."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.args = tuple(
            value.replace(self._token, "…").replace(quote(self._token), "…")
            if isinstance(value, str)
            else value
            for value in (record.args if isinstance(record.args, tuple) else ())
        )
        return True


def _addresses(config: Config, port: int, *, with_token: bool) -> list[str]:
    """Where a browser finds the page: on this machine, and from the network where that is open."""
    query = f"/?token={quote(config.token)}" if config.token and with_token else "/"
    hosts = [config.host]
    if config.host in ("0.0.0.0", "::"):
        hosts = ["127.0.0.1" if config.host == "0.0.0.0" else "::1"]
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; finds the address that would be used
            hosts.append(probe.getsockname()[0])
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}{query}" for host in hosts]


def serve(
    config: Config, *, opens: bool = False, shows_token: bool = False, is_verbose: bool = False
) -> None:
    """Run until it is told to end.

    Args:
        config: of the server.
        opens: show the page in a browser.
        shows_token: say the token with the address, as nobody else has told it.
        is_verbose: log every request.

    Raises:
        InUse: another server has the data folder.
        NotStarted: it could not start.
        OSError: the folder cannot be written, or the address is taken.
    """
    listener = _listening(config)
    addresses = _addresses(config, listener.getsockname()[1], with_token=shows_token)
    if config.token:
        logging.getLogger("uvicorn.access").addFilter(_WithoutToken(config.token))
    with listener:
        _allow_files(config.limits.connections + 256)
        settings = uvicorn.Config(
            make_app(config),
            http=protocol_of(config.limits),
            proxy_headers=config.is_behind_proxy,  # else anyone here could take any address
            ws="none",
            log_level="info" if is_verbose else "warning",
            access_log=is_verbose,
            server_header=False,
            # Longer than clients keep a connection: of two that give up at once one is surprised.
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=64 << 10,
        )
        server = _Server(settings, addresses, opens=opens)
        server.run(sockets=[listener])
        if not server.started:
            raise NotStarted("the server could not start: see above")


def _allow_files(count: int) -> None:
    """Have so many files open at once, as far as the system lets us: some begin with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listening(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With the protocol named asyncio sets TCP_NODELAY; without, answers wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        place = f"{config.host}:{config.port}"
        raise OSError(error.errno, f"{error.strerror} (--port names another)", place) from None
    return listener
