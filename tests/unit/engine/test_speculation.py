"""Drafts in the engine's accounting: the same answers at the same positions, and of what was not accepted no trace.

The scripted runner writes the KV of rejected drafts, too, and reads every slot before its tokens: one that was not
overwritten, or that went to somebody else, shows at once.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.drafting import Drafting
from engine.sequence import Sequence, Status
from engine.speculation import Speculation, SpeculationLimits
from engine.step_cost import StepCost, StepCostEstimate
from engine.types import FinishReason, PlanItem, SamplingParams, SequenceSpec, StepEvents, StepPlan, StepResult
from kv_transfer.block_hash import chain_hashes
from kv_transfer.layout import FULL, Rule
from tests.support.scripted import ScriptedRunner, ScriptedStep, expected_answer, kv_mark, small_limits

BLOCK = 4
WORDS = 3  # so few that answers repeat themselves


class Bench:
    """An engine that speculates, and what came out of it. `ahead`: steps overlap. `truth`: by sequence, what it is
    going to say; then drafts are as many right tokens as `right` says, and wrong ones after them.
    """

    def __init__(self, num_blocks: int = 32, *, ahead: bool = False, most: int = 4, **limits: int) -> None:
        self.limits = small_limits(BLOCK, **({"max_batch_tokens": 24} | limits))
        self.runner = ScriptedRunner(num_blocks, BLOCK, self.limits.original_context_tokens, WORDS)
        self.pool = BlockPool(num_blocks, self.runner.generations)
        self.core = EngineCore(self.limits, self.pool, "test", speculation=SpeculationLimits(most))
        self.ahead, self.most = ahead, most
        self.flying: deque[tuple[StepPlan, ScriptedStep]] = deque()
        self.sampling: dict[int, tuple[list[int], SamplingParams]] = {}
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason | None] = {}
        self.steps = 0

    @property
    def counts(self) -> Any:
        assert self.core.speculation is not None
        return self.core.speculation.counts

    def foretell(self, right: Callable[[], int]) -> None:
        def propose(decodes: Iterable[Sequence]) -> dict[int, list[int]]:
            found = {}
            for s in decodes:
                room = min(self.most, speculation.room(s))
                s.drafting = s.drafting or Drafting()
                good = min(right(), room)
                after = self.expected(s.sequence_id)[s.num_emitted : s.num_emitted + good]
                drafts = [*after, *[WORDS] * (room - len(after))]
                if drafts:
                    found[s.sequence_id] = drafts
            return found

        speculation = self.core.speculation
        assert speculation is not None
        speculation.propose = propose  # type: ignore[method-assign]

    def add(self, sequence_id: int, prompt: list[int], sampling: SamplingParams, **options: object) -> None:
        spec = SequenceSpec(sequence_id, prompt, sampling, **options)  # type: ignore[arg-type]
        assert self.core.add(spec, 0.0) is None
        self.sampling[sequence_id] = prompt, sampling
        self.answers[sequence_id] = list(spec.emitted)

    def expected(self, sequence_id: int) -> list[int]:
        prompt, sampling = self.sampling[sequence_id]
        return expected_answer(prompt, sampling, self.limits.context_limit_tokens, WORDS)

    def turn(self) -> bool:
        planned = False
        if len(self.flying) < 1 + self.ahead:
            plan = self.core.schedule(0.0)
            self.core.check()
            if plan is not None:
                assert plan.num_tokens <= self.limits.max_batch_tokens
                self.flying.append((plan, self.runner.launch(plan)))
                planned = True
        if self.flying and (len(self.flying) > self.ahead or not planned):
            self.land()
            return True
        return planned

    def land(self) -> StepEvents:
        self.steps += 1
        plan, step = self.flying.popleft()
        events = self.core.commit(plan, step.wait(), 0.0)
        self.core.check()
        for t in events.tokens:
            assert t.position == len(self.answers[t.sequence_id])
            self.answers[t.sequence_id].append(t.token_id)
        for p in events.progress:
            known = len(self.sampling[p.sequence_id][0]) + len(self.answers[p.sequence_id])
            assert p.num_computed_tokens < known, "KV of what nobody said is told of"
        for e in events.ends:
            self.ends[e.sequence_id] = e.reason
        return events

    def run(self) -> None:
        for _ in range(10_000):
            if not self.turn():
                return
        raise AssertionError("the engine does not come to an end")

    def assert_exact(self) -> None:
        for sequence_id, answer in self.answers.items():
            assert answer == self.expected(sequence_id), sequence_id
        assert self.core.is_idle()
        assert self.pool.is_idle()
        self.core.check()

    def assert_cache_is_true(self) -> None:
        """Whatever the prefix cache has says of its tokens what the model says."""
        marks = {
            kv_mark(tokens[: i + 1], long=False)
            for sequence_id, (prompt, _) in self.sampling.items()
            for tokens in [[*prompt, *self.answers[sequence_id]]]
            for i in range(len(tokens))
        }
        for name in self.pool.names():
            block = self.pool.lookup(name)
            assert block is not None
            assert set(self.runner.kv[block].tolist()) <= marks


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(WORDS) for _ in range(length)]


both = pytest.mark.parametrize("ahead", [False, True], ids=["one step at a time", "ahead"])


@both
@pytest.mark.parametrize("right", [0, 1, 2, 3, 4])
def test_accepted_drafts_save_steps_and_rejected_ones_leave_nothing(right: int, ahead: bool) -> None:
    b = Bench(ahead=ahead)
    b.foretell(lambda: right)
    b.add(1, prompt(11), SamplingParams(max_tokens=25))
    b.run()
    b.assert_exact()
    b.assert_cache_is_true()
    steps = -(-25 // (right + 1))
    assert steps <= b.steps <= steps + 2
    assert b.counts.accepted == 25 - b.steps
    assert b.core.load().tokens_total == 25, "drafts are no output"


@both
def test_lookup_finds_what_repeats(ahead: bool) -> None:
    """With one word everything repeats: nearly every step gives five tokens."""
    b = Bench(ahead=ahead)
    b.runner.words = 1
    b.add(1, [0] * 9, SamplingParams(max_tokens=50))
    b.run()
    assert b.answers[1] == [0] * 50
    assert b.steps < 20
    assert b.counts.accepted > 35


@both
@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_token_cuts_inside_a_step(cut: int, ahead: bool) -> None:
    b = Bench(ahead=ahead)
    b.foretell(lambda: 4)
    whole = expected_answer(prompt(9), SamplingParams(max_tokens=30), words=WORDS)
    stop = SamplingParams(max_tokens=30, min_tokens=cut, stop_token_ids=frozenset([whole[cut]]))
    b.add(1, prompt(9), stop)
    b.run()
    assert b.answers[1] == whole[: cut + 1]
    assert b.ends[1] is FinishReason.STOP
    b.assert_exact()
    b.assert_cache_is_true()


@both
@pytest.mark.parametrize("limit", range(1, 8))
def test_max_tokens_and_the_context_limit_cut(limit: int, ahead: bool) -> None:
    b = Bench(ahead=ahead, context_limit_tokens=9 + limit)
    b.foretell(lambda: 4)
    b.add(1, prompt(9), SamplingParams(max_tokens=50 if limit % 2 else limit))
    b.run()
    assert len(b.answers[1]) == limit
    assert b.ends[1] is FinishReason.LENGTH
    b.assert_exact()


def test_a_cancel_while_drafts_are_verified_takes_everything_back() -> None:
    b = Bench(ahead=True)
    b.foretell(lambda: 4)
    b.add(1, prompt(9), SamplingParams(max_tokens=30))
    while not (b.flying and b.flying[-1][0].items[0].drafts):
        b.turn()
    assert b.core.cancel(1)
    b.run()
    b.sampling.clear(), b.answers.clear()
    b.assert_exact()


def test_no_step_is_planned_while_one_with_drafts_is_in_flight() -> None:
    """Nor one that drafts would make better: the tokens that it follows on from are not known."""
    b = Bench(ahead=True)
    b.foretell(lambda: 2)
    b.add(1, prompt(9), SamplingParams(max_tokens=30))
    while b.turn():
        assert len(b.flying) == 1 or not any(item.drafts for plan, _ in b.flying for item in plan.items)
    b.assert_exact()


def test_drafts_take_only_the_room_that_is_left() -> None:
    """Blocks and tokens of a step go to answers and prompts first."""
    b = Bench(num_blocks=6, max_batch_tokens=8)
    b.foretell(lambda: 4)
    b.add(1, prompt(7), SamplingParams(max_tokens=12))
    b.turn()
    b.add(2, prompt(9, seed=2), SamplingParams(max_tokens=4))
    b.run()
    b.assert_exact()
    assert b.core.load().preemptions_total == 0


def test_a_preempted_sequence_goes_on() -> None:
    b = Bench(num_blocks=9)
    b.foretell(lambda: 2)
    for n in (1, 2, 3):
        b.add(n, prompt(9, seed=n), SamplingParams(max_tokens=20, temperature=float(n == 2), seed=n))
    b.run()
    assert b.core.load().preemptions_total > 0
    b.assert_exact()
    b.assert_cache_is_true()


def test_who_is_served_has_no_drafts_and_freezes_at_its_next_token() -> None:
    """Its reader has room for so many tokens; and only what was said is announced."""
    b = Bench()
    b.foretell(lambda: 4)
    b.add(1, prompt(9), SamplingParams(max_tokens=40))
    for _ in range(4):
        b.turn()
    plan = b.core.schedule(0.0)
    assert plan is not None
    assert plan.items[0].drafts
    b.flying.append((plan, b.runner.launch(plan)))
    progress = b.core.serve(1)
    assert progress is not None
    assert progress.num_computed_tokens == 9 + len(b.answers[1]) - 1
    b.core.freeze(1)
    before = len(b.answers[1])
    events = b.land()
    assert [e.reason for e in events.ends] == [None]
    assert len(b.answers[1]) == before + 1
    assert events.progress[-1].num_computed_tokens == 9 + before
    assert b.answers[1] == b.expected(1)[: before + 1]
    b.core.drop(1)

    b.add(2, prompt(9), SamplingParams(max_tokens=40))
    for _ in range(3):
        b.turn()
    b.core.serve(2)
    for _ in range(3):
        plan = b.core.schedule(0.0)
        assert plan is not None
        assert not plan.items[0].drafts
        b.flying.append((plan, b.runner.launch(plan)))
        b.land()
    b.core.keep(2)
    b.run()
    assert b.answers[2] == b.expected(2)


@both
def test_adopted_sequences_speculate_from_their_first_step(ahead: bool) -> None:
    """The prompt's side has no part in it: what a lookup needs are the tokens."""
    b = Bench(ahead=ahead)
    text = prompt(9)
    b.foretell(lambda: 3)
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
    assert b.counts.accepted > 8


