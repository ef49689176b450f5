"""A worker's decisions, without threads, sockets or clocks. Subclassed by the two roles.

Life of a sequence here:
    1. start      the router's StartSequence; refused by value, with a code, if it can never run or the queue is full
    2. steps      the engine plans, the runner computes, `commit` turns events into the link's output
    3. end        by the engine (stop, length, handed over), by CancelSequence, by its deadline, or with its link
Whatever the end, `_forget` runs once and the engine's blocks are free (or under a lease, in a prefill worker).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.adapters.slots import AdapterSlots
from engine.core import EngineCore
from engine.speculation import SpeculationCounts
from engine.types import (
    RefusalCode,
    SequenceEnded,
    SequenceSpec,
    StepEvents,
    StepPlan,
    StepResult,
)
from grammar.structured import Structured
from worker.compiling import Compiling, Grammars
from worker.counts import WorkerCounts
from worker.hosted import HostedSequence
from worker.messages import (
    BlockChanges,
    CancelSequence,
    Code,
    Command,
    ContinueLocally,
    Drain,
    Ended,
    FollowAnother,
    Freeze,
    GrammarCompiled,
    Inbound,
    KeepRunning,
    Link,
    LinkOutput,
    Load,
    Outbox,
    ReaderLost,
    ReaderMessages,
    ResyncBlocks,
    RoleSaid,
    RouterCommands,
    RouterConnected,
    RouterLost,
    ServeRunning,
    SetRole,
    SourceAttached,
    SourceGone,
    SourceLost,
    SourceMessages,
    StartSequence,
    Transported,
)
from worker.rates import StepRates
from worker.repeat import is_fatal, told
from worker.timeline import SequenceTrace, Timeline

log = logging.getLogger(__name__)

_REFUSALS = {
    RefusalCode.INVALID: Code.INVALID_ARGUMENT,
    RefusalCode.LACKING: Code.UNAVAILABLE,
    RefusalCode.BUSY: Code.RESOURCE_EXHAUSTED,
}
_DRAINING = "the worker is draining; place the request elsewhere"


class WorkerCore:
    def __init__(self, engine: EngineCore, *, report_every_s: float, deadline_grace_s: float = 1.0) -> None:
        self.engine = engine
        self.grammars: Grammars | None = None  # set by who assembles the worker
        self._compiling = Compiling()
        self.rates = StepRates()
        self.counts = WorkerCounts()
        self.draining = False
        self.role: RoleSaid | None = None  # what routers send it; set by who assembles the worker
        self.adapter_load_ms: Callable[[], float] = lambda: 0.0  # set by who assembles the worker
        self._deadline_grace_s = deadline_grace_s
        self._report_every_s = report_every_s
        self._next_report = 0.0
        self.last_load = Load()  # as of the last report; for looks from other threads
        self._last_said: tuple[Load, dict[Link, int]] | None = None
        self._prompt_tokens_total = 0
        self._cached_tokens_total = 0
        self._newest: dict[Link, int] = {}  # the newest sequence of each router
        self._numbers = itertools.count(1)
        self._hosted: dict[int, HostedSequence] = {}  # by engine id
        self._young: dict[int, HostedSequence] = {}  # those of them without a token sampled here
        self._by_link: dict[Link, dict[int, HostedSequence]] = {}  # link -> the router's sequence id
        self._outbox = Outbox()
        self._block_sequence_number = 1 << 32  # room below it for snapshots, which end where the shared numbers go on

    # Inbound.

    def handle(self, message: Inbound, now: float) -> None:
        match message:
            case RouterCommands(link, commands, received):
                for command in commands:
                    self._command_or_end(link, command, now, received)
            case RouterConnected(link):
                self._by_link[link] = {}
                self._newest[link] = 0
                self._out(link).role = self.role
                self._publish_snapshot(link)
                self._next_report = now
                self._last_said = None
            case RouterLost(link):
                for hosted in list(self._by_link.get(link, {}).values()):
                    self._end_by_us(hosted, "the router's stream ended", now)
                self._by_link.pop(link, None)
                self._newest.pop(link, None)
                self._compiling.drop_link(link)
                self._link_lost(link, now)
                self._outbox.links.pop(link, None)
            case GrammarCompiled():
                self._compiled(message, now)
            case Drain():
                self._drain(now)
            case _:
                self._peer_message(message, now)

    def _peer_message(
        self,
        message: ReaderMessages | ReaderLost | SourceMessages | SourceAttached | SourceGone | SourceLost | Transported,
        now: float,
    ) -> None:
        """Handoff traffic; the roles override what they take part in."""

    def _cancelled_late(self, link: Link, command: CancelSequence, now: float) -> None:
        """The sequence has ended already; the roles end what it left."""

    def _link_lost(self, link: Link, now: float) -> None:
        """Likewise, for all sequences of a router."""

    def _drain(self, now: float) -> None:
        """No new work; what has not begun is handed back, so that it begins elsewhere now and not here later."""
        self.draining = True
        for link in self._by_link:
            self._out(link).draining = True
        for waiting in self._compiling.take_all():
            self._refuse(waiting.hosted.link, waiting.hosted.start.sequence_id, Code.UNAVAILABLE, _DRAINING)
        for engine_id in self.engine.not_started():
            hosted = self._hosted.get(engine_id)
            if hosted is not None:
                self._end_by_us(hosted, "handed back: the worker is draining", now)
                self._refuse(hosted.link, hosted.start.sequence_id, Code.UNAVAILABLE, _DRAINING)

    def _command_or_end(self, link: Link, command: Command, now: float, received: float | None = None) -> None:
        """What fails with one sequence ends that sequence."""
        try:
            self._command(link, command, now, received)
        except BaseException as error:
            if is_fatal(error) or isinstance(command, ResyncBlocks | SetRole):
                raise
            self._failed(link, command.sequence_id, error, now)

    def _failed(self, link: Link, sequence_id: int, error: BaseException, now: float) -> None:
        log.error("sequence %d of link %d fails and ends: %s", sequence_id, link, told(error), exc_info=error)
        self._compiling.drop(link, sequence_id)
        hosted = self._by_link.get(link, {}).get(sequence_id)
        if hosted is not None:
            self._end_by_us(hosted, told(error), now)
        self._refuse(link, sequence_id, Code.INTERNAL, f"the worker failed with this sequence ({told(error)})")

    def _command(self, link: Link, command: Command, now: float, received: float | None = None) -> None:
        if link not in self._by_link:
            return  # the link ended while the command was on its way
        if isinstance(command, ResyncBlocks):
            self._publish_snapshot(link)
            return
        if isinstance(command, SetRole):
            self._set_role(command.role)
            return
        waiting = self._compiling.get(link, command.sequence_id) if len(self._compiling) else None
        if waiting is not None and not isinstance(command, StartSequence):
            if isinstance(command, CancelSequence):
                self._compiling.drop(link, command.sequence_id)
            else:
                waiting.later.append(command)
            return
        match command:
            case StartSequence():
                self._start(link, command, now, now if received is None else received)
            case CancelSequence(sequence_id):
                hosted = self._by_link[link].get(sequence_id)
                if hosted is not None:
                    self._end_by_us(hosted, command.reason or "cancelled by the router", now, command.keep_lease)
                else:
                    self._cancelled_late(link, command, now)
            case ContinueLocally(sequence_id, emitted):
                hosted = self._by_link[link].get(sequence_id)
                if hosted is not None:
                    self._continue_locally(hosted, emitted, now)
            case FollowAnother(sequence_id):
                hosted = self._by_link[link].get(sequence_id)
                if hosted is not None:
                    self._follow_another(hosted, command, now)
            case ServeRunning(sequence_id) | Freeze(sequence_id) | KeepRunning(sequence_id):
                hosted = self._by_link[link].get(sequence_id)
                self._hand_over_running(hosted, command, now)

    def _set_role(self, role: str) -> None:
        """Every router hears of it, so that all send the same. Nothing else changes here."""
        before = self.role or RoleSaid(role)
        if before.role != role:
            self.role = RoleSaid(role, before.changes + 1)
            log.info("role: %s, %s before", role, before.role)
        for link in self._by_link:
            self._out(link).role = self.role

    def _start(self, link: Link, start: StartSequence, now: float, received: float) -> None:
        self._newest[link] = max(self._newest[link], start.sequence_id)
        if start.sequence_id in self._by_link[link] or self._compiling.get(link, start.sequence_id) is not None:
            self._refuse(link, start.sequence_id, Code.INTERNAL, "sequence id is in use on this stream")
            return
        if self.draining:
            self._refuse(link, start.sequence_id, Code.UNAVAILABLE, _DRAINING)
            return
        hosted = HostedSequence(
            link=link,
            start=start,
            engine_id=next(self._numbers),
            deadline=None if start.deadline_s is None else now + start.deadline_s + self._deadline_grace_s,
            timeline=Timeline(received),
            emitted=list(start.emitted),
        )
        if start.structured is None or self._has_grammar(hosted, start.structured, now):
            self._begin(hosted, now)

    def _has_grammar(self, hosted: HostedSequence, structured: Structured, now: float) -> bool:
        """False: it was refused, or waits."""
        link, sequence_id = hosted.link, hosted.start.sequence_id
        if self.grammars is None:
            self._refuse(link, sequence_id, Code.INVALID_ARGUMENT, "this worker has no structured output; leave it out")
            return False
        grammar = self.grammars.find(structured)
        if grammar is not None:
            hosted.matcher = grammar.start()
            return True
        if len(self._compiling) >= self.engine.limits.max_waiting_sequences:
            why = f"{len(self._compiling)} sequences wait for their grammars already; retry later"
            self._refuse(link, sequence_id, Code.RESOURCE_EXHAUSTED, why)
        else:
            self._compiling.add(hosted, now)
        return False

    def _compiled(self, compiled: GrammarCompiled, now: float) -> None:
        assert self.grammars is not None
        self.grammars.keep(compiled)
        for waiting in self._compiling.take(compiled.structured):
            hosted = waiting.hosted
            if compiled.grammar is None:
                why = f"the grammar of `structured` cannot be used: {compiled.error}; correct it, or leave it out"
                self._refuse(hosted.link, hosted.start.sequence_id, Code.INVALID_ARGUMENT, why)
                continue
            try:
                hosted.matcher = compiled.grammar.start()
                self._begin(hosted, now)
            except BaseException as error:
                if is_fatal(error):
                    raise
                self._failed(hosted.link, hosted.start.sequence_id, error, now)
            for command in waiting.later:
                self._command_or_end(hosted.link, command, now)

    def _begin(self, hosted: HostedSequence, now: float) -> None:
        self._admit(hosted, now)
        if hosted.matcher is not None and hosted.emitted:
            self._apply(self.engine.end_if_complete(hosted.engine_id), now)

    def _admit(self, hosted: HostedSequence, now: float) -> None:
        """A plain sequence: computed here from its prompt. The roles add handoffs."""
        self._add_to_engine(hosted, now)

    def _add_to_engine(
        self, hosted: HostedSequence, now: float, *, hold: bool = False, hand_over: bool = False
    ) -> bool:
        start = hosted.start
        refusal = self.engine.add(
            SequenceSpec(
                sequence_id=hosted.engine_id,
                prompt=start.prompt,
                sampling=start.sampling,
                emitted=start.emitted,
                matcher=hosted.matcher,
                beams=start.beams,
                priority=start.priority,
                due_s=start.due_s,
                put_back_weight=start.put_back_weight,
                cache_salt=start.cache_salt,
                adapter=start.adapter,
                mixed_kv=start.mixed_kv,
                hold=hold,
                hand_over=hand_over,
                retain=hand_over,
            ),
            now,
        )
        if refusal is not None:
            self._refuse(hosted.link, start.sequence_id, _REFUSALS[refusal.code], refusal.reason)
            return False
        if self.engine.speculation is not None:
            self.engine.speculation.bring(hosted.engine_id, start.acceptance)
        self._hosted[hosted.engine_id] = hosted
        self._young[hosted.engine_id] = hosted
        self._by_link[hosted.link][start.sequence_id] = hosted
        return True

    def _continue_locally(self, hosted: HostedSequence, emitted: Sequence[int], now: float) -> None:
        """Only a decode worker has sequences that can be told so; elsewhere the sequence simply goes on."""

    def _follow_another(self, hosted: HostedSequence, command: FollowAnother, now: float) -> None:
        """Likewise."""

    def _hand_over_running(
        self, hosted: HostedSequence | None, command: ServeRunning | Freeze | KeepRunning, now: float
    ) -> None:
        """The part that serves handoffs does it (prefill_worker/core.py). `hosted` None: it has ended."""

    # Time.

    def tick(self, now: float) -> None:
        for hosted in [h for h in self._hosted.values() if h.deadline is not None and h.deadline <= now]:
            link, sequence_id = hosted.link, hosted.start.sequence_id
            self._end_by_us(hosted, "its deadline passed", now)
            self._refuse(link, sequence_id, Code.DEADLINE_EXCEEDED, "the request's deadline passed on the worker")
        for engine_id, why in self.engine.searches.given_up(now):
            hosted = self._hosted[engine_id]
            self._end_by_us(hosted, why, now)
            self._refuse(hosted.link, hosted.start.sequence_id, Code.RESOURCE_EXHAUSTED, why)
        for waiting in self._compiling.take_late(now):
            self._refuse(
                waiting.hosted.link,
                waiting.hosted.start.sequence_id,
                Code.DEADLINE_EXCEEDED,
                "the grammar of `structured` was not compiled in time; simplify it, or allow more time",
            )
        if now >= self._next_report:
            self._next_report = now + self._report_every_s
            self._report(now)

    def next_deadline(self) -> float:
        """When `tick` must run again, at the latest."""
        deadlines = [h.deadline for h in self._hosted.values() if h.deadline is not None]
        return min([self._next_report, *deadlines, *self._compiling.deadlines()])

    # Steps.

    def schedule(self, now: float) -> StepPlan | None:
        return self.engine.schedule(now)

    def commit(self, plan: StepPlan, result: StepResult, started: float, now: float) -> None:
        accepted = sum(map(len, result.further.values())) if result.further else 0
        self.rates.observe(plan, now - started, accepted)
        kind = self.counts.step(plan, now - started, accepted)
        self._observe("diptych.step.duration", now - started, {"step": kind})
        if self._young:
            for item in plan.items:
                hosted = self._young.get(item.sequence_id)
                if hosted is not None:
                    hosted.timeline.step(started, now, len(item.token_ids))
        self._apply(self.engine.commit(plan, result, now), now)
        for engine_id, drafted in {} if self.engine.speculation is None else self.engine.speculation.news().items():
            hosted = self._hosted.get(engine_id)
            if hosted is not None:
                self._out(hosted.link).drafted[hosted.start.sequence_id] = drafted
        self._publish_blocks()

    def _apply(self, events: StepEvents, now: float) -> None:
        for sequence_id, found in events.prompt_logprobs:
            hosted = self._hosted.get(sequence_id)
            if hosted is not None:
                self._out(hosted.link).prompt_logprobs.append((hosted.start.sequence_id, found))
        for sequence_id, answers in events.beams:
            hosted = self._hosted.get(sequence_id)
            if hosted is not None:
                self._out(hosted.link).beams.append((hosted.start.sequence_id, answers))
        for token in events.tokens:
            hosted = self._hosted.get(token.sequence_id)
            if hosted is None:
                continue
            hosted.emitted.append(token.token_id)
            out = self._out(hosted.link)
            if token.sequence_id in self._young:
                del self._young[token.sequence_id]
                first = hosted.timeline.first_step(hosted.start.sequence_id, now)
                out.first_steps.append(first)
                self._observe("diptych.queue.duration", first.queue_s)
            out.sequence_ids.append(hosted.start.sequence_id)
            out.positions.append(token.position)
            out.token_ids.append(token.token_id)
            if token.logprobs is not None:
                out.logprobs.append((hosted.start.sequence_id, token.position, token.logprobs))
        self._announce(events, now)
        for end in events.ends:
            hosted = self._hosted.get(end.sequence_id)
            if hosted is not None:
                self._ended(hosted, end, now)

    def _announce(self, events: StepEvents, now: float) -> None:
        """Progress of sequences that others read; a prefill worker's business."""

    def _ended(self, hosted: HostedSequence, end: SequenceEnded, now: float) -> None:
        if end.error:
            self._forget(hosted, end.error, now)
            code = Code.INTERNAL if end.ours else Code.INVALID_ARGUMENT
            self._refuse(hosted.link, hosted.start.sequence_id, code, end.error)
            return
        drafted = None if self.engine.speculation is None else self.engine.speculation.drafted_of(hosted.engine_id)
        if drafted is not None:
            self._out(hosted.link).drafted[hosted.start.sequence_id] = drafted
        self._forget(hosted, end.reason.value if end.reason is not None else "handed_over", now)
        self._prompt_tokens_total += len(hosted.start.prompt)
        self._cached_tokens_total += end.cached_tokens
        self._out(hosted.link).ends.append(Ended(hosted.start.sequence_id, end.reason, end.cached_tokens))

    def _end_by_us(self, hosted: HostedSequence, why: str, now: float, keep_lease: bool = False) -> None:
        """Cancel, deadline or lost link: nothing of the sequence stays. `keep_lease` is about a lease it reads."""
        self.engine.cancel(hosted.engine_id)
        self._forget(hosted, why, now)

    def _forget(self, hosted: HostedSequence, outcome: str, now: float) -> None:
        start = hosted.start
        if start.traceparent:
            self._outbox.traces.append(
                SequenceTrace(
                    start.request_id,
                    start.traceparent,
                    outcome,
                    hosted.timeline.received,
                    now,
                    hosted.timeline.phases(outcome == "handed_over", now),
                    start.sequence_id,
                    len(start.prompt),
                    len(hosted.emitted) - len(start.emitted),
                )
            )
        self._young.pop(hosted.engine_id, None)
        if self.engine.speculation is not None:
            self.engine.speculation.forget(hosted.engine_id)
        del self._hosted[hosted.engine_id]
        del self._by_link[hosted.link][hosted.start.sequence_id]

    # Outbound.

    def take_outbox(self) -> Outbox | None:
        """All that happened since the last call; None when nothing did."""
        outbox = self._outbox
        self._fill_peer_messages(outbox)
        if not (outbox.links or outbox.to_readers or outbox.to_sources or outbox.traces):
            return None
        self._outbox = Outbox()
        return outbox

    def _fill_peer_messages(self, outbox: Outbox) -> None:
        """The roles add their handoff messages."""

    def _out(self, link: Link) -> LinkOutput:
        output = self._outbox.links.get(link)
        if output is None:
            output = self._outbox.links[link] = LinkOutput(draining=self.draining)
        return output

    def _refuse(self, link: Link, sequence_id: int, code: int, error: str) -> None:
        error = error.encode(errors="replace").decode()  # a message that cannot be written would end every stream
        self._out(link).ends.append(Ended(sequence_id, None, code=code, error=error))

    def _observe(self, metric: str, value: float, labels: dict[str, str] | None = None) -> None:
        """For a histogram of the catalog; leaves with the outbox."""
        self._outbox.observations.append((metric, value, labels))

    def load(self) -> Load:
        e = self.engine.load()
        cost = self.engine.step_cost.cost()
        drafts = SpeculationCounts() if self.engine.speculation is None else self.engine.speculation.counts
        return Load(
            running_sequences=e.running_sequences,
            waiting_sequences=e.waiting_sequences + e.held_sequences,
            prefill_backlog_tokens=e.prefill_backlog_tokens,
            context_tokens=e.context_tokens,
            total_blocks=e.total_blocks,
            free_blocks=e.free_blocks,
            cached_blocks=e.cached_blocks,
            preemptions_total=e.preemptions_total,
            tokens_total=e.tokens_total,
            verifications_total=drafts.verified,
            drafts_total=drafts.proposed,
            drafts_accepted_total=drafts.accepted,
            step_ms=self.rates.step_ms,
            prefill_tokens_per_s=self.rates.prefill_tokens_per_s,
            decode_tokens_per_s=self.rates.decode_tokens_per_s,
            input_busy_s=self.counts.input_busy_s,
            output_busy_s=self.counts.output_busy_s,
            waiting_blocks=e.waiting_blocks,
            put_back_sequences=e.put_back_sequences,
            put_back_tokens=e.put_back_tokens,
            blocks_in_use=e.blocks_in_use,
            chunk_tokens=e.chunk_tokens,
            decode_step_ms=self.rates.decode_ms_now(e.decode_ms),
            prompt_tokens_total=self._prompt_tokens_total,
            cached_tokens_total=self._cached_tokens_total,
            step_constant_ms=cost.constant_ms,
            step_per_sequence_ms=cost.per_sequence_ms,
            step_per_token_ms=cost.per_token_ms,
            step_per_context_token_ms=cost.per_context_token_ms,
            step_per_attention_pair_ms=cost.per_attention_pair_ms,
            step_cost_error=self.engine.step_cost.relative_error,
            loaded_adapters=self.engine.groups.loaded_adapters,
            adapter_load_ms=self.adapter_load_ms(),
        )

    def _report(self, now: float) -> None:
        load = self.load()
        self.last_load = load
        said = load, dict(self._newest)
        if said == self._last_said:
            return
        self._last_said = said
        for link, newest in self._newest.items():
            self._out(link).load = replace(load, last_sequence_id=newest)

    def _publish_blocks(self) -> None:
        events = self.engine.take_block_events()
        if not events.stored and not events.removed:
            return
        changes = BlockChanges(self._block_sequence_number, removed=events.removed, stored=events.stored)
        self._block_sequence_number += changes.num_events
        for link in self._by_link:
            self._out(link).add_blocks([changes])

    def _publish_snapshot(self, link: Link) -> None:
        """A new router, or one that lost count, starts from what the cache holds now."""
        self._publish_blocks()  # what is pending goes to the other links; to this one the snapshot says it all
        snapshot = BlockChanges(self._block_sequence_number, cleared=True, stored=tuple(self.engine.pool.hints()))
        # Only this link sees these numbers; the next shared event must follow on for it and for the others alike.
        self._out(link).add_blocks(
            [replace(snapshot, first_sequence_number=self._block_sequence_number - snapshot.num_events)]
        )

    # Adapters, which come and go between two steps (worker/adapters.py).

    def uses_adapter(self, digest: str) -> bool:
        return any(h.start.adapter == digest for h in self._hosted.values()) or self._compiling.uses(digest)

    @property
    def adapters(self) -> AdapterSlots | None:
        return self.engine.groups.adapters

    # Ends and checks.

    def has_work(self) -> bool:
        return self.engine.has_work()

    @property
    def hosted_sequences(self) -> int:
        return len(self._hosted)

    def is_idle(self) -> bool:
        """Nothing is owed to anybody: a draining worker may exit."""
        return not self._hosted and not len(self._compiling) and self.engine.is_idle()

    def check(self) -> None:
        """Assert that the tables agree with each other."""
        self.engine.check()
        assert sum(len(t) for t in self._by_link.values()) == len(self._hosted)
        assert self._young.keys() <= self._hosted.keys()
