"""grpc.health.v1, which asks nobody for a key: so what one caller can hold of it is bounded, and holds nobody up.

(grpc_health's own writes to watchers with a lock held that `set` needs: one watcher that does not read would stop the
process from ever telling anybody a new status, and there may be any number of them.)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from settings.addresses import host_of

Status = health_pb2.HealthCheckResponse.ServingStatus
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_MAX_WATCHES = 4096
_MAX_WATCHES_OF_ONE = 256


class HealthService(health_pb2_grpc.HealthServicer):
    def __init__(self, max_watches: int = _MAX_WATCHES, max_watches_of_one: int = _MAX_WATCHES_OF_ONE) -> None:
        """`max_watches_of_one`: of one host. Whoever has many clients behind one address has them ask with Check."""
        self._max_watches = max_watches
        self._max_watches_of_one = max_watches_of_one
        self._status: dict[str, Status] = {}
        self._changed = asyncio.Event()  # of this status; the next one has an event of its own
        self._watches: Counter[str] = Counter()  # by host

    @property
    def watches(self) -> int:
        return self._watches.total()

    def set(self, service: str, status: Status) -> None:
        self._status[service] = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, 'no such service here; ask for "", which is all of them')
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        host = host_of_peer(context.peer())
        if self._watches[host] >= self._max_watches_of_one or self.watches >= self._max_watches:
            whose = "of this host " if self._watches[host] >= self._max_watches_of_one else ""
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"too many watches {whose}are open; close some, or call Check"
            )
        self._watches[host] += 1
        try:
            told: Status | None = None
            while True:
                changed = self._changed
                status = self._status.get(request.service, _UNKNOWN)
                if status != told:
                    told = status
                    yield health_pb2.HealthCheckResponse(status=status)
                    continue  # it may have changed while the client was slow to read
                await changed.wait()
        finally:
            self._watches[host] -= 1
            if not self._watches[host]:
                del self._watches[host]


def host_of_peer(peer: str) -> str:
    """`ipv4:10.0.0.1:5000` -> `10.0.0.1`."""
    return host_of(peer[5:]) if peer.startswith(("ipv4:", "ipv6:")) else peer
