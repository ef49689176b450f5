"""A worker that exchanges KV with others: as a source under leases, as a reader of handoffs and of prefixes.

The roles differ in what they do with a prompt. What they have in common: either may lend what its prefix cache holds,
and either may fetch a prefix for a prompt that it is to compute.
"""

from __future__ import annotations

from dataclasses import replace

from engine.core import EngineCore
from kv_transfer.handoff import PeerId
from kv_transfer.paths import PathMonitor
from kv_transfer.reader import HandoffReader, ReaderEvent
from kv_transfer.source import HandoffSource
from worker.core import WorkerCore
from worker.hosted import HostedSequence
from worker.messages import (
    Inbound,
    Load,
    Outbox,
    ReaderLost,
    ReaderMessages,
    SourceAttached,
    SourceGone,
    SourceLost,
    SourceMessages,
    Transported,
)
from worker.prefix_fetch import PrefixFetches


class PeerCore(WorkerCore):
    """Without `source` nothing is lent, without `reader` nothing is fetched."""

    def __init__(
        self,
        engine: EngineCore,
        source: HandoffSource | None,
        reader: HandoffReader | None,
        *,
        paths: PathMonitor | None = None,
        report_every_s: float,
        deadline_grace_s: float = 1.0,
    ) -> None:
        super().__init__(engine, report_every_s=report_every_s, deadline_grace_s=deadline_grace_s)
        self._source = source
        self._reader = reader
        self.paths = paths
        self._of_other_scheme: set[PeerId] = set()  # sources
        self._fetches = PrefixFetches(engine, reader) if reader is not None else None

    # Messages.

    def _peer_message(self, message: Inbound, now: float) -> None:
        source, reader, paths = self._source, self._reader, self.paths
        match message:
            case ReaderMessages(peer, messages) if source is not None:
                for m in messages:
                    source.on_message(peer, m, now)
            case ReaderLost(peer) if source is not None:
                source.on_reader_lost(peer, now)
            case SourceMessages(peer, messages) if reader is not None:
                for m in messages:
                    reader.on_message(peer, m, now)
            case SourceLost(peer, reason) if reader is not None:
                reader.on_source_lost(peer, reason, now)
                if paths is not None:
                    paths.lost(peer, reason, now)
            case Transported(event) if reader is not None:
                if paths is None or not paths.on_transport(event, now):
                    reader.on_transport(event, now)
            case SourceAttached(peer, other_scheme):
                if other_scheme:
                    self._of_other_scheme.add(peer)
                if paths is not None:
                    paths.attached(peer, now)
            case SourceGone(peer):
                self._of_other_scheme.discard(peer)
                if paths is not None:
                    paths.gone(peer)
            case _:
                pass
        self._react(now)

    def _react(self, now: float) -> None:
        if self._reader is None:
            return
        changed = False
        for event in self._reader.take_events():
            if self._fetches is not None and self._fetches.on_event(event, now):
                changed = True
            else:
                self._reader_event(event, now)
        if changed:
            self._publish_blocks()

    def _reader_event(self, event: ReaderEvent, now: float) -> None:
        """About a handoff; a decode worker's business."""

    # Prompts that are computed here.

    def _admit(self, hosted: HostedSequence, now: float) -> None:
        self._add_prompt(hosted, now)

    def _add_prompt(self, hosted: HostedSequence, now: float, *, hand_over: bool = False) -> bool:
        """To the engine, by way of a prefix that another worker lends, if the router names one."""
        pull = hosted.start.prefix_pull
        if pull is None or self._fetches is None:
            return self._add_to_engine(hosted, now, hand_over=hand_over)
        if not self._add_to_engine(hosted, now, hold=True, hand_over=hand_over):
            return False
        # The last token is computed here in any case: its logits are what the sequence needs.
        num_tokens = min(pull.num_tokens, len(hosted.start.prompt) - 1)
        self._fetches.begin(hosted.engine_id, replace(pull, num_tokens=num_tokens), now)
        self._react(now)
        return True

    def _end_by_us(self, hosted: HostedSequence, why: str, now: float, keep_lease: bool = False) -> None:
        if self._fetches is not None:
            self._fetches.cancel(hosted.engine_id, now)
        super()._end_by_us(hosted, why, now)

    # Time.

    def tick(self, now: float) -> None:
        super().tick(now)
        if self._source is not None:
            self._source.tick(now)
        if self._reader is not None:
            self._reader.tick(now)
            self._react(now)
        if self.paths is not None:
            self.paths.tick(now)

    def next_deadline(self) -> float:
        deadlines = [super().next_deadline()]
        for part in (self._source, self._reader, self.paths):
            deadline = part.next_deadline() if part is not None else None
            if deadline is not None:
                deadlines.append(deadline)
        return min(deadlines)

    def _fill_peer_messages(self, outbox: Outbox) -> None:
        if self._source is not None:
            outbox.to_readers += self._source.take_messages()
        if self._reader is not None:
            outbox.to_sources += self._reader.take_messages()

    # Looks.

    def load(self) -> Load:
        load = super().load()
        if self._source is not None:
            load = replace(load, leased_blocks=self._source.leased_blocks, active_leases=self._source.active_leases)
        if self._reader is not None and self._fetches is not None:
            load = replace(
                load,
                quarantined_blocks=self._reader.quarantined_blocks,
                pull_bytes_per_s=self._reader.pull_bytes_per_s,
                prefix_pulls_total=self._fetches.arrived_total,
                prefix_pull_failures_total=self._fetches.failed_total,
                paths=self.paths.paths() if self.paths is not None else (),
            )
        return load

    def is_idle(self) -> bool:
        return (
            super().is_idle()
            and (self._source is None or self._source.is_idle())
            and (self._reader is None or self._reader.is_idle())
            and not self._fetches
        )

    def check(self) -> None:
        super().check()
        if self._source is not None:
            self._source.check()
        if self._reader is not None:
            self._reader.check()
