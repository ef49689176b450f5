"""Whole simulated clusters: the fast one against the exact one, and what each of them owes its reader."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from router.placement.cluster import Role
from simulator.exact import ExactCluster, tokens_of
from simulator.fast import FastCluster
from simulator.flights import FastWorker, runs
from simulator.outcome import Outcome
from simulator.policies import PolicyError, by_name
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest


def trace(count: int, seed: int = 1, gap_s: float = 0.15, longest: int = 12_000) -> Trace:
    rng = random.Random(seed)
    at, requests = 0.0, []
    for i in range(count):
        at += rng.expovariate(1 / gap_s)
        prompt = int(min(longest, 200 + rng.paretovariate(1.2) * 400))
        family = 1 + i % 5
        shared = tuple(family * 1000 + j for j in range(min(3, prompt // 512)))
        own = tuple(100_000 + i * 100 + j for j in range(prompt // 512 - len(shared)))
        requests.append(TraceRequest(at, prompt, rng.randrange(1, 60), (*shared, *own)))
    return Trace("made", requests)


def spec(prefill: int, decode: int, **changes: object) -> ClusterSpec:
    static = {"adaptive_chunks": False}
    return ClusterSpec.model_validate(
        {
            "prefill": {"workers": prefill, "max_batch_tokens": 8192, **static},
            "decode": {"workers": decode, **static},
            "overload": "arrival",
            **changes,
        }
    )


def means(outcomes: list[Outcome]) -> tuple[float, float, float]:
    return (
        statistics.fmean(o.ttft_s for o in outcomes),
        statistics.fmean(o.tpot_ms for o in outcomes if o.output_tokens > 1),
        statistics.fmean(o.worst_gap_ms for o in outcomes if o.output_tokens > 1),
    )


class Unlike(FastCluster):
    """The first decode worker is one of four devices, the others of one each."""

    def _worker(self, name: str, role: Role, pool: PoolSpec) -> FastWorker:
        fast = pool.model_copy(update={"cost_model": "h200x4-8b"})
        return super()._worker(name, role, fast if name == "d0" else pool)


@pytest.mark.parametrize("prefill", [0, 1])
def test_of_unlike_decode_workers_the_fast_one_answers_more(prefill: int) -> None:
    """Nobody tells the router who is fast: it learns from what each reports and what its estimates were worth."""
    some, shape, shares = trace(400, gap_s=0.02, longest=3000), spec(prefill, 2), {}
    played = Trace("made", [replace(r, output_tokens=50 + 3 * r.output_tokens, blocks=()) for r in some.requests])
    for kind in (FastCluster, Unlike):
        outcomes = kind(shape, shape.costs(), by_name("diptych"), 1).run(played)
        assert all(o.finished for o in outcomes)
        shares[kind] = sum(o.output_tokens for o in outcomes if o.decode == 0) / sum(o.output_tokens for o in outcomes)
    assert 0.4 < shares[FastCluster] < 0.6, "alike, they share"
    assert shares[Unlike] > 0.65


@pytest.mark.parametrize(("policy", "prefill", "decode"), [("aggregated", 0, 1), ("always-split", 1, 1)])
def test_the_fast_workers_are_the_exact_ones_where_nothing_is_chance(policy: str, prefill: int, decode: int) -> None:
    played, shape = trace(60), spec(prefill, decode)
    fast = FastCluster(shape, shape.costs(), by_name(policy), 1).run(played)
    exact = ExactCluster(shape, shape.costs(), by_name(policy), 1).run(played)
    for a, b in zip(fast, exact, strict=True):
        assert a.finished
        assert b.finished
        assert a.ttft_s == pytest.approx(b.ttft_s, rel=0.01), a.number
        assert a.cached_tokens == b.cached_tokens, a.number
        assert a.tpot_ms == pytest.approx(b.tpot_ms, rel=0.05, abs=0.3), a.number
    assert means(fast) == pytest.approx(means(exact), rel=0.02)


@pytest.mark.parametrize(("policy", "prefill", "decode"), [("aggregated", 0, 1), ("always-split", 1, 1)])
def test_they_agree_too_when_prompts_go_by_due_date_and_some_are_put_back(
    policy: str, prefill: int, decode: int
) -> None:
    """Twice what a worker can do, half of it in a tenth of the prompts."""
    requests = [TraceRequest(i * 0.12, 40_000 if i % 10 == 3 else 1500 + i * 7 % 900, 10) for i in range(120)]
    played, shape = Trace("made", requests), spec(prefill, decode, overload="put_back")
    fast = FastCluster(shape, shape.costs(), by_name(policy), 1).run(played)
    exact = ExactCluster(shape, shape.costs(), by_name(policy), 1).run(played)
    in_time = [sum(o.ttft_s <= o.ttft_target_s for o in x) for x in (fast, exact)]
    assert in_time[0] == pytest.approx(in_time[1], rel=0.02)
    assert in_time[0] > 108
    assert means(fast) == pytest.approx(means(exact), rel=0.2)
    late = ClusterSpec.model_validate(shape.model_dump() | {"overload": "arrival"})
    by_arrival = FastCluster(late, late.costs(), by_name(policy), 1).run(played)
    assert sum(o.ttft_s <= o.ttft_target_s for o in by_arrival) < 12


def test_they_agree_too_on_who_is_spared_and_then_more_of_the_longest_are_in_time() -> None:
    requests = [TraceRequest(i * 0.06, 500 + i * 977 % 5500, 10) for i in range(200)]
    played, all_in_time, longest_in_time = Trace("made", requests), [], []
    for protect in (0.0, 0.5, 0.9):
        shape = spec(0, 1, overload="put_back", overload_protect=protect)
        fast = FastCluster(shape, shape.costs(), by_name("aggregated"), 1).run(played)
        exact = ExactCluster(shape, shape.costs(), by_name("aggregated"), 1).run(played)
        in_time = [{o.number for o in x if o.ttft_s <= o.ttft_target_s} for x in (fast, exact)]
        assert len(in_time[0] ^ in_time[1]) <= 6
        all_in_time.append(len(in_time[0]))
        longest_in_time.append(sum(requests[n].prompt_tokens > 5450 for n in in_time[0]))
    assert all_in_time == sorted(all_in_time, reverse=True)
    assert longest_in_time == sorted(longest_in_time)
    assert longest_in_time[1] >= longest_in_time[0] + 3


def test_one_seed_is_one_story_and_another_seed_another() -> None:
    played, shape = trace(120), spec(1, 3, overload="put_back")

    def story(seed: int) -> list[tuple[float, float, int]]:
        outcomes = FastCluster(shape, shape.costs(), by_name("diptych"), seed).run(played)
        return [(o.first_token_s, o.finished_s, o.decode) for o in outcomes]

    assert story(1) == story(1)
    assert any(story(seed) != story(1) for seed in range(2, 7))


@pytest.mark.parametrize("policy", ["diptych", "aggregated", "always-split", "dynamo", "threshold:1000"])
def test_every_policy_answers_everything_and_leaves_nothing(policy: str) -> None:
    played, shape = trace(150, gap_s=0.02), spec(2, 2)
    cluster = FastCluster(shape, shape.costs(), by_name(policy), 3)
    outcomes = cluster.run(played)
    assert all(o.finished for o in outcomes)
    assert any(o.split for o in outcomes) == (policy != "aggregated")
    assert all(o.split for o in outcomes) == (policy == "always-split")
    cluster.cluster.check_empty()
    for worker in cluster.workers:
        worker.engine.cache.check()
        assert worker.engine.cache.used_tokens == 0, worker.key
        assert not worker.flights
        assert worker.held_tokens == 0


@pytest.mark.parametrize("policy", ["diptych", "aggregated", "always-split"])
def test_memory_for_a_few_only_makes_sequences_wait_and_give_way_not_vanish(policy: str) -> None:
    played = trace(80, gap_s=0.02, longest=4000)
    shape = spec(1, 1, kv_capacity_tokens=8192)
    for kind in (FastCluster, ExactCluster):
        outcomes = kind(shape, shape.costs(), by_name(policy), 1).run(played)
        assert all(o.finished for o in outcomes), kind


@pytest.mark.parametrize("kind", [FastCluster, ExactCluster])
@pytest.mark.parametrize("victim", [0, 3])
def test_a_crash_moves_requests_and_loses_none(kind: type, victim: int) -> None:
    played, shape = trace(120, gap_s=0.008), spec(2, 2)
    cluster = kind(shape, shape.costs(), by_name("always-split"), 1, crashes=[(0.6, victim)])
    outcomes = cluster.run(played)
    assert all(o.finished for o in outcomes)
    assert any(o.moves for o in outcomes)
    late = [o for o in outcomes if o.arrival_s > 0.65]
    assert late
    assert all(victim not in (o.decode, o.prefill) for o in late), "a dead worker gets nothing"


def test_a_slow_link_delays_the_second_token_not_the_first() -> None:
    played = trace(40, gap_s=1.0)
    quick, slow = spec(1, 1), spec(1, 1, nic_gbytes_per_s=0.5)
    a, b = (FastCluster(s, s.costs(), by_name("always-split"), 1).run(played) for s in (quick, slow))
    assert means(a)[0] == pytest.approx(means(b)[0], rel=0.05)
    gaps = [statistics.fmean(o.handoff_gap_ms for o in x if o.output_tokens > 1) for x in (a, b)]
    assert gaps[1] > 3 * gaps[0]


def test_chunks_within_the_target_keep_tokens_in_time() -> None:
    played = trace(150, gap_s=0.1)
    static = spec(0, 1, itl_target_ms=20)
    adaptive = static.model_copy(update={"decode": PoolSpec(workers=1)})
    a, b = (FastCluster(s, s.costs(), by_name("aggregated"), 1).run(played) for s in (static, adaptive))
    worst = [max(o.worst_gap_ms for o in x) for x in (a, b)]
    assert worst[0] > 30
    assert worst[1] < 20


def test_prompts_by_due_date_let_short_ones_pass() -> None:
    requests = [TraceRequest(i / 100, 16_000, 2) for i in range(3)]
    requests += [TraceRequest(0.1 + i / 100, 500, 2) for i in range(20)]
    shape = spec(0, 1)
    urgent = shape.model_copy(update={"overload": "put_back"})
    a, b = (FastCluster(s, s.costs(), by_name("aggregated"), 1).run(Trace("t", requests)) for s in (shape, urgent))
    assert sum(o.ttft_s > o.ttft_target_s for o in a) > 15
    assert sum(o.ttft_s > o.ttft_target_s for o in b) < 3


def test_tokens_stand_for_the_blocks_that_the_trace_names() -> None:
    a = tokens_of(TraceRequest(0, 1100, 1, (7, 8)), 512, 1)
    b = tokens_of(TraceRequest(0, 1200, 1, (7, 9)), 512, 2)
    assert (len(a), len(b)) == (1100, 1200)
    assert a[:512] == b[:512]
    assert a[512:1024] != b[512:1024]
    assert tokens_of(TraceRequest(0, 1, 1), 512, 3) != tokens_of(TraceRequest(0, 1, 1), 512, 4)


def test_stored_blocks_are_told_in_runs() -> None:
    assert runs({1: 0, 2: 1, 3: 2, 9: 2, 5: 0}) == [(0, [1, 2, 3]), (2, [9]), (0, [5])]


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match="always-split"):
        by_name("best")
    assert by_name("threshold:512").name == "threshold:512"


def test_prompts_that_end_in_one_step_queue_for_the_link_alike() -> None:
    """Whole blocks of all of them go first, then the rest of each."""
    played = Trace("batch", [TraceRequest(0.001 * i, n, 20) for i, n in enumerate((9000, 500, 3000, 3000, 700))])
    shape = spec(1, 1)
    fast, exact = (
        kind(shape, shape.costs(), by_name("always-split"), 1).run(played) for kind in (FastCluster, ExactCluster)
    )
    assert [o.handoff_gap_ms for o in fast] == pytest.approx([o.handoff_gap_ms for o in exact], rel=0.01)
    assert [o.ttft_s for o in fast] == pytest.approx([o.ttft_s for o in exact], rel=0.01)
