"""A draft model's KV in the blocks of the model: read only where this very sequence has written it, whatever happens to
blocks; and its work only where it pays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from engine import draft_plans
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.draft_plans import DraftLimits, DraftPlans
from engine.drafting import Drafting
from engine.sequence import Sequence as Running
from engine.sequence import Status
from engine.speculation import SpeculationLimits
from engine.types import TO_COME, DraftPass, PlanItem, SamplingParams, SequenceSpec, StepPlan, StepResult
from tests.support.scripted import ScriptedRunner, ScriptedStep, kv_mark, prefix_mark
from tests.unit.engine.test_speculation import BLOCK, WORDS, Bench, Cost, both, prompt

FAR = 1 << 30


class Drafter(ScriptedRunner):
    """Its draft model says as many right tokens as `right` tells, and wrong ones after them. The slots of its KV hold
    the prefix they were written for; who wrote them is noted.
    """

    def begin(self, bench: DraftBench, right: Callable[[], int]) -> None:
        self.bench, self.right = bench, right
        self.slots: dict[tuple[int, int], int] = {}
        self.wrote: set[tuple[int, tuple[int, int]]] = set()
        self.computed = 0
        self.tells = True  # that it has done it
        self.over = False  # it has failed too often
        self.asked: list[bool] = []  # by step

    def launch(self, plan: StepPlan) -> ScriptedStep:
        self.asked.append(any(item.draft or item.drafts for item in plan.items))
        step = super().launch(replace(plan, items=tuple(map(self._drafted, plan.items))))
        wait = step.wait
        if self.over:
            step.wait = lambda: replace(wait(), drafts_over=True)  # type: ignore[method-assign]
            return step
        if self.tells and any(item.draft for item in plan.items):
            step.wait = lambda: replace(wait(), passes=[DraftPass(1, 1, 1, 0.0, 0, 0.0)])  # type: ignore[method-assign]
        return step

    def _drafted(self, item: PlanItem) -> PlanItem:
        work = item.draft
        if work is None:
            assert TO_COME not in item.drafts
            return item
        tokens, number, size = list(item.history), item.sequence_id, self.block_tokens
        assert 0 <= work.start < work.end <= len(tokens)
        places = [(item.block_ids[i // size], i % size) for i in range(work.end + max(0, len(item.drafts) - 1))]
        for i in range(work.start):
            assert (number, places[i]) in self.wrote, f"sequence {number} reads draft KV that it has not written"
            assert self.slots[places[i]] == prefix_mark(tokens[: i + 1]), f"sequence {number} reads others' draft KV"
        drafts: list[int] = []
        if item.drafts:
            assert work.end == len(tokens)
            prompt_, _ = self.bench.sampling[number]
            after = self.bench.expected(number)[len(tokens) - len(prompt_) :]
            right = self.right()
            drafts = [after[i] if i < min(right, len(after)) else WORDS for i in range(len(item.drafts))]
        said = [*tokens, *drafts]
        for i in range(work.start, len(places)):
            self.slots[places[i]] = prefix_mark(said[: i + 1])
            self.wrote.add((number, places[i]))
        self.computed += len(places) - work.start
        known = list(item.token_ids)[: len(item.token_ids) - len(item.drafts)]
        return replace(item, token_ids=[*known, *drafts], drafts=drafts, draft=None)


class DraftBench(Bench):
    def __init__(self, right: Callable[[], int], num_blocks: int = 32, *, most: int = 4, **options: Any) -> None:
        super().__init__(num_blocks, most=most, **options)
        self.runner = runner = Drafter(num_blocks, BLOCK, self.limits.original_context_tokens, WORDS)
        runner.begin(self, right)
        self.pool = BlockPool(num_blocks, runner.generations)
        limits = SpeculationLimits(most, draft=DraftLimits(0, FAR))
        self.core = EngineCore(self.limits, self.pool, "test", speculation=limits)


@both
@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_right_drafts_save_steps(right: int, ahead: bool) -> None:
    b = DraftBench(lambda: right, ahead=ahead)
    b.add(1, prompt(11), SamplingParams(max_tokens=25))
    b.run()
    b.assert_exact()
    b.assert_cache_is_true()
    steps = -(-25 // (right + 1))
    assert steps <= b.steps <= steps + 2


def test_it_computes_each_token_once() -> None:
    """After its last draft was accepted it lacks two tokens, else one."""
    b = DraftBench(lambda: 4)
    b.add(1, prompt(11), SamplingParams(max_tokens=24))
    b.run()
    assert isinstance(b.runner, Drafter)
    assert b.runner.computed <= 11 + 24


@both
def test_adopted_sequences_are_caught_up_with(ahead: bool) -> None:
    b = DraftBench(lambda: 3, ahead=ahead)
    text = prompt(30)
    b.add(1, text, SamplingParams(max_tokens=16), hold=True)
    room = b.core.reserve(1, len(text), 0.0)
    assert room is not None
    for i in range(len(text)):
        b.runner.kv[room.block_ids[i // BLOCK], i % BLOCK] = kv_mark(text[: i + 1], long=False)
    first = b.expected(1)[0]
    b.answers[1] = [first]
    with mock.patch.object(draft_plans, "CATCH_UP_TOKENS", 12):
        b.core.adopt(1, len(text), [first], 0.0)
        b.run()
    b.assert_exact()
    assert b.counts.accepted > 6


def test_a_prefix_hit_is_written_again() -> None:
    b = DraftBench(lambda: 4)
    for n in (1, 2):
        b.add(n, prompt(17), SamplingParams(max_tokens=12))
        b.run()
    b.assert_exact()
    assert b.counts.accepted > 12


@both
def test_a_draft_model_that_gave_up_is_asked_no_more(ahead: bool) -> None:
    """There are no places in the next steps, no blocks for them, and no step waits for another's drafts."""
    b = DraftBench(lambda: 0, ahead=ahead)
    b.add(1, prompt(11), SamplingParams(max_tokens=20))
    assert isinstance(b.runner, Drafter)
    while not any(b.runner.asked):
        b.turn()
    b.runner.over = True
    begun = len(b.runner.asked)
    b.run()
    b.assert_exact()
    asked = b.runner.asked[begun:]
    assert sum(asked) <= 1, "the first step after that is the one that tells"
    assert len(asked) > 10


