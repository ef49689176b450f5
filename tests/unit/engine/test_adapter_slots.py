"""Who has a slot: an adapter in use is never replaced, and nobody who needs a slot overtakes one who waits for it."""

from __future__ import annotations

import random

from engine.adapters.slots import AdapterSlots, InSlot
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.types import Failed, SamplingParams, SequenceSpec, StepPlan, StepResult


def test_a_slot_in_use_is_never_given_to_another() -> None:
    slots = AdapterSlots(2, "abc")
    a, b = slots.take("a"), slots.take("b")
    assert a is not None
    assert b is not None
    assert {a.slot, b.slot} == {0, 1}
    assert not slots.has_room("c")
    assert slots.take("c") is None
    assert slots.take("a") == a
    slots.give_back(a)
    assert slots.take("c") is None
    slots.give_back(b)
    assert slots.take("c") == InSlot(b.slot, "c")
    assert slots.loaded == ("a", "c")
    assert slots.loads_total == 3


def test_the_least_recently_used_goes_first() -> None:
    slots = AdapterSlots(3, "abcd")
    for digest in "abca":
        taken = slots.take(digest)
        assert taken is not None
        slots.give_back(taken)
    slots.take("d")
    assert set(slots.loaded) == {"a", "c", "d"}


def engine_with(slots: AdapterSlots, blocks: int = 64) -> EngineCore:
    return EngineCore(EngineLimits(4, 16, 8, 32, 64, 100), BlockPool(blocks), adapters=slots)


def spec(number: int, adapter: str = "", **changes: object) -> SequenceSpec:
    return SequenceSpec(number, [number % 90] * 6, SamplingParams(max_tokens=3), adapter=adapter, **changes)  # type: ignore[arg-type]


def computed(plan: StepPlan) -> StepResult:
    return StepResult(tuple(7 if item.sample else None for item in plan.items), (None,) * len(plan.items))


def test_one_who_waits_for_a_slot_is_passed_only_by_those_without_adapters() -> None:
    slots = AdapterSlots(1, "ab")
    core = engine_with(slots)
    for number, adapter in enumerate(("a", "b", "a", ""), 1):
        assert core.add(spec(number, adapter), 0.0) is None
    ended: list[int] = []
    first: list[int] = []
    while (plan := core.schedule(0.0)) is not None:
        first += [item.sequence_id for item in plan.items if item.sequence_id not in first]
        assert len({item.adapter for item in plan.items if item.adapter is not None}) <= 1
        ended += [end.sequence_id for end in core.commit(plan, computed(plan), 0.0).ends]
        core.check()
    assert first == [1, 4, 2, 3]
    assert sorted(ended) == [1, 2, 3, 4]
    assert slots.loads_total == 3


def test_an_adapter_that_is_lost_ends_who_has_it_and_is_refused_from_then_on() -> None:
    """With one step that failed, however many asked for it: running, waiting, or being received."""
    slots = AdapterSlots(1, "ab")
    core = engine_with(slots)
    for number, adapter in enumerate(("a", "a", "b", "a", ""), 1):
        assert core.add(spec(number, adapter), 0.0) is None
    assert core.add(spec(6, "a", hold=True), 0.0) is None
    plan = core.schedule(0.0)
    assert plan is not None
    gone = {place: Failed("gone", adapter_lost=True) for place, item in enumerate(plan.items) if item.adapter}
    tokens = tuple(None if place in gone else token for place, token in enumerate(computed(plan).token_ids))
    events = core.commit(plan, StepResult(tokens, (None,) * len(tokens), gone), 0.0)
    assert {(end.sequence_id, end.error, end.ours) for end in events.ends} == {(n, "gone", True) for n in (1, 2, 4)}
    refusal = core.add(spec(7, "a"), 0.0)
    assert refusal is not None
    assert refusal.reason == "gone"
    if core.reserve(6, 6, 0.0) is not None:
        assert [end.error for end in core.adopt(6, 6, [7], 0.0).ends] == ["gone"]
    else:
        core.cancel(6)
    ended: list[int] = []
    while (plan := core.schedule(0.0)) is not None:
        events = core.commit(plan, computed(plan), 0.0)
        assert not any(end.error for end in events.ends)
        ended += [end.sequence_id for end in events.ends]
    assert sorted(ended) == [3, 5]
    core.check()
    assert core.is_idle()
    assert not slots.users("a")


def test_room_for_received_kv_comes_with_a_slot() -> None:
    slots = AdapterSlots(1, "ab")
    core = engine_with(slots)
    for number, adapter in ((1, "a"), (2, "b")):
        assert core.add(spec(number, adapter, hold=True), 0.0) is None
    assert core.reserve(1, 6, 0.0) is not None
    assert core.reserve(2, 6, 0.0) is None
    core.cancel(1)
    assert core.reserve(2, 6, 0.0) is not None
    core.check()


def test_what_others_still_read_holds_no_slot() -> None:
    """A prompt that was handed over keeps its blocks under a lease, and computes nothing more."""
    slots = AdapterSlots(1, "ab")
    core = engine_with(slots)
    assert core.add(spec(1, "a", hand_over=True, retain=True), 0.0) is None
    plan = core.schedule(0.0)
    assert plan is not None
    core.commit(plan, computed(plan), 0.0)
    assert slots.users("a") == 0
    assert core.pool.blocks_in_use
    core.drop(1)
    assert core.pool.is_idle()


def test_nothing_is_left_after_random_lives() -> None:
    """Few blocks, so that sequences lose theirs, and cancels at any time."""
    rng = random.Random(4)
    slots = AdapterSlots(2, "abcd")
    core = engine_with(slots, blocks=9)
    alive: set[int] = set()
    for number in range(1, 200):
        if core.add(spec(number, rng.choice(("", *"abcd"))), 0.0) is None:
            alive.add(number)
        if rng.random() < 0.3 and alive:
            core.cancel(alive.pop())
        plan = core.schedule(0.0)
        if plan is not None:
            alive -= {end.sequence_id for end in core.commit(plan, computed(plan), 0.0).ends}
        core.check()
        in_use = {item.adapter.digest for item in plan.items if item.adapter is not None} if plan else set()
        assert in_use <= set(slots.loaded)
    while (plan := core.schedule(0.0)) is not None:
        core.commit(plan, computed(plan), 0.0)
    assert core.is_idle()
    assert not any(slots.users(digest) for digest in "abcd")
