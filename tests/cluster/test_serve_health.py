"""What Serve's health check of a replica says."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from worker.server import WorkerStalled

pytestmark = pytest.mark.filterwarnings("default")  # Ray Serve's own, when it is imported


def replica(error: BaseException | None = None, alive: bool = True) -> Any:
    from deploy.app import DecodeWorker

    failed: Future[BaseException] = Future()
    if error is not None:
        failed.set_result(error)
    made = object.__new__(DecodeWorker.func_or_class)  # type: ignore[call-overload]
    made._server = SimpleNamespace(worker_id="d", failed=failed, step_loop=SimpleNamespace(alive=alive))
    return made


def test_a_worker_in_order_is_healthy_and_one_that_left_is_nobodys_concern() -> None:
    replica().check_health()
    gone = replica()
    gone._server = None
    gone.check_health()


def test_a_stuck_or_broken_worker_raises_with_the_cause() -> None:
    with pytest.raises(RuntimeError, match="d broke: the engine is inside one step"):
        replica(WorkerStalled("the engine is inside one step for 21 s")).check_health()
    with pytest.raises(RuntimeError, match="has ended"):
        replica(alive=False).check_health()
