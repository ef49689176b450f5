"""Workers and routers: the real cores and dispatcher, and edges that behave as the gRPC ones do.

What is mirrored here, because it is IO in the product: the step loop (worker/loop.py), the links of a router to its
workers (router/clients.py), the links of a reader to its sources (kv_transfer/clients.py, service.py).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from diptych.v1 import handoff_pb2, worker_pb2

from checkpoint.generation import SamplingDefaults
from elastic_worker.core import ElasticCore
from engine.adapters.slots import AdapterSlots
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.sequence import Sequence as EngineSequence
from engine.speculation import SpeculationLimits
from engine.types import StepPlan, StepResult
from kv_transfer.handoff import PeerId, ReaderMessage, Release, SourceMessage
from kv_transfer.layout import FULL, Rule
from kv_transfer.paths import PathMonitor
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from kv_transfer.wire import (
    reader_messages_from_wire,
    reader_messages_to_wire,
    source_messages_from_wire,
    source_messages_to_wire,
)
from router.clients import hear
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.placement.cluster import NO_ADAPTERS, Role, WorkerInfo, WorkerState
from router.placement.policy import PrefixPull, Rejection, RequestFacts, Route, WorkerKey
from router.request import LegStart
from router.wire import ROLES_TO_WIRE, handoff_to_wire, pack_tokens, start_to_wire
from tests.scenarios.adapters import SLOTS, AdaptersOfWorker
from tests.scenarios.model import VOCABULARY, Launch, ScriptedModel
from tests.scenarios.network import (
    KEEPALIVE_S,
    SILENCE_S,
    Clock,
    DataNetwork,
    Pipe,
    SimTransport,
    Timer,
    Weather,
)
from worker.core import WorkerCore
from worker.messages import (
    Drain,
    Inbound,
    Outbox,
    ReaderLost,
    ReaderMessages,
    RoleSaid,
    RouterCommands,
    RouterConnected,
    RouterLost,
    SourceAttached,
    SourceGone,
    SourceLost,
    SourceMessages,
    Transported,
)
from worker.wire import commands_from_wire, output_to_wire

_BACKOFF_S = (0.05, 0.2, 0.5, 1.0)
_HEARTBEAT_S = 1.0
_SEEN_S = 0.015  # a broken stream is seen after that


@dataclass(frozen=True)
class Shape:
    """What all workers of a world have in common, but for an upgrade."""

    block_tokens: int
    prefill_blocks: int
    decode_blocks: int
    max_batch_tokens: int
    max_waiting: int
    step_s: float
    token_s: float
    digest: bool
    lease_s: float
    room_wait_s: float
    pull_timeout_s: float
    blocks_per_pull: int
    leased_share: float
    rules: tuple[Rule, ...] = (FULL,)
    scarce: bool = False  # room in the first group is often none in the others
    original: int = 0  # longer sequences have another rotary table
    layout: str = "sim"  # its fingerprint
    max_running: int = 8

    def blocks_by_group(self, blocks: int) -> tuple[int, ...]:
        """`blocks`: of the first group. Of windows fewer, of states two for each sequence and a few for snapshots."""
        slots, fewer = (5, 12) if self.scarce else (20, blocks // 2)
        return (blocks, *(slots if rule.state else fewer for rule in self.rules[1:]))


class World:
    """The nodes, and what is between them."""

    def __init__(self, clock: Clock, weather: Weather, rng: random.Random, shape: Shape, *, passive: bool) -> None:
        self.clock, self.weather, self.rng, self.shape = clock, weather, rng, shape
        self.data = DataNetwork(clock, weather, rng, passive=passive)
        self.data.stopped = lambda peer: peer in self.workers and self.workers[peer].stalled_until > clock.now
        self.workers: dict[PeerId, SimWorker] = {}  # those that live
        self.routers: dict[str, SimRouter] = {}
        self.epochs = itertools.count(1)
        self.reuse_epochs = False  # a planted bug
        self.adapters_kept_s: float | None = None  # by workers, for answers that began on them; None: there are none
        self.trace: Callable[[str], None] | None = None
        self.adopted: set[tuple[PeerId, str]] = set()  # handoffs that a reader has released as such
        self.poison_seed = -1  # a request with it crashes whoever computes it
        self.on_poisoned: Callable[[SimWorker], None] = lambda worker: None

    def poisoned(self, worker: SimWorker) -> None:
        self.say(f"{worker.peer.worker_id} was about to compute the poison")
        worker.die()
        self.on_poisoned(worker)

    def say(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.clock.now:9.4f}  {text}")

    def start_worker(self, name: str, role: Role) -> SimWorker:
        epoch = 1 if self.reuse_epochs else next(self.epochs)
        worker = SimWorker(self, PeerId(name, epoch), role)
        self.workers[worker.peer] = worker
        self.say(f"{name} starts, epoch {epoch}")
        worker.heartbeat()
        return worker

    def worker(self, name: str) -> SimWorker | None:
        return next((w for w in self.workers.values() if w.peer.worker_id == name), None)


class SimWorker:
    speculates = False  # most of them, then: some parts of a cluster do and some do not

    def __init__(self, world: World, peer: PeerId, role: Role) -> None:
        self.world, self.peer, self.role = world, peer, role
        self.shape = world.shape  # as it was when this one started
        self.alive = True
        self.leaving = False
        self.stalled_until = 0.0
        shape = self.shape
        blocks = shape.prefill_blocks if role is Role.PREFILL else shape.decode_blocks
        counts = shape.blocks_by_group(blocks)
        self.model = ScriptedModel(counts, shape.block_tokens, shape.rules, shape.original)
        self.pool = BlockPool(counts, self.model.generations)
        limits = EngineLimits(
            shape.block_tokens, shape.max_batch_tokens, shape.max_running, shape.max_waiting, 4096, VOCABULARY,
            original_context_tokens=shape.original,
        )  # fmt: skip
        drafts = SpeculationLimits(5) if self.speculates and peer.epoch % 3 else None
        slots = None if world.adapters_kept_s is None else AdapterSlots(SLOTS, ())
        self.engine = EngineCore(limits, self.pool, shape.layout, rules=shape.rules, speculation=drafts, adapters=slots)
        if self.engine.speculation is not None:
            self.engine.speculation.propose = self._propose  # type: ignore[method-assign]
        self.transport = SimTransport(peer, world.data, self.model, lambda event: self.post(Transported(event)))
        self.core: WorkerCore = self._core()
        self.core.role = RoleSaid(role.value)
        kept_s = world.adapters_kept_s
        self.adapters = None if kept_s is None else AdaptersOfWorker(self, kept_s)
        self.routers: dict[int, RouterLink] = {}
        self.sources: dict[PeerId, SourceLink] = {}  # as a reader
        self.readers: dict[PeerId, SourceLink] = {}  # as a source: attached streams
        self._inbox: list[Inbound] = []
        self._busy = False
        self._turn_at: float | None = None
        self.overlap = peer.epoch % 2 == 0  # every other worker plans a step ahead
        self._flying: deque[tuple[StepPlan, Launch, float]] = deque()
        self._result: StepResult | None = None  # of the step that computes, or of the last one
        self._computed: float | None = None  # when the step that computes is done
        self._ended = 0.0

    def _propose(self, decodes: Iterable[EngineSequence]) -> dict[int, list[int]]:
        """Some right drafts, and wrong ones after them; which, follows from the text."""
        assert self.engine.speculation is not None
        found: dict[int, list[int]] = {}
        for s in decodes:
            room = min(5, self.engine.speculation.room(s))
            if room > 0 and s.tokens[-1] % 3:  # where not, steps may overlap
                right = min(room, s.tokens[-1] % 7 - 1)
                drafts = (
                    self.model.foretell(s.tokens, s.spec.sampling, s.num_prompt, right, s.spec.adapter)
                    if right > 0
                    else []
                )
                found[s.sequence_id] = [*drafts, *[VOCABULARY] * (room - len(drafts))][:room]
        return found

    def _source(self) -> HandoffSource:
        shape = self.shape
        return HandoffSource(
            self.pool,
            lease_s=shape.lease_s,
            max_leases=64,
            max_leased_blocks=max(1, int(self.pool.num_blocks * shape.leased_share)),
            follow_wait_s=5.0,
            digest=self.model.digest if shape.digest else None,
            find=self.pool.match if shape.rules == (FULL,) else None,
            block_tokens=shape.block_tokens,
        )

    def _reader(self, numbers: itertools.count[int], paths: PathMonitor | None) -> HandoffReader:
        shape = self.shape
        return HandoffReader(
            self.pool,
            self.transport.submit,
            self.transport.abandon,
            block_bytes=[shape.block_tokens * 8] * len(shape.rules),
            pull_timeout_s=shape.pull_timeout_s,
            announce_timeout_s=20.0,
            renew_every_s=shape.lease_s / 3,
            max_blocks_per_pull=shape.blocks_per_pull,
            max_quarantined_blocks=max(1, shape.decode_blocks // 2),
            numbers=numbers,
            observe=paths.observe if paths is not None else None,
        )

    def _core(self) -> ElasticCore:
        numbers = itertools.count(1)
        paths = PathMonitor(self.transport.submit, numbers)
        self.source, self.reader = self._source(), self._reader(numbers, paths)
        room_wait_s = self.shape.room_wait_s
        return ElasticCore(
            self.engine, self.source, self.reader, report_every_s=0.3, room_wait_s=room_wait_s, paths=paths
        )

    @property
    def info(self) -> WorkerInfo:
        shape, said = self.shape, self.core.role
        assert said is not None
        return WorkerInfo(
            WorkerKey(self.peer.worker_id, self.peer.epoch),
            Role(said.role),
            f"{self.peer.worker_id}@{self.peer.epoch}",
            "sim",
            shape.layout,
            shape.block_tokens,
            shape.block_tokens * 8,
            self.pool.num_blocks,
            4096,
            VOCABULARY,
            original_context_tokens=shape.original,
            role_changes=said.changes,
            adapters=NO_ADAPTERS if self.adapters is None else self.adapters.said(),
        )

    # The step loop.

    def post(self, message: Inbound) -> None:
        if self.alive:
            self._inbox.append(message)
            self._wake(0.0)

    def _wake(self, delay_s: float) -> None:
        at = self.world.clock.now + delay_s
        if self._busy or (self._turn_at is not None and self._turn_at <= at):
            return
        self._turn_at = at
        self.world.clock.at(delay_s, lambda: self._turn(at))

    def _turn(self, at: float) -> None:
        if not self.alive or self._turn_at != at:
            return
        now = self.world.clock.now
        if self._busy:
            self._turn_at = None  # the commit looks into the inbox
            return
        if self.stalled_until > now:
            self._turn_at = self.stalled_until
            self.world.clock.at(self.stalled_until - now, lambda: self._turn(self._turn_at or 0.0))
            return
        self._turn_at = None
        core = self.core
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            core.handle(message, now)
        core.tick(now)
        self._flush()
        if inbox:
            core.check()
        plan = core.schedule(now)
        if plan is not None and any(item.sampling.seed == self.world.poison_seed for item in plan.items):
            self.world.poisoned(self)
            return
        if plan is not None:
            self._flying.append((plan, self.model.launch(plan), now))
        if not self._flying:
            self._wake(max(0.001, min(core.next_deadline() - now, 0.5)))
            return
        if plan is not None and len(self._flying) == 1:
            self._compute(now)
            if self.overlap:
                self._wake(0.0)
                return
        self._busy = True
        if self._computed is None or self._computed <= now:
            self._commit()

    def _compute(self, now: float) -> None:
        """The oldest launched step. Where steps overlap its bytes change as late as they can, else as early."""
        plan, launch, _ = self._flying[0]
        if not self.overlap:
            self._result = self.model.run(launch, None)
        shape = self.shape
        took = shape.step_s + shape.token_s * plan.num_tokens
        self._computed = now + took
        self.world.clock.at(took, self._commit)

    def _commit(self) -> None:
        """The oldest step is done, and the engine thread waits for it."""
        now = self.world.clock.now
        if not self.alive or not self._busy or self._computed is None or now < self._computed:
            return
        if self.stalled_until > now:
            self.world.clock.at(self.stalled_until - now, self._commit)
            return
        plan, launch, launched = self._flying.popleft()
        if self.overlap:
            self._result = self.model.run(launch, self._result, surplus=True)
        result, started = self._result, max(launched, self._ended)
        assert result is not None
        self._ended, self._computed = now, None
        if self._flying:
            self._compute(now)  # before the host has seen what became of the step
        self._busy = False
        self.core.commit(plan, result, started, now)
        self._flush()
        self.core.check()
        self._wake(0.0)

    def _flush(self) -> None:
        outbox = self.core.take_outbox()
        if outbox is not None:
            self._deliver(outbox)

    def _deliver(self, outbox: Outbox) -> None:
        for number, output in outbox.links.items():
            for failed in output.handoff_failures:
                contradicts = (self.peer, failed.handoff_id) in self.world.adopted
                assert not contradicts, f"{failed.handoff_id} was released as adopted and fails: {failed.detail}"
            link = self.routers.get(number)
            if link is not None:
                link.to_router(output_to_wire(output, self.peer.epoch, self.world.clock.now))
        for peer, message in outbox.to_readers:
            stream = self.readers.get(peer)
            if stream is not None:
                stream.to_reader(message)
        for peer, message in outbox.to_sources:
            if isinstance(message, Release) and message.adopted:
                self.world.adopted.add((self.peer, message.handoff_id))
            source = self.sources.get(peer)
            if source is None:
                self.post(SourceLost(peer, "no such peer was introduced"))
            else:
                source.to_source(message)

    # Life.

    def heartbeat(self) -> None:
        if not self.alive:
            return
        w = self.world
        if self.stalled_until <= w.clock.now:
            for router in list(w.routers.values()):
                if w.weather.healed_at(router.name, self.peer.worker_id, w.clock.now) <= w.clock.now:
                    router.registered(self)
        w.clock.at(_HEARTBEAT_S, self.heartbeat)

    def introduce(self, peer: PeerId) -> None:
        """As PeerLinks.introduce."""
        known = self.sources.get(peer)
        if known is not None:
            known.doubted = False
            return
        same = [p for p in self.sources if p.worker_id == peer.worker_id]
        if any(p.epoch > peer.epoch for p in same):
            return
        for older in same:
            self.sources[older].forget("the worker restarted")
        link = self.sources[peer] = SourceLink(self.world, self, peer)
        link.dial()

    def doubt(self, peer: PeerId) -> None:
        link = self.sources.get(peer)
        if link is not None:
            link.doubted = True
            if not link.attached:
                link.forget("the router says it is gone")

    def die(self) -> None:
        """kill -9: memory, streams and transfers go at once; the others see it a little later."""
        self.world.say(f"{self.peer.worker_id} dies")
        self.alive = False
        self.world.workers.pop(self.peer, None)
        if self.world.data.transports.get(self.peer) is self.transport:
            del self.world.data.transports[self.peer]
        for link in list(self.routers.values()):
            link.broke("the worker died")
        for stream in list(self.readers.values()):
            stream.broke("the source died")
        for stream in list(self.sources.values()):
            stream.broke("the reader died")

    def vanish(self, *, routers_see_it: bool) -> None:
        """The host is gone without a word: the others give it up after silence only (routers perhaps at once)."""
        self.world.say(f"{self.peer.worker_id} vanishes")
        links, streams = list(self.routers.values()), [*self.readers.values(), *self.sources.values()]
        self.alive = False
        self.world.workers.pop(self.peer, None)
        if self.world.data.transports.get(self.peer) is self.transport:
            del self.world.data.transports[self.peer]
        self.world.data.silent[self.peer] = self.world.clock.now + SILENCE_S
        for link in links:
            after = 0.0 if routers_see_it else KEEPALIVE_S
            self.world.clock.at(after, lambda k=link, n=link.number: k.broke("keepalive") if k.number == n else None)
        for stream in streams:
            self.world.clock.at(SILENCE_S, lambda s=stream: s.broke("silent"))

    def stall(self, seconds: float) -> None:
        """SIGSTOP. Who pings it gives up after a while; it finds its streams broken when it goes on."""
        clock = self.world.clock
        self.stalled_until = max(self.stalled_until, clock.now + seconds)
        until = self.stalled_until

        def give_up(after: float, act: Callable[[], None]) -> None:
            if seconds > after:
                clock.at(after, lambda: act() if self.alive and self.stalled_until == until else None)

        for link in self.routers.values():
            give_up(KEEPALIVE_S, lambda link=link: link.broke("keepalive"))
        for stream in (*self.readers.values(), *self.sources.values()):
            give_up(SILENCE_S, lambda stream=stream: stream.broke("silent"))

    def drain(self, then: Callable[[], None]) -> None:
        self.leaving = True
        self.post(Drain())
        self.world.say(f"{self.peer.worker_id} drains")
        self._leave_when_idle(self.world.clock.now + 20.0, then)

    def _leave_when_idle(self, deadline: float, then: Callable[[], None]) -> None:
        if not self.alive:
            return
        if (self.core.is_idle() and not self._inbox and not self._busy) or self.world.clock.now >= deadline:
            self.die()
            then()
        else:
            self.world.clock.at(0.05, lambda: self._leave_when_idle(deadline, then))


class SourceLink:
    """A reader's stream to one source; both ends of it."""

    def __init__(self, world: World, reader: SimWorker, source: PeerId) -> None:
        self.world, self.reader, self.source = world, reader, source
        self.attached = False
        self.doubted = False
        self.forgotten = False
        self._waiting: list[ReaderMessage] = []
        self._attempt = 0
        self._lost_at = world.clock.now
        self._up: Pipe | None = None
        self._down: Pipe | None = None

    def dial(self) -> None:
        w = self.world
        if self.forgotten or not self.reader.alive:
            return
        names = (self.reader.peer.worker_id, self.source.worker_id)
        target = w.workers.get(self.source)
        if (
            target is None
            or w.weather.healed_at(*names, w.clock.now) > w.clock.now
            or target.stalled_until > w.clock.now
        ):
            self._retry()
            return
        self._up = Pipe(w.clock, w.weather, w.rng, *names)
        self._down = Pipe(w.clock, w.weather, w.rng, *names)
        self._up.send(lambda: self._arrived(target))

    def _arrived(self, target: SimWorker) -> None:
        if not target.alive:
            return
        older = target.readers.get(self.reader.peer)
        target.readers[self.reader.peer] = self
        if older is not None and older is not self:
            older.broke("the reader opened another stream")
        target.transport.connect(self.reader.peer)
        assert self._down is not None
        self._down.send(lambda: self._greeted(target))

    def _greeted(self, target: SimWorker) -> None:
        if self.forgotten or not self.reader.alive:
            return
        self.attached, self._attempt = True, 0
        self.reader.transport.connect(self.source)
        self.reader.post(SourceAttached(self.source))
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self.to_source(message)

    def to_source(self, message: ReaderMessage) -> None:
        if not self.attached:
            self._waiting.append(message)
            return
        assert self._up is not None
        wire = reader_messages_to_wire((message,)).SerializeToString()
        self._send(
            self._up,
            lambda: self._source_hears(reader_messages_from_wire(handoff_pb2.AttachRequest.FromString(wire))),
        )

    def _source_hears(self, messages: tuple[ReaderMessage, ...]) -> None:
        target = self.world.workers.get(self.source)
        if target is not None and target.readers.get(self.reader.peer) is self:
            target.post(ReaderMessages(self.reader.peer, messages))

    def to_reader(self, message: SourceMessage) -> None:
        if self._down is not None:
            wire = source_messages_to_wire((message,)).SerializeToString()
            self._send(
                self._down,
                lambda: self.reader.post(
                    SourceMessages(self.source, source_messages_from_wire(handoff_pb2.AttachResponse.FromString(wire)))
                ),
            )

    def _send(self, pipe: Pipe, deliver: Callable[[], None]) -> None:
        pipe.send(deliver)
        if self.world.rng.random() < self.world.weather.duplicates:
            pipe.send(deliver)

    def broke(self, why: str) -> None:
        """Both ends hear of it, each in its own time. What was under way is lost."""
        w = self.world
        for pipe in (self._up, self._down):
            if pipe is not None:
                pipe.open = False
        self._up = self._down = None
        target = w.workers.get(self.source)
        if target is not None and target.readers.get(self.reader.peer) is self:
            del target.readers[self.reader.peer]
            peer = self.reader.peer
            w.clock.at(_SEEN_S * w.rng.random(), lambda: target.post(ReaderLost(peer)))
        if self.forgotten or not self.reader.alive:
            return
        if self.attached:
            self._lost_at = w.clock.now
        self.attached = False
        self._waiting.clear()
        w.clock.at(_SEEN_S * w.rng.random(), lambda: self._reader_sees(why))

    def _reader_sees(self, why: str) -> None:
        if self.forgotten or not self.reader.alive:
            return
        self.reader.post(SourceLost(self.source, why))
        if self.doubted or self.world.clock.now - self._lost_at > 30.0:
            self.forget(why)
        elif not self.attached:
            self._redial()

    def _retry(self) -> None:
        self._waiting.clear()
        self.reader.post(SourceLost(self.source, "cannot connect"))
        if self.doubted or self.world.clock.now - self._lost_at > 30.0:
            self.forget("cannot connect")
        else:
            self._redial()

    def _redial(self) -> None:
        delay = _BACKOFF_S[min(self._attempt, len(_BACKOFF_S) - 1)]
        self._attempt += 1
        self.world.clock.at(delay, self.dial)

    def forget(self, why: str) -> None:
        self.forgotten = True
        if self.reader.sources.get(self.source) is self:
            del self.reader.sources[self.source]
        for pipe in (self._up, self._down):
            if pipe is not None:
                pipe.open = False
        target = self.world.workers.get(self.source)
        if target is not None and target.readers.get(self.reader.peer) is self:
            del target.readers[self.reader.peer]
            target.post(ReaderLost(self.reader.peer))
        self.reader.post(SourceLost(self.source, why))
        self.reader.transport.disconnect(self.source)
        self.reader.post(SourceGone(self.source))


