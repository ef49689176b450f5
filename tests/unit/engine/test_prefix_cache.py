"""What the prefix cache promises: nothing is computed twice where it is held, nothing shared that must not be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from tests.support.scripted import ScriptedRunner, expected_answer

BLOCK = 4


class Engine:
    def __init__(self, num_blocks: int = 128) -> None:
        self.runner = ScriptedRunner(num_blocks, BLOCK)
        self.pool = BlockPool(num_blocks, self.runner.generations)
        self.core = EngineCore(EngineLimits(BLOCK, 16, 8, 64, 400, 1000), self.pool, "test")
        self.numbers = 0
        self.now = 0.0
        self.began: list[int] = []  # sequences, in the order in which they were first computed

    def add(self, prompt: list[int], max_tokens: int = 5, **options: object) -> int:
        self.numbers += 1
        spec = SequenceSpec(self.numbers, prompt, SamplingParams(max_tokens=max_tokens), **options)  # type: ignore[arg-type]
        assert self.core.add(spec, self.now) is None
        return self.numbers

    def run(self, prompt: list[int], max_tokens: int = 5, **options: object) -> tuple[list[int], int, int]:
        """The answer, the prompt tokens that were computed, and those that are said to be cached."""
        number = self.add(prompt, max_tokens, **options)
        computed, answer, cached = 0, [], -1
        while (plan := self.core.schedule(self.now)) is not None:
            for item in plan.items:
                computed += max(0, min(len(prompt), item.start + len(item.token_ids)) - item.start)
                if item.sequence_id not in self.began:
                    self.began.append(item.sequence_id)
            events = self.core.commit(plan, self.runner.execute(plan), self.now)
            answer += [t.token_id for t in events.tokens if t.sequence_id == number]
            cached = next((e.cached_tokens for e in events.ends if e.sequence_id == number), cached)
            self.core.check()
        return answer, computed, cached


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@given(st.lists(st.integers(1, 23), min_size=2, max_size=6), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_a_chat_never_computes_twice_what_it_has(turns: list[int], max_tokens: int) -> None:
    """Answers included: every turn computes what came after the last full block of the turn before."""
    engine, rng = Engine(), random.Random(1)
    chat: list[int] = []
    known = 0
    for length in turns:
        chat = chat + [rng.randrange(1000) for _ in range(length)]
        answer, computed, cached = engine.run(chat, max_tokens)
        assert answer == expected_answer(chat, SamplingParams(max_tokens=max_tokens))
        assert cached == whole_blocks(min(known, len(chat) - 1))
        assert computed == len(chat) - cached
        chat = chat + answer
        known = len(chat) - 1  # the last token of an answer is sampled and never computed


@given(st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_reuse_ends_with_the_block_of_the_first_differing_token(length: int, data: st.DataObject) -> None:
    engine, rng = Engine(), random.Random(length)
    first = [rng.randrange(1000) for _ in range(length)]
    differs_at = data.draw(st.integers(0, length - 1))
    second = [*first]
    second[differs_at] = (second[differs_at] + 1) % 1000
    engine.run(first)
    answer, computed, cached = engine.run(second)
    assert answer == expected_answer(second, SamplingParams(max_tokens=5))
    assert cached == whole_blocks(min(differs_at, length - 1)), "a changed first token hits nothing"
    assert computed == length - cached


def test_salts_never_share_and_each_finds_its_own() -> None:
    engine = Engine()
    prompt = [random.Random(3).randrange(1000) for _ in range(30)]
    for salt in ("", "a", "b"):
        assert engine.run(prompt, cache_salt=salt)[2] == 0
    for salt in ("", "a", "b"):
        assert engine.run(prompt, cache_salt=salt)[2] == 28


def test_the_least_recently_used_prefix_goes_first_and_its_tail_before_its_head() -> None:
    engine = Engine(num_blocks=24)
    rng = random.Random(4)
    old, used = ([rng.randrange(1000) for _ in range(32)] for _ in range(2))
    for prompt in (old, used, used):
        engine.run(prompt, 1)
    engine.run([rng.randrange(1000) for _ in range(44)], 1)  # needs more than the blocks that hold nothing
    kept_of_old = engine.run(old, 1)[2]
    assert 0 < kept_of_old < 28, "its tail is gone, its head is not"


# Least laxity.


def order(engine: Engine, *added: int) -> list[int]:
    engine.run([1], 1)  # whatever is there runs with it
    return [n for n in engine.began if n in added]


def test_who_has_least_slack_goes_first_whatever_the_order_of_arrival() -> None:
    engine = Engine()
    a, b, c = (engine.add([n] * 20, 1, slack_s=s) for n, s in ((1, 3.0), (2, 1.0), (3, 2.0)))
    assert order(engine, a, b, c) == [b, c, a]


def test_without_slack_it_is_first_come_and_priority_goes_before_all() -> None:
    engine = Engine()
    a, b = engine.add([1] * 20, 1), engine.add([2] * 20, 1)
    c, d = engine.add([3] * 20, 1, slack_s=0.5), engine.add([4] * 20, 1, slack_s=9.0, priority=1)
    assert order(engine, a, b, c, d) == [d, a, b, c]


def test_who_is_late_already_gives_way_to_those_that_can_be_in_time() -> None:
    engine = Engine()
    late = engine.add([1] * 20, 1, slack_s=0.5)
    engine.now = 1.0
    good = engine.add([2] * 20, 1, slack_s=2.0)
    assert order(engine, late, good) == [good, late]


def test_giving_way_has_an_end() -> None:
    engine = Engine()
    late = engine.add([1] * 20, 1, slack_s=0.5)
    engine.now = 1.0
    blocker = engine.add([5] * 20, 1, slack_s=0.2)
    plan = engine.core.schedule(engine.now)  # `late` has given way
    assert plan is not None
    assert plan.items[0].sequence_id == blocker
    engine.core.commit(plan, engine.runner.execute(plan), engine.now)
    engine.now = 20.0
    new = engine.add([2] * 20, 1, slack_s=1.0)
    assert order(engine, late, new) == [late, new]


def test_a_recovery_never_gives_way() -> None:
    engine = Engine()
    emitted = expected_answer([1] * 20, SamplingParams(max_tokens=2))
    resumed = engine.add([1] * 20, 5, slack_s=-5.0, emitted=emitted)
    good = engine.add([2] * 20, 1, slack_s=1.0)
    assert order(engine, resumed, good) == [resumed, good]


@pytest.mark.parametrize("slack_s", [None, -1.0, 0.0, 5.0])
def test_slack_changes_no_answer(slack_s: float | None) -> None:
    engine = Engine()
    prompt = [random.Random(5).randrange(1000) for _ in range(30)]
    assert engine.run(prompt, slack_s=slack_s)[0] == expected_answer(prompt, SamplingParams(max_tokens=5))
