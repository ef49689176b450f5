"""Who is given up after a crash, and who goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from router.clients import is_crash
from router.placement import crashes
from router.placement.crashes import FORGOTTEN_AFTER_S, Crash, came_back, why_given_up
from router.placement.policy import WorkerKey

A, B, C = WorkerKey("a", 1), WorkerKey("b", 1), WorkerKey("c", 1)


@dataclass
class One:
    emitted: list[int] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)


def crashed(worker: WorkerKey, batch: list[One], now: float, alive: bool = False) -> list[One]:
    return crashes.crashed(worker, batch, now, lambda crash: alive)


def test_a_first_crash_costs_nobody_anything() -> None:
    batch = [One(), One([1, 2])]
    assert crashed(A, batch, 0.0) == []
    assert [c.crashes for c in batch] == [[Crash(A, 0.0, 0)], [Crash(A, 0.0, 2)]]


def test_who_got_no_token_between_two_crashes_is_given_up_alone() -> None:
    poison, bystander, newcomer = One([1]), One([1, 2]), One()
    crashed(A, [poison, bystander], 0.0)
    bystander.emitted.append(3)
    assert crashed(B, [newcomer, bystander, poison], 1.0) == [poison]
    assert "two workers that crashed (a, b)" in why_given_up(poison)


def test_where_all_got_tokens_all_that_were_in_both_are_given_up() -> None:
    poison, bystander, newcomer = One(), One(), One()
    crashed(A, [poison, bystander], 0.0)
    poison.emitted.append(1)
    bystander.emitted.append(1)
    assert crashed(B, [poison, bystander, newcomer], 1.0) == [poison, bystander]


def test_a_third_crash_is_nobody_s() -> None:
    guilty, stuck = One(), One()
    crashed(A, [guilty, stuck], 0.0)
    guilty.emitted.append(1)
    assert crashed(B, [guilty, stuck], 1.0) == [stuck]
    guilty.emitted.append(2)
    assert crashed(C, [guilty, One()], 2.0) == [guilty]


def test_a_crash_is_forgotten_in_time_and_taken_back_when_the_worker_answers_again() -> None:
    one = One()
    crashed(A, [one], 0.0)
    assert crashed(B, [one], FORGOTTEN_AFTER_S + 1.0) == []
    came_back(B, [one])
    assert crashed(C, [one], FORGOTTEN_AFTER_S + 2.0) == []
    came_back(WorkerKey("c", 2), [one])
    assert crashed(A, [one], FORGOTTEN_AFTER_S + 3.0) == [one], "another incarnation of it is not it"


def test_a_reader_may_hear_first_that_a_source_is_gone() -> None:
    poison, other = One(crashes=[Crash(A, 0.0, 0, hearsay=True)]), One(crashes=[Crash(A, 0.0, 0, hearsay=True)])
    assert crashed(A, [poison], 0.1) == [], "it is the same crash"
    assert crashed(B, [poison], 0.2) == [poison]
    assert crashed(B, [other], 0.2, alive=True) == [], "only the path between the two was cut"


@pytest.mark.parametrize(
    ("why", "crash"),
    [
        ("UNAVAILABLE: Socket closed", True),
        ("its stream ended: UNAVAILABLE recvmsg:Connection reset by peer", True),
        ("its stream ended: UNAVAILABLE worker d0 broke: RuntimeError: device lost", True),
        ("UNAVAILABLE: ping timeout", False),
        ("UNAVAILABLE: keepalive watchdog timeout", False),
        ("UNAVAILABLE: recvmsg:Connection timed out", False),
        ("no heartbeat and no message for 5 s", False),
        ("RESOURCE_EXHAUSTED: the router did not read 100000 tokens; its sequences are cancelled", False),
        ("INVALID_ARGUMENT: buffer size must be a multiple of element size", False),
        ("internal error: ValueError()", False),
        ("a later incarnation registered", False),
    ],
)
def test_a_crash_is_told_from_silence(why: str, crash: bool) -> None:
    assert is_crash(why) is crash