class RouterLink:
    """A router's stream to one worker; both ends of it."""

    numbers = itertools.count(1)

    def __init__(self, router: SimRouter, worker: SimWorker) -> None:
        self.router, self.worker = router, worker
        self.info = worker.info
        self.number = next(RouterLink.numbers)
        self.pending = worker_pb2.ConnectRequest()
        self.connected = False
        self.removed = False
        self._sending = False
        self._attempt = 0
        self._up: Pipe | None = None
        self._down: Pipe | None = None

    def dial(self) -> None:
        w, worker = self.router.world, self.worker
        if self.removed or not self.router.alive:
            return
        names = (self.router.name, worker.peer.worker_id)
        blocked = w.weather.healed_at(*names, w.clock.now) > w.clock.now or worker.stalled_until > w.clock.now
        if not worker.alive or blocked:
            self._lost("cannot connect")
            return
        self.number = next(RouterLink.numbers)
        self._up = Pipe(w.clock, w.weather, w.rng, *names)
        self._down = Pipe(w.clock, w.weather, w.rng, *names)
        number, down = self.number, self._down

        def arrived() -> None:
            worker.routers[number] = self
            worker.post(RouterConnected(number))
            down.send(self._greeted)

        self._up.send(arrived)

    def _greeted(self) -> None:
        if self.removed or not self.router.alive:
            return
        self.connected, self._attempt = True, 0
        cluster = self.router.dispatcher.cluster
        cluster.connected(self.info.key, self.router.world.clock.now)
        self.router.dispatcher.on_worker_back(self.info.key)
        if self.worker.leaving:
            cluster.draining(self.info.key)
        for other in self.router.links.values():
            if other is not self and other.connected and other.info.layout_fingerprint == self.info.layout_fingerprint:
                self.introduce(other.info, gone=False)
        self.router.introduce_to_readers(self.info, gone=False)

    def introduce(self, info: WorkerInfo, *, gone: bool) -> None:
        self.pending.introductions.add(
            worker_id=info.key.worker_id, epoch=info.key.epoch, address=info.address, gone=gone
        )
        self.wake()

    def wake(self) -> None:
        if not self._sending:
            self._sending = True
            self.router.world.clock.at(0.0002, self._write)

    def _write(self) -> None:
        self._sending = False
        message, self.pending = self.pending, worker_pb2.ConnectRequest()
        if not self.connected or self._up is None or not message.ByteSize():
            return
        number = self.number
        self._up.send(lambda: self._worker_hears(number, message))

    def _worker_hears(self, number: int, message: worker_pb2.ConnectRequest) -> None:
        worker = self.worker
        if worker.routers.get(number) is not self:
            return
        for i in message.introductions:
            peer = PeerId(i.worker_id, i.epoch)
            if i.gone:
                worker.doubt(peer)
            else:
                worker.introduce(peer)
        for start in (*message.starts, *message.follows):
            if start.HasField("pull"):
                worker.introduce(PeerId(start.pull.source_worker, start.pull.source_epoch))
        for start in message.starts:
            if start.HasField("prefix_pull"):
                worker.introduce(PeerId(start.prefix_pull.source_worker, start.prefix_pull.source_epoch))
        commands = commands_from_wire(message)
        if commands:
            worker.post(RouterCommands(number, commands))

    def to_router(self, message: worker_pb2.ConnectResponse) -> None:
        if self._down is not None:
            self._down.send(lambda: self._router_hears(message))

    def _router_hears(self, message: worker_pb2.ConnectResponse) -> None:
        router = self.router
        if router.alive and self.connected:
            hear(router.dispatcher, self.info.key, message, router.world.clock.now)
            router.dispatcher.flush()

    def broke(self, why: str) -> None:
        w, worker, number = self.router.world, self.worker, self.number
        for pipe in (self._up, self._down):
            if pipe is not None:
                pipe.open = False
        self._up = self._down = None
        if worker.routers.pop(number, None) is not None:
            w.clock.at(_SEEN_S * w.rng.random(), lambda: worker.post(RouterLost(number)))
        if self.router.alive and not self.removed:
            w.clock.at(_SEEN_S * w.rng.random(), lambda: self._lost(why))

    def _lost(self, why: str) -> None:
        """As WorkerLinks._keep after a stream ended."""
        router, key = self.router, self.info.key
        if self.removed or not router.alive or self._up is not None:
            return
        crashed = self.connected and why in ("the worker died", "reset") and not self.worker.leaving
        if self.connected:
            router.introduce_to_readers(self.info, gone=True)
        self.connected = False
        self.pending = worker_pb2.ConnectRequest()
        router.dispatcher.on_worker_lost(key, why, crashed=crashed)
        entry = router.dispatcher.cluster.workers.get(key)
        if entry is None or router.world.clock.now - entry.heard_at > 5.0:
            router.remove(key, "its heartbeats stopped")
            return
        delay = _BACKOFF_S[min(self._attempt, len(_BACKOFF_S) - 1)]
        self._attempt += 1
        router.world.clock.at(delay, self.dial)


