"""What an engine knows of its steps, by the engine's own estimator: at the start, and from leap to leap.

Workers of both kinds start with what `learned_steps` says: a live worker has run steps before it registers
(worker/warm_up.py), and what a simulation is to show is not how the first seconds of an engine go. The fit is linear
and the cost model has a floor, so what is learned is not the truth; and a prefill worker, which sees prompts only,
learns something else.

From there both go on learning. What the coefficients wander to, between one kind of load and another, is no detail:
chunks are cut by them and requests placed by them. With coefficients that stood still, the router split a quarter
fewer requests (docs/lab-notes.md).
"""

from __future__ import annotations

import copy
import functools
from itertools import product

from engine.step_cost import (
    ERROR_WEIGHT,
    INERTIA,
    MEMORY,
    SHORT_MEMORY,
    SWEEPS,
    TRUSTED,
    UNITS,
    StepCostEstimate,
    StepShape,
)
from engine.step_cost import StepCost as LearnedCost
from simulator.cost_model import StepCost

_ROUNDS = 4
_DECODES = (1, 4, 16, 48)
_ALONE = 6  # steps of decodes alone for each that has a chunk beside them
_CONTEXT_TOKENS = 8192  # of one decode
# Of the largest step. Beside decodes the chunk budget keeps most chunks near one length.
_CHUNK_SHARES = {True: (1 / 8, 5 / 8, 5 / 8), False: (1 / 16, 1 / 4, 1 / 2, 1.0)}
_STARTS = (0, 2048, 16384)

_SEQUENCES, _TOKENS, _CONTEXT, _PAIRS = UNITS[1:]
_MOST_ROUNDS = 4  # of solving, for all steps of which nothing was asked between


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


class LeapEstimate(StepCostEstimate):
    """The engine's estimator for steps that come in runs, and are asked about now and then only.

    A run of like steps is one update of the sums, in closed form. It is solved when somebody asks: as often as the
    engine would have done, up to `_MOST_ROUNDS` times. One step at a time, asked after each, it is the engine's own to
    the last bits (tests/unit/simulator/test_learned.py); written out, because a simulation has millions of leaps.
    """

    def __init__(self, learned: StepCostEstimate) -> None:
        super().__init__()
        self.steps, self.known_prompt_tokens = learned.steps, learned.known_prompt_tokens
        self.relative_error = learned.relative_error
        self._weights = [*learned._weights]
        p = learned._products
        # (x x') for x = one, sequences, tokens, context, pairs: the upper half, row by row; then x itself.
        self._flat = (
            p[0][0], p[0][1], p[0][2], p[0][3], p[0][4], p[1][1], p[1][2], p[1][3], p[1][4],
            p[2][2], p[2][3], p[2][4], p[3][3], p[3][4], p[4][4], *learned._sums,
        )  # fmt: skip
        self._cost = super().cost()
        self._unsolved = 0  # steps

    def cost(self) -> LearnedCost:
        if self._unsolved:
            self._solve()
        return self._cost

    def observe(self, shape: StepShape, duration_ms: float) -> None:
        s = shape
        if duration_ms > 0 and s.tokens:
            self.observe_run(
                s.sequences, s.tokens, s.context_tokens, s.attention_pairs, s.prompt_tokens, duration_ms, 1
            )

    def observe_run(
        self,
        sequences: float,
        tokens: float,
        context_tokens: float,
        attention_pairs: float,
        prompt_tokens: int,
        ms: float,
        count: int,
    ) -> None:
        """`count` steps of about this shape and duration."""
        if prompt_tokens > self.known_prompt_tokens:
            self.known_prompt_tokens = prompt_tokens
        x0 = 1.0 / ms
        x1, x2 = sequences / _SEQUENCES * x0, tokens / _TOKENS * x0
        x3, x4 = context_tokens / _CONTEXT * x0, attention_pairs / _PAIRS * x0
        w0, w1, w2, w3, w4 = self._weights
        expected = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4
        off = expected - 1.0 if expected > 1.0 else 1.0 - expected
        trust = 1.0
        if self.steps:
            error = off / expected if expected > 1.0 else off
            if error > TRUSTED:
                trust = TRUSTED / error
            if off > 1.0:
                off = 1.0
            self.relative_error = off + (self.relative_error - off) * (1.0 - ERROR_WEIGHT) ** count
        self.steps += count
        memory = SHORT_MEMORY if self.relative_error > TRUSTED else MEMORY
        if count > 1:
            kept = memory**count
            trust *= (1.0 - kept) / (1.0 - memory)
        else:
            kept = memory
        y0, y1, y2, y3, y4 = trust * x0, trust * x1, trust * x2, trust * x3, trust * x4
        a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, s0, s1, s2, s3, s4 = self._flat
        self._flat = (
            kept * a + y0 * x0, kept * b + y0 * x1, kept * c + y0 * x2, kept * d + y0 * x3, kept * e + y0 * x4,
            kept * f + y1 * x1, kept * g + y1 * x2, kept * h + y1 * x3, kept * i + y1 * x4,
            kept * j + y2 * x2, kept * k + y2 * x3, kept * m + y2 * x4,
            kept * n + y3 * x3, kept * o + y3 * x4, kept * p + y4 * x4,
            kept * s0 + y0, kept * s1 + y1, kept * s2 + y2, kept * s3 + y3, kept * s4 + y4,
        )  # fmt: skip
        self._unsolved += count

    def _solve(self) -> None:
        a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, s0, s1, s2, s3, s4 = self._flat
        w0, w1, w2, w3, w4 = self._weights
        inertia = INERTIA * a
        # What a row is divided by.
        v0, v1, v2, v3, v4 = (1.0 / (row + inertia) for row in (a, f, j, n, p))
        for _ in range(min(self._unsolved, _MOST_ROUNDS)):
            q0, q1, q2, q3, q4 = (
                s0 + inertia * w0, s1 + inertia * w1, s2 + inertia * w2, s3 + inertia * w3, s4 + inertia * w4
            )  # fmt: skip
            for _ in range(SWEEPS):
                w0 = (q0 - b * w1 - c * w2 - d * w3 - e * w4) * v0
                if w0 < 0.0:
                    w0 = 0.0
                w1 = (q1 - b * w0 - g * w2 - h * w3 - i * w4) * v1
                if w1 < 0.0:
                    w1 = 0.0
                w2 = (q2 - c * w0 - g * w1 - k * w3 - m * w4) * v2
                if w2 < 0.0:
                    w2 = 0.0
                w3 = (q3 - d * w0 - h * w1 - k * w2 - o * w4) * v3
                if w3 < 0.0:
                    w3 = 0.0
                w4 = (q4 - e * w0 - i * w1 - m * w2 - o * w3) * v4
                if w4 < 0.0:
                    w4 = 0.0
        self._weights = [w0, w1, w2, w3, w4]
        self._cost = LearnedCost(w0, w1 / _SEQUENCES, w2 / _TOKENS, w3 / _CONTEXT, w4 / _PAIRS)
        self._unsolved = 0
