"""A real worker process on a model that computes in no time, whose steps take the time of a larger one's.

`PACE="10 0.5" python -m tests.support.paced_worker --config FILE`: 10 ms a step and half a millisecond a token. Whoever
waits for a step, or comes while one is under way, meets it as on a machine that computes for so long; the processor is
left to others meanwhile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from elastic_worker.server import build_core, metric_readers
from engine.overlap import launcher_of
from engine.types import StepPlan, StepResult
from worker.main import run
from worker.server import RunningWorker
from worker.settings import WorkerSettings


class PacedRunner:
    """Passes everything on to the real one."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        base_ms, per_token_ms = map(float, os.environ.get("PACE", "0 0").split())
        self._base_s, self._per_token_s = base_ms / 1e3, per_token_ms / 1e3

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).wait()

    def launch(self, plan: StepPlan) -> Any:
        begun = time.monotonic()
        step = self._runner.launch(plan)
        spent_s = time.monotonic() - begun
        time.sleep(max(0.0, self._base_s + self._per_token_s * plan.num_tokens - spent_s))
        return step


class PacedWorker(RunningWorker):
    def _load(self) -> None:
        super()._load()
        self._runner: Any = PacedRunner(self._runner)
        self._launcher = launcher_of(self.settings.engine.async_scheduling, self._runner)


async def serve(
    role: str, settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None
) -> RunningWorker:
    return await started(PacedWorker(role, settings), router_addresses)


async def started(worker: RunningWorker, router_addresses: Callable[[], Iterable[str]] | None) -> RunningWorker:
    await worker.start(build_core, metric_readers, router_addresses)
    return worker


def role_of(command: Sequence[str]) -> str:
    """The first part of the settings file's name, which is that of the worker."""
    return Path(command[-1]).stem.split("-")[0]


if __name__ == "__main__":
    run(role_of(sys.argv), serve)