def test_a_sequence_that_outgrows_its_table_has_no_drafts_beyond_it() -> None:
    b = Bench(num_blocks=40, original_context_tokens=18)
    b.foretell(lambda: 4)
    b.add(1, prompt(9), SamplingParams(max_tokens=30))
    b.run()
    b.assert_exact()
    assert b.runner.long_rows > 0


def test_recurrent_layers_have_no_drafts() -> None:
    """A state cannot go back to before them."""
    limits = small_limits(BLOCK)
    core = EngineCore(
        limits, BlockPool((16, 8)), "test", rules=(FULL, Rule(state=True)), speculation=SpeculationLimits(4)
    )
    assert core.speculation is None


def course(seed: int, *, ahead: bool) -> None:
    """Random drafts, right and wrong, among cancels, preemptions, late comers and short pools."""
    rng = random.Random(seed)
    b = Bench(
        num_blocks=rng.choice([10, 16, 64]),
        ahead=ahead,
        most=rng.randrange(1, 7),
        max_batch_tokens=rng.choice([8, 13, 40]),
        original_context_tokens=rng.choice([0, 0, 17]),
    )
    if rng.random() < 0.7:
        b.foretell(lambda: rng.choice([0, 0, 1, 2, 6]))
    number = 0
    for _ in range(120):
        if rng.random() < 0.15:
            number += 1
            sampling = SamplingParams(
                max_tokens=rng.randrange(1, 20),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(1 << 40),
                stop_token_ids=frozenset([rng.randrange(WORDS)] if rng.random() < 0.3 else []),
                min_tokens=rng.randrange(6),
                logprobs=rng.choice([None, 1]),
            )
            b.add(number, prompt(rng.randrange(1, 20), seed=rng.randrange(3)), sampling, priority=rng.randrange(2))
        elif b.answers and rng.random() < 0.03:
            victim = rng.choice(list(b.answers))
            if victim not in b.ends and b.core.cancel(victim):
                del b.answers[victim]
                b.ends[victim] = None
        else:
            b.turn()
    b.run()
    b.assert_exact()
    if not b.limits.original_context_tokens and None not in b.ends.values():
        b.assert_cache_is_true()


