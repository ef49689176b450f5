"""The engine thread: the one place where a worker's core is touched after start-up.

    post(message) -> inbox -> core.handle ... core.tick -> [schedule, execute, commit] -> outbox -> deliver(outbox)

With `launcher` the next step is planned and launched while one computes (engine/core.py), then that one is waited for:

    step n    | launch |------------ device ------------|       | commit n |
    step n+1           | plan, launch |  wait for n ... | ------------ device ------------|
                                                                           | plan, launch n+2 | wait for n+1

A step that fails is repeated in parts (worker/repeat.py); one that was launched behind it counts as failed, too, and is
repeated when the tokens that it waited for are known.

`deliver` is called on the engine thread and must not block; it hands the whole outbox to asyncio in one call
(an event at a time costs about sixty times more). Everything that waits here waits with a bound.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from engine.overlap import Launched, Launcher
from engine.types import StepPlan, StepResult
from worker.core import WorkerCore
from worker.messages import Inbound, Outbox
from worker.repeat import is_fatal, repeat, with_known_tokens

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 0.5


class Runner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class _Flying:
    plan: StepPlan
    step: Launched | BaseException  # what its launch raised, or the step before it
    launched: float


class StepLoop:
    """`on_crash` hears of an exception in the core, or from a runner that computes nothing any more; the loop has ended
    by then and the worker must go.
    """

    def __init__(
        self,
        core: WorkerCore,
        runner: Runner,
        deliver: Callable[[Outbox], None],
        on_crash: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
        launcher: Launcher | None = None,
        improve: Callable[[], bool] | None = None,
        forget: Callable[[], None] | None = None,
    ) -> None:
        """`forget`: drops what the runner keeps from step to step, after one that failed; nothing is in flight then.

        `launcher`: steps overlap; without, `runner` computes one after the other.

        `improve`: called while nothing is owed to anybody, until it says that nothing is left to improve.
        """
        self._core = core
        self._runner = runner
        self._deliver = deliver
        self._on_crash = on_crash
        self._clock = clock
        self._launcher = launcher
        self._improve = improve
        self._forget = forget
        self._before: StepResult | None = None  # of the last step
        self._flying: deque[_Flying] = deque()
        self._ended = clock()  # the last step
        self._inbox: deque[Inbound | Callable[[WorkerCore], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        # For the watchdog, which reads them from another thread: when the loop came by, and since when it computes.
        self.last_turn = clock()
        self.step_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.last_turn = self._clock()
        self._thread.start()

    def post(self, message: Inbound) -> None:
        """From any thread."""
        self._inbox.append(message)
        self._wake.set()

    def call(self, function: Callable[[WorkerCore], None]) -> None:
        """Run a function on the core, on the engine thread. For looks from outside, and for tests."""
        self._inbox.append(function)
        self._wake.set()

    def stop(self, timeout_s: float) -> bool:
        """False: the thread is stuck and stays behind, as a daemon that does not hold up the end of the process."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self.step_since = None  # nobody waits for what may still be in flight
        except BaseException as error:
            log.exception("the engine thread failed")
            self._on_crash(error)

    def _turn(self) -> None:
        core, clock = self._core, self._clock
        self.last_turn = now = clock()
        while self._inbox:
            item = self._inbox.popleft()
            if callable(item):
                item(core)
            else:
                core.handle(item, now)
        core.tick(now)
        self._flush()  # answers to peers do not wait for the step
        if self._overlap(now) if self._launcher is not None else self._step(now):
            return
        if self._improve is not None and core.is_idle():
            self.step_since = clock()  # the watchdog takes it for a step: it computes
            more = self._improve()
            self.step_since = None
            if more:
                return
        self._wake.wait(min(max(core.next_deadline() - clock(), 0.0), _LONGEST_WAIT_S))
        self._wake.clear()

    def _step(self, now: float) -> bool:
        plan = self._core.schedule(now)
        if plan is None:
            return False
        self.step_since = started = self._clock()
        try:
            result = self._runner.execute(plan)
        except BaseException as error:
            result = self._repeat(plan, error)
        self._commit(plan, result, started)
        return True

    def _overlap(self, now: float) -> bool:
        """Launches the next step, then ends the one before it; one that could not be planned waits for that end."""
        assert self._launcher is not None
        failed = bool(self._flying) and isinstance(self._flying[0].step, BaseException)
        plan = None if failed else self._core.schedule(now)  # nothing can follow a step that is to be repeated
        if plan is not None:
            launched = self._clock()
            if self.step_since is None:
                self.step_since = launched
            try:
                step: Launched | BaseException = self._launcher.launch(plan)
            except BaseException as error:
                step = error
            self._flying.append(_Flying(plan, step, launched))
        if self._flying and (plan is None or len(self._flying) > 1):
            flying = self._flying.popleft()
            self._commit(flying.plan, self._landed(flying), max(flying.launched, self._ended))
            return True
        return plan is not None

    def _landed(self, flying: _Flying) -> StepResult:
        error = flying.step
        if not isinstance(error, BaseException):
            try:
                return error.wait()
            except BaseException as raised:
                error = raised
        for i, behind in enumerate(self._flying):  # its tokens, if any, rest on nothing
            if not isinstance(behind.step, BaseException):
                try:
                    behind.step.wait()
                except BaseException as raised:
                    if is_fatal(raised):
                        raise
                self._flying[i] = replace(behind, step=error)
        return self._repeat(flying.plan, error)

    def _repeat(self, plan: StepPlan, error: BaseException) -> StepResult:
        if is_fatal(error):
            raise error
        if self._forget is not None:
            self._forget()
        if any(item.follows is not None for item in plan.items):
            assert self._before is not None
            plan_now = with_known_tokens(plan, self._before)
        else:
            plan_now = plan
        return repeat(plan_now, error, self._again, self._core.engine.wanted(plan))

    def _again(self, part: StepPlan) -> StepResult:
        self.last_turn = self.step_since = self._clock()  # the watchdog's limit is for one step
        try:
            if self._launcher is not None:
                return self._launcher.launch(part).wait()
            return self._runner.execute(part)
        except BaseException:
            if self._forget is not None:
                self._forget()
            raise

    def _commit(self, plan: StepPlan, result: StepResult, started: float) -> None:
        self.last_turn = self._ended = ended = self._clock()
        self.step_since = ended if self._flying else None
        self._before = result
        self._core.commit(plan, result, started, ended)
        self._flush()

    def _flush(self) -> None:
        outbox = self._core.take_outbox()
        if outbox is not None:
            self._deliver(outbox)
