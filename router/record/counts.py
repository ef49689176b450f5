"""What a router has done since it started, as plain numbers. Metrics read them; nothing here knows of metrics."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from router.breakdown import RecoveryKind
from router.errors import Code
from router.lifecycle import Life
from router.placement.policy import Route, WorkerKey
from router.request import Finish, Request
from settings.telemetry.catalog import TTFT_PARTS

_FINISHED = frozenset(finish.value for finish in Finish)
_OUTCOMES = (*sorted(_FINISHED), *(code.name for code in Code if code is not Code.CANCELLED))
_ERRORS = tuple((code.name, stage) for code in Code if code is not Code.CANCELLED for stage in ("refused", "failed"))

_PROMPT_BOUNDS = (256, 1024, 4096, 16384)

K = TypeVar("K")


def _zeros(keys: Iterable[K]) -> Counter[K]:
    """Known from the start: a rate does not see the first event of a series that begins with it."""
    return Counter(dict.fromkeys(keys, 0))


def route_name(route: Route) -> str:
    return "split" if route.split else "local"


def shape_of(request: Request) -> str:
    """What requests have in common that take the same way through a worker; some hundred shapes at most."""
    s = request.sampling
    asked = {
        "penalties": s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0,
        "bias": bool(s.logit_bias),
        "masks": bool(s.allowed_token_ids or s.bad_words),
        "structured": s.structured is not None,
        "logprobs": s.logprobs is not None,
    }
    bound = next((bound for bound in _PROMPT_BOUNDS if len(request.prompt) <= bound), None)
    length = f"over {_PROMPT_BOUNDS[-1]}" if bound is None else f"up to {bound}"
    words = ["greedy" if s.temperature == 0 else "sampled", *(name for name, yes in asked.items() if yes)]
    return f"{' '.join(words)}, prompt {length}"


@dataclass(slots=True)
class RouterCounts:
    outcomes: Counter[str] = field(default_factory=lambda: _zeros(_OUTCOMES))
    errors: Counter[tuple[str, str]] = field(default_factory=lambda: _zeros(_ERRORS))  # status, stage
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)  # route, rule
    recoveries: Counter[str] = field(default_factory=lambda: _zeros(kind.value for kind in RecoveryKind))
    ttft_parts_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TTFT_PARTS, 0.0))
    crashes: Counter[str] = field(default_factory=Counter)  # requests in crashed batches, by shape
    cached_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def crashed(self, request: Request) -> str:
        """Its worker crashed while it computed for it. Returns the request's shape."""
        shape = shape_of(request)
        self.crashes[shape] += 1
        return shape

    def refused(self, code: Code) -> None:
        """Before any work."""
        self.errors[code.name, "refused"] += 1

    @property
    def refused_total(self) -> int:
        return sum(count for (_, stage), count in self.errors.items() if stage == "refused")

    def placed(self, route: Route) -> None:
        self.decisions[route_name(route), route.rule] += 1

    def ended(self, life: Life) -> None:
        """Of several answers to one request the first counts as the request."""
        if life.outcome not in _FINISHED:
            self.errors[life.outcome, "failed"] += 1
        for recovery in life.breakdown.recoveries:
            self.recoveries[recovery.kind.value] += 1
        self.output_tokens += life.answered_tokens
        if life.request.again:
            return
        self.outcomes[life.outcome] += 1
        self.cached_tokens += life.cached_tokens
        self.input_tokens += len(life.request.prompt)
        for part, milliseconds in life.ttft_parts_ms().items():
            self.ttft_parts_s[part] += milliseconds / 1e3


class BusyByRole:
    """Step time by the role that a worker had meanwhile: its own counters go with it from role to role."""

    def __init__(self) -> None:
        self._last: dict[WorkerKey, tuple[float, float]] = {}
        self._sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def look(self, workers: Iterable[tuple[WorkerKey, str, Any]]) -> None:
        """Key, role and load of all that are known now."""
        seen: dict[WorkerKey, tuple[float, float]] = {}
        for key, role, load in workers:
            now = seen[key] = load.input_busy_s, load.output_busy_s
            before, sums = self._last.get(key, now), self._sums[role]
            self._sums[role] = sums[0] + max(0.0, now[0] - before[0]), sums[1] + max(0.0, now[1] - before[1])
        self._last = seen

    def of(self, role: str) -> tuple[float, float]:
        """Input and output."""
        return self._sums[role]


@dataclass(frozen=True, slots=True)
class PoolUse:
    """One pool at one moment. `busy` are the workers' counters of step time, by what it was for."""

    ready: int
    price_per_hour: float
    input_busy_s: float
    output_busy_s: float
    input_share_when_idle: float  # of a pool that has computed nothing


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    pools: Mapping[str, PoolUse]
    tokens: Mapping[str, int]


class CostWindow:
    """What a million tokens cost, over the last `window_s`.

    charged[input] = sum over pools of  ready workers x price_per_hour / 3600 x elapsed_s x input share of the pool
    input share    = input_busy_s / (input_busy_s + output_busy_s) of the window; prefill 1, decode 0 when all were idle
    cost[input]    = charged[input] / input tokens of ended requests x 1,000,000            (output likewise)

    Idle time is paid for, so it is charged: in the proportion of the busy time. Input tokens include those found in a
    cache, which is how a cache makes input cheaper. Ready workers are taken at each look.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._looks: deque[_Look] = deque()
        self._per_million: dict[str, float] = {}
        self._rate: dict[str, float] = {}

    @property
    def per_million(self) -> Mapping[str, float]:
        """By token type; without an entry where no token was counted or nothing has a price."""
        return self._per_million

    @property
    def rate_per_hour(self) -> Mapping[str, float]:
        return self._rate

    def look(self, now: float, pools: Mapping[str, PoolUse], input_tokens: int, output_tokens: int) -> None:
        """Called about once a second."""
        self._looks.append(_Look(now, pools, {"input": input_tokens, "output": output_tokens}))
        while len(self._looks) > 2 and self._looks[1].at <= now - self._window_s:
            self._looks.popleft()
        if len(self._looks) < 2 or not any(pool.price_per_hour for pool in pools.values()):
            return
        looks = list(self._looks)
        first, last = looks[0], looks[-1]
        charged = {"input": 0.0, "output": 0.0}
        for name, pool in last.pools.items():
            share = _input_share(first.pools.get(name), pool)
            paid = sum(
                (b.at - a.at) / 3600 * a.pools[name].ready * a.pools[name].price_per_hour
                for a, b in itertools.pairwise(looks)
                if name in a.pools
            )
            charged["input"] += paid * share
            charged["output"] += paid * (1.0 - share)
        elapsed_h = (last.at - first.at) / 3600
        tokens = {kind: last.tokens[kind] - first.tokens[kind] for kind in charged}
        self._rate = {kind: paid / elapsed_h for kind, paid in charged.items()}
        self._per_million = {kind: charged[kind] / count * 1e6 for kind, count in tokens.items() if count > 0}


def _input_share(before: PoolUse | None, now: PoolUse) -> float:
    # A worker that left takes its counters along: differences below zero say nothing.
    input_s = max(0.0, now.input_busy_s - (before.input_busy_s if before else 0.0))
    output_s = max(0.0, now.output_busy_s - (before.output_busy_s if before else 0.0))
    total = input_s + output_s
    return input_s / total if total > 0 else now.input_share_when_idle
