"""A Failure as google.rpc.Status, and how an RPC ends with it."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from router.errors import Failure

_MAX_MESSAGE_BYTES = 1024


async def abort(context: grpc.aio.ServicerContext, failure: Failure) -> None:
    """Ends the RPC with google.rpc.Status details."""
    status = rpc_status.to_status(status_of(failure))
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)


def status_of(failure: Failure) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    message = _shortened(failure.message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=failure.code.name, domain="diptych")]
    if failure.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=failure.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if failure.retry_after_ms:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(failure.retry_after_ms)
        details.append(retry)
    packed = []
    for detail in details:
        one = any_pb2.Any()
        one.Pack(detail)
        packed.append(one)
    return status_pb2.Status(code=int(failure.code), message=message, details=packed)


def _shortened(message: str) -> str:
    """A status travels in the trailing metadata, up to five times over, and gRPC cuts a call off at 8 KiB of it."""
    data = message.encode()
    if len(data) <= _MAX_MESSAGE_BYTES:
        return message
    return f"{data[: _MAX_MESSAGE_BYTES - 3].decode(errors='ignore')}..."
