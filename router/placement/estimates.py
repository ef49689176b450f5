"""What each placement of a request would cost, in milliseconds: candidates, estimates, and what else was weighed.

router/placement/policy.py has the formulas in words, docs/routing.md one decision in full.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from router.placement.prefix_index import PrefixHits
from router.placement.route import Alternative, Placement, PolicyParams, PrefixPull, RequestFacts
from router.placement.view import Pool, PoolsView, WorkerKey, WorkerView

_HANDOFF_MS = 5.0  # announcements, fence, adoption
_LEND_MS = 8.0  # asking for a prefix, announcement, fence
_LAST_CHUNK_SHARE = 0.25  # of the KV moves after the first token; the rest moved while the prompt was computed
LOOK_AT_ALL = 16  # a pool of so many is looked at in full
_RANDOM = 5  # else so many at random
_RANDOM_BESIDE_HOLDERS = 3  # where workers that hold a prefix are looked at too
_HOLDERS = 3
_LENDERS = 2  # holders that are asked the estimate whether to pull from them
_SHOWN_OTHERS = 3
# Makes a named tuple of a tuple without a call of Python: a decision makes dozens.
_tuple: Any = tuple.__new__
_AUTO = Placement.AUTO
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
    delay_ms: float = 0.0  # of all who come to the worker after it
    cost_ms: float = 0.0  # the first token, being late for it, and what it delays


class Option(NamedTuple):
    """One decode worker with its two ways. `cost_ms` is the cheaper one's, with what D's step time costs the answer."""

    crowded: bool
    cost_ms: float
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
        "lenders",
        "now",
        "params",
        "rng",
        "room_tokens",
        "time_left_ms",
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
        self.lenders: list[tuple[WorkerKey, int, WorkerView | None]] | None = None  # looked up when first asked for
        self.answer_tokens = facts.expected_tokens or min(facts.max_tokens, _UNKNOWN_ANSWER_TOKENS)
        self.room_tokens = facts.prompt_tokens + min(self.answer_tokens, facts.max_tokens)
        self.due_base_ms = params.ttft_target_ms - facts.waited_ms
        self.time_left_ms = facts.time_left_s * 1e3
        self.earliest_due_ms = min(self.due_base_ms, self.time_left_ms)

    # Candidates.

    def shortlist(self, pool: Pool) -> Sequence[WorkerView]:
        """Prefix holders, the session's workers, and a few at random: a decision must not look at thousands."""
        count, draw = len(pool), self.rng.random
        exclude = self.facts.exclude
        if count <= LOOK_AT_ALL:
            start = int(draw() * count)
            views = pool[start:] + pool[:start]  # among equals, no favourite
            return [w for w in views if w.key not in exclude] if exclude else views
        found = pool.places(self.facts.affine) if self.facts.affine else []
        if self.holders:
            place_of = pool.place
            for key, _ in self.holders:
                place = place_of(key)
                if place is not None:
                    if place not in found:
                        found.append(place)
                    if len(found) >= _HOLDERS:
                        break
        for _ in range(_RANDOM_BESIDE_HOLDERS if self.holders else _RANDOM):
            place = int(draw() * count)
            if place not in found:
                found.append(place)
        views = pool.at(found)
        return [w for w in views if w.key not in exclude] if exclude else views

    def sources(self, workers: Sequence[WorkerView]) -> list[Compute]:
        """Prefill candidates by what computing there costs, cheapest first."""
        found = self.computes(workers)
        if self.params.pull_prefixes and self.holders and found:
            # With a prefix pulled, workers of one kind differ by their backlog alone.
            waits = [c.wait_ms for c in found]
            idlest = waits.index(min(waits))
            found[idlest] = self.with_pull(found[idlest])
        if self.facts.affine:
            found.sort(key=lambda c: c.cost_ms * self.affinity(c.worker.key))
        else:
            found.sort(key=_cost_of)
        return found

    def affinity(self, key: WorkerKey) -> float:
        """Within the hysteresis, a session stays where it was."""
        return 1.0 - self.params.hysteresis if key in self.facts.affine else 1.0

    # Estimates.

    # The two loops below are most of a decision: values are local, and nothing is called that need not be.

    def computes(self, workers: Sequence[WorkerView]) -> list[Compute]:
        """On prefill workers, which compute prompts and nothing else."""
        tokens, now, earliest_due_ms = self.facts.prompt_tokens, self.now, self.earliest_due_ms
        any_held, known, look_up, held = bool(self.holders), self.held.get, self.facts.cached_tokens.get, 0
        late_ms_of, newcomers, found = self.late_ms, self.params.newcomers, []
        load_ms_of = self.facts.load_ms
        for w in workers:
            if any_held:
                held = known(w.key) or look_up(w.key, 0)
                if held >= tokens:
                    held = tokens - 1
            wait_ms, own_ms = w.wait_ms(now), w.prefill_ms(tokens - held, held)
            if load_ms_of is not None:
                own_ms += load_ms_of(w.key)
            raw = wait_ms + own_ms
            learned = w.ttft
            ttft_ms = learned.fixed_ms + learned.factor * raw
            late_ms = late_ms_of(w, ttft_ms) if ttft_ms > earliest_due_ms else 0.0
            delays = w.delays if now <= w.delays_until else w.newcomers.delayed(now)
            delay_ms = delays * own_ms * (wait_ms + own_ms / 2) if newcomers else 0.0
            cost_ms = ttft_ms + late_ms + delay_ms
            compute = w, held, held, wait_ms, own_ms, raw, ttft_ms, late_ms, None, 0.0, 0, delay_ms, cost_ms
            found.append(_tuple(Compute, compute))
        return found

    def with_pull(self, c: Compute) -> Compute:
        """The same with a prefix that another worker holds, if pulling it beats computing it by the headroom."""
        w, tokens, held = c.worker, self.facts.prompt_tokens, c.held
        worth, broken_paths = 1.0 - self.params.headroom, self.view.broken_paths
        best_gain, best = 0.0, None
        learned, rate, into, layout = w.transfer, w.pull_rate / 1e3, w.queued_in_bytes, w.layout_fingerprint
        lenders = self.lenders
        if lenders is None:
            find = self.view.find
            lenders = self.lenders = [(key, lent, find(key)) for key, lent in self.holders[:_LENDERS]]
        for key, lent, holder in lenders:
            if lent <= held or key == w.key:
                continue
            if holder is None or holder.layout_fingerprint != layout or (broken_paths and (key, w.key) in broken_paths):
                continue
            num_bytes = (lent - held) // w.block_tokens * w.block_bytes
            out = holder.queued_out_bytes
            raw_ms = _LEND_MS + (num_bytes + (out if out > into else into)) / rate
            pull_ms = learned.fixed_ms + learned.factor * raw_ms
            saved_ms = w.prefill_ms(lent - held, held)
            gain = saved_ms * worth - pull_ms
            if gain > best_gain:
                best_gain, best = gain, (key, lent, saved_ms, pull_ms, num_bytes)
        if best is None:
            return c
        key, lent, saved_ms, pull_ms, num_bytes = best
        pull = _tuple(PrefixPull, (key, lent, saved_ms))
        cached = lent if lent < tokens else tokens - 1
        # Waiting for its turn and pulling go on side by side.
        rest_ms = w.prefill_ms(tokens - cached, cached)
        own_ms = max(0.0, pull_ms - c.wait_ms) + rest_ms
        delay_ms = self.delay_ms(w, c.wait_ms, rest_ms)
        raw = c.wait_ms + own_ms
        ttft_ms = w.ttft(raw)
        late_ms = self.late_ms(w, ttft_ms) if ttft_ms > self.earliest_due_ms else 0.0
        cost_ms = ttft_ms + late_ms + delay_ms
        compute = w, held, cached, c.wait_ms, own_ms, raw, ttft_ms, late_ms, pull, pull_ms, num_bytes, delay_ms, cost_ms
        return _tuple(Compute, compute)

    def due_ms(self, w: WorkerView) -> float:
        """When the first token is due, from now."""
        due = self.due_base_ms + self.params.ttft_target_stretch * w.isolated_ms(self.facts.prompt_tokens)
        return due if due < self.time_left_ms else self.time_left_ms

    def late_ms(self, w: WorkerView, ttft_ms: float) -> float:
        late = ttft_ms - self.due_ms(w)
        return late if late > 0.0 else 0.0

    def delay_ms(self, w: WorkerView, wait_ms: float, own_ms: float) -> float:
        """Of all who come to the worker after it (router/placement/newcomers.py)."""
        return w.newcomers.delayed(self.now) * own_ms * (wait_ms + own_ms / 2) if self.params.newcomers else 0.0

    def options(self, workers: Sequence[WorkerView], sources: Sequence[Compute]) -> list[Option]:
        """For each decode worker its two ways."""
        facts, now, target_ms, earliest_due_ms = self.facts, self.now, self.params.itl_target_ms, self.earliest_due_ms
        tokens, placement = facts.prompt_tokens, facts.placement
        any_held, known, look_up, held = bool(self.holders), self.held.get, facts.cached_tokens.get, 0
        answer_tokens, room_tokens, broken_paths = self.answer_tokens, self.room_tokens, self.view.broken_paths
        late_ms_of, newcomers, found = self.late_ms, self.params.newcomers, []
        load_ms_of, load_ms = facts.load_ms, 0.0
        for d in workers:
            if any_held:
                held = known(d.key) or look_up(d.key, 0)
                if held >= tokens:
                    held = tokens - 1
            running, itl_ms, chunk_ms, wait_ms = d.running_sequences, d.itl_ms, d.chunk_ms, d.wait_ms(now)
            own_ms = alone_ms = d.prefill_ms(tokens - held, held)
            if chunk_ms and itl_ms:  # decodes share the steps of its chunks
                stretch = 1.0 + itl_ms / (own_ms if own_ms < chunk_ms else chunk_ms)
                wait_ms *= stretch
                own_ms *= stretch
            if load_ms_of is not None:
                load_ms = load_ms_of(d.key)
                own_ms += load_ms
            raw = wait_ms + own_ms
            learned = d.ttft
            ttft_ms = learned.fixed_ms + learned.factor * raw
            late_ms = late_ms_of(d, ttft_ms) if ttft_ms > earliest_due_ms else 0.0
            stall_ms = 0.0
            if running:
                # The time above the target in every step that has a chunk of it.
                step_ms = itl_ms + (chunk_ms if 0.0 < chunk_ms < alone_ms else alone_ms)
                if step_ms > target_ms:
                    stall_ms = own_ms * (step_ms - target_ms) / step_ms
            delays = d.delays if now <= d.delays_until else d.newcomers.delayed(now)
            delay_ms = delays * own_ms * (wait_ms + own_ms / 2) if newcomers else 0.0
            alone_cost = ttft_ms + late_ms + delay_ms
            local_cost = alone_cost + stall_ms * running
            step_cost = answer_tokens * itl_ms * (itl_ms / target_ms) ** 2

            for source in sources:
                p = source.worker
                if p.pairs_as == d.pairs_as and (not broken_paths or (p.key, d.key) not in broken_paths):
                    there = held if p.layout_fingerprint == d.layout_fingerprint else 0  # else of another scheme
                    moved = -(-(tokens - there) // d.block_tokens) * d.block_bytes + d.fixed_bytes
                    pull_rate, out, into = d.pull_rate, p.queued_out_bytes, d.queued_in_bytes
                    transfer_ms = moved / pull_rate * 1e3
                    # The link is no quicker than its queue; else what the last chunk made is still to move.
                    behind_ms = (
                        (out if out > into else into) / pull_rate * 1e3 + transfer_ms - source.wait_ms - source.own_ms
                    )
                    last_ms = transfer_ms * _LAST_CHUNK_SHARE
                    raw_handoff_ms = _HANDOFF_MS + load_ms + (last_ms if last_ms > behind_ms else behind_ms)
                    learned = d.transfer
                    handoff_ms = learned.fixed_ms + learned.factor * raw_handoff_ms
                    split_cost = source.cost_ms + handoff_ms
                    break
            else:
                source, split_cost, moved, transfer_ms, raw_handoff_ms, handoff_ms = None, math.inf, 0, 0.0, 0.0, 0.0

            if placement is _AUTO:
                cost = (local_cost if local_cost < split_cost else split_cost) + step_cost
            else:
                cost = (local_cost if placement is Placement.LOCAL else split_cost) + step_cost
            compute = d, held, held, wait_ms, own_ms, raw, ttft_ms, late_ms, None, 0.0, 0, delay_ms, alone_cost
            local = _tuple(Compute, compute)
            option = (
                d.free_tokens < room_tokens, cost, d, local, local_cost, stall_ms, source, split_cost, moved,
                transfer_ms, raw_handoff_ms, handoff_ms, itl_ms, step_cost,
            )  # fmt: skip
            found.append(_tuple(Option, option))
        return found

    def option_with_pull(self, o: Option) -> Option:
        """The same, if a prefix is pulled that another worker holds; as it is, if that does not pay."""
        local, d = self.with_pull(o.local), o.decode
        if local.pull is None:
            return o
        stall_ms = 0.0
        if d.running_sequences:
            alone_ms = d.prefill_ms(self.facts.prompt_tokens - local.cached, local.cached)
            step_ms = o.itl_ms + (d.chunk_ms if 0.0 < d.chunk_ms < alone_ms else alone_ms)
            if step_ms > self.params.itl_target_ms:
                stall_ms = local.own_ms * (step_ms - self.params.itl_target_ms) / step_ms
        local_cost = local.cost_ms + stall_ms * d.running_sequences
        cost = o.cost_ms
        if self.facts.placement is not Placement.SPLIT:
            cost = local_cost if self.facts.placement is Placement.LOCAL else min(local_cost, o.split_cost_ms)
            cost += o.step_cost_ms
        return _tuple(Option, (o.crowded, cost, d, local, local_cost, stall_ms, *o[6:]))


_cost_of = attrgetter("cost_ms")
by_cost = attrgetter("crowded", "cost_ms")


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
            shown += [_split(chosen, c) for c in heapq.nsmallest(_SHOWN_OTHERS, rest, key=_cost_of)]
        return tuple(shown)


def _local(o: Option) -> Alternative:
    return Alternative(Placement.LOCAL, o.decode.key, None, o.local.ttft_ms, o.local_cost_ms + o.step_cost_ms)


def _split(o: Option, c: Compute) -> Alternative:
    cost_ms = c.cost_ms + o.handoff_ms + o.step_cost_ms
    return Alternative(Placement.SPLIT, o.decode.key, c.worker.key, c.ttft_ms, cost_ms)
