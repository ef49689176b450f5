"""The engine's accounting: sequences in, plans out, results in, events out. No torch, no clock.

add ──> waiting ──schedule──> running ──commit──> ended (blocks free; with `retain`: until drop)
  hold:  held ──reserve──> held with room ──adopt──> running
            ├──hold_again──> held, without room (another source)
            └──continue_locally──> waiting
cancel ends any of them at once.

One step may be planned while another computes: schedule, schedule, commit, schedule, commit, ... What the first finds
out (a stop token, a cancel) comes too late for the second, which then computes a token for nobody: its result is passed
over. The blocks that a step writes are pinned from its plan to its commit, so that whoever gets them next gets them
after the last byte: another sequence, a transfer that lands in them, a lease.

A step may verify drafts (engine/speculation.py). What it gives is known at its commit, and the next drafts follow from
that: so no step is planned while such a one is in flight, nor one that is likely to have drafts of its own.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from engine.adapters.slots import AdapterSlots
from engine.beam_search import Search
from engine.block_pool import BlockPool
from engine.chunk_budget import ChunkBudget
from engine.kv_groups import KvGroups, blocks_for
from engine.load import engine_load
from engine.scheduler import EngineLimits, Scheduler
from engine.sequence import Sequence, Status
from engine.speculation import Speculation, SpeculationLimits
from engine.step_cost import StepCostEstimate, shape_of
from engine.types import (
    BlockEvents,
    EngineLoad,
    FinishReason,
    PlanItem,
    Progress,
    Refusal,
    RefusalCode,
    Reservation,
    Sampled,
    SampledToken,
    SequenceEnded,
    SequenceSpec,
    StepEvents,
    StepPlan,
    StepResult,
)
from engine.unfit import unfit
from kv_transfer.block_hash import root_hash
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.layout import FULL, GONE, Rule


@dataclass(frozen=True, slots=True)
class _Flight:
    """A planned step until its commit. `rows` are aligned with the plan's items; lives as they were then."""

    plan: StepPlan
    planned_at: float
    rows: tuple[tuple[Sequence, int], ...]
    written: tuple[int, ...]  # pinned


