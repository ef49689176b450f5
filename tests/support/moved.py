"""Two workers' cores over real runners, in one thread, and the router's part of moving answers to and fro."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.gpu_check.models import make_core
from elastic_worker.core import ElasticCore
from engine.block_pool import BlockPool
from engine.overlap import InThread
from engine.types import FinishReason
from kv_transfer.handoff import PeerId
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from kv_transfer.transport_inprocess import InProcessNetwork, InProcessTransport, block_digest
from worker.messages import (
    Freeze,
    HandoffRef,
    LinkOutput,
    ReaderMessages,
    RouterCommands,
    RouterConnected,
    ServeRunning,
    SourceMessages,
    StartSequence,
    Transported,
)

_LINK = 1
_STEP_S = 0.01
_LONGEST_S = 600.0


class _Side:
    def __init__(self, name: str, runner: Any, network: InProcessNetwork, overlap: bool, grammars: Any) -> None:
        self.peer, self.runner = PeerId(name, 1), runner
        memory, self.events = runner.memory(), []
        self.pool = BlockPool(runner.num_blocks, runner.generations)
        self.transport = InProcessTransport(self.peer, network, self.events.append)
        self.transport.register(memory)
        self._launcher = InThread(runner) if overlap else runner
        self._deep = 1 if overlap else 0
        self._flying: list[Any] = []
        source = HandoffSource(
            self.pool,
            lease_s=_LONGEST_S,
            max_leases=16,
            max_leased_blocks=memory.num_blocks,
            follow_wait_s=5.0,
            digest=lambda block: block_digest(memory, block),
        )
        reader = HandoffReader(
            self.pool,
            self.transport.submit,
            self.transport.abandon,
            block_bytes=runner.block_bytes_by_group,
            pull_timeout_s=_LONGEST_S,
            announce_timeout_s=_LONGEST_S,
            renew_every_s=1.0,
            max_blocks_per_pull=[2] * len(memory.areas),
            max_quarantined_blocks=memory.num_blocks,
            numbers=itertools.count(1),
        )
        engine = make_core(runner, 64, self.pool)
        self.core = ElasticCore(engine, source, reader, report_every_s=1.0, room_wait_s=_LONGEST_S)
        self.core.grammars = grammars
        self.core.handle(RouterConnected(_LINK), 0.0)

    def step(self, now: float) -> Any:
        core = self.core
        core.tick(now)
        plan = core.schedule(now)
        if plan is not None:
            self._flying.append((plan, self._launcher.launch(plan)))
        if self._flying and (plan is None or len(self._flying) > self._deep):
            oldest, launched = self._flying.pop(0)
            core.commit(oldest, launched.wait(), now, now)
        core.check()
        return core.take_outbox()


@dataclass(slots=True)
class Answer:
    """What a client sees. `moves`: to be made when so many tokens are there; `moved`: those that arrived."""

    start: StartSequence
    moves: list[int]
    leg: int
    side: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: dict[int, Any] = field(default_factory=dict)
    end: FinishReason | None = None
    going: int = 0  # leg at the target, while it moves
    handed_over: bool = False
    moved: int = 0


class Two:
    """`answers` runs requests on the first worker; those with moves go to and fro."""

    def __init__(self, runners: tuple[Any, Any], *, overlap: bool = False, grammars: Any = None) -> None:
        network = self._network = InProcessNetwork(blocks_per_step=2)
        self.sides = [_Side(n, r, network, overlap, grammars) for n, r in zip("ab", runners, strict=True)]
        a, b = self.sides
        a.transport.connect(b.peer, b.transport.endpoint())
        b.transport.connect(a.peer, a.transport.endpoint())
        self._legs = itertools.count(1)
        self._by_leg: dict[int, Answer] = {}
        self._now = 0.0

    def answers(self, starts: Mapping[str, StartSequence], moves: Mapping[str, list[int]]) -> dict[str, Answer]:
        answers = {}
        for name, start in starts.items():
            leg = next(self._legs)
            answers[name] = self._by_leg[leg] = Answer(start, list(moves.get(name, ())), leg)
            self._to(0, replace(start, sequence_id=leg))
        while any(one.end is None for one in answers.values()):
            self._turn()
        self.assert_nothing_left()
        return answers

    def assert_nothing_left(self) -> None:
        for _ in range(10):
            self._turn()
        for side in self.sides:
            side.core.check()
            assert side.core.is_idle()
            assert side.pool.is_idle()

    def _to(self, side: int, *commands: Any) -> None:
        self.sides[side].core.handle(RouterCommands(_LINK, commands), self._now)

    def _turn(self) -> None:
        self._now += _STEP_S
        assert self._now < _LONGEST_S, "no end"
        for n, side in enumerate(self.sides):
            other = self.sides[1 - n]
            outbox = side.step(self._now)
            if outbox is None:
                continue
            for _, message in outbox.to_readers:
                other.core.handle(SourceMessages(side.peer, (message,)), self._now)
            for _, message in outbox.to_sources:
                other.core.handle(ReaderMessages(side.peer, (message,)), self._now)
            if _LINK in outbox.links:
                self._hear(n, outbox.links[_LINK])
        self._network.step(self._now)
        for side in self.sides:
            events, side.events[:] = list(side.events), []
            for event in events:
                side.core.handle(Transported(event), self._now)

    def _hear(self, side: int, said: LinkOutput) -> None:
        assert not said.handoff_failures, said.handoff_failures
        for adopted in said.adoptions:
            one = self._by_leg[adopted.sequence_id]
            one.side, one.leg, one.going, one.moved = side, adopted.sequence_id, 0, one.moved + 1
        logprobs = {(leg, position): value for leg, position, value in said.logprobs}
        for leg, position, token in zip(said.sequence_ids, said.positions, said.token_ids, strict=True):
            one = self._by_leg[leg]
            if position < len(one.tokens):
                assert one.tokens[position] == token, "two words on one position"
                continue
            assert position == len(one.tokens), "a gap"
            one.tokens.append(token)
            if (leg, position) in logprobs:
                one.logprobs[position] = logprobs[leg, position]
        for end in said.ends:
            one = self._by_leg[end.sequence_id]
            assert not end.error, end.error
            if end.reason is not None:
                one.end = end.reason
        for caught_up in said.caught_up:
            one = self._by_leg[caught_up.sequence_id]
            self._to(one.side, Freeze(one.leg, caught_up.handoff_id))
        for one in list(self._by_leg.values()):
            if one.moves and one.end is None and not one.going and len(one.tokens) >= one.moves[0]:
                self._move(one)

    def _move(self, one: Answer) -> None:
        one.moves.pop(0)
        one.going = leg = next(self._legs)
        self._by_leg[leg] = one
        handoff, source = f"m{leg}", self.sides[one.side].peer
        most = len(one.start.prompt) + len(one.tokens) + 48
        pull = HandoffRef(handoff, source, "", most)
        self._to(1 - one.side, replace(one.start, sequence_id=leg, pull=pull, emitted=list(one.tokens)))
        self._to(one.side, ServeRunning(one.leg, handoff, most))
