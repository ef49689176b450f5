"""Whose prompt is computed first: by laxity, where requests say how long they may wait."""

from __future__ import annotations

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec, StepResult

BATCH = 64


class Queue:
    """Answers of one token, so that the order of ends is the order of prompts. A step takes a second."""

    def __init__(self, blocks: int = 400) -> None:
        self.core = EngineCore(EngineLimits(16, BATCH, 64, 64, 10_000, 1000), BlockPool(blocks))
        self.now = 0.0
        self.ended: list[int] = []

    def add(self, number: int, tokens: int, latest_start_s: float | None, priority: int = 0) -> None:
        prompt = [(number * 31 + i) % 1000 for i in range(tokens)]
        spec = SequenceSpec(
            number, prompt, SamplingParams(max_tokens=1), priority=priority, latest_start_s=latest_start_s
        )
        assert self.core.add(spec, self.now) is None

    def step(self) -> bool:
        plan = self.core.schedule(self.now)
        if plan is None:
            return False
        self.now += 1.0
        sampled = tuple(1 if item.sample else None for item in plan.items)
        events = self.core.commit(plan, StepResult(sampled, (None,) * len(sampled)), self.now)
        self.ended += [e.sequence_id for e in events.ends]
        self.core.check()
        return True

    def run(self) -> list[int]:
        while self.step():
            pass
        return self.ended


def test_without_a_word_on_waiting_it_is_first_come_first_served() -> None:
    q = Queue()
    for number in (1, 2, 3):
        q.add(number, 64, None)
    assert q.run() == [1, 2, 3]


def test_who_can_wait_least_goes_first() -> None:
    q = Queue()
    for number, latest in ((1, 30.0), (2, 10.0), (3, 20.0)):
        q.add(number, 64, latest)
    assert q.run() == [2, 3, 1]


def test_an_urgent_prompt_passes_one_that_runs_already() -> None:
    q = Queue()
    q.add(1, 64 * 6, 40.0)
    q.step()
    q.add(2, 64, 2.0)
    assert q.run() == [2, 1]
    assert q.core.is_idle()


def test_who_is_late_already_does_not_block_the_others_but_is_not_forgotten() -> None:
    q = Queue()
    q.add(1, 64, -1.0)
    q.add(2, 64, 5.0)
    q.add(3, 64, 6.0)
    assert q.run() == [2, 3, 1]
    q = Queue()
    q.add(1, 64, -1.0)
    for number in range(2, 30):  # an overload without end
        q.add(number, 64, q.now + 3.0)
        q.step()
    assert 1 in q.ended, "after ten seconds of giving way it has its turn"
    assert q.ended.index(1) > 5


def test_priority_comes_before_laxity() -> None:
    q = Queue()
    q.add(1, 64, 1.0)
    q.add(2, 64, 50.0, priority=1)
    assert q.run() == [2, 1]


def test_who_waits_for_room_is_not_passed_by_others_that_wait() -> None:
    q = Queue(blocks=10)
    q.add(1, 100, 30.0)
    q.step()
    q.add(2, 100, 5.0)  # no room beside the first
    q.add(3, 20, 20.0)
    assert q.run() == [1, 2, 3]
