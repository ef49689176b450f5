"""What became of a request, and of many: attainment and goodput.

A request counts when TTFT *and* inter-token latency met their targets; refused, failed and unfinished ones are misses.
Two readings of inter-token latency, because they rank policies differently: the mean (DistServe's TPOT) and the mean of
the longest tenth of the gaps (Mooncake's TBT). The gap between the tokens of two workers counts in both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("mean", "worst")
WARM_UP_SHARE = 0.1


@dataclass(slots=True, eq=False)
class Outcome:
    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_target_s: float
    rule: str = ""
    split: bool = False
    refused: bool = False
    moves: int = 0
    cached_tokens: int = 0
    decode: int = -1
    prefill: int = -1
    predicted_ttft_ms: float = 0.0
    first_token_s: float = -1.0
    handoff_gap_ms: float = 0.0
    finished_s: float = -1.0
    worst_gap_ms: float = 0.0

    @property
    def finished(self) -> bool:
        return self.finished_s >= 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_ms(self) -> float:
        """Mean gap; 0 for an answer of one token."""
        if self.output_tokens < 2:
            return 0.0
        return (self.finished_s - self.first_token_s) * 1e3 / (self.output_tokens - 1)

    def met(self, itl_target_ms: float, metric: str) -> bool:
        if not self.finished or self.ttft_s > self.ttft_target_s:
            return False
        return (self.tpot_ms if metric == "mean" else self.worst_gap_ms) <= itl_target_ms


def counted(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Without the warm-up."""
    return outcomes[int(len(outcomes) * WARM_UP_SHARE) :]


def attainment(outcomes: Sequence[Outcome], itl_target_ms: float, metric: str) -> float:
    part = counted(outcomes)
    return sum(o.met(itl_target_ms, metric) for o in part) / len(part) if part else 0.0


def highest_rate(
    attained: Callable[[float], float], guess: float, *, goal: float = 0.9, steps: int = 4, widest: int = 7
) -> tuple[float, list[tuple[float, float]]]:
    """The rate at which attainment falls through `goal`, and the points looked at.

    Doubles or halves from `guess` until the goal lies between two rates, halves that interval `steps` times, and
    interpolates. 0: not even the lowest rate tried attains it.
    """
    points: dict[float, float] = {}

    def look(rate: float) -> bool:
        if rate not in points:
            points[rate] = attained(rate)
        return points[rate] >= goal

    low = high = guess
    for _ in range(widest):
        if look(low):
            break
        high, low = low, low / 1.5
    else:
        return 0.0, sorted(points.items())
    if high == low:
        for _ in range(widest):
            high = low * 1.5
            if not look(high):
                break
            low = high
        else:
            return low, sorted(points.items())
    for _ in range(steps):
        middle = (low * high) ** 0.5
        if look(middle):
            low = middle
        else:
            high = middle
    share = (points[low] - goal) / max(1e-9, points[low] - points[high])
    return low + (high - low) * min(1.0, max(0.0, share)), sorted(points.items())


def summary(outcomes: Sequence[Outcome], itl_target_ms: float) -> dict[str, Any]:
    """Figures of a run, warm-up left out."""
    part = counted(outcomes)
    done = [o for o in part if o.finished]
    span_s = (max(o.arrival_s for o in part) - min(o.arrival_s for o in part)) if len(part) > 1 else 0.0
    rate = (len(part) - 1) / span_s if span_s > 0 else 0.0
    shares = {m: attainment(outcomes, itl_target_ms, m) for m in METRICS}
    split = [o for o in done if o.split]
    return {
        "requests": len(part),
        "finished": len(done),
        "refused": sum(o.refused for o in part),
        "requests_per_s": rate,
        "attainment": shares,
        "goodput_requests_per_s": {m: rate * s for m, s in shares.items()},
        "split_share": len(split) / len(done) if done else 0.0,
        "cached_share": sum(o.cached_tokens for o in done) / max(1, sum(o.prompt_tokens for o in done)),
        "moves": sum(o.moves for o in part),
        "ttft_ms": quantiles([o.ttft_s * 1e3 for o in done]),
        "tpot_ms": quantiles([o.tpot_ms for o in done if o.output_tokens > 1]),
        "worst_gap_ms": quantiles([o.worst_gap_ms for o in done if o.output_tokens > 1]),
        "handoff_gap_ms": quantiles([o.handoff_gap_ms for o in split]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    result = {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 90, 99)}
    return result | {"mean": statistics.fmean(ordered)}
