"""The interceptor of the public gRPC port: whatever a stranger calls a method, it is refused and nothing raises."""

from __future__ import annotations

import secrets
from types import SimpleNamespace
from typing import Any

import pytest

from router.access.doorman import Doorman
from router.access.gate import Gate
from router.access.keys import KeyEntry, KeyTable, new_key

LET_IN = object()


def door() -> tuple[Doorman, str]:
    key, key_id, sha256 = new_key(secrets.token_bytes(38))
    return Doorman(Gate(KeyTable([KeyEntry(id=key_id, sha256=sha256, tenant="acme")]))), key


async def ask(doorman: Doorman, method: Any, *metadata: tuple[str, Any]) -> bool:
    async def continuation(_: Any) -> Any:
        return LET_IN

    details = SimpleNamespace(method=method, invocation_metadata=metadata or None)
    return await doorman.intercept_service(continuation, details) is LET_IN


@pytest.mark.parametrize(
    "method",
    [
        "", "/", "//", "///", "x", "diptych.v1.GenerateService", "/grpc.health.v1.Health",
        "grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Check/x", "//grpc.health.v1.Health/Check", "*", "é/ü", "/\x00/\x00", b"/a/b", None,
    ],
)  # fmt: skip
async def test_odd_methods_are_refused(method: Any) -> None:
    doorman, key = door()
    assert not await ask(doorman, method)
    assert not await ask(doorman, method, ("authorization", f"Bearer {key}")), "needs an admin key"


@pytest.mark.parametrize("value", ["", "Bearer", b"\xff\x00", "Bearer \x00", "x" * 100_000])
async def test_odd_keys_are_refused(value: Any) -> None:
    doorman, _ = door()
    assert not await ask(doorman, "/diptych.v1.GenerateService/Generate", ("authorization", value))


async def test_health_is_open_and_the_rest_asks_once() -> None:
    doorman, key = door()
    good = ("authorization", f"Bearer {key}")
    assert await ask(doorman, "/grpc.health.v1.Health/Watch")
    assert await ask(doorman, "/diptych.v1.GenerateService/Generate", good)
    assert not await ask(doorman, "/diptych.v1.GenerateService/Generate", good, good)
    assert not await ask(doorman, "/diptych.v1.ClusterService/GetCluster", good)
    for method in ("SwitchRole", "DrainWorker", "Migrate", "Scale", "TellScaling"):
        assert not await ask(doorman, f"/diptych.v1.AdminService/{method}", good), "that is for operators"


async def test_an_admin_key_operates() -> None:
    key, key_id, sha256 = new_key(secrets.token_bytes(38))
    doorman = Doorman(Gate(KeyTable([KeyEntry(id=key_id, sha256=sha256, tenant="acme", admin=True)])))
    assert await ask(doorman, "/diptych.v1.AdminService/SwitchRole", ("authorization", f"Bearer {key}"))
    assert not await ask(doorman, "/diptych.v1.AdminService/SwitchRole")
