"""Steps planned while the one before computes: the same tokens as one after the other, and no byte out of place.

The scripted runner writes a step's KV as late as it can, when the step is waited for: whoever was given a block too
early finds it overwritten.
"""

from __future__ import annotations

import random
from collections import deque

import pytest

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.types import FinishReason, PlanItem, SamplingParams, SequenceSpec, StepEvents, StepPlan
from tests.support.scripted import ScriptedRunner, ScriptedStep, expected_answer, kv_mark, prefix_mark, small_limits

BLOCK = 4
PROMPT = list(range(1, 12))


class Ahead:
    """An engine whose steps overlap."""

    def __init__(self, num_blocks: int = 32, **limits: int) -> None:
        self.limits = small_limits(BLOCK, **limits)
        self.runner = ScriptedRunner(num_blocks, BLOCK, self.limits.original_context_tokens)
        self.pool = BlockPool(num_blocks, self.runner.generations)
        self.core = EngineCore(self.limits, self.pool, "test")
        self.flying: deque[tuple[StepPlan, ScriptedStep]] = deque()
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason | None] = {}
        self.plans: list[StepPlan] = []
        self.sent = self.surplus = 0

    def add(self, sequence_id: int, prompt: list[int], sampling: SamplingParams, **options: object) -> None:
        assert self.core.add(SequenceSpec(sequence_id, prompt, sampling, **options), 0.0) is None  # type: ignore[arg-type]
        self.answers[sequence_id] = []

    def plan(self) -> bool:
        plan = self.core.schedule(0.0)
        self.core.check()
        if plan is None:
            return False
        assert plan.num_tokens <= self.limits.max_batch_tokens
        self.plans.append(plan)
        self.flying.append((plan, self.runner.launch(plan)))
        return True

    def land(self) -> StepEvents:
        plan, step = self.flying.popleft()
        events = self.core.commit(plan, step.wait(), 0.0)
        self.core.check()
        for t in events.tokens:
            assert t.position == len(self.answers[t.sequence_id])
            self.answers[t.sequence_id].append(t.token_id)
        for e in events.ends:
            self.ends[e.sequence_id] = e.reason
        self.surplus += sum(item.sample for item in plan.items) - len(events.tokens)
        return events

    def turn(self) -> bool:
        """As the worker's loop: plan one step ahead, then wait for the oldest."""
        planned = len(self.flying) < 2 and self.plan()
        if len(self.flying) > 1 or (self.flying and not planned):
            self.land()
            return True
        return planned

    def run(self) -> None:
        for _ in range(10_000):
            if not self.turn():
                return
        raise AssertionError("the engine does not come to an end")

    def assert_empty(self) -> None:
        assert self.core.is_idle()
        assert self.pool.is_idle()
        self.core.check()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def test_a_decode_takes_part_with_its_token_still_to_come() -> None:
    e = Ahead()
    sampling = SamplingParams(max_tokens=6)
    e.add(1, prompt(5), sampling)
    assert e.plan()
    assert e.plan()
    (item,) = e.plans[1].items
    assert (item.token_ids, item.follows, item.start, item.position, item.sample) == ((-1,), 0, 5, 1, True)
    e.run()
    assert e.answers[1] == expected_answer(prompt(5), sampling)
    assert len(e.plans) == 6, "its last token is known to be the last: nothing is computed after it"
    assert e.surplus == 0
    e.assert_empty()


def test_a_stop_token_found_late_drops_the_surplus_row() -> None:
    e = Ahead()
    whole = expected_answer(prompt(5), SamplingParams(max_tokens=20))
    sampling = SamplingParams(max_tokens=20, stop_token_ids=frozenset(whole[3:4]))
    e.add(1, prompt(5), sampling)
    e.run()
    assert e.answers[1] == whole[: whole.index(whole[3]) + 1]
    assert e.ends[1] is FinishReason.STOP
    assert e.surplus == 1
    e.assert_empty()


def test_blocks_of_an_ended_sequence_stay_until_the_step_that_writes_them_has_ended() -> None:
    e = Ahead()
    e.add(1, prompt(5), SamplingParams(max_tokens=20))
    e.plan()
    e.plan()
    table = e.core.block_table(1)
    assert e.core.cancel(1)
    e.core.check()
    written = set(table) & {block for block in table if e.pool.references(block)}
    assert written, "two steps that write to it are in flight"
    assert not e.core.is_idle()
    for _ in range(2):
        e.land()
    e.assert_empty()


