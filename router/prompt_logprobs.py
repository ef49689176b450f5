"""Log-probabilities of a request's prompt, on their way from the worker that computes it.

They come chunk by chunk, in order and before the first token. A leg that begins anew says them from the beginning: what
is there already stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Columns; row i is about prompt token i + 1, and `ids` and `values` [n, alternatives] are best first."""

    own: np.ndarray
    ranks: np.ndarray
    ids: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.own)


class PromptLogprobs:
    def __init__(self, prompt_tokens: int, alternatives: int) -> None:
        self._length = prompt_tokens
        self._alternatives = alternatives
        floats, numbers = np.float32, np.uint32
        none = np.zeros(0, floats), np.zeros(0, numbers)
        self._parts = [Scores(*none, np.zeros((0, alternatives), numbers), np.zeros((0, alternatives), floats))]
        self._count = 0

    @property
    def entries(self) -> int:
        """Log-probabilities in all, once they are there."""
        return (self._length - 1) * (1 + self._alternatives)

    @property
    def complete(self) -> bool:
        return self._count == self._length - 1

    def take(self, message: Any) -> str:
        """`message` as PromptLogprobs in generate.proto. Returns why it cannot be."""
        count, width = len(message.logprobs), message.alternatives
        position, due = message.position, self._count + 1
        if position > due:
            return f"log-probabilities of the prompt came for position {position} where {due} was due"
        if (
            width != self._alternatives
            or len(message.ranks) != count
            or len(message.top_token_ids) != count * width
            or len(message.top_logprobs) != count * width
            or position < 1
            or position + count > self._length
        ):
            return f"log-probabilities of the prompt do not fit: {count} from position {position}, {width} alternatives"
        new = slice(due - position, None)
        own = np.asarray(message.logprobs, dtype=np.float32)[new]
        if len(own):
            ids = np.asarray(message.top_token_ids, dtype=np.uint32).reshape(count, width)[new]
            values = np.asarray(message.top_logprobs, dtype=np.float32).reshape(count, width)[new]
            self._parts.append(Scores(own, np.asarray(message.ranks, dtype=np.uint32)[new], ids, values))
            self._count += len(own)
        return ""

    def scores(self) -> Scores:
        """All of them; only when complete."""
        assert self.complete, "some are still to come"
        if len(self._parts) > 1:
            columns = ("own", "ranks", "ids", "values")
            self._parts = [Scores(*(np.concatenate([getattr(part, name) for part in self._parts]) for name in columns))]
        return self._parts[0]
