"""What is refused before any work, and what the client is told: the cause, the fix, when to come again."""

from __future__ import annotations

from collections.abc import Sequence

from router.errors import Code, Failure
from router.placement.route import PolicyParams, Rejection, RequestFacts, Route
from router.placement.view import PoolsView, WorkerView


def too_late(facts: RequestFacts, route: Route, params: PolicyParams) -> Rejection | None:
    """Refused with a hint when to come again, before any prompt is computed for nothing."""
    e = route.estimates
    ttft_ms = e["split_ttft_ms"] if route.split else e["local_ttft_ms"]
    backlog_ms = e["split_backlog_ms"] if route.split else e["local_backlog_ms"]
    total_ms = ttft_ms + e["answer_ms"]
    if total_ms > facts.time_left_s * 1e3 and e["measured"]:
        excess_ms = min(total_ms - facts.time_left_s * 1e3, backlog_ms)
        waiting_helps = backlog_ms > 0  # nobody is before it: it would be late whenever it came
        fix = "ask for fewer tokens, or retry later" if waiting_helps else "or ask for fewer tokens"
        return Rejection(
            Failure(
                Code.RESOURCE_EXHAUSTED,
                f"the answer would take about {total_ms / 1e3:.3g} s and the deadline is in {facts.time_left_s:.3g} s; "
                f"allow more time, {fix}",
                retry_after_ms=_clamp_ms(excess_ms) if waiting_helps else 0,
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


def nobody(view: PoolsView) -> Failure:
    what = "every decode worker has failed this request" if len(view.decode) else "no decode worker is ready"
    return Failure(Code.UNAVAILABLE, f"{what}; start one, or retry when one has registered", retry_after_ms=1000)


def too_large(facts: RequestFacts, candidates: Sequence[WorkerView]) -> Failure:
    largest = max(w.total_tokens for w in candidates)
    return Failure(
        Code.INVALID_ARGUMENT,
        f"the prompt has {facts.prompt_tokens} tokens and the largest decode worker's KV pool holds {largest}; "
        "shorten the prompt, or give decode workers more KV memory",
        field="prompt",
    )
