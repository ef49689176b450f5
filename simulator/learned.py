"""What an engine knows of its steps when it has served for a while, by the engine's own estimator.

Workers of both kinds start with it: a live worker has run steps before it registers (worker/warm_up.py), and what a
simulation is to show is not how the first seconds of an engine go. The fit is linear and the cost model has a floor, so
what is learned is not the truth; and a prefill worker, which sees prompts only, learns something else.
"""

from __future__ import annotations

import copy
import functools
from itertools import product

from engine.step_cost import StepCostEstimate, StepShape
from simulator.cost_model import StepCost

_ROUNDS = 4
_DECODES = (1, 4, 16, 48)
_ALONE = 6  # steps of decodes alone for each that has a chunk beside them
_CONTEXT_TOKENS = 8192  # of one decode
# Of the largest step. Beside decodes the chunk budget keeps most chunks near one length.
_CHUNK_SHARES = {True: (1 / 8, 5 / 8, 5 / 8), False: (1 / 16, 1 / 4, 1 / 2, 1.0)}
_STARTS = (0, 2048, 16384)


def learned_steps(cost: StepCost, max_batch_tokens: int, *, decodes: bool) -> StepCostEstimate:
    """`decodes` False: of a worker that computes prompts only. Each caller has its own, to go on learning."""
    return copy.deepcopy(_learned(cost, max_batch_tokens, decodes))


@functools.lru_cache(maxsize=16)
def _learned(cost: StepCost, max_batch_tokens: int, decodes: bool) -> StepCostEstimate:
    estimate = StepCostEstimate()
    for _ in range(_ROUNDS):
        for share, start in product(_CHUNK_SHARES[decodes], _STARTS):
            chunk = max(1, int(share * max_batch_tokens))
            if not decodes:
                _observe(estimate, cost, 0, chunk, start)
                continue
            for n in _DECODES:
                for _ in range(_ALONE):
                    _observe(estimate, cost, n, 0, 0)
                _observe(estimate, cost, n, chunk, start)
    return estimate


def prompt_rate(cost: StepCost, max_batch_tokens: int) -> float:
    """Tokens a second of a prompt that fills a step."""
    return max_batch_tokens / cost.prompt_ms(max_batch_tokens, max_batch_tokens) * 1e3


def _observe(estimate: StepCostEstimate, cost: StepCost, decodes: int, chunk: int, start: int) -> None:
    shape = StepShape(
        decodes + (chunk > 0), decodes + chunk, decodes * _CONTEXT_TOKENS, chunk * (start + chunk / 2), chunk
    )
    estimate.observe(shape, cost.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs))
