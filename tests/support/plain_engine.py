"""A runner under the engine's core alone, without a worker around them."""

from __future__ import annotations

import torch

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits


class Engine:
    """`answers`: tokens by sequence. `run` ends when nothing is left to compute."""

    def __init__(self, runner: ModelRunner, batch_tokens: int = 20, root: str = "") -> None:
        self.runner = runner
        limits = EngineLimits(runner.block_tokens, batch_tokens, 8, 8, 256, runner.facts.vocab_size)
        rules = [group.rule for group in runner.facts.groups]
        self.core = EngineCore(limits, BlockPool(runner.num_blocks), root, rules=rules)
        self.answers: dict[int, list[int]] = {}

    def run(self) -> None:
        while (plan := self.core.schedule(0.0)) is not None:
            for token in self.core.commit(plan, self.runner.execute(plan), 0.0).tokens:
                self.answers.setdefault(token.sequence_id, []).append(token.token_id)
        self.core.check()


def some_prompts(*lengths: int) -> dict[int, list[int]]:
    """By their lengths."""
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths}
