"""What a client shows to a router: from the command line's options or the environment.

DIPTYCH_CA             PEM file that the router's certificate was signed by; set = TLS
DIPTYCH_CERTIFICATE    PEM files, where the router asks clients for a certificate
DIPTYCH_KEY
DIPTYCH_API_KEY        the key itself, or
DIPTYCH_API_KEY_FILE   a file that begins with it. (Arguments are seen by every user of a machine.)
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from settings.tls import DIRECT


class AccessError(Exception):
    """Names cause and fix."""


@dataclass(frozen=True, slots=True)
class Access:
    """`api_key` is kept out of `repr`."""

    ca: bytes = b""
    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    api_key: str = field(default="", repr=False)
    member: Callable[[], tuple[tuple[str, str], ...]] | None = field(default=None, repr=False)

    def channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        if self.ca:
            credentials = grpc.ssl_channel_credentials(self.ca, self.key or None, self.certificate or None)
            channel = grpc.secure_channel(target, credentials, options=[*options, *DIRECT])
        else:
            channel = grpc.insecure_channel(target, options=[*options, *DIRECT])
        return self.introduce(channel)

    def introduce(self, channel: grpc.Channel) -> grpc.Channel:
        """Every call over it shows the API key, or the cluster's proof."""
        if self.api_key:
            header = ("authorization", f"Bearer {self.api_key}")
            channel = grpc.intercept_channel(channel, _Show(lambda: (header,)))
        if self.member is not None:
            channel = grpc.intercept_channel(channel, _Show(self.member))
        return channel


def access_from(environment: Mapping[str, str] = os.environ) -> Access:
    """Raises AccessError."""

    def content(name: str) -> bytes:
        path = environment.get(name, "")
        try:
            return Path(path).read_bytes() if path else b""
        except OSError as error:
            raise AccessError(f"{name} is {path}: {error.strerror}; name a file that can be read") from None

    key_file = content("DIPTYCH_API_KEY_FILE")
    api_key = environment.get("DIPTYCH_API_KEY", "") or (key_file.split() or [b""])[0].decode("ascii", "replace")
    if not api_key.isascii() or not api_key.isprintable():
        raise AccessError("DIPTYCH_API_KEY, or the file, holds no API key; see `diptych keys add`")
    return Access(content("DIPTYCH_CA"), content("DIPTYCH_CERTIFICATE"), content("DIPTYCH_KEY"), api_key)


class _CallDetails(
    collections.namedtuple("_CallDetails", ("method", "timeout", "metadata", "credentials", "wait_for_ready")),
    grpc.ClientCallDetails,
):
    pass


class _Show(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    def __init__(self, headers: Callable[[], tuple[tuple[str, str], ...]]) -> None:
        self._headers = headers

    def _more(self, next_step: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), *self._headers()]
        return next_step(
            _CallDetails(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready),
            request,
        )

    intercept_unary_unary = _more  # type: ignore[assignment]
    intercept_unary_stream = _more  # type: ignore[assignment]
    intercept_stream_stream = _more  # type: ignore[assignment]
