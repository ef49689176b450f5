"""The lower bound of GPU time: it lies below what is played, and grows where more has to be done at once."""

from __future__ import annotations

import random

import pytest

from simulator.bound import Work, beyond, least_gpu_s
from simulator.elastic import ElasticCluster, Platform
from simulator.outcome import attainment
from simulator.scalers import Fixed
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest


def test_what_two_can_do_in_time_needs_no_third() -> None:
    assert beyond([], 2) == 0
    assert beyond([Work(0.0, 10.0, 20.0)], 2) == 0
    assert beyond([Work(0.0, 10.0, 26.0)], 2) == 6.0
    assert beyond([Work(0.0, 10.0, 10.0), Work(0.0, 20.0, 25.0)], 2) == 0
    assert beyond([Work(0.0, 10.0, 10.0), Work(0.0, 10.0, 20.0), Work(50.0, 60.0, 20.0)], 2) == 10.0


def test_the_most_urgent_goes_first() -> None:
    """In any other order more would be late."""
    assert beyond([Work(0.0, 30.0, 30.0), Work(5.0, 10.0, 10.0), Work(0.0, 30.0, 20.0)], 2) == 0


@pytest.mark.parametrize(("rate", "pair"), [(4.0, (1, 1)), (12.0, (2, 2))])
def test_nobody_who_is_in_time_needs_less(rate: float, pair: tuple[int, int]) -> None:
    rng, at, requests = random.Random(1), 0.0, []
    while at < 60.0:
        at += rng.expovariate(rate)
        requests.append(TraceRequest(at, 6000, 200))
    trace = Trace("made", requests)
    spec = ClusterSpec(prefill=PoolSpec(workers=pair[0], max_batch_tokens=8192), decode=PoolSpec(workers=pair[1]))
    cluster = ElasticCluster(spec, spec.costs(), Fixed(pair), Platform(((0.0, 8),)), 1)
    outcomes = cluster.run(trace)
    reached = attainment(outcomes, spec.itl_target_ms, "mean")
    least = least_gpu_s(trace, spec.costs(), spec, reached)
    assert 2 * cluster.story.counted_s <= least <= cluster.story.gpu_s
    assert least_gpu_s(trace, spec.costs(), spec, reached / 2) <= least


def test_a_prompt_that_a_cache_may_have_costs_only_the_rest() -> None:
    spec = ClusterSpec(prefill=PoolSpec(workers=1), decode=PoolSpec(workers=1))
    new = [TraceRequest(i * 0.02, 8000, 2, tuple(range(i * 100, i * 100 + 15))) for i in range(3000)]
    same = [TraceRequest(i * 0.02, 8000, 2, tuple(range(15))) for i in range(3000)]
    costs = spec.costs()
    fresh, again = (least_gpu_s(Trace("t", r, 512), costs, spec, 1.0) for r in (new, same))
    assert again < fresh / 2
