"""A paced decode worker (tests/support/paced_worker.py) with one addition: SIGUSR2 makes one part of it hang for good.

`STALL_AT=engine|turn|transport|loop python -m tests.support.stalling_worker --config FILE`
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from elastic_worker.server import build_core, metric_readers
from engine.types import StepPlan, StepResult
from tests.support.paced_worker import PacedWorker
from worker.core import WorkerCore
from worker.main import run
from worker.server import RunningWorker
from worker.settings import WorkerSettings

_FOREVER_S = 600.0


class HangingRunner:
    """Passes everything on to the real one; `hang` makes the next step the last."""

    def __init__(self, runner: Any, release: threading.Event) -> None:
        self._runner = runner
        self._release = release
        self.hang = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, plan: StepPlan) -> StepResult:
        if self.hang.is_set():
            self._release.wait(_FOREVER_S)
        return self._runner.execute(plan)


class StallingWorker(PacedWorker):
    def _load(self) -> None:
        super()._load()
        self.release = threading.Event()
        self._runner: Any = HangingRunner(self._runner, self.release)

    def _hang(self) -> None:
        self.release.wait(_FOREVER_S)

    def stall(self, part: str) -> None:
        match part:
            case "engine":
                self._runner.hang.set()
            case "turn":
                self.step_loop.call(lambda core: self._hang())
            case "transport":
                self._transport._ranks[0]._commands.put(self._hang)
            case "loop":
                time.sleep(_FOREVER_S)


async def serve(
    role: str, settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None
) -> RunningWorker:
    worker = StallingWorker("decode", settings)
    build: Callable[[Any], WorkerCore] = build_core
    await worker.start(build, metric_readers, router_addresses)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, worker.stall, os.environ["STALL_AT"])
    return worker


if __name__ == "__main__":
    run("decode", serve)
