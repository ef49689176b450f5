"""How many prompt tokens a step may compute beside running decodes, so that their tokens come in time.

A step's decodes wait for its prompts. So a step with decodes may take `_SHARE` of the inter-token target: what the
decodes themselves are expected to cost, and the rest in prompt tokens, by the step costs that were measured
(engine/step_cost.py).

    no decodes in the step, or no target    no limit but max_batch_tokens
    decodes alone leave next to nothing     the first prompt of the step still gets `_LEAST_TOKENS`: it always goes on
    decodes alone miss the target           nothing keeps it any more: prompts get a quarter of what the decodes take
    nothing measured yet                    small chunks first; the next one at most twice what was ever measured
"""

from __future__ import annotations

import math

from engine.step_cost import StepCost, StepCostEstimate

_SHARE = 0.8
_SHARE_BESIDE_LATE = 0.25
_LEAST_TOKENS = 32
_GRANULE_TOKENS = 16  # chunks of odd lengths gain nothing


class Allowance:
    """What one step may spend on prompts. Ask `tokens` for a prompt, compute at most as many, then `spend` them."""

    def __init__(self, cost: StepCost, left_ms: float, most_tokens: float, least_tokens: int) -> None:
        self._cost = cost
        self.left_ms = left_ms
        self._most_tokens = most_tokens
        self._least_tokens = least_tokens  # of the step's first prompt

    @property
    def open(self) -> bool:
        """Whether a prompt that begins could get any tokens."""
        return self.tokens(0) > 0

    def tokens(self, start: int) -> int:
        """For a prompt of which `start` tokens are computed: a multiple of 16, or 0."""
        limit = min(self._affordable(start), self._most_tokens)
        if math.isinf(limit):
            return _UNLIMITED_TOKENS
        return max(self._least_tokens, int(limit) // _GRANULE_TOKENS * _GRANULE_TOKENS)

    def spend(self, start: int, tokens: int) -> None:
        c = self._cost
        self.left_ms -= c.ms(1, tokens, 0, tokens * (start + tokens / 2)) - c.constant_ms
        self._most_tokens -= tokens
        self._least_tokens = 0

    def _affordable(self, start: int) -> float:
        """The largest n with per_sequence + per_token n + per_attention_pair n (start + n / 2) <= what is left."""
        c = self._cost
        left = self.left_ms - c.per_sequence_ms
        if left <= 0:
            return 0.0
        a, b = c.per_attention_pair_ms / 2, c.per_token_ms + c.per_attention_pair_ms * start
        root = math.sqrt(b * b + 4 * a * left)
        return 2 * left / (b + root) if b + root > 0 else math.inf


_UNLIMITED_TOKENS = 1 << 40
UNLIMITED = Allowance(StepCost(), math.inf, math.inf, 0)


class ChunkBudget:
    """`itl_target_ms` None: no limits. `estimate` is observed elsewhere."""

    def __init__(self, itl_target_ms: float | None, estimate: StepCostEstimate) -> None:
        self._target_ms = itl_target_ms
        self._estimate = estimate

    def allowance(self, decodes: int, context_tokens: int, drafts: int = 0) -> Allowance:
        """For a step with so many decodes, which read so many tokens of context together, and so many drafts."""
        if self._target_ms is None or decodes == 0:
            return UNLIMITED
        cost = self._estimate.cost()
        decodes_ms = cost.ms(decodes, decodes + drafts, context_tokens, 0)
        if decodes_ms > self._target_ms:
            left_ms = _SHARE_BESIDE_LATE * decodes_ms
        else:
            left_ms = _SHARE * self._target_ms - decodes_ms
        most_tokens = max(_LEAST_TOKENS, 2 * self._estimate.known_prompt_tokens)
        return Allowance(cost, left_ms, most_tokens, _LEAST_TOKENS)

    def stretch(self, decodes: int, context_tokens: int, batch_tokens: int) -> float:
        """By how much the time of a prompt exceeds what its tokens cost: its steps have other things in them."""
        cost = self._estimate.cost()
        beside_ms = cost.ms(decodes + 1, decodes, context_tokens, 0)
        room_ms = cost.per_token_ms * batch_tokens
        if self._target_ms is not None and decodes:
            least_ms = cost.per_token_ms * _LEAST_TOKENS
            room_ms = min(room_ms, max(least_ms, self.allowance(decodes, context_tokens).left_ms))
        return 1.0 + beside_ms / room_ms if room_ms > 0 else 1.0

    def prompt_ms(self, start: int, tokens: int) -> float:
        """Of `tokens` after `start` computed ones, by themselves."""
        cost = self._estimate.cost()
        return tokens * (cost.per_token_ms + cost.per_attention_pair_ms * (start + tokens / 2))