@dataclass
class _Backend:
    """A tokenizer without text: requests bring token ids."""

    name: str = "sim"
    vocab_size: int = VOCABULARY
    context_limit_tokens: int = 4096
    longest_token_chars: int = 1
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)

    chat_template_text: str = ""

    def special_ids(self, markers: Sequence[str]) -> dict[str, int]:
        return {}

    def takes_long(self, chat: object) -> bool:
        return False

    def build_llguidance(self) -> None:
        raise AssertionError("no request here is structured")


class _NoText:
    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _SimDispatcher(Dispatcher):
    """Every third prompt is to pull a prefix from somebody, whether he has it or not: the estimates would rarely say so
    in a world this small.
    """

    _whims: random.Random | None = None

    def decide(self, facts: RequestFacts) -> Route | Rejection:
        route = super().decide(facts)
        rng = self._whims = self._whims or random.Random(1)  # draws of its own: those of the world stay as they are
        if isinstance(route, Rejection) or route.pull is not None or rng.random() > 0.35:
            return route
        view = self.cluster.view()
        holders = [w.key for w in (*view.decode, *view.prefill) if w.key != route.computing]
        if not holders:
            return route
        best = [key for key, _ in heapq.nlargest(2, facts.cached_tokens.items(), key=lambda i: i[1]) if key in holders]
        holder = rng.choice(best or sorted(holders))
        tokens = rng.randint(1, facts.prompt_tokens)
        return replace(route, pull=PrefixPull(holder, tokens, rng.choice((1.0, 50.0, 3000.0))))

    def _new_text(self, request):  # type: ignore[no-untyped-def]
        return _NoText()


