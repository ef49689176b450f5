"""A decision as it is told to the routers."""

from __future__ import annotations

import math

from diptych.v1 import scaling_pb2

from scaling.decision import Alternative, Decision
from scaling.observation import Observation, Pool, Stage, WorkerSeen
from scaling.report import Counts, Report
from scaling.wire import report_to_wire


def seen(**targets: int) -> Observation:
    stages = [(Pool.PREFILL, Stage.READY), (Pool.DECODE, Stage.READY), (Pool.DECODE, Stage.STARTING)]
    stages += [(Pool.DECODE, Stage.DRAINING)]
    workers = [WorkerSeen(f"w{i}", pool, stage, 9.0) for i, (pool, stage) in enumerate(stages)]
    return Observation(100.0, 5.0, (*workers, WorkerSeen("s", None, Stage.STANDBY, 9.0)), **targets)


def decided(prefill: int, *, dry_run: bool = False, started: int = 0) -> Decision:
    weighed = (Alternative(1, 0, 0.5, math.inf, "stop", 5.0, "above 0.95"),)
    return Decision(
        100.0, prefill, 2, 1, "start", "short", started=started, dry_run=dry_run, numbers={"held_gpus": 4.0},
        alternatives=weighed,
    )  # fmt: skip


def outcome(report: Report) -> str:
    return scaling_pb2.ScalingOutcome.Name(report_to_wire(report, 102.0).outcome).removeprefix("SCALING_OUTCOME_")


def test_counts_before_are_what_was_asked_for_or_what_is_there() -> None:
    assert Report.of(decided(1), seen(), "d", 1, 5.0).before == Counts(1, 2, 1)
    report = Report.of(decided(1), seen(prefill_target=3, decode_target=4), "d", 1, 5.0)
    assert report.before == Counts(3, 4, 1)
    assert report.ready == Counts(1, 1, 1)


def test_all_of_it_is_told() -> None:
    told = report_to_wire(Report.of(decided(2, started=1), seen(), "d", 7, 5.0), 102.5)
    assert (told.decider, told.number, told.age_ms, told.interval_s) == ("d", 7, 2500.0, 5.0)
    assert (told.after.prefill, told.after.decode, told.after.standby) == (2, 2, 1)
    assert (told.rule, told.reason, told.started) == ("start", "short", 1)
    assert dict(told.numbers) == {"held_gpus": 4.0}
    (weighed,) = told.alternatives
    assert (weighed.what, weighed.decode_strain, weighed.verdict) == ("stop", math.inf, "above 0.95")


def test_what_became_of_it() -> None:
    assert outcome(Report.of(decided(1), seen(), "d", 1, 5.0)) == "UNCHANGED"
    assert outcome(Report.of(decided(2, started=1), seen(), "d", 1, 5.0)) == "APPLIED"
    assert outcome(Report.of(decided(2, dry_run=True, started=1), seen(), "d", 1, 5.0)) == "DRY_RUN"
    assert outcome(Report.of(decided(2, started=1), seen(), "d", 1, 5.0, "no such application")) == "FAILED"
