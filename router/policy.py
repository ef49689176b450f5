"""Where a request runs, and why. Pure: facts, a view, the time and a random source in, a Route or a Rejection out.

    shortlist  holders of the prompt's prefix, workers that served the same session, a few at random
    choose P   the prefill worker that could compute the prompt first
    choose D   for every candidate: the cost of computing there, the cost of taking over from a P; the cheapest has it
    split?     compare the two costs on that D
    fetch?     a prefix that another worker holds is pulled instead of computed where that is quicker
    admit      only what can be answered in time: a request that will miss its deadline is refused before any work

Costs are estimates in milliseconds, never magic lengths (docs/routing.md has one decision in full):

    local   D's backlog + the prompt's own time between D's decodes + what its chunks add beyond the inter-token target,
            for every sequence that runs there
    split   P's backlog + the prompt's own time on P + handing over, behind the bytes that are queued at either end
    both    being late for the first token, and D's step time as it nears the inter-token target

On an idle pair the two are about equal, and a D that is busy with a long prompt is bad luck for whoever comes next.
So a prompt that would hold D's steps for longer than `max_local_stall_ms` may cost `headroom` more when split; one
that would not runs locally without further ado. What was decided last on a D holds until the other is clearly better.
"""

from __future__ import annotations

import enum
import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.errors import Code, Failure
from router.prefix_index import PrefixHits
from router.view import Pool, PoolsView, WorkerKey, WorkerView

__all__ = [
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
    "choose_reader",
    "choose_source",
    "decide",
]

_HANDOFF_MS = 5.0  # announcements, fence, adoption
_LEND_MS = 8.0  # asking for a prefix, announcement, fence
_LAST_CHUNK_SHARE = 0.25  # of the KV moves after the first token; the rest moved while the prompt was computed
_LOOK_AT_ALL = 16  # a pool of so many is looked at in full
_RANDOM = 5  # else so many at random, beside those that hold a prefix
_HOLDERS = 3
_LENDERS = 2  # holders that are asked the estimate whether to pull from them
_SHOWN_OTHERS = 3
_UNKNOWN_ANSWER_TOKENS = 64  # only where the length of answers is not known yet, and only to weigh step times


class Placement(enum.Enum):
    AUTO = "auto"
    LOCAL = "local"
    SPLIT = "split"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """`cached_tokens`: by worker, the prompt tokens that its prefix cache is believed to hold (advisory).

    `time_left_s` to the deadline and `expected_tokens` of the answer decide on admission; recoveries are `admitted`.
    `affine`: workers that served the same session last.
    """

    prompt_tokens: int
    max_tokens: int
    placement: Placement = Placement.AUTO
    cached_tokens: Mapping[WorkerKey, int] = field(default_factory=dict)
    exclude: frozenset[WorkerKey] = frozenset()
    priority: int = 0
    time_left_s: float = math.inf
    expected_tokens: int = 0
    admitted: bool = False
    affine: tuple[WorkerKey, ...] = ()
    waited_ms: float = 0.0  # since it arrived


@dataclass(frozen=True, slots=True)
class PolicyParams:
    """`ttft_target_ms` + `ttft_target_stretch` x the prompt's own time: when the first token is due."""

    itl_target_ms: float = 100.0
    max_local_stall_steps: float = 2.0
    max_backlog_s: float = math.inf
    ttft_target_ms: float = 1000.0
    ttft_target_stretch: float = 2.0
    headroom: float = 0.15
    hysteresis: float = 0.05
    pull_prefixes: bool = False
    due_dates: bool = True  # workers are told when first tokens are due, and put some prompts back under overload

    @property
    def max_local_stall_ms(self) -> float:
        return self.itl_target_ms * self.max_local_stall_steps


class PrefixPull(NamedTuple):
    """Tokens of the prompt whose KV the computing worker pulls from `holder` instead of computing it.

    `wait_ms`: after this the prefix had better be computed (what pulling was to save).
    """

    holder: WorkerKey
    tokens: int
    wait_ms: float


