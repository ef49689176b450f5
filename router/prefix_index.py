"""Which worker's cache holds which prefix. Advisory: a false hit costs time, never correctness.

Names are the first 8 bytes of block hashes. Because names are chained, a worker that holds block i of a prompt had
block i-1 when it computed it; after evictions that need not hold any more, so a prefix ends at the first gap.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)


class PrefixIndex(Generic[W]):
    def __init__(self) -> None:
        self._bits: dict[W, int] = {}
        self._workers: dict[int, W] = {}
        self._masks: dict[bytes, int] = {}
        self._held: dict[W, set[bytes]] = {}

    def stored(self, worker: W, names: Iterable[bytes]) -> None:
        bit = self._bit(worker)
        held = self._held[worker]
        masks = self._masks
        for name in names:
            held.add(name)
            masks[name] = masks.get(name, 0) | bit

    def removed(self, worker: W, names: Iterable[bytes]) -> None:
        if worker not in self._bits:
            return
        bit = self._bits[worker]
        held = self._held[worker]
        for name in names:
            if name in held:
                held.discard(name)
                self._clear(name, bit)

    def cleared(self, worker: W) -> None:
        """Forget what a worker holds; it may go on reporting."""
        if worker in self._bits:
            bit = self._bits[worker]
            for name in self._held[worker]:
                self._clear(name, bit)
            self._held[worker] = set()

    def gone(self, worker: W) -> None:
        self.cleared(worker)
        bit = self._bits.pop(worker, None)
        if bit is not None:
            del self._held[worker]
            del self._workers[bit]

    def matched_blocks(self, names: Sequence[bytes]) -> dict[W, int]:
        """For every worker with at least the first block: how many leading blocks it holds."""
        result: dict[W, int] = {}
        if not names:
            return result
        alive = self._masks.get(names[0], 0)
        count = 0
        while alive:
            count += 1
            still = alive & self._masks.get(names[count], 0) if count < len(names) else 0
            for bit in _bits_of(alive & ~still):
                result[self._workers[bit]] = count
            alive = still
        return result

    def __len__(self) -> int:
        return len(self._masks)

    def _bit(self, worker: W) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            bit = 1
            while bit in self._workers:  # reuse the lowest free one: masks stay short
                bit <<= 1
            self._bits[worker] = bit
            self._workers[bit] = worker
            self._held[worker] = set()
        return bit

    def _clear(self, name: bytes, bit: int) -> None:
        mask = self._masks[name] & ~bit
        if mask:
            self._masks[name] = mask
        else:
            del self._masks[name]


def _bits_of(mask: int) -> Iterable[int]:
    while mask:
        lowest = mask & -mask
        yield lowest
        mask ^= lowest
