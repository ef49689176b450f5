"""Nothing is timed beside an engine that still computes; a machine that is busy with others is told, not waited for."""

from __future__ import annotations

import os
import re

import pytest

from benchmarks.rest import QUIET_S, REST_S, NotAtRest, Rest, session_cpu_s


class Machine:
    """Virtual time. `engine` uses `share` processors until `rests_at`; a spin loop gets `speed`."""

    def __init__(self, share: float, rests_at: float, speed: float = 100.0) -> None:
        self.now, self.share, self.rests_at, self.free_speed = 0.0, share, rests_at, speed

    def rest(self) -> Rest:
        return Rest(2, {"engine": self.cpu_s, "ours": lambda: 0.0}, self.speed, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def cpu_s(self) -> float:
        return self.share * min(self.now, self.rests_at)

    def speed(self, threads: int) -> float:
        return self.free_speed


def test_a_turn_begins_when_the_engine_before_has_come_to_rest() -> None:
    machine = Machine(share=1.0, rests_at=2.0)
    rest = machine.rest()
    rest.wait()
    assert 2.0 <= machine.now < 3.0
    rest.wait()
    assert rest.proof() == {
        "turns": 2,
        "waited_s_longest": pytest.approx(machine.now - 0.3, abs=0.01),
        "busy_share_largest": {"engine": 0.0, "ours": 0.0},
        "spin_speed_least": 1.0,
        "disturbed_turns": 0,
    }


def test_an_engine_that_never_rests_ends_the_benchmark_by_name() -> None:
    machine = Machine(share=0.7, rests_at=1e9)
    with pytest.raises(NotAtRest, match=r"30 s after the last turn engine uses 0\.70 processors"):
        machine.rest().wait()
    assert machine.now < REST_S + 1


def test_a_machine_that_others_use_is_counted() -> None:
    machine = Machine(share=0.0, rests_at=0.0)
    rest = machine.rest()
    machine.free_speed = 50.0
    rest.wait()
    assert QUIET_S <= machine.now < QUIET_S + 1
    assert (rest.proof()["disturbed_turns"], rest.proof()["spin_speed_least"]) == (1, 0.5)
    machine.free_speed = 200.0  # busy when we began: this is its quiet speed
    rest.wait()
    assert rest.quiet == 200.0
    assert re.search(r"at rest before 2 of 2 turns .* machine quiet before 1 ", rest.summary())


def test_a_sessions_time_is_that_of_its_processes() -> None:
    ours = session_cpu_s(os.getsid(0))
    assert ours > 0
    assert session_cpu_s(2**22 + 1) == 0.0
