"""Connections of the HTTP port from their first moment: counted, and with a time within which TLS has greeted.

asyncio's own listener tells nobody of a connection before its handshake is over, gives it a minute, and spins when the
process has no file descriptor left. So connections are accepted here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable

log = logging.getLogger(__name__)

_AT_ONCE = 64  # connections accepted between two turns of everybody else
_TO_BE_TOLD = 64  # beyond the limit, so many at once are answered with 503; the rest is closed without a word
_PAUSE_S = 0.5  # without a file descriptor, or without memory for one
_SHUTDOWN_S = 5.0  # for a client to say goodbye in TLS
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """`start`, then `stop`, which ends those that have not greeted yet. The socket stays its owner's."""

    def __init__(
        self,
        listener: socket.socket,
        connection: Callable[[], asyncio.Protocol],
        greeted: Callable[[], int],
        max_connections: int,
        tls: ssl.SSLContext | None,
        handshake_s: float,
    ) -> None:
        """`greeted`: how many connections are open beside those that are known here only."""
        self._listener = listener
        self._connection = connection
        self._greeted = greeted
        self._max_connections = max_connections
        self._tls = tls
        self._handshake_s = handshake_s
        self._greeting: set[asyncio.Task[None]] = set()
        self._waiting: asyncio.TimerHandle | None = None
        self._exhausted = False

    @property
    def greeting(self) -> int:
        return len(self._greeting)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.fileno(), self._accept)

    async def stop(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        if self._waiting is not None:
            self._waiting.cancel()
        greeting = list(self._greeting)
        for task in greeting:
            task.cancel()
        await asyncio.gather(*greeting, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._pause(error)
                return
            self._exhausted = False
            # In TLS a 503 costs a handshake: more than the connection that is refused.
            told = _TO_BE_TOLD if self._tls is None else 0
            if self._greeted() + len(self._greeting) >= self._max_connections + told:
                accepted.close()
                continue
            accepted.setblocking(False)
            task = self._loop.create_task(self._greet(accepted))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    def _pause(self, error: OSError) -> None:
        """The one who asks again at once would spin: the connection stays in the queue."""
        if not self._exhausted:
            self._exhausted = True
            log.error(
                "the HTTP port cannot accept connections: %s; raise the limit of open files (ulimit -n), or lower "
                "router.http.max_connections. Trying again every %g s",
                error.strerror,
                _PAUSE_S,
            )
        self._loop.remove_reader(self._listener.fileno())
        self._waiting = self._loop.call_later(_PAUSE_S, self.start)

    async def _greet(self, accepted: socket.socket) -> None:
        encrypted = {}
        if self._tls is not None:
            encrypted = {
                "ssl": self._tls,
                "ssl_handshake_timeout": self._handshake_s,
                "ssl_shutdown_timeout": _SHUTDOWN_S,
            }
        with contextlib.suppress(OSError):  # TLS that failed, came too late, or a client that left: its own loss
            await self._loop.connect_accepted_socket(self._connection, accepted, **encrypted)
            return
        accepted.close()
