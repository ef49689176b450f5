"""Corrections find a constant error, stay within bounds, and are forgotten."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement.correction import UNCORRECTED, Correction


def learned(pairs: list[tuple[float, float]], every_s: float = 0.1) -> Correction:
    correction = Correction()
    for i, (predicted, actual) in enumerate(pairs):
        correction.observe(predicted, actual, i * every_s)
    return correction


def test_nothing_learned_changes_nothing() -> None:
    assert Correction().value(5.0) == UNCORRECTED
    assert UNCORRECTED(123.0) == 123.0


@pytest.mark.parametrize(("fixed", "factor"), [(0.0, 1.6), (40.0, 1.0), (25.0, 0.7)])
def test_a_steady_error_is_found(fixed: float, factor: float) -> None:
    rng = random.Random(1)
    pairs = [(x, fixed + factor * x) for x in (rng.uniform(5, 2000) for _ in range(200))]
    value = learned(pairs).value(20.0)
    for predicted in (20.0, 200.0, 1500.0):
        assert value(predicted) == pytest.approx(fixed + factor * predicted, rel=0.25)


def test_a_few_pairs_are_believed_a_little() -> None:
    value = learned([(100.0, 200.0)]).value(0.0)
    assert 101 < value(100.0) < 160


def test_one_outlier_moves_little() -> None:
    before = learned([(100.0, 100.0)] * 30)
    before.observe(100.0, 60_000.0, 3.0)
    assert before.value(3.0)(100.0) < 170


def test_what_was_learned_fades_with_time() -> None:
    correction = learned([(100.0, 250.0)] * 50)
    now, later, long_after = (correction.value(t)(100.0) for t in (5.0, 600.0, 6000.0))
    assert now > 200
    assert now > later > long_after
    assert long_after == pytest.approx(100.0, abs=2.0)


def test_a_change_is_followed() -> None:
    correction = learned([(100.0, 250.0)] * 50)
    for i in range(120):
        correction.observe(100.0, 100.0, 5.0 + i * 0.1)
    assert correction.value(17.0)(100.0) == pytest.approx(100.0, rel=0.1)


def test_a_value_is_worked_out_again_when_there_is_news_or_a_second_has_passed() -> None:
    correction = learned([(100.0, 250.0)] * 20)
    first = correction.value(3.0)
    assert correction.value(3.5) is first
    assert correction.value(60.0)(100.0) < first(100.0)
    before = correction.value(60.0)
    correction.observe(100.0, 400.0, 60.1)
    assert correction.value(60.1)(100.0) > before(100.0)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e7, allow_nan=False),
            st.one_of(st.floats(0, 1e9), st.just(float("nan")), st.just(float("inf"))),
        ),
        max_size=40,
    )
)
def test_bounded_whatever_happens(pairs: list[tuple[float, float]]) -> None:
    value = learned(pairs).value(4.0)
    assert 0.0 <= value.fixed_ms <= 250.0
    assert 1 / 3 <= value.factor <= 3.0
