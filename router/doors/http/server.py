"""The HTTP port: uvicorn inside the router's own event loop, which keeps its signals and its life."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from router.config import HttpConfig
from router.doors.http.accept import Acceptor
from router.doors.http.app import App
from router.doors.http.connection import Connection
from settings.addresses import listening_socket
from settings.tasks import vital
from settings.tls import TlsError, TlsFiles, check_pair

log = logging.getLogger(__name__)

_LOOK_S = 1.0


class _Embedded(uvicorn.Server):
    """Uvicorn's loop and end; connections come from our Acceptor."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers = []
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process has handlers of its own


def bind(host: str, port: int) -> socket.socket:
    """Before anything is loaded: a port in use is known at once. Raises OSError."""
    listener = listening_socket(host, port, 2048)
    listener.setblocking(False)
    return listener


class HttpServer:
    """`start`, then `stop`. Draining is the dispatcher's: it refuses, and what is live ends."""

    def __init__(
        self,
        app: App,
        limits: HttpConfig,
        listener: socket.socket,
        tls: TlsFiles | None = None,
        handshake_s: float = 10.0,
    ) -> None:
        self._limits = limits
        self._handshake_s = handshake_s
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        self._tls = tls
        encrypted: dict[str, Any] = {}
        if tls is not None:
            self._tls_stamp = tls.stamp()
            encrypted = {"ssl_certfile": tls.files.certificate, "ssl_keyfile": tls.files.key}
            if tls.ca:
                encrypted |= {"ssl_ca_certs": tls.ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        self._server = _Embedded(
            uvicorn.Config(
                app,
                http=Connection,  # never made by uvicorn itself
                loop="none",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive_s,
                timeout_graceful_shutdown=1,
                **encrypted,
            )
        )

    @property
    def connections(self) -> int:
        """Those included that have not said a word yet."""
        return len(self._server.server_state.connections) + self._acceptor.greeting

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve(sockets=[]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0)
        config, state = self._server.config, self._server.server_state
        self._acceptor = Acceptor(
            self._listener,
            lambda: Connection(self._limits, config=config, server_state=state, app_state={}),
            lambda: len(state.connections),
            self._limits.max_connections,
            config.ssl,
            self._handshake_s,
        )
        self._acceptor.start()
        self._watching = vital(self._watch(), "the watch of HTTP connections")

    async def _watch(self) -> None:
        """Clients that send or read too slowly, without a timer of their own for each request."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            self._reload_certificate()
            now = loop.time()
            for connection in list(self._server.server_state.connections):
                assert isinstance(connection, Connection)
                connection.check_time(now)

    def _reload_certificate(self) -> None:
        """New connections get it. One that cannot be used leaves the old one in place."""
        if self._tls is None or self._tls.stamp() == self._tls_stamp:
            return
        self._tls_stamp = self._tls.stamp()
        context = self._server.config.ssl
        assert context is not None
        try:
            check_pair(self._tls.files, self._tls.ca, "security.public_tls")
            context.load_cert_chain(self._tls.files.certificate, self._tls.files.key)
            log.info("the HTTP port has a new certificate")
        except (TlsError, ssl.SSLError, OSError) as error:
            log.error("the HTTP port keeps its old certificate: %s", error)

    async def stop(self) -> None:
        """Answers that are written have a second to be read."""
        self._watching.cancel()
        await self._acceptor.stop()
        self._listener.close()
        self._server.should_exit = True
        await self._serving
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
