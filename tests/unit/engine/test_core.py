"""The engine's accounting against a scripted model: every answer exact, nothing left."""

from __future__ import annotations

import random

import pytest

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.types import FinishReason, RefusalCode, SamplingParams, SequenceSpec, StepEvents
from tests.support.scripted import ScriptedRunner, expected_answer, kv_mark, small_limits

BLOCK = 4


class Bench:
    """An engine with its scripted runner, and what came out of it."""

    def __init__(self, num_blocks: int = 32, **limits: int) -> None:
        self.limits = small_limits(BLOCK, **limits)
        self.runner = ScriptedRunner(num_blocks, BLOCK, self.limits.original_context_tokens)
        self.pool = BlockPool(num_blocks, self.runner.generations)
        self.core = EngineCore(self.limits, self.pool, "test")
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason | None] = {}
        self.cached: dict[int, int] = {}

    def add(self, sequence_id: int, prompt: list[int], **options: object) -> None:
        sampling = options.pop("sampling", SamplingParams(max_tokens=5))
        assert self.core.add(SequenceSpec(sequence_id, prompt, sampling, **options), 0.0) is None  # type: ignore[arg-type]
        self.answers[sequence_id] = []

    def take(self, events: StepEvents) -> None:
        for t in events.tokens:
            assert t.position == len(self.answers[t.sequence_id])
            self.answers[t.sequence_id].append(t.token_id)
        for e in events.ends:
            self.ends[e.sequence_id] = e.reason
            self.cached[e.sequence_id] = e.cached_tokens

    def step(self) -> bool:
        plan = self.core.schedule(0.0)
        if plan is None:
            return False
        assert plan.num_tokens <= self.limits.max_batch_tokens
        self.take(self.core.commit(plan, self.runner.execute(plan), 0.0))
        self.core.check()
        return True

    def run(self) -> None:
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the engine does not come to an end")

    def assert_empty(self) -> None:
        assert self.core.is_idle()
        assert self.pool.is_idle()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 15, 16, 17, 50])
def test_one_sequence_is_exact_at_every_length(length: int) -> None:
    b = Bench()
    b.add(1, prompt(length))
    b.run()
    assert b.answers[1] == expected_answer(prompt(length), SamplingParams(max_tokens=5))
    assert b.ends[1] is FinishReason.LENGTH
    b.assert_empty()


def test_many_sequences_share_steps_and_stay_exact() -> None:
    b = Bench(num_blocks=64)
    for i in range(20):
        b.add(i, prompt(3 + i, seed=i))
    b.run()
    for i in range(20):
        assert b.answers[i] == expected_answer(prompt(3 + i, seed=i), SamplingParams(max_tokens=5))
    b.assert_empty()


def test_a_second_equal_prompt_finds_the_first_ones_blocks() -> None:
    b = Bench()
    b.add(1, prompt(18))
    b.run()
    b.add(2, prompt(18))
    b.run()
    assert b.cached == {1: 0, 2: 16}
    assert b.answers[2] == b.answers[1]


def test_another_salt_finds_nothing() -> None:
    b = Bench()
    b.add(1, prompt(18), cache_salt="tenant a")
    b.run()
    b.add(2, prompt(18), cache_salt="tenant b")
    b.run()
    assert b.cached == {1: 0, 2: 0}


def test_a_whole_cached_prompt_still_computes_its_last_token() -> None:
    b = Bench()
    b.add(1, prompt(16))
    b.run()
    b.add(2, prompt(16))
    b.run()
    assert b.cached[2] == 12
    assert b.answers[2] == b.answers[1]


def test_preemption_computes_again_and_changes_no_token() -> None:
    b = Bench(num_blocks=9, max_running_sequences=4)
    sampling = SamplingParams(max_tokens=14)
    for i in range(3):
        b.add(i, prompt(10, seed=i), sampling=sampling)
    b.run()
    assert b.core.load().preemptions_total > 0
    for i in range(3):
        assert b.answers[i] == expected_answer(prompt(10, seed=i), sampling)
    b.assert_empty()


# Two rotary tables: short ones up to the model's original context, long ones beyond (engine/longrope.py). The scripted
# runner refuses a step by the wrong one, and KV that was made by the other.


