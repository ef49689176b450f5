"""GPU time below which nobody answers a trace in time, whatever they foresee: a lower bound, not a schedule. Pure.

Of each request the least work, in seconds of one worker: its uncached prompt tokens at full rate, steps' constants left
out; and of its answer, for every token, its share of a step that takes as long as the ITL target allows (a longer step
shares its constant among more). Prompts are due at the TTFT target, answers at the end that the ITL target allows.

Two workers, one of each role, are always there. They do as much as they can in time, most urgent first, whatever the
role; what they cannot is the least that others must. Starts take no time, work splits at will, memory has no end, what
is due after the end may be done after it, and the most expensive requests are the ones that may be late. So the bound
lies below what any policy can reach; how far below, nobody knows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from simulator.cost_model import CostModel
from simulator.outcome import WARM_UP_SHARE
from simulator.spec import ClusterSpec
from simulator.traces import Trace, TraceRequest

ALWAYS = 2  # workers
_TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Work:
    """`seconds` of one worker, between `comes` and `due`."""

    comes: float
    due: float
    seconds: float


def least_gpu_s(trace: Trace, costs: CostModel, spec: ClusterSpec, share: float) -> float:
    """From the first counted arrival to the last one; `share` of the requests are in time."""
    first = int(len(trace.requests) * WARM_UP_SHARE)
    began, ended = trace.requests[first].arrival_s, trace.requests[-1].arrival_s
    uncached = list(_uncached(trace))
    all_of = [_of(r, n, costs, spec) for r, n in zip(trace.requests[first:], uncached[first:], strict=True)]
    all_of.sort(key=lambda works: -sum(w.seconds for w in works))
    late = len(all_of) - round(len(all_of) * share)
    works = [w for one in all_of[late:] for w in one if w.due <= ended]
    return ((ended - began) * ALWAYS + beyond(works, ALWAYS)) * spec.gpus_per_worker


def _uncached(trace: Trace) -> Iterator[int]:
    """Prompt tokens that no cache of any size can have."""
    seen: set[int] = set()
    for request in trace.requests:
        known = 0
        for block in request.blocks:
            if block not in seen:
                break
            known += 1
        seen.update(request.blocks)
        yield max(1, request.prompt_tokens - known * trace.block_tokens)


def _of(request: TraceRequest, uncached: int, costs: CostModel, spec: ClusterSpec) -> tuple[Work, Work]:
    step, prompt, answer = costs.step, request.prompt_tokens, request.output_tokens
    pairs = uncached * (prompt - uncached + uncached / 2)
    prompt_s = (step.per_token_ms * uncached + step.per_attention_pair_ms * pairs) / 1e3
    target_ms = spec.itl_target_ms
    each_ms = step.per_sequence_ms + step.per_context_token_ms * (prompt + answer / 2)
    answer_s = max(0, answer - 1) * each_ms * target_ms / (target_ms - step.constant_ms) / 1e3
    isolated_s = step.prompt_ms(prompt, max(spec.prefill.max_batch_tokens, 8192)) / 1e3
    first_due = request.arrival_s + spec.ttft_base_s + spec.ttft_isolated_factor * isolated_s
    last_due = first_due + max(0, answer - 1) * target_ms / 1e3
    return Work(request.arrival_s, first_due, prompt_s), Work(request.arrival_s, last_due, answer_s)


def beyond(works: Sequence[Work], workers: float) -> float:
    """Seconds of work that so many workers cannot do in time, however they share it out."""
    coming = sorted((w for w in works if w.seconds > 0), key=lambda w: w.comes)
    open_: list[tuple[float, float]] = []  # (due, seconds left)
    missed, now, at = 0.0, coming[0].comes if coming else 0.0, 0
    while at < len(coming) or open_:
        if not open_ and at < len(coming):
            now = max(now, coming[at].comes)
        # What comes within this tick may be done from its beginning on: that only lowers the bound.
        while at < len(coming) and coming[at].comes < now + _TICK_S:
            heapq.heappush(open_, (coming[at].due, coming[at].seconds))
            at += 1
        left = workers * _TICK_S
        while open_ and left > 0:
            due, seconds = heapq.heappop(open_)
            if due <= now:
                missed += seconds
            elif seconds <= left:
                left -= seconds
            else:
                heapq.heappush(open_, (due, seconds - left))
                left = 0.0
        now += _TICK_S
    return missed
