"""The side that wants the KV: pulls what is announced into blocks that its owner reserved.

    begin ──first announcement──> NeedBlocks ──provide──> pulling ──final, all arrived──> HandoffComplete
      any failure: HandoffBroken once, with the count of leading blocks that arrived verified; the lease is released

Of a sequence that still runs at its source it is not known how many tokens it will have (`Running`): room is for the
most, HandoffCaughtUp says when all that stands has arrived, and the final announcement how much it is.

Local blocks of a pull are pinned from submit until the transport says that no byte can land any more. Those of a pull
that nobody waits for are *quarantined*: counted, bounded, and never reused before that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_transfer.handoff import (
    Acceptance,
    BlockPins,
    BlocksAnnounced,
    FinalAnnounced,
    Follow,
    Lend,
    PeerId,
    ReaderMessage,
    Refused,
    Release,
    Renew,
    Room,
    SourceMessage,
    TokenLogprobs,
)
from kv_transfer.transport import (
    PullFinal,
    PullOrder,
    PullOutcome,
    PullStatus,
    TransportEvent,
)

_MAX_PULLS_PER_HANDOFF = 4


@dataclass(frozen=True, slots=True)
class NeedBlocks:
    """The first announcement came: provide a block table for the whole prompt, now or later."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class HandoffComplete:
    """Every block arrived and the fence held. `emitted` is the whole answer so far, from position 0; `logprobs` are of
    the last so many of its tokens."""

    sequence_id: int
    num_tokens: int
    emitted: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    pulled_bytes: int
    early_share: float  # of the bytes, arrived before the final announcement
    adopt_ms: float  # final announcement to now
    acceptance: Acceptance | None = None


@dataclass(frozen=True, slots=True)
class HandoffBroken:
    """`kept_blocks` leading blocks of the provided table hold verified content; `reason` as in worker.proto."""

    sequence_id: int
    reason: str
    detail: str
    kept_blocks: int


@dataclass(frozen=True, slots=True)
class HandoffCaughtUp:
    """Of a sequence that still runs at its source: all that was announced of it has arrived. Said once."""

    sequence_id: int


