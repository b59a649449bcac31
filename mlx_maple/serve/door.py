"""Who is let in: those who bring the token, a session that it opened, or a signed address.

A session is a cookie that holds when it ends and a signature; nothing is kept of it here. The key
is the server's own secret and the token is part of what is signed, so that another token ends every
session, and a cookie that was stolen is no help in guessing the token. All comparisons take a time
that does not depend on how much is right, and an address that has been wrong too often has to wait.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import Scope

from mlx_maple.serve.errors import ApiError

COOKIE = "maple_session"
SESSION_SECONDS = 30 * 24 * 3600
URL_SECONDS = 3600  # that a signed address of a picture is good for, as OpenAI's are
TRIES = 10  # wrong tokens of one address in ``TRY_SECONDS``
TRY_SECONDS = 60.0
MOST_PEERS = 4096  # addresses whose wrong tries are remembered


class Door:
    """The token's keeper."""

    def __init__(self, token: str | None, secret: Callable[[], bytes]) -> None:
        """Let in who knows ``token``, everyone where that is None, or what ``secret`` signed."""
        self.token = token
        self._secret = secret
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def admits(self, peer: str, headers: Mapping[str, str]) -> bool:
        """Whether a request's headers hold the token or a session.

        Raises:
            ApiError: 429, too many wrong tokens came from ``peer``.
        """
        if self.token is None or self.has_session(headers):
            return True
        given = _tokens_in(headers)
        return bool(given) and self._knows(peer, given)

    def has_session(self, headers: Mapping[str, str]) -> bool:
        """Whether the cookie is one of ``open_session``, and has not ended."""
        # Not the standard library's, which stops at the first cookie that it does not like: those
        # of other servers on this machine come along.
        expires, _, key = cookie_parser(headers.get("cookie", "")).get(COOKIE, "").partition(".")
        return self._is_good(expires, key, f"session {self.token}")

    def open_session(self, peer: str, token: str, response: Response, *, is_secure: bool) -> bool:
        """Have a browser hold a session from now on; False where the token is wrong.

        Args:
            peer: address that it comes from.
            token: as it was given.
            response: that carries the cookie.
            is_secure: whether the connection is encrypted.

        Raises:
            ApiError: 429, as above.
        """
        if self.token is None:
            return True
        if not self._knows(peer, [token]):
            return False
        expires = int(time.time()) + SESSION_SECONDS
        response.set_cookie(
            COOKIE,
            f"{expires}.{self._signature(f'session {self.token}', expires)}",
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=is_secure,
        )
        return True

    def signed(self, path: str) -> str:
        """A path with a signature that opens it for an hour."""
        expires = int(time.time()) + URL_SECONDS
        return f"{path}?expires={expires}&key={self._signature(path, expires)}"

    def is_signed(self, path: str, query: Mapping[str, list[str]]) -> bool:
        """Whether the query holds a signature of the path that is still good."""
        return self._is_good(query.get("expires", [""])[0], query.get("key", [""])[0], path)

    def _is_good(self, expires: str, key: str, what: str) -> bool:
        is_time = expires.isascii() and expires.isdigit() and len(expires) <= 12
        if not is_time or int(expires) < time.time():
            return False
        return _same(key, self._signature(what, int(expires)))

    def _signature(self, what: str, expires: int) -> str:
        return hmac.new(self._secret(), f"{what}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def _knows(self, peer: str, given: list[str]) -> bool:
        """Whether the token is among what was given; a wrong one counts against its address."""
        assert self.token is not None
        now = time.monotonic()
        wrong = self._wrong.get(peer, deque())
        while wrong and now - wrong[0] > TRY_SECONDS:
            wrong.popleft()
        if len(wrong) >= TRIES:
            # Not even the right one, which would tell that it is right.
            seconds = math.ceil(TRY_SECONDS - (now - wrong[0]))
            raise ApiError(
                429,
                f"too many wrong tokens came from your address: try again in {seconds} seconds",
                headers={"retry-after": str(max(1, seconds))},
            )
        if any([_same(each, self.token) for each in given]):  # a list: all are compared
            return True
        wrong.append(now)
        self._wrong[peer] = wrong
        self._wrong.move_to_end(peer)
        while len(self._wrong) > MOST_PEERS:
            self._wrong.popitem(last=False)
        return False


def peer_of(scope: Scope) -> str:
    """Who is at the other end of the connection, as far as nobody chooses that freely.

    An address; of IPv6 the network, as one machine may have as many addresses in it as it likes.
    """
    host = (scope.get("client") or ("?",))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.replace("/", "_")
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            network = ipaddress.ip_network((address, 64), strict=False)
            return f"{network.network_address}*"
    return str(address)


def _tokens_in(headers: Mapping[str, str]) -> list[str]:
    """What a request's headers give as the token."""
    found = [headers.get("x-maple-token", "")]
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(credentials.strip())
    elif scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(credentials, validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            decoded = ":?"
        found.append(decoded.partition(":")[2])
    return [each for each in found if each]


def _same(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on how much is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())