@pytest.mark.parametrize("length", [3, 7, 8, 9, 11, 12, 13, 30])
def test_a_sequence_that_outgrows_the_original_context_is_computed_again(length: int) -> None:
    b = Bench(original_context_tokens=12)
    b.add(1, prompt(length))
    b.run()
    assert b.answers[1] == expected_answer(prompt(length), SamplingParams(max_tokens=5))
    assert b.ends[1] is FinishReason.LENGTH
    computed = length + 4  # its last token is computed by nobody
    assert b.runner.long_rows == (computed if computed > 12 else 0)
    assert b.core.load().preemptions_total == 0, "it did not give way to anybody"
    b.assert_empty()


def test_long_and_short_sequences_share_a_step_and_no_block() -> None:
    b = Bench(num_blocks=64, original_context_tokens=16)
    long, short = prompt(30), prompt(30)[:14]
    for number, tokens in enumerate((long, short, long, short)):
        b.add(number, tokens)
    b.run()
    for number, tokens in enumerate((long, short, long, short)):
        assert b.answers[number] == expected_answer(tokens, SamplingParams(max_tokens=5)), number
    turns = [[*long, 5], short[:13]]
    for number, tokens in enumerate(turns, 4):
        b.add(number, tokens)
    b.run()
    assert (b.cached[4], b.cached[5]) == (28, 12), "each finds what was made by its own table"
    b.add(6, short + b.answers[1] + [5])
    b.run()
    assert b.cached[6] == 16, "the turn before was computed again when it grew"
    b.assert_empty()


def test_outgrowing_and_preemption_together() -> None:
    b = Bench(num_blocks=9, max_running_sequences=4, original_context_tokens=15)
    sampling = SamplingParams(max_tokens=14)
    for i in range(3):
        b.add(i, prompt(10 + i, seed=i), sampling=sampling)
    b.run()
    assert b.core.load().preemptions_total > 0
    for i in range(3):
        assert b.answers[i] == expected_answer(prompt(10 + i, seed=i), sampling)
    b.assert_empty()


@pytest.mark.parametrize("way", ["adopted", "half received", "emitted"])
def test_a_prompt_that_fills_the_original_context_is_received_short_and_goes_on_long(way: str) -> None:
    source, reader = Bench(original_context_tokens=12), Bench(original_context_tokens=12)
    source.add(1, prompt(12), hand_over=True, retain=True)
    source.run()
    reader.add(7, prompt(12), hold=True)
    room = reader.core.reserve(7, 12, 0.0)
    assert room is not None
    for theirs, ours in zip(source.core.block_table(1), room.block_ids, strict=True):
        reader.runner.kv[ours] = source.runner.kv[theirs]
    reader.answers[7] = list(source.answers[1])
    if way == "adopted":
        reader.take(reader.core.adopt(7, 12, source.answers[1], 0.0))
    elif way == "half received":
        reader.core.continue_locally(7, 8, source.answers[1], 0.0)
    else:  # another source computes on from what was emitted
        reader.core.hold_again(7, 8, source.answers[1], 0.0)
        assert reader.core.reserve(7, 13, 0.0) is not None
        reader.core.continue_locally(7, 0, (), 0.0)
    reader.core.check()
    reader.run()
    assert reader.answers[7] == expected_answer(prompt(12), SamplingParams(max_tokens=5))
    reader.assert_empty()


def test_an_answer_that_goes_on_elsewhere_has_the_table_of_its_length() -> None:
    sampling = SamplingParams(max_tokens=8)
    whole = expected_answer(prompt(9), sampling)
    for known in range(1, 8):
        b = Bench(original_context_tokens=12)
        b.answers[1] = whole[:known]
        assert b.core.add(SequenceSpec(1, prompt(9), sampling, emitted=whole[:known]), 0.0) is None
        b.run()
        assert b.answers[1] == whole, known


def test_higher_priority_goes_first() -> None:
    b = Bench(max_running_sequences=1)
    b.add(1, prompt(4, 1))
    b.add(2, prompt(4, 2), priority=5)
    b.step()
    assert b.answers[2]
    assert not b.answers[1]
    b.run()
    b.assert_empty()


