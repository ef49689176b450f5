"""One stream to every registered worker. Commands of one turn of the loop travel as one message.

register ──> dial ──first answer, right epoch──> ready ──stream ends──> lost ──backoff, heartbeats go on──> dial
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from diptych.v1 import cluster_pb2, generate_pb2, worker_pb2, worker_pb2_grpc

from kv_transfer import tickets
from kv_transfer.handoff import PeerId
from kv_transfer.wire import acceptance_of
from router.breakdown import Drafts, FirstStep
from router.dispatcher import Dispatcher
from router.errors import Code, Failure, refuse
from router.placement.adapter_words import AdapterWord
from router.placement.cluster import Role, WorkerInfo, WorkerState
from router.placement.policy import WorkerKey
from router.request import LegStart
from router.wire import (
    FINISH_FROM_WIRE,
    ROLES,
    ROLES_TO_WIRE,
    block_events_from_wire,
    handoff_to_wire,
    pack_tokens,
    said_from_wire,
    start_to_wire,
    word_to_wire,
)
from settings.tasks import beside, vital
from settings.tls import INSECURE, Wiring
from settings.versions import OURS

log = logging.getLogger(__name__)

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

_CONNECT_TIMEOUT_S = 5.0
_BACKOFF_S = (0.05, 0.2, 0.5, 1.0)
_MAX_STEPS_AT_ONCE = 16
_SILENCE = ("keepalive", "ping timeout", "timed out", "no route", "unreachable")  # in gRPC's words
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A worker whose host vanished answers nothing: notice within seconds even when no token is due.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # grpcio 1.85 goes by this one
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(slots=True, eq=False)
class _Link:
    info: WorkerInfo
    pending: worker_pb2.ConnectRequest = field(default_factory=worker_pb2.ConnectRequest)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    connected: bool = False
    read_at: float = 0.0
    task: asyncio.Task[None] | None = None


class WorkerLinks:
    def __init__(
        self, router_id: str, clock: Callable[[], float], forget_after_s: float, wiring: Wiring = INSECURE["router"]
    ) -> None:
        self._router_id = router_id
        self._wiring = wiring
        self._renewing: asyncio.Task[None] | None = None
        self._clock = clock
        self._forget_after_s = forget_after_s
        self._links: dict[WorkerKey, _Link] = {}
        self.dispatcher: Dispatcher  # set once both exist

    # From the registry.

    def registered(self, info: WorkerInfo, *, leaving: bool) -> None:
        """Raises RequestRefused for an incarnation that a later one has replaced."""
        cluster = self.dispatcher.cluster
        later = cluster.later_than(info.key)
        if later is not None:
            raise refuse(
                Code.ALREADY_EXISTS,
                f"a later incarnation of {info.key.worker_id} registered from {later.address}; "
                "give every worker a worker_id of its own",
                field="worker_id",
            )
        _, older = cluster.registered(info, self._clock(), leaving=leaving)
        if cluster.said_role(info.key, info.role, info.role_changes) or leaving:
            self.dispatcher.moves.wanted()
        for entry in older:
            log.warning(
                "worker %s: a later incarnation registered from %s, the one at %s (%s) is dropped",
                info.key.worker_id,
                info.address,
                entry.info.address,
                entry.state.value,
            )
            self._remove(entry.key, "a later incarnation registered")
        if info.key not in self._links:
            link = self._links[info.key] = _Link(info)
            link.task = asyncio.create_task(self._keep(link))
        if self._wiring.secret is not None and self._renewing is None:
            self._renewing = vital(self._renew_introductions(), "renewing introductions")

    # Commands, from lives.

    def _to(self, worker: WorkerKey) -> worker_pb2.ConnectRequest:
        """What the worker is told next. Of one that was lost meanwhile nobody reads it: lives hear of it by
        on_worker_lost.
        """
        link = self._links.get(worker)
        if link is None:
            return worker_pb2.ConnectRequest()
        link.wake.set()
        return link.pending

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None:
        if worker not in self._links:
            return
        source_address = "" if start.pull is None else self._address(start.pull[1])
        holder_address = "" if start.prefix is None else self._address(start.prefix[1].holder)
        message = start_to_wire(start, deadline_s, source_address, holder_address)
        self._sign(message, worker)
        self._to(worker).starts.append(message)

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool) -> None:
        self._to(worker).cancels.add(sequence_id=leg, reason=reason, keep_lease=keep_lease)

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        self._to(worker).continues.add(sequence_id=leg, emitted=pack_tokens(emitted))

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None:
        message = self._to(worker).follows.add(
            sequence_id=leg, emitted=pack_tokens(emitted), pull=handoff_to_wire(pull, self._address(pull[1]))
        )
        message.pull.mixes_weights = self.dispatcher.cluster.mixed
        self._sign(message, worker)

    def serve(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None:
        self._to(worker).serves.add(sequence_id=leg, handoff_id=handoff_id, most_tokens=most_tokens)

    def freeze(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        self._to(worker).freezes.add(sequence_id=leg, handoff_id=handoff_id)

    def keep(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        self._to(worker).keeps.add(sequence_id=leg, handoff_id=handoff_id)

    def set_role(self, worker: WorkerKey, role: Role) -> None:
        self._to(worker).set_role = ROLES_TO_WIRE[role]

    def resync_blocks(self, worker: WorkerKey) -> None:
        self._to(worker).resync_blocks = True

    def _address(self, worker: WorkerKey) -> str:
        link = self._links.get(worker)
        return "" if link is None else link.info.address

    async def set_adapter(self, worker: WorkerKey, word: AdapterWord, timeout_s: float) -> tuple[str, Failure | None]:
        """The digest of what the worker has now under that name, or why it does not."""
        link = self._links.get(worker)
        if link is None or not link.connected:
            return "", Failure(Code.UNAVAILABLE, "its stream is broken; it is told when it is back")
        try:
            async with self._wiring.channel(link.info.address, "worker", _OPTIONS) as channel:
                answer = await worker_pb2_grpc.WorkerServiceStub(channel).SetAdapter(
                    worker_pb2.SetAdapterRequest(adapter=word_to_wire(word)),
                    timeout=timeout_s,
                    metadata=self._wiring.proof(),
                )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return "", Failure(Code.FAILED_PRECONDITION, "it is of a version that loads no adapters; upgrade it")
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                why = f"it has not done so within {timeout_s:g} s, and may yet; look at its log"
                return "", Failure(Code.DEADLINE_EXCEEDED, why)
            return "", Failure(_code(error.code().value[0]), error.details() or error.code().name)
        self.dispatcher.cluster.said_adapters(worker, said_from_wire(answer.said))
        return answer.digest, None

    async def stop(self) -> None:
        tasks = [link.task for link in self._links.values() if link.task is not None]
        if self._renewing is not None:
            tasks.append(self._renewing)
        self._links.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # One worker.

    async def _keep(self, link: _Link) -> None:
        attempt = 0
        key = link.info.key
        while True:
            try:
                why = await self._connect(link)
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
            except (TimeoutError, ValueError) as error:
                why = str(error) or "no answer in time"
            except Exception as error:  # its requests must hear that nothing comes
                log.exception("the stream to worker %s failed here", key.worker_id)
                why = f"internal error: {error!r}"
            attempt = 0 if link.connected else attempt + 1
            was_connected, link.connected = link.connected, False
            link.pending = worker_pb2.ConnectRequest()
            crashed = False
            if was_connected:
                known = self.dispatcher.cluster.workers.get(key)
                left = known is not None and known.state is WorkerState.DRAINING
                crashed = not left and is_crash(why)
                level, what = (logging.INFO, "left") if left else (logging.WARNING, "lost")
                log.log(level, "worker %s %s: %s", key.worker_id, what, why)
                self._introduce_to_readers(link.info, gone=True)
            self.dispatcher.on_worker_lost(key, why, crashed=crashed)
            entry = self.dispatcher.cluster.workers.get(key)
            if entry is None or self._clock() - entry.heard_at > self._forget_after_s:
                self._remove(key, "its heartbeats stopped")
                return
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])

    def _remove(self, key: WorkerKey, why: str) -> None:
        link = self._links.pop(key, None)
        self.dispatcher.on_worker_lost(key, why)
        self.dispatcher.cluster.forget(key)
        if link is not None and link.task is not None and link.task is not asyncio.current_task():
            link.task.cancel()
            self._introduce_to_readers(link.info, gone=True)

    async def _connect(self, link: _Link) -> str:
        """One stream, until it ends. Returns why."""
        async with self._wiring.channel(link.info.address, "worker", _OPTIONS) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(metadata=self._wiring.proof())
            try:
                await call.write(self._greeting(link))
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    first = await call.read()
                if first is _EOF:
                    return f"refused: {await call.details()}"
                if first.epoch != link.info.key.epoch:
                    raise ValueError(f"epoch {first.epoch} answers where {link.info.key.epoch} registered")
                link.connected = True
                self.dispatcher.cluster.connected(link.info.key, self._clock())
                self.dispatcher.on_worker_back(link.info.key)
                self._introduce_to_readers(link.info, gone=False)
                log.info("worker %s ready", link.info.key.worker_id)
                link.read_at = self._clock()
                return await beside(self._read(link, call), self._silence(link), self._write(link, call))
            finally:
                call.cancel()

    async def _silence(self, link: _Link) -> None:
        """A worker whose event loop stands still says nothing, while gRPC goes on answering pings in its name.

        Raises TimeoutError.
        """
        while True:
            await asyncio.sleep(0.5)
            entry = self.dispatcher.cluster.workers.get(link.info.key)
            heard_at = link.read_at if entry is None else max(entry.heard_at, link.read_at)
            if self._clock() - heard_at > self._forget_after_s:
                raise TimeoutError(f"no heartbeat and no message for {self._forget_after_s:g} s")

    def _greeting(self, link: _Link) -> worker_pb2.ConnectRequest:
        greeting = worker_pb2.ConnectRequest(
            router_id=self._router_id, protocol=OURS.version, oldest_protocol=OURS.oldest
        )
        for other in self._links.values():
            if other is not link and other.connected and self._exchange(other.info, link.info):
                self._introduce(greeting, other.info, link, gone=False)
        return greeting

    def _introduce_to_readers(self, info: WorkerInfo, *, gone: bool) -> None:
        """Any worker may pull from any other of its layout: handoffs, prefixes, running answers."""
        for link in self._links.values():
            if link.info.key != info.key and link.connected and self._exchange(info, link.info):
                self._introduce(link.pending, info, link, gone=gone)
                link.wake.set()

    def _exchange(self, one: WorkerInfo, other: WorkerInfo) -> bool:
        return self.dispatcher.cluster.exchange(one, other)

    def _introduce(self, message: worker_pb2.ConnectRequest, info: WorkerInfo, reader: _Link, *, gone: bool) -> None:
        secret, ticket = self._wiring.secret, b""
        if secret is not None and not gone:
            ticket = tickets.introduction(secret, _peer(info.key), _peer(reader.info.key), time.time())
        message.introductions.add(
            worker_id=info.key.worker_id,
            epoch=info.key.epoch,
            address=info.address,
            gone=gone,
            ticket=ticket,
            mixes_weights=info.layout_fingerprint != reader.info.layout_fingerprint,
        )

    async def _renew_introductions(self) -> None:
        """A ticket is good for minutes; a pair whose link breaks after hours must be able to attach again."""
        while True:
            await asyncio.sleep(tickets.RENEW_INTRODUCTION_S)
            for link in list(self._links.values()):
                if link.connected:
                    self._introduce_to_readers(link.info, gone=False)
                    await asyncio.sleep(0)  # thousands of pairs must not hold up a token

    def _sign(self, message: worker_pb2.StartSequence | worker_pb2.FollowAnother, reader: WorkerKey) -> None:
        """Every handoff that it names gets the reader's ticket."""
        secret = self._wiring.secret
        if secret is None:
            return
        for description, ref in message.ListFields():
            if description.message_type is worker_pb2.HandoffRef.DESCRIPTOR:
                source = PeerId(ref.source_worker, ref.source_epoch)
                ref.ticket = tickets.reference(secret, ref.handoff_id, source, _peer(reader), time.time())

    async def _write(self, link: _Link, call: Any) -> None:
        while True:
            await link.wake.wait()
            link.wake.clear()
            message, link.pending = link.pending, worker_pb2.ConnectRequest()
            if message.ByteSize():
                try:
                    await call.write(message)
                except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    return  # the call is over; who reads it says why

    async def _read(self, link: _Link, call: Any) -> str:
        """Takes steps as they come and passes them on; when several wait already, they leave as one.

        Without that, a router that cannot write as many messages as steps arrive would fall behind for ever.
        """
        key, dispatcher = link.info.key, self.dispatcher
        coming = asyncio.ensure_future(call.read())
        taken = 0
        try:
            while True:
                message = await coming
                if message is _EOF:
                    dispatcher.flush()
                    return f"its stream ended: {(await call.code()).name} {await call.details()}"
                if message.epoch != key.epoch:
                    raise ValueError(f"epoch changed to {message.epoch} within a stream")
                coming = asyncio.ensure_future(call.read())
                link.read_at = now = self._clock()
                hear(dispatcher, key, message, now)
                taken += 1
                await asyncio.sleep(0)
                if not coming.done() or taken >= _MAX_STEPS_AT_ONCE:
                    dispatcher.flush()
                    taken = 0
        finally:
            coming.cancel()


