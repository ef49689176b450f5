"""A prefill worker's decisions.

    1. start        open the handoff, queue the prompt in the engine (retained: its blocks outlive the sequence)
    2. each chunk   full blocks are pinned under the handoff's lease and announced to the reader
    3. last chunk   the first token goes to the router; the partial block and the token go to the reader
    4. handed over  the engine drops the sequence; the lease alone holds the blocks
    5. lease end    released by the reader, cancelled, or expired; the blocks stay findable in the prefix cache

A first token that ends the answer skips 4: there is nothing to read.

A sequence that runs is handed over the same way, in rounds:
    1. serve        what stands is announced at once, and each further block when it is full; the sequence goes on
    2. freeze       at its next token, when the router says so or at the most tokens that the reader has room for, it
                    ends as handed over: the partial block and a state follow, then 5 as above
    or keep         nobody takes it: the handoff ends, the sequence goes on here
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.types import SequenceEnded, StepEvents
from kv_transfer.handoff import RefusalReason, Refused, TokenLogprobs
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from worker.hosted import HostedSequence
from worker.messages import CancelSequence, Code, Freeze, KeepRunning, Link, ServeRunning
from worker.peer_core import PeerCore

_FORGET_ABOVE = 256  # ended leases that are kept in mind


@dataclass(slots=True)
class _Serving:
    """What is announced of one sequence. `first_tokens`: announcements begin with what a reader of so many needs.
    `most_tokens`: of one that runs, where it is frozen at the latest; 0: a prompt.
    """

    handoff_id: str
    first_tokens: int
    most_tokens: int = 0
    announced: dict[int, int] = field(default_factory=dict)  # by group: up to which block
    tables: tuple[tuple[int, ...], ...] = ()
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens sampled since it is served


class PrefillCore(PeerCore):
    def __init__(
        self,
        engine: EngineCore,
        source: HandoffSource,
        reader: HandoffReader | None = None,
        *,
        report_every_s: float,
        deadline_grace_s: float = 1.0,
    ) -> None:
        """`reader`: fetches prefixes that other workers hold."""
        super().__init__(engine, source, reader, report_every_s=report_every_s, deadline_grace_s=deadline_grace_s)
        self._init_serving(source)

    def _init_serving(self, source: HandoffSource) -> None:
        self.source = source
        self._serving: dict[int, _Serving] = {}  # by engine id
        self._handed_over: dict[Link, dict[int, str]] = {}  # by the router's sequence id: leases that may still stand
        self._block_tokens = self.engine.limits.block_tokens

    def _admit(self, hosted: HostedSequence, now: float) -> None:
        handoff_id = hosted.start.serve_handoff_id
        if not handoff_id:
            super()._admit(hosted, now)
            return
        refused = self.source.open(handoff_id, now)
        if refused is not None:
            self._refuse(hosted.link, hosted.start.sequence_id, Code.RESOURCE_EXHAUSTED, _explain(refused))
            return
        self._serving[hosted.engine_id] = _Serving(handoff_id, len(hosted.start.prompt) + len(hosted.start.emitted))
        if not self._add_prompt(hosted, now, hand_over=True):
            del self._serving[hosted.engine_id]
            self.source.fail(handoff_id, RefusalReason.SOURCE_FAILED, "the prefill worker refused the prompt", now)

    def _announce(self, events: StepEvents, now: float) -> None:
        for token in events.tokens:
            serving = self._serving.get(token.sequence_id)
            if serving is not None and token.logprobs is not None:
                serving.logprobs.append(token.logprobs)
        ended = {end.sequence_id for end in events.ends}
        for progress in events.progress:
            serving = self._serving.get(progress.sequence_id)
            if serving is None:
                continue
            computed = progress.num_computed_tokens
            serving.tables = progress.tables
            if serving.most_tokens and progress.sequence_id in ended:
                continue  # what it ends with is announced at once: there is nothing left that could go on here
            whole = not serving.most_tokens and computed == serving.first_tokens
            if not self._announce_up_to(progress.sequence_id, serving, computed, now, whole=whole):
                continue
            self._freeze_at_most(progress.sequence_id, serving, computed, now)

    def _announce_up_to(
        self, engine_id: int, serving: _Serving, computed: int, now: float, *, whole: bool = False
    ) -> bool:
        """Full blocks of the first `computed` tokens that a reader will look at. `whole`: no more will come, so the
        last one too, and a state, which is of use only then.
        """
        size = self._block_tokens
        for group, rule in enumerate(self.engine.groups.rules):
            end = rule.needed(computed, size).stop if whole else 0 if rule.state else computed // size
            first = serving.announced.get(group, rule.needed(serving.first_tokens, size).start)
            if serving.most_tokens and not rule.state:  # what it has left since, no reader needs any more
                first = max(first, rule.needed(computed, size).start)
            if end <= first:  # also after a preemption: what was announced stays true, by content
                continue
            refused = self.source.announce(serving.handoff_id, first, serving.tables[group][first:end], now, group)
            if refused is not None:
                self._cannot_announce(engine_id, refused, now, whole=whole)
                return False
            serving.announced[group] = end
        return True

    def _freeze_at_most(self, engine_id: int, serving: _Serving, computed: int, now: float) -> None:
        """Of one that runs. Where no reader waits for it, or none has the room, it goes on."""
        if not 0 < serving.most_tokens <= computed + 1 or self.engine.frozen(engine_id):
            return
        if computed > serving.most_tokens:
            why = f"{computed} tokens stand, and the reader has room for {serving.most_tokens}"
            self._stop_serving(engine_id, serving, why, now)
        elif not self.source.followed(serving.handoff_id):
            self._stop_serving(engine_id, serving, "no reader came before the most tokens that it has room for", now)
        else:
            self._freeze(engine_id, serving, now)

    def _freeze(self, engine_id: int, serving: _Serving, now: float) -> None:
        """Only if what will stand then can be announced: there is no way back, so nobody asks again."""
        if self.engine.frozen(engine_id):
            return
        if self.source.promise(serving.handoff_id, self._left_to_announce(engine_id, serving)):
            self._apply(self.engine.freeze(engine_id), now)
        else:
            self._stop_serving(engine_id, serving, "too many blocks are leased to announce the last ones", now)

    def _left_to_announce(self, engine_id: int, serving: _Serving) -> int:
        """Blocks, at most, until the next token. One that was preempted computes most of its tokens again before it."""
        hosted, size = self._hosted[engine_id], self._block_tokens
        standing = len(hosted.start.prompt) + len(hosted.emitted) + size  # with what is in flight
        count = 0
        for group, rule in enumerate(self.engine.groups.rules):
            first = serving.announced.get(group, rule.needed(serving.first_tokens, size).start)
            count += max(0, rule.needed(standing, size).stop - first)
        return count

    def _stop_serving(self, engine_id: int, serving: _Serving, why: str, now: float) -> None:
        """What runs goes on here."""
        del self._serving[engine_id]
        self.source.fail(serving.handoff_id, RefusalReason.CANCELLED, why, now)
        self.engine.keep(engine_id)

    def _cannot_announce(self, engine_id: int, refused: Refused, now: float, *, whole: bool) -> None:
        """The handoff cannot go on; the router tells the reader's side to compute instead. What runs goes on here."""
        hosted, serving = self._hosted[engine_id], self._serving[engine_id]
        if serving.most_tokens and not whole:
            self._stop_serving(engine_id, serving, _explain(refused), now)
            return
        self._end_by_us(hosted, _explain(refused), now)
        self._refuse(hosted.link, hosted.start.sequence_id, Code.RESOURCE_EXHAUSTED, _explain(refused))

    def _ended(self, hosted: HostedSequence, end: SequenceEnded, now: float) -> None:
        serving = self._serving.get(hosted.engine_id)
        if serving is not None:
            # The last token was sampled here; whoever goes on computes it.
            standing = len(hosted.start.prompt) + len(hosted.emitted) - 1
            if end.error:
                self.source.fail(serving.handoff_id, RefusalReason.CANCELLED, end.error, now)
            elif end.reason is None:
                if not self._announce_up_to(hosted.engine_id, serving, standing, now, whole=True):
                    return
                logprobs = tuple(serving.logprobs)
                speculation = self.engine.speculation
                drafted = None if speculation is None else speculation.drafted_of(hosted.engine_id)
                acceptance = None if drafted is None else drafted.acceptance
                emitted = tuple(hosted.emitted)
                self.source.finish(serving.handoff_id, standing, emitted, now, logprobs=logprobs, acceptance=acceptance)
                self._handed_over.setdefault(hosted.link, {})[hosted.start.sequence_id] = serving.handoff_id
            else:
                self.source.fail(
                    serving.handoff_id, RefusalReason.CANCELLED, "the answer ended before it was handed over", now
                )
            del self._serving[hosted.engine_id]
            self.engine.drop(hosted.engine_id)
        super()._ended(hosted, end, now)

    def _end_by_us(self, hosted: HostedSequence, why: str, now: float, keep_lease: bool = False) -> None:
        serving = self._serving.pop(hosted.engine_id, None)
        if serving is not None:
            self.source.fail(serving.handoff_id, RefusalReason.CANCELLED, why, now)
        super()._end_by_us(hosted, why, now, keep_lease)

    # What runs, and will go on elsewhere.

    def _hand_over_running(
        self, hosted: HostedSequence | None, command: ServeRunning | Freeze | KeepRunning, now: float
    ) -> None:
        if hosted is None:
            if isinstance(command, ServeRunning) and self.source.open(command.handoff_id, now) is None:
                why = "the sequence has ended here, or was handed over before"
                self.source.fail(command.handoff_id, RefusalReason.SOURCE_FAILED, why, now)  # so that no reader waits
            return
        serving = self._serving.get(hosted.engine_id)
        match command:
            case ServeRunning() if serving is None or serving.most_tokens:
                if serving is not None:  # that it is kept from this one may stand behind, in the same message
                    self._stop_serving(hosted.engine_id, serving, "it is to go elsewhere", now)
                self._serve_running(hosted, command, now)
            case Freeze(_, handoff_id) if serving is not None and serving.handoff_id == handoff_id:
                self._freeze(hosted.engine_id, serving, now)
            case KeepRunning(_, handoff_id) if serving is not None and serving.handoff_id == handoff_id:
                self._stop_serving(hosted.engine_id, serving, "the sequence goes on where it is", now)
            case _:
                pass  # it was refused, or is a prompt that is handed over anyway

    def _serve_running(self, hosted: HostedSequence, command: ServeRunning, now: float) -> None:
        """Readers hear every refusal, and the router from them."""
        if self.source.open(command.handoff_id, now) is not None:
            return
        progress = self.engine.serve(hosted.engine_id)
        if progress is None or not hosted.emitted or progress.num_computed_tokens >= command.most_tokens:
            why = "the sequence has no KV here that stands: it waits, or is received itself"
            if progress is not None and hosted.emitted:
                why = f"{progress.num_computed_tokens} tokens stand, and the reader has room for {command.most_tokens}"
            self.source.fail(command.handoff_id, RefusalReason.SOURCE_FAILED, why, now)
            if progress is not None:
                self.engine.keep(hosted.engine_id)
            return
        computed = progress.num_computed_tokens
        most = min(command.most_tokens, self.engine.stands_up_to(hosted.engine_id))
        serving = _Serving(command.handoff_id, computed, max(most, 1), tables=progress.tables)
        self._serving[hosted.engine_id] = serving
        rules, size = self.engine.groups.rules, self._block_tokens
        first = rules[0].needed(computed, size).start
        self.source.announce(command.handoff_id, first, (), now)  # so that the reader makes room, whatever there is
        serving.announced[0] = first
        if self._announce_up_to(hosted.engine_id, serving, computed, now):
            self._freeze_at_most(hosted.engine_id, serving, computed, now)

    def _cancelled_late(self, link: Link, command: CancelSequence, now: float) -> None:
        """The router gives up what was handed over and not adopted."""
        handoff_id = self._handed_over.get(link, {}).pop(command.sequence_id, None)
        if handoff_id is not None:
            self.source.fail(handoff_id, RefusalReason.CANCELLED, command.reason, now)

    def _link_lost(self, link: Link, now: float) -> None:
        """Decode workers cancel this router's requests too: nobody is left to adopt anything."""
        for handoff_id in self._handed_over.pop(link, {}).values():
            self.source.fail(handoff_id, RefusalReason.CANCELLED, "the router's stream ended", now)

    def tick(self, now: float) -> None:
        super().tick(now)
        if sum(map(len, self._handed_over.values())) > 2 * self.source.active_leases + _FORGET_ABOVE:
            for link, leases in self._handed_over.items():
                self._handed_over[link] = {s: h for s, h in leases.items() if self.source.knows(h)}

    def check(self) -> None:
        super().check()
        assert self._serving.keys() <= self._hosted.keys()


def _explain(refused: Refused) -> str:
    return f"{refused.reason.value}: {refused.detail}" if refused.detail else refused.reason.value
