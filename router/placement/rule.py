"""Split or local, on one decode worker: the rule that fires, and the estimates that it saw."""

from __future__ import annotations

from collections.abc import Sequence

from router.errors import Code, Failure
from router.placement.estimates import Compute, Option, Weighed, Weighing
from router.placement.lots import weight_of
from router.placement.route import Placement, PolicyParams, Rejection, RequestFacts, Route


def compare(decision: Weighing, o: Option, weighed: Weighed | None) -> Route:
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


def _rule(facts: RequestFacts, params: PolicyParams, o: Option) -> tuple[bool, str]:
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


def without_prefill(decision: Weighing, o: Option, options: Sequence[Option]) -> Route | Rejection:
    facts, view = decision.facts, decision.view
    remaining = [w for w in view.prefill if w.key not in facts.exclude]
    if any(w.pairs_as == o.decode.pairs_as for w in remaining):
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
    return Route(o.decode.key, None, rule, estimates, o.local.pull, _chosen=o, _weighed=Weighed(options, ()))


def _estimates(decision: Weighing, o: Option, computing: Compute) -> dict[str, float]:
    """By name with unit: shown by `diptych explain`, asserted by tests."""
    local, source, d = o.local, o.source, o.decode
    tokens = decision.facts.prompt_tokens
    estimates = {
        "ttft_ms": computing.ttft_ms,
        "uncorrected_ttft_ms": computing.raw_ttft_ms,
        "backlog_ms": computing.wait_ms,
        "uncached_on_decode_tokens": float(tokens - local.cached),
        "local_backlog_ms": local.wait_ms,
        "local_prefill_ms": local.own_ms,
        "local_ttft_ms": local.ttft_ms,
        "local_stall_ms": o.stall_ms,
        "local_delays_ms": local.delay_ms,
        "local_cost_ms": o.local_cost_ms,
        "itl_ms": o.itl_ms,
        "uncorrected_itl_ms": d.raw_itl_ms,
        "step_cost_ms": o.step_cost_ms,
        "answer_ms": max(0, decision.facts.expected_tokens - 1) * o.itl_ms,
        "measured": float(d.prefill_tokens_per_s > 0),
        "max_local_stall_ms": decision.params.max_local_stall_ms,
    }
    if decision.params.due_dates:
        estimates["due_ms"] = decision.due_ms(computing.worker)
        estimates["put_back_weight"] = weight_of(decision.facts.lot, decision.params.overload_protect)
    if decision.facts.load_ms is not None:
        estimates["adapter_load_ms"] = decision.facts.load_ms(computing.worker.key)
    if computing.pull is not None:
        estimates["pull_ms"] = computing.pull_ms
        estimates["pull_bytes"] = float(computing.pull_bytes)
    if source is not None:
        estimates["uncached_on_prefill_tokens"] = float(tokens - source.cached)
        estimates["split_backlog_ms"] = source.wait_ms
        estimates["split_prefill_ms"] = source.own_ms
        estimates["split_ttft_ms"] = source.ttft_ms
        estimates["split_delays_ms"] = source.delay_ms
        estimates["transfer_bytes"] = float(o.transfer_bytes)
        estimates["transfer_ms"] = o.transfer_ms
        estimates["handoff_ms"] = o.handoff_ms
        estimates["uncorrected_handoff_ms"] = o.raw_handoff_ms
        estimates["split_cost_ms"] = o.split_cost_ms
    return estimates
