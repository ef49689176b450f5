"""Where a request runs, and why. Pure: facts, a view and a random source in, a Route or a Rejection out.

    choose D   the decode worker that could start soonest and has room
    split?     compare the request's cost on D alone with its cost over P and D
    choose P   the prefill worker with the shortest backlog in seconds, over a path that is not broken
    admit      only what can be answered in time: a request that will miss its deadline is refused before any work

Costs are estimates in milliseconds, never magic lengths:

    local   D's prefill backlog + the prompt's own time on D + what its chunks do to the decodes that run on D
    split   P's backlog + the prompt's own time on P + handing over

On an idle pair the two are about equal, and a D that is busy with a long prompt is bad luck for whoever comes next.
So a prompt that would hold D's steps for longer than `max_local_stall_ms` may cost `_HEADROOM` more when split; one
that would not runs locally without further ado.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.errors import Code, Failure

# Used until a worker has measured its own. Deliberately modest: they hold for the first requests only.
_PREFILL_TOKENS_PER_S = 1000.0
_PULL_BYTES_PER_S = 1e9
_HANDOFF_MS = 5.0  # announcements, fence, adoption
_LAST_CHUNK_SHARE = 0.25  # of the KV moves after the first token; the rest moved while the prompt was computed
_HEADROOM = 0.15
_SHORTLIST = 16


class Placement(enum.Enum):
    AUTO = "auto"
    LOCAL = "local"
    SPLIT = "split"


@dataclass(frozen=True, slots=True, order=True)
class WorkerKey:
    """One incarnation of a worker."""

    worker_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What a decision sees of one worker: its last report, and what this router has promised since."""

    key: WorkerKey
    total_blocks: int
    free_blocks: int  # less what is promised
    block_tokens: int
    block_bytes: int
    backlog_tokens: int  # prompt tokens ahead of a new one, promised ones included
    running_sequences: int
    step_ms: float
    prefill_tokens_per_s: float  # 0: not measured yet
    pull_bytes_per_s: float
    layout_fingerprint: str = ""

    @property
    def prefill_rate(self) -> float:
        return self.prefill_tokens_per_s or _PREFILL_TOKENS_PER_S

    def prefill_ms(self, tokens: int) -> float:
        return tokens / self.prefill_rate * 1e3


