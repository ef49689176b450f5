"""A prefill and a decode worker in one thread and virtual time: real cores, scripted model, in-process transport."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_worker.core import ElasticCore
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.speculation import SpeculationLimits
from engine.types import FinishReason, SamplingParams
from kv_transfer.handoff import PeerId
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from kv_transfer.transport import TransportEvent
from kv_transfer.transport_inprocess import InProcessNetwork, InProcessTransport, block_digest
from tests.support.scripted import VOCABULARY, ScriptedRunner
from worker.core import WorkerCore
from worker.messages import (
    Command,
    Ended,
    HandoffAdopted,
    HandoffFailed,
    HandoffRef,
    LinkOutput,
    ReaderLost,
    ReaderMessages,
    RouterCommands,
    RouterConnected,
    ServeRunning,
    SourceLost,
    SourceMessages,
    StartSequence,
    Transported,
)

BLOCK = 4
LINK = 1
STEP_S = 0.01


class Host:
    """One worker: core, runner, and what its router heard."""

    def __init__(
        self,
        name: str,
        num_blocks: int,
        network: InProcessNetwork,
        max_batch_tokens: int,
        original: int,
        speculation: SpeculationLimits | None = None,
    ) -> None:
        self.peer = PeerId(name, 1)
        self.runner = ScriptedRunner(num_blocks, BLOCK, original)
        self.pool = BlockPool(num_blocks, self.runner.generations)
        limits = EngineLimits(BLOCK, max_batch_tokens, 8, 64, 200, VOCABULARY, original_context_tokens=original)
        self.engine = EngineCore(limits, self.pool, "test", speculation=speculation)
        self.events: list[TransportEvent] = []
        self.transport = InProcessTransport(self.peer, network, self.events.append)
        self.transport.register(self.runner.memory())
        self.heard = LinkOutput()
        self.core: WorkerCore

    def connect(self, other: Host) -> None:
        self.transport.connect(other.peer, other.transport.endpoint())

    # What the router heard, by sequence.

    def tokens(self, sequence_id: int) -> list[int]:
        """Token ids in order; asserts that positions are contiguous from the first heard."""
        h = self.heard
        rows = [(p, t) for s, p, t in zip(h.sequence_ids, h.positions, h.token_ids, strict=True) if s == sequence_id]
        assert [p for p, _ in rows] == list(range(rows[0][0], rows[0][0] + len(rows))) if rows else True
        return [t for _, t in rows]

    def end(self, sequence_id: int) -> Ended | None:
        ends = [e for e in self.heard.ends if e.sequence_id == sequence_id]
        assert len(ends) <= 1
        return ends[0] if ends else None


class Pair:
    def __init__(
        self,
        *,
        blocks_per_step: int = 1,
        num_blocks: int = 32,
        digest: bool = True,
        speculation: SpeculationLimits | None = None,
        **options: float,
    ) -> None:
        self.now = 0.0
        self.network = InProcessNetwork(blocks_per_step=blocks_per_step)
        original = int(options.pop("original", 0))
        self.p = Host("p", num_blocks, self.network, 8, original, speculation)
        self.d = Host("d", int(options.pop("decode_blocks", num_blocks)), self.network, 16, original, speculation)
        self.p.connect(self.d)
        self.d.connect(self.p)

        def source_of(host: Host) -> HandoffSource:
            memory = host.runner.memory()
            return HandoffSource(
                host.pool,
                lease_s=options.get("lease_s", 10.0),
                max_leases=64,
                max_leased_blocks=int(options.get("max_leased_blocks", num_blocks)),
                follow_wait_s=5.0,
                digest=(lambda block: block_digest(memory, block)) if digest else None,
                find=host.pool.match,
                block_tokens=BLOCK,
            )

        def reader_of(host: Host) -> HandoffReader:
            return HandoffReader(
                host.pool,
                host.transport.submit,
                host.transport.abandon,
                block_bytes=host.runner.block_bytes,
                pull_timeout_s=options.get("pull_timeout_s", 1.0),
                announce_timeout_s=5.0,
                renew_every_s=3.0,
                max_blocks_per_pull=2,
                max_quarantined_blocks=num_blocks,
            )

        self.source, self.reader = source_of(self.p), reader_of(self.d)
        room_wait_s = options.get("room_wait_s", 2.0)
        self.p.core = ElasticCore(
            self.p.engine, self.source, reader_of(self.p), report_every_s=0.1, room_wait_s=room_wait_s
        )
        self.d.core = ElasticCore(
            self.d.engine, source_of(self.d), self.reader, report_every_s=0.1, room_wait_s=room_wait_s
        )
        self.cut = False  # control messages between the two are lost
        for host in (self.p, self.d):
            host.core.handle(RouterConnected(LINK), 0.0)

    # The router's part.

    def to(self, host: Host, *commands: Command) -> None:
        host.core.handle(RouterCommands(LINK, commands), self.now)

    def split(
        self, sequence_id: int, prompt: Sequence[int], sampling: SamplingParams, *, deadline_s: float | None = None
    ) -> None:
        handoff = f"h{sequence_id}"
        start = StartSequence(sequence_id, f"r{sequence_id}", list(prompt), [], sampling, deadline_s=deadline_s)
        self.to(self.d, _with(start, pull=HandoffRef(handoff, self.p.peer, "")))
        self.to(self.p, _with(start, serve_handoff_id=handoff))

    def local(self, sequence_id: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self.to(self.d, StartSequence(sequence_id, f"r{sequence_id}", list(prompt), [], sampling))

    def migrate(self, sequence_id: int, *, spare: int = 64, heard: int | None = None) -> None:
        """What runs on d under this id goes on at p, under the id + 100. `heard`: how many of its tokens the router
        knows of; None: all.
        """
        hosted = self.d.core._by_link[LINK][sequence_id]
        handoff = f"m{sequence_id}"
        emitted = list(hosted.emitted)[:heard]
        known = len(hosted.start.prompt) + len(emitted)
        pull = HandoffRef(handoff, self.d.peer, "", known + spare)
        start = _with(hosted.start, sequence_id=sequence_id + 100, pull=pull, emitted=emitted, serve_handoff_id="")
        self.to(self.p, start)
        self.to(self.d, ServeRunning(sequence_id, handoff, known + spare))

    # Time.

    def turn(self) -> bool:
        """One turn of everything. False: nothing happened."""
        self.now += STEP_S
        busy = False
        for host in (self.p, self.d):
            busy |= self._turn_host(host)
        self.network.step(self.now)
        for host in (self.p, self.d):
            events, host.events[:] = list(host.events), []
            for event in events:
                host.core.handle(Transported(event), self.now)
                busy = True
            self._exchange(host)
        return busy or self.network.busy

    def _turn_host(self, host: Host) -> bool:
        host.core.tick(self.now)
        busy = self._exchange(host)
        plan = host.core.schedule(self.now)
        if plan is not None:
            host.core.commit(plan, host.runner.execute(plan), self.now, self.now + STEP_S)
            busy = True
        busy |= self._exchange(host)
        host.core.check()
        return busy

    def _exchange(self, host: Host) -> bool:
        outbox = host.core.take_outbox()
        if outbox is None:
            return False
        output = outbox.links.get(LINK)
        load_only = output is not None and not (output.token_ids or output.ends or output.adoptions)
        if output is not None:
            host.heard.merge(output)
        if not self.cut:
            other = self.d if host is self.p else self.p
            for _, message in outbox.to_readers:
                other.core.handle(SourceMessages(host.peer, (message,)), self.now)
            for _, message in outbox.to_sources:
                other.core.handle(ReaderMessages(host.peer, (message,)), self.now)
        return bool(outbox.to_readers or outbox.to_sources or (output is not None and not load_only))

    def run(self, until_s: float = 60.0) -> None:
        """Until nothing happens any more, or the time is over."""
        quiet = 0
        while self.now < until_s and quiet < 20:
            quiet = 0 if self.turn() else quiet + 1

    def lose_source(self) -> None:
        """The prefill worker dies: stream and memory are gone."""
        self.network.kill(self.p.peer)
        self.d.core.handle(SourceLost(self.p.peer, "the stream broke"), self.now)

    def lose_reader(self) -> None:
        self.network.kill(self.d.peer)
        self.p.core.handle(ReaderLost(self.d.peer), self.now)

    # Looks.

    def adopted(self) -> list[HandoffAdopted]:
        return self.d.heard.adoptions

    def failures(self) -> list[HandoffFailed]:
        return self.d.heard.handoff_failures

    def assert_nothing_left(self, *hosts: Host) -> None:
        for host in hosts or (self.p, self.d):
            host.core.check()
            assert host.core.is_idle(), f"{host.peer.worker_id} is not idle"
            assert host.pool.is_idle(), f"{host.peer.worker_id} holds blocks"


def _with(start: StartSequence, **changes: object) -> StartSequence:
    from dataclasses import replace

    return replace(start, **changes)  # type: ignore[arg-type]


FINISHED = (FinishReason.STOP, FinishReason.LENGTH)
