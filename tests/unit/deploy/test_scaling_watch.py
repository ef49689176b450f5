"""What a running cluster says of itself, as the scaling policy sees it."""

from __future__ import annotations

from typing import Any

import pytest
from diptych.v1 import cluster_pb2

from deploy.config import ClusterConfig
from deploy.scaling_view import line, render_one, to_dict
from deploy.scaling_watch import Limits, Watcher, watcher_of
from scaling.config import ScalingConfig
from scaling.observation import Pool, Stage
from scaling.policy import decide
from scaling.report import Report
from scaling.state import ScalingState
from scaling.weighing import Terms
from scaling.wire import report_to_wire
from settings.file import SettingsError, validate_settings

ROLES = {"p": cluster_pb2.ROLE_PREFILL, "d": cluster_pb2.ROLE_DECODE, "s": cluster_pb2.ROLE_STANDBY}


def worker(name: str, *, state: int = cluster_pb2.WORKER_STATE_READY, **load: float) -> cluster_pb2.Worker:
    given: dict[str, Any] = {
        "total_blocks": 10_000,
        "free_blocks": 10_000,
        "prefill_tokens_per_s": 10_000.0,
        "step_constant_ms": 5.0,
        "step_per_token_ms": 0.05,
        "step_per_context_token_ms": 1e-4,
        **load,
    }
    return cluster_pb2.Worker(
        worker_id=name, epoch=1, role=ROLES[name[0]], state=state, load=cluster_pb2.WorkerLoad(**given)
    )


def cluster(*workers: cluster_pb2.Worker, requests: int = 0, live: int = 0, name: str = "") -> cluster_pb2.Cluster:
    recent = [
        cluster_pb2.RecentRequest(prompt_tokens=1000, completion_tokens=200, outcome="stop"),
        cluster_pb2.RecentRequest(prompt_tokens=3000, completion_tokens=5, outcome="running"),
    ]
    router = cluster_pb2.RouterState(router_id=name, requests_total=requests, live_requests=live)
    return cluster_pb2.Cluster(router=router, workers=workers, recent=recent)


def test_counters_of_two_looks_are_what_came_and_what_ended() -> None:
    watcher = Watcher(Limits(32))
    assert watcher.look([cluster(worker("p0"), worker("d0"), requests=100, live=4)], 10.0) is None
    seen = watcher.look(
        [
            cluster(
                worker("p0", input_busy_s=2.0, prefill_backlog_tokens=6000, waiting_sequences=2),
                worker("d0", context_tokens=5000, running_sequences=5, waiting_blocks=10),
                requests=120,
                live=10,
            )
        ],
        15.0,
    )
    assert seen is not None
    assert (seen.covers_s, seen.arrived_requests, seen.ended_requests, seen.live_requests) == (5.0, 20, 14, 10)
    assert seen.arrived_uncached_tokens == 2.0 * 10_000 + 6000
    assert seen.arrived_prompt_tokens == 20 * 2000
    assert seen.ended_answer_tokens == 14 * 200
    prefill, decode = seen.workers
    assert (prefill.pool, prefill.backlog_tokens, prefill.longest_prompt_tokens) == (Pool.PREFILL, 6000, 3000)
    assert (decode.kv_tokens, decode.waiting_kv_tokens, decode.kv_capacity_tokens) == (5000, 320, 320_000)


def test_several_routers_are_one_cluster() -> None:
    """Each knows all workers, and its own requests."""
    watcher = Watcher(Limits(32))
    watcher.look([cluster(worker("p0"), requests=10), cluster(worker("p0"), requests=20)], 0.0)
    seen = watcher.look([cluster(worker("p0"), requests=14), cluster(worker("p0"), requests=26)], 5.0)
    assert seen is not None
    assert (len(seen.workers), seen.arrived_requests) == (1, 10)


def test_a_router_that_did_not_answer_or_starts_again_is_no_flood() -> None:
    watcher = Watcher(Limits(32))
    a, b = {"name": "a"}, {"name": "b"}
    watcher.look([cluster(requests=10, **a), cluster(requests=1000, **b)], 0.0)
    seen = [
        watcher.look([cluster(requests=14, **a)], 5.0),
        watcher.look([cluster(requests=14, **a), cluster(requests=1003, **b)], 10.0),
        watcher.look([cluster(requests=14, **a), cluster(requests=0, **b), cluster(requests=500, name="c")], 15.0),
    ]
    assert [one.arrived_requests for one in seen if one is not None] == [4, 3, 0]


