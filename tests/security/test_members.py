"""Inside the cluster: who may register, command a worker, attach to a source, and follow a handoff."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import handoff_pb2, handoff_pb2_grpc, worker_pb2, worker_pb2_grpc

from deploy.certificates import Authority
from kv_transfer import tickets
from kv_transfer.clients import PeerLinks
from kv_transfer.handoff import Follow, Lend, PeerHello, PeerId, RefusalReason, Refused
from kv_transfer.service import HandoffServicer
from settings.secret import ClusterSecret
from settings.security import SecurityConfig
from settings.tls import Wiring
from tests.support.processes import Cluster
from tests.support.secure import Secured

SOURCE, READER = PeerId("prefill-9", 1), PeerId("decode-9", 2)


def config(secured: Secured, **changes: Any) -> SecurityConfig:
    return SecurityConfig.model_validate({**secured.security, **changes})


async def code_of(call: Any) -> grpc.StatusCode:
    """How a call ends that is opened and read once."""
    try:
        taken = await (call.read() if hasattr(call, "read") else call)
    except grpc.aio.AioRpcError as error:
        return error.code()
    assert taken is grpc.aio.EOF, "it was taken"  # type: ignore[attr-defined]
    return await call.code()


async def register(wiring: Wiring, address: str, **call: Any) -> grpc.StatusCode:
    async with wiring.channel(address, "router") as channel:
        stub = worker_pb2_grpc.RegistryServiceStub(channel)
        return await code_of(stub.Register(worker_pb2.RegisterRequest(), timeout=10, **call))


async def connect(wiring: Wiring, address: str, **call: Any) -> grpc.StatusCode:
    async with wiring.channel(address, "worker") as channel:
        return await code_of(worker_pb2_grpc.WorkerServiceStub(channel).Connect(timeout=10, **call))


async def attach(wiring: Wiring, address: str, hello: handoff_pb2.PeerHello, **call: Any) -> grpc.StatusCode:
    async with wiring.channel(address, "worker") as channel:
        stream = handoff_pb2_grpc.HandoffServiceStub(channel).Attach(timeout=10, **call)
        try:
            await stream.write(handoff_pb2.AttachRequest(hello=hello))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # refused before it was read: the status says why
        return await code_of(stream)


@pytest.fixture
def prefill(cluster: Cluster) -> Any:
    return next(w for w in cluster.cluster().workers if w.worker_id == "prefill-0")


async def test_roles_cannot_be_swapped(cluster: Cluster, secured: Secured, prefill: Any) -> None:
    """Registering takes a worker's certificate, commanding a router's; and both take the cluster secret."""
    registry, denied = f"127.0.0.1:{cluster.internal_port}", grpc.StatusCode.PERMISSION_DENIED
    worker, router = Wiring(config(secured), "worker"), Wiring(config(secured), "router")
    assert await register(router, registry, metadata=router.proof()) is denied
    assert await register(router, registry, metadata=worker.proof()) is denied
    assert await register(worker, registry) is denied
    assert await register(worker, registry, metadata=router.proof()) is denied
    assert await register(worker, registry, metadata=worker.proof()) is grpc.StatusCode.INVALID_ARGUMENT, "let in"
    assert await connect(worker, prefill.address, metadata=worker.proof()) is denied
    assert await connect(worker, prefill.address, metadata=router.proof()) is denied
    assert await connect(router, prefill.address) is denied


async def test_strangers_get_no_connection(cluster: Cluster, secured: Secured, prefill: Any, tmp_path: Path) -> None:
    """No certificate, another authority's, an expired one, a public one."""
    Authority("internal-ca", tmp_path, 30).issue("worker", ["worker.diptych.internal"])
    Authority("internal-ca", secured.directory, 30).issue("late", ["worker.diptych.internal"], days=-1)
    own = secured.security["internal_tls"]

    def with_worker(certificate: Path, key: Path) -> Wiring:
        files = {"certificate": str(certificate), "key": str(key)}
        return Wiring(config(secured, internal_tls={**own, "worker": files}), "worker")

    here = secured.directory
    for wiring in (
        Wiring(config(secured, internal_tls=None), "worker"),
        with_worker(tmp_path / "worker.crt", tmp_path / "worker.key"),
        with_worker(here / "late.crt", here / "late.key"),
        with_worker(here / "client.crt", here / "client.key"),
    ):
        for address in (f"127.0.0.1:{cluster.internal_port}", prefill.address):
            code = await attach(wiring, address, handoff_pb2.PeerHello(), metadata=wiring.proof())
            assert code is grpc.StatusCode.UNAVAILABLE


