"""Who decides whether a request is split. Each policy is the router's own decide(), told where it has no choice.

So all of them choose workers alike, with the same view, prefix index and estimates; they differ in what they are named
for. To add one: a class with `name` and `place`, and an entry in `by_name`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Protocol

from router.placement.policy import (
    Placement,
    PolicyParams,
    PoolsView,
    Rejection,
    RequestFacts,
    Route,
    WorkerView,
    decide,
)


class Policy(Protocol):
    @property
    def name(self) -> str: ...

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection: ...


def as_told(
    facts: RequestFacts,
    view: PoolsView,
    decode: WorkerView,
    prefill: WorkerView | None,
    params: PolicyParams,
    now: float,
    rng: random.Random,
) -> Route | Rejection:
    """On these workers, with the estimates of decide(); `prefill` None: computed on `decode`."""
    facts = replace(facts, placement=Placement.LOCAL if prefill is None else Placement.SPLIT)
    pair = PoolsView.of([decode], view.prefill[:1] if prefill is None else [prefill], view.broken_paths)
    return decide(facts, pair, params, now, rng)


class PolicyError(ValueError):
    """No such policy; says which there are."""


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Ours: decide() as the router runs it."""

    name: str = "diptych"

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        return decide(facts, view, params, now, rng)


@dataclass(frozen=True, slots=True)
class Aggregated:
    """Every request runs on one worker."""

    name: str = "aggregated"

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        return decide(replace(facts, placement=Placement.LOCAL), view, params, now, rng)


@dataclass(frozen=True, slots=True)
class AlwaysSplit:
    name: str = "always-split"

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        return decide(replace(facts, placement=Placement.SPLIT), view, params, now, rng)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Local if fewer uncached tokens than `tokens` (and than `share` of the prompt, where given).

    tokens 2048 and share 0.7 is what Dynamo publishes as its conditional disaggregation.
    """

    tokens: int
    share: float = 0.0
    name: str = "threshold"

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        local = decide(replace(facts, placement=Placement.LOCAL), view, params, now, rng)
        if isinstance(local, Rejection):
            return local
        uncached = facts.prompt_tokens - facts.cached_tokens.get(local.decode, 0)
        if uncached < self.tokens and (not self.share or uncached < self.share * facts.prompt_tokens):
            return local
        return decide(replace(facts, placement=Placement.SPLIT), view, params, now, rng)


def by_name(name: str) -> Policy:
    """`threshold:1024` sets its tokens. Raises PolicyError."""
    kind, _, argument = name.partition(":")
    if kind == "threshold" and argument.isdigit():
        return Threshold(int(argument), name=name)
    known: dict[str, Policy] = {
        "diptych": Adaptive(),
        "aggregated": Aggregated(),
        "always-split": AlwaysSplit(),
        "dynamo": Threshold(2048, 0.7, "dynamo"),
    }
    if name not in known:
        raise PolicyError(f"no policy {name!r}; there are {', '.join(known)} and threshold:TOKENS")
    return known[name]