class SimRouter:
    """Sender of its dispatcher, keeper of its links."""

    def __init__(self, world: World, name: str, config: RouterConfig) -> None:
        self.world, self.name = world, name
        self.alive = True
        self.links: dict[WorkerKey, RouterLink] = {}
        rng = random.Random(world.rng.getrandbits(64))
        clock = world.clock
        self.dispatcher = _SimDispatcher(
            config,
            _Backend(),
            self,
            rng,
            lambda: clock.now,
            lambda s, call: Timer(clock, s, self._if_alive(call)),  # type: ignore[arg-type]
        )
        world.routers[name] = self
        world.say(f"{name} starts")

    def _if_alive(self, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: call() if self.alive else None

    def registered(self, worker: SimWorker) -> None:
        """As WorkerLinks.registered."""
        cluster = self.dispatcher.cluster
        info = worker.info
        if cluster.later_than(info.key) is not None:
            return
        _, older = cluster.registered(info, self.world.clock.now, leaving=worker.leaving)
        if cluster.said_role(info.key, info.role, info.role_changes) or worker.leaving:
            self.dispatcher.moves.wanted()
        for entry in older:
            self.remove(entry.key, "a later incarnation registered")
        known = self.links.get(info.key)
        if known is not None and known.worker is not worker and not known.worker.alive:
            known.worker = worker  # only with the planted bug that reuses epochs
        if known is None:
            link = self.links[info.key] = RouterLink(self, worker)
            link.dial()

    def remove(self, key: WorkerKey, why: str) -> None:
        link = self.links.pop(key, None)
        self.dispatcher.on_worker_lost(key, why)
        self.dispatcher.cluster.forget(key)
        if link is not None:
            link.broke(why)
            link.removed = True
            self.introduce_to_readers(link.info, gone=True)

    def introduce_to_readers(self, info: WorkerInfo, *, gone: bool) -> None:
        for link in self.links.values():
            same = link.info.layout_fingerprint == info.layout_fingerprint
            if link.info.key != info.key and link.connected and same:
                link.introduce(info, gone=gone)

    # Sender.

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.starts.append(start_to_wire(start, deadline_s, "-", "-"))
            link.wake()

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.cancels.add(sequence_id=leg, reason=reason, keep_lease=keep_lease)
            link.wake()

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.continues.add(sequence_id=leg, emitted=pack_tokens(emitted))
            link.wake()

    def resync_blocks(self, worker: WorkerKey) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.resync_blocks = True
            link.wake()

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.follows.add(sequence_id=leg, emitted=pack_tokens(emitted), pull=handoff_to_wire(pull, "-"))
            link.wake()

    def serve(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.serves.add(sequence_id=leg, handoff_id=handoff_id, most_tokens=most_tokens)
            link.wake()

    def freeze(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.freezes.add(sequence_id=leg, handoff_id=handoff_id)
            link.wake()

    def keep(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.keeps.add(sequence_id=leg, handoff_id=handoff_id)
            link.wake()

    def set_role(self, worker: WorkerKey, role: Role) -> None:
        link = self.links.get(worker)
        if link is not None:
            link.pending.set_role = ROLES_TO_WIRE[role]
            link.wake()

    # Life.

    def die(self) -> None:
        self.world.say(f"{self.name} dies")
        self.alive = False
        if self.world.routers.get(self.name) is self:
            del self.world.routers[self.name]
        for link in list(self.links.values()):
            link.broke("the router died")

    def has_ready(self, role: Role) -> bool:
        return any(e.state is WorkerState.READY and e.role is role for e in self.dispatcher.cluster.workers.values())
