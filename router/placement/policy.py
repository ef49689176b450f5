"""Where a request runs, and why. Pure: facts, a view, the time and a random source in, a Route or a Rejection out.

    shortlist  holders of the prompt's prefix, workers that served the same session, a few at random
    choose P   the prefill worker that could compute the prompt soonest, with the least harm to who comes next
    choose D   for every candidate: the cost of computing there, the cost of taking over from a P; the cheapest has it
    split?     compare the two costs on that D
    fetch?     a prefix that another worker holds is pulled instead of computed where that is quicker
    admit      only what can be answered in time: a request that will miss its deadline is refused before any work

Costs are estimates in milliseconds, never magic lengths (docs/routing.md has one decision in full):

    local   D's backlog + the prompt's own time between D's decodes + what its chunks add beyond the inter-token target,
            for every sequence that runs there
    split   P's backlog + the prompt's own time on P + handing over, behind the bytes that are queued at either end
    both    being late for the first token, what it delays those who come to the computing worker after it
            (router/placement/newcomers.py), and D's step time as it nears the inter-token target

On an idle pair the two are about equal, and a D that is busy with a long prompt is bad luck for whoever comes next.
So a prompt that would hold D's steps for longer than `max_local_stall_ms` may cost `headroom` more when split; one
that would not runs locally without further ado. What was decided last on a D holds until the other is clearly better.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from router.placement.estimates import LOOK_AT_ALL, Option, Weighed, Weighing, by_cost
from router.placement.refusals import nobody, too_large, too_late
from router.placement.route import Alternative, Placement, PolicyParams, PrefixPull, Rejection, RequestFacts, Route
from router.placement.rule import compare, without_prefill
from router.placement.view import Pool, PoolsView, WorkerKey, WorkerView

BESIDE = "beside_its_prompt"

__all__ = [
    "BESIDE",
    "Alternative",
    "Placement",
    "PolicyParams",
    "Pool",
    "PoolsView",
    "PrefixPull",
    "Rejection",
    "RequestFacts",
    "Route",
    "WorkerKey",
    "WorkerView",
    "choose_beside",
    "choose_reader",
    "choose_source",
    "decide",
]


def decide(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
) -> Route | Rejection:
    """Total: whatever the view, there is an answer."""
    decision = Weighing(facts, view, params, now, rng)
    longest = facts.max_tokens  # a worker refuses what its pool might not hold in the end
    able = _able(facts, longest, decision.shortlist(view.decode))
    if not able:
        remaining = [w for w in view.decode if w.key not in facts.exclude]  # the shortlist may have missed them
        able = (_able(facts, longest, remaining) or _able(facts, min(longest, 1), remaining))[:LOOK_AT_ALL]
        if not able:
            return Rejection(too_large(facts, remaining) if remaining else nobody(view))
    sources = decision.sources(decision.shortlist(view.prefill))
    options = decision.options(able, sources)
    chosen = min(options, key=by_cost) if not facts.affine else min(options, key=lambda o: _affine_cost(decision, o))
    if params.pull_prefixes and decision.holders:
        # Likewise: who has least to wait may have the prefix pulled, and be quicker than who holds it.
        idlest = min(options, key=_by_wait)
        if idlest.local.wait_ms + idlest.step_cost_ms < chosen.cost_ms:
            chosen = min(chosen, decision.option_with_pull(idlest), key=by_cost)
    if chosen.source is None:
        chosen = _any_source(decision, chosen)
    if chosen.source is None:
        route = without_prefill(decision, chosen, options)
    else:
        route = compare(decision, chosen, Weighed(options, sources))
    if isinstance(route, Route) and not facts.admitted:
        return too_late(facts, route, params) or route
    return route


def _by_wait(o: Option) -> tuple[bool, float]:
    return o.crowded, o.local.wait_ms + o.step_cost_ms


def _affine_cost(decision: Weighing, o: Option) -> tuple[bool, float]:
    return o.crowded, o.cost_ms * decision.affinity(o.decode.key)


def choose_source(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random, decode: WorkerKey
) -> Route | None:
    """Another prefill worker for a decode worker that waits for KV. None: computing it there is as quick."""
    waiting = view.decode.find(decode)
    if waiting is None:
        return None
    decision = Weighing(facts, view, params, now, rng)
    sources = decision.sources(decision.shortlist(view.prefill))
    option = _any_source(decision, decision.options((waiting,), sources)[0])
    if option.source is None:
        return None
    route = compare(decision, option, None)
    return route if route.split else None


def choose_reader(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random, source: WorkerKey
) -> WorkerKey | None:
    """Another decode worker that has room for the prompt and can pull from `source`."""
    holder = view.prefill.find(source)
    if holder is None:
        return None
    decision = Weighing(facts, view, params, now, rng)

    def fits(w: WorkerView) -> bool:
        return w.free_tokens >= facts.prompt_tokens and view.reaches(holder, w)

    able = [w for w in decision.shortlist(view.decode) if fits(w)]
    able = able or [w for w in view.decode if w.key not in facts.exclude and fits(w)][:LOOK_AT_ALL]
    if not able:
        return None
    options = decision.options(able, ())
    return min(options, key=lambda o: (o.crowded, o.step_cost_ms + o.local.wait_ms)).decode.key


def choose_beside(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random, worker: WorkerKey
) -> Route | None:
    """On a decode worker that has the prompt's KV, because another answer to it runs there. None: not on that one."""
    holder = view.decode.find(worker)
    if holder is None or worker in facts.exclude or holder.free_blocks < 1:
        return None
    held = (facts.prompt_tokens - 1) // holder.block_tokens * holder.block_tokens
    facts = replace(facts, placement=Placement.LOCAL, cached_tokens={worker: held})
    route = decide(facts, PoolsView.of((holder,), ()), params, now, rng)
    return replace(route, rule=BESIDE, pull=None) if isinstance(route, Route) else None


def _able(facts: RequestFacts, answer_tokens: int, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Those whose pool could ever hold it."""
    needed = facts.prompt_tokens + answer_tokens
    return [w for w in workers if w.total_tokens >= needed]


def _any_source(decision: Weighing, option: Option) -> Option:
    """The shortlist may have missed every prefill worker that this decode worker can pull from."""
    if option.source is not None:
        return option
    view, exclude = decision.view, decision.facts.exclude
    reached = [w for w in view.prefill if w.key not in exclude and view.reaches(w, option.decode)]
    if not reached:
        return option
    return decision.options((option.decode,), decision.sources(reached[:LOOK_AT_ALL]))[0]