class EngineCore:
    """`identity` names model and layout in block names: equal identity, exchangeable KV. `rules`: of the
    layout's groups, which `pool` has blocks for.
    """

    def __init__(
        self,
        limits: EngineLimits,
        pool: BlockPool,
        identity: str = "",
        step_cost: StepCostEstimate | None = None,
        rules: Iterable[Rule] = (FULL,),
        speculation: SpeculationLimits | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self.groups = KvGroups(tuple(rules), pool, limits.block_tokens, adapters)
        self.step_cost = step_cost or StepCostEstimate()
        self._flights: deque[_Flight] = deque()  # two at most
        self._committed_at = float("-inf")
        self._identity = identity
        original = limits.original_context_tokens
        self._outgrows_at = original + 1 if original else sys.maxsize
        self._chunk_budget = ChunkBudget(limits.itl_target_ms, self.step_cost)
        self.speculation: Speculation | None = None
        if speculation is not None and self.groups.state is None:  # a state cannot go back to before the drafts
            reach = limits.context_limit_tokens
            self.speculation = Speculation(speculation, self.step_cost, reach, limits.block_tokens)
        self._scheduler = Scheduler(limits, self.groups, self._chunk_budget, self.speculation)
        self.searches = self._scheduler.searches  # that wait for room
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = itertools.count()
        self._steps = itertools.count(1)
        self._held = 0
        self._tokens_total = 0

    # Coming.

    def add(self, spec: SequenceSpec, now: float) -> Refusal | None:
        """None: accepted. A refusal changes nothing and says why and what to do."""
        refusal = self._refuse(spec)
        if refusal is not None:
            return refusal
        if spec.matcher is not None and spec.emitted and not spec.matcher.advance(spec.emitted):
            return Refusal(
                RefusalCode.INVALID,
                f"what was emitted does not follow the grammar ({spec.matcher.error}); send it without `structured`",
            )
        outgrows_at = self._outgrows_at
        long = len(spec.prompt) + len(spec.emitted) >= outgrows_at
        sequence = Sequence(
            spec=spec,
            arrival=next(self._arrivals),
            parent=self._root(spec, long=long),
            outgrows_at=sys.maxsize if long else outgrows_at,
            long=long,
            status=Status.HELD,
            tokens=[*spec.prompt, *spec.emitted],
            num_prompt=len(spec.prompt),
            hand_over=spec.hand_over,
            retain=spec.retain,
            tables=[[] for _ in self.groups.rules],
            due_at=now + (spec.due_s or 0.0),
        )
        if spec.beams is not None:
            search = sequence.search = Search(spec, self.limits, self.groups)
            sequence.spec = replace(spec, sampling=search.sampling)
        self._sequences[spec.sequence_id] = sequence
        if spec.hold:
            self._held += 1
        else:
            self._scheduler.enqueue(sequence)
        return None

    def _refuse(self, spec: SequenceSpec) -> Refusal | None:
        limits = self.limits
        if spec.sequence_id in self._sequences:
            return Refusal(RefusalCode.INVALID, f"sequence {spec.sequence_id} exists already; use a new id")
        refusal = unfit(spec, limits, self.groups)
        if refusal is not None:
            return refusal
        waiting = len(self._scheduler.waiting) + self._held
        if waiting >= limits.max_waiting_sequences:
            why = f"{waiting} sequences wait already; retry later, or raise max_waiting_sequences"
            return Refusal(RefusalCode.BUSY, why)
        return None

    def block_names(self, sequence_id: int, num_tokens: int) -> list[bytes]:
        """Of the full blocks in a sequence's first `num_tokens` tokens."""
        return self._sequences[sequence_id].name_blocks(num_tokens, self.limits.block_tokens)

    # Received KV.

    def reserve(self, sequence_id: int, num_tokens: int, now: float, least: int | None = None) -> Reservation | None:
        """Blocks for a held sequence's first `num_tokens` tokens; what the prefix cache has comes first. With `least`
        not all of them need to come: at least so many.

        None: no room now, nothing changed. Unlike a computed prompt, a received one may be cached whole.
        """
        sequence = self._held_sequence(sequence_id)
        assert not any(sequence.tables), "reserved already"
        known = sequence.name_blocks(min(num_tokens, len(sequence.tokens)), self.limits.block_tokens)
        rooms = self.groups.reserve(sequence, known, num_tokens, least)
        if rooms is None:
            return None
        # A source where it runs may have had tokens, and so a long sequence, of which nobody heard here.
        sequence.table_known = least is None or sequence.outgrows_at == sys.maxsize
        sequence.num_published = self.groups.there_already(rooms)
        sequence.cached_tokens = min(sequence.num_published * self.limits.block_tokens, sequence.num_prompt)
        return Reservation(rooms)

    def adopt(self, sequence_id: int, num_computed_tokens: int, emitted: Iterable[int], now: float) -> StepEvents:
        """The KV of the first `num_computed_tokens` tokens stands in the reserved blocks; `emitted` follow.

        The sequence runs from here. If an adopted token ends the answer, the events say so. A beam search takes no
        token from elsewhere: it finds the prompt in the cache, and computes what is in its last block.
        """
        sequence = self._held_sequence(sequence_id)
        if sequence.leads:
            self.continue_locally(sequence_id, num_computed_tokens, (), now)
            return StepEvents()
        assert blocks_for(num_computed_tokens, self.limits.block_tokens) <= len(sequence.block_ids)
        sequence.has_state = self.groups.state is not None
        self._take(sequence, emitted)
        assert num_computed_tokens < len(sequence.tokens), "a sequence needs a token to go on with"
        sequence.num_computed = sequence.computed_from = num_computed_tokens
        self._held -= 1
        if not sequence.outgrown:
            self._publish(sequence)
        self.groups.trim(sequence, num_computed_tokens)
        events = StepEvents()
        self._scheduler.enroll(sequence)
        if self._end_if_done(sequence, events) or self._end_without_adapter(sequence, events):
            return events
        if sequence.outgrown:
            self._begin_again_long(sequence)
        elif sequence.retain:
            events.progress.append(self._progress(sequence))
        return events

    def continue_locally(self, sequence_id: int, keep_tokens: int, emitted: Iterable[int], now: float) -> None:
        """Give up receiving: what stands (whole blocks of the first `keep_tokens`) is kept, the rest computed."""
        self.hold_again(sequence_id, keep_tokens, emitted, now)
        self._held -= 1
        self._scheduler.enqueue(self._sequences[sequence_id])

    def hold_again(self, sequence_id: int, keep_tokens: int, emitted: Iterable[int], now: float) -> None:
        """Start receiving anew, from another source: the reservation is given back.

        What stands becomes ordinary cached blocks and is found again by the next reservation, or when the sequence is
        scheduled. (Of a layout with several groups nothing is kept: no group is of use without the others.)
        """
        sequence = self._held_sequence(sequence_id)
        room = len(sequence.block_ids) * self.limits.block_tokens
        sequence.num_computed = min(keep_tokens, room, len(sequence.tokens))
        if len(self.groups.rules) == 1 and sequence.table_known:
            self._publish(sequence)
        self.groups.release(sequence)
        sequence.num_computed = 0
        sequence.num_published = 0
        self._take(sequence, emitted)
        if sequence.outgrown:
            sequence.turn_long(self._root(sequence.spec, long=True))

    def _take(self, sequence: Sequence, emitted: Iterable[int]) -> None:
        """Tokens that were sampled elsewhere. If they break its grammar, the next step finds it in error."""
        news = list(emitted)
        sequence.tokens += news
        if sequence.spec.matcher is not None and news:
            sequence.spec.matcher.advance(news)

    def _held_sequence(self, sequence_id: int) -> Sequence:
        sequence = self._sequences[sequence_id]
        assert sequence.status is Status.HELD, f"sequence {sequence_id} is {sequence.status.name}, not held"
        return sequence

    # Steps.

    def schedule(self, now: float) -> StepPlan | None:
        """None: nothing to do, or, while a step is in flight, nothing that can be planned without its result.

        Never a third step: commit the first before.
        """
        assert len(self._flights) < 2, "two steps are in flight"
        if self._flights and self.groups.state is not None:
            return None  # the next step begins with what this one leaves
        if self._flights and self._waits_for(self._flights[0]):
            return None
        rows = self._scheduler.schedule(now, ahead=bool(self._flights))
        if not rows:
            return None
        plan = StepPlan(next(self._steps), tuple(item for _, item in rows))
        written = self._written(plan)
        self.pool.pin(written)
        self._flights.append(_Flight(plan, now, tuple((sequence, sequence.lives) for sequence, _ in rows), written))
        return plan

    def _waits_for(self, flight: _Flight) -> bool:
        """The next step cannot be planned before this one's tokens are known, or had better not be."""
        if any(self._counts(*row) and row[0].needs_its_token for row in flight.rows):
            return True
        coming = (row[0] for row in flight.rows if self._counts(*row) and row[0].coming)
        return self.speculation is not None and self.speculation.waits(flight.plan, coming)

    def _written(self, plan: StepPlan) -> tuple[int, ...]:
        blocks: list[int] = []
        for item in plan.items:
            tables = (item.block_ids, *item.others)
            blocks += self.groups.written(tables, item.start, len(item.token_ids), item.state)
        return tuple(blocks)

    def _counts(self, sequence: Sequence, lives: int) -> bool:
        """Whether a step's result is still for this sequence: it has not ended, nor lost its blocks meanwhile."""
        return (
            sequence.lives == lives
            and sequence.status is Status.RUNNING
            and (sequence.is_beam or self._sequences.get(sequence.sequence_id) is sequence)
        )

    def wanted(self, plan: StepPlan) -> list[bool]:
        """Which items of the oldest plan in flight are still for a sequence that lives."""
        flight = self._flights[0]
        assert flight.plan is plan, f"step {plan.step} is not the oldest in flight"
        return [self._counts(*row) for row in flight.rows]

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> StepEvents:
        """Account for an executed plan, the oldest in flight. Sequences that have ended meanwhile are passed over."""
        flight = self._flights.popleft()
        assert flight.plan is plan, f"step {plan.step} is committed before step {flight.plan.step}"
        # From the step before on, where plans overlap: what one step adds is what the next decode waits for.
        began = max(flight.planned_at, self._committed_at)
        self._committed_at = now
        if not result.failures and not result.prompt_logprobs:  # it was repeated; it computed other rows besides
            drafting_ms = self.speculation.drafted(result) if self.speculation is not None else 0.0
            self.step_cost.observe(shape_of(plan.items), (now - began) * 1e3 - drafting_ms)
        self.pool.unpin(flight.written)
        events, failures = StepEvents(), result.failures
        for place, found in result.prompt_logprobs.items():
            if self._counts(*flight.rows[place]) and place not in failures:
                events.prompt_logprobs.append((flight.rows[place][0].sequence_id, found))
        for place, (row, item, token_id, logprobs) in enumerate(
            zip(flight.rows, plan.items, result.token_ids, result.logprobs, strict=True)
        ):
            if not self._counts(*row):
                self.groups.passed_over(item.state)
                continue
            sequence, count = row[0], len(item.token_ids)
            sequence.landed(item.start + count - len(item.drafts), count, sampled=item.sample)
            if item.state is not None:
                self._state_landed(sequence, item, trusted=place not in failures)
            if failures and place in failures:  # its KV is not to be trusted: no prefix for others
                self._end(sequence, None, events, failures[place].cause, ours=failures[place].ours)
                continue
            if item.sample and sequence.search is not None:
                self._searched(sequence, logprobs, events)
                continue
            if result.passes and self.speculation is not None:
                self.speculation.landed(sequence, item)
            why = ""
            if item.sample and item.sampling.max_tokens:
                assert token_id is not None
                why = self._sampled(sequence, item.position, token_id, logprobs, events)
            if item.drafts and not why:
                why = self._verified(sequence, item, result.further.get(place, ()), events)
            self._publish(sequence)
            self.groups.leave_behind(sequence)
            if sequence.retain:
                events.progress.append(self._progress(sequence))
            if why:
                matcher = sequence.spec.matcher
                self._end(sequence, None, events, why, ours=matcher is not None and matcher.broken)
            elif item.sample and not self._end_if_done(sequence, events) and sequence.outgrown:
                self._begin_again_long(sequence)
        lost = [(plan.items[place].adapter, failed.cause) for place, failed in failures.items() if failed.adapter_lost]
        if lost and self.groups.adapters is not None:  # each step with one of these would fail, for everybody in it
            self.groups.adapters.lose(lost)
            for sequence in [s for s in self._sequences.values() if s.status in (Status.WAITING, Status.RUNNING)]:
                self._end_without_adapter(sequence, events)
        return events

    def _end_without_adapter(self, sequence: Sequence, events: StepEvents) -> bool:
        adapters = self.groups.adapters
        why = "" if adapters is None else adapters.lost.get(sequence.spec.adapter, "")
        if why:
            self._end(sequence, None, events, why, ours=True)
        return bool(why)

    def _sampled(
        self, sequence: Sequence, position: int, token_id: int, logprobs: TokenLogprobs | None, events: StepEvents
    ) -> str:
        """The sequence takes its next token. Returns why it cannot."""
        matcher = sequence.spec.matcher
        if matcher is not None and not matcher.advance((token_id,)):
            return f"the grammar of `structured` cannot go on ({matcher.error}); ask for what tokens can write"
        sequence.tokens.append(token_id)
        sequence.sampled_here += 1
        self._tokens_total += 1
        events.tokens.append(SampledToken(sequence.sequence_id, position, token_id, logprobs))
        return ""

    def _searched(self, sequence: Sequence, logprobs: TokenLogprobs | None, events: StepEvents) -> None:
        """A row of a beam search. It may be its last."""
        search = sequence.search
        assert search is not None
        assert logprobs is not None
        if sequence.leads:
            self._publish(sequence)
        sequence.sampled_here += 1
        self._tokens_total += 1
        if self._scheduler.step_search(search, sequence, logprobs):
            answers = search.answers()
            events.beams.append((search.leader, answers))
            reason = FinishReason.STOP if answers[0].stopped else FinishReason.LENGTH
            self._end(sequence, reason, events)

    def _verified(self, sequence: Sequence, item: PlanItem, further: Items[Sampled], events: StepEvents) -> str:
        """The tokens after the first, as if they came one by one: what ends the sequence leaves the rest unsaid. KV
        stands for each draft that a token confirmed; of the others no trace is left.
        """
        assert self.speculation is not None
        taken, why = 0, ""
        for token_id, logprobs in further:
            if sequence.hand_over or sequence.finish_reason(self.limits.context_limit_tokens) is not None:
                break
            sequence.num_computed += 1
            taken += 1
            why = self._sampled(sequence, item.position + taken, token_id, logprobs, events)
            if why:
                break
        self.speculation.settle(sequence, len(item.drafts), len(further), taken)
        self.groups.shorten(sequence, len(sequence.tokens))
        return why

    def _begin_again_long(self, sequence: Sequence) -> None:
        sequence.turn_long(self._root(sequence.spec, long=True))
        self._scheduler.begin_again(sequence)

    def _root(self, spec: SequenceSpec, *, long: bool) -> bytes:
        identity, size = f"{self._identity}|mixed" if spec.mixed_kv else self._identity, self.limits.block_tokens
        return root_hash(identity, size, spec.cache_salt, long=long, adapter=spec.adapter)

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.num_computed // self.limits.block_tokens
        if full <= sequence.num_published:
            return
        block_tokens = self.limits.block_tokens
        names = sequence.name_blocks(full * block_tokens, block_tokens)
        hints = sequence.hint_blocks(full * block_tokens, block_tokens)
        self.groups.publish(sequence, names, hints)

    def _state_landed(self, sequence: Sequence, item: PlanItem, *, trusted: bool) -> None:
        """`trusted`: the step gave a result, so that its snapshot may serve others."""
        use, size = item.state, self.limits.block_tokens
        assert use is not None
        end = item.start + use.snapshot_after
        names = sequence.name_blocks(end, size) if use.snapshot_after and trusted else ()
        self.groups.landed(sequence, use, names)

    def _progress(self, sequence: Sequence) -> Progress:
        tables = self.groups.tables(sequence)
        return Progress(sequence.sequence_id, sequence.num_computed, tables, sequence.cached_tokens)

    def _end_if_done(self, sequence: Sequence, events: StepEvents) -> bool:
        reason = sequence.finish_reason(self.limits.context_limit_tokens)
        if reason is None and not (sequence.hand_over and sequence.sampled_here and not sequence.in_flight):
            return False
        self._end(sequence, reason, events)
        return True

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason | None,
        events: StepEvents,
        error: str = "",
        *,
        ours: bool = False,
    ) -> None:
        if sequence.search is not None:
            sequence = self._sequences[sequence.search.leader]
        events.ends.append(SequenceEnded(sequence.sequence_id, reason, sequence.cached_tokens, error, ours))
        self._scheduler.remove(sequence)
        if sequence.retain:
            sequence.status = Status.FINISHED
            self.groups.give_slot_back(sequence)
        else:
            self._free(sequence)

    def end_if_complete(self, sequence_id: int) -> StepEvents:
        """For a sequence that came with emitted tokens: its grammar may say that they are the whole answer already."""
        events = StepEvents()
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and sequence.status in (Status.WAITING, Status.RUNNING):
            matcher = sequence.spec.matcher
            if matcher is not None and sequence.num_emitted and matcher.complete:
                self._end(sequence, FinishReason.STOP, events)
        return events

    # Handing over what runs.

    def serve(self, sequence_id: int) -> Progress | None:
        """Others read the sequence's blocks from now on while it goes on: commits tell its progress, and its end leaves
        the blocks until `drop`. None: it has none to read, because it ended, waits or is being received.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.status is not Status.RUNNING:
            return None
        sequence.retain = True
        return self._progress(sequence)

    def stands_up_to(self, sequence_id: int) -> int:
        """With more tokens than these a sequence is computed again: what was read of it is of no use then."""
        return self._sequences[sequence_id].outgrows_at - 1

    def freeze(self, sequence_id: int) -> StepEvents:
        """A sequence that is served ends at the next token, handed over, with nothing in flight that could still write
        its blocks. At once where it stands between two steps.
        """
        events = StepEvents()
        sequence = self._sequences[sequence_id]
        assert sequence.retain, "nobody reads it"
        if sequence.status not in (Status.RUNNING, Status.WAITING):
            return events
        sequence.hand_over = True
        sequence.look_ahead(self.limits.context_limit_tokens)
        if sequence.in_flight:
            return events
        if sequence.status is Status.RUNNING and sequence.uncomputed == 1 and sequence.num_emitted:
            events.progress.append(self._progress(sequence))
            self._end(sequence, None, events)
        return events

    def frozen(self, sequence_id: int) -> bool:
        return self._sequences[sequence_id].hand_over

    def keep(self, sequence_id: int) -> None:
        """Nobody reads it any more: it goes on here, or, if it has ended, is gone."""
        sequence = self._sequences[sequence_id]
        sequence.hand_over = sequence.retain = False
        sequence.look_ahead(self.limits.context_limit_tokens)
        if sequence.status is Status.FINISHED:
            self._free(sequence)

    # Going.

    def cancel(self, sequence_id: int) -> bool:
        """End a sequence in any state. False: unknown. Its blocks are free (or others') when this returns; those that a
        step in flight writes, at its commit.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        if sequence.status is Status.HELD:
            self._held -= 1
        elif sequence.status is not Status.FINISHED:
            self._scheduler.remove(sequence)
        self._free(sequence)
        return True

    def drop(self, sequence_id: int) -> None:
        """A retained sequence has ended and nobody needs its blocks through it any more."""
        sequence = self._sequences[sequence_id]
        assert sequence.status is Status.FINISHED
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._scheduler.end_search(sequence)
        self.groups.release(sequence)
        del self._sequences[sequence.sequence_id]

    # Looks.

    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting or self._flights)

    def not_started(self) -> list[int]:
        """Sequences that wait and have not been scheduled yet, in order."""
        return [s.sequence_id for s in self._scheduler.waiting if s.sampled_here == 0]

    def block_table(self, sequence_id: int) -> tuple[int, ...]:
        return tuple(self._sequences[sequence_id].block_ids)

    def take_block_events(self) -> BlockEvents:
        return self.pool.take_events()

    def load(self) -> EngineLoad:
        scheduler, sequences, held = self._scheduler, self._sequences.values(), self._held
        limits, budget, cost = self.limits, self._chunk_budget, self.step_cost
        return engine_load(scheduler, self.groups, sequences, limits, budget, cost, held, self._tokens_total)

    def is_idle(self) -> bool:
        """No sequence in any state, no step in flight. The pool may still serve leases."""
        return not self._sequences and not self._flights

    def check(self) -> None:
        """Assert that queues, sequences and pool agree."""
        self.pool.check()
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        others = [s for s in self._sequences.values() if s.status in (Status.HELD, Status.FINISHED)]
        beams = [s for s in queued if s.is_beam]
        assert len(queued) - len(beams) + len(others) == len(self._sequences)
        assert self._held == sum(s.status is Status.HELD for s in others)
        held: dict[int, int] = {}
        writers: dict[int, Sequence] = {}
        for flight in self._flights:
            for block in flight.written:
                held[block] = held.get(block, 0) + 1
            for (sequence, _), item in zip(flight.rows, flight.plan.items, strict=True):
                writers |= dict.fromkeys(self._written(StepPlan(0, (item,))), sequence)
        for sequence in (*self._sequences.values(), *beams):
            own = [block for table in sequence.tables for block in table if block != GONE]
            own += [sequence.snapshot] if sequence.snapshot != GONE else []
            own += sequence.search.held() if sequence.search is not None and sequence.leads else []
            assert (sequence.status is Status.WAITING) <= (not own)
            assert len(set(own)) == len(own)
            for block in own:
                held[block] = held.get(block, 0) + 1
                assert writers.get(block, sequence) is sequence, f"block {block} is written by a step in flight"
            in_flight = [
                (item, len(item.token_ids))
                for flight in self._flights
                for row, item in zip(flight.rows, flight.plan.items, strict=True)
                if row[0] is sequence and self._counts(*row)
            ]
            assert sequence.in_flight == sum(count for _, count in in_flight)
            assert sequence.coming == sum(item.sample for item, _ in in_flight)
        for block, count in held.items():
            assert self.pool.references(block) >= count