def test_stop_tokens_end_an_answer_but_not_before_min_tokens() -> None:
    free = expected_answer(prompt(6), SamplingParams(max_tokens=8))
    stop = frozenset([free[2]])
    b = Bench()
    b.add(1, prompt(6), sampling=SamplingParams(max_tokens=8, stop_token_ids=stop))
    b.run()
    assert b.answers[1] == free[: free.index(free[2]) + 1]
    assert b.ends[1] is FinishReason.STOP
    b.assert_empty()


def test_the_context_limit_ends_an_answer() -> None:
    b = Bench(context_limit_tokens=20)
    b.add(1, prompt(17), sampling=SamplingParams(max_tokens=50))
    b.run()
    assert len(b.answers[1]) == 3
    assert b.ends[1] is FinishReason.LENGTH


def test_resume_goes_on_at_the_next_position() -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=7)
    whole = expected_answer(prompt(9), sampling)
    b = Bench()
    b.answers[1] = whole[:3]
    assert b.core.add(SequenceSpec(1, prompt(9), sampling, emitted=whole[:3]), 0.0) is None
    b.run()
    assert b.answers[1] == whole
    b.assert_empty()


def test_hand_over_samples_one_token_and_keeps_the_blocks() -> None:
    b = Bench()
    b.add(1, prompt(10), hand_over=True, retain=True)
    b.run()
    assert b.answers[1] == expected_answer(prompt(10), SamplingParams(max_tokens=1))
    assert b.ends[1] is None
    assert not b.pool.is_idle()
    b.core.drop(1)
    b.assert_empty()


def test_received_kv_is_adopted() -> None:
    source, reader = Bench(), Bench()
    source.add(1, prompt(10), hand_over=True, retain=True)
    source.run()
    reader.add(7, prompt(10), hold=True)
    assert reader.core.schedule(0.0) is None, "a held sequence does not run"
    room = reader.core.reserve(7, 10, 0.0)
    assert room is not None
    for theirs, ours in zip(source.core.block_table(1), room.block_ids, strict=True):
        reader.runner.kv[ours] = source.runner.kv[theirs]
    reader.answers[7] = list(source.answers[1])
    reader.take(reader.core.adopt(7, 10, source.answers[1], 0.0))
    reader.run()
    assert reader.answers[7] == expected_answer(prompt(10), SamplingParams(max_tokens=5))
    reader.assert_empty()
    source.core.drop(1)


def test_half_received_kv_is_kept_and_the_rest_computed() -> None:
    source, reader = Bench(), Bench()
    source.add(1, prompt(10), hand_over=True, retain=True)
    source.run()
    reader.add(7, prompt(10), hold=True)
    room = reader.core.reserve(7, 10, 0.0)
    assert room is not None
    reader.runner.kv[room.block_ids[0]] = source.runner.kv[source.core.block_table(1)[0]]
    reader.answers[7] = list(source.answers[1])
    reader.core.continue_locally(7, BLOCK, source.answers[1], 0.0)
    plan = reader.core.schedule(0.0)
    assert plan is not None
    assert plan.items[0].start == BLOCK, "the verified block is not computed again"
    reader.take(reader.core.commit(plan, reader.runner.execute(plan), 0.0))
    reader.run()
    assert reader.answers[7] == expected_answer(prompt(10), SamplingParams(max_tokens=5))
    reader.assert_empty()


@pytest.mark.parametrize("state", ["held", "reserved", "waiting", "running", "finished"])
def test_cancel_frees_in_every_state(state: str) -> None:
    b = Bench(max_running_sequences=1)
    if state in ("held", "reserved"):
        b.add(1, prompt(10), hold=True)
        if state == "reserved":
            assert b.core.reserve(1, 10, 0.0) is not None
    elif state == "waiting":
        b.add(2, prompt(10))
        b.step()
        b.add(1, prompt(10))
    elif state == "running":
        b.add(1, prompt(30))
        b.step()
    else:
        b.add(1, prompt(10), hand_over=True, retain=True)
        b.run()
    assert b.core.cancel(1)
    assert not b.core.cancel(1)
    b.core.check()
    b.run()
    b.assert_empty()


