"""When a worker counts as stuck, in virtual time: one look a second, as in production."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.watchdog import Facts, Health, Limits, Silence, Verdict, Watchdog, step_limit_s

LIMITS = Limits(step_s=20.0, transport_s=10.0, pull_timeout_s=5.0)
Change = Callable[[float], dict[str, object]]


def facts(now: float, **changes: object) -> Facts:
    """Everything came by just now."""
    return replace(Facts(True, now, None, True, now, None), **changes)  # type: ignore[arg-type]


def watch(change: Change, until: float, start: float = 100.0) -> list[Verdict]:
    dog = Watchdog(LIMITS)
    return [dog.look(start + t, facts(start + t, **change(start + t))) for t in range(int(until) + 1)]


def moments(verdicts: list[Verdict]) -> tuple[int | None, int | None]:
    """At which second it was first suspected, and first called stalled."""
    health = [v.health for v in verdicts]
    return tuple(health.index(h) if h in health else None for h in (Health.SUSPECT, Health.STALLED))  # type: ignore[return-value]


STUCK: dict[str, tuple[Change, int, str, str]] = {
    "in a step": (lambda now: {"engine_turn": 100.0, "step_since": 100.0}, 20, "engine", "inside one step for 20.0 s"),
    "between steps": (lambda now: {"engine_turn": 100.0}, 20, "engine", "has not turned for 20.0 s"),
    "in a transport call": (lambda now: {"transport_turn": 100.0}, 10, "transport", "inside one call for 10.0 s"),
    "in a transport call of a rank": (
        lambda now: {
            "transport_turn": 100.0,
            "transport_of": " of rank 1",
            "late_ranks": "rank 1 is late",
        },
        10,
        "transport",
        "thread of rank 1 is inside one call for 10.0 s, and no KV moves (rank 1 is late)",
    ),
    "a forgotten pull": (lambda now: {"oldest_pull_since": 100.0}, 15, "pulls", "10.0 s after its timeout of 5 s"),
}


@pytest.mark.parametrize("name", STUCK)
def test_a_stuck_part_is_suspected_at_half_the_limit_and_named_at_the_limit(name: str) -> None:
    change, stalled_at, part, words = STUCK[name]
    verdicts = watch(change, 30)
    suspected_at = stalled_at - (10 if part == "engine" else 5)
    assert moments(verdicts) == (suspected_at, stalled_at)
    assert verdicts[stalled_at].part == part
    assert words in verdicts[stalled_at].reason
    assert "worker." in verdicts[stalled_at].reason, "the limit's key"


@pytest.mark.parametrize("part", ["engine", "transport"])
def test_a_dead_thread_is_stalled_at_once(part: str) -> None:
    verdict = watch(lambda now: {f"{part}_alive": False}, 0)[0]
    assert (verdict.health, verdict.part) == (Health.STALLED, part)
    assert "has ended" in verdict.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda now: {"engine_turn": now - 0.5},  # idle
        lambda now: {"engine_turn": now // 9 * 9, "step_since": now // 9 * 9},  # steps of 9 s, one after the other
        lambda now: {"transport_turn": now - now % 3},  # one host after the other does not answer
        lambda now: {"oldest_pull_since": now - now % 5},  # every pull times out
    ],
    ids=["idle", "long steps", "unreachable peers", "slow pulls"],
)
def test_a_healthy_worker_is_not_even_suspected(change: Change) -> None:
    assert {v.health for v in watch(change, 3600)} == {Health.OK}


def test_a_long_step_that_ends_is_forgotten() -> None:
    def change(now: float) -> dict[str, object]:
        return {"step_since": 100.0, "engine_turn": 100.0} if now < 119 else {}

    verdicts = watch(change, 60)
    assert moments(verdicts) == (10, None)
    assert {v.health for v in verdicts[20:]} == {Health.OK}


def test_a_process_that_was_stopped_as_a_whole_goes_on() -> None:
    """An hour in SIGSTOP: all stamps are old, the watchdog's own look is as well."""
    dog = Watchdog(LIMITS)
    for now in (0.0, 1.0, 2.0):
        assert dog.look(now, facts(now, step_since=now - 0.1, oldest_pull_since=now - 0.1)).health is Health.OK
    stale = facts(2.0, step_since=1.9, oldest_pull_since=1.9)
    assert dog.look(3602.0, stale).health is Health.OK
    assert dog.look(3603.0, facts(3602.9)).health is Health.OK
    # who does not go on is found all the same
    found = [dog.look(3603.0 + t, stale).health for t in range(1, 30)]
    assert Health.STALLED in found


def test_the_worst_part_is_named() -> None:
    verdicts = watch(lambda now: {"engine_turn": 100.0, "transport_turn": 100.0}, 10)
    assert (verdicts[10].health, verdicts[10].part) == (Health.STALLED, "transport")


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=200))
def test_silence_never_exceeds_what_passed(gaps: list[float]) -> None:
    silence, now = Silence(), 0.0
    silence.look(now, 0.0)
    for gap in gaps:
        now += gap
        assert 0.0 <= silence.look(now, 0.0) <= now + 1e-6
    assert silence.look(now, now) == 0.0
    assert silence.look(now + 1, None) == 0.0


def test_a_slow_machine_gets_more_time() -> None:
    assert step_limit_s(20.0, 512, 0.0) == 20.0  # nothing measured
    assert step_limit_s(20.0, 512, 1000.0) == 20.0
    assert step_limit_s(20.0, 512, 51.2) == 40.0  # ten seconds a step