@dataclass(frozen=True, slots=True)
class PoolsView:
    """`broken_paths`: (prefill worker, decode worker) between which KV does not move at present."""

    decode: Sequence[WorkerView]
    prefill: Sequence[WorkerView]
    broken_paths: frozenset[tuple[WorkerKey, WorkerKey]] = frozenset()

    def sources_for(self, decode: WorkerView, exclude: frozenset[WorkerKey]) -> list[WorkerView]:
        """Prefill workers whose KV this decode worker can pull."""
        return [
            w
            for w in self.prefill
            if w.layout_fingerprint == decode.layout_fingerprint
            and w.key not in exclude
            and (w.key, decode.key) not in self.broken_paths
        ]


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """`cached_tokens`: by worker, the prompt tokens that its prefix cache is believed to hold (advisory).

    `time_left_s` to the deadline and `expected_tokens` of the answer decide on admission; recoveries are `admitted`.
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


@dataclass(frozen=True, slots=True)
class PolicyParams:
    itl_target_ms: float = 100.0
    max_local_stall_steps: float = 2.0
    max_backlog_s: float = math.inf

    @property
    def max_local_stall_ms(self) -> float:
        return self.itl_target_ms * self.max_local_stall_steps


@dataclass(frozen=True, slots=True)
class Route:
    """`estimates` are what the rule saw, by name with unit."""

    decode: WorkerKey
    prefill: WorkerKey | None
    rule: str
    estimates: Mapping[str, float]

    @property
    def split(self) -> bool:
        return self.prefill is not None


@dataclass(frozen=True, slots=True)
class Rejection:
    failure: Failure


def decide(facts: RequestFacts, view: PoolsView, params: PolicyParams, rng: random.Random) -> Route | Rejection:
    """Total: whatever the view, there is an answer."""
    route = _route(facts, view, params, rng)
    if isinstance(route, Route) and not facts.admitted:
        return _too_late(facts, route, params) or route
    return route


def choose_source(
    facts: RequestFacts, view: PoolsView, params: PolicyParams, rng: random.Random, decode: WorkerKey
) -> Route | None:
    """Another prefill worker for a decode worker that waits for KV. None: computing it there is as quick."""
    waiting = next((w for w in view.decode if w.key == decode), None)
    sources = [] if waiting is None else view.sources_for(waiting, facts.exclude)
    if waiting is None or not sources:
        return None
    route = _compare(facts, waiting, _choose_prefill(facts, sources, rng), params)
    return route if route.split else None


def choose_reader(facts: RequestFacts, view: PoolsView, rng: random.Random, source: WorkerKey) -> WorkerKey | None:
    """Another decode worker that has room for the prompt and can pull from `source`."""
    able = [
        w
        for w in view.decode
        if w.key not in facts.exclude
        and w.free_blocks * w.block_tokens >= facts.prompt_tokens
        and any(s.key == source for s in view.sources_for(w, frozenset()))
    ]
    chosen = _choose_decode(facts, able, rng)
    return None if chosen is None else chosen.key


def _route(facts: RequestFacts, view: PoolsView, params: PolicyParams, rng: random.Random) -> Route | Rejection:
    decodes = [w for w in view.decode if w.key not in facts.exclude]
    if not decodes:
        what = "every decode worker has failed this request" if view.decode else "no decode worker is ready"
        return Rejection(
            Failure(Code.UNAVAILABLE, f"{what}; start one, or retry when one has registered", retry_after_ms=1000)
        )
    decode = _choose_decode(facts, decodes, rng)
    if decode is None:
        return Rejection(_too_large(facts, decodes))
    sources = view.sources_for(decode, facts.exclude)
    if not sources:
        return _without_prefill(facts, decode, view)
    return _compare(facts, decode, _choose_prefill(facts, sources, rng), params)


def _choose_prefill(facts: RequestFacts, sources: Sequence[WorkerView], rng: random.Random) -> WorkerView:
    return min(
        _shortlist(sources, facts, rng),
        key=lambda w: w.prefill_ms(w.backlog_tokens + facts.prompt_tokens - facts.cached_tokens.get(w.key, 0)),
    )


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


def _choose_decode(facts: RequestFacts, candidates: Sequence[WorkerView], rng: random.Random) -> WorkerView | None:
    """The soonest start among those with room; with room nowhere, the soonest start of all that could ever hold it."""
    possible = [
        w for w in candidates if w.total_blocks * w.block_tokens >= facts.prompt_tokens + min(facts.max_tokens, 1)
    ]
    if not possible:
        return None
    shortlist = _shortlist(possible, facts, rng)

    def cost(w: WorkerView) -> tuple[bool, float]:
        own = facts.prompt_tokens - facts.cached_tokens.get(w.key, 0)
        crowded = w.free_blocks * w.block_tokens < facts.prompt_tokens
        return crowded, w.prefill_ms(w.backlog_tokens + own) + w.step_ms * w.running_sequences

    return min(shortlist, key=cost)


def _shortlist(candidates: Sequence[WorkerView], facts: RequestFacts, rng: random.Random) -> list[WorkerView]:
    """Prefix holders and a few at random: a decision must not cost a look at thousands of workers."""
    if len(candidates) <= _SHORTLIST:
        shuffled = list(candidates)
        rng.shuffle(shuffled)  # among equals, no favourite
        return shuffled
    holders = [w for w in candidates if w.key in facts.cached_tokens]
    return holders[:_SHORTLIST] + rng.sample(list(candidates), _SHORTLIST)


def _without_prefill(facts: RequestFacts, decode: WorkerView, view: PoolsView) -> Route | Rejection:
    others = [w for w in view.prefill if w.key not in facts.exclude]
    alike = [w for w in others if w.layout_fingerprint == decode.layout_fingerprint]
    if alike:
        rule, why = "paths_broken", "no prefill worker's KV reaches the decode worker at present"
    elif others:
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
    return Route(decode.key, None, rule, _local_estimates(facts, decode))


def _local_estimates(facts: RequestFacts, decode: WorkerView) -> dict[str, float]:
    uncached = max(1, facts.prompt_tokens - facts.cached_tokens.get(decode.key, 0))
    own_ms = decode.prefill_ms(uncached)
    return {
        "uncached_on_decode_tokens": uncached,
        "local_backlog_ms": decode.prefill_ms(decode.backlog_tokens),
        "local_prefill_ms": own_ms,
        "local_ttft_ms": decode.prefill_ms(decode.backlog_tokens) + own_ms,
        "local_stall_ms": own_ms if decode.running_sequences else 0.0,
        "answer_ms": max(0, facts.expected_tokens - 1) * decode.step_ms,
        "measured": float(decode.prefill_tokens_per_s > 0),
    }


def _compare(facts: RequestFacts, decode: WorkerView, prefill: WorkerView, params: PolicyParams) -> Route:
    estimates = _local_estimates(facts, decode)
    uncached_on_p = max(1, facts.prompt_tokens - facts.cached_tokens.get(prefill.key, 0))
    blocks = -(-int(estimates["uncached_on_decode_tokens"]) // decode.block_tokens)
    transfer_ms = blocks * decode.block_bytes / (decode.pull_bytes_per_s or _PULL_BYTES_PER_S) * 1e3
    estimates |= {
        "split_backlog_ms": prefill.prefill_ms(prefill.backlog_tokens),
        "split_ttft_ms": prefill.prefill_ms(prefill.backlog_tokens + uncached_on_p),
        "transfer_ms": transfer_ms,
        "handoff_ms": _HANDOFF_MS + transfer_ms * _LAST_CHUNK_SHARE,
        "max_local_stall_ms": params.max_local_stall_ms,
    }
    local_cost = estimates["local_ttft_ms"] + estimates["local_stall_ms"]
    split_cost = estimates["split_ttft_ms"] + estimates["handoff_ms"]
    estimates |= {"local_cost_ms": local_cost, "split_cost_ms": split_cost}

    def route(split: bool, rule: str) -> Route:
        return Route(decode.key, prefill.key if split else None, rule, estimates)

    if facts.placement is Placement.LOCAL:
        return route(False, "pinned_local")
    if facts.placement is Placement.SPLIT:
        return route(True, "pinned_split")
    # A prompt still waiting behind others on D is no short stall, however short it is itself.
    if estimates["local_ttft_ms"] <= params.max_local_stall_ms:
        cached = facts.cached_tokens.get(decode.key, 0)
        return route(False, "cached_on_decode" if cached > facts.prompt_tokens / 2 else "short_on_decode")
    if split_cost <= local_cost:
        return route(True, "split_is_faster")
    if split_cost <= local_cost + _HEADROOM * estimates["local_prefill_ms"]:
        return route(True, "keeps_decode_free")
    return route(False, "local_is_faster")


def _too_large(facts: RequestFacts, candidates: Sequence[WorkerView]) -> Failure:
    largest = max(w.total_blocks * w.block_tokens for w in candidates)
    return Failure(
        Code.INVALID_ARGUMENT,
        f"the prompt has {facts.prompt_tokens} tokens and the largest decode worker's KV pool holds {largest}; "
        "shorten the prompt, or give decode workers more KV memory",
        field="prompt",
    )
