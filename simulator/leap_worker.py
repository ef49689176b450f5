"""A worker that leaps from event to event: between two of them its steps follow a formula, so they are not simulated.

What it decides is what engine/scheduler.py decides (the order, the chunk of each prompt, who waits for room, who gives
way); simulator/exact.py runs that code itself, and benchmarks/simulator.py holds the two together.

    add(job) ──> waiting ──room──> prefills ──last chunk──> on_first_token ──┬─ hand_over: gone, blocks leased
    adopt(job) ────────────────────────────────────────────────────────────> decodes ──> on_answer
                     ^────────── no room to grow: the last by order gives way ──┘

A leap is a run of steps with the same members: decodes only until one ends, or one prompt taking the whole budget of
each. Its steps grow by a constant (contexts get longer, chunks attend to more), so their ends are an arithmetic series.
What comes in the middle of a leap cuts it at the end of the step that is running.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.chunk_budget import UNLIMITED, ChunkBudget
from engine.load import TRUSTED_ERROR
from simulator.cost_model import StepCost
from simulator.gaps import GapCounts
from simulator.jobs import Job, by_order, drop_room, publish, take_room
from simulator.learned import LeapEstimate
from simulator.loop import EventLoop, Timer
from simulator.prefix_cache import PrefixCache
from simulator.turns import FOR_EVER, Turns

_LAST_CHUNK_TOKENS = 128  # as engine/scheduler.py
_BLOCK_TOKENS = 64
_EWMA, _MIN_PREFILL_TOKENS, _LEAST_OWN_SHARE = 0.2, 16, 0.25  # as worker/rates.py
_ADAPTIVE_LEAP_STEPS = 6  # a chunk found for the first of so many steps is used for all of them


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    max_batch_tokens: int = 2048
    max_running_sequences: int = 256
    itl_target_ms: float | None = None  # as the engine's: None = prompts do not make way for decodes
    due_dates: bool = False  # prompts by due date, some put back under overload; else by arrival


class LeapWorker:
    """`on_first_token(worker, job)`, `on_chunk(worker, job, tokens, first_end_s, last_tokens)` for jobs that hand over,
    `on_answer(worker, job)`, `on_room(worker)` after blocks became free. All at the loop's now."""

    def __init__(
        self,
        loop: EventLoop,
        index: int,
        cost: StepCost,
        learned: LeapEstimate,
        limits: WorkerLimits,
        cache: PrefixCache,
        on_first_token: Callable[[LeapWorker, Job], None],
        on_chunk: Callable[[LeapWorker, Job, int, float, int], None],
        on_answer: Callable[[LeapWorker, Job], None],
        on_room: Callable[[LeapWorker], None] | None = None,
    ) -> None:
        self.loop, self.index, self.cost, self.limits, self.cache = loop, index, cost, limits, cache
        self.learned = learned  # what a step costs is `cost`; this is what the engine believes
        self._chunk_budget = ChunkBudget(limits.itl_target_ms, learned)
        self._on_first_token, self._on_chunk, self._on_answer, self._on_room = (
            on_first_token,
            on_chunk,
            on_answer,
            on_room,
        )
        self.waiting: list[Job] = []
        self.prefills: list[Job] = []
        self._decodes: list[tuple[int, int, Job]] = []  # heap by the step that brings the last token
        self.context_tokens = 0
        self.steps = 0
        self.gaps = GapCounts()
        self.step_ms = self.decode_step_ms = 0.0
        self.prefill_tokens_per_s = 0.0
        self.decode_tokens_per_s = 0.0
        self.busy_s = 0.0
        self.preemptions_total = 0
        self.alive = True
        self._turning = False
        self._turns = Turns(learned, self._chunk_budget, cache, limits.max_batch_tokens, due_dates=limits.due_dates)
        self._claim: Job | None = None
        # The leap under way.
        self._timer: Timer | None = None
        self._start_s = 0.0
        self._first_ms = 0.0
        self._growth_ms = 0.0
        self._count = 0
        self._items: list[tuple[Job, int]] = []
        self._entering: list[Job] = []  # adopted during the leap
        self._begun: list[Job] = []  # those whose first token it brought

    # Coming and going.

    @property
    def running(self) -> int:
        return len(self._decodes) + len(self.prefills)

    def backlog_tokens(self) -> int:
        total = 0
        for job in self.waiting:
            total += job.goal - job.computed
        for job in self.prefills:
            total += job.goal - job.computed
        return total

    def decode_ms_now(self) -> float:
        """What a step of the decodes that run now takes, as worker/core.py says it; 0: no step has been measured."""
        if not self.decode_step_ms or self.learned.relative_error >= TRUSTED_ERROR:
            return self.decode_step_ms
        n = max(1, len(self._decodes))
        return self.learned.cost().ms(n, n, self.context_tokens + n, 0)

    def chunk_tokens(self) -> int:
        """Of prompts in one step beside the decodes that run now."""
        allowance = self._chunk_budget.allowance(len(self._decodes), self.context_tokens)
        return max(1, min(self.limits.max_batch_tokens, allowance.tokens(0)))

    def waiting_tokens(self) -> int:
        return sum(job.goal for job in self.waiting)

    def add(self, job: Job) -> None:
        job.goal = job.prompt_tokens
        if self.limits.due_dates:
            job.found = self.cache.match(job.names) * self.cache.block_tokens
        self._enqueue(job)
        if self._timer is None:
            self._plan(self.loop.now)
        elif self._count > 1 and (self.limits.due_dates or not self._items):
            self._cut(self.loop.now)  # else a prompt takes the whole budget as long as the leap lasts

    def _enqueue(self, job: Job) -> None:
        job.order = (job.due_s if self.limits.due_dates else 0.0, job.number)
        queue = self.waiting
        if not queue or queue[-1].order <= job.order:
            queue.append(job)
        else:
            at = next(i for i, other in enumerate(queue) if other.order > job.order)
            queue.insert(at, job)

    def reserve(self, job: Job) -> bool:
        """Room for a prompt whose KV is on its way; what is cached here comes first. False: none now."""
        return take_room(self.cache, job, job.prompt_tokens, leave_one=False)

    def adopt(self, job: Job, first_token_s: float) -> None:
        """Its KV is here, its first token left the prefill worker at `first_token_s`. It decodes from the next step."""
        job.computed = job.goal = job.prompt_tokens
        job.emitted = 1
        job.last_token_s = first_token_s
        publish(self.cache, job)
        self._entering.append(job)
        if self._timer is None:
            self._plan(self.loop.now)
        elif self._count > 1:
            self._cut(self.loop.now)

    def give_back(self, job: Job) -> None:
        """A job that is not queued here any more holds nothing any more; its named blocks stay cached."""
        drop_room(self.cache, job)
        if self._on_room is not None:
            self._on_room(self)
        if self.waiting and not self._turning and self.alive:
            if self._timer is None:
                self._plan(self.loop.now)
            elif self._count > 1 and not self._items:
                self._cut(self.loop.now)

    def cancel(self, job: Job) -> None:
        """End a job in any state; its room is free when this returns."""
        if job in self.waiting:
            self.waiting.remove(job)
            return
        if job in self.prefills:
            self.prefills.remove(job)
        elif job in self._entering:
            self._entering.remove(job)
        elif job.running:
            self._take_out(job)
        job.running = False
        self.give_back(job)

    def change_budget(self, max_batch_tokens: int) -> None:
        """Another role: from the next step on it takes so many tokens."""
        self.limits = replace(self.limits, max_batch_tokens=max_batch_tokens)
        self._turns.max_batch_tokens = max_batch_tokens

    def crash(self) -> list[Job]:
        """Everything here is lost."""
        self.alive = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lost = [*self.waiting, *self.prefills, *self._entering, *(job for _, _, job in self._decodes)]
        self.waiting, self.prefills, self._entering, self._begun, self._decodes = [], [], [], [], []
        self.context_tokens = 0
        return lost

    def _cut(self, now: float) -> None:
        """End the leap with the step that is running now."""
        count = max(1, math.ceil(self._steps_in((now - self._start_s) * 1e3) - 1e-9))
        if count < self._count:
            self._count = count
            assert self._timer is not None
            self._timer.cancel()
            self._timer = self.loop.at(self._end_s(count), self._commit)

    def _steps_in(self, elapsed_ms: float) -> float:
        """How many steps of the leap end within so long."""
        d, g = self._first_ms, self._growth_ms
        if g <= 1e-12:
            return elapsed_ms / d
        half = d - g / 2
        return (-half + math.sqrt(half * half + 2 * g * max(0.0, elapsed_ms))) / g

    def _end_s(self, count: int) -> float:
        return self._start_s + (count * self._first_ms + self._growth_ms * count * (count - 1) / 2) / 1e3

    # A leap.

    def _plan(self, now: float) -> None:
        entering, self._entering, begun, self._begun = self._entering, [], self._begun, []
        for job in entering:
            self._enter(job)
        cost = self.cost
        gave_way = False
        while self._decodes and len(self._decodes) > self.cache.free_tokens:
            self._give_way()
            gave_way = True
        n = len(self._decodes)
        items: list[tuple[Job, int]] = []
        budget = 0
        most = FOR_EVER
        if self.prefills or self.waiting:
            turns = self._turns
            line, most = turns.line(self.prefills, self.waiting, now, n, self.context_tokens + n)
            budget = self.limits.max_batch_tokens - n
            allowance = self._chunk_budget.allowance(n, self.context_tokens + n) if n else UNLIMITED
            admitting = not gave_way and self._claim_has_room(now, n)
            alone = len(line) == 1
            for job in line:
                if budget <= 0:
                    break
                if not job.running:
                    if not admitting or not allowance.open:
                        continue
                    if not self._admit(job, now, n):
                        admitting = False  # it waits for room; nobody that waits too overtakes it
                        if turns.sharing and job is turns.put_back[0] and line[0] is job:
                            self._claim = job
                        continue
                start = job.computed
                count = self._chunk(job, min(budget, allowance.tokens(start)), alone=alone)
                if count:
                    items.append((job, count))
                    budget -= count
                    allowance.spend(start, count)
        if not n and not items:
            self._timer = None
            return
        growth = cost.per_context_token_ms * n
        if not items:
            count = min(self._decodes[0][0] - self.steps, self.cache.free_tokens // n)
            first_ms = cost.decode_ms(n, self.context_tokens + n)
        else:
            tokens, pairs = n, 0.0
            for job, chunk in items:
                tokens += chunk
                pairs += chunk * (job.computed + chunk / 2)
            count = 1
            if len(items) == 1 and (budget <= 0 or not allowance.open):
                job, chunk = items[0]
                # The last chunk is a leap of its own: others share that step, and a handed-over prompt halves it.
                count = max(1, (job.goal - job.computed - 1) // chunk)
                if self._decodes:
                    count = min(count, self._decodes[0][0] - self.steps)
                    if self.limits.itl_target_ms is not None:
                        count = min(count, _ADAPTIVE_LEAP_STEPS)
                growth += cost.per_attention_pair_ms * chunk * chunk
            if n:
                count = min(count, self.cache.free_tokens // n)
            count = min(count, most)
            first_ms = cost.ms(n + len(items), tokens, self.context_tokens + n, pairs)
        self._start_s, self._first_ms, self._growth_ms, self._count, self._items = now, first_ms, growth, count, items
        self._timer = self.loop.at(self._end_s(count), self._commit)
        for job in begun:
            job.second_token_s = now + first_ms / 1e3
        for job in entering:
            job.second_token_s = now + first_ms / 1e3
            if job.running and job.gaps_since is not None:  # its first gap began on the other worker
                job.extra_gaps_ms.append((now - job.last_token_s) * 1e3 + first_ms)
                job.gaps_since.skip(first_ms)

    def _admit(self, job: Job, now: float, n: int) -> bool:
        if self.running >= self.limits.max_running_sequences:
            return False
        if not take_room(self.cache, job, job.goal, leave_one=True, spare=n):
            return False
        self.waiting.remove(job)
        job.running = True
        if job.started_s < 0:
            job.started_s = now
        bisect.insort(self.prefills, job, key=by_order)
        return True

    def _claim_has_room(self, now: float, n: int) -> bool:
        """False while a put-back one whose turn has come waits for room: nobody else may begin."""
        claim, back = self._claim, self._turns.put_back
        if claim is not None and claim in self.waiting and claim in back and not self._admit(claim, now, n):
            return False
        self._claim = None
        return True

    def _chunk(self, job: Job, budget: int, *, alone: bool) -> int:
        remaining = job.goal - job.computed
        count = min(remaining, budget)
        if alone and job.hand_over and count == remaining and count >= 2 * _LAST_CHUNK_TOKENS:
            end = job.computed + count // 2
            count = max(_LAST_CHUNK_TOKENS, end - end % _BLOCK_TOKENS - job.computed)
        return count

    def settle(self) -> None:
        """Account for the steps of the leap that are over: what the worker would say of itself now."""
        if self._timer is None or self._count < 2:
            return
        over = self._steps_in((self.loop.now - self._start_s) * 1e3)
        done = min(self._count - 1, int(over + 1e-9))
        if done < 1:
            return
        start_s = self._end_s(done)
        self._turning = True
        self._account(done, start_s)
        self._turning = False
        self._start_s = start_s
        self._first_ms += self._growth_ms * done
        self._count -= done

    def _commit(self, _: object) -> None:
        self._timer = None
        self._turning = True
        self._account(self._count, self.loop.now)
        while self._decodes and self._decodes[0][0] <= self.steps:
            _, _, job = heapq.heappop(self._decodes)
            self._end(job)
        for job, _chunk in self._items:
            if job.running and job.computed >= job.goal:
                self._prompt_done(job)
        self._turning = False
        self._plan(self.loop.now)

    def _account(self, k: int, end_s: float) -> None:
        """`k` steps from the start of the leap are over; nothing ended in them but, maybe, the last."""
        n = len(self._decodes)
        duration_s = end_s - self._start_s
        self.busy_s += duration_s
        first_ms = recent_ms = self._first_ms
        kept = 1 - _EWMA
        if k > 1:
            # Exponential means over the steps of the leap, newest counting most: lengths are an arithmetic series.
            kept **= k
            lag = (1 - _EWMA) * (1 - k * kept / (1 - _EWMA) + (k - 1) * kept) / _EWMA / (1 - kept)
            recent_ms += self._growth_ms * (k - 1 - lag)
        self.step_ms = _mixed(self.step_ms, first_ms, recent_ms, kept)
        self.steps += k
        if self._items and self._turns.sharing:
            self._turns.passed(k)
        if n:
            self.gaps.add(k, self._first_ms, self._growth_ms)
            self.context_tokens += n * k
            self.cache.use(n * k)
        tokens, pairs = 0, 0.0
        for job, chunk in self._items:
            tokens += chunk
            pairs += chunk * (job.computed + chunk * k / 2)  # of the step in the middle
        middle = (k - 1) / 2
        self.learned.observe_run(
            n + len(self._items),
            n + tokens,
            self.context_tokens - n * (k - 1 - middle) if n else 0,
            pairs,
            tokens,
            first_ms + self._growth_ms * middle,
            k,
        )
        if tokens >= _MIN_PREFILL_TOKENS:
            beside_ms = self.decode_step_ms if n else 0.0
            first, recent = (tokens / max(ms * _LEAST_OWN_SHARE, ms - beside_ms) * 1e3 for ms in (first_ms, recent_ms))
            self.prefill_tokens_per_s = _mixed(self.prefill_tokens_per_s, first, recent, kept)
        elif n:
            self.decode_step_ms = _mixed(self.decode_step_ms, first_ms, recent_ms, kept)
            self.decode_tokens_per_s = _mixed(self.decode_tokens_per_s, n / first_ms * 1e3, n / recent_ms * 1e3, kept)
        first_end_s = self._start_s + self._first_ms / 1e3
        for job, chunk in self._items:
            if not job.running:
                continue
            job.computed += chunk * k
            if job.named < len(job.names):
                publish(self.cache, job)
            if job.hand_over:
                self._on_chunk(self, job, chunk * k, first_end_s, chunk)

    def _prompt_done(self, job: Job) -> None:
        self.prefills.remove(job)
        job.running = False
        if job.emitted:  # it had given way
            job.extra_gaps_ms.append((self.loop.now - job.last_token_s) * 1e3)
        job.emitted += 1
        job.last_token_s = self.loop.now
        if job.emitted == 1:
            self._on_first_token(self, job)
        if job.hand_over and job.output_tokens > 1:
            return  # the blocks stay until the reader has them
        if job.emitted >= job.output_tokens:
            self.give_back(job)
            self._on_answer(self, job)
        else:
            self._enter(job)
            if job.emitted == 1:
                self._begun.append(job)

    def _enter(self, job: Job) -> None:
        job.running = True
        job.gaps_since = self.gaps.snapshot()
        job.emitted_before = job.emitted
        heapq.heappush(self._decodes, (self.steps + job.output_tokens - job.emitted, job.number, job))
        self.context_tokens += job.computed

    def _end(self, job: Job) -> None:
        job.running = False
        job.emitted = job.output_tokens
        job.last_token_s = self.loop.now
        self.context_tokens -= job.prompt_tokens + job.output_tokens - 1
        job.unnamed += job.output_tokens - job.emitted_before
        self.give_back(job)
        self._on_answer(self, job)

    def _give_way(self) -> None:
        """No room for a token of every decode: the last by order is computed again later."""
        candidates = [*self.prefills, *(job for _, _, job in self._decodes)]
        job = max(candidates, key=lambda j: (j in self._turns.put_back and not j.emitted, j.order))
        self.preemptions_total += 1
        if job in self.prefills:
            self.prefills.remove(job)
        else:
            self._take_out(job)
        job.running = False
        drop_room(self.cache, job)
        job.goal = job.prompt_tokens + job.emitted
        job.computed = 0
        self._enqueue(job)

    def _take_out(self, job: Job) -> None:
        at = next(i for i, entry in enumerate(self._decodes) if entry[2] is job)
        finish = self._decodes[at][0]
        job.emitted = job.output_tokens - (finish - self.steps)
        job.unnamed += job.emitted - job.emitted_before
        job.computed = job.prompt_tokens + job.emitted - 1
        self.context_tokens -= job.computed
        job.last_token_s = self.loop.now
        self._decodes[at] = self._decodes[-1]
        self._decodes.pop()
        heapq.heapify(self._decodes)


def _mixed(old: float, first: float, recent: float, kept: float) -> float:
    """An exponential mean after a leap; before it there may have been none."""
    return (old or first) * kept + recent * (1 - kept)
