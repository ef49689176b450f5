"""One client's connection: uvicorn's, with the limits that it lacks, and a way to write a stream without a task.

A token that goes through ASGI's `send` costs an event, a task switch and two coroutines, several times what the write
itself does (benchmarks/README.md). So a stream that has begun through ASGI is written here, by whoever has the tokens.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.config import HttpConfig
from router.doors.http.errors import ApiError

EXTENSION = "diptych.connection"
_CHUNK_FRAME_BYTES = 14  # the longest line with a chunk's length that anybody writes, and its end

log = logging.getLogger(__name__)
log.setLevel(logging.ERROR)  # uvicorn warns of every byte that is no HTTP; a port scan must not fill a disk


class Listener(Protocol):
    """Who writes the answer that is under way."""

    def lost_connection(self) -> None:
        """The client is gone. Comes once."""
        ...

    def writable(self) -> None:
        """The client has read; what waited may go."""
        ...


class Connection(HttpToolsProtocol):
    def __init__(self, limits: HttpConfig, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.logger = log
        self.access_log = False
        self.listener: Listener | None = None
        self.lost = False
        self._limits = limits
        self._reading_since: float | None = None  # None: no request is on its way
        self._paused_since: float | None = None  # None: the client takes what we write
        self._in_head = True
        self._head_bytes = 0
        self._messages = 0
        self._body_bytes = 0
        self._beside_body_bytes = 0  # framing, extensions of chunks, trailers

    # What the application may do.

    @property
    def write_paused(self) -> bool:
        return self._paused_since is not None

    def write_chunk(self, data: bytes) -> None:
        """A part of the body of the streamed response that has begun."""
        assert data, "an empty chunk would end the response"
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def close_soon(self, grace_s: float) -> None:
        """What is written may still go; a client that does not read it is not waited for."""
        self.transport.close()
        self.loop.call_later(grace_s, self.transport.abort)

    def check_time(self, now: float) -> None:
        """Called every second or so."""
        if self.transport.is_closing():
            return
        if self._reading_since is not None and now - self._reading_since > self._limits.read_timeout_s:
            self._refuse(
                408, f"the request did not arrive whole within {self._limits.read_timeout_s:g} s; send it faster"
            )
        elif self._paused_since is not None and now - self._paused_since > self._limits.write_timeout_s:
            self.transport.abort()

    # What the transport and the parser say.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reading_since = self.loop.time()
        if len(self.connections) > self._limits.max_connections:
            self._refuse(
                503,
                f"{self._limits.max_connections} connections are open, which is this router's limit; retry later",
                retry_after_ms=1000,
            )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost = True
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.lost_connection()

    def data_received(self, data: bytes) -> None:
        if self._reading_since is None:
            self._reading_since = self.loop.time()
        if self._in_head:
            self._head_bytes += len(data)
            super().data_received(data)
        else:
            message, body = self._messages, self._body_bytes
            super().data_received(data)
            if message == self._messages:
                beside = len(data) - (self._body_bytes - body)
                self._beside_body_bytes = max(0, self._beside_body_bytes + beside)  # chunks save up nothing
                if self._beside_body_bytes > self._limits.max_header_bytes:
                    self._refuse(
                        431,
                        f"chunks and trailers have more than {self._limits.max_header_bytes} bytes beside the body; "
                        "send longer chunks without extensions, and no trailers: they are not looked at",
                    )
        if self._in_head and self._head_bytes > self._limits.max_header_bytes:
            self._refuse_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers come here, too, long after the request was let in: what they say is not listened to."""
        if self._in_head:
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._beside_body_bytes -= _CHUNK_FRAME_BYTES

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._messages += 1
        self._beside_body_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refuse_head()
            return
        super().on_headers_complete()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[typeddict-item]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0
        self._reading_since = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused_since = None
        if self.listener is not None:
            self.listener.writable()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not HTTP/1.1, or the request is malformed")

    # Refusals before any application sees the request.

    def _refuse_head(self) -> None:
        limit = self._limits.max_header_bytes
        self._refuse(431, f"request line and headers exceed {limit} bytes; send fewer or shorter ones")

    def _refuse(self, status: int, message: str, retry_after_ms: int = 0) -> None:
        if self.transport.is_closing():
            return
        under_way = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not under_way:  # else a second response would be read as part of the first
            error = ApiError(status, message, retry_after_ms=retry_after_ms)
            body = error.body()
            head = [STATUS_LINE[status], b"content-type: application/json\r\nconnection: close\r\n"]
            head += [b"%b: %b\r\n" % header for header in error.headers()]
            head.append(b"content-length: %d\r\n\r\n" % len(body))
            self.transport.write(b"".join([*head, body]))
        self.close_soon(1.0)
