"""The rule of a beam search: which continuations live on, and which answers are kept. No torch, no blocks.

As transformers' `generate(num_beams=...)`: in each step every beam has its best continuations by log-probability
(log_softmax of float32 logits), added to the beam's score in float32. Of all of them, best first:

    those of the first `width` that end the answer   are answers with score / length ** length_penalty
    the first `width` of those that do not           are the beams of the next step

The best `width` answers are kept. It is over when no beam may grow longer; when `width` answers are there and
`early_stopping` is true; or when they are there and the best beam, at its length now (with "never", and a positive
penalty, at the greatest length), is no better than the worst of them. Where scores are equal, transformers leaves the
order open; here the earlier beam goes first, then the smaller token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

EarlyStopping = Literal["never"] | bool


@dataclass(frozen=True, slots=True)
class BeamParams:
    width: int
    answers: int = 1  # so many are wanted, best first
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


class BeamAnswer(NamedTuple):
    token_ids: tuple[int, ...]
    score: float
    stopped: bool  # by an end token; else by its length


class Grown(NamedTuple):
    """A beam of the next step: that of this one with one more token."""

    beam: int
    token_id: int


class BeamRule:
    """`ends`: tokens that end an answer of more than `least_tokens` tokens, and cannot be in a shorter one."""

    def __init__(self, params: BeamParams, ends: frozenset[int], least_tokens: int, most_tokens: int) -> None:
        self._params = params
        self._ends = ends
        self._least = least_tokens
        self._most = most_tokens
        self._scores = [np.float32(0)]
        self._tokens: list[tuple[int, ...]] = [()]
        self._answers: list[tuple[np.float32, BeamAnswer]] = []
        self.over = False

    @property
    def candidates(self) -> int:
        """So many of each beam are enough: the others' places are taken whatever they are."""
        return self._params.width + len(self._ends)

    @property
    def length(self) -> int:
        return len(self._tokens[0])

    def step(self, rows: Sequence[Sequence[tuple[int, float]]]) -> list[Grown]:
        """`rows`: of each beam the best tokens and their log-probabilities, best first. Returns the next step's beams,
        best first; none: it is over.
        """
        assert len(rows) == len(self._scores)
        assert not self.over
        width, length = self._params.width, self.length + 1
        found = [
            (score + np.float32(value), -beam, -token)
            for beam, (score, row) in enumerate(zip(self._scores, rows, strict=True))
            for token, value in row
            if length > self._least or token not in self._ends
        ]
        found.sort(reverse=True)
        grown: list[Grown] = []
        scores: list[np.float32] = []
        for place, (score, beam, token) in enumerate(found):
            stops = -token in self._ends
            if stops or length >= self._most:
                if place < width:
                    self._keep(score, (*self._tokens[-beam], -token), stopped=stops)
            elif len(grown) < width:
                grown.append(Grown(-beam, -token))
                scores.append(score)
        self.over = not grown or self._settled(scores[0], length)
        if self.over:
            return []
        self._tokens = [(*self._tokens[beam], token) for beam, token in grown]
        self._scores = scores
        return grown

    def answers(self) -> tuple[BeamAnswer, ...]:
        """Best first."""
        return tuple(answer for _, answer in self._answers[: self._params.answers])

    def _keep(self, score: np.float32, token_ids: tuple[int, ...], *, stopped: bool) -> None:
        score = score / np.float32(len(token_ids) ** self._params.length_penalty)
        self._answers.append((score, BeamAnswer(token_ids, float(score), stopped)))
        self._answers.sort(key=lambda one: one[0], reverse=True)
        del self._answers[self._params.width :]

    def _settled(self, best: np.float32, length: int) -> bool:
        """Nothing that the beams come to would change the answers."""
        params = self._params
        if len(self._answers) < params.width:
            return False
        if params.early_stopping is True:
            return True
        longest = self._most if params.early_stopping == "never" and params.length_penalty > 0 else length
        return bool(best / np.float32(longest**params.length_penalty) <= self._answers[-1][0])
