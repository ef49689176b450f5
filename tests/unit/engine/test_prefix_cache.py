"""What the prefix cache promises: nothing is computed twice where it is held, nothing shared that must not be."""

from __future__ import annotations

import random

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
