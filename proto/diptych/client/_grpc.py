"""What both clients share of gRPC: channel options, and errors as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.rpc import error_details_pb2, status_pb2

from diptych.client._answering import Trouble

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A router that restarts is found again within a second or two; gRPC's own backoff goes to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A router whose machine is gone says nothing: live calls then end after about 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # The router is dialled directly: a proxy meant for web pages (http_proxy) would be asked for localhost, too.
    ("grpc.enable_http_proxy", 0),
]
Metadata = Sequence[tuple[str, str]]
_DETAILS = "grpc-status-details-bin"
_DOMAIN = "diptych"


def metadata_of(metadata: Metadata, api_key: str) -> tuple[tuple[str, str], ...]:
    return (*metadata, ("authorization", f"Bearer {api_key}")) if api_key else tuple(metadata)


def trouble_of(error: Any) -> Trouble:
    """`error`: an RpcError of grpc or grpc.aio."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            status.ParseFromString(value)
    by_server, retry_after_s, field = False, 0.0, ""
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info):
            by_server = info.domain == _DOMAIN
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1e3
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
    return Trouble(error.code().name, error.details() or "no details", by_server, retry_after_s, field)
