"""The health service with callers that ask for a thousand watches, and with one that does not read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from settings.health import HealthService, host_of_peer

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Refused(Exception):
    pass


def context(peer: str = "ipv4:10.0.0.1:5000") -> Any:
    async def abort(code: grpc.StatusCode, message: str) -> None:
        raise Refused(code.name)

    return SimpleNamespace(peer=lambda: peer, abort=abort)


def watch(health: HealthService, peer: str = "ipv4:10.0.0.1:5000", service: str = "") -> Any:
    return health.Watch(health_pb2.HealthCheckRequest(service=service), context(peer))


async def status(stream: Any) -> int:
    async with asyncio.timeout(5):
        return (await anext(stream)).status


async def test_a_watcher_hears_of_every_change_that_it_reads_in_time() -> None:
    health = HealthService()
    health.set("", NOT_SERVING)
    stream = watch(health)
    assert await status(stream) == NOT_SERVING
    next_one = asyncio.ensure_future(status(stream))
    await asyncio.sleep(0)
    health.set("", SERVING)
    assert await next_one == SERVING
    health.set("", NOT_SERVING)
    health.set("", SERVING)
    health.set("", NOT_SERVING)
    assert await status(stream) == NOT_SERVING
    assert (await health.Check(health_pb2.HealthCheckRequest(), context())).status == NOT_SERVING
    with pytest.raises(Refused, match="NOT_FOUND"):
        await health.Check(health_pb2.HealthCheckRequest(service="x"), context())
    unknown = watch(health, service="x" * 10_000)
    assert await status(unknown) == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert set(health._status) == {""}, "what strangers ask for is not kept"
    for one in (stream, unknown):
        await one.aclose()
    assert health.watches == 0


async def test_watches_are_bounded_in_all_and_for_each_host() -> None:
    health = HealthService(max_watches=5, max_watches_of_one=3)
    health.set("", SERVING)
    held = [watch(health, f"ipv4:10.0.0.1:{port}") for port in range(4)]
    for stream in held[:3]:
        assert await status(stream) == SERVING
    with pytest.raises(Refused, match="RESOURCE_EXHAUSTED"):
        await status(held[3])
    others = [watch(health, f"ipv6:[::{n}]:1") for n in range(1, 4)]
    for stream in others[:2]:
        assert await status(stream) == SERVING
    with pytest.raises(Refused, match="RESOURCE_EXHAUSTED"):
        await status(others[2])
    await held[0].aclose()
    again = watch(health)
    assert await status(again) == SERVING
    for stream in (*held[1:3], *others[:2], again):
        await stream.aclose()
    assert not health._watches


async def test_one_that_does_not_read_holds_nobody_up() -> None:
    health = HealthService()
    health.set("", SERVING)
    stuck, other = watch(health), watch(health)
    assert await status(stuck) == SERVING  # and is never asked again: a write that waits for ever
    assert await status(other) == SERVING
    health.set("", NOT_SERVING)
    assert await status(other) == NOT_SERVING
    for stream in (stuck, other):
        await stream.aclose()


def test_a_host_is_a_peer_without_its_port() -> None:
    assert host_of_peer("ipv4:10.0.0.1:5000") == "10.0.0.1"
    assert host_of_peer("ipv6:[::1]:5000") == "::1"
    assert host_of_peer("unix:/run/x") == "unix:/run/x"
