"""Several routers on one machine: which ports each has, and what else follows from their number."""

from __future__ import annotations

import socket
from typing import Any

from deploy.config import ClusterConfig
from deploy.routers import elsewhere, is_free, place
from router.config import RouterConfig
from settings.file import validate_settings
from settings.telemetry.config import TelemetryConfig


def config(**values: Any) -> ClusterConfig:
    return validate_settings(values, ClusterConfig, "test")


def test_the_first_has_what_is_configured_and_the_others_ports_ten_higher() -> None:
    router = RouterConfig(replicas=3, router_id="front")
    ports = [place(i, router, TelemetryConfig(metrics_port=9464)) for i in range(3)]
    assert [p.name for p in ports] == ["router", "router-1", "router-2"]
    assert [(p.router.grpc_port, p.router.http_port, p.router.internal_port) for p in ports] == [
        (8100, 8000, 8101),
        (8110, 8010, 8111),
        (8120, 8020, 8121),
    ]
    assert [p.telemetry.metrics_port for p in ports] == [9464, 9474, 9484]
    assert all(p.router.router_id == "" for p in ports), "a name is for one router"
    assert ports[1].describe() == (
        "router-1: gRPC 127.0.0.1:8110, HTTP 127.0.0.1:8010, workers register at 127.0.0.1:8111"
    )
    one = place(0, RouterConfig(router_id="front"), TelemetryConfig(metrics_port=None))
    assert (one.router.router_id, one.telemetry.metrics_port) == ("front", None)


def test_a_taken_port_moves_a_router_as_a_whole_but_never_the_first() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        router = RouterConfig(replicas=2, grpc_port=port - 10, http_port=None, internal_port=0)
        second = place(1, router, TelemetryConfig(metrics_port=None))
        assert second.router.grpc_port == port
        assert not is_free(second)
        moved = elsewhere(second)
        assert moved.router.grpc_port not in (0, port)
        assert moved.router.http_port is None
        assert is_free(moved)
        cluster = config(
            router={"replicas": 2, "grpc_port": port - 10, "http_port": None, "internal_port": 0},
            telemetry={"metrics_port": None},
        )
        first, other = cluster.router_places()
        assert first.router.grpc_port == port - 10
        assert other.router.grpc_port != port
        assert other.router.internal_port > 0, "workers are told where to register"


def test_ports_beyond_the_last_are_not_to_be_had() -> None:
    assert not is_free(place(1, RouterConfig(replicas=2, grpc_port=65530), TelemetryConfig(metrics_port=None)))
