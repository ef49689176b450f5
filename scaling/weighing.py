"""Pairs of counts against the load that is expected: which of them hold, and which is nearest or least strained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scaling.config import ScalingConfig
from scaling.demand import Load, strain
from scaling.observation import Observation, Pool, Stage

Pair = tuple[int, int]  # (prefill, decode)


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for the whole cluster and is no choice of this policy's."""

    itl_target_ms: float
    prefill_gpus: float = 1.0  # of one worker
    decode_gpus: float = 1.0

    def gpus(self, pair: Pair) -> float:
        return pair[0] * self.prefill_gpus + pair[1] * self.decode_gpus

    @property
    def standby_gpus(self) -> float:
        return max(self.prefill_gpus, self.decode_gpus)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which pairs are allowed at all. A pool that was set by hand has its count as both bounds."""

    prefill: tuple[int, int]
    decode: tuple[int, int]
    gpus: float  # for both pools: what the budget leaves
    terms: Terms

    def allows(self, pair: Pair) -> bool:
        (low_p, high_p), (low_d, high_d) = self.prefill, self.decode
        return low_p <= pair[0] <= high_p and low_d <= pair[1] <= high_d and self.terms.gpus(pair) <= self.gpus + 1e-9

    def pairs(self, total: int) -> Iterator[Pair]:
        for prefill in range(max(self.prefill[0], total - self.decode[1]), min(self.prefill[1], total) + 1):
            pair = prefill, total - prefill
            if self.allows(pair):
                yield pair

    @property
    def most(self) -> int:
        """Workers of both pools together, at most."""
        cheapest = min(self.terms.prefill_gpus, self.terms.decode_gpus)
        within = int((self.gpus + 1e-9) / cheapest)
        return min(within, self.prefill[1] + self.decode[1])

    @property
    def least(self) -> int:
        return self.prefill[0] + self.decode[0]


def bounds(config: ScalingConfig, terms: Terms, pinned: dict[Pool, int], gpus: float) -> Bounds:
    assert config.budget_gpus is not None
    most_p = config.prefill.max or int(config.budget_gpus / terms.prefill_gpus + 1e-9)
    most_d = config.decode.max or int(config.budget_gpus / terms.decode_gpus + 1e-9)
    prefill, decode = (config.prefill.min, most_p), (config.decode.min, most_d)
    if Pool.PREFILL in pinned:
        prefill = pinned[Pool.PREFILL], pinned[Pool.PREFILL]
    if Pool.DECODE in pinned:
        decode = pinned[Pool.DECODE], pinned[Pool.DECODE]
    return Bounds(prefill, decode, gpus, terms)


def worst(loads: Sequence[Load], pair: Pair) -> float:
    return max(max(strain(load, *pair)) for load in loads)


def far(a: Pair, b: Pair) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def balanced(loads: Sequence[Load], pairs: Iterator[Pair] | Sequence[Pair], base: Pair) -> tuple[float, Pair] | None:
    """The least strained; of equals the nearest."""
    found = [(worst(loads, pair), far(pair, base), pair) for pair in pairs]
    if not found:
        return None
    value, _, pair = min(found)
    return value, pair


def smallest(
    loads: Sequence[Load], limits: Bounds, base: Pair, low: int, high: int, at_most: float, *, grow_only: bool = False
) -> Pair | None:
    """The pair of the fewest workers, between `low` and `high`, that is strained to no more than `at_most`."""
    for total in range(low, high + 1):
        pairs = [p for p in limits.pairs(total) if not grow_only or (p[0] >= base[0] and p[1] >= base[1])]
        found = balanced(loads, pairs, base)
        if found is not None and found[0] <= at_most:
            return found[1]
    return None


def spent_gpus(seen: Observation, terms: Terms) -> float:
    """By what is on its way out: it holds its devices until it is gone."""
    leaving = [w.pool for w in seen.workers if w.stage is Stage.DRAINING]
    each = {Pool.PREFILL: terms.prefill_gpus, Pool.DECODE: terms.decode_gpus, None: terms.standby_gpus}
    return sum(each[pool] for pool in leaving)
