"""The loop that resizes a live cluster, over a platform that does what it is told; and what Serve says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from diptych.v1 import cluster_pb2

from deploy.config import ClusterConfig
from deploy.fleet import Replica, Served
from deploy.pools import Home
from deploy.scaler import Scaler
from deploy.scaling_plan import RoleChange
from deploy.scaling_watch import Limits, Watcher
from deploy.serve_platform import COUNTS, counts_to_deploy, read_details
from scaling.config import ScalingConfig
from scaling.decision import Decision
from scaling.report import Report
from scaling.weighing import Terms
from settings.file import validate_settings
from tests.unit.deploy.test_fleet import ROLES

CONFIG = ScalingConfig(budget_gpus=4, interval_s=5.0, start_s=10.0, warm_up_s=0.0, hold_s=10.0)


@dataclass
class FakeCluster:
    """Workers are ready one look after they were asked for. Loads are the test's."""

    now: float = 0.0
    targets: dict[Home, int] = field(default_factory=lambda: {"prefill": 1, "decode": 1})
    roles: dict[int, tuple[Home, str]] = field(default_factory=dict)  # by process id
    reports: dict[int, Report] = field(default_factory=dict)  # by number: the last word holds
    switched: list[RoleChange] = field(default_factory=list)
    requests: int = 0
    sequences: int = 0  # of each decode worker
    busy_s: float = 0.0  # with prompts, of each prefill worker
    failure: Exception | None = None
    deaf: bool = False
    made: int = 100
    wish: cluster_pb2.ScaleWish | None = None

    def served(self) -> Served:
        if self.failure is not None:
            raise self.failure
        for home, target in self.targets.items():
            mine = [pid for pid, (h, _) in self.roles.items() if h == home]
            for pid in sorted(mine, reverse=True)[: max(0, len(mine) - target)]:
                del self.roles[pid]
            for _ in range(target - len(mine)):
                self.made += 1
                self.roles[self.made] = home, home
        replicas = [Replica(h, str(pid), "running", True, "n", "h", pid, pid) for pid, (h, _) in self.roles.items()]
        return Served(dict(self.targets), tuple(replicas), {"n": len(replicas)}, "n")

    def clusters(self) -> list[Any]:
        router = cluster_pb2.RouterState(router_id="r", requests_total=self.requests, live_requests=self.sequences)
        recent = [cluster_pb2.RecentRequest(prompt_tokens=1000, completion_tokens=200, outcome="stop")]
        return [
            cluster_pb2.Cluster(router=router, workers=map(self._worker, self.roles), recent=recent, wish=self.wish)
        ]

    def _worker(self, pid: int) -> cluster_pb2.Worker:
        home, role = self.roles[pid]
        n = self.sequences if role == "decode" else 0
        load = cluster_pb2.WorkerLoad(
            total_blocks=2000,
            free_blocks=2000,
            prefill_tokens_per_s=10_000.0,
            step_constant_ms=5.0,
            step_per_token_ms=0.05,
            step_per_context_token_ms=1e-4,
            running_sequences=n,
            context_tokens=n * 1100,
            input_busy_s=self.busy_s if role == "prefill" else 0.0,
        )
        ready = cluster_pb2.WORKER_STATE_READY
        role_number: Any = ROLES[role]
        return cluster_pb2.Worker(
            worker_id=f"{home}-h-{pid}", epoch=1, role=role_number, state=ready, address="h:1", load=load
        )

    def set_count(self, home: Home, count: int) -> None:
        self.targets[home] = count

    def switch(self, change: RoleChange) -> None:
        pid = int(change.worker_id.rpartition("-")[2])
        assert self.roles[pid][1] == change.before
        self.roles[pid] = self.roles[pid][0], change.role
        self.switched.append(change)

    def tell(self, report: Report) -> None:
        if self.deaf:
            raise ConnectionError("no router hears")
        self.reports[report.number] = report

    # The test's.

    def run(self, scaler: Scaler, seconds: float, rate: float = 0.0, busy: float = 0.0) -> None:
        end = self.now + seconds
        while self.now < end:
            waited = max(0.05, scaler.step())
            self.now += waited
            self.requests += round(rate * waited)
            self.busy_s += busy * waited

    def count(self, role: str) -> int:
        return sum(r == role for _, r in self.roles.values())

    @property
    def decisions(self) -> list[Decision]:
        return [report.decision for report in self.reports.values()]

    @property
    def last(self) -> Decision:
        return self.decisions[-1]