def test_what_nobody_knows_to_be_done_is_done_again() -> None:
    """A step that was repeated in parts, or a draft model that failed."""
    b = DraftBench(lambda: 2)
    assert isinstance(b.runner, Drafter)
    b.runner.tells = False
    b.add(1, prompt(11), SamplingParams(max_tokens=24))
    for _ in range(5):
        b.turn()
    assert b.runner.computed > 3 * 11
    b.runner.tells = True
    b.run()
    b.assert_exact()


def test_two_that_share_a_prefix_write_the_same() -> None:
    b = DraftBench(lambda: 2, num_blocks=64, max_batch_tokens=40)
    b.add(1, prompt(17), SamplingParams(max_tokens=30))
    for _ in range(4):
        b.turn()
    b.add(2, prompt(17), SamplingParams(max_tokens=30, temperature=1.0, seed=4))
    b.run()
    b.assert_exact()


def test_the_draft_models_context_ends() -> None:
    b = DraftBench(lambda: 4)
    assert b.core.speculation is not None
    assert b.core.speculation.draft is not None
    b.core.speculation.draft._limits = DraftLimits(0, 20)
    b.add(1, prompt(11), SamplingParams(max_tokens=25))
    seen: list[PlanItem] = []
    while (plan := b.core.schedule(0.0)) is not None:
        seen += [item for item in plan.items if item.draft is not None]
        b.flying.append((plan, b.runner.launch(plan)))
        b.land()
    b.assert_exact()
    assert seen
    assert max(len(item.drafts) + item.draft.end for item in seen if item.draft is not None) <= 20


def test_a_block_that_another_took_the_place_of_holds_nothing() -> None:
    drafting = Drafting()
    drafting.wrote([3, 4, 5], 11)
    assert drafting.stands_in([3, 4, 5, 9], 4) == 11
    assert drafting.stands_in([3, 7, 5, 9], 4) == 4
    assert drafting.stands_in([8, 4, 5], 4) == 0
    assert drafting.stands_in([3], 4) == 4
    drafting.lost_blocks()
    assert drafting.stands_in([3, 4, 5], 4) == 0


