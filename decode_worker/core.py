"""A decode worker's decisions.

    local      start -> engine -> tokens
    split      start (held in the engine, no blocks) -> follow the handoff
               -> first announcement: reserve blocks for the prompt; wait for room at most `room_wait_s`
               -> pulls arrive, fence verified, final announcement -> adopt -> tokens from position 1
    migrated   the same while the sequence still runs at its source: room is reserved for the most tokens that it may
               bring; what stands there is pulled; the router hears when that is done, and freezes it
    trouble    the handoff breaks -> tell the router what is kept
               -> ContinueLocally (compute the rest), FollowAnother (pull the rest from elsewhere) or cancel

Blocks of an abandoned pull stay pinned by the reader until no byte can land in them any more; the engine never sees
them again before that.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.core import EngineCore
from kv_transfer.handoff import PeerId
from kv_transfer.paths import PathMonitor
from kv_transfer.reader import (
    HandoffBroken,
    HandoffCaughtUp,
    HandoffComplete,
    HandoffReader,
    NeedBlocks,
    ReaderEvent,
    Running,
)
from kv_transfer.source import HandoffSource
from worker.hosted import HostedSequence
from worker.messages import CaughtUp, FollowAnother, HandoffAdopted, HandoffFailed, HandoffRef, Load
from worker.peer_core import PeerCore

# Reasons as HandoffFailed in worker.proto has them, and those of a source that refuses.
HANDOFF_OUTCOMES = (
    "adopted",
    "timeout",
    "fenced",
    "stale_epoch",
    "unknown_handoff",
    "peer_lost",
    "cancelled",
    "no_room",
    "layout_mismatch",
    "transport_error",
    "expired",
    "source_failed",
)

_ROOM_BEFORE_BLOCKS = 2  # so many before its source must stop, who still waits for room gives up


class _Stage(enum.Enum):
    PULLING = enum.auto()  # the reader has it
    BROKEN = enum.auto()  # the router has been told and decides


@dataclass(slots=True)
class _Receiving:
    stage: _Stage
    handoff_id: str
    most_tokens: int
    least_tokens: int | None = None  # of a sequence that still runs at its source; None: as many as the most
    cached_tokens: int = 0
    kept_blocks: int = 0
    room_deadline: float | None = None  # set while it waits for blocks
    announced: float | None = None  # when the first announcement came
    kept_lease: PeerId | None = None  # broken for want of room: the lease stands at this source, and nobody reads it


class DecodeCore(PeerCore):
    def __init__(
        self,
        engine: EngineCore,
        reader: HandoffReader,
        source: HandoffSource | None = None,
        *,
        report_every_s: float,
        room_wait_s: float,
        deadline_grace_s: float = 1.0,
        handoff_wait_s: float = 300.0,
        paths: PathMonitor | None = None,
    ) -> None:
        """`source`: lends what the prefix cache holds."""
        super().__init__(
            engine, source, reader, paths=paths, report_every_s=report_every_s, deadline_grace_s=deadline_grace_s
        )
        self._init_following(reader, room_wait_s, handoff_wait_s)

    def _init_following(self, reader: HandoffReader, room_wait_s: float, handoff_wait_s: float = 300.0) -> None:
        self.reader = reader
        self._room_wait_s = room_wait_s
        self._handoff_wait_s = handoff_wait_s
        self._block_tokens = self.engine.limits.block_tokens
        self._receiving: dict[int, _Receiving] = {}  # by engine id
        # Of handoffs: adopted, or why not. Known from the start: a rate does not see a series' first event.
        self.outcomes: Counter[str] = Counter(dict.fromkeys(HANDOFF_OUTCOMES, 0))
        self.pulled_bytes_total = 0
        self._adopted_total = 0
        self._broken_total = 0

    def _admit(self, hosted: HostedSequence, now: float) -> None:
        pull = hosted.start.pull
        if pull is None:
            super()._admit(hosted, now)
        elif self._add_to_engine(hosted, now, hold=True):
            self._follow(hosted, pull, now)

    def _follow(self, hosted: HostedSequence, pull: HandoffRef, now: float) -> None:
        deadline = now + self._handoff_wait_s if hosted.deadline is None else hosted.deadline
        known = _known_tokens(hosted)
        receiving = self._receiving[hosted.engine_id] = _Receiving(_Stage.PULLING, pull.handoff_id, known)
        running = None
        if pull.most_tokens:  # of the last token that is known, no KV need stand
            receiving.least_tokens, receiving.most_tokens = known - 1, max(known, pull.most_tokens)
            running = Running(known - 1, self._needed)
        self.reader.begin(hosted.engine_id, pull.handoff_id, pull.source, receiving.most_tokens, deadline, now, running)
        self._react(now)

    def _needed(self, num_tokens: int) -> list[range]:
        """By group, the blocks of a sequence's first `num_tokens` tokens that it needs to go on."""
        return [rule.needed(num_tokens, self._block_tokens) for rule in self.engine.groups.rules]

    # What the reader says.

    def _reader_event(self, event: ReaderEvent, now: float) -> None:
        match event:
            case NeedBlocks(engine_id):
                receiving = self._receiving.get(engine_id)
                if receiving is not None and self._computed_otherwise(engine_id):
                    self.reader.cancel(engine_id, now)
                    why = "its weights are quantized otherwise, and the router did not say that their KV may mix"
                    self._broken(engine_id, "layout_mismatch", why, 0)
                elif receiving is not None:
                    receiving.room_deadline = now + self._room_wait_s
                    receiving.announced = now
                    self._hosted[engine_id].timeline.announced = now
                    self._try_reserve(engine_id, receiving, now)
            case HandoffComplete():
                self._adopt(event, now)
            case HandoffBroken(engine_id, reason, detail, kept_blocks):
                self._broken(engine_id, reason, detail, kept_blocks)
            case HandoffCaughtUp(engine_id):
                receiving, hosted = self._receiving.get(engine_id), self._hosted.get(engine_id)
                if receiving is not None and hosted is not None:
                    self._out(hosted.link).caught_up.append(CaughtUp(hosted.start.sequence_id, receiving.handoff_id))

    def _computed_otherwise(self, engine_id: int) -> bool:
        """With weights of another scheme, which nobody has asked for: its blocks would get the names of ours."""
        source = self.reader.source_of(engine_id)
        return source in self._of_other_scheme and not self._hosted[engine_id].start.mixed_kv

    def _try_reserve(self, engine_id: int, receiving: _Receiving, now: float) -> None:
        reservation = self.engine.reserve(engine_id, receiving.most_tokens, now, receiving.least_tokens)
        if reservation is None:
            return
        receiving.room_deadline = None
        known = _known_tokens(self._hosted[engine_id])
        receiving.cached_tokens = min(reservation.cached_blocks * self._block_tokens, known)
        self.reader.provide(engine_id, reservation.rooms, now)

    def _adopt(self, complete: HandoffComplete, now: float) -> None:
        receiving = self._receiving.pop(complete.sequence_id, None)
        hosted = self._hosted.get(complete.sequence_id)
        if receiving is None or hosted is None:
            return
        self._adopted_total += 1
        self.outcomes["adopted"] += 1
        self.pulled_bytes_total += complete.pulled_bytes
        hosted.timeline.adopted = hosted.timeline.runnable = now
        hosted.timeline.final_at = now - complete.adopt_ms / 1e3
        transfer_s = now - (now if receiving.announced is None else receiving.announced)
        self._observe("diptych.transfer.duration", transfer_s)
        self._observe("diptych.adopt.duration", complete.adopt_ms / 1e3)
        out = self._out(hosted.link)
        out.adoptions.append(
            HandoffAdopted(
                sequence_id=hosted.start.sequence_id,
                pulled_bytes=complete.pulled_bytes,
                cached_tokens=receiving.cached_tokens,
                kv_early_share=complete.early_share,
                adopt_ms=complete.adopt_ms,
                handoff_id=receiving.handoff_id,
                transfer_ms=transfer_s * 1e3,
            )
        )
        known = len(hosted.emitted)
        first_logprobs = len(complete.emitted) - len(complete.logprobs)
        # The adopted tokens are repeated to the router: it may never have heard them from a source that died.
        for i, token_id in enumerate(complete.emitted[known:], start=known):
            out.sequence_ids.append(hosted.start.sequence_id)
            out.positions.append(i)
            out.token_ids.append(token_id)
            hosted.emitted.append(token_id)
            if i >= first_logprobs:
                out.logprobs.append((hosted.start.sequence_id, i, complete.logprobs[i - first_logprobs]))
        if self.engine.speculation is not None:
            self.engine.speculation.bring(complete.sequence_id, complete.acceptance)
        events = self.engine.adopt(complete.sequence_id, complete.num_tokens, complete.emitted[known:], now)
        self._apply(events, now)
        self._publish_blocks()

    def _broken(self, engine_id: int, reason: str, detail: str, kept_blocks: int) -> None:
        receiving = self._receiving.get(engine_id)
        hosted = self._hosted.get(engine_id)
        if receiving is None or hosted is None:
            return
        self._broken_total += 1
        self.outcomes[reason] += 1
        receiving.stage = _Stage.BROKEN
        receiving.kept_blocks = kept_blocks
        receiving.room_deadline = None
        kept_tokens = min(kept_blocks * self._block_tokens, _known_tokens(hosted))
        self._out(hosted.link).handoff_failures.append(
            HandoffFailed(hosted.start.sequence_id, reason, detail, kept_tokens, receiving.handoff_id)
        )

    def _continue_locally(self, hosted: HostedSequence, emitted: Sequence[int], now: float) -> None:
        stopped = self._stop_receiving(hosted, emitted, now)
        if stopped is not None:  # else adopted already: it runs on, and the positions that it streams are the same
            self.engine.continue_locally(hosted.engine_id, *stopped, now)
            hosted.timeline.runnable = now
            self._apply(self.engine.end_if_complete(hosted.engine_id), now)
            self._react(now)

    def _follow_another(self, hosted: HostedSequence, command: FollowAnother, now: float) -> None:
        stopped = self._stop_receiving(hosted, command.emitted, now)
        if stopped is not None:
            self.engine.hold_again(hosted.engine_id, *stopped, now)
            self._follow(hosted, command.pull, now)

    def _stop_receiving(
        self, hosted: HostedSequence, emitted: Sequence[int], now: float
    ) -> tuple[int, list[int]] | None:
        """The tokens whose KV stands, and the emitted ones that are news. None: there was nothing to stop."""
        receiving = self._receiving.pop(hosted.engine_id, None)
        if receiving is None:
            return None
        if receiving.stage is _Stage.PULLING:
            receiving.kept_blocks = self.reader.cancel(hosted.engine_id, now)
        if receiving.kept_lease is not None:
            self.reader.release(receiving.kept_lease, receiving.handoff_id)
        known, hosted.emitted = len(hosted.emitted), list(emitted)
        return receiving.kept_blocks * self._block_tokens, hosted.emitted[known:]

    # Ends and time.

    def _end_by_us(self, hosted: HostedSequence, why: str, now: float, keep_lease: bool = False) -> None:
        receiving = self._receiving.pop(hosted.engine_id, None)
        if receiving is not None:
            self.reader.cancel(hosted.engine_id, now, keep_lease=keep_lease)
            if receiving.kept_lease is not None and not keep_lease:
                self.reader.release(receiving.kept_lease, receiving.handoff_id)
        super()._end_by_us(hosted, why, now)

    def tick(self, now: float) -> None:
        super().tick(now)  # what broke does not wait for room any more
        for engine_id, receiving in list(self._receiving.items()):
            if receiving.room_deadline is None:
                continue
            self._try_reserve(engine_id, receiving, now)
            if receiving.room_deadline is not None and receiving.room_deadline <= now:
                self._no_room(engine_id, receiving, f"no free KV blocks within {self._room_wait_s:g} s", now)
            elif receiving.room_deadline is not None and self._source_will_stop(engine_id, receiving):
                why = "no free KV blocks before the source, which goes on, would have had to stop and wait for them"
                self._no_room(engine_id, receiving, why, now)
        self._react(now)

    def _no_room(self, engine_id: int, receiving: _Receiving, why: str, now: float) -> None:
        receiving.kept_lease = self.reader.source_of(engine_id)
        self.reader.cancel(engine_id, now, keep_lease=True)
        self._broken(engine_id, "no_room", why, 0)

    def _source_will_stop(self, engine_id: int, receiving: _Receiving) -> bool:
        """At the most tokens of a sequence that runs there: its stream would stand still while we wait for room."""
        if receiving.least_tokens is None:
            return False
        stands = self.reader.announced_up_to(engine_id) * self._block_tokens
        return stands > receiving.most_tokens - _ROOM_BEFORE_BLOCKS * self._block_tokens

    def next_deadline(self) -> float:
        rooms = [r.room_deadline for r in self._receiving.values() if r.room_deadline is not None]
        return min([super().next_deadline(), *rooms])

    def load(self) -> Load:
        return replace(super().load(), handoffs_total=self._adopted_total, handoff_failures_total=self._broken_total)

    def is_idle(self) -> bool:
        return super().is_idle() and not self._receiving

    def check(self) -> None:
        super().check()
        assert self._receiving.keys() <= self._hosted.keys()


def _known_tokens(hosted: HostedSequence) -> int:
    """What a source computes: the prompt, and what was emitted before it began."""
    return len(hosted.start.prompt) + len(hosted.emitted)