async def test_only_introduced_readers_attach(cluster: Cluster, secured: Secured, prefill: Any, tmp_path: Path) -> None:
    wiring = Wiring(config(secured), "worker")
    assert wiring.secret is not None
    (tmp_path / "other").write_text(secrets.token_hex(32))
    other = ClusterSecret(str(tmp_path / "other"))
    source, now = PeerId(prefill.worker_id, prefill.epoch), time.time()
    denied = {
        "none": b"",
        "forged": tickets.introduction(other, source, READER, now),
        "expired": tickets.introduction(wiring.secret, source, READER, now - 2 * tickets.INTRODUCTION_S),
        "another reader's": tickets.introduction(wiring.secret, source, PeerId("decode-9", 3), now),
        "another source's": tickets.introduction(wiring.secret, SOURCE, READER, now),
        "an earlier epoch's": tickets.introduction(wiring.secret, PeerId(source.worker_id, 1), READER, now),
        "a handoff's": tickets.handoff(wiring.secret, "h", source, READER, now),
    }
    for what, ticket in denied.items():
        hello = handoff_pb2.PeerHello(worker_id=READER.worker_id, epoch=READER.epoch, ticket=ticket)
        code = await attach(wiring, prefill.address, hello, metadata=wiring.proof())
        assert code is grpc.StatusCode.PERMISSION_DENIED, what
    good = tickets.introduction(wiring.secret, source, READER, now)
    hello = handoff_pb2.PeerHello(worker_id=READER.worker_id, epoch=READER.epoch, ticket=good)
    code = await attach(wiring, prefill.address, hello, metadata=wiring.proof())
    assert code is grpc.StatusCode.FAILED_PRECONDITION, "the ticket was good; its layout is not"


# One real source and one real reader, without engines.


@asynccontextmanager
async def pair(
    secured: Secured,
) -> AsyncIterator[tuple[ClusterSecret, tickets.Wallet, PeerLinks, list[Any], list[Any]]]:
    """(secret, the reader's wallet and links, what the source heard, what the reader heard)"""
    wiring = Wiring(config(secured), "worker")
    assert wiring.secret is not None
    heard_source: list[Any] = []
    heard_reader: list[Any] = []

    def ignore(*_: Any) -> None:
        pass

    service = HandoffServicer(
        PeerHello(SOURCE, "layout", "fake", b""), on_hello=ignore, on_lost=ignore, on_ping=ignore, wiring=wiring,
        on_messages=lambda _, messages: heard_source.extend(messages),
    )  # fmt: skip
    server, wallet = grpc.aio.server(), tickets.Wallet()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(service, server)
    port = wiring.listen(server, "127.0.0.1:0", public=False)
    await server.start()
    links = PeerLinks(
        PeerHello(READER, "layout", "fake", b""), on_hello=ignore, on_lost=ignore, on_gone=ignore, on_pong=ignore,
        on_messages=lambda _, messages: heard_reader.extend(messages), wiring=wiring, wallet=wallet,
    )  # fmt: skip
    links.introduce(SOURCE, f"127.0.0.1:{port}")
    try:
        yield wiring.secret, wallet, links, heard_source, heard_reader
    finally:
        await links.stop()
        await server.stop(0)


async def soon(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_only_what_a_router_handed_out_is_followed(secured: Secured) -> None:
    async with pair(secured) as (secret, wallet, links, at_source, at_reader):
        now = time.time()
        wallet.keep_introduction(SOURCE, tickets.introduction(secret, SOURCE, READER, now))
        await soon(lambda: links.attached() == [SOURCE])
        stolen = tickets.handoff(secret, "stolen", SOURCE, PeerId("decode-8", 5), now)
        used = tickets.handoff(secret, "used", SOURCE, READER, now)
        bad = {
            "no ticket": b"",
            "forged": secrets.token_bytes(40),
            "stolen": stolen,
            "replayed": used,  # for another handoff
            "expired": tickets.handoff(secret, "expired", SOURCE, READER, now - 2 * tickets.HANDOFF_S),
        }
        for name, ticket in bad.items():
            wallet.keep_handoff(name, ticket)
            links.send([(SOURCE, Follow(name)), (SOURCE, Lend(name, (b"n" * 16,)))])
        wallet.keep_reference("good", SOURCE, tickets.reference(secret, "good", SOURCE, READER, now))
        links.send([(SOURCE, Follow("good")), (SOURCE, Lend("good", (b"n" * 16,)))])
        await soon(lambda: len(at_source) == 2 and len(at_reader) == 2 * len(bad))
        assert at_source == [Follow("good"), Lend("good", (b"n" * 16,))]
        assert {m.handoff_id for m in at_reader} == set(bad)
        assert all(isinstance(m, Refused) and m.reason is RefusalReason.FORBIDDEN for m in at_reader)


async def test_a_source_that_does_not_know_the_secret_is_not_believed(secured: Secured, tmp_path: Path) -> None:
    """It has a good certificate, and sits where the router said."""
    wiring, heard = Wiring(config(secured), "worker"), []

    class Impostor(handoff_pb2_grpc.HandoffServiceServicer):
        async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[handoff_pb2.AttachResponse]:
            first = await anext(request_iterator)
            hello = handoff_pb2.PeerHello(worker_id=SOURCE.worker_id, epoch=SOURCE.epoch, layout_fingerprint="layout")
            hello.ticket = first.hello.ticket
            yield handoff_pb2.AttachResponse(hello=hello)

    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(Impostor(), server)
    port = wiring.listen(server, "127.0.0.1:0", public=False)
    await server.start()

    def ignore(*_: Any) -> None:
        pass

    links = PeerLinks(
        PeerHello(READER, "layout", "fake", b""), on_hello=heard.append, on_gone=ignore, on_pong=ignore,
        on_messages=lambda *m: heard.append(m), on_lost=lambda _, why: heard.append(why), wiring=wiring,
    )  # fmt: skip
    links.introduce(SOURCE, f"127.0.0.1:{port}")
    try:
        await soon(lambda: heard)
        assert "does not know the cluster secret" in heard[0]
    finally:
        await links.stop()
        await server.stop(0)