def course(seed: int, *, ahead: bool, bench: Callable[..., DraftBench] = DraftBench) -> None:
    """Random drafts among cancels, preemptions, prefix hits, late comers and short pools."""
    rng = random.Random(seed)
    b = bench(
        lambda: rng.choice([0, 0, 1, 2, 6]),
        rng.choice([10, 16, 64]),
        ahead=ahead,
        most=rng.randrange(1, 7),
        max_batch_tokens=rng.choice([8, 13, 40]),
        original_context_tokens=rng.choice([0, 0, 17]),
    )
    number = 0
    with mock.patch.object(draft_plans, "CATCH_UP_TOKENS", rng.choice([9, 256])):
        for _ in range(100):
            if rng.random() < 0.15:
                number += 1
                sampling = SamplingParams(
                    max_tokens=rng.randrange(1, 20), temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(1 << 40)
                )
                b.add(number, prompt(rng.randrange(1, 20), seed=rng.randrange(3)), sampling)
            elif b.answers and rng.random() < 0.03:
                victim = rng.choice(list(b.answers))
                if victim not in b.ends and b.core.cancel(victim):
                    del b.answers[victim]
                    b.ends[victim] = None
            else:
                b.turn()
        b.run()
    b.assert_exact()


@both
@pytest.mark.parametrize("seed", range(12))
def test_any_course_is_exact(seed: int, ahead: bool) -> None:
    course(seed, ahead=ahead)


# What others have got wrong, and what would be easy to.


def _everything_stands(self: DraftPlans, sequence: Running, proposed: int, accepted: int) -> None:
    _SETTLE(self, sequence, proposed, accepted)
    assert sequence.drafting is not None
    sequence.drafting.stands += proposed - accepted


def _a_prefix_is_known(self: DraftPlans, sequence: Running) -> Drafting:
    new = sequence.drafting is None
    drafting = _DRAFTING(self, sequence)
    if new:
        drafting.wrote(sequence.tables[0], sequence.num_computed)
    return drafting


def _the_last_draft_stands(self: DraftPlans, sequence: Running, proposed: int, accepted: int) -> None:
    _SETTLE(self, sequence, proposed, accepted)
    assert sequence.drafting is not None
    sequence.drafting.stands += accepted == proposed


_SETTLE, _DRAFTING = DraftPlans.settle, DraftPlans._drafting

