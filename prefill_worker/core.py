"""A prefill worker's decisions.

    1. start        open the handoff, queue the prompt in the engine (retained: its blocks outlive the sequence)
    2. each chunk   full blocks are pinned under the handoff's lease and announced to the reader
    3. last chunk   the first token goes to the router; the partial block and the token go to the reader
    4. handed over  the engine drops the sequence; the lease alone holds the blocks
    5. lease end    released by the reader, cancelled, or expired; the blocks stay findable in the prefix cache

A first token that ends the answer skips 4: there is nothing to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.types import SequenceEnded, StepEvents
from kv_transfer.handoff import RefusalReason, Refused, TokenLogprobs
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from worker.hosted import HostedSequence
from worker.messages import CancelSequence, Code, Link
from worker.peer_core import PeerCore

_FORGET_ABOVE = 256  # ended leases that are kept in mind


@dataclass(slots=True)
class _Serving:
    """What is announced of one prompt."""

    handoff_id: str
    announced: dict[int, int] = field(default_factory=dict)  # by group: up to which block
    tables: tuple[tuple[int, ...], ...] = ()
    first_logprobs: TokenLogprobs | None = None


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
        self.source = source
        self._serving: dict[int, _Serving] = {}  # by engine id
        self._handed_over: dict[Link, dict[int, str]] = {}  # by the router's sequence id: leases that may still stand
        self._block_tokens = engine.limits.block_tokens

    def _admit(self, hosted: HostedSequence, now: float) -> None:
        handoff_id = hosted.start.serve_handoff_id
        if not handoff_id:
            self._add_prompt(hosted, now)
            return
        refused = self.source.open(handoff_id, now)
        if refused is not None:
            self._refuse(hosted.link, hosted.start.sequence_id, Code.RESOURCE_EXHAUSTED, _explain(refused))
            return
        self._serving[hosted.engine_id] = _Serving(handoff_id)
        if not self._add_prompt(hosted, now, hand_over=True):
            del self._serving[hosted.engine_id]
            self.source.fail(handoff_id, RefusalReason.SOURCE_FAILED, "the prefill worker refused the prompt", now)

    def _announce(self, events: StepEvents, now: float) -> None:
        for progress in events.progress:
            serving = self._serving.get(progress.sequence_id)
            if serving is None:
                continue
            serving.tables = progress.tables
            self._announce_up_to(progress.sequence_id, serving, progress.num_computed_tokens, now)
        for token in events.tokens:
            serving = self._serving.get(token.sequence_id)
            if serving is not None:
                serving.first_logprobs = token.logprobs

    def _announce_up_to(self, engine_id: int, serving: _Serving, computed: int, now: float) -> bool:
        """Whole blocks of the first `computed` tokens that a reader will look at; at the end also the last one, and a
        state, which is of use only then.
        """
        start = self._hosted[engine_id].start
        prompt_tokens = len(start.prompt) + len(start.emitted)
        for group, rule in enumerate(self.engine.groups.rules):
            needed = rule.needed(prompt_tokens, self._block_tokens)
            end = needed.stop if computed == prompt_tokens else 0 if rule.state else computed // self._block_tokens
            first = serving.announced.get(group, needed.start)
            if end <= first:  # also after a preemption: what was announced stays true, by content
                continue
            refused = self.source.announce(serving.handoff_id, first, serving.tables[group][first:end], now, group)
            if refused is not None:
                self._fail(engine_id, refused, now)
                return False
            serving.announced[group] = end
        return True

    def _fail(self, engine_id: int, refused: Refused, now: float) -> None:
        """The handoff cannot go on; the router tells the reader's side to compute instead."""
        hosted = self._hosted[engine_id]
        self._end_by_us(hosted, _explain(refused), now)
        self._refuse(hosted.link, hosted.start.sequence_id, Code.RESOURCE_EXHAUSTED, _explain(refused))

    def _ended(self, hosted: HostedSequence, end: SequenceEnded, now: float) -> None:
        serving = self._serving.get(hosted.engine_id)
        if serving is not None:
            prompt_tokens = len(hosted.start.prompt) + len(hosted.start.emitted)
            if end.error:
                self.source.fail(serving.handoff_id, RefusalReason.CANCELLED, end.error, now)
            elif end.reason is None:
                if not self._announce_up_to(hosted.engine_id, serving, prompt_tokens, now):
                    return
                logprobs = (serving.first_logprobs,) if serving.first_logprobs is not None else ()
                self.source.finish(serving.handoff_id, prompt_tokens, tuple(hosted.emitted), now, logprobs=logprobs)
                self._handed_over.setdefault(hosted.link, {})[hosted.start.sequence_id] = serving.handoff_id
            else:
                self.source.fail(
                    serving.handoff_id, RefusalReason.CANCELLED, "the answer ended with its first token", now
                )
            del self._serving[hosted.engine_id]
            self.engine.drop(hosted.engine_id)
        super()._ended(hosted, end, now)

    def _end_by_us(self, hosted: HostedSequence, why: str, now: float, keep_lease: bool = False) -> None:
        serving = self._serving.pop(hosted.engine_id, None)
        if serving is not None:
            self.source.fail(serving.handoff_id, RefusalReason.CANCELLED, why, now)
        super()._end_by_us(hosted, why, now)

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