def scaler_for(cluster: FakeCluster, config: ScalingConfig = CONFIG) -> Scaler:
    return Scaler(cluster, config, Terms(50.0), Watcher(Limits(32)), lambda: cluster.now)


def test_answers_make_the_decode_pool_grow_prompts_the_other_and_silence_both_shrink() -> None:
    cluster = FakeCluster()
    scaler = scaler_for(cluster)
    cluster.sequences = 55
    cluster.run(scaler, 60, rate=1)
    assert (cluster.count("prefill"), cluster.count("decode")) == (1, 3)
    cluster.sequences = 2
    cluster.run(scaler, 200, rate=1)
    assert (cluster.count("prefill"), cluster.count("decode")) == (1, 1)
    cluster.run(scaler, 120, rate=20, busy=2.0)
    assert cluster.count("prefill") > 1
    cluster.run(scaler, 200, rate=1)
    assert (cluster.count("prefill"), cluster.count("decode"), len(cluster.roles)) == (1, 1, 2)
    rules = {d.rule for d in cluster.decisions}
    assert {"start", "stop"} <= rules


def test_dry_run_says_and_does_nothing() -> None:
    cluster = FakeCluster(sequences=55)
    cluster.run(scaler_for(cluster, CONFIG.model_copy(update={"dry_run": True})), 60, rate=1)
    assert all(d.dry_run for d in cluster.decisions)
    assert max(d.decode for d in cluster.decisions) > 1
    assert cluster.targets == {"prefill": 1, "decode": 1}
    assert not cluster.switched


def test_what_is_set_by_hand_is_kept_for_a_while() -> None:
    cluster = FakeCluster(sequences=5)
    scaler = scaler_for(cluster)
    cluster.run(scaler, 20, rate=1)
    cluster.targets["decode"] = 3  # another configuration
    cluster.run(scaler, 300, rate=1)
    assert cluster.count("decode") == 3
    assert "set by hand: decode 3" in cluster.last.why
    cluster.run(scaler, 400, rate=1)
    assert cluster.count("decode") == 1


def test_what_diptych_scale_asks_for_is_kept_for_a_while_and_within_the_budget() -> None:
    cluster = FakeCluster(sequences=5)
    scaler = scaler_for(cluster)
    cluster.run(scaler, 20, rate=1)
    cluster.wish = cluster_pb2.ScaleWish(number=1, decode=3)
    cluster.run(scaler, 20, rate=1)
    assert (cluster.count("prefill"), cluster.count("decode")) == (1, 3)
    assert "set by hand: decode 3" in cluster.last.why
    cluster.run(scaler, 700, rate=1)
    assert (cluster.count("prefill"), cluster.count("decode")) == (1, 1), "once: the wish is old though it still stands"
    cluster.wish = cluster_pb2.ScaleWish(number=2, prefill=6, decode=6)
    most = 0
    for _ in range(30):
        cluster.run(scaler, 1, rate=1)
        most = max(most, len(cluster.roles))
    assert most == CONFIG.budget_gpus
    assert any(d.rule == "limits" and "outside what is allowed" in d.why for d in cluster.decisions)


def test_an_error_leaves_the_counts_and_is_told() -> None:
    cluster = FakeCluster()
    scaler = scaler_for(cluster)
    cluster.run(scaler, 12)
    before = dict(cluster.targets)
    cluster.failure = TimeoutError("Serve's controller is away")
    cluster.run(scaler, 30)
    errors = [r for r in cluster.reports.values() if r.error]
    assert {r.error for r in errors} == {"TimeoutError: Serve's controller is away"}
    assert {(r.decision.rule, r.decision.pair) for r in errors} == {("error", (1, 1))}
    assert 5 <= len(errors) <= 8, "one each interval, though it is tried every second"
    assert cluster.targets == before
    cluster.failure, cluster.deaf = None, True
    cluster.run(scaler, 30)
    cluster.deaf = False
    cluster.run(scaler, 10)
    assert cluster.last.rule != "error"


