"""Oversized and malformed frames, header bombs, slow and idle clients: they are cut off, and others are served."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import struct
import time
from collections.abc import Iterator

import grpc
import psutil
import pytest
from diptych.v1 import generate_pb2, generate_pb2_grpc

from deploy.access import Access
from tests.security.test_doors import FEW, ask, eventually, refused
from tests.support.processes import Cluster
from tests.support.secure import Secured

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
IDLE = 2000


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


@contextlib.contextmanager
def tls(cluster: Cluster, secured: Secured) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cadata=secured.ca.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", cluster.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        yield encrypted


def ended(s: socket.socket, timeout_s: float = 10.0) -> bool:
    """The other side closes, whatever it says before."""
    s.settimeout(timeout_s)
    try:
        while s.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture
def serving(cluster: Cluster) -> Iterator[Cluster]:
    """After each attack somebody else is answered."""
    yield cluster
    assert len(ask(cluster, cluster.access).token_ids) == 3


@pytest.mark.parametrize(
    "attack",
    [
        b"\0" * 4096,
        PREFACE + b"\xff" * 4096,
        PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",  # a frame of 16 MB where 16 KB are allowed
        PREFACE + SETTINGS + frame(1, 4, 1, b"\xff" * 200),  # headers that cannot be decompressed
        PREFACE + SETTINGS + frame(0, 0, 7, b"data on a stream that was never opened") * 50 + frame(9, 4, 7, b"x"),
    ],
    ids=["zeros", "garbage after the preface", "oversized frame", "bad compression", "data without a stream"],
)
def test_malformed_frames(serving: Cluster, secured: Secured, attack: bytes) -> None:
    with tls(serving, secured) as s:
        with contextlib.suppress(OSError):
            s.sendall(attack)
        assert ended(s)


def test_header_bombs(serving: Cluster, secured: Secured) -> None:
    """Of the metadata; and of a header block that never ends (CONTINUATION after CONTINUATION)."""
    with serving.access.channel(serving.target, []) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(serving.request([1], FEW), timeout=10, metadata=(("x", "y" * 100_000),)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    router = psutil.Process(serving.processes.running["router"].pid)
    before = router.memory_info().rss
    with tls(serving, secured) as s:
        s.settimeout(5)
        with contextlib.suppress(OSError):
            s.sendall(PREFACE + SETTINGS + frame(1, 0, 1, b"\x40\x01a\x7f\xff\xff\xff\x0f"))
            for _ in range(8000):
                s.sendall(frame(9, 0, 1, b"z" * 16000))
        assert router.memory_info().rss - before < 64 << 20, "128 MB of it are thrown away"


def test_oversized_messages(serving: Cluster) -> None:
    """Above what a prompt may have: refused with the reason. Above what the transport takes: refused unread."""
    text = "x" * (10 << 20)
    error = refused(serving, serving.access, prompt=text)  # type: ignore[arg-type]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    with serving.access.channel(serving.target, [("grpc.max_send_message_length", -1)]) as channel:
        huge = generate_pb2.GenerateRequest(text="x" * (65 << 20))
        with pytest.raises(grpc.RpcError) as caught:
            list(generate_pb2_grpc.GenerateServiceStub(channel).Generate(huge, timeout=30))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_stranger_is_refused_before_its_message_is_read(serving: Cluster, secured: Secured) -> None:
    with secured.access("dpt_no_key").channel(serving.target, [("grpc.max_send_message_length", -1)]) as channel:
        huge = generate_pb2.GenerateRequest(text="x" * (65 << 20))
        with pytest.raises(grpc.RpcError) as caught:
            list(generate_pb2_grpc.GenerateServiceStub(channel).Generate(huge, timeout=30))
        assert caught.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_thousands_of_idle_connections(serving: Cluster, secured: Secured) -> None:
    """They say nothing, or half a greeting. Others are served; after `handshake_s` the silent are gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, IDLE + 1000)), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        idle = []
        for number in range(IDLE):
            s = stack.enter_context(socket.create_connection(("127.0.0.1", serving.port), timeout=10))
            if number % 2:
                s.sendall(b"\x16\x03\x01")  # the first bytes of a TLS greeting
            idle.append(s)
        began = time.monotonic()
        assert len(ask(serving, serving.access).token_ids) == 3
        assert time.monotonic() - began < 10
        eventually(lambda: sum(is_closed(s) for s in idle) == IDLE, 15)


def is_closed(s: socket.socket) -> bool:
    s.setblocking(False)
    try:
        return s.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_reader_that_does_not_read_is_cut_off(serving: Cluster) -> None:
    """Its tokens are not kept for ever: the buffers fill, and its request ends with its deadline at the latest.

    (The bound on unread tokens has its own tests, in tests/fuzz and tests/cluster.)
    """
    options = [("grpc.http2.lookahead_bytes", 1024)]
    with serving.access.channel(serving.target, options) as channel:
        long = generate_pb2.SamplingParams(max_tokens=300, ignore_eos=True)
        call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(
            serving.request([1, 2, 3], long, deadline_ms=1500), timeout=30
        )
        eventually(lambda: serving.cluster().router.live_requests == 1)
        eventually(lambda: serving.cluster().router.live_requests == 0, 15)
        call.cancel()


def test_a_writer_that_never_finishes_holds_nobody_up(serving: Cluster) -> None:
    """Hundreds of sessions that send no request, beside one that does."""
    access: Access = serving.access
    with access.channel(serving.target, []) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)

        def silent() -> Iterator[generate_pb2.SessionRequest]:
            while not done:
                time.sleep(0.05)
            yield from ()

        done: list[bool] = []
        calls = [stub.Session(silent(), timeout=30) for _ in range(100)]
        try:
            assert len(ask(serving, access).token_ids) == 3
        finally:
            done.append(True)
            for call in calls:
                call.cancel()
