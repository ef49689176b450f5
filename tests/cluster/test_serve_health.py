"""What Serve's health check of a worker's replica says."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from worker.server import WorkerStalled

pytestmark = pytest.mark.filterwarnings("default")  # Ray Serve's own, when it is imported


def check(error: BaseException | None = None, alive: bool = True, left: bool = False) -> None:
    from deploy.app import DecodeWorker

    failed: Future[BaseException] = Future()
    if error is not None:
        failed.set_result(error)
    server = SimpleNamespace(worker_id="d", failed=failed, step_loop=SimpleNamespace(alive=alive))
    replica = SimpleNamespace(_server=None if left else server)
    DecodeWorker.func_or_class.check_health(replica)  # type: ignore[union-attr]


def test_a_worker_in_order_is_healthy_and_one_that_left_is_nobodys_concern() -> None:
    check()
    check(left=True)


def test_a_stuck_or_broken_worker_raises_with_the_cause() -> None:
    with pytest.raises(RuntimeError, match="d broke: the engine is inside one step"):
        check(WorkerStalled("the engine is inside one step for 21 s"))
    with pytest.raises(RuntimeError, match="has ended"):
        check(alive=False)
