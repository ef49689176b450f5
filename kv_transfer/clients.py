"""The reader's end: one stream to every source it was introduced to, opened ahead of need and kept open.

introduce ──> connecting ──hello──> attached ──stream ends, silence──> lost ──backoff──> connecting ...
A source is gone for good when a later incarnation is introduced, when a router doubts it while it is not attached
(another router may know better), or when it could not be attached for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from diptych.v1 import handoff_pb2, handoff_pb2_grpc

from kv_transfer import tickets
from kv_transfer.handoff import PeerHello, PeerId, ReaderMessage, SourceMessage
from kv_transfer.layout import explain_mismatch
from kv_transfer.wire import (
    hello_from_wire,
    hello_to_wire,
    reader_messages_to_wire,
    source_messages_from_wire,
)
from settings.tasks import beside
from settings.tls import INSECURE, Wiring
from settings.versions import OURS, spoken

log = logging.getLogger(__name__)

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

_PING_EVERY_S = 1.0
_SILENCE_S = 3.0
_HELLO_TIMEOUT_S = 5.0
_BACKOFF_S = (0.05, 0.2, 0.5, 1.0, 2.0)
_FORGET_AFTER_S = 30.0
_MAX_WAITING_MESSAGES = 1 << 16
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]  # announcements of a long prompt in digest mode


@dataclass(slots=True, eq=False)
class _Link:
    peer: PeerId
    address: str
    task: asyncio.Task[None] | None = None
    attached: bool = False
    lost_at: float = 0.0
    doubted: bool = False
    waiting: list[ReaderMessage] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    problem: str = "not attached yet"
    told: str = ""
    mixes: bool = False  # its weights may be of another scheme than ours


class LinkLost(Exception):
    """Why a stream ended, in words for a log and a HandoffFailed."""


class PeerLinks:
    """Callbacks run on the asyncio loop: `on_hello` when a stream stands, `on_lost` whenever messages may be lost,
    `on_gone` when a source will not be attached again, `on_pong` each second while it answers.
    """

    def __init__(
        self,
        own: PeerHello,
        *,
        on_hello: Callable[[PeerHello], None],
        on_messages: Callable[[PeerId, tuple[SourceMessage, ...]], None],
        on_lost: Callable[[PeerId, str], None],
        on_gone: Callable[[PeerId], None],
        on_pong: Callable[[PeerId], None],
        wiring: Wiring = INSECURE["worker"],
        wallet: tickets.Wallet | None = None,
    ) -> None:
        self._wallet = wallet or tickets.Wallet()
        self._own = own
        self._wiring = wiring
        self._on_hello = on_hello
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._on_gone = on_gone
        self._on_pong = on_pong
        self._links: dict[PeerId, _Link] = {}

    def introduce(self, peer: PeerId, address: str, *, mixes: bool = False) -> None:
        """A source exists there. Idempotent; an earlier incarnation of the same worker is forgotten."""
        known = self._links.get(peer)
        if known is not None:
            known.doubted = False
            known.mixes = known.mixes or mixes
        if known is not None or not address:
            return
        newest = max((p.epoch for p in self._links if p.worker_id == peer.worker_id), default=0)
        if peer.epoch < newest:
            return
        for older in [p for p in self._links if p.worker_id == peer.worker_id]:
            self._forget(older, "the worker restarted")
        link = self._links[peer] = _Link(peer, address, lost_at=asyncio.get_running_loop().time(), mixes=mixes)
        link.task = asyncio.create_task(self._keep(link))

    def doubt(self, peer: PeerId) -> None:
        """A router says that it is gone. Our own stream knows better, as long as it stands."""
        link = self._links.get(peer)
        if link is not None:
            link.doubted = True
            if not link.attached:
                self._forget(peer, "the router says it is gone")

    def _forget(self, peer: PeerId, reason: str) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            if link.task is not None and link.task is not asyncio.current_task():
                link.task.cancel()
            self._on_lost(peer, reason)
            self._on_gone(peer)

    def send(self, messages: Iterable[tuple[PeerId, ReaderMessage]]) -> None:
        """Messages wait for a link that is being attached; those to a stranger are answered with `on_lost`."""
        for peer, message in messages:
            link = self._links.get(peer)
            if link is None:
                self._on_lost(peer, "no such peer was introduced")
            elif len(link.waiting) >= _MAX_WAITING_MESSAGES:
                self._lose(link, "too many messages wait for it")
            else:
                link.waiting.append(message)
                link.wake.set()

    def attached(self) -> list[PeerId]:
        return [link.peer for link in self._links.values() if link.attached]

    async def stop(self) -> None:
        tasks = [link.task for link in self._links.values() if link.task is not None]
        self._links.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, link: _Link) -> None:
        attempt = 0
        while True:
            try:
                await self._attach(link)
            except LinkLost as error:
                link.problem = str(error)
            except grpc.aio.AioRpcError as error:
                link.problem = f"{error.code().name}: {error.details()}"
            except ValueError as error:
                link.problem = f"it says what this version does not understand: {error}"
            except Exception as error:  # whoever waits for this source must hear that nothing comes
                log.exception("the stream to source %s failed here", link.peer.worker_id)
                link.problem = f"internal error: {error!r}"
            attempt = 0 if link.attached else attempt + 1
            if link.problem != link.told:
                link.told = link.problem
                log.warning("source %s at %s: %s", link.peer.worker_id, link.address, link.problem)
            now = asyncio.get_running_loop().time()
            if link.attached:
                link.lost_at = now
            self._lose(link, link.problem)
            if link.doubted or now - link.lost_at > _FORGET_AFTER_S:
                self._forget(link.peer, link.problem)
                return
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])

    def _lose(self, link: _Link, reason: str) -> None:
        link.attached = False
        link.waiting.clear()
        self._on_lost(link.peer, reason)

    async def _attach(self, link: _Link) -> None:
        """One stream, until it ends. Always ends by an exception."""
        async with self._wiring.channel(link.address, "worker", _OPTIONS) as channel:
            call = handoff_pb2_grpc.HandoffServiceStub(channel).Attach(metadata=self._wiring.proof())
            ticket = self._wallet.introduction(link.peer)
            await call.write(handoff_pb2.AttachRequest(hello=hello_to_wire(self._own, ticket, mixes=link.mixes)))
            first = await self._next(call, _HELLO_TIMEOUT_S)
            hello = hello_from_wire(first.hello)
            if why := OURS.why_not(spoken(first.hello), "this worker", f"source {link.peer.worker_id}"):
                raise LinkLost(why)
            if hello.peer != link.peer:
                raise LinkLost(f"{hello.peer} answers where {link.peer} was expected")
            if not hello.fits(self._own, mixes=link.mixes):
                raise LinkLost(explain_mismatch(self._own.layout_fingerprint, hello.layout_fingerprint))
            secret = self._wiring.secret
            if secret is not None:
                why = tickets.check_answer(secret, link.peer, self._own.peer, ticket, first.hello.ticket)
                if why:
                    raise LinkLost(why)
            link.attached, link.told = True, ""
            self._on_hello(hello)
            log.info("attached to source %s at %s", link.peer.worker_id, link.address)
            try:
                await beside(self._read(link, call), self._write(link, call))
            finally:
                call.cancel()

    async def _read(self, link: _Link, call: Any) -> None:
        while True:
            response = await self._next(call, _SILENCE_S)
            if response.pong:
                self._on_pong(link.peer)
            messages = source_messages_from_wire(response)
            if messages:
                self._on_messages(link.peer, messages)

    @staticmethod
    async def _next(call: Any, timeout_s: float) -> handoff_pb2.AttachResponse:
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for: in Python 3.11 that can lose a cancellation
                response = await call.read()
        except TimeoutError:
            raise LinkLost(f"silent for {timeout_s:g} s") from None
        if response is _EOF:
            raise LinkLost(f"the stream ended: {(await call.code()).name} {await call.details()}")
        return response

    async def _write(self, link: _Link, call: Any) -> None:
        """Everything that waits, as one message; a ping each second besides."""
        loop = asyncio.get_running_loop()
        next_ping = loop.time()
        while True:
            request = handoff_pb2.AttachRequest()
            if link.waiting:
                messages, link.waiting = link.waiting, []
                request = reader_messages_to_wire(messages)
                for asked in (*request.follows, *request.lends):
                    asked.ticket = self._wallet.handoff(asked.handoff_id)
            if loop.time() >= next_ping:
                next_ping = loop.time() + _PING_EVERY_S
                request.ping = True
            if request.ByteSize():
                try:
                    await call.write(request)
                except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    return  # the call is over; who reads it says why
            link.wake.clear()
            if not link.waiting:
                try:
                    async with asyncio.timeout_at(next_ping):
                        await link.wake.wait()
                except TimeoutError:
                    pass
