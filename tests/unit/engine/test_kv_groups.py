"""Block tables by group: whatever a layout's rules are, a step finds what its tokens look at, and nothing is kept."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.kv_groups import KvGroups
from engine.scheduler import EngineLimits
from engine.types import RefusalCode, SamplingParams, SequenceSpec
from kv_transfer.layout import FULL, GONE, Rule
from tests.scenarios.model import ScriptedModel, WrongKv, expected_answer

BLOCK = 4
WINDOW, CHUNK, STATE = Rule(window=10), Rule(chunk=12), Rule(state=True)
LAYOUTS = {
    "window alone": (WINDOW,),
    "chunk alone": (CHUNK,),
    "full and window": (FULL, WINDOW),
    "full, window and chunk": (FULL, WINDOW, CHUNK),
    "full and state": (FULL, STATE),
    "all": (FULL, Rule(values=3), WINDOW, CHUNK, STATE),
}


class Engine:
    def __init__(self, rules: tuple[Rule, ...], blocks: int = 64, others: int = 32, **limits: Any) -> None:
        counts = (blocks, *(others if rule.leaves or rule.state else blocks for rule in rules[1:]))
        self.model = ScriptedModel(counts, BLOCK, rules)
        self.pool = BlockPool(counts, self.model.generations)
        limit = {"max_batch_tokens": 16, "max_running_sequences": 8} | limits
        self.core = EngineCore(
            EngineLimits(BLOCK, max_waiting_sequences=64, context_limit_tokens=400, vocab_size=1000, **limit),
            self.pool,
            "test",
            rules=rules,
        )
        self.cached: dict[int, int] = {}
        self.answers: dict[int, list[int]] = {}
        self.most: list[int] = [0] * len(rules)  # blocks in use, by group

    def add(self, number: int, prompt: list[int], max_tokens: int) -> None:
        assert self.core.add(SequenceSpec(number, prompt, SamplingParams(max_tokens=max_tokens)), 0.0) is None

    def run(self) -> None:
        for _ in range(5000):
            plan = self.core.schedule(0.0)
            if plan is None:
                assert not self.core.has_work(), "work, and nothing is planned"
                return
            for group in range(len(self.most)):
                used = self.pool.blocks_by_group[group] - self.pool.free_in(group)
                self.most[group] = max(self.most[group], used)
            events = self.core.commit(plan, self.model.execute(plan), 0.0)
            for token in events.tokens:
                self.answers.setdefault(token.sequence_id, []).append(token.token_id)
            for end in events.ends:
                assert not end.error
                self.cached[end.sequence_id] = end.cached_tokens
            self.core.check()
        raise AssertionError("no end")

    def answer(self, number: int, prompt: list[int], max_tokens: int = 5) -> tuple[list[int], int]:
        """The answer, and how much of the prompt was cached."""
        self.add(number, prompt, max_tokens)
        self.run()
        return self.answers[number], self.cached[number]


def right(prompt: list[int], max_tokens: int) -> list[int]:
    return expected_answer(prompt, 0.0, 0, max_tokens, 0, frozenset())


@pytest.mark.parametrize("name", LAYOUTS)
@given(st.integers(0, 1 << 30))
@settings(max_examples=15, deadline=None)
def test_answers_are_right_and_nothing_stays(name: str, seed: int) -> None:
    """Under little room: sequences wait, give way and are computed again; prompts share beginnings."""
    rng = random.Random(seed)
    engine = Engine(LAYOUTS[name], blocks=rng.choice((26, 40, 64)), others=rng.choice((9, 14, 32)))
    prompts: list[list[int]] = []
    for _ in range(rng.randint(2, 8)):
        begin = rng.choice(prompts)[: rng.randint(1, 60)] if prompts and rng.random() < 0.6 else []
        prompts.append([*begin, *(rng.randrange(1000) for _ in range(rng.randint(1, 50)))][:80])
    lengths = [rng.randint(1, 20) for _ in prompts]
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add(number, prompt, length)
        if rng.random() < 0.3:
            engine.run()
    engine.run()
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert engine.answers[number] == right(prompt, length)
    assert engine.core.is_idle()
    assert engine.pool.is_idle()


def test_a_long_sequence_holds_no_more_of_a_window_than_it_looks_at() -> None:
    engine = Engine((FULL, WINDOW, CHUNK), others=12)
    prompt = list(range(150))
    answer, _ = engine.answer(1, prompt, 60)
    assert answer == right(prompt, 60)
    assert engine.most[0] == -(-209 // BLOCK), "everything of what keeps everything"
    # The window or chunk behind the first token of a step, and the step's own 16 tokens.
    assert engine.most[1] <= -(-10 // BLOCK) + 16 // BLOCK + 1
    assert engine.most[2] <= -(-12 // BLOCK) + 16 // BLOCK + 1


def test_a_hit_is_where_every_group_can_go_on() -> None:
    engine = Engine((FULL, WINDOW))
    prompt = list(range(100, 180))
    engine.answer(1, prompt)
    assert engine.answer(2, prompt)[1] == 76, "the window before the end is cached, too"
    names = [engine.pool._names[b] for b in range(64, 96) if engine.pool._names[b] is not None]
    assert len(names) > 10, "what the window left is cached until its blocks are needed"
    # Blocks of the window at the prompt's end go; earlier ones are there still.
    lost = engine.core.groups.find(_names(engine, prompt)).tables[1][-1]
    engine.pool._forget_name(lost)
    answer, cached = engine.answer(3, prompt)
    assert answer == right(prompt, 5)
    assert cached == 72, "the longest boundary whose window is there"


def _names(engine: Engine, prompt: list[int]) -> list[bytes]:
    engine.add(99, prompt, 1)
    names = engine.core.block_names(99, len(prompt) - 1)
    engine.core.cancel(99)
    return names


def test_a_state_goes_on_from_a_snapshot_and_the_state_before_is_not_touched() -> None:
    engine = Engine((FULL, STATE))
    prompt = list(range(100, 150))
    engine.answer(1, prompt)
    longer = [*prompt[:48], 1, 2, 3]
    answer, cached = engine.answer(2, longer)
    assert answer == right(longer, 5)
    assert cached == 48, "48 is the last whole block of the prompt's last chunk"
    answer, cached = engine.answer(3, [*prompt[:40], 5])
    assert cached == 32, "within a chunk of 16 there is no snapshot"
    assert answer == right([*prompt[:40], 5], 5)


def test_a_step_that_failed_can_be_repeated() -> None:
    """A state is read from one slot and written to another, so a step may run again, whole or in parts."""
    engine = Engine((FULL, WINDOW, STATE))
    engine.add(1, list(range(30)), 12)
    while (plan := engine.core.schedule(0.0)) is not None:
        engine.model.execute(plan)
        events = engine.core.commit(plan, engine.model.execute(plan), 0.0)
        for token in events.tokens:
            engine.answers.setdefault(1, []).append(token.token_id)
    assert engine.answers[1] == right(list(range(30)), 12)


def test_with_a_state_the_next_step_waits_for_this_one() -> None:
    engine = Engine((FULL, STATE))
    engine.add(1, list(range(30)), 12)
    assert engine.core.schedule(0.0) is not None
    assert engine.core.schedule(0.0) is None


def test_what_can_never_fit_is_refused_by_its_group() -> None:
    engine = Engine((FULL, Rule(window=200)), others=8)
    refusal = engine.core.add(SequenceSpec(1, list(range(90)), SamplingParams(max_tokens=30)), 0.0)
    assert refusal is not None
    assert refusal.code is RefusalCode.INVALID
    assert "window(200)" in refusal.reason


def test_cancels_in_every_phase_leave_nothing() -> None:
    for steps in range(8):
        engine = Engine(LAYOUTS["all"])
        engine.add(1, list(range(60)), 10)
        for _ in range(steps):
            plan = engine.core.schedule(0.0)
            assert plan is not None
            engine.core.commit(plan, engine.model.execute(plan), 0.0)
        plan = engine.core.schedule(0.0)
        assert engine.core.cancel(1)
        if plan is not None:
            engine.core.commit(plan, engine.model.execute(plan), 0.0)
        assert engine.pool.is_idle(), steps


def test_a_reservation_is_what_the_next_token_looks_at() -> None:
    engine = Engine((FULL, WINDOW, CHUNK, STATE))
    prompt = list(range(45))
    assert engine.core.add(SequenceSpec(1, prompt, SamplingParams(max_tokens=5), hold=True), 0.0) is None
    reservation = engine.core.reserve(1, 45, 0.0)
    assert reservation is not None
    full, window, chunk, state = reservation.rooms
    assert (full.first, len(full.table)) == (0, 12)
    assert (window.first, len(window.table)) == (9, 12), "positions 36 to 44"
    assert window.table[:9] == (GONE,) * 9
    assert (chunk.first, len(chunk.table)) == (9, 12)
    assert (state.first, len(state.table)) == (0, 1)
    engine.core.cancel(1)
    assert engine.pool.is_idle()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_reservation_that_lacks_one_group_takes_nothing(name: str) -> None:
    rules = LAYOUTS[name]
    engine = Engine(rules)
    spec = SequenceSpec(1, list(range(45)), SamplingParams(max_tokens=2), hold=True)
    assert engine.core.add(spec, 0.0) is None
    last = len(rules) - 1
    others = engine.pool.allocate(engine.pool.free_in(last), last)
    assert others is not None
    in_use = engine.pool.blocks_in_use
    for _ in range(2):
        assert engine.core.reserve(1, 45, 0.0) is None
        assert engine.pool.blocks_in_use == in_use
    engine.pool.unpin(others)
    assert engine.core.reserve(1, 45, 0.0) is not None
    engine.core.cancel(1)
    engine.pool.check()
    assert engine.pool.is_idle()


def _too_early(self: KvGroups, sequence: Any) -> None:
    """A window lets go of one block more."""
    sequence.num_computed += BLOCK
    leave_behind(self, sequence)
    sequence.num_computed -= BLOCK


def _slots_not_exchanged(self: KvGroups, sequence: Any, use: Any, names: Any) -> None:
    landed(self, sequence, use, names)
    slots = sequence.tables[self.state]
    slots[0], slots[1] = slots[1], slots[0]


leave_behind, landed = KvGroups.leave_behind, KvGroups.landed


@pytest.mark.parametrize(
    ("name", "fault"), [("leave_behind", _too_early), ("landed", _slots_not_exchanged)], ids=["window", "state"]
)
def test_planted_faults_are_seen(name: str, fault: Any) -> None:
    with mock.patch.object(KvGroups, name, fault), pytest.raises((WrongKv, AssertionError)):
        Engine((FULL, WINDOW, STATE)).answer(1, list(range(60)), 10)
