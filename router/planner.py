"""The policy as a life in trouble asks it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from router.placement.cluster import Cluster
from router.placement.policy import (
    PolicyParams,
    Rejection,
    RequestFacts,
    Route,
    WorkerKey,
    choose_reader,
    choose_source,
)
from router.request import Request
from router.retry import RetryBudget


class Planner:
    """`cached_tokens`: of a request, the prompt tokens that each worker's cache is believed to hold."""

    def __init__(
        self,
        cluster: Cluster,
        params: PolicyParams,
        budget: RetryBudget,
        decide: Callable[[RequestFacts], Route | Rejection],
        cached_tokens: Callable[[Request], Mapping[WorkerKey, int]],
        rng: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._params = params
        self._decide = decide
        self._cached_tokens = cached_tokens
        self._rng = rng
        self._clock = clock
        self.budget = budget
        self.may_retry = budget.may_retry
        self.retried = budget.retried

    def _facts(self, request: Request, num_emitted: int, exclude: frozenset[WorkerKey]) -> RequestFacts:
        return RequestFacts(
            len(request.prompt) + num_emitted,
            request.sampling.max_tokens - num_emitted,
            exclude=exclude,
            cached_tokens=self._cached_tokens(request),
            admitted=True,
            time_left_s=request.deadline - self._clock(),
        )

    def place(self, request: Request, num_emitted: int, exclude: frozenset[WorkerKey]) -> Route | Rejection:
        return self._decide(self._facts(request, num_emitted, exclude))

    def another_source(
        self, request: Request, num_emitted: int, decode: WorkerKey, kept_tokens: int, exclude: frozenset[WorkerKey]
    ) -> Route | None:
        facts = self._facts(request, num_emitted, exclude)
        kept = {**facts.cached_tokens, decode: max(kept_tokens, facts.cached_tokens.get(decode, 0))}
        facts = replace(facts, cached_tokens=kept)
        return choose_source(facts, self._cluster.view(), self._params, self._clock(), self._rng, decode)

    def another_reader(self, request: Request, source: WorkerKey, exclude: frozenset[WorkerKey]) -> WorkerKey | None:
        facts = self._facts(request, 0, exclude)
        return choose_reader(facts, self._cluster.view(), self._params, self._clock(), self._rng, source)

    def backoff_s(self, waits: int) -> float:
        return min(1.0, 0.05 * 2**waits) * self._rng.uniform(0.5, 1.5)
