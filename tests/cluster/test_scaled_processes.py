"""The scaler and real processes under load, with a small stand-in for Ray Serve; test_scaled.py has the real one."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.clients import get_scaling, switch_role, tell_scaling
from deploy.fleet import Replica, Served
from deploy.pools import Home
from deploy.scaler import Scaler
from deploy.scaling_plan import RoleChange
from deploy.scaling_watch import Limits, Watcher
from scaling.config import ScalingConfig
from scaling.report import Report
from scaling.weighing import Terms
from scaling.wire import report_to_wire
from tests.support.processes import Cluster
from tests.support.scaled import ENGINE, ITL_TARGET_MS, PACE, SCALING, Asked, Look, questions, run


class Spawner:
    """Starts and ends workers as Serve does: the newest goes first, with a signal to leave."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._counts: dict[Home, int] = {}
        self._workers: dict[int, Home] = {}  # by number, which takes the process id's place in names
        self._made: dict[int, float] = {}
        self._stopping: set[int] = set()

    def _name(self, number: int) -> str:
        return f"{self._workers[number]}-{number}"

    def served(self) -> Served:
        running = self._cluster.processes.running
        for number in list(self._stopping):
            if running[self._name(number)].poll() is not None:
                del running[self._name(number)], self._workers[number]
                self._stopping.discard(number)
        replicas = [self._replica(number, home) for number, home in self._workers.items()]
        return Served(dict(self._counts), tuple(replicas), {"here": len(replicas)}, "here")

    def _replica(self, number: int, home: Home) -> Replica:
        state: Any = "stopping" if number in self._stopping else "running"
        return Replica(home, self._name(number), state, True, "here", "127.0.0.1", number, self._made[number])

    def clusters(self) -> list[Any]:
        return [self._cluster.cluster()]

    def set_count(self, home: Home, count: int) -> None:
        mine = [n for n, h in self._workers.items() if h == home and n not in self._stopping]
        for number in sorted(mine, reverse=True)[: max(0, len(mine) - count)]:
            self._cluster.processes.running[self._name(number)].send_signal(signal.SIGTERM)
            self._stopping.add(number)
        for _ in range(count - len(mine)):
            number = len(self._made) + 1
            self._workers[number], self._made[number] = home, time.monotonic()
            self._cluster.start_worker(home, self._name(number))
        self._counts[home] = count

    def switch(self, change: RoleChange) -> None:
        switch_role(self._cluster.channel, change.worker_id, change.role, force=change.force)

    def tell(self, report: Report) -> None:
        tell_scaling(self._cluster.channel, report_to_wire(report, time.monotonic()))


@contextlib.contextmanager
def scaled_cluster(directory: Path, model: Path, counts: Mapping[Home, int], **changes: Any) -> Iterator[Cluster]:
    """`changes`: of the scaling section."""
    cluster = Cluster(
        directory,
        model,
        prefill=0,
        decode=0,
        engine=ENGINE,
        transport={"ucx_net_devices": "lo", "digest": True},
        router={"itl_target_ms": ITL_TARGET_MS},
        pace=PACE,
        forked=True,
    )
    ended = threading.Event()
    try:
        cluster.start()
        config, terms = ScalingConfig.model_validate(SCALING | changes), Terms(ITL_TARGET_MS)
        spawner = Spawner(cluster)
        for home, count in counts.items():
            spawner.set_count(home, count)
        scaler = Scaler(spawner, config, terms, Watcher(Limits(32, 128)), time.monotonic, patience_s=20.0)

        def beat() -> None:
            while not ended.wait(max(0.05, scaler.step())):
                pass

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield cluster
        finally:
            ended.set()
            thread.join(30)
    finally:
        cluster.stop(60.0)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_pools_of_processes_follow_their_loads_and_no_answer_is_lost(tmp_path: Path, small_model: Path) -> None:
    asked = Asked(small_model)
    with scaled_cluster(tmp_path, small_model, {"prefill": 1, "decode": 1}) as cluster:
        found = run(cluster.target, asked, None)
    print(json.dumps(found))
    assert found["complete"] > 50
    assert found["migrated_when_the_decode_pool_shrank"]
    assert found["most_workers"] == 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("standbys", [0, pytest.param(1, marks=pytest.mark.long)])
def test_an_idle_cluster_goes_to_nothing_and_the_first_request_brings_it_back(
    tmp_path: Path, small_model: Path, standbys: int
) -> None:
    """Requests wait for it within their deadlines. To a load balancer it serves all the time."""
    counts = {"prefill": 1, "decode": 1, "standby": 0}
    asked = questions(small_model, 20, 4, range(3))
    with scaled_cluster(tmp_path, small_model, counts, standbys=standbys, idle_s=5.0) as cluster:
        look = Look(cluster.target)
        look.until(lambda _: look.went[-1][1:] == (1, 1, standbys), "one of each, and who stands by")
        look.until(lambda _: look.went[-1][1:] == (0, 0, standbys), "nobody at work")
        assert cluster.serving()
        with pytest.raises(grpc.RpcError) as refused:
            cluster.ask(asked[0][0], timeout_s=0.2)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        begun = time.monotonic()
        with ThreadPoolExecutor(3) as clients:
            replies = list(clients.map(lambda question: cluster.ask(question[0], timeout_s=120.0), asked))
        print(f"answered {time.monotonic() - begun:.1f} s after the cluster was asked")
        assert [reply.token_ids for reply in replies] == [expected for _, expected in asked]
        told = get_scaling(cluster.channel, 128, changes_only=True).decisions
        assert {"to_zero", "from_zero"} <= {d.rule for d in told}
        look.until(lambda _: look.went[-1][1:] == (0, 0, standbys), "nobody again")
