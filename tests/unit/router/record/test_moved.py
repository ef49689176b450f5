"""What is told of migrations, and whose step time a role is charged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from router.breakdown import Migration
from router.placement.cluster import Role
from router.placement.moves import Reason
from router.placement.view import WorkerKey
from router.record.counts import BusyByRole
from router.record.moved import MoveLog

A, B = WorkerKey("a", 1), WorkerKey("b", 1)


def life(request_id: str, why: str) -> Any:
    breakdown = SimpleNamespace(migrations=[Migration(A, B, why, 1.0)])
    return SimpleNamespace(request=SimpleNamespace(request_id=request_id), breakdown=breakdown, over=False)


def test_a_migration_is_counted_once_when_its_pause_is_known() -> None:
    log, heard = MoveLog(), []
    log.on_over = heard.append
    one, two, three = life("r1", Reason.LEAVES), life("r2", Reason.PRESSURE), life("r3", Reason.ASKED)
    for each in (one, two, three):
        log.begun(each)
    assert log.settle()
    assert [m.request_id for m in log] == ["r3", "r2", "r1"]
    (moved,) = one.breakdown.migrations
    moved.outcome, moved.adopted_at, moved.pulled_bytes = "done", 1.5, 700
    assert log.settle()
    assert not heard, "its first token there has not come"
    moved.pause_s = 0.03
    two.breakdown.migrations[0].outcome = "no room"
    assert log.settle()
    assert heard == [moved, two.breakdown.migrations[0]]
    three.over, three.breakdown.migrations[0].outcome = True, "stop"
    assert not log.settle()
    assert not log.settle()
    counted = {key: count for key, count in log.outcomes.items() if count}
    assert counted == {("done", "leaves"): 1, ("stayed", "pressure"): 1, ("stayed", "asked"): 1}
    assert log.pulled_bytes == 700
    assert [(m.request_id, m.took_s) for m in log] == [("r3", None), ("r2", None), ("r1", 0.5)]


def test_every_reason_is_a_word_for_metrics() -> None:
    reasons = {value for name, value in vars(Reason).items() if name.isupper()}
    log = MoveLog()
    for number, why in enumerate(sorted(reasons)):
        one = life(f"r{number}", why)
        one.breakdown.migrations[0].outcome = "no room"
        log.begun(one)
    log.settle()
    assert sorted(log.outcomes[key] for key in log.outcomes if key[0] == "stayed") == [1] * len(reasons)


def test_step_time_counts_for_the_role_that_a_worker_had_meanwhile() -> None:
    busy = BusyByRole()

    def look(role: Role, input_s: float, output_s: float) -> None:
        busy.look([(A, role.value, SimpleNamespace(input_busy_s=input_s, output_busy_s=output_s))])

    look(Role.DECODE, 100.0, 50.0)  # a router that came later charges nobody for what was before
    look(Role.DECODE, 101.0, 54.0)
    look(Role.PREFILL, 106.0, 55.0)
    assert busy.of("decode") == (1.0, 4.0)
    assert busy.of("prefill") == (5.0, 1.0)
    look(Role.PREFILL, 1.0, 1.0)  # it was restarted
    assert busy.of("prefill") == (5.0, 1.0)