ReaderEvent = NeedBlocks | HandoffComplete | HandoffBroken | HandoffCaughtUp


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that runs at its source: it will have `least` tokens at least. `needed`: by group, the blocks of the
    first so many tokens that whoever goes on looks at.
    """

    least: int
    needed: Callable[[int], Sequence[range]]


@dataclass(slots=True)
class _Track:
    """One group's blocks of a handoff. Block index ranges::

    [first, skip) own cache | [skip, next_index) pulled or in flight | [next_index, announced) announced | not yet

    What is announced begins at `base`. The handoff is complete when, in every group, [skip, len(table)) has arrived:
    that it is the layout's, and [first, len(table)) what it says a reader needs, is what makes it a whole.
    """

    base: int | None = None
    remote: list[tuple[int, int, int]] = field(default_factory=list)  # block id, generation, digest
    room: Room | None = None
    next_index: int = 0
    arrived: set[int] = field(default_factory=set)

    @property
    def announced(self) -> int:
        return (self.base or 0) + len(self.remote)

    def span(self) -> range:
        """What was announced. Equal to any other empty range, if nothing was."""
        return range(self.base or 0, self.announced)

    def offers(self, needed: range, room: Room) -> bool:
        """What was announced ends where the need does, and begins early enough."""
        begins = max(needed.start, room.skip)
        fits = room.first <= needed.start and needed.stop <= len(room.table)
        said = self.span()  # where nothing is needed, as at the edge of a chunk, nothing need be said
        return fits and (not needed or (said.stop == needed.stop and said.start <= begins))

    def has(self, needed: range, room: Room) -> bool:
        return all(i in self.arrived for i in range(max(needed.start, room.skip), needed.stop))


@dataclass(slots=True)
class _Reading:
    """One handoff being read."""

    sequence_id: int
    handoff_id: str
    source: PeerId
    num_tokens: int
    deadline: float
    renew_at: float
    max_blocks: int | None = None  # of a loan: at most so many, and it may bring fewer tokens
    running: Running | None = None
    caught_up: bool = False
    heard_at: float | None = None
    digests: bool = False
    tracks: list[_Track] = field(default_factory=lambda: [_Track()])  # by group
    provided: bool = False
    in_flight: set[int] = field(default_factory=set)  # pull ids
    final: FinalAnnounced | None = None
    final_at: float = 0.0
    early_bytes: int = 0
    arrived_bytes: int = 0

    def track(self, group: int) -> _Track:
        while len(self.tracks) <= group:
            self.tracks.append(_Track())
        return self.tracks[group]

    def kept_blocks(self) -> int:
        """Of a layout with one group that keeps everything; otherwise what came is of no use without the rest."""
        track = self.tracks[0]
        if track.room is None or len(self.tracks) > 1 or track.room.first:
            return 0
        kept = track.room.skip
        while kept in track.arrived:
            kept += 1
        return kept


@dataclass(slots=True)
class _Pull:
    reading: _Reading | None  # None: nobody waits for it
    source: PeerId
    group: int
    first_index: int
    local_blocks: tuple[int, ...]


class HandoffReader:
    """Sans IO. `submit` and `abandon` are the transport's; events and messages wait to be taken."""

    def __init__(
        self,
        pins: BlockPins,
        submit: Callable[[PullOrder], None],
        abandon: Callable[[int], None],
        *,
        block_bytes: int | Sequence[int],
        pull_timeout_s: float,
        announce_timeout_s: float,
        renew_every_s: float,
        max_blocks_per_pull: int | Sequence[int],
        max_quarantined_blocks: int,
        numbers: itertools.count[int] | None = None,
        observe: Callable[[PeerId, PullOutcome, float], None] | None = None,
    ) -> None:
        """`block_bytes` and `max_blocks_per_pull`: by group; a number alone is of the only one."""
        self._pins = pins
        self._submit = submit
        self._abandon = abandon
        self._block_bytes = (block_bytes,) if isinstance(block_bytes, int) else tuple(block_bytes)
        self._pull_timeout_s = pull_timeout_s
        self._announce_timeout_s = announce_timeout_s
        self._renew_every_s = renew_every_s
        most = max_blocks_per_pull
        self._max_blocks_per_pull = (most,) * len(self._block_bytes) if isinstance(most, int) else tuple(most)
        self._max_quarantined_blocks = max_quarantined_blocks
        self._numbers = numbers or itertools.count(1)
        self._observe = observe
        self._readings: dict[int, _Reading] = {}
        self._by_handoff: dict[str, _Reading] = {}
        self._pulls: dict[int, _Pull] = {}
        self._events: list[ReaderEvent] = []
        self._out: list[tuple[PeerId, ReaderMessage]] = []
        self.pull_bytes_per_s = 0.0
        self.pulled_bytes_total = 0

    # The owner's calls.

    def begin(
        self,
        sequence_id: int,
        handoff_id: str,
        source: PeerId,
        num_tokens: int,
        deadline: float,
        now: float,
        running: Running | None = None,
    ) -> None:
        """Follow a handoff that is to bring the KV of exactly `num_tokens` tokens; if `running`, of so many at most."""
        assert sequence_id not in self._readings
        if handoff_id in self._by_handoff:
            detail = f"handoff {handoff_id} is being read here already"
            self._events.append(HandoffBroken(sequence_id, "transport_error", detail, 0))
            return
        renew_at = now + self._renew_every_s
        reading = _Reading(sequence_id, handoff_id, source, num_tokens, deadline, renew_at, running=running)
        self._readings[sequence_id] = reading
        self._by_handoff[handoff_id] = reading
        if self.quarantined_blocks > self._max_quarantined_blocks:
            self._break(reading, "no_room", f"{self.quarantined_blocks} blocks are in quarantine")
            return
        self._out.append((source, Follow(handoff_id)))

    def borrow(
        self,
        sequence_id: int,
        handoff_id: str,
        source: PeerId,
        names: Sequence[bytes],
        num_tokens: int,
        deadline: float,
        now: float,
    ) -> None:
        """Ask for the KV of these blocks, as far as the source's cache has them from the first on.

        Then as any handoff: NeedBlocks (`announced_blocks` says for how many), pulls, HandoffComplete or HandoffBroken.
        """
        assert sequence_id not in self._readings
        if handoff_id in self._by_handoff or self.quarantined_blocks > self._max_quarantined_blocks:
            self._events.append(HandoffBroken(sequence_id, "no_room", "the id is in use, or too much in quarantine", 0))
            return
        reading = _Reading(
            sequence_id, handoff_id, source, num_tokens, deadline, now + self._renew_every_s, max_blocks=len(names)
        )
        self._readings[sequence_id] = reading
        self._by_handoff[handoff_id] = reading
        self._out.append((source, Lend(handoff_id, tuple(names))))

    def announced_blocks(self, sequence_id: int) -> int:
        reading = self._readings.get(sequence_id)
        return 0 if reading is None else len(reading.tracks[0].remote)

    def announced_up_to(self, sequence_id: int) -> int:
        """The block of the first group where the next announcement begins."""
        reading = self._readings.get(sequence_id)
        return 0 if reading is None else reading.tracks[0].announced

    def provide(self, sequence_id: int, rooms: Sequence[Room], now: float) -> None:
        """The local block tables, by group.

        Ignored when the handoff has ended meanwhile: the owner hears of that by its event, and still holds the blocks.
        """
        reading = self._readings.get(sequence_id)
        if reading is None:
            return
        assert len(rooms) == len(self._block_bytes), "a room in every group"
        for group, room in enumerate(rooms):
            track = reading.track(group)
            track.room, track.next_index = room, room.skip
        reading.provided = True
        self._advance(reading, now)

    def cancel(self, sequence_id: int, now: float, *, keep_lease: bool = False) -> int:
        """Give up. Returns how many leading blocks of the provided table hold verified content.

        `keep_lease`: the source is told nothing, so that another reader can follow the same handoff.
        """
        reading = self._readings.get(sequence_id)
        if reading is None:
            return 0
        kept = reading.kept_blocks()
        self._drop(reading, adopted=False, tell=not keep_lease)
        return kept

    def source_of(self, sequence_id: int) -> PeerId | None:
        reading = self._readings.get(sequence_id)
        return None if reading is None else reading.source

    def release(self, source: PeerId, handoff_id: str) -> None:
        """Give up a lease that was kept for another reader, and found none."""
        self._out.append((source, Release(handoff_id, adopted=False)))

    # The source's messages.

    def on_message(self, source: PeerId, message: SourceMessage, now: float) -> None:
        reading = self._by_handoff.get(message.handoff_id)
        if reading is None or reading.source != source:
            return  # ended here already, or not who we asked
        first_word = reading.heard_at is None
        reading.heard_at = now
        match message:
            case BlocksAnnounced():
                self._announced(reading, message)
            case FinalAnnounced():
                reading.final, reading.final_at = message, now
                reading.early_bytes = reading.arrived_bytes
            case Refused(_, reason, detail):
                self._break(reading, reason.value, detail)
                return
        if reading.sequence_id not in self._readings:
            return
        if first_word:
            self._events.append(NeedBlocks(reading.sequence_id))
        self._advance(reading, now)

    def _announced(self, reading: _Reading, message: BlocksAnnounced) -> None:
        """A repeated announcement (after a reconnect) is fine if it says the same."""
        if message.group >= len(self._block_bytes):
            self._break(reading, "transport_error", f"group {message.group} was announced, and there is none")
            return
        track = reading.track(message.group)
        digests = message.digests or (0,) * len(message.block_ids)
        news = list(zip(message.block_ids, message.generations, digests, strict=True))
        left_behind = reading.running is not None and message.first_index > track.announced
        if track.base is None or left_behind:
            track.base, track.remote = message.first_index, []
        at = message.first_index - track.base
        if reading.running is not None and at + len(news) <= 0:
            return  # repeated, and left behind since
        known = track.remote[at : at + len(news)] if at >= 0 else []
        if not 0 <= at <= len(track.remote) or known != news[: len(known)]:
            self._break(
                reading,
                "transport_error",
                f"announcement at {message.first_index} does not fit what was announced",
            )
            return
        track.remote += news[len(known) :]
        reading.digests = bool(message.digests)

    def on_source_lost(self, source: PeerId, reason: str, now: float) -> None:
        for reading in [r for r in self._readings.values() if r.source == source]:
            self._break(reading, "peer_lost", reason, tell=False)
        self._out = [(p, m) for p, m in self._out if p != source]

    # The transport's events.

    def on_transport(self, event: TransportEvent, now: float) -> None:
        pull = self._pulls.get(event.pull_id)
        if pull is None:
            return
        if isinstance(event, PullFinal):
            self._settle(event.pull_id, pull)
            return
        if self._observe is not None:
            self._observe(pull.source, event, now)
        reading, pull.reading = pull.reading, None
        if event.final:
            self._settle(event.pull_id, pull)
        if reading is None:
            return
        reading.in_flight.discard(event.pull_id)
        if event.status is not PullStatus.ARRIVED:
            self._break(reading, event.status.value, event.detail)
            return
        num_bytes = len(pull.local_blocks) * self._block_bytes[pull.group]
        self.pulled_bytes_total += num_bytes
        self._observe_rate(num_bytes, event)
        reading.arrived_bytes += num_bytes
        arrived = reading.tracks[pull.group].arrived
        arrived.update(range(pull.first_index, pull.first_index + len(pull.local_blocks)))
        self._advance(reading, now)

    def _observe_rate(self, num_bytes: int, outcome: PullOutcome) -> None:
        if outcome.duration_s > 0:
            rate = num_bytes / outcome.duration_s
            old = self.pull_bytes_per_s
            self.pull_bytes_per_s = rate if old == 0 else old + 0.2 * (rate - old)

    def _settle(self, pull_id: int, pull: _Pull) -> None:
        del self._pulls[pull_id]
        self._pins.unpin(pull.local_blocks[::-1])

    # Pulling.

    def _advance(self, reading: _Reading, now: float) -> None:
        if reading.provided:
            for group, track in enumerate(reading.tracks):
                self._pull_more(reading, group, track)
            if reading.running is not None and not reading.caught_up and not reading.in_flight:
                heard = [track for track in reading.tracks if track.base is not None]
                if heard and all(track.next_index >= track.announced for track in heard):
                    reading.caught_up = True
                    self._events.append(HandoffCaughtUp(reading.sequence_id))
        self._complete_if_done(reading, now)

    def _pull_more(self, reading: _Reading, group: int, track: _Track) -> None:
        if track.room is None or track.base is None:
            return
        if track.base > track.next_index:
            if reading.running is None:
                return  # what begins too late is found out at the end
            track.next_index = track.base  # it has run on since, and left the others behind
        announced = min(track.announced, len(track.room.table))
        while track.next_index < announced and len(reading.in_flight) < _MAX_PULLS_PER_HANDOFF:
            first = track.next_index
            last = min(announced, first + self._max_blocks_per_pull[group])
            local = track.room.table[first:last]
            remote = track.remote[first - track.base : last - track.base]
            pull_id = next(self._numbers)
            self._pins.pin(local)
            self._pulls[pull_id] = _Pull(reading, reading.source, group, first, local)
            reading.in_flight.add(pull_id)
            track.next_index = last
            self._submit(
                PullOrder(
                    pull_id=pull_id,
                    source=reading.source,
                    remote_blocks=tuple(r[0] for r in remote),
                    local_blocks=local,
                    generations=tuple(r[1] for r in remote),
                    digests=tuple(r[2] for r in remote) if reading.digests else (),
                    timeout_s=self._pull_timeout_s,
                )
            )

    def _complete_if_done(self, reading: _Reading, now: float) -> None:
        final = reading.final
        if reading.max_blocks is not None and len(reading.tracks[0].remote) > reading.max_blocks:
            lent = len(reading.tracks[0].remote)
            self._break(reading, "transport_error", f"{lent} blocks were lent, fewer were asked for")
            return
        running = reading.running
        least = 0 if reading.max_blocks is not None else running.least if running is not None else reading.num_tokens
        if final is not None and not least <= final.num_tokens <= reading.num_tokens:
            detail = f"the source computed {final.num_tokens} tokens, wanted are {reading.num_tokens}"
            self._break(reading, "transport_error", detail)
            return
        if final is None or not reading.provided or reading.in_flight:
            return
        there = True
        ranges = running.needed(final.num_tokens) if running is not None else ()
        for group, track in enumerate(reading.tracks):
            room = track.room
            assert room is not None
            needed = ranges[group] if running is not None else range(room.first, len(room.table))
            fits = track.span() == needed if running is None else track.offers(needed, room)
            if not fits:
                of = f" of group {group}" if group else ""
                detail = f"the source announced blocks{of} {track.span()} and the prompt needs {needed}"
                self._break(reading, "transport_error", detail)
                return
            there = there and track.has(needed, room)
        if not there:
            return
        early = reading.early_bytes / reading.arrived_bytes if reading.arrived_bytes else 1.0
        self._drop(reading, adopted=True)
        self._events.append(
            HandoffComplete(
                sequence_id=reading.sequence_id,
                num_tokens=final.num_tokens,
                emitted=final.emitted,
                logprobs=final.logprobs,
                pulled_bytes=reading.arrived_bytes,
                early_share=early,
                adopt_ms=(now - reading.final_at) * 1e3,
                acceptance=final.acceptance,
            )
        )

    def _break(self, reading: _Reading, reason: str, detail: str, *, tell: bool = True) -> None:
        kept = reading.kept_blocks()
        self._drop(reading, adopted=False, tell=tell)
        # One batch can bring the first announcement and the end: nobody must reserve blocks for what is over.
        self._events = [e for e in self._events if e != NeedBlocks(reading.sequence_id)]
        self._events.append(HandoffBroken(reading.sequence_id, reason, detail, kept))

    def _drop(self, reading: _Reading, *, adopted: bool, tell: bool = True) -> None:
        """The reading ends; pulls still under way go to quarantine."""
        del self._readings[reading.sequence_id]
        del self._by_handoff[reading.handoff_id]
        for pull_id in reading.in_flight:
            self._pulls[pull_id].reading = None
            self._abandon(pull_id)
        if tell:
            self._out.append((reading.source, Release(reading.handoff_id, adopted)))

    # Time.

    def tick(self, now: float) -> None:
        for reading in list(self._readings.values()):
            if reading.deadline <= now:
                self._break(reading, "timeout", "the request's deadline passed before the KV was there")
            elif (
                reading.heard_at is not None
                and reading.final is None
                and reading.heard_at + self._announce_timeout_s <= now
            ):
                self._break(reading, "timeout", f"the source announced nothing for {self._announce_timeout_s:g} s")
            elif reading.renew_at <= now:
                reading.renew_at = now + self._renew_every_s
                self._out.append((reading.source, Renew(reading.handoff_id)))

    def next_deadline(self) -> float | None:
        times: list[float] = []
        for reading in self._readings.values():
            times += (reading.deadline, reading.renew_at)
            if reading.heard_at is not None and reading.final is None:
                times.append(reading.heard_at + self._announce_timeout_s)
        return min(times, default=None)

    # Looks.

    def take_messages(self) -> list[tuple[PeerId, ReaderMessage]]:
        out, self._out = self._out, []
        return out

    def take_events(self) -> list[ReaderEvent]:
        events, self._events = self._events, []
        return events

    @property
    def quarantined_blocks(self) -> int:
        return sum(len(p.local_blocks) for p in self._pulls.values() if p.reading is None)

    def is_idle(self) -> bool:
        """Nothing is being read and nothing can still be written into local blocks."""
        return not self._readings and not self._pulls

    def check(self) -> None:
        assert len(self._readings) == len(self._by_handoff)
        for pull_id, pull in self._pulls.items():
            if pull.reading is not None:
                assert pull_id in pull.reading.in_flight
                assert self._readings.get(pull.reading.sequence_id) is pull.reading
        for reading in self._readings.values():
            assert reading.in_flight <= self._pulls.keys()
