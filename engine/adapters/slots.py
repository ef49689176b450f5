"""Which adapter is in which slot: accounting only.

    not in a slot ──take──> in a slot, used ──last give_back──> in a slot, unused ──take──> used again
          ^                                                         │
          └─── another adapter takes the slot, the least recently used first ───┘

A sequence has its adapter's slot for as long as it has blocks to compute in: while it runs, and from the moment that
room is reserved for KV that it will receive. So an adapter in use is never replaced. Who waits for a slot waits as for
blocks, and nobody who needs another slot overtakes (engine/scheduler.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class InSlot(NamedTuple):
    slot: int
    digest: str


class Known(Protocol):
    @property
    def digest(self) -> str: ...


def slots_of(count: int, adapters: Sequence[Known], *, enabled: bool) -> AdapterSlots | None:
    """None: there are no adapters, nor will there be any."""
    return AdapterSlots(count, (adapter.digest for adapter in adapters)) if enabled else None


class AdapterSlots:
    """`digests`: of the adapters that there are."""

    def __init__(self, count: int, digests: Iterable[str]) -> None:
        self.digests = set(digests)
        self._holds: dict[str, int] = {}  # digest -> slot; least recently used first
        self._used: dict[str, int] = {}  # how many sequences have it; nobody: not here
        self._empty = list(range(count - 1, -1, -1))
        self.lost: dict[str, str] = {}  # adapters that cannot be loaded any more: why, and what to do
        self.loads_total = 0  # how often a slot was given to another adapter

    def add(self, digest: str) -> None:
        """One more, or one that was lost and is there again."""
        self.digests.add(digest)
        self.lost.pop(digest, None)

    def drop(self, digest: str) -> None:
        """No sequence has it, nor will."""
        assert digest not in self._used, f"adapter {digest} is in use"
        self.digests.discard(digest)
        self.lost.pop(digest, None)
        slot = self._holds.pop(digest, None)
        if slot is not None:
            self._empty.append(slot)

    def has_room(self, digest: str) -> bool:
        return digest in self._holds or bool(self._empty) or len(self._used) < len(self._holds)

    def take(self, digest: str) -> InSlot | None:
        """For one more sequence, which owes a `give_back`. None: all slots are in use, nothing changed."""
        slot = self._holds.pop(digest, None)
        if slot is None:
            if self._empty:
                slot = self._empty.pop()
            else:
                unused = next((other for other in self._holds if other not in self._used), None)
                if unused is None:
                    return None
                slot = self._holds.pop(unused)
            self.loads_total += 1
        self._holds[digest] = slot
        self._used[digest] = self._used.get(digest, 0) + 1
        return InSlot(slot, digest)

    def give_back(self, taken: InSlot) -> None:
        left = self._used[taken.digest] - 1
        if left:
            self._used[taken.digest] = left
        else:
            del self._used[taken.digest]

    def lose(self, found: Iterable[tuple[InSlot | None, str]]) -> None:
        """Nobody computes with these any more, nor will. With each: why."""
        self.lost |= {taken.digest: why for taken, why in found if taken is not None}

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._holds)

    def users(self, digest: str) -> int:
        return self._used.get(digest, 0)
