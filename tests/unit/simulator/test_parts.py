"""Clock, NICs, caches, gap counts: the parts of the simulator by themselves."""

from __future__ import annotations

import random

import pytest

from simulator.gaps import GapCounts, worst_ms
from simulator.loop import EventLoop
from simulator.network import Nic, move
from simulator.outcome import Outcome, attainment, highest_rate
from simulator.prefix_cache import PrefixCache


def test_events_come_in_order_of_time_then_of_asking() -> None:
    loop, seen = EventLoop(), []
    loop.at(2.0, seen.append, "late")
    loop.at(1.0, seen.append, "first")
    loop.at(1.0, seen.append, "second")
    loop.at(1.5, seen.append, "never").cancel()
    loop.at(1.0, lambda _: loop.at(0.5, seen.append, "past means now"))
    loop.run()
    assert seen == ["first", "second", "past means now", "late"]
    assert loop.now == 2.0


def test_the_loop_stops_where_it_is_told() -> None:
    loop, seen = EventLoop(), []
    loop.at(1.0, seen.append, 1)
    loop.at(3.0, seen.append, 3)
    loop.run(until_s=2.0)
    assert seen == [1]
    assert len(loop) == 1


def test_transfers_take_turns_at_both_ends() -> None:
    p, d1, d2 = Nic(1e9), Nic(1e9), Nic(1e9)
    assert move(p, d1, 1e9, 0.0, 0.0, 1e9) == 1.0
    assert move(p, d2, 1e9, 0.0, 0.0, 1e9) == 2.0, "behind the first at the sender"
    assert move(Nic(1e9), d1, 1e9, 0.5, 0.5, 1e9) == 2.0, "behind the first at the receiver"
    assert p.queued_send_bytes(1.5) == pytest.approx(0.5e9)


def test_a_transfer_overlaps_with_the_computation_but_for_its_last_piece() -> None:
    assert move(Nic(1e9), Nic(1e9), 1e9, 0.0, 5.0, 1e8) == pytest.approx(5.1)
    assert move(Nic(1e8), Nic(1e9), 1e9, 0.0, 5.0, 1e8) == pytest.approx(10.0), "the link is the slower of the two"


def test_a_cache_evicts_the_least_recently_used_and_the_tail_first() -> None:
    cache = PrefixCache(10 * 64, 64)
    cache.hold([1, 2, 3])
    cache.release([1, 2, 3])
    cache.hold([7])
    cache.release([7])
    assert cache.match([1, 2, 3, 4]) == 3
    cache.use(8 * 64)
    cache.check()
    assert (cache.match([1, 2, 3]), cache.match([7])) == (1, 1), "3 and 2 went, from the tail"
    assert cache.take_events() == ({1: 0, 7: 0}, []), "what came and went since the last report is not mentioned"
    cache.use(64)
    assert cache.take_events() == ({}, [1])


def test_what_is_held_is_not_evicted_and_counts_once() -> None:
    cache = PrefixCache(4 * 64, 64)
    assert cache.hold([1, 2]) == 128
    assert cache.hold([1, 2]) == 0
    cache.use(128)
    cache.release([1, 2])
    assert cache.match([1, 2]) == 2
    cache.release([1, 2])
    assert (cache.free_tokens, cache.match([1, 2])) == (128, 2)
    cache.check()


def test_random_use_of_a_cache_keeps_its_books() -> None:
    rng, cache, held = random.Random(1), PrefixCache(50 * 16, 16), []
    for _ in range(500):
        chain = [rng.randrange(5) * 100 + i for i in range(rng.randrange(1, 6))]
        if rng.random() < 0.5 and cache.free_tokens >= 16 * len(chain):
            cache.hold(chain)
            cache.make_room()
            held.append(chain)
        elif held:
            cache.release(held.pop(rng.randrange(len(held))))
        cache.check()
    for chain in held:
        cache.release(chain)
    assert cache.free_tokens == cache.capacity_tokens


def test_gap_counts_agree_with_remembering_every_gap() -> None:
    rng = random.Random(2)
    counts, gaps = GapCounts(), []
    counts.add(5, 3.0, 0.0)  # before the request began
    since = counts.snapshot()
    for _ in range(60):
        n, first, growth = rng.randrange(1, 40), rng.uniform(5, 40), rng.choice([0.0, 0.001, 0.2])
        counts.add(n, first, growth)
        gaps += [first + growth * i for i in range(n)]
    extra = [250.0, 1.0]
    exact = worst_ms(gaps + extra)
    assert counts.worst_ms(since, extra) == pytest.approx(exact, rel=0.01)
    assert sum(counts.counts) == len(gaps) + 5


def test_a_request_counts_only_with_both_targets() -> None:
    def outcome(ttft: float, gap: float, worst: float) -> Outcome:
        return Outcome(0, 0.0, 10, 11, 1.0, first_token_s=ttft, finished_s=ttft + gap / 100, worst_gap_ms=worst)

    good, late, slow, uneven = outcome(0.5, 10, 12), outcome(1.5, 10, 12), outcome(0.5, 30, 30), outcome(0.5, 10, 90)
    refused = Outcome(0, 0.0, 10, 11, 1.0, refused=True)
    outcomes = [good, late, slow, uneven, refused]
    assert attainment(outcomes, 20, "mean") == pytest.approx(2 / 5)
    assert attainment(outcomes, 20, "worst") == pytest.approx(1 / 5)


def test_the_highest_rate_is_found_from_either_side() -> None:
    def attained(rate: float) -> float:
        return 1.0 if rate < 7 else max(0.0, 1.0 - (rate - 7) / 2)

    for guess in (1.0, 7.0, 40.0):
        rate, points = highest_rate(attained, guess, steps=6)
        assert rate == pytest.approx(7.2, rel=0.02)
        assert len(points) < 16
    assert highest_rate(lambda _: 0.5, 1.0)[0] == 0.0
