"""What a prompt costs those who come after it."""

from __future__ import annotations

import random

import pytest

from router.newcomers import NOBODY, Arrivals


def test_nobody_is_delayed_where_nobody_comes() -> None:
    assert NOBODY.delayed(5.0) == 0.0
    assert Arrivals().value() == NOBODY


def test_rate_and_load_are_what_was_sent() -> None:
    arrivals = Arrivals()
    for i in range(400):
        arrivals.sent(300.0, i * 0.5)
    found = arrivals.value()
    assert found.rate * 1e3 == pytest.approx(2.0, rel=0.05)
    assert found.load == pytest.approx(0.6, rel=0.05)
    assert found.delayed(found.at) == pytest.approx(found.rate / (1 - found.load))


def test_the_first_seconds_are_not_taken_for_silence() -> None:
    arrivals = Arrivals()
    for i in range(11):
        arrivals.sent(50.0, 100.0 + i * 0.2)
    assert arrivals.value().rate * 1e3 == pytest.approx(5.0, rel=0.15)


def test_it_fades_when_nothing_is_sent_any_more() -> None:
    arrivals = Arrivals()
    for i in range(100):
        arrivals.sent(800.0, i * 1.0)
    found = arrivals.value()
    assert found.delayed(found.at) > found.delayed(found.at + 10) > found.delayed(found.at + 60) > 0.0
    assert found.delayed(found.at + 60) < 0.01 * found.delayed(found.at)


def test_an_overloaded_worker_has_a_finite_price() -> None:
    arrivals = Arrivals()
    for i in range(100):
        arrivals.sent(5000.0, i * 1.0)
    found = arrivals.value()
    assert found.load > 1.0
    assert found.delayed(found.at) == pytest.approx(10 * found.rate)


def test_a_clock_that_steps_back_changes_nothing_for_the_worse() -> None:
    arrivals = Arrivals()
    arrivals.sent(10.0, 5.0)
    arrivals.sent(10.0, 4.0)
    assert arrivals.value().rate > 0.0
    assert arrivals.value().delayed(1.0) > 0.0


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
