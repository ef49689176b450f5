"""What a step costs, learned from the steps that ran.

    step_ms = constant + per_sequence * S + per_token * T + per_context_token * K + per_attention_pair * A

    S   sequences in the step
    T   tokens computed in the step, of decodes and prompts
    K   KV tokens that decodes read: the sum of their contexts
    A   (new token, earlier token) pairs of prompts: a chunk of n tokens after s computed ones has n * (s + n / 2);
        and of drafts that are verified, which are read with a decode's context and looked at once more each

The formula of the simulator's cost model. Here the coefficients are learned as the engine runs: least squares over the
steps so far, older ones counting less and less, with no coefficient below zero, solved by coordinate descent from the
last solution. What keeps it sane whatever it is fed:

    relative     a step is weighed by 1 / its duration: a long prompt's step teaches no more than a decode's
    robust       a step that is far from what was expected counts less (Huber), so that a pause of the machine passes by
    near before  what recent steps say nothing about stays as it was learned
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.types import PlanItem

# About one of each makes features of like size: a constant, 16 sequences, 256 tokens, 16k of context, 256 x 2k pairs.
UNITS = (1.0, 16.0, 256.0, 16384.0, 524288.0)
_SIZE = len(UNITS)
MEMORY = 0.985  # what a step still counts one step later
SHORT_MEMORY = 0.9  # while most steps are not as expected: the machine has changed
TRUSTED = 0.3  # relative error up to which a step counts in full
INERTIA = 1e-3  # of the last solution, relative to the steps
SWEEPS = 4
ERROR_WEIGHT = 0.05


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step has to do, in the formula's terms; `prompt_tokens` are those of T that are no decodes."""

    sequences: int
    tokens: int
    context_tokens: int
    attention_pairs: float
    prompt_tokens: int


def shape_of(items: Iterable[PlanItem]) -> StepShape:
    sequences = tokens = context = prompt_tokens = 0
    pairs = 0.0
    for item in items:
        count = len(item.token_ids)
        sequences += 1
        tokens += count
        if item.decodes:
            context += item.start + 1
            if item.drafts:
                pairs += (count - 1) * (item.start + count / 2)
        else:
            prompt_tokens += count
            pairs += count * (item.start + count / 2)
    return StepShape(sequences, tokens, context, pairs, prompt_tokens)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds, none below zero; the formula is at the top of the module."""

    constant_ms: float = 0.0
    per_sequence_ms: float = 0.0
    per_token_ms: float = 0.0
    per_context_token_ms: float = 0.0
    per_attention_pair_ms: float = 0.0

    def ms(self, sequences: float, tokens: float, context_tokens: float, attention_pairs: float) -> float:
        return (
            self.constant_ms
            + self.per_sequence_ms * sequences
            + self.per_token_ms * tokens
            + self.per_context_token_ms * context_tokens
            + self.per_attention_pair_ms * attention_pairs
        )


class StepCostEstimate:
    """`observe` every step; `cost()` is what the next one is expected to cost."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.steps = 0
        self.known_prompt_tokens = 0  # the most prompt tokens of an observed step: beyond it the fit extrapolates
        self.relative_error = 0.0  # recent mean of |expected - measured| / measured
        self._weights = [0.0] * _SIZE  # milliseconds per unit
        # Of the normal equations: sums over steps of x x' and x, where x are the features over the duration.
        self._products = [[0.0] * _SIZE for _ in range(_SIZE)]
        self._sums = [0.0] * _SIZE

    def cost(self) -> StepCost:
        return StepCost(*(w / unit for w, unit in zip(self._weights, UNITS, strict=True)))

    def observe(self, shape: StepShape, duration_ms: float) -> None:
        """A duration of zero or less is no measurement: the clock stood, as in tests without one."""
        if duration_ms <= 0 or shape.tokens == 0:
            return
        self.known_prompt_tokens = max(self.known_prompt_tokens, shape.prompt_tokens)
        features = (1.0, shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)
        x = [f / unit / duration_ms for f, unit in zip(features, UNITS, strict=True)]
        expected = sum(w * v for w, v in zip(self._weights, x, strict=True))  # as a share of what it took
        trust = 1.0
        if self.steps > 0:
            error = abs(expected - 1.0) / max(expected, 1.0)
            trust = min(1.0, TRUSTED / error) if error > 0 else 1.0
            self.relative_error += ERROR_WEIGHT * (min(abs(expected - 1.0), 1.0) - self.relative_error)
        self.steps += 1
        memory = SHORT_MEMORY if self.relative_error > TRUSTED else MEMORY
        for i in range(_SIZE):
            row, own = self._products[i], trust * x[i]
            self._sums[i] = memory * self._sums[i] + own
            for j in range(_SIZE):
                row[j] = memory * row[j] + own * x[j]
        self._solve()

    def _solve(self) -> None:
        products, sums, weights = self._products, self._sums, self._weights
        inertia = INERTIA * products[0][0]
        pull = [total + inertia * w for total, w in zip(sums, weights, strict=True)]
        for _ in range(SWEEPS):
            for i in range(_SIZE):
                row = products[i]
                rest = pull[i] + row[i] * weights[i]
                for j in range(_SIZE):
                    rest -= row[j] * weights[j]
                weights[i] = max(0.0, rest / (row[i] + inertia))
