"""A peer that says nonsense costs its own stream, which whoever waits for it hears of; the next stream is fresh."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from diptych.v1 import handoff_pb2, handoff_pb2_grpc, worker_pb2, worker_pb2_grpc

from kv_transfer.clients import PeerLinks
from kv_transfer.handoff import PeerHello, PeerId
from kv_transfer.wire import hello_to_wire
from router.clients import WorkerLinks
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.policy import WorkerKey

READER, SOURCE = PeerId("decode-0", 7), PeerId("prefill-0", 5)


async def soon(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Nonsense(handoff_pb2_grpc.HandoffServiceServicer):
    async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[handoff_pb2.AttachResponse]:
        yield handoff_pb2.AttachResponse(hello=hello_to_wire(PeerHello(SOURCE, "layout", "fake", b"")))
        yield handoff_pb2.AttachResponse(blocks=[handoff_pb2.AnnounceBlocks(block_ids=[1, 2], generations=[1])])
        await asyncio.sleep(60)


class Crash(Exception):
    pass


@pytest.mark.parametrize("ours", [False, True], ids=["the source says nonsense", "our own code fails"])
async def test_a_reader_hears_that_its_source_is_lost_and_attaches_again(ours: bool) -> None:
    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(Nonsense(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    hellos: list[Any] = []
    lost: list[str] = []

    def on_hello(hello: PeerHello) -> None:
        hellos.append(hello)
        if ours:
            raise Crash("planted")

    links = PeerLinks(
        PeerHello(READER, "layout", "fake", b""),
        on_hello=on_hello,
        on_messages=lambda *_: None,
        on_lost=lambda _, why: lost.append(why),
        on_gone=lambda _: None,
        on_pong=lambda _: None,
    )
    links.introduce(SOURCE, f"127.0.0.1:{port}")
    try:
        await soon(lambda: len(lost) >= 2 and len(hellos) >= 2)
        assert ("planted" if ours else "an announcement whose columns differ in length") in lost[0]
    finally:
        await links.stop()
        await server.stop(0)


class UnknownEnd(worker_pb2_grpc.WorkerServiceServicer):
    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.ConnectResponse]:
        yield worker_pb2.ConnectResponse(epoch=SOURCE.epoch, worker_id=SOURCE.worker_id)
        end: Any = worker_pb2.SequenceEnd(sequence_id=1, reason=99)  # type: ignore[arg-type]
        yield worker_pb2.ConnectResponse(epoch=SOURCE.epoch, ends=[end])
        await asyncio.sleep(60)


async def test_a_router_hears_that_its_worker_is_lost_and_connects_again() -> None:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(UnknownEnd(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    lost: list[str] = []
    dispatcher: Any = SimpleNamespace(
        cluster=Cluster(),
        on_worker_lost=lambda _, why, crashed: lost.append(why),
        on_worker_back=lambda _: None,
        flush=lambda: None,
    )
    links = WorkerLinks("router", time.monotonic, 30.0)
    links.dispatcher = dispatcher
    key = WorkerKey(SOURCE.worker_id, SOURCE.epoch)
    info = WorkerInfo(key, Role.PREFILL, f"127.0.0.1:{port}", "m", "l", 16, 1024, 10, 100, 1000)
    links.registered(info, leaving=False)
    try:
        await soon(lambda: len(lost) >= 2)
        assert "99" in lost[0]
    finally:
        await links.stop()
        await server.stop(0)