@both
@pytest.mark.parametrize("seed", range(15))
def test_any_course_is_exact(seed: int, ahead: bool) -> None:
    course(seed, ahead=ahead)


# What others have got wrong, and what would be easy to.


def _rejected_drafts_stand(self: EngineCore, sequence: Sequence, item: PlanItem, *rest: Any) -> str:
    """KV of what was drafted is taken for KV of what was said: published, announced, read."""
    why = _VERIFIED(self, sequence, item, *rest)
    if not why and sequence.finish_reason(self.limits.context_limit_tokens) is None:
        sequence.tokens += item.drafts[len(rest[0]) :]
        sequence.num_computed = len(sequence.tokens) - 1
    return why


def _what_comes_after_the_end_is_said(
    self: EngineCore, sequence: Sequence, item: PlanItem, further: Any, events: StepEvents
) -> str:
    """A stop token or max_tokens ends an answer only where a step ends."""
    for i, (token, logprobs) in enumerate(further, 1):
        sequence.num_computed += 1
        self._sampled(sequence, item.position + i, token, logprobs, events)
    return ""


def _kv_stands_for_every_draft(self: EngineCore, sequence: Sequence, item: PlanItem, *rest: Any) -> str:
    why = _VERIFIED(self, sequence, item, *rest)
    self.groups.grow(sequence, item.start + len(item.token_ids))
    full = (item.start + len(item.token_ids)) // BLOCK
    names = chain_hashes([*sequence.tokens, *item.drafts][: full * BLOCK], BLOCK, sequence.parent)
    self.groups.publish(sequence, names, [1] * len(names))
    return why


