"""Gaps between tokens, kept as a histogram: the mean of a request's longest tenth without remembering every step.

All sequences that decode on a worker feel the same steps. The worker counts its steps by length in bins 3 % wide; a
request notes the counts when its first token is out and takes the difference when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_SHORTEST_MS = 0.1
_BINS_PER_E = 33.3
_BINS = 480  # up to three minutes
WORST_SHARE = 0.1


class GapCounts:
    """`counts` and `sums_ms` by bin, of all steps so far."""

    __slots__ = ("counts", "highest", "sums_ms")

    def __init__(self) -> None:
        self.counts = [0] * _BINS
        self.sums_ms = [0.0] * _BINS
        self.highest = 0

    def add(self, count: int, first_ms: float, growth_ms: float) -> None:
        """`count` steps, each `growth_ms` longer than the one before."""
        low, high = _bin(first_ms), _bin(first_ms + growth_ms * (count - 1))
        if high > self.highest:
            self.highest = high
        if low == high:
            self.counts[low] += count
            self.sums_ms[low] += count * (first_ms + growth_ms * (count - 1) / 2)
            return
        done = 0
        for i in range(low, high + 1):
            end = count if i == high else min(count, 1 + int((_upper(i) - first_ms) / growth_ms))
            n = end - done
            if n > 0:
                self.counts[i] += n
                self.sums_ms[i] += n * (first_ms + growth_ms * (done + (n - 1) / 2))
                done = end

    def snapshot(self) -> tuple[list[int], list[float]]:
        return self.counts.copy(), self.sums_ms.copy()

    @staticmethod
    def skip(since: tuple[list[int], list[float]], gap_ms: float) -> None:
        """A step to come that is not to count."""
        i = _bin(gap_ms)
        since[0][i] += 1
        since[1][i] += gap_ms

    def worst_ms(self, since: tuple[list[int], list[float]], extra_ms: Sequence[float]) -> float:
        """Mean of the longest tenth (at least one) of the gaps since `since` and of `extra_ms`; 0 without gaps."""
        counts, sums = since
        total = sum(self.counts) - sum(counts) + len(extra_ms)
        if total <= 0:
            return 0.0
        wanted = max(1, math.ceil(total * WORST_SHARE))
        taken, longest_ms = 0, 0.0
        extra = sorted(extra_ms)
        for i in range(self.highest, -1, -1):
            n = self.counts[i] - counts[i]
            if not n:
                continue
            mean_ms = (self.sums_ms[i] - sums[i]) / n
            while extra and extra[-1] >= mean_ms and taken < wanted:
                longest_ms += extra.pop()
                taken += 1
            n = min(n, wanted - taken)
            longest_ms += n * mean_ms
            taken += n
            if taken >= wanted:
                return longest_ms / wanted
        while extra and taken < wanted:
            longest_ms += extra.pop()
            taken += 1
        return longest_ms / taken


def worst_ms(gaps_ms: Sequence[float]) -> float:
    """The same of plain gaps."""
    if not gaps_ms:
        return 0.0
    longest = sorted(gaps_ms)[-max(1, math.ceil(len(gaps_ms) * WORST_SHARE)) :]
    return sum(longest) / len(longest)


def _bin(ms: float) -> int:
    return min(_BINS - 1, max(0, int(math.log(ms / _SHORTEST_MS) * _BINS_PER_E))) if ms > _SHORTEST_MS else 0


def _upper(i: int) -> float:
    return _SHORTEST_MS * math.exp((i + 1) / _BINS_PER_E)
