"""GET /metrics in Prometheus' text format, on a port and threads of its own. Bounded in all directions."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from settings.addresses import cannot_listen, listening_socket
from settings.descriptors import OUT_OF_DESCRIPTORS
from settings.listeners import declare

_PATIENCE_S = 5.0  # of one connection: reading the request, writing the answer
_MAX_CONNECTIONS = 8
_EXHAUSTED_S = 0.5

Targets = Callable[[], list[dict[str, Any]]]
Tls = Callable[[], ssl.SSLContext] | None

log = logging.getLogger(__name__)


class MetricsEndpointError(Exception):
    """The endpoint cannot listen; the message names cause and fix."""


class MetricsEndpoint:
    """`targets` gives Prometheus' HTTP service discovery (http_sd_config) at /targets; absent: 404.

    `tls`: a context for each connection; None: plain HTTP.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, targets: Targets | None = None, tls: Tls = None
    ) -> None:
        try:
            self._server = _Server(registry, host, port, targets, tls)
        except OSError as error:
            why = cannot_listen(host, port, "telemetry.metrics_host", "telemetry.metrics_port", error)
            raise MetricsEndpointError(f"{why} (metrics; 0 = any, null = none)") from error
        self.port: int = self._server.server_address[1]
        declare(self.port, "HTTP (metrics)", "mutual TLS" if tls else "none", encrypted=tls is not None)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, targets: Targets | None, tls: Tls = None
    ) -> None:
        self.registry, self.targets, self._tls = registry, targets, tls
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.socket.close()  # of the wrong family, perhaps
        self.socket = listening_socket(host, port, self.request_queue_size)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Whoever asks again at once, without a file descriptor to spare, spins: the connection stays in the queue."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                time.sleep(_EXHAUSTED_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)  # idle strangers hold a bounded number of threads, for a bounded time
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A client that is too slow, or left, or does not speak our protocol, is no event."""
        connection = request

        def cut() -> None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

        # A socket's timeout is for one call, and a byte now and then resets it: this one is for the whole.
        end = threading.Timer(_PATIENCE_S, cut)
        end.daemon = True
        end.start()
        try:
            connection.settimeout(_PATIENCE_S)
            if self._tls is not None:
                connection = self._tls().wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                connection.do_handshake()
            self.finish_request(connection, client_address)
        except (OSError, ValueError):  # ssl's errors are OSErrors
            pass
        except Exception:
            log.exception("metrics could not be rendered")
        finally:
            end.cancel()
            self.shutdown_request(connection)
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    timeout = _PATIENCE_S
    server_version, sys_version = "diptych", ""
    server: _Server

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, content_type, encode(self.server.registry))
        elif path == "/targets" and self.server.targets is not None:
            self._answer(200, "application/json", json.dumps(self.server.targets()).encode())
        else:
            self._answer(404, "text/plain", b"metrics are at /metrics\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""
