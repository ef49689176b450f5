"""A prediction head needs the model's hidden states: it is asked only for rows that the sequence's own steps here have
made, after the last word on them, and begins where the first of them stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.draft_plans import DraftLimits, DraftPlans
from engine.sequence import Sequence as Running
from engine.speculation import SpeculationLimits
from engine.types import TO_COME, PlanItem, SamplingParams, StepPlan
from tests.support.scripted import ScriptedStep, kv_mark, prefix_mark
from tests.unit.engine.test_draft_plans import FAR, DraftBench, Drafter, course
from tests.unit.engine.test_speculation import BLOCK, WORDS, both, prompt

_BY_ITSELF = -1  # KV of a row whose state was the head's own


class Head(Drafter):
    """Notes for each place in the blocks whose hidden state lies there, and of which tokens."""

    def begin(self, bench: DraftBench, right: Callable[[], int]) -> None:
        super().begin(bench, right)
        self.states: dict[tuple[int, int], tuple[int, Callable[[], int]]] = {}
        self.bases: list[int] = []

    def launch(self, plan: StepPlan) -> ScriptedStep:
        step = super().launch(plan)
        assert self.drafted is not None
        for item in self.drafted:
            history, drafts = item.history, list(item.drafts)
            known = [*history[: item.start + len(item.token_ids) - len(drafts)], *drafts]
            for row in range(item.start, item.start + len(item.token_ids)):
                place = item.block_ids[row // BLOCK], row % BLOCK
                self.states[place] = item.sequence_id, _mark(known if row < len(known) else history, row)
        self.drafted = []
        return step

    drafted: list[PlanItem] | None = None

    def _drafted(self, item: PlanItem) -> PlanItem:
        found = self._by_the_head(item)
        self.drafted = [*(self.drafted or ()), found]
        return found

    def _by_the_head(self, item: PlanItem) -> PlanItem:
        work = item.draft
        if work is None:
            assert TO_COME not in item.drafts
            return item
        tokens, number = list(item.history), item.sequence_id
        assert 0 <= work.base <= work.start < work.end < len(tokens)
        last = work.end + max(0, len(item.drafts) - 1)

        def place(row: int) -> tuple[int, int]:
            own = row - work.base
            return item.block_ids[work.base // BLOCK + own // BLOCK], own % BLOCK

        for row in range(work.base, work.start):
            assert (number, place(row)) in self.wrote, f"sequence {number} reads KV that it has not written"
            assert self.slots[place(row)] == prefix_mark(tokens[: row + 2]), f"sequence {number} reads other KV"
        for row in range(work.start, work.end):
            whose, mark = self.states[item.block_ids[row // BLOCK], row % BLOCK]
            assert whose == number, f"sequence {number} reads a state of sequence {whose}"
            assert mark() == prefix_mark(tokens[: row + 1]), "a state of other tokens"
            self.slots[place(row)] = prefix_mark(tokens[: row + 2])
        drafts: list[int] = []
        if item.drafts:
            assert work.end == len(tokens) - 1
            self.bases.append(work.base)
            prompt_, _ = self.bench.sampling[number]
            after = self.bench.expected(number)[len(tokens) - len(prompt_) :]
            right = self.right()
            drafts = [after[i] if i < min(right, len(after)) else WORDS for i in range(len(item.drafts))]
        for row in range(work.end, last):
            self.slots[place(row)] = _BY_ITSELF
        self.wrote |= {(number, place(row)) for row in range(work.start, last)}
        self.computed += work.end - work.start
        known = list(item.token_ids)[: len(item.token_ids) - len(item.drafts)]
        return replace(item, token_ids=[*known, *drafts], drafts=drafts, draft=None)


def _mark(tokens: list[int], row: int) -> Callable[[], int]:
    return lambda: prefix_mark(tokens[: row + 1])  # a token that is coming is in the history by then


class HeadBench(DraftBench):
    def __init__(self, right: Callable[[], int], num_blocks: int = 32, *, most: int = 4, **options: int) -> None:
        super().__init__(right, num_blocks, most=most, **options)
        self.runner = runner = Head(num_blocks, BLOCK, self.limits.original_context_tokens, WORDS)
        runner.begin(self, right)
        self.head = runner
        self.pool = BlockPool(num_blocks, runner.generations)
        limits = SpeculationLimits(most, draft=DraftLimits(0, FAR, coupled=True))
        self.core = EngineCore(self.limits, self.pool, "test", speculation=limits)


@both
@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_right_drafts_save_steps(right: int, ahead: bool) -> None:
    b = HeadBench(lambda: right, ahead=ahead)
    b.add(1, prompt(11), SamplingParams(max_tokens=25))
    b.run()
    b.assert_exact()
    b.assert_cache_is_true()
    steps = -(-25 // (right + 1))
    assert steps <= b.steps <= steps + 2
    assert b.head.computed <= 11 + 25, "each row once by the model's state"


@both
def test_an_adopted_sequence_begins_with_its_first_step_here(ahead: bool) -> None:
    b = HeadBench(lambda: 3, ahead=ahead)
    text = prompt(30)
    b.add(1, text, SamplingParams(max_tokens=16), hold=True)
    room = b.core.reserve(1, len(text), 0.0)
    assert room is not None
    for i in range(len(text)):
        b.runner.kv[room.block_ids[i // BLOCK], i % BLOCK] = kv_mark(text[: i + 1], long=False)
    first = b.expected(1)[0]
    b.answers[1] = [first]
    b.core.adopt(1, len(text), [first], 0.0)
    b.run()
    b.assert_exact()
    assert b.counts.accepted > 6
    assert set(b.head.bases) == {30}


def test_behind_a_prefix_hit_it_begins_there() -> None:
    b = HeadBench(lambda: 4)
    for n in (1, 2):
        b.head.bases.clear()
        b.add(n, prompt(17), SamplingParams(max_tokens=12))
        b.run()
    b.assert_exact()
    assert set(b.head.bases) == {17 // BLOCK * BLOCK}


@both
@pytest.mark.parametrize("seed", range(12))
def test_any_course_is_exact(seed: int, ahead: bool) -> None:
    course(seed, ahead=ahead, bench=HeadBench)


# What would be easy to get wrong.


def _from_the_beginning(self: DraftPlans, sequence: Running) -> int:
    """Cached and received tokens are taken to have states."""
    at, sequence.computed_from = sequence.computed_from, 0
    found = _STANDS(self, sequence)
    sequence.computed_from = at
    return found


def _as_a_draft_model(self: DraftPlans, sequence: Running, proposed: int, accepted: int) -> None:
    """Rows by the head's own states are gone on from."""
    limits, self._limits = self._limits, replace(self._limits, coupled=False)
    _SETTLE(self, sequence, proposed, accepted)
    self._limits = limits
    assert sequence.drafting is not None
    sequence.drafting.stands = len(sequence.tokens) - 2


_STANDS, _SETTLE = DraftPlans._stands, DraftPlans.settle


@pytest.mark.parametrize(("name", "bug"), [("_stands", _from_the_beginning), ("settle", _as_a_draft_model)])
def test_a_planted_bug_shows(name: str, bug: Callable[..., object]) -> None:
    with mock.patch.object(DraftPlans, name, bug):
        for seed in range(30):
            try:
                course(seed, ahead=seed % 2 == 0, bench=HeadBench)
            except Exception:
                return
    pytest.fail("nobody noticed")
