"""Errors in the form of the API that was asked: ours, A1111's or OpenAI's."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

CODES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "not_allowed",
    408: "too_slow",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid",
    429: "busy",
    500: "failed",
    503: "unready",
}
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
_OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """A request that ends in an error.

    Attributes:
        status: of HTTP.
        code: one word.
        message: one line.
        field: of the request, that it is about.
        headers: to answer with.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.code = code or CODES.get(status, "failed")
        self.message = message
        self.field = field
        self.headers = dict(headers or {})
        super().__init__(message)


def error_response(
    path: str,
    status: int,
    message: str,
    *,
    code: str | None = None,
    details: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as clients of the API at ``path`` read it."""
    code = code or CODES.get(status, "failed")
    headers = dict(headers or {})
    if path.startswith(("/sdapi/", "/controlnet/")):
        body: dict[str, Any] = {
            "error": code,
            "detail": list(details) if status == 422 and details else message,
            "body": "",
            "errors": message,
        }
        return JSONResponse(body, status, headers)
    if path.startswith("/v1/"):
        # OpenAI says 400 where a value cannot be used.
        status = 400 if status == 422 else status
        kind = _OPENAI_TYPES.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        error = {
            "message": message,
            "type": kind,
            "param": details[0]["field"] if details else None,
            "code": _OPENAI_CODES.get(status, code),
        }
        return JSONResponse({"error": error}, status, headers)
    if path.startswith("/api/") or path == "/openapi.json":
        content = {"code": code, "message": message, "details": list(details)}
        return JSONResponse({"error": content}, status, headers)
    return PlainTextResponse(message + "\n", status, headers)
