"""Simulated pools that change while they run: nothing is lost, GPU time is counted, the product's policy decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scaling.config import ScalingConfig
from scaling.decision import Decision
from scaling.observation import Observation, Pool, Stage
from scaling.weighing import Terms
from simulator.elastic import ElasticCluster, Platform, Scaler
from simulator.outcome import Outcome
from simulator.scalers import Clairvoyant, Fixed, Ours, ServeCounts, Thresholds, ThroughputPlanner
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest


def trace(rate: Callable[[float], float], duration_s: float, prompt: int = 4000, answer: int = 100) -> Trace:
    at, requests = 0.0, []
    while at < duration_s:
        at += 1 / rate(at)
        requests.append(TraceRequest(at, prompt + len(requests) * 37 % 500, answer))
    return Trace("made", requests)


def spec(prefill: int, decode: int) -> ClusterSpec:
    return ClusterSpec(prefill=PoolSpec(workers=prefill, max_batch_tokens=8192), decode=PoolSpec(workers=decode))


class Plan:
    """Pairs at given times; `shifted` as planned."""

    name = "plan"

    def __init__(self, *steps: tuple[float, int, int, int]) -> None:
        self.steps, self.seen = list(steps), list[Observation]()

    def decide(self, seen: Observation) -> Decision:
        self.seen.append(seen)
        assert seen.prefill_target is not None
        assert seen.decode_target is not None
        pair, shifted = (seen.prefill_target, seen.decode_target), 0
        if self.steps and self.steps[0][0] <= seen.now:
            _, *wanted, shifted = self.steps.pop(0)
            pair = wanted[0], wanted[1]
        return Decision(seen.now, *pair, 0, "planned", "", shifted=shifted)


def play(
    scaler: Scaler, played: Trace, pair: tuple[int, int], **platform: object
) -> tuple[ElasticCluster, list[Outcome]]:
    shape = spec(*pair)
    given: dict[str, object] = {"start_s": 10.0, "places": ((0.0, 8),), **platform}
    cluster = ElasticCluster(shape, shape.costs(), scaler, Platform(**given), 1)  # type: ignore[arg-type]
    outcomes = cluster.run(played)
    assert all(o.finished for o in outcomes), "nothing is lost"
    cluster.cluster.check_empty()
    for worker in cluster.workers:
        assert not worker.flights
        if worker.engine.alive:
            assert worker.engine.cache.used_tokens == 0, worker.key
    return cluster, outcomes


def test_a_worker_starts_late_is_counted_from_its_place_and_leaves_when_it_is_empty() -> None:
    played = trace(lambda _: 4.0, 60.0)
    plan = Plan((10.0, 2, 2, 0), (40.0, 1, 1, 0))
    cluster, _ = play(plan, played, (1, 1))
    ready = {seen.now: seen.count(Pool.PREFILL, Stage.READY) for seen in plan.seen}
    assert (ready[15.0], ready[25.0], ready[50.0]) == (1, 2, 1)
    first, last = played.requests[len(played.requests) // 10].arrival_s, played.requests[-1].arrival_s
    assert cluster.story.gpu_s == pytest.approx(2 * (last - first) + 2 * 30.0, rel=0.05)
    assert cluster.story.most_held == 4


def test_a_role_changes_under_load_at_once_and_nothing_moves() -> None:
    plan = Plan((20.0, 3, 1, 2))
    cluster, outcomes = play(plan, trace(lambda _: 12.0, 60.0), (1, 3))
    ready = {
        seen.now: (seen.count(Pool.PREFILL, Stage.READY), seen.count(Pool.DECODE, Stage.READY)) for seen in plan.seen
    }
    assert (ready[20.0], ready[25.0]) == ((1, 3), (3, 1))
    assert sum(o.moves for o in outcomes) == 0
    computing = {o.prefill for o in outcomes if o.split and o.arrival_s > 30.0}
    assert len(computing) == 3
    assert cluster.story.most_held == 4


def test_without_a_place_a_worker_is_unschedulable_until_there_is_one() -> None:
    plan = Plan((10.0, 2, 1, 0))
    play(plan, trace(lambda _: 3.0, 80.0), (1, 1), places=((0.0, 2), (40.0, 3)))
    stages = {seen.now: {w.stage for w in seen.of(Pool.PREFILL, *Stage)} for seen in plan.seen}
    assert stages[30.0] == {Stage.READY, Stage.UNSCHEDULABLE}
    assert stages[45.0] == {Stage.READY, Stage.STARTING}
    assert stages[60.0] == {Stage.READY}


def test_what_dies_is_started_again_and_its_requests_move() -> None:
    plan = Plan()
    _, outcomes = play(plan, trace(lambda _: 12.0, 60.0), (1, 2), deaths=((20.0, Pool.DECODE),))
    ready = {seen.now: seen.count(Pool.DECODE, Stage.READY) for seen in plan.seen}
    assert (ready[20.0], ready[25.0], ready[40.0]) in ((2, 1, 2), (1, 1, 2))
    assert sum(o.moves for o in outcomes) > 0


def test_our_policy_follows_the_load_and_goes_to_zero_and_back() -> None:
    def rate(t: float) -> float:
        return 2.0 if t < 60 else 12.0 if t < 200 else 0.004 if t < 240 else 2.0

    config = ScalingConfig(budget_gpus=8, idle_s=60.0)
    scaler = Ours(config, Terms(50.0))
    cluster, outcomes = play(scaler, trace(rate, 500.0), (1, 1))
    totals = {at: p + d for at, p, d in cluster.story.pairs}
    assert max(totals.values()) >= 3
    assert min(totals.values()) == 0
    assert cluster.story.most_held <= 8
    assert sum(o.met(50.0, "mean") for o in outcomes) > 0.85 * len(outcomes)


def test_every_rule_that_is_compared_answers_everything_within_the_places() -> None:
    played = trace(lambda t: 3.0 if t < 40 else 10.0, 90.0)
    shape = spec(1, 1)
    costs = shape.costs()
    scalers: list[Scaler] = [
        Fixed((2, 1)),
        ServeCounts(1.0, 40.0, 6),
        ThroughputPlanner(costs, shape, 6, window_s=30.0),
        ThroughputPlanner(costs, shape, 6, queues=True),
        Thresholds(costs, shape, 6),
        Clairvoyant(played, costs, shape, 6, 10.0, 0.5),
    ]
    for scaler in scalers:
        cluster, _ = play(scaler, played, (1, 1), places=((0.0, 6),))
        assert cluster.story.most_held <= 6, scaler.name
