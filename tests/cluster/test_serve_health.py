"""What Serve's health check of a worker's replica says."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from settings.file import SettingsError
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


def test_an_application_whose_groups_could_not_share_kv_is_refused() -> None:
    from deploy.app import build

    groups: dict[str, dict[str, object]] = {"a": {"engine": {"block_tokens": 64}}, "b": {}}
    with pytest.raises(SettingsError, match=r"block_tokens is \d+ for prefill and 64 for decode/a.*use one for both"):
        build({"decode": {"groups": groups}})
    groups["a"]["replicas"] = 0  # nobody to hand over to
    build({"decode": {"groups": groups}})


def test_with_a_budget_the_application_has_a_scaler_beside_its_routers() -> None:
    from deploy.app import build

    def built(**scaling: object) -> dict[str, dict[str, object]]:
        app = build({"scaling": scaling, "ray": {"router_resources": {"router": 1}}, "decode": {"replicas": 2}})
        found = {
            one._bound_deployment.name: one._bound_deployment for one in [app, *app._bound_deployment.init_args[1:]]
        }
        return {name: one.ray_actor_options["resources"] | {"": one.num_replicas} for name, one in found.items()}

    assert built() == {"Router": {"router": 1, "": 1}, "PrefillWorker": {"": 1}, "DecodeWorker": {"": 2}}
    scaled = built(budget_gpus=4)
    assert scaled["Scaler"] == {"router": 0.1, "": 1}
    assert scaled["Router"] == {"router": 0.9, "": 1}
    assert scaled["DecodeWorker"] == {"": 2}