PLANTED: dict[str, Callable[[], Any]] = {
    "KV of rejected drafts is gone on from": lambda: mock.patch.object(DraftPlans, "settle", _everything_stands),
    "the last draft is thought to be computed": lambda: mock.patch.object(DraftPlans, "settle", _the_last_draft_stands),
    "cached and received prompts are thought to have draft KV": lambda: mock.patch.object(
        DraftPlans, "_drafting", _a_prefix_is_known
    ),
    "draft KV outlives the blocks": lambda: mock.patch.object(Drafting, "lost_blocks"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_shows(bug: str) -> None:
    with PLANTED[bug]():
        for seed in range(30):
            try:
                course(seed, ahead=seed % 2 == 0)
            except Exception:
                return
    pytest.fail("nobody noticed")


# How much is drafted.


def plans(step: Cost, own: Cost, limits: DraftLimits | None = None) -> DraftPlans:
    made = DraftPlans(limits or DraftLimits(0, FAR), 7, BLOCK, step)
    made.cost = own
    own.steps = 1
    return made


def decodes(batch: int, known: int, lag: int, max_tokens: int = 500) -> list[Running]:
    found = []
    for i in range(batch):
        spec = SequenceSpec(i, [1] * known, SamplingParams(max_tokens=max_tokens))
        s = Running(spec, i, b"", Status.RUNNING, tokens=[1] * known, num_prompt=known, num_computed=known - 1)
        s.tables = [list(range(known))]
        s.drafting = Drafting(at=known)
        s.drafting.wrote(s.tables[0], known - lag)
        found.append(s)
    return found


def depths(made: DraftPlans, running: Sequence[Running], accepted: Iterable[bool]) -> list[int]:
    for s in running:
        for good in accepted:
            assert s.drafting is not None
            s.drafting.note(1, int(good))
    found = made.propose(running, lambda _: 100)
    return [len(found.get(s.sequence_id, ())) for s in running]


def test_depth_follows_from_acceptance_and_both_costs() -> None:
    def at(batch: int, step: Cost, own: Cost, accepted: list[bool]) -> int:
        found = set(depths(plans(step, own), decodes(batch, 40, 1), accepted))
        assert len(found) == 1
        return found.pop()

    step, cheap = Cost(constant_ms=20.0, per_token_ms=0.3), Cost(constant_ms=1.0, per_token_ms=0.01)
    good, bad = [True] * 20, [False] * 20
    assert at(1, step, cheap, good) == 7
    assert at(1, step, cheap, bad) < at(1, step, cheap, []) <= 7
    assert at(1, step, Cost(constant_ms=8.0), good) < 7
    assert at(1, step, Cost(constant_ms=20.0), good) == 0, "a draft model as slow as the model is of no use"
    assert at(64, Cost(constant_ms=1.0, per_token_ms=1.0), cheap, good) == 0, "nor where the machine is full"
    bandwidth, own = Cost(constant_ms=20.0), Cost(constant_ms=8.0)
    assert at(8, bandwidth, own, good) == at(1, bandwidth, own, good) > 0, "one pass is for all of them"


def test_one_that_is_never_right_leaves_the_others() -> None:
    running = decodes(3, 40, 1)
    for _ in range(30):
        assert running[1].drafting is not None
        running[1].drafting.note(4, 0)
    found = depths(plans(Cost(constant_ms=20.0, per_token_ms=0.5), Cost(constant_ms=1.0)), running, [])
    assert found[1] < found[0] == found[2]


def test_catching_up_must_pay() -> None:
    step, own = Cost(constant_ms=20.0, per_token_ms=0.3), Cost(constant_ms=1.0, per_token_ms=0.2)
    made = plans(step, own)
    assert depths(made, decodes(1, 40, 30), [True] * 20) == [7]
    assert depths(made, decodes(1, 4000, 3990, max_tokens=2), []) == [0]
    assert not made.behind, "one token does not pay for four thousand"
    assert depths(made, decodes(2, 1000, 990), []) == [0, 0]
    ((sequence, tokens),) = made.behind
    assert 0 < tokens * 0.2 <= 20.0, "half of a step's time"
    assert made.work([(sequence, 0)])[sequence.sequence_id].end == 10 + tokens


def test_what_is_usual_is_where_others_begin() -> None:
    made = plans(Cost(constant_ms=20.0, per_token_ms=0.3), Cost(constant_ms=8.0))
    (first, second), (third,) = decodes(2, 40, 1), decodes(1, 40, 1)
    first.drafting = second.drafting = third.drafting = None
    assert depths(made, [first], [])[0] > 0
    for _ in range(300):
        made.settle(first, 4, 0)
    assert depths(made, [second], [])[0] == 0
    for _ in range(300):
        made.settle(first, 4, 4)
    assert depths(made, [third], [])[0] > 0


def test_passes_are_learned_apart_from_steps() -> None:
    core = EngineCore(
        replace(Bench().limits, context_limit_tokens=4000),
        BlockPool(32),
        speculation=SpeculationLimits(4, draft=DraftLimits(0, FAR)),
    )
    assert core.add(SequenceSpec(1, [1, 2, 3], SamplingParams(max_tokens=60)), 0.0) is None
    now = 0.0
    while (plan := core.schedule(now)) is not None and now < 1.0:
        now += 0.010
        result = StepResult((5,), (None,), passes=[DraftPass(1, 1, 3, 0.0, 0, 4.0)] if plan.items[0].drafts else ())
        core.commit(plan, result, now)
        now += 1e-9
    assert core.speculation is not None
    assert core.speculation.draft is not None
    assert core.speculation.draft.cost.cost().ms(1, 1, 10, 0) == pytest.approx(4.0, rel=0.2)
