"""A paced worker (tests/support/paced_worker.py) with one addition: requests with certain seeds are poison to it.

`python -m tests.support.poisonable_worker --config FILE`
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from engine.overlap import launcher_of
from engine.types import StepPlan, StepResult
from tests.support.paced_worker import PacedWorker, role_of, started
from worker.main import run
from worker.server import RunningWorker
from worker.settings import WorkerSettings

RAISES, NO_NUMBERS, KILLS = 0xBAD0001, 0xBAD0002, 0xBAD0003


class PoisonableRunner:
    """Passes everything on to the real one."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).wait()

    def launch(self, plan: StepPlan) -> Any:
        seeds = {item.sampling.seed for item in plan.items}
        if KILLS in seeds:
            os.kill(os.getpid(), signal.SIGKILL)
        if RAISES in seeds:
            raise ValueError("this row cannot be computed")
        step = self._runner.launch(plan)
        if NO_NUMBERS in seeds and step._logits is not None:
            with torch.inference_mode():
                for row, item in enumerate(step._items):
                    if item.sampling.seed == NO_NUMBERS:
                        step._logits[row] = float("nan")
        return step


class PoisonableWorker(PacedWorker):
    def _load(self) -> None:
        super()._load()
        self._runner: Any = PoisonableRunner(self._runner)
        self._launcher = launcher_of(self.settings.engine.async_scheduling, self._runner)


async def serve(
    role: str, settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None
) -> RunningWorker:
    return await started(PoisonableWorker(role, settings), router_addresses)


if __name__ == "__main__":
    run(role_of(sys.argv), serve)
