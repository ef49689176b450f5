"""Beam searches in the engine, against the rule alone over a scripted model: answers exact, no block left."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.beams import BeamAnswer, BeamParams, BeamRule
from engine.types import RefusalCode, SamplingParams, SequenceSpec
from engine.waiting_searches import GIVE_UP_S, HOLD_S, PASS_S
from tests.support.scripted import ScriptedRunner, likeliest, small_limits
from tests.unit.engine.test_core import BLOCK, Bench

ENDS = frozenset({3, 7})


def expected(prompt: list[int], sampling: SamplingParams, beams: BeamParams) -> tuple[BeamAnswer, ...]:
    rule = BeamRule(beams, sampling.stop_token_ids, sampling.min_tokens, sampling.max_tokens)
    histories = [list(prompt)]
    while not rule.over:
        rows = [likeliest(history)[: rule.candidates] for history in histories]
        histories = [[*histories[beam], token] for beam, token in rule.step(rows)]
    return rule.answers()


class Searches(Bench):
    def __init__(self, num_blocks: int = 64, **limits: int) -> None:
        super().__init__(num_blocks, **limits)
        self.runner.searches = True
        self.found: dict[int, tuple[BeamAnswer, ...]] = {}
        self.wanted: dict[int, tuple[BeamAnswer, ...]] = {}

    def search(self, number: int, prompt: list[int], beams: BeamParams, sampling: SamplingParams, **more: int) -> None:
        self.add(number, prompt, sampling=sampling, beams=beams, **more)
        self.wanted[number] = expected(prompt, sampling, beams)

    def step(self) -> bool:
        plan = self.core.schedule(0.0)
        if plan is None:
            return False
        assert len(plan.items) <= self.limits.max_running_sequences
        events = self.core.commit(plan, self.runner.execute(plan), 0.0)
        self.found |= dict(events.beams)
        self.take(events)
        self.core.check()
        return True

    def finish(self) -> None:
        self.run()
        self.assert_empty()
        assert self.found == self.wanted


def asked(tokens: int = 9, least: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, min_tokens=least, stop_token_ids=ENDS)


def some(n: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + n).randrange(12) for _ in range(n)]


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
def test_every_length_of_prompt_against_the_blocks(early: bool, penalty: float) -> None:
    bench = Searches()
    for n in range(1, 2 * BLOCK + 3):
        bench.search(n, some(n), BeamParams(1 + n % 4, 1, penalty, early), asked(9, n % 3))
    bench.finish()


def test_beams_share_whole_blocks_and_copy_the_last() -> None:
    bench = Searches()
    bench.search(1, some(2 * BLOCK + 1), BeamParams(4, 4), SamplingParams(max_tokens=BLOCK + 2))
    most, copies = 0, 0
    while (plan := bench.core.schedule(0.0)) is not None:
        copies += sum(len(item.copies) for item in plan.items)
        tables = [set(item.block_ids[:2]) for item in plan.items]
        most = max(most, len(plan.items))
        assert len(set(map(tuple, tables))) == 1, "the prompt's whole blocks are everybody's"
        bench.found |= dict(bench.core.commit(plan, bench.runner.execute(plan), 0.0).beams)
    assert most == 4
    assert copies >= 4
    bench.finish()


def test_a_full_pool_lets_searches_wait_and_never_stand_still() -> None:
    """Each needs half of the pool."""
    bench = Searches(num_blocks=22)
    for n in range(6):
        bench.search(n, some(5, n), BeamParams(3, 2), asked(8))
    bench.run()
    bench.assert_empty()
    assert bench.found == bench.wanted


def test_who_goes_first_takes_the_room_of_a_search_which_begins_again() -> None:
    bench = Searches(num_blocks=34)
    bench.search(1, some(5), BeamParams(3, 3), SamplingParams(max_tokens=16))
    for _ in range(4):
        bench.step()
    bench.add(2, some(32), sampling=SamplingParams(max_tokens=40), priority=5)
    bench.add(3, some(36), sampling=SamplingParams(max_tokens=40), priority=5)
    bench.run()
    bench.assert_empty()
    assert bench.found == bench.wanted
    assert bench.core.load().preemptions_total
    assert [len(bench.answers[n]) for n in (2, 3)] == [40, 40]


class FullPool(Searches):
    """Others have half of the pool and a little more, and a search waits that needs half."""

    def __init__(self) -> None:
        super().__init__(num_blocks=34)
        self.room = self.pool.allocate(18) or []
        self.search(1, some(5), BeamParams(3, 2), asked(16))
        self.at(0.0)

    def at(self, now: float) -> None:
        plan = self.core.schedule(now)
        if plan is not None:
            events = self.core.commit(plan, self.runner.execute(plan), 0.0)
            self.found |= dict(events.beams)
            self.take(events)
        self.core.check()

    def begins(self, number: int, now: float) -> bool:
        """Whether an ordinary sequence that comes now begins at once. It is cancelled then."""
        self.add(number, some(3))
        self.at(now)
        begun = number not in self.core.not_started()
        self.core.cancel(number)
        return begun


def test_others_pass_a_search_that_waits_but_for_a_bounded_time() -> None:
    bench = FullPool()
    assert bench.begins(2, 1.0)
    assert bench.begins(3, PASS_S - 0.1)
    assert not bench.begins(4, PASS_S + 0.1), "it holds the queue"
    assert bench.begins(5, PASS_S + HOLD_S + 0.2)
    bench.search(6, some(5), BeamParams(3, 2), asked(16))
    bench.at(PASS_S + HOLD_S + 0.3)
    assert bench.begins(7, 2 * PASS_S + HOLD_S - 0.1), "nor does the next one hold it soon after"
    assert not bench.begins(8, 2 * (PASS_S + HOLD_S))
    assert bench.core.searches.given_up(GIVE_UP_S - 0.1) == []
    ((number, why),) = bench.core.searches.given_up(GIVE_UP_S)
    assert number == 1
    assert "a search of 3 beams has waited 60 s for 15 free KV blocks" in why
    assert "engine.num_blocks" in why
    bench.pool.unpin(bench.room)
    for _ in range(60):
        bench.at(30.0)
    assert bench.core.searches.given_up(1000.0) == []
    bench.finish()


def test_a_search_that_finds_no_room_ends_nothing_that_is_cached() -> None:
    bench = Searches(num_blocks=34)
    bench.add(1, some(40, 1))
    bench.run()
    cached = bench.pool.cached_blocks
    room = bench.pool.allocate(18) or []
    assert bench.pool.cached_blocks == cached == 11
    bench.search(2, some(25), BeamParams(2, 2), asked(16))
    assert bench.core.schedule(0.0) is None
    assert bench.pool.cached_blocks == cached
    bench.pool.unpin(room)
    bench.finish()


def test_cancels_at_every_step_leave_nothing() -> None:
    for steps in range(14):
        bench = Searches()
        bench.search(1, some(6), BeamParams(4, 2), SamplingParams(max_tokens=10))
        bench.search(2, some(7), BeamParams(2, 1), SamplingParams(max_tokens=10))
        for _ in range(steps):
            bench.step()
        plan = bench.core.schedule(0.0)  # one may be in flight
        bench.core.cancel(1)
        bench.core.check()
        if plan is not None:
            bench.found |= dict(bench.core.commit(plan, bench.runner.launch(plan).wait(), 0.0).beams)
        bench.found.pop(1, None)
        del bench.wanted[1]
        bench.finish()


def test_places_among_the_running_are_taken_before_the_beams_come() -> None:
    bench = Searches(num_blocks=200, max_running_sequences=6)
    for n in range(5):
        bench.search(n, some(5 + n, n), BeamParams(4, 1), asked(8))
    for n in range(5, 9):
        bench.search(n, some(9, n), BeamParams(2, 1), asked(8))
    bench.finish()


@pytest.mark.parametrize(
    ("beams", "changes", "says"),
    [
        (BeamParams(17), {}, "17 beams; use 1 to 8"),
        (BeamParams(9), {}, "9 beams; use 1 to 8"),
        (BeamParams(0), {}, "0 beams"),
        (BeamParams(2, 3), {}, "3 answers of 2 beams"),
        (BeamParams(2, 1, float("nan")), {}, "length_penalty is nan"),
        (BeamParams(2), {"presence_penalty": 1.0}, "penalties"),
        (BeamParams(2), {"logprobs": 3}, "log-probabilities"),
        (BeamParams(2), {"stop_token_ids": frozenset(range(65))}, "65 tokens end the answer"),
        (BeamParams(6), {"max_tokens": 20}, "need 38 KV blocks and the pool has 64, of which one request may take 32"),
        (BeamParams(8), {"max_tokens": 90}, "has 64, of which one request may take 32, for 8 beams"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(beams: BeamParams, changes: dict[str, object], says: str) -> None:
    bench = Searches()
    spec = SequenceSpec(1, some(5), replace(asked(), **changes), beams=beams)  # type: ignore[arg-type]
    refusal = bench.core.add(spec, 0.0)
    assert refusal is not None
    assert refusal.code is RefusalCode.INVALID
    assert says in refusal.reason
    bench.assert_empty()


def test_a_search_that_was_handed_a_prompt_computes_its_last_block_alone() -> None:
    bench = Searches()
    prompt = some(2 * BLOCK + 2)
    bench.search(1, prompt, BeamParams(3, 2), asked(), hold=True)
    reserved = bench.core.reserve(1, len(prompt), 0.0)
    assert reserved is not None
    giver = ScriptedRunner(64, BLOCK)
    giver_bench = Bench()
    giver_bench.runner = giver
    giver_bench.add(7, prompt, sampling=SamplingParams(max_tokens=1), hand_over=False)
    plan = giver_bench.core.schedule(0.0)
    while plan is not None:
        giver_bench.core.commit(plan, giver.execute(plan), 0.0)
        blocks = plan.items[0].block_ids
        plan = giver_bench.core.schedule(0.0)
    for mine, theirs in zip(reserved.block_ids, blocks, strict=False):
        bench.runner.kv[mine] = giver.kv[theirs]
    bench.take(bench.core.adopt(1, len(prompt), (5,), 0.0))
    plan = bench.core.schedule(0.0)
    assert plan is not None
    assert [len(item.token_ids) for item in plan.items] == [2]
    bench.found |= dict(bench.core.commit(plan, bench.runner.execute(plan), 0.0).beams)
    bench.finish()


def test_limits_of_the_context_end_answers() -> None:
    bench = Searches(context_limit_tokens=20)
    bench.add(1, some(14), sampling=SamplingParams(max_tokens=50), beams=BeamParams(3, 3))
    bench.run()
    assert {len(one.token_ids) for one in bench.found[1]} == {6}
    bench.assert_empty()
    assert small_limits(BLOCK).context_limit_tokens == 100
