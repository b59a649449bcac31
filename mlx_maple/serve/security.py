"""Who may ask, from where, and how much: checked before any part of the application sees a request.

What is kept out, and how:

    pages of other sites          Origin and Sec-Fetch-Site must be our own; no CORS header is sent
    DNS rebinding                 Host must be an address, localhost or an allowed name
    people on the network         a token, or a session that it opened (door.py), in every request
    scripts in our own page       a content security policy that allows our files only
    bodies too large or too slow  bounded in bytes and in seconds, and read whole before they count
    many large bodies             bounded in bytes, all together and of each peer
    connections, slow readers     bounded before this: protocol.py
"""

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import anyio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_maple.serve.bounds import Bound
from mlx_maple.serve.config import Config
from mlx_maple.serve.door import Door, peer_of
from mlx_maple.serve.errors import ApiError, error_response

API_PATHS = ("/api/", "/sdapi/", "/controlnet/", "/v1/")
# Answered without a token: the page, which holds no secret, and what it needs to ask for one.
OPEN_PATHS = ("/", "/api/v1/health", "/api/v1/session")
OPEN_FOLDER = "/page/"

HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; font-src 'self'; manifest-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("permissions-policy", "camera=(), microphone=(), geolocation=()"),
)


class Security:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, config: Config, door: Door) -> None:
        """Guard ``app``; ``door`` says who is let in."""
        self._app = app
        self._config = config
        self._door = door
        limits = config.limits
        self._bodies = Bound(limits.bodies, limits.bodies_each)
        self._names = {name.lower().rstrip(".") for name in config.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; pass any other on, its body read."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no websocket is offered
            return None

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                there = {name.lower() for name, _ in headers}
                headers += [
                    (name.encode(), value.encode())
                    for name, value in HEADERS
                    if name.encode() not in there
                ]
                message = {**message, "headers": headers}
            await send(message)

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._check_source(headers)
            entrance = self._check_token(scope, headers)
            if entrance is not None:
                return await entrance(scope, receive, send_with_headers)
            with self._body_room(peer_of(scope)) as take:
                whole = await self._whole_body(headers, receive, take)
                if whole is not None:  # else the client has left
                    # It catches its own errors: none that is caught below comes from here.
                    await self._app(scope, whole, send_with_headers)
        except ApiError as error:
            refusal = error_response(
                scope["path"], error.status, error.message, code=error.code, headers=error.headers
            )
            return await refusal(scope, receive, send_with_headers)
        return None

    # From where --------------------------------------------------------------------------------

    def _check_source(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                403,
                f"this server is not called {host[:100]!r}: ask for it by address or as localhost, "
                "or start it with --allow-host NAME",
            )
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise ApiError(403, f"requests from pages of {origin[:100]!r} are not answered")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        if site not in ("none", "same-origin") and mode != "navigate":
            raise ApiError(403, "requests from other sites' pages are not answered")

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header can only come from someone who means this server.

        A page that has its own name point at this machine (DNS rebinding) sends that name; an
        address in figures cannot be pointed elsewhere.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        name = name.rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._config.is_local

    # Who ---------------------------------------------------------------------------------------

    def _check_token(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """Refuse who is not let in; the answer to who brings the token in the page's address."""
        path, peer = scope["path"], peer_of(scope)
        try:
            query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=50)
        except ValueError:
            raise ApiError(400, "the address has more than 50 fields") from None
        given = query.get("token", [""])[0]
        if given and scope["method"] == "GET" and not path.startswith(API_PATHS):
            # One slash: "//name" would lead elsewhere.
            place = "/" + quote(path.lstrip("/"))
            response = Response(status_code=303, headers={"location": place})
            is_secure = scope.get("scheme") == "https"  # behind a proxy with TLS
            if self._door.open_session(peer, given, response, is_secure=is_secure):
                return response
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return None
        if self._door.is_signed(path, query) or self._door.admits(peer, headers):
            return None
        raise ApiError(
            401,
            "this server asks for its token: as a bearer token, as the password of basic "
            "authentication, or in a browser on its page",
            headers={"www-authenticate": "Bearer"},
        )

    # How much ----------------------------------------------------------------------------------

    @contextmanager
    def _body_room(self, peer: str) -> Iterator[Callable[[int], None]]:
        """Counts a request's bytes until it is answered; raises where there is no room."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if not self._bodies.take(peer, count):
                raise ApiError(
                    503,
                    "too much is being sent at once: try again later",
                    code="busy",
                    headers={"connection": "close", "retry-after": "5"},
                )
            taken += count

        try:
            yield take
        finally:
            self._bodies.give(peer, taken)

    async def _whole_body(
        self, headers: Mapping[str, str], receive: Receive, take: Callable[[int], None]
    ) -> Any:
        """A ``receive`` that hands on the body, which is there; None where the client has left."""
        limits = self._config.limits
        too_large = ApiError(
            413,
            f"a request has {limits.upload:,} bytes at most",
            headers={"connection": "close"},
        )
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limits.upload:
            raise too_large
        chunks: list[bytes] = []
        size, is_whole = 0, False
        try:
            with anyio.fail_after(limits.body_seconds):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    take(len(chunks[-1]))
                    is_whole = not message.get("more_body", False)
                    if size > limits.upload:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408,
                f"the request was not there whole after {limits.body_seconds:g} seconds",
                headers={"connection": "close"},
            ) from None
        body: bytes | None = b"".join(chunks)

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()  # waits until the client leaves
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        return replay


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
