"""WorkerService: the router's end of a worker.

One `Connect` stream per router. Commands go to the engine thread as they come; outputs are merged while a write is
under way and leave as one message per turn of the writer: coalesced when the router lags, never delayed when it does
not. A router that lags without end loses its stream, which cancels its sequences.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc
from diptych.v1 import worker_pb2, worker_pb2_grpc

from kv_transfer.handoff import PeerId
from kv_transfer.tickets import Wallet
from settings.tls import INSECURE, NotAMember, Wiring
from settings.versions import OURS, spoken
from worker.adapters import AdapterRefused, LiveAdapters
from worker.messages import (
    Inbound,
    Link,
    LinkOutput,
    RouterCommands,
    RouterConnected,
    RouterLost,
)
from worker.wire import commands_from_wire, handoffs_named, output_to_wire, said_to_wire, word_from_wire

log = logging.getLogger(__name__)

_STATUSES = {status.value[0]: status for status in grpc.StatusCode}
MAX_LAG_TOKENS = 1 << 18  # per router: about 16 MB


class OtherVersion(Exception):
    """A router that speaks another protocol; names cause and fix."""


class _LinkWriter:
    """What waits to be written to one router."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.ended = asyncio.Event()
        self.pending: LinkOutput | None = None
        self.overflown = False

    def add(self, output: LinkOutput) -> None:
        if self.pending is None:
            self.pending = output
        else:
            self.pending.merge(output)
            self.overflown = len(self.pending.token_ids) > MAX_LAG_TOKENS
        self.wake.set()


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """`post` reaches the engine thread; `introduce(peer, address)` (None = gone) reaches the handoff links."""

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        post: Callable[[Inbound], None],
        introduce: Callable[[PeerId, str | None, bool], None],
        wiring: Wiring = INSECURE["worker"],
        wallet: Wallet | None = None,
        adapters: LiveAdapters | None = None,
    ) -> None:
        self._adapters = adapters
        self._setting: set[asyncio.Task[str]] = set()
        self._wallet = wallet or Wallet()
        self._worker_id = worker_id
        self._wiring = wiring
        self._epoch = epoch
        self._post = post
        self._introduce = introduce
        self._numbers = itertools.count(1)
        self._writers: dict[Link, _LinkWriter] = {}
        self._closed = ""

    def deliver(self, outputs: dict[Link, LinkOutput]) -> None:
        """On the asyncio loop: one step's outputs."""
        for link, output in outputs.items():
            writer = self._writers.get(link)
            if writer is not None:
                writer.add(output)

    async def close(self, why: str) -> None:
        """Every stream ends with this cause, and no new one is taken. Returns when all have; the caller bounds it."""
        self._closed = why
        writers = list(self._writers.values())
        for writer in writers:
            writer.wake.set()
        for writer in writers:
            await writer.ended.wait()

    @property
    def connected_routers(self) -> int:
        return len(self._writers)

    async def SetAdapter(
        self, request: worker_pb2.SetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.SetAdapterResponse:
        try:
            self._wiring.check_peer(context, "router")
        except NotAMember as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"no adapters: {error}")
        adapters = self._adapters
        if adapters is None or self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._closed or "this worker has no adapters")
            raise AssertionError
        task = asyncio.create_task(adapters.set(word_from_wire(request.adapter)))
        self._setting.add(task)  # what has a digest is ended whether the router waits for it or not
        task.add_done_callback(lambda done: (self._setting.discard(done), done.cancelled() or done.exception()))
        try:
            digest = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not request.adapter.digest:  # the first to read it: by now the command is refused, or tried elsewhere
                task.cancel()
            raise
        except AdapterRefused as error:
            await context.abort(_STATUSES[error.code], str(error).encode(errors="replace").decode())
            raise AssertionError from None
        return worker_pb2.SetAdapterResponse(digest=digest, said=said_to_wire(adapters.said()))

    async def Connect(
        self,
        request_iterator: AsyncIterator[worker_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[worker_pb2.ConnectResponse]:
        if self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._closed)
        try:
            self._wiring.check_peer(context, "router")
        except NotAMember as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"no stream: {error}")
        link = next(self._numbers)
        writer = self._writers[link] = _LinkWriter()
        log.info("router connected: %s (link %d)", context.peer(), link)
        self._post(RouterConnected(link))
        reading = asyncio.create_task(self._read(link, request_iterator))
        reading.add_done_callback(lambda task: (writer.wake.set(), task.cancelled() or task.exception()))
        try:
            yield worker_pb2.ConnectResponse(epoch=self._epoch, worker_id=self._worker_id)
            while True:
                await writer.wake.wait()
                writer.wake.clear()
                if self._closed:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, self._closed)
                if reading.done():
                    # a protocol error of the router ends the stream with its cause; its normal end just ends it
                    error = None if reading.cancelled() else reading.exception()
                    if isinstance(error, OtherVersion):
                        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
                    if error is not None:
                        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                    return
                if writer.overflown:
                    await context.abort(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"the router did not read {MAX_LAG_TOKENS} tokens; its sequences are cancelled",
                    )
                output, writer.pending = writer.pending, None
                if output is not None:
                    yield output_to_wire(output, self._epoch, time.monotonic())
        finally:
            reading.cancel()
            self._writers.pop(link, None)
            writer.ended.set()
            self._post(RouterLost(link))
            log.info("router left (link %d)", link)

    async def _read(self, link: Link, requests: AsyncIterator[worker_pb2.ConnectRequest]) -> None:
        first = True
        async for request in requests:
            if first and (why := OURS.why_not(spoken(request), f"worker {self._worker_id}", request.router_id)):
                raise OtherVersion(why)
            first = False
            received = time.monotonic()
            self._keep_tickets(request)
            for i in request.introductions:
                self._introduce(PeerId(i.worker_id, i.epoch), None if i.gone else i.address, i.mixes_weights)
            for start in (*request.starts, *request.follows):  # a router may dispatch before its introduction arrived
                if start.HasField("pull"):
                    pull = start.pull
                    self._introduce(
                        PeerId(pull.source_worker, pull.source_epoch), pull.source_address, pull.mixes_weights
                    )
            for start in request.starts:  # who holds a prefix is introduced when it is first asked
                if start.HasField("prefix_pull"):
                    holder = start.prefix_pull
                    self._introduce(PeerId(holder.source_worker, holder.source_epoch), holder.source_address, False)
            commands = commands_from_wire(request)
            if commands:
                self._post(RouterCommands(link, commands, received))

    def _keep_tickets(self, request: worker_pb2.ConnectRequest) -> None:
        """Before anything is dialled or followed."""
        for i in request.introductions:
            self._wallet.keep_introduction(PeerId(i.worker_id, i.epoch), i.ticket)
        for ref in handoffs_named(request):
            self._wallet.keep_reference(ref.handoff_id, PeerId(ref.source_worker, ref.source_epoch), ref.ticket)
