"""Steps of a given shape, straight into the runner: what one costs, without queues or a scheduler around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.runner import ModelRunner
from engine.types import PlanItem, SamplingParams, StepPlan

_GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part: `tokens` new ones after `start`. One token after others is a decode."""

    start: int
    tokens: int


class Steps:
    """Owns all blocks of the runner. Parts of one step lie in blocks of their own; what the KV says does not matter."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._number = 0
        self._histories: dict[int, list[int]] = {}  # the sampler knows a sequence by its history

    def plan(self, parts: Sequence[Part]) -> StepPlan:
        block_tokens, first, items = self.runner.block_tokens, 0, []
        for i, part in enumerate(parts):
            end = part.start + part.tokens
            blocks = range(first, first - (-end // block_tokens))
            first = blocks.stop
            history = self._histories.setdefault(i, [1])
            tokens = [(17 * i + 31 * t) % self.runner.facts.vocab_size for t in range(part.tokens)]
            items.append(PlanItem(i, tokens, part.start, list(blocks), True, 0, _GREEDY, end, history))
        if first > self.runner.num_blocks[0]:
            raise ValueError(f"{first} blocks needed, the runner has {self.runner.num_blocks[0]}; raise num_blocks")
        self._number += 1
        return StepPlan(self._number, tuple(items))

    def ms(self, parts: Sequence[Part]) -> float:
        plan = self.plan(parts)
        begun = time.perf_counter()
        self.runner.execute(plan)
        return (time.perf_counter() - begun) * 1e3
