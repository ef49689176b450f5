"""Prompts with due dates: who goes first, who is put back, and that nothing starves, leaks or changes for it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.overload import TURN_STEPS, Need, put_back
from engine.scheduler import EngineLimits
from engine.step_cost import StepShape
from engine.types import SamplingParams, SequenceSpec
from tests.support.scripted import ScriptedRunner, expected_answer

BLOCK, BATCH = 4, 16


class Engine:
    """A scripted engine that computes a token a second, and has learned that."""

    def __init__(self, num_blocks: int = 256, max_running: int = 8) -> None:
        self.runner = ScriptedRunner(num_blocks, BLOCK)
        self.pool = BlockPool(num_blocks, self.runner.generations)
        self.core = EngineCore(EngineLimits(BLOCK, BATCH, max_running, 512, 400, 1000), self.pool, "test")
        self.now = 0.0
        self.prompts: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.first_step: dict[int, int] = {}
        self.first_token_step: dict[int, int] = {}
        self.steps = 0
        for length in range(1, BATCH):  # it learns that a token takes a second
            for _ in range(3):
                self.core.step_cost.observe(StepShape(1, length, 0, 0.0, length), length * 1e3)

    def add(self, length: int, max_tokens: int = 1, **options: object) -> int:
        number = len(self.prompts)
        prompt = [random.Random(number).randrange(1000) for _ in range(length)]
        spec = SequenceSpec(number, prompt, SamplingParams(max_tokens=max_tokens), **options)  # type: ignore[arg-type]
        assert self.core.add(spec, self.now) is None
        self.prompts[number], self.answers[number] = prompt, list(spec.emitted)
        return number

    def step(self) -> list[tuple[int, int]]:
        """(sequence, tokens) of the step, in order."""
        plan = self.core.schedule(self.now)
        if plan is None:
            return []
        self.steps += 1
        self.now += plan.num_tokens
        events = self.core.commit(plan, self.runner.execute(plan), self.now)
        for t in events.tokens:
            self.answers[t.sequence_id].append(t.token_id)
            self.first_token_step.setdefault(t.sequence_id, self.steps)
        self.core.check()
        for item in plan.items:
            self.first_step.setdefault(item.sequence_id, self.steps)
        return [(item.sequence_id, len(item.token_ids)) for item in plan.items]

    def run(self, most: int = 20_000) -> None:
        for _ in range(most):
            if not self.step():
                assert not self.core.has_work(), "nothing is planned and something waits"
                return
        raise AssertionError("the engine does not come to an end")

    def order(self, *numbers: int) -> list[int]:
        self.run()
        return sorted(numbers, key=lambda n: self.first_token_step[n])


# The rule itself.


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), max_size=7))
@settings(max_examples=200, deadline=None)
def test_no_other_choice_keeps_more_prompts_in_time(jobs: list[tuple[int, int]]) -> None:
    needs = sorted((Need(float(due), float(left)) for left, due in jobs), key=lambda n: n.due_s)
    kept = [n for i, n in enumerate(needs) if i not in put_back(needs, 0.0)]
    ends = list(itertools.accumulate(n.left_s for n in kept))
    assert all(end <= n.due_s for end, n in zip(ends, kept, strict=True))

    def fits(chosen: tuple[Need, ...]) -> bool:
        return all(e <= n.due_s for e, n in zip(itertools.accumulate(n.left_s for n in chosen), chosen, strict=True))

    most = next(k for k in range(len(needs), -1, -1) if any(map(fits, itertools.combinations(needs, k))))
    assert len(kept) == most


def test_nobody_is_put_back_for_a_lower_priority_or_without_a_due_date() -> None:
    high, low = Need(20.0, 10.0, 1), Need(5.0, 1.0, 0)
    assert put_back([high, low], 0.0) == {1}
    assert put_back([Need(math.inf, 100.0), low], 0.0) == {1}
    assert put_back([low, Need(20.0, 10.0)], 0.0) == set()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1.0, 0.5, 0.1, 1e-290])), max_size=9))
@settings(max_examples=200, deadline=None)
def test_whatever_the_weights_who_is_kept_is_in_time_and_nobody_goes_for_nothing(
    jobs: list[tuple[int, int, float]],
) -> None:
    needs = sorted((Need(float(due), float(left), 0, w) for left, due, w in jobs), key=lambda n: n.due_s)
    back = put_back(needs, 0.0)
    kept = [n for i, n in enumerate(needs) if i not in back]
    ends = list(itertools.accumulate(n.left_s for n in kept))
    assert all(end <= n.due_s for end, n in zip(ends, kept, strict=True))
    ends = list(itertools.accumulate(n.left_s for n in needs))
    if all(end <= n.due_s for end, n in zip(ends, needs, strict=True)):
        assert not back
    late = sum(end > n.due_s for end, n in zip(ends, needs, strict=True))
    assert len(back) <= late, "each that would be late costs one"


def test_a_lighter_prompt_stays_and_the_next_one_goes() -> None:
    long, short, late = Need(50.0, 40.0, 0, 0.1), Need(50.0, 10.0), Need(51.0, 5.0)
    assert put_back([long._replace(weight=1.0), short, late], 0.0) == {0}
    assert put_back([long, short, late], 0.0) == {1}
    assert put_back([long, short, late._replace(left_s=12.0, weight=0.1)], 0.0) == {2}, "the other one is not enough"
    assert put_back([long, Need(39.0, 39.5), late], 0.0) == {1}, "what is hopeless goes whatever its weight"
    assert put_back([Need(50.0, 40.0, 1), short._replace(weight=1e-9), late], 0.0) == {2}, "priority goes before weight"


# In the engine.


def test_who_is_due_first_goes_first_whatever_the_order_of_arrival() -> None:
    engine = Engine()
    a, b, c = (engine.add(20, due_s=s) for s in (300.0, 100.0, 200.0))
    assert engine.order(a, b, c) == [b, c, a]


def test_without_due_dates_it_is_first_come_and_priority_goes_before_all() -> None:
    engine = Engine()
    a, b = engine.add(20), engine.add(20)
    c, d = engine.add(20, due_s=50.0), engine.add(20, due_s=900.0, priority=1)
    assert engine.order(a, b, c, d) == [d, a, b, c]


def test_a_long_prompt_that_has_begun_pauses_for_a_short_one() -> None:
    engine = Engine()
    long = engine.add(200, 3, due_s=500.0)
    assert engine.step() == [(long, BATCH)]
    held = engine.core.block_table(long)
    short = engine.add(20, 1, due_s=50.0)
    assert engine.step() == [(short, BATCH)]
    assert engine.core.block_table(long) == held, "it pauses with its blocks"
    assert engine.step() == [(short, 4), (long, 12)]
    engine.run()
    assert engine.answers[long] == expected_answer(engine.prompts[long], SamplingParams(max_tokens=3))


def test_the_longest_goes_back_not_the_one_that_would_be_late() -> None:
    engine = Engine()
    long = engine.add(200, due_s=250.0)
    short = [engine.add(20, due_s=260.0 + i) for i in range(5)]
    assert engine.order(long, *short) == [*short, long]
    again = engine.add(200, due_s=400.0)
    few = [engine.add(20, due_s=410.0 + i) for i in range(5)]
    assert engine.order(again, *few) == [again, *few], "all can be in time: nobody is put back"


def test_a_long_prompt_of_little_weight_keeps_its_turn() -> None:
    engine = Engine()
    long = engine.add(200, due_s=250.0, put_back_weight=0.05)
    short = [engine.add(20, due_s=260.0 + i) for i in range(5)]
    assert engine.order(long, *short)[0] == long, "two or three of the short ones can be in time beside it"
    assert engine.core.load().put_back_sequences == 0


def test_one_that_is_put_back_returns_when_there_is_time() -> None:
    engine = Engine()
    long = engine.add(100, due_s=130.0)
    others = [engine.add(20, due_s=60.0 + 20 * i) for i in range(3)]
    assert engine.step()[0][0] == others[0]
    assert engine.core.load().put_back_sequences == 1
    assert engine.core.load().put_back_tokens == 100
    for n in others:
        engine.core.cancel(n)
    assert engine.step()[0][0] == long
    assert engine.core.load().put_back_sequences == 0


def test_a_put_back_prompt_whose_prefix_was_computed_meanwhile_returns() -> None:
    engine = Engine()
    doomed = engine.add(102, due_s=130.0)
    same = SequenceSpec(900, engine.prompts[doomed][:101], SamplingParams(max_tokens=1), due_s=120.0)
    assert engine.core.add(same, engine.now) is None
    engine.answers[900] = []
    other = engine.add(40, due_s=500.0)
    engine.step()
    assert engine.core.load().put_back_tokens == 102
    assert engine.order(900, doomed, other) == [900, doomed, other]


def test_a_last_chunk_is_halved_for_the_reader_only_where_nobody_waits() -> None:
    for others in (0, 1):
        core = EngineCore(EngineLimits(BLOCK, 512, 8, 64, 2000, 1000), BlockPool(256), "test")
        for n in range(1 + others):
            spec = SequenceSpec(n, [n + 1] * 400, SamplingParams(max_tokens=2), hand_over=True, retain=True)
            assert core.add(spec, 0.0) is None
        plan = core.schedule(0.0)
        assert plan is not None
        assert len(plan.items[0].token_ids) == (400 if others else 200)


def test_a_recovery_is_never_put_back() -> None:
    engine = Engine()
    good = engine.add(20, due_s=40.0)
    resumed = engine.add(100, 5, due_s=-50.0, emitted=(7, 8))
    assert engine.order(resumed, good) == [resumed, good]


@pytest.mark.parametrize("due_s", [None, -1.0, 0.0, 500.0])
def test_a_due_date_changes_no_answer(due_s: float | None) -> None:
    engine = Engine()
    n = engine.add(30, 5, due_s=due_s)
    engine.add(20, 5, due_s=10.0)
    engine.run()
    assert engine.answers[n] == expected_answer(engine.prompts[n], SamplingParams(max_tokens=5))


def test_whoever_is_put_back_gets_its_turns_however_much_comes() -> None:
    """The bound: TURN_STEPS times the steps that it needs by itself, and a step more."""
    engine = Engine()
    doomed = engine.add(6 * BATCH, due_s=-5.0)
    began = engine.steps
    while doomed not in engine.first_token_step:
        engine.add(2 * BATCH, due_s=1e6)  # always more than a step can take
        engine.step()
        assert engine.steps - began <= TURN_STEPS * 6 + 1
    assert engine.steps - began > TURN_STEPS, "the others did go first"


def test_whoever_is_put_back_gets_room_however_much_comes() -> None:
    engine = Engine(num_blocks=40)
    running = [engine.add(30, 40, due_s=1e6) for _ in range(2)]
    doomed = engine.add(100, 2, due_s=-5.0)
    for _ in range(2000):
        if doomed in engine.first_token_step:
            break
        if len(engine.core.not_started()) < 3:
            running.append(engine.add(30, 20, due_s=1e6))
        engine.step()
    assert doomed in engine.first_token_step
    assert len(running) > 4
    engine.run()
    assert engine.pool.is_idle()


loads = given(st.integers(0, 1 << 20), st.sampled_from([40, 60, 256]), st.sampled_from([2, 8]))


@loads
@settings(max_examples=20, deadline=None)
def test_nothing_starves_or_leaks_and_every_answer_is_exact(seed: int, num_blocks: int, max_running: int) -> None:
    serves_a_load(seed, num_blocks, max_running)


@pytest.mark.long
@loads
@settings(max_examples=400, deadline=None)
def test_nothing_starves_under_many_more_loads(seed: int, num_blocks: int, max_running: int) -> None:
    serves_a_load(seed, num_blocks, max_running)


def serves_a_load(seed: int, num_blocks: int, max_running: int) -> None:
    rng = random.Random(seed)
    engine = Engine(num_blocks, max_running)
    cancelled: set[int] = set()
    sent: dict[int, int] = {}
    for _ in range(rng.randrange(2, 30)):
        due = rng.choice([None, rng.uniform(-20, 60), rng.uniform(0, 600)])
        max_tokens = rng.randrange(1, 6)
        other = {"priority": rng.choice([0, 0, 0, 1]), "put_back_weight": rng.choice([1.0, 1.0, 0.3, 1e-290])}
        n = engine.add(rng.choice([3, 9, 20, 60, 120]), max_tokens, due_s=due, **other)
        sent[n] = max_tokens
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.1:
            engine.core.cancel(n)
            cancelled.add(n)
            engine.core.check()
    engine.run()
    assert engine.core.is_idle()
    assert engine.pool.is_idle()
    for n in sent.keys() - cancelled:
        assert engine.answers[n] == expected_answer(engine.prompts[n], SamplingParams(max_tokens=sent[n]))
