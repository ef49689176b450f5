"""The side that has the KV: announces blocks under lease to whoever follows.

    open ──announce*──> finish ──release──> ended         fail, cancel, expiry: ended with a refusal to the follower
      ^ follow may come before, between or after; a follower gets everything announced so far

A follow of an unknown handoff waits `follow_wait_s`: the reader may be told before the source. Ended handoffs are
remembered for a while, so that a late follower hears why instead of waiting.

    lend ──> open, announce and finish in one: what the prefix cache holds now, for the reader that asked. The lease is
    the same, and ends by the same ways.
"""

from __future__ import annotations

from collections import OrderedDict
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
    RefusalReason,
    Refused,
    Release,
    Renew,
    SourceMessage,
    TokenLogprobs,
)
from kv_transfer.lease import LeaseEnd, LeaseTable

_REMEMBERED = 4096


@dataclass(slots=True)
class _Handoff:
    follower: PeerId | None = None
    announced: list[BlocksAnnounced] = field(default_factory=list)
    next_index: dict[int, int] = field(default_factory=dict)  # by group: where its next announcement begins
    final: FinalAnnounced | None = None


class HandoffSource:
    """Sans IO. Outgoing messages wait in `take_messages()`."""

    def __init__(
        self,
        pins: BlockPins,
        *,
        lease_s: float,
        max_leases: int,
        max_leased_blocks: int,
        follow_wait_s: float,
        max_waiting_follows: int = 1024,
        digest: Callable[[int], int] | None = None,
        find: Callable[[Sequence[bytes]], Sequence[int]] | None = None,
        block_tokens: int = 0,
    ) -> None:
        """`find`: the cached blocks of the longest prefix with these names; None: nothing is lent."""
        self._pins = pins
        self._digest = digest
        self._find = find
        self._block_tokens = block_tokens
        self.lent_total = 0
        self.late_releases_total = 0
        self._follow_wait_s = follow_wait_s
        self._max_waiting_follows = max_waiting_follows
        self._leases = LeaseTable(pins, lease_s=lease_s, max_leases=max_leases, max_blocks=max_leased_blocks)
        self._handoffs: dict[str, _Handoff] = {}
        self._waiting: dict[str, tuple[PeerId, float]] = {}  # handoff -> follower, until when
        self._ended: OrderedDict[str, Refused] = OrderedDict()
        self._out: list[tuple[PeerId, SourceMessage]] = []

    # The owner's calls.

    def open(self, handoff_id: str, now: float) -> Refused | None:
        """A prompt was accepted under this handoff. Refused: id used before, or too many leases."""
        if handoff_id in self._handoffs or handoff_id in self._ended:
            return Refused(handoff_id, RefusalReason.SOURCE_FAILED, "the handoff id was used before")
        if not self._leases.grant(handoff_id, now):
            refused = Refused(handoff_id, RefusalReason.SOURCE_FAILED, "too many leases are open; retry later")
            self._refuse_follower(handoff_id, refused)
            return refused
        handoff = self._handoffs[handoff_id] = _Handoff()
        waiting = self._waiting.pop(handoff_id, None)
        if waiting is not None:
            handoff.follower = waiting[0]
        return None

    def announce(
        self, handoff_id: str, first_index: int, block_ids: Sequence[int], now: float, group: int = 0
    ) -> Refused | None:
        """The blocks' content is complete on the device. Refused (and ended) when leases hold their share.

        A gap says that what it leaves out has left the group meanwhile: only of a sequence that runs.
        """
        handoff = self._handoffs[handoff_id]
        expected = handoff.next_index.get(group, first_index)
        assert first_index >= expected, f"{handoff_id}: {first_index} does not follow {expected} in group {group}"
        if not self._leases.extend(handoff_id, block_ids, now):
            why = self._leases.why_not(handoff_id, len(block_ids))
            refused = Refused(handoff_id, RefusalReason.SOURCE_FAILED, why)
            self._end(handoff_id, LeaseEnd.CANCELLED, refused)
            return refused
        message = BlocksAnnounced(
            handoff_id,
            first_index,
            tuple(block_ids),
            tuple(self._pins.generation(b) for b in block_ids),
            tuple(self._digest(b) for b in block_ids) if self._digest else (),
            group,
        )
        handoff.announced.append(message)
        handoff.next_index[group] = first_index + len(block_ids)
        self._tell(handoff, message)
        return None

    def finish(
        self,
        handoff_id: str,
        num_tokens: int,
        emitted: Sequence[int],
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
        acceptance: Acceptance | None = None,
    ) -> None:
        """All is announced. From now on the lease ends by release or silence."""
        handoff = self._handoffs[handoff_id]
        handoff.final = FinalAnnounced(handoff_id, num_tokens, tuple(emitted), tuple(logprobs), acceptance)
        self._leases.seal(handoff_id, now)
        self._tell(handoff, handoff.final)

    def fail(self, handoff_id: str, reason: RefusalReason, detail: str, now: float) -> None:
        """End a handoff from this side. Unknown ids are ignored: it may have ended already."""
        if handoff_id in self._handoffs:
            self._end(handoff_id, LeaseEnd.CANCELLED, Refused(handoff_id, reason, detail))

    def knows(self, handoff_id: str) -> bool:
        """It has not ended."""
        return handoff_id in self._handoffs

    def followed(self, handoff_id: str) -> bool:
        """A reader is there."""
        handoff = self._handoffs.get(handoff_id)
        return handoff is not None and handoff.follower is not None

    def promise(self, handoff_id: str, num_blocks: int) -> bool:
        """Whether so many more blocks of this handoff can be announced; if so, no other takes their room."""
        return self._leases.promise(handoff_id, num_blocks)

    # The readers' messages.

    def on_message(self, peer: PeerId, message: ReaderMessage, now: float) -> None:
        match message:
            case Follow(handoff_id):
                self._follow(peer, handoff_id, now)
            case Renew(handoff_id):
                handoff = self._handoffs.get(handoff_id)
                if handoff is not None and handoff.follower == peer:
                    self._leases.renew(handoff_id, now)
                elif handoff is None and handoff_id not in self._waiting:
                    self._out.append((peer, self._why_not(handoff_id)))
            case Release(handoff_id, adopted):
                self._release(peer, handoff_id, adopted, now)
            case Lend(handoff_id, names):
                self._lend(peer, handoff_id, names, now)

    def _follow(self, peer: PeerId, handoff_id: str, now: float) -> None:
        handoff = self._handoffs.get(handoff_id)
        if handoff is not None:
            handoff.follower = peer  # the latest follower has it: the router gave the lease to another reader
            self._leases.renew(handoff_id, now)
            self._out += [(peer, m) for m in handoff.announced]
            if handoff.final is not None:
                self._out.append((peer, handoff.final))
        elif handoff_id in self._ended or len(self._waiting) >= self._max_waiting_follows:
            self._out.append((peer, self._why_not(handoff_id)))
        else:
            self._waiting[handoff_id] = (peer, now + self._follow_wait_s)

    def _lend(self, peer: PeerId, handoff_id: str, names: Sequence[bytes], now: float) -> None:
        blocks = self._find(names) if self._find is not None else ()
        refused = None
        if not blocks:
            refused = Refused(handoff_id, RefusalReason.NOT_CACHED, "the prefix is not in the cache, or not any more")
        elif handoff_id not in self._handoffs:
            refused = self.open(handoff_id, now)
        else:
            refused = Refused(handoff_id, RefusalReason.SOURCE_FAILED, "the handoff id is in use")
        if refused is not None:
            self._out.append((peer, refused))
            return
        self._handoffs[handoff_id].follower = peer
        if self.announce(handoff_id, 0, blocks, now) is None:  # else the follower has heard why
            self.finish(handoff_id, len(blocks) * self._block_tokens, (), now)
            self.lent_total += 1

    def _release(self, peer: PeerId, handoff_id: str, adopted: bool, now: float) -> None:
        waiting = self._waiting.get(handoff_id)
        if waiting is not None and waiting[0] == peer:
            del self._waiting[handoff_id]
            return
        handoff = self._handoffs.get(handoff_id)
        if handoff is None or handoff.follower != peer:
            self.late_releases_total += 1  # said twice, or by one that it was taken from: nothing changes
            return
        if handoff.final is None:
            handoff.follower = None  # the prompt is still being computed: its owner decides, whatever a reader says
        elif adopted:
            self._end(handoff_id, LeaseEnd.RELEASED, None)
        else:
            self._end(handoff_id, LeaseEnd.CANCELLED, None)

    def on_reader_lost(self, peer: PeerId, now: float) -> None:
        """Its leases run on towards expiry; another reader may follow."""
        for handoff in self._handoffs.values():
            if handoff.follower == peer:
                handoff.follower = None
        self._waiting = {h: w for h, w in self._waiting.items() if w[0] != peer}
        self._out = [(p, m) for p, m in self._out if p != peer]

    # Time.

    def tick(self, now: float) -> None:
        for handoff_id in self._leases.expire(now):
            refused = Refused(handoff_id, RefusalReason.EXPIRED, "nobody read or renewed the lease in time")
            self._forget(handoff_id, refused)
        for handoff_id, (peer, until) in list(self._waiting.items()):
            if until <= now:
                del self._waiting[handoff_id]
                self._out.append((peer, self._why_not(handoff_id)))

    def next_deadline(self) -> float | None:
        times = [until for _, until in self._waiting.values()]
        expiry = self._leases.next_expiry()
        return min(times if expiry is None else [*times, expiry], default=None)

    # Looks.

    def take_messages(self) -> list[tuple[PeerId, SourceMessage]]:
        out, self._out = self._out, []
        return out

    @property
    def leased_blocks(self) -> int:
        return self._leases.leased_blocks

    @property
    def active_leases(self) -> int:
        return len(self._leases)

    @property
    def outcomes(self) -> dict[str, int]:
        """Leases that ended, by how."""
        return {end.value: self._leases.ended[end] for end in LeaseEnd}

    @property
    def released_total(self) -> int:
        return self._leases.ended[LeaseEnd.RELEASED]

    @property
    def failed_total(self) -> int:
        return self._leases.ended[LeaseEnd.CANCELLED] + self._leases.ended[LeaseEnd.EXPIRED]

    def is_idle(self) -> bool:
        return not self._handoffs

    def check(self) -> None:
        self._leases.check()
        assert len(self._handoffs) == len(self._leases)
        assert not self._waiting.keys() & self._handoffs.keys()

    # Inside.

    def _tell(self, handoff: _Handoff, message: SourceMessage) -> None:
        if handoff.follower is not None:
            self._out.append((handoff.follower, message))

    def _end(self, handoff_id: str, how: LeaseEnd, refused: Refused | None) -> None:
        self._leases.end(handoff_id, how)
        self._forget(handoff_id, refused)

    def _forget(self, handoff_id: str, refused: Refused | None) -> None:
        handoff = self._handoffs.pop(handoff_id)
        self._remember(refused or Refused(handoff_id, RefusalReason.CANCELLED, "the handoff was released"))
        if refused is not None and handoff.follower is not None:
            self._out.append((handoff.follower, refused))

    def _remember(self, refused: Refused) -> None:
        self._ended[refused.handoff_id] = refused
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def _refuse_follower(self, handoff_id: str, refused: Refused) -> None:
        self._remember(refused)
        waiting = self._waiting.pop(handoff_id, None)
        if waiting is not None:
            self._out.append((waiting[0], refused))

    def _why_not(self, handoff_id: str) -> Refused:
        return self._ended.get(handoff_id) or Refused(
            handoff_id, RefusalReason.UNKNOWN_HANDOFF, "the source never heard of it, or has forgotten it"
        )
