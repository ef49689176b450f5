"""What a decision remembers from the ones before: an explicit value, given in and handed back."""

from __future__ import annotations

from dataclasses import dataclass, field

from scaling.demand import Capacity, Sample
from scaling.peaks import Peak


@dataclass(frozen=True, slots=True)
class ByHand:
    """Counts that somebody set; kept until then."""

    prefill_until: float = -1.0
    decode_until: float = -1.0


@dataclass(frozen=True, slots=True)
class ScalingState:
    """Times are on the clock of `Observation.now`; None: not so at present."""

    history: tuple[Sample, ...] = ()
    capacity: Capacity = field(default_factory=Capacity)
    start_s: float = 0.0  # as measured; 0: never
    told: tuple[int, int] | None = None  # (prefill, decode) as this policy decided last
    told_from: tuple[int, int] = (0, 0)  # and what it was before
    told_at: float = float("-inf")
    by_hand: ByHand = field(default_factory=ByHand)
    short_since: float | None = None  # more workers have been wanted since
    ample_since: float | None = None  # fewer workers have been enough since
    # A stop that was followed by a start too soon was a mistake: the next one waits longer.
    hold_s: float = 0.0  # what that has taught; it fades
    hold_learned_at: float = float("-inf")
    stopped_at: float = float("-inf")
    ample_before_stop: float = float("-inf")  # since when fewer had been enough, at that stop
    peaks: tuple[Peak, ...] = ()  # the last ones that came too fast
    unsettled_at: float = float("-inf")  # when somebody who was asked for was last not at work
    last_shift: float = field(default=float("-inf"))
    last_request: float | None = None
    starting_at: float = float("-inf")  # when a worker of some pool was last not ready yet
    refused_until: float = float("-inf")  # what could not be placed is not asked for again before
    refusals: int = 0
    placed_workers: int = 0  # the most that have had a place since the last refusal
