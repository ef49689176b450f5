"""Scaling decisions that a router was told of: which are kept, and whose word counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from diptych.v1 import cluster_pb2, scaling_pb2

from router.doors.grpc.wire import scaled_from_bytes, scaled_from_wire, scaling_to_wire
from router.errors import RequestRefused
from router.record.scaled import ScalingLog

numbers = itertools.count(1)


def message(age_s: float = 0.0, *, prefill: int = 2, was: int = 2, **more: Any) -> scaling_pb2.ScalingDecision:
    given: dict[str, Any] = {
        "decider": "serve",
        "number": next(numbers),
        "interval_s": 5.0,
        "rule": "steady" if prefill == was else "start",
        "reason": "because",
        "outcome": scaling_pb2.SCALING_OUTCOME_APPLIED,
        "numbers": {"held_gpus": 4.0, "budget_gpus": 8.0},
        **more,
    }
    return scaling_pb2.ScalingDecision(
        age_ms=age_s * 1e3,
        before=scaling_pb2.ScalingCounts(prefill=was, decode=2),
        after=scaling_pb2.ScalingCounts(prefill=prefill, decode=2),
        ready=scaling_pb2.ScalingCounts(prefill=was, decode=2),
        **given,
    )


def log_of(*messages: scaling_pb2.ScalingDecision, now: float = 1000.0) -> ScalingLog:
    log = ScalingLog()
    for one in messages:
        log.take(scaled_from_wire(one, now))
    return log


def test_what_changes_something_is_kept_longer_than_what_does_not() -> None:
    log = ScalingLog()
    for i in range(2000):
        log.take(scaled_from_wire(message(prefill=3 if i == 10 else 2), float(i)))
    assert log.told_total == 2000
    assert len(log.last(10_000)) == 257
    (kept,) = log.last(10, notable=True)
    assert (kept.at, kept.wanted.prefill) == (10.0, 3)
    newest, before = log.last(2)
    assert (newest.at, before.at) == (1999.0, 1998.0)
    assert log.rules == {("steady", "applied"): 1999, ("start", "applied"): 1}


def test_a_second_word_on_a_decision_replaces_the_first() -> None:
    """It was decided; then the platform refused it."""
    first = message(prefill=3)
    log = log_of(first)
    assert log.errors_total == 0
    again = message(prefill=3, number=first.number, outcome=scaling_pb2.SCALING_OUTCOME_FAILED, error="no such app")
    for _ in range(2):
        log.take(scaled_from_wire(again, 1000.0))
    assert (log.told_total, log.errors_total, sum(log.rules.values())) == (1, 1, 1)
    (kept,) = log.last(5)
    assert kept.error == "no such app"
    assert log.current == kept


def test_who_only_says_does_not_overrule_who_acts() -> None:
    said = {"decider": "somebody", "outcome": scaling_pb2.SCALING_OUTCOME_DRY_RUN}
    log = log_of(message(20.0, prefill=3), message(10.0, prefill=7, **said))
    assert log.current is not None
    assert log.current.wanted.prefill == 3
    assert [p.wanted.prefill for p in log.points(1000.0)] == [3]
    log.take(scaled_from_wire(message(4.0, prefill=7, **said), 1000.0))
    assert log.current.decider == "somebody", "the other has been silent for more than three intervals"
    log.take(scaled_from_wire(message(0.0, prefill=4), 1000.0))
    assert log.current.wanted.prefill == 4


def test_counts_over_time_fit_a_picture() -> None:
    log = ScalingLog()
    for i in range(1500):
        log.take(scaled_from_wire(message(prefill=i), float(5 * i)))
    points = list(log.points(7500.0))
    assert 60 < len(points) <= 120
    assert points[-1].wanted.prefill == 1499
    assert points[0].at >= 7500.0 - 3600.0
    assert [p.at for p in points] == sorted(p.at for p in points)


def test_as_it_is_read() -> None:
    log = log_of(message(30.0), message(20.0, prefill=3), message(10.0))
    told = scaling_to_wire(log, cluster_pb2.GetScalingRequest(last=2), 1005.0)
    assert [round(d.age_ms) for d in told.decisions] == [15_000, 25_000]
    assert told.current == told.decisions[0]
    assert (told.decisions_total, told.errors_total, len(told.points)) == (3, 0, 3)
    assert told.decisions[1].reason == "because"
    (changed,) = scaling_to_wire(log, cluster_pb2.GetScalingRequest(changes_only=True), 1005.0).decisions
    assert changed.rule == "start"
    empty = scaling_to_wire(ScalingLog(), cluster_pb2.GetScalingRequest(), 0.0)
    assert not empty.HasField("current")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"decider": ""}, "decider"),
        ({"rule": "x" * 201}, "rule"),
        ({"interval_s": 0.0}, "interval_s"),
        ({"interval_s": float("nan")}, "interval_s"),
        ({"numbers": {"held_gpus": float("inf")}}, "numbers"),
        ({"alternatives": [scaling_pb2.ScalingAlternative(prefill_strain=float("nan"))]}, "alternatives"),
        ({"reason": "x" * 40_000}, ""),
    ],
)
def test_what_cannot_be_a_decision_is_refused(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        scaled_from_wire(message(**changed), 0.0)
    assert refused.value.failure.field == f"decision.{field}".rstrip(".")
    assert "; " in str(refused.value)
    with pytest.raises(RequestRefused):
        scaled_from_bytes(message(**changed).SerializeToString(), 0.0, 0.0)


def test_one_that_lay_somewhere_is_as_old_as_it_is() -> None:
    scaled = scaled_from_bytes(message(2.0).SerializeToString(), 8.0, 1000.0)
    assert scaled.at == 990.0
    with pytest.raises(RequestRefused, match="no ScalingDecision"):
        scaled_from_bytes(b"\xff", 0.0, 0.0)


def test_rules_that_a_stranger_makes_up_are_bounded() -> None:
    log = log_of(*(message(rule=f"rule {i}") for i in range(200)))
    assert len(log.rules) <= 65
    assert log.rules["other", "applied"] == 200 - 64


def test_a_cluster_sleeps_from_the_decision_to_have_no_workers_until_some_are_ready() -> None:
    none, one = scaling_pb2.ScalingCounts(), scaling_pb2.ScalingCounts(prefill=1, decode=1)

    def log_after(*said: tuple[scaling_pb2.ScalingCounts, scaling_pb2.ScalingCounts], **more: Any) -> ScalingLog:
        messages = [message(**more) for _ in said]
        for m, (after, ready) in zip(messages, said, strict=True):
            m.after.CopyFrom(after)
            m.ready.CopyFrom(ready)
        return log_of(*messages)

    assert not log_after((one, none)).asleep(1000.0), "it starts for the first time"
    assert log_after((none, one)).asleep(1000.0)
    assert log_after((none, one), (none, none), (one, none)).asleep(1000.0), "it wakes"
    assert not log_after((none, one), (one, none), (one, one)).asleep(1000.0)
    assert not log_after((none, one)).asleep(1100.0), "nobody is there to wake it"
    assert not log_after((none, one), outcome=scaling_pb2.SCALING_OUTCOME_DRY_RUN).asleep(1000.0)
