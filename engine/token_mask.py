"""Tokens that a request allows alone, and sequences of tokens that its answer must not hold (`bad_words`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TokenMask:
    """Of one sequence. `bad_words`: each of at least one token."""

    def __init__(self, allowed: Sequence[int], bad_words: Sequence[Sequence[int]]) -> None:
        self.allowed = np.unique(np.asarray(allowed, dtype=np.int64)) if len(allowed) else None  # None: all
        last: dict[tuple[int, ...], list[int]] = {}  # by the tokens before it
        for word in bad_words:
            last.setdefault(tuple(word[:-1]), []).append(word[-1])
        self._always = np.asarray(last.pop((), []), dtype=np.int64)
        self._last = last
        self._lengths = sorted({len(before) for before in last})

    def banned(self, history: Sequence[int], prompt_len: int) -> np.ndarray:
        """What may not come next. A word that begins in the prompt is not the answer's."""
        banned = self._always
        answered = len(history) - prompt_len
        for length in self._lengths:
            if length > answered:
                break
            last = self._last.get(tuple(history[-length:]))
            if last is not None:
                banned = np.concatenate((banned, last))
        return banned
