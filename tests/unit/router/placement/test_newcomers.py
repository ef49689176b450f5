"""What a prompt costs those who come after it."""

from __future__ import annotations

import random

import pytest

from router.placement.cluster import Cluster, Promise, Role, WorkerInfo
from router.placement.newcomers import NOBODY, Arrivals, Newcomers
from router.placement.policy import PolicyParams, PoolsView, RequestFacts, Route, WorkerKey, WorkerView, decide


def test_nobody_is_delayed_where_nobody_comes() -> None:
    assert NOBODY.delayed(5.0) == 0.0
    assert Arrivals().value(1.0) == NOBODY


def test_rate_and_load_are_what_was_sent() -> None:
    arrivals = Arrivals()
    for i in range(400):
        arrivals.sent(300.0, i * 0.5)
    found = arrivals.value(0.0)
    assert found.rate * 1e3 == pytest.approx(2.0, rel=0.05)
    assert found.load == pytest.approx(0.6, rel=0.05)
    assert found.delayed(found.at) == pytest.approx(found.rate / (1 - found.load))


def test_the_first_seconds_are_not_taken_for_silence() -> None:
    arrivals = Arrivals()
    for i in range(11):
        arrivals.sent(50.0, 100.0 + i * 0.2)
    assert arrivals.value(0.0).rate * 1e3 == pytest.approx(5.0, rel=0.15)


def test_it_fades_when_nothing_is_sent_any_more() -> None:
    arrivals = Arrivals()
    for i in range(100):
        arrivals.sent(800.0, i * 1.0)
    found = arrivals.value(0.0)
    assert found.delayed(found.at) > found.delayed(found.at + 10) > found.delayed(found.at + 60) > 0.0
    assert found.delayed(found.at + 60) < 0.01 * found.delayed(found.at)
    later = arrivals.value(found.at + 10)
    assert later.delayed(later.at) == pytest.approx(found.delayed(found.at + 10))


def test_an_overloaded_worker_has_a_finite_price() -> None:
    arrivals = Arrivals()
    for i in range(100):
        arrivals.sent(5000.0, i * 1.0)
    found = arrivals.value(0.0)
    assert found.load > 1.0
    assert found.delayed(found.at) == pytest.approx(10 * found.rate)


def test_a_clock_that_steps_back_changes_nothing_for_the_worse() -> None:
    arrivals = Arrivals()
    arrivals.sent(10.0, 5.0)
    arrivals.sent(10.0, 4.0)
    assert arrivals.value(0.0).rate > 0.0
    assert arrivals.value(0.0).delayed(1.0) > 0.0


def test_it_is_the_delay_of_those_who_come_after() -> None:
    """A first-come queue played with one prompt more and without it: what all the others wait longer."""
    rng = random.Random(7)
    own_s, service_s, rate = 4.0, 0.7, 1.0
    delays = []
    for _ in range(300):
        without = with_it = 0.0  # when the worker is free: it is idle at 0, and the prompt comes then
        with_it = own_s
        delay, now = 0.0, 0.0
        while with_it > without:
            now += rng.expovariate(rate)
            without, with_it = max(without, now), max(with_it, now)
            delay += with_it - without
            takes = rng.expovariate(1 / service_s)
            without, with_it = without + takes, with_it + takes
        delays.append(delay)
    formula = rate / (1 - rate * service_s) * own_s * own_s / 2
    assert sum(delays) / len(delays) == pytest.approx(formula, rel=0.15)


MANY, FEW = Newcomers(2e-3, 0.8), Newcomers(0.2e-3, 0.2)  # 2 and 0.2 prompts a second


def worker(name: str, newcomers: Newcomers = NOBODY, backlog_tokens: int = 0) -> WorkerView:
    return WorkerView(
        key=WorkerKey(name, 1),
        total_blocks=10_000,
        free_blocks=10_000,
        block_tokens=32,
        block_bytes=1 << 20,
        backlog_tokens=backlog_tokens,
        running_sequences=0,
        step_ms=20.0,
        prefill_tokens_per_s=10_000.0,
        pull_bytes_per_s=50e9,
        layout_fingerprint="kv",
        newcomers=newcomers,
    )


def place(
    prompt_tokens: int, decode: list[WorkerView], prefill: list[WorkerView], params: PolicyParams | None = None
) -> Route:
    facts = RequestFacts(prompt_tokens, 100)
    route = decide(facts, PoolsView.of(decode, prefill), params or PolicyParams(), 0.0, random.Random(0))
    assert isinstance(route, Route), route
    return route


def test_a_long_prompt_queues_where_few_come_a_short_one_where_it_is_quick() -> None:
    decode = [worker("busy", MANY), worker("calm", FEW, backlog_tokens=30_000)]
    assert place(80_000, decode, []).decode.worker_id == "calm", "8 s of work, and 2 a second would wait for it"
    assert place(500, decode, []).decode.worker_id == "busy", "50 ms: nobody notices"


def test_without_it_the_long_prompt_goes_where_its_own_first_token_is_soonest() -> None:
    decode = [worker("busy", MANY), worker("calm", FEW, backlog_tokens=30_000)]
    assert place(80_000, decode, [], PolicyParams(newcomers=False)).decode.worker_id == "busy"


def test_a_prefill_worker_with_a_queue_is_worth_it_where_many_come_to_decode() -> None:
    prefill = [worker("p", FEW, backlog_tokens=30_000)]
    assert place(80_000, [worker("d", MANY)], prefill).split
    assert not place(80_000, [worker("d", FEW)], prefill).split


def test_of_two_prefill_workers_the_one_that_delays_fewer() -> None:
    prefill = [worker("p0", MANY), worker("p1", FEW, backlog_tokens=2_000)]
    chosen = place(80_000, [worker("d", MANY)], prefill)
    assert chosen.prefill == WorkerKey("p1", 1)
    assert chosen.estimates["split_delays_ms"] < chosen.estimates["local_delays_ms"]


def test_what_is_dispatched_is_counted_where_it_is_computed() -> None:
    cluster = Cluster()
    for name, role in (("d", Role.DECODE), ("p", Role.PREFILL)):
        info = WorkerInfo(WorkerKey(name, 1), role, "a", "m", "kv", 32, 4096, 100, 1 << 16, 512)
        cluster.registered(info, 0.0, leaving=False)
        cluster.connected(info.key, 0.0)
    cluster.dispatched(WorkerKey("p", 1), 1, Promise(2000, 10))
    cluster.dispatched(WorkerKey("d", 1), 2, Promise(0, 10, 1))
    view = cluster.view()
    assert view.decode[0].newcomers == NOBODY, "it only takes over"
    assert view.prefill[0].newcomers.rate > 0.0
    assert view.prefill[0].newcomers.load == pytest.approx(view.prefill[0].newcomers.rate * 2000.0)