def _the_first_draft_is_believed(
    self: EngineCore, sequence: Sequence, item: PlanItem, further: Any, events: StepEvents
) -> str:
    return _VERIFIED(self, sequence, item, further or ((item.drafts[0], None),), events)


def _written_without_drafts(self: EngineCore, plan: StepPlan) -> tuple[int, ...]:
    """Blocks that only drafts are written into are not kept from others until the step is done."""
    items = tuple(replace(i, token_ids=i.token_ids[: len(i.token_ids) - len(i.drafts)], drafts=()) for i in plan.items)
    return _WRITTEN(self, replace(plan, items=items))


_VERIFIED, _WRITTEN = EngineCore._verified, EngineCore._written

PLANTED: dict[str, Callable[[], Any]] = {
    "rejected drafts stand": lambda: mock.patch.object(EngineCore, "_verified", _rejected_drafts_stand),
    "blocks with rejected drafts are published": lambda: mock.patch.object(
        EngineCore, "_verified", _kv_stands_for_every_draft
    ),
    "an answer goes on after its end": lambda: mock.patch.object(
        EngineCore, "_verified", _what_comes_after_the_end_is_said
    ),
    "the first draft is believed": lambda: mock.patch.object(EngineCore, "_verified", _the_first_draft_is_believed),
    "drafts know no limit": lambda: mock.patch.object(Speculation, "room", return_value=4),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    with PLANTED[bug]():
        for seed in range(25):
            try:
                course(seed, ahead=seed % 2 == 0)
            except Exception:
                return
    pytest.fail("nobody noticed")


def no_transfer_lands_where_drafts_are_written() -> None:
    b = Bench(num_blocks=12, ahead=True)
    b.foretell(lambda: 4)
    b.add(1, prompt(10), SamplingParams(max_tokens=30))
    while not (b.flying and b.flying[-1][0].items[0].drafts):
        b.turn()
    (item,) = b.flying[-1][0].items
    written = set(item.block_ids[item.start // BLOCK :])
    assert len(written) == 2
    b.core.cancel(1)
    b.add(2, prompt(38), SamplingParams(max_tokens=1), hold=True)
    room = b.core.reserve(2, 38, 0.0)
    assert room is not None
    assert not written & set(room.block_ids)


def test_no_transfer_lands_where_drafts_are_written() -> None:
    no_transfer_lands_where_drafts_are_written()
    with (
        mock.patch.object(EngineCore, "_written", _written_without_drafts),
        pytest.raises(AssertionError),
    ):
        no_transfer_lands_where_drafts_are_written()


def test_batches_with_different_numbers_of_drafts() -> None:
    b = Bench(num_blocks=64, max_batch_tokens=40)
    turns = itertools.cycle([0, 3, 1, 4, 2])
    b.foretell(lambda: next(turns))
    for n in range(1, 7):
        b.add(n, prompt(3 + n, seed=n), SamplingParams(max_tokens=12 + n, temperature=float(n % 2), seed=n))
    b.run()
    b.assert_exact()


def test_a_lookup_knows_as_much_of_received_kv_as_of_computed() -> None:
    """The same drafts from the first step on, whoever computed the prompt."""
    text, proposed = [7, 8, 9, 1, 2, 3, 7, 8], []
    for received in (False, True):
        b = Bench()
        b.add(1, text, SamplingParams(max_tokens=9), hold=received)
        if received:
            room = b.core.reserve(1, len(text), 0.0)
            assert room is not None
            b.core.adopt(1, len(text), [9], 0.0)
        else:
            plan = b.core.schedule(0.0)
            assert plan is not None
            b.core.commit(plan, StepResult((9,), (None,)), 0.0)
        plan = b.core.schedule(0.0)
        assert plan is not None
        proposed.append(list(plan.items[0].drafts))
    assert proposed == [[1, 2, 3, 7], [1, 2, 3, 7]]


class Cost(StepCostEstimate):
    """As if learned."""

    def __init__(self, **ms: float) -> None:
        super().__init__()
        self.ms = StepCost(**ms)

    def cost(self) -> StepCost:
        return self.ms


def drafts_at(batch: int, cost: StepCostEstimate, accepted: list[bool]) -> int:
    """How many drafts each of `batch` sequences gets after drafts that were accepted or not."""
    speculation = Speculation(SpeculationLimits(7), cost, 4096)
    decodes = []
    for i in range(batch):
        spec = SequenceSpec(i, [1, 2] * 20, SamplingParams(max_tokens=500))
        s = Sequence(spec, i, b"", Status.RUNNING, tokens=[1, 2] * 20, num_prompt=40, num_computed=39)
        s.drafting = Drafting(at=40)
        for good in accepted:
            s.drafting.note(1, int(good))
        decodes.append(s)
    found = speculation.propose(decodes)
    counts = {len(found.get(i, ())) for i in range(batch)}
    assert len(counts) == 1
    return counts.pop()


def test_drafts_follow_from_acceptance_and_cost() -> None:
    cheap = Cost(constant_ms=20.0, per_token_ms=0.5)
    assert drafts_at(1, cheap, [True] * 20) == 7
    assert drafts_at(1, cheap, [False] * 20) < drafts_at(1, cheap, []) <= 7
    dear = Cost(constant_ms=1.0, per_token_ms=1.0)
    assert drafts_at(1, dear, [False] * 20) == 0
    assert drafts_at(32, dear, [True] * 20) == 0, "a batch that fills the machine has nothing to gain"
    assert drafts_at(32, cheap, []) < drafts_at(1, cheap, [])


def test_an_old_disappointment_fades() -> None:
    drafting = Drafting()
    for _ in range(10):
        drafting.note(4, 0)
    assert drafting.acceptance(0) < 0.1
    assert drafting.acceptance(400) > 0.4
