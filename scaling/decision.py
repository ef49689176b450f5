"""What a scaling decision answers: counts, moves, why, and what else was weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another pair of counts. `*_strain`: load as a share of capacity, spare for chance included; above 1 is short."""

    prefill: int
    decode: int
    prefill_strain: float
    decode_strain: float
    what: str  # how it would be reached: shift, wake, start, stop, nothing
    takes_s: float
    verdict: str  # why it was not taken


@dataclass(frozen=True, slots=True)
class Decision:
    """The counts of both pools and of standbys from now on; the moves lead there from the counts before.

    `shifted`: workers that change from decode to prefill (negative: the other way). They are in no other count.
    """

    at: float
    prefill: int
    decode: int
    standbys: int
    rule: str
    why: str
    shifted: int = 0
    woken: int = 0
    started: int = 0
    stopped: int = 0
    withdrawn: int = 0
    dry_run: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()

    @property
    def changes(self) -> bool:
        return bool(self.shifted or self.woken or self.started or self.stopped or self.withdrawn)

    @property
    def pair(self) -> tuple[int, int]:
        return self.prefill, self.decode