def test_each_worker_has_the_limits_of_what_it_was_started_as() -> None:
    """Whatever its role is by now."""
    engines = {name: {"engine": {"max_running_sequences": n}} for name, n in (("big", 64), ("small", 16))}
    config = validate_settings(
        {
            "engine": {"block_tokens": 16},
            "prefill": {"engine": {"max_running_sequences": 8}},
            "decode": {"groups": engines},
            "scaling": {"budget_gpus": 8, "dry_run": True, "decode": {"group": "big"}},
        },
        ClusterConfig,
        "test",
    )
    watcher = watcher_of(config)
    seen = None
    for now in (0.0, 5.0):
        workers = [worker(name) for name in ("decode-big-1", "decode-small-1", "prefill-1", "prefill-2", "d", "d0")]
        for one, group in zip(workers, ("big", "small", "", "", "small", ""), strict=True):
            one.group = group
        workers[3].role = cluster_pb2.ROLE_DECODE
        seen = watcher.look([cluster(*workers)], now)
    assert seen is not None
    assert [w.max_sequences for w in seen.workers] == [64, 16, 8, 8, 16, 64]
    assert {w.kv_capacity_tokens for w in seen.workers} == {160_000}


def test_ages_begin_with_the_stage_and_who_was_there_before_is_old() -> None:
    watcher = Watcher(Limits(32))
    watcher.look([cluster(worker("p0"))], 0.0)
    connecting = worker("d1", state=cluster_pb2.WORKER_STATE_CONNECTING)
    lost = worker("d2", state=cluster_pb2.WORKER_STATE_LOST)
    seen = watcher.look([cluster(worker("p0"), connecting, lost, worker("s0"))], 5.0)
    assert seen is not None
    by_id = {w.worker_id: w for w in seen.workers}
    assert by_id["p0"].age_s > 1e5
    assert (by_id["d1"].stage, by_id["d1"].age_s) == (Stage.STARTING, 0.0)
    assert (by_id["s0"].stage, by_id["s0"].pool) == (Stage.STANDBY, None)
    assert "d2" not in by_id
    later = watcher.look([cluster(worker("p0"), worker("d1"))], 9.0)
    assert later is not None
    assert [(w.stage, w.age_s) for w in later.workers if w.worker_id == "d1"] == [(Stage.READY, 0.0)]


def test_a_decision_is_told_with_its_numbers_and_what_was_weighed() -> None:
    watcher = Watcher(Limits(32))
    state, config = ScalingState(), ScalingConfig(budget_gpus=6, dry_run=True)
    requests, busy = 0, 0.0
    decision, report = None, None
    for i in range(6):
        both = worker("p0", input_busy_s=busy), worker("d0", context_tokens=20_000, running_sequences=10)
        seen = watcher.look([cluster(*both, requests=requests, live=10)], i * 5.0)
        requests, busy = requests + 75, busy + 10.0  # two workers' worth of prompts
        if seen is not None:
            decision, state = decide(seen, state, config, Terms(50.0))
            report = Report.of(decision, seen, "d", i, 5.0)
    assert decision is not None
    assert report is not None
    assert decision.rule == "start"
    assert decision.prefill + decision.decode > 2
    message = report_to_wire(report, 25.0)
    told = render_one(message)
    assert "would be" in line(message)
    assert "prompt tokens/s not cached" in told
    assert "weighed" in told
    assert "1 + 1  prompts" in told
    assert to_dict(message)["alternatives"][0]["what"] == "nothing"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"budget_gpus": 1, "dry_run": True}, "raise the budget"),
        ({"budget_gpus": 2, "standbys": 1}, "leaves no room"),
        ({"budget_gpus": 8, "dry_run": True, "prefill": {"min": 3, "max": 2}}, "raise max or lower min"),
    ],
)
def test_a_scaling_section_that_cannot_be_met_is_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        validate_settings({"scaling": section}, ClusterConfig, "cluster.yaml")


def test_a_cluster_that_starts_above_its_budget_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"the workers that the cluster starts with need 4.*lower prefill.replicas"):
        validate_settings({"scaling": {"budget_gpus": 3}, "decode": {"replicas": 3}}, ClusterConfig, "cluster.yaml")


def test_a_worker_without_gpus_counts_as_one() -> None:
    config = validate_settings({"scaling": {"budget_gpus": 2, "dry_run": True}}, ClusterConfig, "cluster.yaml")
    assert config.gpus_of_workers == (1.0, 1.0)
