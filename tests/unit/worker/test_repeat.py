"""A row that cannot be computed ends by itself: the others get the tokens that they would have got."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine.overlap import InThread, Launched
from engine.types import SamplingParams, StepPlan, StepResult
from tests.support.pair import LINK, Pair
from tests.support.scripted import expected_answer
from worker.loop import StepLoop
from worker.messages import Code, LinkOutput, RouterCommands, StartSequence

POISON = 666
SAMPLING = SamplingParams(max_tokens=6)
Fails = Callable[[StepPlan], bool]


class Panic(BaseException):
    """As libraries in Rust raise them."""


def poisoned(plan: StepPlan) -> bool:
    return any(item.history[0] == POISON for item in plan.items)


def from_its_third_token(plan: StepPlan) -> bool:
    return any(item.history[0] == POISON and item.position >= 2 for item in plan.items)


class Step:
    def __init__(self, step: Any, error: BaseException | None) -> None:
        self._step, self._error = step, error

    def wait(self) -> StepResult:
        if self._error is not None:
            raise self._error
        return self._step.wait()


class PoisonedRunner:
    """Raises for steps that `fails` says, at the launch or when they are waited for."""

    def __init__(self, runner: Any, fails: Fails, error: BaseException, *, late: bool = False) -> None:
        self._runner, self._fails, self._error, self._late = runner, fails, error, late
        self.failed: list[int] = []  # rows
        self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).wait()

    def launch(self, plan: StepPlan) -> Launched:
        error = self._error if self._fails(plan) else None
        if error is not None:
            self.failed.append(len(plan.items))
            if not self._late:
                raise error
        return Step(self._runner.launch(plan), error)


class Worker:
    """A decode worker's core under a step loop."""

    def __init__(self, fails: Fails, *, error: BaseException | None = None, how: str = "in order") -> None:
        self.pair = Pair()
        runner = PoisonedRunner(
            self.pair.d.runner, fails, error or ValueError("poisoned logits"), late=how.endswith("late")
        )
        self.runner, self.heard, self.crashes = runner, LinkOutput(), queue.Queue[BaseException]()
        self._changed = threading.Condition()
        launcher: Any = {"in order": None, "in a thread": InThread(runner)}.get(how, runner)
        self.loop = StepLoop(
            self.pair.d.core, runner, self._deliver, self.crashes.put, launcher=launcher, forget=runner.forget
        )
        self.loop.start()

    def _deliver(self, outbox: Any) -> None:
        with self._changed:
            if LINK in outbox.links:
                self.heard.merge(outbox.links[LINK])
            self._changed.notify_all()

    def ask(self, prompts: dict[int, list[int]], sampling: SamplingParams = SAMPLING) -> None:
        starts = tuple(StartSequence(n, f"r{n}", prompt, [], sampling) for n, prompt in prompts.items())
        self.loop.post(RouterCommands(LINK, starts))
        with self._changed:
            ended = self._changed.wait_for(lambda: {e.sequence_id for e in self.heard.ends} >= prompts.keys(), 20)
        assert ended, (self.heard.ends, self.crashes.queue)

    def tokens(self, number: int) -> list[int]:
        rows = zip(self.heard.sequence_ids, self.heard.positions, self.heard.token_ids, strict=True)
        mine = [(p, t) for s, p, t in rows if s == number]
        assert [p for p, _ in mine] == list(range(len(mine)))
        return [t for _, t in mine]

    def end(self, number: int) -> Any:
        return next(e for e in self.heard.ends if e.sequence_id == number)

    def close(self) -> None:
        seen = threading.Event()

        def look(core: Any) -> None:
            core.check()
            assert core.is_idle()
            assert self.pair.d.pool.is_idle()
            seen.set()

        self.loop.call(look)
        assert seen.wait(10), self.crashes.queue
        assert self.loop.stop(10)
        assert self.crashes.empty()