def test_cancel_between_schedule_and_commit() -> None:
    b = Bench()
    b.add(1, prompt(10))
    b.add(2, prompt(5))
    plan = b.core.schedule(0.0)
    assert plan is not None
    result = b.runner.execute(plan)
    b.core.cancel(1)
    b.take(b.core.commit(plan, result, 0.0))
    b.run()
    assert b.answers[1] == []
    assert len(b.answers[2]) == 5
    b.assert_empty()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (SequenceSpec(1, [], SamplingParams()), "empty"),
        (SequenceSpec(1, [1] * 100, SamplingParams()), "context limit of 100"),
        (SequenceSpec(1, [1000], SamplingParams()), "vocabulary"),
        (SequenceSpec(1, [1], SamplingParams(max_tokens=2), emitted=[1, 2]), "max_tokens"),
        (SequenceSpec(1, [1] * 60, SamplingParams(max_tokens=30)), "KV blocks"),
    ],
)
def test_what_can_never_run_is_refused(spec: SequenceSpec, words: str) -> None:
    b = Bench(num_blocks=20)
    refusal = b.core.add(spec, 0.0)
    assert refusal is not None
    assert refusal.code is RefusalCode.INVALID
    assert words in refusal.reason
    b.assert_empty()


def test_a_full_queue_says_busy() -> None:
    b = Bench(max_waiting_sequences=2)
    b.add(1, prompt(3))
    b.add(2, prompt(3), hold=True)
    refusal = b.core.add(SequenceSpec(3, [1], SamplingParams()), 0.0)
    assert refusal is not None
    assert refusal.code is RefusalCode.BUSY


@pytest.mark.parametrize("seed", range(40))
def test_random_lives_end_exact_and_leave_nothing(seed: int) -> None:
    """Adds, holds, reservations, adoptions, cancels and preemptions in random order."""
    rng = random.Random(seed)
    original = random.Random(-seed - 1).choice((0, 0, 10, 20))
    b = Bench(
        num_blocks=rng.choice([14, 20, 40]),
        max_running_sequences=rng.choice([1, 3, 8]),
        original_context_tokens=original,
    )
    wanted: dict[int, list[int]] = {}
    held: dict[int, tuple[list[int], SamplingParams]] = {}
    reserved: dict[int, tuple[int, ...]] = {}
    cancelled: set[int] = set()
    for number in range(60):
        choice = rng.random()
        if choice < 0.35:
            tokens = prompt(rng.randint(1, 30), seed=rng.randrange(6))  # few seeds: prefixes are shared
            sampling = SamplingParams(max_tokens=rng.randint(1, 12), temperature=rng.choice([0, 1]), seed=number)
            hold = rng.random() < 0.3
            if b.core.add(SequenceSpec(number, tokens, sampling, hold=hold), 0.0) is None:
                b.answers[number] = []
                wanted[number] = expected_answer(tokens, sampling, 100)
                if hold:
                    held[number] = (tokens, sampling)
        elif choice < 0.45 and wanted:
            victim = rng.choice(list(wanted))
            if victim not in b.ends:
                b.core.cancel(victim)
                cancelled.add(victim)
                held.pop(victim, None)
                reserved.pop(victim, None)
        elif choice < 0.6 and held:
            number_held = rng.choice(list(held))
            tokens, sampling = held[number_held]
            if number_held not in reserved:
                room = b.core.reserve(number_held, len(tokens), 0.0)
                if room is not None:
                    reserved[number_held] = room.block_ids
            first = wanted[number_held][:1]
            if number_held in reserved and rng.random() < 0.6:
                for i in range(len(tokens)):
                    mark = kv_mark(tokens[: i + 1], long=0 < original < len(tokens))
                    b.runner.kv[reserved[number_held][i // BLOCK], i % BLOCK] = mark
                b.answers[number_held] = list(first)
                b.take(b.core.adopt(number_held, len(tokens), first, 0.0))
                del held[number_held], reserved[number_held]
            elif rng.random() < 0.3:
                b.core.continue_locally(number_held, 0, [], 0.0)
                held.pop(number_held)
                reserved.pop(number_held, None)
        else:
            b.step()
        b.core.check()
    for number in list(held):
        b.core.continue_locally(number, 0, [], 0.0)
    b.run()
    for number, answer in wanted.items():
        if number in cancelled:
            assert b.answers[number] == answer[: len(b.answers[number])]
        else:
            assert b.answers[number] == answer
    b.assert_empty()
