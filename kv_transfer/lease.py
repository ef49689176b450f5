"""Blocks promised to a reader.

    grant ──extend*──> active ──release | cancel | expire──> ended: every block unpinned exactly once

A lease is *open* while its source still computes: it does not expire then, because its owner will end it. Once sealed
it expires `lease_s` after the last sign of a reader.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kv_transfer.handoff import BlockPins


class LeaseEnd(enum.StrEnum):
    RELEASED = "released"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(slots=True)
class _Lease:
    expires_at: float
    sealed: bool = False
    promised: int = 0  # blocks that will still come
    block_ids: list[int] = field(default_factory=list)


class LeaseTable:
    """The only one who pins blocks for readers elsewhere, bounded in leases and in blocks."""

    def __init__(self, pins: BlockPins, *, lease_s: float, max_leases: int, max_blocks: int) -> None:
        self._pins = pins
        self._lease_s = lease_s
        self._max_leases = max_leases
        self._max_blocks = max_blocks
        self._leases: dict[str, _Lease] = {}
        self._blocks = self._promised = 0
        self.ended: Counter[LeaseEnd] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def leased_blocks(self) -> int:
        return self._blocks

    def grant(self, lease_id: str, now: float) -> bool:
        """False: the table is full. A lease id is used once."""
        if lease_id in self._leases:
            raise AssertionError(f"lease {lease_id} exists")
        if len(self._leases) >= self._max_leases:
            return False
        self._leases[lease_id] = _Lease(expires_at=now + self._lease_s)
        return True

    def extend(self, lease_id: str, block_ids: Sequence[int], now: float) -> bool:
        """Pin more blocks under a lease. False: the bound on leased blocks is reached; nothing changed."""
        lease = self._leases[lease_id]
        kept = min(lease.promised, len(block_ids))
        if not self._has_room(len(block_ids) - kept):
            return False
        lease.promised -= kept
        self._promised -= kept
        self._pins.pin(block_ids)
        lease.block_ids += block_ids
        self._blocks += len(block_ids)
        self.renew(lease_id, now)
        return True

    def why_not(self, lease_id: str, count: int) -> str:
        """`extend` has refused so many blocks."""
        needed = len(self._leases[lease_id].block_ids) + count
        if needed > self._max_blocks:
            return (
                f"it has {needed} blocks, and all leases together may hold {self._max_blocks}: it can never go "
                "elsewhere; raise worker.max_leased_share or engine.num_blocks"
            )
        held = self._blocks + self._promised
        return f"{held} blocks are leased already, and {count} more are too many; readers are too slow for that"

    def promise(self, lease_id: str, count: int) -> bool:
        """Keep room for so many more blocks of this lease, whatever others take meanwhile. False: there is none."""
        lease = self._leases[lease_id]
        if not self._has_room(count - lease.promised):
            return False
        self._promised += count - lease.promised
        lease.promised = count
        return True

    def _has_room(self, count: int) -> bool:
        return self._blocks + self._promised + count <= self._max_blocks

    def seal(self, lease_id: str, now: float) -> None:
        """The source is done: from now on silence ends the lease."""
        lease = self._leases[lease_id]
        lease.sealed = True
        self._promised -= lease.promised
        lease.promised = 0
        self.renew(lease_id, now)

    def renew(self, lease_id: str, now: float) -> bool:
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        lease.expires_at = now + self._lease_s
        return True

    def end(self, lease_id: str, how: LeaseEnd) -> bool:
        """False: ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self._pins.unpin(lease.block_ids[::-1])
        self._blocks -= len(lease.block_ids)
        self._promised -= lease.promised
        self.ended[how] += 1
        return True

    def expire(self, now: float) -> list[str]:
        """End what silence has ended; returns the ids."""
        late = [i for i, lease in self._leases.items() if lease.sealed and lease.expires_at <= now]
        for lease_id in late:
            self.end(lease_id, LeaseEnd.EXPIRED)
        return late

    def next_expiry(self) -> float | None:
        return min((lease.expires_at for lease in self._leases.values() if lease.sealed), default=None)

    def check(self) -> None:
        assert self._blocks == sum(len(lease.block_ids) for lease in self._leases.values())
        assert self._promised == sum(lease.promised for lease in self._leases.values())
        assert self._blocks + self._promised <= self._max_blocks
        assert len(self._leases) <= self._max_leases
