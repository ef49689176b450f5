"""A few steps before the first request: the first pass through a model is the slow one, and rates need a start."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.step_cost import StepCostEstimate
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.layout import Rule
from worker.loop import Runner
from worker.rates import StepRates

_PROMPT_TOKENS = 256
_ANSWER_TOKENS = 8


def warm_up(
    runner: Runner,
    limits: EngineLimits,
    blocks: Sequence[int],
    rules: Sequence[Rule],
    rates: StepRates,
    step_cost: StepCostEstimate,
) -> None:
    """Runs in a pool of its own over the same memory, before anything else uses it; leaves only measurements behind.

    `blocks` and `rules`: by group of the KV layout.
    """
    room = min(limits.context_limit_tokens, blocks[0] * limits.block_tokens) - _ANSWER_TOKENS - 1
    num_tokens = min(_PROMPT_TOKENS, limits.max_batch_tokens, room)
    if num_tokens < 1:
        return
    for _ in range(2):  # the second time is what a request will see
        core = EngineCore(limits, BlockPool(blocks), step_cost=step_cost, rules=rules)
        sampling = SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0.5, seed=1)
        prompt = [i % limits.vocab_size for i in range(num_tokens)]
        if core.add(SequenceSpec(1, prompt, sampling), 0.0) is not None:
            return
        rates.forget()
        step_cost.forget()
        while (plan := core.schedule(started := time.monotonic())) is not None:
            result = runner.execute(plan)
            ended = time.monotonic()
            rates.observe(plan, ended - started)
            core.commit(plan, result, ended)
