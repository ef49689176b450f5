"""Several routers on one machine: each has ports of its own.

The first has the configured ports, the second those ten higher (8110, 8010, 8111), and so on. Where one is taken, the
router gets free ports instead. Routers on machines of their own all have the configured ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.config import RouterConfig
from settings.addresses import from_here, join, listening_socket
from settings.telemetry.config import TelemetryConfig

STRIDE = 10
_LAST_PORT = 65535
_PORTS = ("grpc_port", "internal_port", "http_port")


@dataclass(frozen=True, slots=True)
class Place:
    """One router's settings."""

    name: str
    router: RouterConfig
    telemetry: TelemetryConfig

    @property
    def target(self) -> str:
        """For clients on this machine."""
        return join(from_here(self.router.host), self.router.grpc_port)

    @property
    def internal(self) -> str:
        return join(from_here(self.router.internal_host), self.router.internal_port)

    def describe(self) -> str:
        http = self.router.http_port
        shown = "" if http is None else f", HTTP {join(from_here(self.router.host), http)}"
        return f"{self.name}: gRPC {self.target}{shown}, workers register at {self.internal}"


def place(number: int, router: RouterConfig, telemetry: TelemetryConfig) -> Place:
    """Of the router with this number on its machine, from 0, as the configuration has it."""
    name = "router" if number == 0 else f"router-{number}"
    shifted = {p: port + STRIDE * number if (port := getattr(router, p)) else port for p in _PORTS}
    metrics = telemetry.metrics_port + STRIDE * number if telemetry.metrics_port else telemetry.metrics_port
    more = {} if router.replicas == 1 else {"router_id": ""}  # a name is for one router only
    shown = router.model_copy(update={**shifted, **more})
    return Place(name, shown, telemetry.model_copy(update={"metrics_port": metrics}))


def elsewhere(taken: Place) -> Place:
    """The same router on ports that are free just now; whoever takes one meanwhile is named when the router starts."""
    router = taken.router
    free = {p: None if getattr(router, p) is None else _any_port(_host(router, p)) for p in _PORTS}
    metrics = None if taken.telemetry.metrics_port is None else 0
    telemetry = taken.telemetry.model_copy(update={"metrics_port": metrics})
    return Place(taken.name, router.model_copy(update=free), telemetry)


def is_free(wanted: Place) -> bool:
    """Whether all of its ports can be had."""
    router, telemetry = wanted.router, wanted.telemetry
    asked = [(_host(router, p), getattr(router, p)) for p in _PORTS]
    try:
        for host, port in (*asked, (telemetry.metrics_host, telemetry.metrics_port)):
            if port and port > _LAST_PORT:
                return False
            if port:
                listening_socket(host, port).close()
    except OSError:
        return False
    return True


def _host(router: RouterConfig, port: str) -> str:
    return router.internal_host if port == "internal_port" else router.host


def _any_port(host: str) -> int:
    with listening_socket(host, 0) as found:
        return found.getsockname()[1]