HOW = ["in order", "in a thread", "on a device", "on a device, late"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fails", [poisoned, from_its_third_token])
@pytest.mark.parametrize("error", [ValueError("poisoned logits"), Panic("rust"), AssertionError()])
def test_one_row_ends_and_the_others_do_not_notice(how: str, fails: Fails, error: BaseException) -> None:
    worker = Worker(fails, error=error, how=how)
    prompts = {n: [n, n + 1, n + 2] for n in range(1, 8)} | {4: [POISON, 1, 2]}
    worker.ask(prompts)
    for number, prompt in prompts.items():
        if number != 4:
            assert worker.tokens(number) == expected_answer(prompt, SAMPLING)
            assert worker.end(number).code == 0
    end = worker.end(4)
    assert end.code == Code.INTERNAL
    assert type(error).__name__ in end.error
    assert str(error) in end.error
    assert f"position {len(worker.tokens(4))}" in end.error
    assert worker.tokens(4) == expected_answer(prompts[4], SAMPLING)[: len(worker.tokens(4))]
    assert worker.runner.forgotten
    worker.close()


@pytest.mark.parametrize("how", HOW)
def test_the_work_is_bounded_and_goes_on_when_nobody_else_is_there(how: str) -> None:
    worker = Worker(poisoned, how=how)
    worker.ask({1: [POISON, 2, 3]})
    assert set(worker.runner.failed) == {1}
    assert len(worker.runner.failed) <= 3
    worker.runner.failed.clear()
    worker.ask({n: [POISON, n] if n == 5 else [n, 1, 2] for n in range(2, 10)}, SamplingParams(max_tokens=3))
    steps = 1 if how == "in order" else 2  # and the one that was launched behind it
    assert len(worker.runner.failed) <= steps * (2 + math.log2(8))
    worker.close()


@pytest.mark.parametrize("how", HOW)
def test_a_batch_of_nothing_but_poison_ends_row_by_row(how: str) -> None:
    worker = Worker(poisoned, how=how)
    worker.ask({n: [POISON, n] for n in range(1, 9)})
    assert [worker.end(n).code for n in range(1, 9)] == [Code.INTERNAL] * 8
    worker.close()


@pytest.mark.parametrize("how", HOW)
def test_a_failure_that_does_not_come_again_costs_nobody_anything(how: str) -> None:
    times = iter([True])
    worker = Worker(lambda plan: len(plan.items) > 1 and next(times, False), how=how)
    prompts = {n: [n, n + 1] for n in range(1, 6)}
    worker.ask(prompts)
    for number, prompt in prompts.items():
        assert worker.tokens(number) == expected_answer(prompt, SAMPLING)
    worker.close()


@pytest.mark.parametrize("how", HOW)
def test_what_fails_for_everybody_ends_the_worker(how: str) -> None:
    """The probe, a token of no sequence's, fails too: the device is lost, and no row is to blame."""
    error = RuntimeError("the device is gone")
    worker = Worker(lambda plan: True, error=error, how=how)
    worker.loop.post(RouterCommands(LINK, (StartSequence(1, "r", [1, 2], [], SAMPLING),)))
    assert worker.crashes.get(timeout=10) is error
    assert not worker.heard.ends, "its routers hear of the worker's end, not of theirs"


def test_what_no_arithmetic_survives_is_refused_by_the_worker_too() -> None:
    worker = Worker(lambda plan: False)
    bad = [
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"min_p": 1.5},
        {"presence_penalty": 1e30},
        {"frequency_penalty": -math.inf},
        {"top_k": -1},
        {"logprobs": 10**6},
        {"logit_bias": ((5, math.nan),)},
        {"logit_bias": ((10**6, 1.0),)},
    ]
    for number, values in enumerate(bad, start=1):
        worker.ask({number: [1, 2]}, SamplingParams(**values))  # type: ignore[arg-type]
        end = worker.end(number)
        assert end.code == Code.INVALID_ARGUMENT, values
        assert next(iter(values)).split("_")[0] in end.error
    worker.close()


def test_a_command_that_fails_ends_its_sequence_only() -> None:
    class Surprising(list[int]):
        def __iter__(self) -> Any:
            raise Panic("not \ud800 for the wire")

    worker = Worker(lambda plan: False)
    worker.loop.post(RouterCommands(LINK, (StartSequence(1, "r", [1], Surprising([1]), SAMPLING),)))
    worker.ask({2: [1, 2]})
    assert worker.tokens(2) == expected_answer([1, 2], SAMPLING)
    assert worker.end(1).code == Code.INTERNAL
    worker.end(1).error.encode()
    worker.close()
