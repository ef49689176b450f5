"""What each placement of a request would cost, in milliseconds: candidates, estimates, and what else was weighed.

router/policy.py has the formulas in words, docs/routing.md one decision in full.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from router.prefix_index import PrefixHits
from router.route import Alternative, Placement, PolicyParams, PrefixPull, RequestFacts
from router.view import Pool, PoolsView, WorkerKey, WorkerView

_HANDOFF_MS = 5.0  # announcements, fence, adoption
_LEND_MS = 8.0  # asking for a prefix, announcement, fence
_LAST_CHUNK_SHARE = 0.25  # of the KV moves after the first token; the rest moved while the prompt was computed
LOOK_AT_ALL = 16  # a pool of so many is looked at in full
_RANDOM = 5  # else so many at random, beside those that hold a prefix
_HOLDERS = 3
_LENDERS = 2  # holders that are asked the estimate whether to pull from them
_SHOWN_OTHERS = 3
_UNKNOWN_ANSWER_TOKENS = 64  # only where the length of answers is not known yet, and only to weigh step times


class Compute(NamedTuple):
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


class Option(NamedTuple):
    """One decode worker with its two ways. `cost_ms` is the cheaper one's, with what D's step time costs the answer."""

    cost_ms: float
    crowded: bool
    decode: WorkerView
    local: Compute
    local_cost_ms: float
    stall_ms: float
    source: Compute | None
    split_cost_ms: float  # infinite without a source
    transfer_bytes: int
    transfer_ms: float
    raw_handoff_ms: float
    handoff_ms: float
    itl_ms: float
    step_cost_ms: float


class Weighing:
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
        if count <= LOOK_AT_ALL:
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

    def sources(self, workers: Sequence[WorkerView]) -> list[Compute]:
        """Prefill candidates by when they could have the first token, soonest first."""
        found = [self.compute(w) for w in workers]
        if self.params.pull_prefixes and self.holders and found:
            # With a prefix pulled, workers of one kind differ by their backlog alone.
            idlest = min(range(len(found)), key=lambda i: found[i].wait_ms)
            found[idlest] = self.with_pull(found[idlest])
        if self.facts.affine:
            found.sort(key=lambda c: c.ttft_ms * self.affinity(c.worker.key))
        else:
            found.sort(key=by_ttft)
        return found

    def affinity(self, key: WorkerKey) -> float:
        """Within the hysteresis, a session stays where it was."""
        return 1.0 - self.params.hysteresis if key in self.facts.affine else 1.0

    # Estimates.

    def compute(self, w: WorkerView, itl_ms: float = 0.0, chunk_ms: float = 0.0) -> Compute:
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
        return Compute(w, held, held, wait_ms, own_ms, raw, ttft_ms, self.late_ms(w, ttft_ms))

    def with_pull(self, c: Compute) -> Compute:
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
                best = Compute(w, c.held, cached, c.wait_ms, own_ms, raw, ttft_ms, late_ms, pull, pull_ms, num_bytes)
        return best

    def due_ms(self, w: WorkerView) -> float:
        """When the first token is due, from now."""
        due = self.due_base_ms + self.params.ttft_target_stretch * w.prefill_ms(self.facts.prompt_tokens)
        return min(due, self.facts.time_left_s * 1e3)

    def slack_ms(self, computing: Compute) -> float:
        """How long the prompt may wait. Its time is taken as if it had the worker to itself: how much of each step it
        gets is no news about its urgency, and long prompts would be given up for lost too early.
        """
        uncached = self.facts.prompt_tokens - computing.cached
        return self.due_ms(computing.worker) - computing.worker.prefill_ms(uncached)

    def late_ms(self, w: WorkerView, ttft_ms: float) -> float:
        if ttft_ms <= self.earliest_due_ms:
            return 0.0
        late = ttft_ms - self.due_ms(w)
        return late if late > 0.0 else 0.0

    def option(self, d: WorkerView, sources: Sequence[Compute], *, pull: bool = False) -> Option:
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
        return Option(
            cost, crowded, d, local, local_cost, stall_ms, source, split_cost, moved, transfer_ms, raw_handoff_ms,
            handoff_ms, itl_ms, step_cost,
        )  # fmt: skip


def by_ttft(c: Compute) -> float:
    return c.ttft_ms


def by_cost(o: Option) -> tuple[bool, float]:
    return o.crowded, o.cost_ms


class Weighed(NamedTuple):
    options: Sequence[Option]
    sources: Sequence[Compute]

    def alternatives(self, chosen: Option, *, split: bool) -> tuple[Alternative, ...]:
        """The other way on the chosen pair, then the next best decode workers, then prefill workers for the chosen."""
        shown: list[Alternative] = []
        source = chosen.source
        if source is not None:
            shown.append(_local(chosen) if split else _split(chosen, source))
        others = [o for o in self.options if o.decode.key != chosen.decode.key and math.isfinite(o.cost_ms)]
        for o in heapq.nsmallest(_SHOWN_OTHERS, others, key=by_cost):
            cheaper = o.source is not None and o.split_cost_ms < o.local_cost_ms
            shown.append(_split(o, o.source) if cheaper and o.source is not None else _local(o))
        if source is not None:
            rest = [c for c in self.sources if c.worker.key != source.worker.key]
            shown += [_split(chosen, c) for c in heapq.nsmallest(_SHOWN_OTHERS, rest, key=by_ttft)]
        return tuple(shown)


def _local(o: Option) -> Alternative:
    return Alternative(Placement.LOCAL, o.decode.key, None, o.local.ttft_ms, o.local_cost_ms + o.step_cost_ms)


def _split(o: Option, c: Compute) -> Alternative:
    cost_ms = c.ttft_ms + c.late_ms + o.handoff_ms + o.step_cost_ms
    return Alternative(Placement.SPLIT, o.decode.key, c.worker.key, c.ttft_ms, cost_ms)
