"""HandoffService: the source's end of a reader's stream. Carries messages; decides nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable

import grpc
from diptych.v1 import handoff_pb2, handoff_pb2_grpc

from kv_transfer import tickets
from kv_transfer.handoff import PeerHello, PeerId, ReaderMessage, RefusalReason, Refused, SourceMessage
from kv_transfer.layout import explain_mismatch
from kv_transfer.wire import (
    hello_from_wire,
    hello_to_wire,
    reader_messages_from_wire,
    source_messages_to_wire,
)
from settings.tls import INSECURE, NotAMember, Wiring
from settings.versions import OURS, spoken

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
SILENCE_S = 3.0  # a reader pings every second
_MAX_WAITING_MESSAGES = 1 << 16


class _Outbox:
    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.ended = asyncio.Event()
        self.messages: list[SourceMessage] = []
        self.pong = False
        self.closed = ""


class HandoffServicer(handoff_pb2_grpc.HandoffServiceServicer):
    """Callbacks run on the asyncio loop: `on_hello` before any message of a peer, `on_lost` after the last."""

    def __init__(
        self,
        own: PeerHello,
        *,
        on_hello: Callable[[PeerHello], None],
        on_messages: Callable[[PeerId, tuple[ReaderMessage, ...]], None],
        on_lost: Callable[[PeerId], None],
        on_ping: Callable[[PeerId], None],
        wiring: Wiring = INSECURE["worker"],
    ) -> None:
        self._own = own
        self._wiring = wiring
        self._on_hello = on_hello
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._on_ping = on_ping
        self._outboxes: dict[PeerId, _Outbox] = {}
        self._closed = ""

    async def close(self, why: str) -> None:
        """Every stream ends with this cause, and no new one is taken. Returns when all have; the caller bounds it."""
        self._closed = why
        outboxes = list(self._outboxes.values())
        for outbox in outboxes:
            outbox.closed = why
            outbox.wake.set()
        for outbox in outboxes:
            await outbox.ended.wait()

    def send(self, messages: Iterable[tuple[PeerId, SourceMessage]]) -> None:
        """What is for a reader that left is dropped: its leases run to their end."""
        for peer, message in messages:
            outbox = self._outboxes.get(peer)
            if outbox is None:
                continue
            outbox.messages.append(message)
            if len(outbox.messages) > _MAX_WAITING_MESSAGES:
                outbox.closed = f"the reader left {_MAX_WAITING_MESSAGES} messages unread"
            outbox.wake.set()

    async def Attach(
        self,
        request_iterator: AsyncIterator[handoff_pb2.AttachRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[handoff_pb2.AttachResponse]:
        hello, answer = await self._greet(request_iterator, context)
        if self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._closed)
        peer = hello.peer
        older = self._outboxes.get(peer)
        if older is not None:  # the reader came back before we saw its old stream end
            older.closed = "the reader opened another stream"
            older.wake.set()
        outbox = self._outboxes[peer] = _Outbox()
        self._on_hello(hello)
        log.info("reader attached: %s", peer.worker_id)
        reading = asyncio.create_task(self._read(peer, outbox, request_iterator))
        reading.add_done_callback(lambda task: (outbox.wake.set(), task.cancelled() or task.exception()))
        try:
            yield handoff_pb2.AttachResponse(hello=hello_to_wire(self._own, answer))
            while True:
                await outbox.wake.wait()
                outbox.wake.clear()
                if reading.done():
                    return
                if outbox.closed:
                    await context.abort(grpc.StatusCode.ABORTED, outbox.closed)
                messages, outbox.messages = outbox.messages, []
                pong, outbox.pong = outbox.pong, False
                if messages or pong:
                    response = source_messages_to_wire(messages)
                    response.pong = pong
                    yield response
        finally:
            reading.cancel()
            outbox.ended.set()
            if self._outboxes.get(peer) is outbox:
                del self._outboxes[peer]
                self._on_lost(peer)
                log.info("reader left: %s", peer.worker_id)

    async def _greet(
        self, requests: AsyncIterator[handoff_pb2.AttachRequest], context: grpc.aio.ServicerContext
    ) -> tuple[PeerHello, bytes]:
        """Who it is, and our answer to its ticket."""
        try:
            self._wiring.check_peer(context, "worker")
        except NotAMember as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"not attached: {error}")
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came")
            raise AssertionError from None
        if not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        hello = hello_from_wire(first.hello)
        if why := OURS.why_not(spoken(first.hello), "this worker", f"the reader {shown(hello.peer.worker_id)}"):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        secret, answer = self._wiring.secret, b""
        if secret is not None:
            ticket = first.hello.ticket
            why = tickets.check_introduction(secret, self._own.peer, hello.peer, ticket, time.time())
            if why:
                log.warning("a reader that calls itself %s was not attached: %s", shown(hello.peer.worker_id), why)
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"not attached: {why}")
            answer = tickets.answer(secret, self._own.peer, hello.peer, ticket)
        if not hello.fits(self._own, mixes=hello.mixes):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                explain_mismatch(self._own.layout_fingerprint, hello.layout_fingerprint),
            )
        if hello.transport != self._own.transport:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the reader moves KV by {hello.transport}, this worker by {self._own.transport}; use one for both",
            )
        return hello, answer

    async def _read(self, peer: PeerId, outbox: _Outbox, requests: AsyncIterator[handoff_pb2.AttachRequest]) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    request = await anext(requests)
            except TimeoutError:
                log.warning("reader %s is silent for %g s", peer.worker_id, SILENCE_S)
                return
            except StopAsyncIteration:
                return
            if request.ping:
                self._on_ping(peer)
                outbox.pong = True
                outbox.wake.set()
            self._drop_forbidden(peer, outbox, request)
            messages = reader_messages_from_wire(request)
            if messages:
                self._on_messages(peer, messages)

    def _drop_forbidden(self, peer: PeerId, outbox: _Outbox, request: handoff_pb2.AttachRequest) -> None:
        """What is asked for without a good ticket is refused here; what holds KV never hears of it."""
        secret = self._wiring.secret
        if secret is None:
            return
        now = time.time()
        for asked in (request.follows, request.lends):
            good = []
            for one in asked:
                why = tickets.check_handoff(secret, one.handoff_id, self._own.peer, peer, one.ticket, now)
                if not why:
                    good.append(one)
                    continue
                log.warning("reader %s may not follow %s: %s", shown(peer.worker_id), shown(one.handoff_id), why)
                outbox.messages.append(Refused(one.handoff_id, RefusalReason.FORBIDDEN, why))
                if len(outbox.messages) > _MAX_WAITING_MESSAGES:
                    outbox.closed = f"the reader left {_MAX_WAITING_MESSAGES} messages unread"
                outbox.wake.set()
            if len(good) != len(asked):
                del asked[:]
                asked.extend(good)  # type: ignore[arg-type]


def shown(text: str) -> str:
    """What a stranger sent, fit for a line of a log."""
    return repr(text[:80])
