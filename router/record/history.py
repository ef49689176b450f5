"""What was decided about requests and what came of it: kept small, for those who ask later (`diptych explain`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from router.breakdown import Breakdown
from router.legs import Timeline
from router.lifecycle import Life
from router.placement.policy import Alternative, PrefixPull, Route
from router.placement.view import WorkerKey

_REMEMBERED = 1024
_MIN_ITL_STEPS = 6  # fewer say nothing about the time between tokens


@dataclass(frozen=True, slots=True)
class Decided:
    """A Route in words that outlive the views it was made from."""

    decode: WorkerKey
    prefill: WorkerKey | None
    rule: str
    estimates: Mapping[str, float]
    cost_ms: float
    pull: PrefixPull | None
    alternatives: tuple[Alternative, ...]

    @classmethod
    def of(cls, route: Route) -> Decided:
        alternatives = tuple(sorted(route.alternatives, key=lambda a: a.cost_ms))
        return cls(route.decode, route.prefill, route.rule, route.estimates, route.cost_ms, route.pull, alternatives)

    @property
    def split(self) -> bool:
        return self.prefill is not None


@dataclass(frozen=True, slots=True)
class Prediction:
    name: str
    predicted_ms: float
    actual_ms: float


@dataclass(frozen=True, slots=True)
class Explained:
    request_id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    outcome: str
    recoveries: int
    arrived: float
    times: Timeline
    kv_early_share: float
    adopt_ms: float
    decisions: tuple[Decided, ...]
    predictions: tuple[Prediction, ...]
    breakdown: Breakdown


def explain(life: Life, adopted_ms: float | None) -> Explained:
    """`adopted_ms`: from the first token to the word that decode had the KV; None: no such word."""
    request = life.request
    return Explained(
        request.request_id,
        len(request.prompt),
        len(life.emitted),
        life.cached_tokens,
        life.outcome,
        life.recoveries,
        request.arrived,
        life.times,
        life.kv_early_share,
        life.adopt_ms,
        tuple(Decided.of(route) for route in life.routes),
        tuple(predictions(life, adopted_ms)),
        life.breakdown,
    )


def predictions(life: Life, adopted_ms: float | None) -> list[Prediction]:
    """Of the first placement, as far as it held and as far as it has happened."""
    times, estimates = life.times, life.routes[0].estimates
    if life.moved or times.dispatched is None or times.first_token is None:
        return []
    found = [Prediction("ttft_ms", estimates["ttft_ms"], (times.first_token - times.dispatched) * 1e3)]
    if adopted_ms is not None:
        found.append(Prediction("handoff_ms", estimates["handoff_ms"], adopted_ms))
    actual_ms = itl_ms(life)
    if actual_ms is not None:
        found.append(Prediction("itl_ms", estimates["itl_ms"], actual_ms))
    return found


def itl_ms(life: Life) -> float | None:
    """Mean time between tokens from the second on; None: too few."""
    times, steps = life.times, len(life.emitted) - len(life.request.emitted) - 2
    if steps < _MIN_ITL_STEPS or times.second_token is None or times.last_token is None:
        return None
    return (times.last_token - times.second_token) * 1e3 / steps


class History:
    """The requests that ended last."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._ended: OrderedDict[str, Explained] = OrderedDict()

    def add(self, explained: Explained) -> None:
        self._ended[explained.request_id] = explained
        self._ended.move_to_end(explained.request_id)
        while len(self._ended) > self._remembered:
            self._ended.popitem(last=False)

    def get(self, request_id: str) -> Explained | None:
        return self._ended.get(request_id)

    def newest(self) -> Explained | None:
        return next(reversed(self._ended.values()), None)

    def __len__(self) -> int:
        return len(self._ended)
