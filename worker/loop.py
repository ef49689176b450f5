"""The engine thread: the one place where a worker's core is touched after start-up.

    post(message) -> inbox -> core.handle ... core.tick -> [schedule, execute, commit] -> outbox -> deliver(outbox)

`deliver` is called on the engine thread and must not block; it hands the whole outbox to asyncio in one call
(an event at a time costs about sixty times more). Everything that waits here waits with a bound.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from engine.types import StepPlan, StepResult
from worker.core import WorkerCore
from worker.messages import Inbound, Outbox

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 0.5


class Runner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...


class StepLoop:
    """`on_crash` hears of an exception in the core or the runner; the loop has ended by then and the worker must go."""

    def __init__(
        self,
        core: WorkerCore,
        runner: Runner,
        deliver: Callable[[Outbox], None],
        on_crash: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._runner = runner
        self._deliver = deliver
        self._on_crash = on_crash
        self._clock = clock
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
        plan = core.schedule(now)
        if plan is not None:
            self.step_since = started = clock()
            result = self._runner.execute(plan)
            self.last_turn = ended = clock()
            self.step_since = None
            core.commit(plan, result, started, ended)
            self._flush()
            return
        self._wake.wait(min(max(core.next_deadline() - clock(), 0.0), _LONGEST_WAIT_S))
        self._wake.clear()

    def _flush(self) -> None:
        outbox = self._core.take_outbox()
        if outbox is not None:
            self._deliver(outbox)