def test_a_block_freed_in_flight_goes_to_nobody_before_the_last_byte() -> None:
    """A transfer that lands in a block (a reservation) must not be overwritten by a step that was planned before."""
    e = Ahead(num_blocks=7)
    whole = expected_answer(prompt(5), SamplingParams(max_tokens=20))
    e.add(1, prompt(5), SamplingParams(max_tokens=20, stop_token_ids=frozenset(whole[:1])))
    e.plan()
    e.plan()  # its row is surplus: the first token ends the answer
    e.land()
    assert e.ends[1] is FinishReason.STOP
    blocks = e.pool.allocate(e.pool.free_blocks)
    assert blocks is not None
    for block in blocks:
        e.runner.kv[block] = 7777  # what a peer writes
    while e.flying:
        e.land()
    assert (e.runner.kv[blocks] == 7777).all()
    e.pool.unpin(blocks)
    e.assert_empty()


def test_what_needs_its_token_on_the_host_is_not_planned_ahead() -> None:
    e = Ahead()
    plain, penalised = SamplingParams(max_tokens=8), SamplingParams(max_tokens=4, presence_penalty=0.5)
    e.add(1, prompt(5, 1), plain)
    e.add(2, prompt(6, 2), penalised)
    e.run()
    assert e.answers[1] == expected_answer(prompt(5, 1), plain)
    assert e.answers[2] == expected_answer(prompt(6, 2), penalised)

    def ahead(item: PlanItem) -> bool:
        return item.follows is not None

    with_penalty = [p for p in e.plans if any(i.sequence_id == 2 for i in p.items)]
    assert not any(ahead(i) for p in with_penalty[1:] for i in p.items), "such steps run one after the other"
    assert any(ahead(i) for p in e.plans for i in p.items), "and overlap again when it has ended"
    e.assert_empty()


def test_a_prompt_that_is_handed_over_ends_with_its_first_token() -> None:
    e = Ahead(max_batch_tokens=8)
    e.add(1, prompt(20), SamplingParams(max_tokens=9), hand_over=True, retain=True)
    e.run()
    assert e.answers[1] == expected_answer(prompt(20), SamplingParams(max_tokens=1))
    assert [len(p.items[0].token_ids) for p in e.plans] == [8, 8, 4], "chunks overlap, and nothing comes after"
    for i, block in enumerate(e.core.block_table(1)):
        for slot in range(min(BLOCK, 20 - i * BLOCK)):
            assert e.runner.kv[block, slot] == prefix_mark(prompt(20)[: i * BLOCK + slot + 1])
    e.core.drop(1)
    e.assert_empty()


def test_short_of_blocks_it_waits_for_ends_rather_than_preempt() -> None:
    e = Ahead(num_blocks=6, max_running_sequences=4)
    sampling = SamplingParams(max_tokens=9)
    for i in range(3):
        e.add(i, prompt(7, seed=i), sampling)
    e.run()
    for i in range(3):
        assert e.answers[i] == expected_answer(prompt(7, seed=i), sampling)
    e.assert_empty()


def test_the_token_that_outgrows_the_original_context_is_waited_for() -> None:
    """What comes after it begins anew: a step planned with it still to come would be of no use."""
    e = Ahead(original_context_tokens=12)
    sampling = SamplingParams(max_tokens=9)
    e.add(1, prompt(9), sampling)
    e.run()
    assert e.answers[1] == expected_answer(prompt(9), sampling)
    assert e.surplus == 0
    assert [item.start for plan in e.plans for item in plan.items if item.long] == [0, 13, 14, 15, 16]
    e.assert_empty()


