"""The engine's core in virtual time: a step takes what a given formula says, and its tokens mean nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.step_cost import StepShape, shape_of
from engine.types import SamplingParams, SequenceSpec, StepResult


@dataclass
class VirtualEngine:
    step_ms: Callable[[StepShape], float]
    itl_target_ms: float | None = None
    max_batch_tokens: int = 8192
    num_blocks: int = 8000
    now: float = 0.0
    shapes: list[StepShape] = field(default_factory=list)
    durations_ms: list[float] = field(default_factory=list)
    token_times: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = EngineLimits(32, self.max_batch_tokens, 256, 1024, 32768, 1000, self.itl_target_ms)
        self.core = EngineCore(limits, BlockPool(self.num_blocks))

    def add(self, sequence_id: int, prompt_tokens: int, max_tokens: int) -> None:
        rng = random.Random(sequence_id)
        prompt = [rng.randrange(1000) for _ in range(prompt_tokens)]
        assert self.core.add(SequenceSpec(sequence_id, prompt, SamplingParams(max_tokens=max_tokens)), self.now) is None
        self.token_times[sequence_id] = []

    def step(self) -> bool:
        plan = self.core.schedule(self.now)
        if plan is None:
            return False
        shape = shape_of(plan.items)
        self.shapes.append(shape)
        self.durations_ms.append(self.step_ms(shape))
        self.now += self.durations_ms[-1] / 1e3
        tokens = tuple(1 if item.sample else None for item in plan.items)
        for token in self.core.commit(plan, StepResult(tokens, (None,) * len(tokens)), self.now).tokens:
            self.token_times[token.sequence_id].append(self.now)
        return True

    def forget_steps(self) -> None:
        self.shapes.clear()
        self.durations_ms.clear()