def is_crash(why: str) -> bool:
    """Of a stream's end: a process that ends has its connections closed by the kernel, and an engine that breaks says
    so. Nobody answers over a cut, from a pause or a host without power: that is no crash.
    """
    words = why.lower()
    return "unavailable" in words and not any(sign in words for sign in _SILENCE)


def _peer(key: WorkerKey) -> PeerId:
    return PeerId(key.worker_id, key.epoch)


def hear(dispatcher: Dispatcher, key: WorkerKey, message: worker_pb2.ConnectResponse, now: float) -> None:
    """One step of one worker: adoptions first, then tokens, then what ended. `flush` is the caller's."""
    cluster = dispatcher.cluster
    for adopted in message.adoptions:
        dispatcher.on_adopted(
            adopted.sequence_id, adopted.handoff_id, adopted.kv_early_share, adopted.adopt_ms, adopted.pulled_bytes
        )
        if (breakdown := dispatcher.breakdown_of(adopted.sequence_id)) is not None:
            breakdown.pulled_bytes += adopted.pulled_bytes
            breakdown.transfer_ms += adopted.transfer_ms
    for first in message.first_steps:
        said = FirstStep(first.held_ms, first.queue_ms, first.prefill_ms, first.prefill_wait_ms, first.send_ms)
        dispatcher.on_first_step(first.sequence_id, said)
    for d in message.drafted:  # before what ends it
        if (breakdown := dispatcher.breakdown_of(d.sequence_id)) is not None:
            breakdown.drafted(d.sequence_id, Drafts(d.verifications, d.drafts, d.accepted), acceptance_of(d))
    for chunk in message.prompt_logprobs:
        dispatcher.on_prompt_logprobs(chunk.sequence_id, chunk.logprobs)
    if message.sequence_ids:
        logprobs: dict[tuple[int, int], object] = {(p.sequence_id, p.position): p.logprobs for p in message.logprobs}
        dispatcher.on_tokens(message.sequence_ids, message.positions, message.token_ids, logprobs)
    for found in message.beams:
        dispatcher.on_beams(found.sequence_id, found)
    for end in message.ends:
        if end.reason == generate_pb2.FINISH_REASON_ERROR:
            dispatcher.on_error(end.sequence_id, _code(end.code), end.error)
        else:
            reason = None if end.handed_over else FINISH_FROM_WIRE[end.reason]
            dispatcher.on_end(end.sequence_id, reason, end.cached_tokens)
    for c in message.caught_up:
        dispatcher.on_caught_up(c.sequence_id, c.handoff_id)
    for f in message.handoff_failures:
        dispatcher.on_handoff_failed(f.sequence_id, f.handoff_id, f.reason, f.detail, f.kept_tokens)
    if message.role in ROLES and cluster.said_role(key, ROLES[message.role], message.role_changes):
        log.info("worker %s: %s from now on", key.worker_id, ROLES[message.role].value)
        dispatcher.moves.wanted()
    if message.HasField("load"):
        broken = frozenset(
            WorkerKey(p.source_worker, p.source_epoch)
            for p in message.load.paths
            if p.state == cluster_pb2.PATH_STATE_BROKEN
        )
        cluster.reported(key, message.load, now, broken)
        dispatcher.moves.reported(key)
    if message.HasField("block_events"):
        events = message.block_events
        if not cluster.block_events(key, events.first_sequence_number, block_events_from_wire(events)):
            dispatcher.resync_blocks(key)
    if message.draining:
        cluster.draining(key)
        dispatcher.moves.wanted()


def _code(number: int) -> Code:
    try:
        return Code(number)
    except ValueError:
        return Code.INTERNAL