@pytest.mark.parametrize("seed", range(60))
def test_random_lives_are_exact_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    original = random.Random(-seed - 1).choice((0, 0, 8, 16))
    e = Ahead(
        num_blocks=rng.choice((10, 14, 40)),
        max_running_sequences=rng.choice((2, 4, 8)),
        original_context_tokens=original,
    )
    wanted: dict[int, tuple[list[int], SamplingParams]] = {}
    cancelled: set[int] = set()
    landing: list[list[int]] = []  # blocks that peers write into
    families = [prompt(12, seed=100 + i) for i in range(2)]  # prefixes in common
    for number in range(14):
        head = rng.choice([[], *families])
        tokens = [*head, *prompt(rng.randrange(1, 12), seed * 1000 + number)]
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 14),
            temperature=rng.choice((0.0, 0.0, 0.8)),
            seed=rng.randrange(100),
            stop_token_ids=frozenset(rng.sample(range(1000), rng.choice((0, 80)))),
            min_tokens=rng.choice((0, 0, 3)),
            presence_penalty=rng.choice((0.0,) * 9 + (0.5,)),
        )
        wanted[number] = tokens, sampling
    waiting = list(wanted)
    for _ in range(2000):
        move = rng.random()
        if move < 0.12 and waiting:
            number = waiting.pop(0)
            tokens, sampling = wanted[number]
            if rng.random() < 0.3:  # received: a peer's bytes stand in the reserved blocks
                known = expected_answer(tokens, sampling)
                e.add(number, tokens, sampling, hold=True)
                room = e.core.reserve(number, len(tokens), 0.0)
                if room is None:
                    e.core.continue_locally(number, 0, (), 0.0)
                    continue
                for at in range(len(tokens)):
                    mark = kv_mark(tokens[: at + 1], long=0 < original < len(tokens))
                    e.runner.kv[room.block_ids[at // BLOCK], at % BLOCK] = mark
                e.answers[number] = known[:1]
                for end in e.core.adopt(number, len(tokens), known[:1], 0.0).ends:
                    e.ends[end.sequence_id] = end.reason
            else:
                e.add(number, tokens, sampling, priority=rng.choice((0, 0, 1)))
        elif move < 0.16 and e.answers:
            number = rng.choice(list(e.answers))
            if number not in e.ends and e.core.cancel(number):
                cancelled.add(number)
        elif move < 0.19 and e.core._scheduler.running:
            e.core._scheduler._preempt(rng.choice(e.core._scheduler.running))  # a policy may, with steps in flight
        elif move < 0.25:
            blocks = e.pool.allocate(rng.randrange(1, 3))
            if blocks is not None:
                e.runner.kv[blocks] = 7777
                landing.append(blocks)
        elif move < 0.33 and landing:
            blocks = landing.pop(0)
            assert (e.runner.kv[blocks] == 7777).all(), "a step wrote into a block that was given to a transfer"
            e.pool.unpin(blocks)
        elif not e.turn() and not waiting and not landing:
            break
        e.core.check()
    for blocks in landing:
        e.pool.unpin(blocks)
    e.run()
    for number, answer in e.answers.items():
        tokens, sampling = wanted[number]
        whole = expected_answer(tokens, sampling)
        assert answer == (whole[: len(answer)] if number in cancelled else whole), number
    assert e.answers.keys() == wanted.keys()
    assert e.ends.keys() | cancelled == wanted.keys()
    e.assert_empty()


# Handed over while it runs (a step may be in flight when the word comes).


def frozen_in_flight() -> Ahead:
    ahead = Ahead()
    ahead.add(1, PROMPT, SamplingParams(max_tokens=20))
    for _ in range(4):
        ahead.plan()
        ahead.land()
    ahead.plan()
    assert ahead.core.serve(1) is not None
    events = ahead.core.freeze(1)
    assert not events.ends, "the step in flight still writes its blocks"
    assert not ahead.plan(), "nothing is planned behind the last token"
    return ahead


def test_frozen_it_ends_with_the_step_in_flight() -> None:
    ahead = frozen_in_flight()
    events = ahead.land()
    assert [end.reason for end in events.ends] == [None]
    assert ahead.answers[1] == expected_answer(PROMPT, SamplingParams(max_tokens=20))[: len(ahead.answers[1])]
    ahead.core.drop(1)
    assert ahead.core.is_idle()
    assert ahead.pool.is_idle()


def test_kept_before_that_step_is_done_it_goes_on() -> None:
    ahead = frozen_in_flight()
    ahead.core.keep(1)
    assert ahead.plan(), "the planned end is taken back"
    while ahead.flying:
        ahead.land()
        ahead.plan()
    assert ahead.answers[1] == expected_answer(PROMPT, SamplingParams(max_tokens=20))
    assert ahead.core.is_idle()
    assert ahead.pool.is_idle()
