"""The policy as a life in trouble asks it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from router.errors import RequestRefused
from router.placement.cluster import Cluster
from router.placement.lots import lot_of
from router.placement.mixing import Mixing
from router.placement.policy import (
    Placement,
    PolicyParams,
    Rejection,
    RequestFacts,
    Route,
    WorkerKey,
    choose_beside,
    choose_reader,
    choose_source,
)
from router.placement.revisions import Revisions
from router.request import LegStart, Request
from router.retry import RetryBudget


class Planner:
    """A request stays within its revision, wherever it goes on, and on workers that have its adapter."""

    def __init__(
        self,
        cluster: Cluster,
        params: PolicyParams,
        budget: RetryBudget,
        decide: Callable[[RequestFacts], Route | Rejection],
        revisions: Revisions,
        rng: random.Random,
        clock: Callable[[], float],
        secret: str,
    ) -> None:
        self._secret = secret
        self._cluster = cluster
        self._params = params
        self._decide = decide
        self._revisions = revisions
        self._rng = rng
        self._clock = clock
        self.budget = budget
        self.may_retry = budget.may_retry
        self.retried = budget.retried

    def _facts(self, request: Request, num_emitted: int, exclude: frozenset[WorkerKey]) -> RequestFacts:
        return RequestFacts(
            len(request.prompt) + num_emitted,
            max(1, request.sampling.room_tokens - num_emitted),
            self.placement(request, Placement.AUTO),
            exclude=exclude | self._not_for(request, request.revision),
            cached_tokens=self.cached_tokens(request, num_emitted),
            admitted=True,
            time_left_s=request.deadline - self._clock(),
            lot=self.lot(request),
            load_ms=self._revisions.load_ms(request.adapter),
        )

    def lot(self, request: Request) -> float:
        return lot_of(request.request_id, self._secret) if self._params.overload_protect else 1.0

    def placement(self, request: Request, asked: Placement) -> Placement:
        """A prompt that is only scored has nothing to hand over; that of a search, a reader with windows would compute
        once more. One token short of the context limit it is not handed over: the token that is sampled ends it.
        """
        if not request.sampling.max_tokens:
            return Placement.LOCAL
        if request.sampling.beams is None:
            return asked
        limits = [entry.info.context_limit_tokens for entry in self._cluster.workers.values()]
        if len(request.prompt) + 1 >= min(limits, default=len(request.prompt) + 2):
            return Placement.LOCAL
        if asked is Placement.AUTO:
            whole = all(self.keeps_all(worker) for worker in self._cluster.workers)
            return Placement.AUTO if whole else Placement.LOCAL
        return asked

    def _not_for(self, request: Request, revision: str) -> frozenset[WorkerKey]:
        sampling = request.sampling
        return self._revisions.others(revision) | self._revisions.unable(
            masks_tokens=sampling.masks_tokens,
            scores_prompts=sampling.prompt_logprobs is not None,
            beams=sampling.beams is not None,
            adapter=request.adapter,
        )

    def cached_tokens(self, request: Request, num_emitted: int) -> Mapping[WorkerKey, int]:
        """By worker, the leading prompt tokens that need not be computed there."""
        if request.needs_whole_prompt and not num_emitted:
            return {}
        return self._revisions.cached_tokens(request.prompt, request.cache_salt, request.adapter)

    def first(self, request: Request, facts: RequestFacts) -> tuple[Request, Route]:
        """Of a request that came: with the revision that it stays with. Raises RequestRefused."""
        refusal: Rejection | None = None
        if request.adapter:
            facts = replace(facts, load_ms=self._revisions.load_ms(request.adapter))
        for revision in self._revisions.in_turn(request.revision):
            exclude = self._not_for(request, revision)
            route = self._decide(replace(facts, exclude=exclude) if exclude else facts)
            if isinstance(route, Route):
                return replace(request, revision=revision), route
            refusal = refusal or route
        assert refusal is not None
        raise RequestRefused(refusal.failure)

    def place(self, request: Request, num_emitted: int, exclude: frozenset[WorkerKey]) -> Route | Rejection:
        return self._decide(self._facts(request, num_emitted, exclude))

    def beside(self, request: Request, worker: WorkerKey) -> Route | Rejection:
        """Where another answer to its prompt runs; like any other request if it cannot be there."""
        facts = RequestFacts(
            len(request.prompt),
            request.sampling.max_tokens,
            exclude=self._not_for(request, request.revision),
            admitted=True,
            time_left_s=request.deadline - self._clock(),
        )  # who else has the prompt cached is of no interest, and takes time to find out
        route = choose_beside(facts, self._cluster.view(), self._params, self._clock(), self._rng, worker)
        return self.place(request, 0, frozenset()) if route is None else route

    def has_whole_blocks(self, worker: WorkerKey, request: Request) -> bool:
        """Of the prompt, before its last token: something to share there."""
        entry = self._cluster.workers.get(worker)
        return entry is not None and len(request.prompt) > entry.info.block_tokens

    def keeps_all(self, worker: WorkerKey) -> bool:
        """Whether a prompt that was handed over is found in the reader's cache. (Of windows and states only the end is
        there.)
        """
        entry = self._cluster.workers.get(worker)
        return entry is None or not (entry.info.fixed_bytes or entry.info.kept_tokens)

    def mixed(self, start: LegStart, worker: WorkerKey, mix: Mixing, *, beside: bool) -> LegStart:
        """What a leg is told where schemes of weights mix."""
        if not self._cluster.mixed:
            return start
        workers = self._cluster.workers
        source = None if start.pull is None else workers.get(start.pull[1])
        mixed_kv = mix.starts(
            workers[worker].info,
            None if source is None else source.info,
            serves=start.serve_handoff_id,
            pulls="" if start.pull is None else start.pull[0],
            num_emitted=len(start.emitted),
            resumed=bool(start.request.emitted),
            beside=beside,
        )
        return replace(start, mixed_kv=mixed_kv)

    def unlike(self, layout: str) -> frozenset[WorkerKey]:
        if not self._cluster.mixed or not layout:
            return frozenset()
        return frozenset(k for k, e in self._cluster.workers.items() if e.info.layout_fingerprint != layout)

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
