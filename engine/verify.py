"""Which drafts are what the model would have said: each position is sampled as if it were a step of its own.

    a row of logits for the last token, and one for each draft
    draw        positions that look at nothing but their logits and (seed, position): all at once
    accept      a draft that is the token sampled before it lets the next row count; the first that is not ends it

Penalties, bad words and grammars look at the tokens before. So their rows are drawn one after the other, with the
tokens accepted so far counted, and the grammar in a copy that has heard them; the sequence's own hears them at the
commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.grammar import Matcher
from engine.sampler import Drawn, Sampler
from engine.types import PlanItem, Sampled


@dataclass(slots=True)
class _Trial:
    """An item that is verified row by row. `row`: its first in the logits."""

    item: PlanItem
    row: int
    history: list[int]
    matcher: Matcher | None
    tokens: list[Sampled]

    def goes_on(self) -> bool:
        """Whether its last token is the draft of the next row, which then counts."""
        at, token = len(self.tokens) - 1, self.tokens[-1][0]
        drafts = self.item.drafts
        if at >= len(drafts) or token != drafts[at]:
            return False
        self.history.append(token)
        matcher = self.matcher
        return matcher is None or (matcher.advance((token,)) and not matcher.complete)

    def next(self) -> PlanItem:
        done = len(self.tokens)
        return replace(
            self.item, position=self.item.position + done, history=self.history, matcher=self.matcher, drafts=()
        )


class Verification:
    """Of a step with drafts. `logits` has, item after item, a row for each position that is sampled."""

    def __init__(self, sampler: Sampler, logits: torch.Tensor, items: Sequence[PlanItem]) -> None:
        self._items = items
        self._logits = logits
        self._at: list[tuple[int, int]] = []  # by item: its first row in what is drawn at once, and in the logits
        flat: list[PlanItem] = []
        rows: list[int] = []
        first = 0
        for item in items:
            self._at.append((len(flat), first))
            count = 1 if _looks_back(item) else 1 + len(item.drafts)
            flat.append(item)
            flat += [replace(item, position=item.position + i, drafts=()) for i in range(1, count)]
            rows += range(first, first + count)
            first += 1 + len(item.drafts)
        assert first == len(logits)
        self._drawn = sampler.draw(logits if len(rows) == first else logits[rows], flat)

    @property
    def drawn(self) -> Drawn:
        return self._drawn

    def read(self) -> list[list[Sampled]]:
        """By item, its tokens: one, and one more for each accepted draft. In place of the first there may be a cause
        (engine/sampler.py); where a later one has a cause, its step will find it.
        """
        tokens, logprobs = self._drawn.read()
        found: list[list[Sampled]] = []
        trials: list[_Trial] = []
        for item, (at, row) in zip(self._items, self._at, strict=True):
            own: list[Sampled] = [(tokens[at], logprobs[at])]
            found.append(own)
            if item.drafts and _looks_back(item):
                matcher = None if item.matcher is None else item.matcher.copy()
                trials.append(_Trial(item, row, list(item.history), matcher, own))
                continue
            for i, draft in enumerate(item.drafts, 1):
                if own[-1][0] != draft or tokens[at + i] < 0:
                    break
                own.append((tokens[at + i], logprobs[at + i]))
        self._one_by_one(trials)
        return found

    def _one_by_one(self, trials: list[_Trial]) -> None:
        sampler = Sampler(self._logits.shape[-1]) if trials else None
        while trials := [trial for trial in trials if trial.goes_on()]:
            assert sampler is not None
            rows = [trial.row + len(trial.tokens) for trial in trials]
            tokens, logprobs = sampler.sample(self._logits[rows], [trial.next() for trial in trials])
            drawn = [(t, f) for t, f in zip(trials, zip(tokens, logprobs, strict=True), strict=True) if f[0] >= 0]
            for trial, found in drawn:
                trial.tokens.append(found)
            trials = [trial for trial, _ in drawn]


def _looks_back(item: PlanItem) -> bool:
    return item.matcher is not None or item.sampling.looks_back