class Alternative(NamedTuple):
    """What else was weighed. `cost_ms` compares with the route's own cost."""

    placement: Placement
    decode: WorkerKey
    prefill: WorkerKey | None
    ttft_ms: float
    cost_ms: float


@dataclass(frozen=True, slots=True)
class Route:
    """`estimates` are what the rule saw, by name with unit."""

    decode: WorkerKey
    prefill: WorkerKey | None
    rule: str
    estimates: Mapping[str, float]
    pull: PrefixPull | None = None
    _chosen: _Option | None = field(default=None, repr=False, compare=False)
    _weighed: _Weighed | None = field(default=None, repr=False, compare=False)

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """What else was weighed; put into words only when somebody asks."""
        if self._chosen is None or self._weighed is None:
            return ()
        return self._weighed.alternatives(self._chosen, split=self.split)

    @property
    def cost_ms(self) -> float:
        """By its own estimates; compares with that of the alternatives."""
        o = self._chosen
        return 0.0 if o is None else (o.split_cost_ms if self.split else o.local_cost_ms) + o.step_cost_ms

    @property
    def split(self) -> bool:
        return self.prefill is not None

    @property
    def computing(self) -> WorkerKey:
        """The worker that computes the prompt."""
        return self.prefill or self.decode


@dataclass(frozen=True, slots=True)
class Rejection:
    failure: Failure


class _Compute(NamedTuple):
    """Computing the prompt on one worker: `cached` tokens need not be, its own or pulled ones included."""

    worker: WorkerView
    held: int  # cached there already
    cached: int
    wait_ms: float
    own_ms: float  # pulling a prefix included
    raw_ttft_ms: float
    ttft_ms: float  # the same, corrected by what such estimates were worth
    late_ms: float
    pull: PrefixPull | None = None
    pull_ms: float = 0.0
    pull_bytes: int = 0


class _Option(NamedTuple):
    """One decode worker with its two ways. `cost_ms` is the cheaper one's, with what D's step time costs the answer."""

    cost_ms: float
    crowded: bool
    decode: WorkerView
    local: _Compute
    local_cost_ms: float
    stall_ms: float
    source: _Compute | None
    split_cost_ms: float  # infinite without a source
    transfer_bytes: int
    transfer_ms: float
    raw_handoff_ms: float
    handoff_ms: float
    itl_ms: float
    step_cost_ms: float


