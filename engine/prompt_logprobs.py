"""Log-probabilities of a prompt's own tokens: which rows of a step are asked for, and what comes of them. No torch.

A prompt whose log-probabilities are wanted is computed whole: what the prefix cache has of it has no logits. A row of
logits is as wide as the vocabulary, so a step takes only so many rows of such prompts that their logits stay small;
whatever computes the model gives them as it gives those that are sampled from.

Once there is a token of the answer they are not asked for any more: they left before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LOGITS_BYTES = 64 << 20  # of float32, in one step; beside them a model may hold the same in its own type
_LEAST_ROWS = 16


def rows_at_once(vocab_size: int) -> int:
    """In one step, of all prompts whose log-probabilities are wanted."""
    return max(_LEAST_ROWS, _LOGITS_BYTES // (4 * vocab_size))


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Of consecutive prompt tokens, from `position` in the prompt on: each given those before it, of the model's raw
    distribution. The prompt's first token has none. `ranks`: 1 is the likeliest. The best alternatives, best first.
    """

    position: int
    own: np.ndarray  # [n] float32
    ranks: np.ndarray  # [n] uint32
    ids: np.ndarray  # [n, k] uint32
    values: np.ndarray  # [n, k] float32

    def __len__(self) -> int:
        return len(self.own)
