"""Whether steps overlap: the next one planned and launched while one computes (engine/core.py has the rules).

On CUDA a launch returns before the device is done, and the runner itself is the launcher. On CPU a step computes in the
thread that asks for it: `InThread` gives the steps a thread of their own. docs/decisions/0017-overlapping-steps.md.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from engine.types import StepPlan, StepResult

if TYPE_CHECKING:
    import torch

OVERLAPS_BY_DEFAULT = {"cuda"}


class Launched(Protocol):
    def wait(self) -> StepResult:
        """When the device is done with the step. What its execution raised is raised here."""
        ...


class Launcher(Protocol):
    def launch(self, plan: StepPlan) -> Launched:
        """Begins a step; it runs after the one launched before. At most two are under way."""
        ...


class Runner(Launcher, Protocol):
    @property
    def device(self) -> torch.device: ...


def launcher_of(wanted: Literal["auto", "on", "off"], runner: Runner) -> Launcher | None:
    """None: one step after the other."""
    kind = runner.device.type
    if wanted == "off" or (wanted == "auto" and kind not in OVERLAPS_BY_DEFAULT):
        return None
    return runner if kind == "cuda" else InThread(runner)


class _Awaited:
    def __init__(self, work: Callable[[], StepResult]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: StepResult | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self) -> StepResult:
        """The worker's watchdog is who bounds this: a step that hangs shows there."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


class InThread:
    """Steps in the order of their launches, in one daemon thread that ends with its owner."""

    def __init__(self, runner: Launcher) -> None:
        self._runner = runner
        self._steps: queue.SimpleQueue[_Awaited | None] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(self._steps,), name="steps", daemon=True).start()

    def launch(self, plan: StepPlan) -> _Awaited:
        runner = self._runner
        step = _Awaited(lambda: runner.launch(plan).wait())
        self._steps.put(step)
        return step

    def __del__(self) -> None:
        self._steps.put(None)


def _run(steps: queue.SimpleQueue[_Awaited | None]) -> None:
    while (step := steps.get()) is not None:
        step.run()