class _Decision:
    """One decision's working values: what several steps below need."""

    __slots__ = (
        "answer_tokens",
        "due_base_ms",
        "earliest_due_ms",
        "facts",
        "held",
        "holders",
        "now",
        "params",
        "rng",
        "view",
    )

    def __init__(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> None:
        self.facts, self.view, self.params, self.now, self.rng = facts, view, params, now, rng
        cached = facts.cached_tokens
        if not cached:
            self.holders = []
        elif isinstance(cached, PrefixHits):
            self.holders = cached.top(2 * _HOLDERS)
        else:
            self.holders = heapq.nlargest(2 * _HOLDERS, cached.items(), key=lambda item: item[1])
        self.held = dict(self.holders)
        self.answer_tokens = facts.expected_tokens or min(facts.max_tokens, _UNKNOWN_ANSWER_TOKENS)
        self.due_base_ms = params.ttft_target_ms - facts.waited_ms
        self.earliest_due_ms = min(self.due_base_ms, facts.time_left_s * 1e3)

    # Candidates.

    def shortlist(self, pool: Pool) -> Sequence[WorkerView]:
        """Prefix holders, the session's workers, and a few at random: a decision must not look at thousands."""
        count, rng = len(pool), self.rng
        exclude = self.facts.exclude
        if count <= _LOOK_AT_ALL:
            start = int(rng.random() * count)
            views = pool[start:] + pool[:start]  # among equals, no favourite
            return [w for w in views if w.key not in exclude] if exclude else views
        found: dict[WorkerKey, WorkerView] = {}
        for key in self.facts.affine:
            view = pool.find(key)
            if view is not None:
                found[key] = view
        for key, _ in self.holders:
            view = pool.find(key)
            if view is not None:
                found[key] = view
                if len(found) >= _HOLDERS:
                    break
        for _ in range(_RANDOM):
            view = pool[int(rng.random() * count)]
            found[view.key] = view
        for key in exclude:
            found.pop(key, None)
        return list(found.values())

    def sources(self, workers: Sequence[WorkerView]) -> list[_Compute]:
        """Prefill candidates by when they could have the first token, soonest first."""
        found = [self.compute(w) for w in workers]
        if self.params.pull_prefixes and self.holders and found:
            # With a prefix pulled, workers of one kind differ by their backlog alone.
            idlest = min(range(len(found)), key=lambda i: found[i].wait_ms)
            found[idlest] = self.with_pull(found[idlest])
        if self.facts.affine:
            found.sort(key=lambda c: c.ttft_ms * self.affinity(c.worker.key))
        else:
            found.sort(key=_by_ttft)
        return found

    def affinity(self, key: WorkerKey) -> float:
        """Within the hysteresis, a session stays where it was."""
        return 1.0 - self.params.hysteresis if key in self.facts.affine else 1.0

    # Estimates.

    def compute(self, w: WorkerView, itl_ms: float = 0.0, chunk_ms: float = 0.0) -> _Compute:
        """`itl_ms`: of the decodes that run beside it, if any, whose steps its chunks of `chunk_ms` share."""
        tokens, held = self.facts.prompt_tokens, 0
        if self.holders:
            held = self.held.get(w.key, -1)
            if held < 0:
                held = self.held[w.key] = self.facts.cached_tokens.get(w.key, 0)
            if held >= tokens:
                held = tokens - 1
        wait_ms = w.wait_ms(self.now)
        own_ms = w.prefill_ms(tokens - held, held)
        if itl_ms and chunk_ms:
            stretch = 1.0 + itl_ms / (own_ms if own_ms < chunk_ms else chunk_ms)
            wait_ms, own_ms = wait_ms * stretch, own_ms * stretch
        raw = wait_ms + own_ms
        ttft_ms = w.ttft(raw)
        return _Compute(w, held, held, wait_ms, own_ms, raw, ttft_ms, self.late_ms(w, ttft_ms))

    def with_pull(self, c: _Compute) -> _Compute:
        """The same with a prefix that another worker holds, if pulling it beats computing it by the headroom."""
        w, tokens = c.worker, self.facts.prompt_tokens
        best, best_gain = c, 0.0
        for key, lent in self.holders[:_LENDERS]:
            holder = None if key == w.key or lent <= c.held else self.view.find(key)
            if holder is None or not self.view.reaches(holder, w):
                continue
            num_bytes = (lent - c.held) // w.block_tokens * w.block_bytes
            queued = max(holder.queued_out_bytes, w.queued_in_bytes)
            pull_ms = w.transfer(_LEND_MS + (num_bytes + queued) / w.pull_rate * 1e3)
            saved_ms = w.prefill_ms(lent - c.held, c.held)
            gain = saved_ms * (1.0 - self.params.headroom) - pull_ms
            if gain > best_gain:
                cached = min(lent, tokens - 1)
                # Waiting for its turn and pulling go on side by side.
                own_ms = max(0.0, pull_ms - c.wait_ms) + w.prefill_ms(tokens - cached, cached)
                raw = c.wait_ms + own_ms
                ttft_ms = w.ttft(raw)
                late_ms = self.late_ms(w, ttft_ms)
                pull = PrefixPull(key, lent, saved_ms)
                best_gain = gain
                best = _Compute(w, c.held, cached, c.wait_ms, own_ms, raw, ttft_ms, late_ms, pull, pull_ms, num_bytes)
        return best

    def due_ms(self, w: WorkerView) -> float:
        """When the first token is due, from now."""
        due = self.due_base_ms + self.params.ttft_target_stretch * w.isolated_ms(self.facts.prompt_tokens)
        return min(due, self.facts.time_left_s * 1e3)

    def late_ms(self, w: WorkerView, ttft_ms: float) -> float:
        if ttft_ms <= self.earliest_due_ms:
            return 0.0
        late = ttft_ms - self.due_ms(w)
        return late if late > 0.0 else 0.0

    def option(self, d: WorkerView, sources: Sequence[_Compute], *, pull: bool = False) -> _Option:
        """`pull`: look also for a prefix to pull when the prompt is computed here."""
        facts, target_ms = self.facts, self.params.itl_target_ms
        itl_ms = d.itl_ms()
        running = d.running_sequences
        chunk_ms = d.prefill_ms(d.chunk_tokens) if running and d.chunk_tokens else 0.0
        local = self.compute(d, itl_ms if running else 0.0, chunk_ms)
        if pull and self.holders and self.params.pull_prefixes:
            local = self.with_pull(local)
        stall_ms = 0.0
        if running:
            # The time above the target in every step that has a chunk of it.
            own_ms = d.prefill_ms(facts.prompt_tokens - local.cached, local.cached)
            step_ms = itl_ms + (chunk_ms if 0.0 < chunk_ms < own_ms else own_ms)
            if step_ms > target_ms:
                stall_ms = local.own_ms * (step_ms - target_ms) / step_ms
        local_cost = local.ttft_ms + stall_ms * running + local.late_ms
        step_cost = self.answer_tokens * itl_ms * (itl_ms / target_ms) ** 2
        crowded = d.free_blocks * d.block_tokens < facts.prompt_tokens + min(self.answer_tokens, facts.max_tokens)

        for source in sources:
            p = source.worker
            if self.view.reaches(p, d):
                moved = -(-max(1, facts.prompt_tokens - local.held) // d.block_tokens) * d.block_bytes
                pull_rate = d.pull_rate
                transfer_ms = moved / pull_rate * 1e3
                # The link is no quicker than its queue; else what the last chunk made is still to move.
                queued_ms = max(p.queued_out_bytes, d.queued_in_bytes) / pull_rate * 1e3
                behind_ms = queued_ms + transfer_ms - source.wait_ms - source.own_ms
                raw_handoff_ms = _HANDOFF_MS + max(transfer_ms * _LAST_CHUNK_SHARE, behind_ms)
                handoff_ms = d.transfer(raw_handoff_ms)
                split_cost = source.ttft_ms + handoff_ms + source.late_ms
                break
        else:
            source, split_cost, moved, transfer_ms, raw_handoff_ms, handoff_ms = None, math.inf, 0, 0.0, 0.0, 0.0

        if facts.placement is Placement.AUTO:
            cost = min(local_cost, split_cost) + step_cost
        else:
            cost = (local_cost if facts.placement is Placement.LOCAL else split_cost) + step_cost
        return _Option(
            cost, crowded, d, local, local_cost, stall_ms, source, split_cost, moved, transfer_ms, raw_handoff_ms,
            handoff_ms, itl_ms, step_cost,
        )  # fmt: skip


def _by_ttft(c: _Compute) -> float:
    return c.ttft_ms


def decide(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
) -> Route | Rejection:
    """Total: whatever the view, there is an answer."""
    decision = _Decision(facts, view, params, now, rng)
    able = _able(facts, decision.shortlist(view.decode))
    if not able:
        remaining = [w for w in view.decode if w.key not in facts.exclude]
        able = _able(facts, remaining)[:_LOOK_AT_ALL]  # the shortlist may have missed them
        if not able:
            return Rejection(_too_large(facts, remaining) if remaining else _nobody(view))
    sources = decision.sources(decision.shortlist(view.prefill))
    options = [decision.option(d, sources) for d in able]
    chosen = min(options, key=_by_cost) if not facts.affine else min(options, key=lambda o: _affine_cost(decision, o))
    if params.pull_prefixes and decision.holders:
        # Likewise: who has least to wait may have the prefix pulled, and be quicker than who holds it.
        idlest = min(options, key=_by_wait)
        if idlest.local.wait_ms + idlest.step_cost_ms < chosen.cost_ms:
            chosen = min(chosen, decision.option(idlest.decode, sources, pull=True), key=_by_cost)
    if chosen.source is None:
        chosen = _any_source(decision, chosen)
    if chosen.source is None:
        route = _without_prefill(decision, chosen, options)
    else:
        route = _compare(decision, chosen, _Weighed(options, sources))
    if isinstance(route, Route) and not facts.admitted:
        return _too_late(facts, route, params) or route
    return route


def _by_cost(o: _Option) -> tuple[bool, float]:
    return o.crowded, o.cost_ms


def _by_wait(o: _Option) -> tuple[bool, float]:
    return o.crowded, o.local.wait_ms + o.step_cost_ms


def _affine_cost(decision: _Decision, o: _Option) -> tuple[bool, float]:
    return o.crowded, o.cost_ms * decision.affinity(o.decode.key)


def choose_source(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random, decode: WorkerKey
) -> Route | None:
    """Another prefill worker for a decode worker that waits for KV. None: computing it there is as quick."""
    waiting = view.decode.find(decode)
    if waiting is None:
        return None
    decision = _Decision(facts, view, params, now, rng)
    sources = decision.sources(decision.shortlist(view.prefill))
    option = _any_source(decision, decision.option(waiting, sources))
    if option.source is None:
        return None
    route = _compare(decision, option, None)
    return route if route.split else None


def choose_reader(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random, source: WorkerKey
) -> WorkerKey | None:
    """Another decode worker that has room for the prompt and can pull from `source`."""
    holder = view.prefill.find(source)
    if holder is None:
        return None
    decision = _Decision(facts, view, params, now, rng)

    def fits(w: WorkerView) -> bool:
        return w.free_blocks * w.block_tokens >= facts.prompt_tokens and view.reaches(holder, w)

    able = [w for w in decision.shortlist(view.decode) if fits(w)]
    able = able or [w for w in view.decode if w.key not in facts.exclude and fits(w)][:_LOOK_AT_ALL]
    if not able:
        return None
    options = [decision.option(w, ()) for w in able]
    return min(options, key=lambda o: (o.crowded, o.step_cost_ms + o.local.wait_ms)).decode.key


def _able(facts: RequestFacts, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Those whose pool could ever hold it."""
    needed = facts.prompt_tokens + min(facts.max_tokens, 1)
    return [w for w in workers if w.total_blocks * w.block_tokens >= needed]


def _any_source(decision: _Decision, option: _Option) -> _Option:
    """The shortlist may have missed every prefill worker that this decode worker can pull from."""
    if option.source is not None:
        return option
    view, exclude = decision.view, decision.facts.exclude
    reached = [w for w in view.prefill if w.key not in exclude and view.reaches(w, option.decode)]
    if not reached:
        return option
    return decision.option(option.decode, decision.sources(reached[:_LOOK_AT_ALL]))


def _compare(decision: _Decision, o: _Option, weighed: _Weighed | None) -> Route:
    facts, params = decision.facts, decision.params
    assert o.source is not None
    split, rule = _rule(facts, params, o)
    return Route(
        o.decode.key,
        o.source.worker.key if split else None,
        rule,
        _estimates(decision, o, o.source if split else o.local),
        (o.source if split else o.local).pull,
        _chosen=o,
        _weighed=weighed,
    )


def _rule(facts: RequestFacts, params: PolicyParams, o: _Option) -> tuple[bool, str]:
    if facts.placement is Placement.LOCAL:
        return False, "pinned_local"
    if facts.placement is Placement.SPLIT:
        return True, "pinned_split"
    local_cost, split_cost = o.local_cost_ms, o.split_cost_ms
    # A prompt that waits behind others on D is no short stall, however short it is itself; nor is one that many feel.
    stall_limit = params.max_local_stall_ms
    if o.local.ttft_ms <= stall_limit and local_cost <= split_cost + stall_limit:
        return False, "cached_on_decode" if o.local.cached > facts.prompt_tokens / 2 else "short_on_decode"
    keep = params.hysteresis * min(local_cost, split_cost)
    leaning = 0.0 if o.decode.last_split is None else keep if o.decode.last_split else -keep
    if split_cost <= local_cost + min(leaning, 0.0):
        return True, "split_is_faster"
    if split_cost <= local_cost + params.headroom * o.local.own_ms + leaning:
        return True, "keeps_decode_free"
    return False, "local_is_faster"


def _estimates(decision: _Decision, o: _Option, computing: _Compute) -> dict[str, float]:
    """By name with unit: shown by `diptych explain`, asserted by tests."""
    local, source, d = o.local, o.source, o.decode
    tokens = decision.facts.prompt_tokens
    estimates = {
        "ttft_ms": computing.ttft_ms,
        "uncorrected_ttft_ms": computing.raw_ttft_ms,
        "uncached_on_decode_tokens": float(tokens - local.cached),
        "local_backlog_ms": local.wait_ms,
        "local_prefill_ms": local.own_ms,
        "local_ttft_ms": local.ttft_ms,
        "local_stall_ms": o.stall_ms,
        "local_cost_ms": o.local_cost_ms,
        "itl_ms": o.itl_ms,
        "uncorrected_itl_ms": d.raw_itl_ms(),
        "step_cost_ms": o.step_cost_ms,
        "answer_ms": max(0, decision.facts.expected_tokens - 1) * o.itl_ms,
        "measured": float(d.prefill_tokens_per_s > 0),
        "max_local_stall_ms": decision.params.max_local_stall_ms,
    }
    if decision.params.due_dates:
        estimates["due_ms"] = decision.due_ms(computing.worker)
    if computing.pull is not None:
        estimates["pull_ms"] = computing.pull_ms
        estimates["pull_bytes"] = float(computing.pull_bytes)
    if source is not None:
        estimates["uncached_on_prefill_tokens"] = float(tokens - source.cached)
        estimates["split_backlog_ms"] = source.wait_ms
        estimates["split_prefill_ms"] = source.own_ms
        estimates["split_ttft_ms"] = source.ttft_ms
        estimates["transfer_bytes"] = float(o.transfer_bytes)
        estimates["transfer_ms"] = o.transfer_ms
        estimates["handoff_ms"] = o.handoff_ms
        estimates["uncorrected_handoff_ms"] = o.raw_handoff_ms
        estimates["split_cost_ms"] = o.split_cost_ms
    return estimates


class _Weighed(NamedTuple):
    options: Sequence[_Option]
    sources: Sequence[_Compute]

    def alternatives(self, chosen: _Option, *, split: bool) -> tuple[Alternative, ...]:
        """The other way on the chosen pair, then the next best decode workers, then prefill workers for the chosen."""
        shown: list[Alternative] = []
        source = chosen.source
        if source is not None:
            shown.append(_local(chosen) if split else _split(chosen, source))
        others = [o for o in self.options if o.decode.key != chosen.decode.key and math.isfinite(o.cost_ms)]
        for o in heapq.nsmallest(_SHOWN_OTHERS, others, key=_by_cost):
            cheaper = o.source is not None and o.split_cost_ms < o.local_cost_ms
            shown.append(_split(o, o.source) if cheaper and o.source is not None else _local(o))
        if source is not None:
            rest = [c for c in self.sources if c.worker.key != source.worker.key]
            shown += [_split(chosen, c) for c in heapq.nsmallest(_SHOWN_OTHERS, rest, key=_by_ttft)]
        return tuple(shown)


def _local(o: _Option) -> Alternative:
    return Alternative(Placement.LOCAL, o.decode.key, None, o.local.ttft_ms, o.local_cost_ms + o.step_cost_ms)


def _split(o: _Option, c: _Compute) -> Alternative:
    cost_ms = c.ttft_ms + c.late_ms + o.handoff_ms + o.step_cost_ms
    return Alternative(Placement.SPLIT, o.decode.key, c.worker.key, c.ttft_ms, cost_ms)


def _without_prefill(decision: _Decision, o: _Option, options: Sequence[_Option]) -> Route | Rejection:
    facts, view = decision.facts, decision.view
    remaining = [w for w in view.prefill if w.key not in facts.exclude]
    if any(w.layout_fingerprint == o.decode.layout_fingerprint for w in remaining):
        rule, why = "paths_broken", "no prefill worker's KV reaches the decode worker at present"
    elif remaining:
        rule, why = "no_compatible_prefill_worker", "no prefill worker shares the decode pool's KV layout"
    else:
        rule, why = "no_prefill_worker", "no prefill worker is ready"
    if facts.placement is Placement.SPLIT:
        return Rejection(
            Failure(
                Code.FAILED_PRECONDITION,
                f"placement SPLIT was asked for and {why}; start one, or ask for AUTO",
                field="placement",
            )
        )
    estimates = _estimates(decision, o, o.local)
    return Route(o.decode.key, None, rule, estimates, o.local.pull, _chosen=o, _weighed=_Weighed(options, ()))


def _too_late(facts: RequestFacts, route: Route, params: PolicyParams) -> Rejection | None:
    """Refused with a hint when to come again, before any prompt is computed for nothing."""
    e = route.estimates
    ttft_ms = e["split_ttft_ms"] if route.split else e["local_ttft_ms"]
    backlog_ms = e["split_backlog_ms"] if route.split else e["local_backlog_ms"]
    total_ms = ttft_ms + e["answer_ms"]
    if total_ms > facts.time_left_s * 1e3 and e["measured"]:
        excess_ms = min(total_ms - facts.time_left_s * 1e3, backlog_ms)
        return Rejection(
            Failure(
                Code.RESOURCE_EXHAUSTED,
                f"the answer would take about {total_ms / 1e3:.3g} s and the deadline is in {facts.time_left_s:.3g} s; "
                "allow more time, ask for fewer tokens, or retry later",
                retry_after_ms=_clamp_ms(excess_ms),
            )
        )
    if backlog_ms > params.max_backlog_s * 1e3 and facts.priority <= 0:
        return Rejection(
            Failure(
                Code.RESOURCE_EXHAUSTED,
                f"prompts for {backlog_ms / 1e3:.3g} s are waiting already, the limit is {params.max_backlog_s:g} s; "
                "retry later, or add workers",
                retry_after_ms=_clamp_ms(backlog_ms - params.max_backlog_s * 1e3),
            )
        )
    return None


def _clamp_ms(ms: float) -> int:
    return int(min(30_000.0, max(200.0, ms)))


def _nobody(view: PoolsView) -> Failure:
    what = "every decode worker has failed this request" if len(view.decode) else "no decode worker is ready"
    return Failure(Code.UNAVAILABLE, f"{what}; start one, or retry when one has registered", retry_after_ms=1000)


def _too_large(facts: RequestFacts, candidates: Sequence[WorkerView]) -> Failure:
    largest = max(w.total_blocks * w.block_tokens for w in candidates)
    return Failure(
        Code.INVALID_ARGUMENT,
        f"the prompt has {facts.prompt_tokens} tokens and the largest decode worker's KV pool holds {largest}; "
        "shorten the prompt, or give decode workers more KV memory",
        field="prompt",
    )
