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


class Snapshot:
    """Of a worker's counts; bins beyond the highest used so far are left out."""

    __slots__ = ("counts", "sums_ms", "total")

    def __init__(self, counts: list[int], sums_ms: list[float], total: int) -> None:
        self.counts = counts
        self.sums_ms = sums_ms
        self.total = total

    def skip(self, gap_ms: float) -> None:
        """A step to come that is not to count."""
        i = _bin(gap_ms)
        missing = i + 1 - len(self.counts)
        if missing > 0:
            self.counts += [0] * missing
            self.sums_ms += [0.0] * missing
        self.counts[i] += 1
        self.sums_ms[i] += gap_ms
        self.total += 1


class GapCounts:
    """`counts` and `sums_ms` by bin, of all steps so far."""

    __slots__ = ("counts", "highest", "sums_ms", "total")

    def __init__(self) -> None:
        self.counts = [0] * _BINS
        self.sums_ms = [0.0] * _BINS
        self.highest = 0
        self.total = 0

    def add(self, count: int, first_ms: float, growth_ms: float) -> None:
        """`count` steps, each `growth_ms` longer than the one before."""
        self.total += count
        low = high = _bin(first_ms)
        last_ms = first_ms + growth_ms * (count - 1)
        if last_ms >= _NEARLY_UPPER_MS[low]:
            high = _bin(last_ms)
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

    def snapshot(self) -> Snapshot:
        end = self.highest + 1
        return Snapshot(self.counts[:end], self.sums_ms[:end], self.total)

    def worst_ms(self, since: Snapshot, extra_ms: Sequence[float]) -> float:
        """Mean of the longest tenth (at least one) of the gaps since `since` and of `extra_ms`; 0 without gaps."""
        counts, sums = since.counts, since.sums_ms
        missing = self.highest + 1 - len(counts)
        if missing > 0:
            counts += [0] * missing
            sums += [0.0] * missing
        total = self.total - since.total + len(extra_ms)
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


_NEARLY_UPPER_MS = [_upper(i) * (1 - 1e-9) for i in range(_BINS)]  # below it a gap is in this bin or a lower one
