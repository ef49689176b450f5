"""One client's connection: uvicorn's, with the limits that it lacks, and a way to write a stream without a task.

A token that goes through ASGI's `send` costs an event, a task switch and two coroutines, several times what the write
itself does (benchmarks/README.md). So a stream that has begun through ASGI is written here, by whoever has the tokens.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.config import HttpConfig
from router.doors.http.errors import ApiError
from router.doors.http.no_upgrade import UpgradeBlindParser

EXTENSION = "diptych.connection"
_CHUNK_FRAME_BYTES = 14  # the longest line with a chunk's length that anybody writes, and its end
CYCLE = "diptych.cycle"
_DISCARDED_BYTES = 16 << 20  # of a body whose request is answered: a client may read only after it has sent all

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
        self.parser: Any = UpgradeBlindParser(self)
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
        self._discarded_bytes = 0
        self._running: Any = None  # uvicorn's cycle of the request that the application has, or had last
        self._in_body = False
        self._deaf = False  # after a refusal nothing that follows is a request
        self.write_chunk: Callable[[bytes], None] = self._write_chunk

    # What the application may do.

    @property
    def write_paused(self) -> bool:
        return self._paused_since is not None

    def answer_begins(self, cycle: Any, *, of_known_length: bool) -> None:
        """HTTP/1.0 knows no chunks: there the end of the connection is the end of the body."""
        if cycle.waiting_for_100_continue and cycle.more_body:
            cycle.keep_alive = False  # the body may come or not: nobody can say where the next request begins
        if cycle.scope["http_version"] == "1.0" and not of_known_length:
            cycle.chunked_encoding = False
            cycle.expected_content_length = math.inf  # until `answer_ends`
            self.write_chunk = self.transport.write

    def answer_ends(self, cycle: Any, last: bytes) -> None:
        if cycle.expected_content_length == math.inf:
            cycle.expected_content_length = len(last)

    def _write_chunk(self, data: bytes) -> None:
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

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
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

    def on_headers_complete(self) -> None:
        if self._deaf:
            return
        self._in_head = False
        self._messages += 1
        self._beside_body_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refuse_head()
            return
        refusal = _refusal_of(self.headers, self.parser.get_http_version())
        if refusal is not None:
            self._refuse(*refusal)
            return
        if not self.url.startswith((b"/", b"*")):
            self._name_the_path()
        super().on_headers_complete()
        self._in_body = True
        self._discarded_bytes = 0
        self.scope["extensions"] = {EXTENSION: self, CYCLE: self.cycle}  # type: ignore[typeddict-item]

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if not self._in_body:
            return  # of a request that was refused by its head
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > _DISCARDED_BYTES:
                self.close_soon(0.0)
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._in_body or self.parser.message_goes_on(self.headers):
            return
        super().on_message_complete()
        self._in_body = False
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

    def _name_the_path(self) -> None:
        """Of a target with a scheme, as a proxy sends it: it may have none."""
        target = httptools.parse_url(self.url)
        if target.schema and not target.path:
            self.url = b"/" if target.query is None else b"/?" + target.query

    # Refusals before any application sees the request.

    def _refuse_head(self) -> None:
        limit = self._limits.max_header_bytes
        self._refuse(431, f"request line and headers exceed {limit} bytes; send fewer or shorter ones")

    def _refuse(self, status: int, message: str, retry_after_ms: int = 0) -> None:
        if self.transport.is_closing():
            return
        self._deaf = True
        running, own = self._running, self._in_body and self._running is self.cycle
        if (
            running is not None and not running.response_complete and not own
        ):  # what is wrong came behind it: it is answered, and nothing after it
            self.pipeline.clear()
            running.keep_alive = False
            self.transport.pause_reading()
            self._reading_since = None
            return
        # A second response would be read as part of the first, or as the next one's.
        if running is None or not own or not running.response_started:
            error = ApiError(status, message, retry_after_ms=retry_after_ms)
            body = error.body()
            head = [STATUS_LINE[status], b"content-type: application/json\r\nconnection: close\r\n"]
            head += [b"%b: %b\r\n" % header for header in error.headers()]
            head.append(b"content-length: %d\r\n\r\n" % len(body))
            self.transport.write(b"".join([*head, body]))
        self.close_soon(1.0)


def _refusal_of(headers: list[tuple[bytes, bytes]], version: str) -> tuple[int, str] | None:
    """What HTTP asks a server to refuse, and httptools lets through."""
    if version not in ("1.0", "1.1"):
        return 400, f"this is HTTP/{version[:10]}; speak HTTP/1.1"
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            return 501, "the only transfer-encoding that is known here is chunked; send a content-encoding instead"
    if hosts > 1 or (not hosts and version != "1.0"):
        return 400, f"the request has {hosts} host headers; send one"
    return None
