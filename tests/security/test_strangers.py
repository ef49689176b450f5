"""What somebody without a key can do to a listener with keys: memory, log bytes, and everybody else's answers."""

from __future__ import annotations

import contextlib

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.security.test_floods import PREFACE, SETTINGS, ask, frame, serving, tls
from tests.support.processes import Cluster
from tests.support.secure import Secured

__all__ = ["serving"]


@pytest.mark.parametrize("method", ["", "x", "/", "//", "/é/ü", "/a/b/c", "/diptych.v1.GenerateService"])
def test_odd_methods_write_no_log(serving: Cluster, secured: Secured, method: str) -> None:
    before = len(serving.logs())
    with secured.access("dpt_no_key").channel(serving.target, []) as channel:
        call = channel.unary_unary(method)
        for _ in range(200):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
            assert caught.value.code() not in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert len(serving.logs()) - before < 10_000


def test_watches_of_health_are_bounded(serving: Cluster, secured: Secured) -> None:
    router = psutil.Process(serving.processes.running["router"].pid)
    before = router.memory_info().rss
    with secured.access("dpt_no_key").channel(serving.target, []) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        held = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(600)]
        refused = 0
        for call in held:
            try:
                next(call)
            except grpc.RpcError as error:
                refused += error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        assert refused >= 600 - 256
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        assert router.memory_info().rss - before < 64 << 20
        for call in held:
            call.cancel()


def test_references_to_one_long_header(serving: Cluster, secured: Secured) -> None:
    """A byte each on the wire, 4 KB when they are written out (HPACK)."""
    router = psutil.Process(serving.processes.running["router"].pid)
    before = router.memory_info().rss
    name_and_value = b"\x40\x01a\x7f" + bytes([0x80 | (3900 - 127) & 0x7F, (3900 - 127) >> 7]) + b"v" * 3900
    with tls(serving, secured) as s, contextlib.suppress(OSError):
        s.settimeout(10)
        s.sendall(PREFACE + SETTINGS + frame(1, 0, 1, name_and_value))
        for _ in range(500):
            s.sendall(frame(9, 0, 1, b"\xbe" * 16000))
    assert router.memory_info().rss - before < 64 << 20, "32 GB of headers, written out"
    assert len(ask(serving, serving.access).token_ids) == 3
