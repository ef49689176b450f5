"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and the status they act on.

The `openai` clients try again on 408, 409, 429 and every 5xx, after `retry-after-ms` or `Retry-After`, unless
`x-should-retry` says no. So an error that will not go away by itself says no.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import to_json

from router.errors import CONTEXT_LENGTH, Code, Failure

_STATUS = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.UNAUTHENTICATED: 401,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
}
_CODES = {
    Code.INVALID_ARGUMENT: "invalid_value",
    Code.DEADLINE_EXCEEDED: "deadline_exceeded",
    Code.ALREADY_EXISTS: "already_exists",
    Code.PERMISSION_DENIED: "permission_denied",
    Code.UNAUTHENTICATED: "invalid_api_key",
    Code.RESOURCE_EXHAUSTED: "rate_limit_exceeded",
    Code.FAILED_PRECONDITION: "failed_precondition",
    Code.INTERNAL: "internal_error",
    Code.UNAVAILABLE: "unavailable",
}


_INNER = re.compile(r"the \w+ of `structured`")
TOO_LARGE = "request_too_large"
# By these words litellm and LangChain know it, whose exceptions and fallbacks depend on it: they do not read the code.
_TOO_LONG = f"this model's maximum context length is exceeded ({CONTEXT_LENGTH})"
_BY_STATUS = {  # where whoever refuses says no other
    400: "invalid_value",
    408: "request_timeout",
    413: TOO_LARGE,
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    503: "unavailable",
}


class ApiError(Exception):
    """Ends one HTTP request. `param`: which field of the request; `code`: a word for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_ms: int = 0
    ) -> None:
        if code == CONTEXT_LENGTH:
            message = f"{_TOO_LONG}: {message}"
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _BY_STATUS.get(status)
        self.retry_after_ms = retry_after_ms

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status in (401, 403):
            return "authentication_error" if self.status == 401 else "permission_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def content(self) -> dict[str, Any]:
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        return to_json({"error": self.content()})

    def headers(self) -> list[tuple[bytes, bytes]]:
        if self.retry_after_ms:
            seconds = -(-self.retry_after_ms // 1000)
            return [(b"retry-after", b"%d" % seconds), (b"retry-after-ms", b"%d" % self.retry_after_ms)]
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        if self.status in (408, 409, 429) or self.status >= 500:
            return [(b"x-should-retry", b"false")]
        return []


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def of_failure(failure: Failure, params: dict[str, str] | None = None) -> ApiError:
    """`params`: what the HTTP request calls the fields that the router names."""
    param = (params or {}).get(failure.field, failure.field) or None
    code = failure.reason or _CODES.get(failure.code)
    message = failure.message
    if failure.field == "structured" and param is not None:  # the router's word for what HTTP has several of
        words = (params or {}).get("structured_words") or f"format of `{param}`"
        if failure.code is Code.INVALID_ARGUMENT:
            told = (params or {}).get("structured_code")
            code = told or ("invalid_json_schema" if "json_schema of `structured`" in message else code)
        message = _INNER.sub(f"the {words}", message)
    return ApiError(_STATUS[failure.code], message, param=param, code=code, retry_after_ms=failure.retry_after_ms)
