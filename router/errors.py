"""The explicit errors of a request. Codes are google.rpc.Code numbers, which are gRPC's status codes."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Code(enum.IntEnum):
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Failure:
    """`message` names cause and fix. `field`: which part of the request. `retry_after_ms` 0: do not retry as is.
    `reason`: a word for programs, where the code says too little.
    """

    code: Code
    message: str
    retry_after_ms: int = 0
    field: str = ""
    reason: str = ""


class RequestRefused(Exception):
    """Raised before any work was done for a request."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


CONTEXT_LENGTH = "context_length_exceeded"


def refuse(code: Code, message: str, *, field: str = "", retry_after_ms: int = 0, reason: str = "") -> RequestRefused:
    return RequestRefused(Failure(code, message, retry_after_ms, field, reason))


def our_failure(error: BaseException) -> Failure:
    """A bug met by one request: every door says it alike, and the log has the rest."""
    return Failure(Code.INTERNAL, f"the router failed on this request ({type(error).__name__}); see its log")
