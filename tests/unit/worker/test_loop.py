"""The engine thread: messages in, outboxes out, and what happens when it breaks."""

from __future__ import annotations

import queue
import threading

import pytest

from engine.overlap import InThread, Launched
from engine.types import SamplingParams, StepPlan, StepResult
from tests.support.pair import LINK, Pair
from tests.support.scripted import expected_answer
from worker.loop import StepLoop
from worker.messages import Outbox, RouterCommands, StartSequence


def started(
    runner: object, pair: Pair, *, overlap: bool = False
) -> tuple[StepLoop, queue.Queue[Outbox], queue.Queue[BaseException]]:
    outboxes: queue.Queue[Outbox] = queue.Queue()
    crashes: queue.Queue[BaseException] = queue.Queue()
    launcher = InThread(runner) if overlap else None  # type: ignore[arg-type]
    loop = StepLoop(pair.d.core, runner, outboxes.put, crashes.put, launcher=launcher)  # type: ignore[arg-type]
    loop.start()
    return loop, outboxes, crashes


def start(prompt: list[int]) -> RouterCommands:
    return RouterCommands(LINK, (StartSequence(1, "r", prompt, [], SamplingParams(max_tokens=5)),))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_runs_through_and_the_thread_ends(overlap: bool) -> None:
    pair = Pair()
    loop, outboxes, crashes = started(pair.d.runner, pair, overlap=overlap)
    loop.post(start([1, 2, 3]))
    tokens: list[int] = []
    while len(tokens) < 5:
        output = outboxes.get(timeout=10).links.get(LINK)
        tokens += output.token_ids if output is not None else []
    assert tokens == expected_answer([1, 2, 3], SamplingParams(max_tokens=5))
    seen = threading.Event()
    loop.call(lambda core: seen.set() if core.is_idle() else None)
    assert seen.wait(10)
    loop.stop(10)
    assert not loop.alive
    assert crashes.empty()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), AssertionError("a table disagrees")])
def test_a_broken_step_is_reported_once_and_ends_the_thread(error: BaseException, overlap: bool) -> None:
    class Broken:
        def execute(self, plan: StepPlan) -> StepResult:
            raise error

        launch = execute

    pair = Pair()
    loop, _, crashes = started(Broken(), pair, overlap=overlap)
    loop.post(start([1, 2, 3]))
    assert crashes.get(timeout=10) is error
    loop.stop(10)
    assert not loop.alive
    assert crashes.empty()


class Blocked:
    """A runner whose step waits for the test."""

    def __init__(self, runner: object) -> None:
        self._runner = runner
        self.entered, self.release = threading.Event(), threading.Event()

    def execute(self, plan: StepPlan) -> StepResult:
        self.entered.set()
        assert self.release.wait(30)
        return self._runner.execute(plan)  # type: ignore[attr-defined]

    def launch(self, plan: StepPlan) -> Launched:
        self.entered.set()
        assert self.release.wait(30)
        return self._runner.launch(plan)  # type: ignore[attr-defined]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_under_way_shows_and_a_stuck_one_does_not_hold_up_the_stop(overlap: bool) -> None:
    pair = Pair()
    runner = Blocked(pair.d.runner)
    loop, outboxes, crashes = started(runner, pair, overlap=overlap)
    assert loop.step_since is None
    before = loop.last_turn
    loop.post(start([1, 2, 3]))
    assert runner.entered.wait(10)
    assert loop.step_since is not None
    assert overlap or loop.step_since >= loop.last_turn  # else it has come by again, and waits
    assert loop.last_turn >= before
    assert loop.stop(0.05) is False, "it does not wait longer than told"
    assert loop.alive
    runner.release.set()
    assert loop.stop(10) is True
    assert loop.step_since is None
    assert crashes.empty()
    assert outboxes.get(timeout=1).links


def test_an_idle_loop_comes_by_again_and_again() -> None:
    pair = Pair()
    loop, _, _ = started(pair.d.runner, pair)
    looks: queue.Queue[float] = queue.Queue()
    for _ in range(3):
        loop.call(lambda core: looks.put(loop.last_turn))
        turn = looks.get(timeout=10)
        while loop.last_turn == turn:  # at most half a second, with nothing to do
            assert threading.Event().wait(0.01) is False
    assert loop.stop(10)