def test_what_the_platform_refuses_is_told_of_the_decision_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(sequences=55)

    def refuse(home: Home, count: int) -> None:
        raise RuntimeError("set external_scaler_enabled")

    scaler = scaler_for(cluster)
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "set_count", refuse)
        cluster.run(scaler, 40, rate=1)
    refused = [r for r in cluster.reports.values() if r.error]
    assert refused[0].decision.rule == "start"
    assert refused[0].error == "RuntimeError: set external_scaler_enabled"
    cluster.run(scaler, 20, rate=1)
    assert cluster.count("decode") > 1
    assert not cluster.reports[max(cluster.reports)].error


def test_without_a_router_nothing_is_known_and_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(sequences=55)
    scaler = scaler_for(cluster)
    with monkeypatch.context() as starting:
        starting.setattr(cluster, "clusters", list)
        cluster.run(scaler, 30)
        assert not cluster.reports, "a cluster that starts has failed at nothing"
    scaler.step()
    monkeypatch.setattr(cluster, "clusters", list)
    cluster.run(scaler, 60)
    assert cluster.targets == {"prefill": 1, "decode": 1}
    assert {r.error for r in cluster.reports.values()} == {"LookupError: no router answers"}


# Serve's own words.


def details(**replica: Any) -> dict[str, Any]:
    running = {"state": "RUNNING", "node_id": "n"}
    a = {**running, "replica_id": "a", "pid": 7, "node_ip": "1.2.3.4", "start_time_s": 9.0}
    b = {"replica_id": "b", "state": "STARTING", **replica}
    deployments = {
        "DecodeWorker": {"target_num_replicas": 2, "replicas": [a, b]},
        "DecodeWorker-h100": {"target_num_replicas": 3, "replicas": []},
        "Router": {"target_num_replicas": 1, "replicas": [{"replica_id": "c", **running}]},
    }
    return {"applications": {"diptych": {"deployments": deployments}}}


def test_of_serves_description_only_the_workers_are_read_and_all_count_on_a_node() -> None:
    served = read_details(details(), "diptych", "head")
    assert served.targets == {"decode": 2, "decode/h100": 3}
    assert served.replicas == (
        Replica("decode", "a", "running", True, "n", "1.2.3.4", 7, 9.0),
        Replica("decode", "b", "starting", False),
    )
    assert served.on_node == {"n": 2}
    with pytest.raises(LookupError, match="no application"):
        read_details({}, "diptych", "head")


# The next deployment.


def test_a_deployment_begins_with_what_the_policy_had_set_unless_the_counts_are_new() -> None:
    config = validate_settings({"scaling": {"budget_gpus": 8}, "decode": {"replicas": 2}}, ClusterConfig, "c")
    configured = {"prefill": 1, "decode": 2, "standby": 0}
    known = json.dumps({"configured": configured, "counts": {"prefill": 3, "decode": 4}})
    assert counts_to_deploy(config, lambda _: "") == configured
    assert counts_to_deploy(config, {COUNTS: known}.__getitem__) == {"prefill": 3, "decode": 4, "standby": 0}
    other = json.dumps({"configured": {**configured, "decode": 1}, "counts": {"prefill": 3, "decode": 4}})
    assert counts_to_deploy(config, lambda _: other) == configured
    zero = json.dumps({"configured": configured, "counts": {"prefill": 0, "decode": 0}})
    assert counts_to_deploy(config, lambda _: zero) == {"prefill": 1, "decode": 1, "standby": 0}
    fixed = config.model_copy(update={"scaling": ScalingConfig()})
    assert counts_to_deploy(fixed, lambda _: known) == configured
