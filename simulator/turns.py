"""Whose turn it is among a leap worker's prompts. As engine/scheduler.py."""

from __future__ import annotations

import math

from engine.chunk_budget import ChunkBudget
from engine.overload import TURN_STEPS, Need, put_back
from simulator.jobs import Job, by_order
from simulator.learned import LeapEstimate
from simulator.prefix_cache import PrefixCache

FOR_EVER = 1 << 30


class Turns:
    """`due_dates`: by due date, some put back under overload; else in the order of arrival."""

    def __init__(
        self, learned: LeapEstimate, budget: ChunkBudget, cache: PrefixCache, max_batch_tokens: int, *, due_dates: bool
    ) -> None:
        self._learned, self._budget, self._cache = learned, budget, cache
        self.max_batch_tokens, self._due_dates = max_batch_tokens, due_dates
        self.put_back: list[Job] = []  # in the last line
        self.sharing = False  # they and those ahead of them take turns
        self._turn = 0
        self._looks = 0

    def line(
        self, prefills: list[Job], waiting: list[Job], now: float, decodes: int, context_tokens: int
    ) -> tuple[list[Job], int]:
        """Prompts in the order of their turns, and for how many steps that holds."""
        if prefills and waiting:
            line = sorted([*prefills, *waiting], key=by_order)
        else:
            line = [*prefills] if prefills else [*waiting]
        self.put_back = []
        self.sharing = False
        if not self._due_dates:
            return line, FOR_EVER
        stretch = self._budget.stretch(decodes, context_tokens, self.max_batch_tokens)
        cost = self._learned.cost()
        token_ms, pair_ms = cost.per_token_ms, cost.per_attention_pair_ms
        lefts_s: list[float] = []
        ends, in_time = now, True
        for job in line:
            done = job.computed or job.found
            rest = job.goal - done
            left_s = rest * (token_ms + pair_ms * (done + rest / 2)) / 1e3 * stretch  # as ChunkBudget.prompt_ms
            lefts_s.append(left_s)
            ends += left_s
            if not job.emitted and (now + left_s > job.due_s or ends > job.due_s):
                in_time = False
        if in_time:  # as mostly: then nobody is put back
            return line, FOR_EVER
        needs = [
            Need(math.inf if job.emitted else job.due_s, left_s, 0, job.weight)
            for job, left_s in zip(line, lefts_s, strict=True)
        ]
        back = put_back(needs, now)
        self.put_back = [line[i] for i in sorted(back)]
        self._look_again()
        if not back or len(back) == len(line):
            return line, FOR_EVER
        ahead = [job for i, job in enumerate(line) if i not in back]
        self.sharing = True
        if self._turn >= TURN_STEPS - 1:
            return [self.put_back[0], *ahead, *self.put_back[1:]], 1
        return [*ahead, *self.put_back], TURN_STEPS - 1 - self._turn

    def passed(self, steps: int) -> None:
        """So many steps with prompts while turns are shared."""
        self._turn = self._turn + steps if self._turn < TURN_STEPS - 1 else 0

    def _look_again(self) -> None:
        """What the cache holds of a put-back one may have grown since it came; one at a time, in turns."""
        waiting = [job for job in self.put_back if not job.running]
        if waiting:
            self._looks += 1
            job = waiting[self._looks % len(waiting)]
            job.found = self._cache.match(job.names) * self._cache.block_tokens
