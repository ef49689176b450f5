"""A leg that was cancelled a moment before its worker crashed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from router.errors import Code
from router.legs import Leg, LegRole
from router.lifecycle import Life
from router.live import Live
from router.placement.cluster import Cluster
from router.placement.crashes import UNDER_WAY_S
from router.placement.policy import WorkerKey
from router.record.counts import RouterCounts
from router.request import Request, Sampling
from router.suspects import Suspects

A, B = WorkerKey("a", 1), WorkerKey("b", 1)


class Side:
    def __init__(self) -> None:
        self.now = 10.0
        self.by_leg: dict[int, Live] = {}
        self.suspects = Suspects(self.by_leg, Cluster(), RouterCounts(), self.tell, lambda: self.now)

    def tell(self, live: Live, call: Callable[[Life, float], None]) -> None:
        call(live.life, self.now)

    def live(self, *legs: Leg) -> Any:
        life: Any = SimpleNamespace(
            request=Request("r", [1], Sampling(8), 0.0, 60.0), legs=list(legs), over=False, crashes=[], emitted=[],
            failure=None, only_arrives=lambda leg: False,
        )  # fmt: skip
        life.fail = lambda failure, now: setattr(life, "failure", failure)
        made: Any = SimpleNamespace(life=life)
        self.by_leg |= {leg.number: made for leg in legs}
        return made

    def cancel(self, live: Any, leg: Leg) -> None:
        self.suspects.cancelled(leg.worker, leg.number)
        live.life.legs.remove(leg)
        del self.by_leg[leg.number]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # of crashes
    yield
    logging.disable(logging.NOTSET)


def test_its_crash_is_remembered() -> None:
    side, prefill, decode = Side(), Leg(1, LegRole.PREFILL, A), Leg(2, LegRole.DECODE, B, adopted=True)
    poison = side.live(prefill, decode)
    side.cancel(poison, prefill)
    side.now += UNDER_WAY_S / 2
    assert side.suspects.of(A, [], "reset") == {}
    assert "two workers that crashed (a, b)" in side.suspects.of(B, [2], "reset")[2]
    assert poison.life.failure is None, "whoever asked ends it with its leg"


def test_the_second_crash_ends_what_runs_elsewhere() -> None:
    side, decode, prefill = Side(), Leg(1, LegRole.DECODE, B, adopted=True), Leg(2, LegRole.PREFILL, A)
    poison = side.live(decode, prefill)
    assert side.suspects.of(B, [1], "reset") == {}
    side.cancel(poison, prefill)
    side.suspects.of(A, [], "reset")
    assert poison.life.failure.code is Code.INTERNAL
    assert "two workers that crashed (b, a)" in poison.life.failure.message


@pytest.mark.parametrize("why", ["long ago", "elsewhere", "over", "waited"])
def test_who_was_not_there(why: str) -> None:
    leg = Leg(1, LegRole.DECODE, A, adopted=why != "waited")
    side = Side()
    one = side.live(leg)
    side.cancel(one, leg)
    side.now += UNDER_WAY_S * 1.1 if why == "long ago" else 0.0
    one.life.over = why == "over"
    side.suspects.of(B if why == "elsewhere" else A, [], "reset")
    assert one.life.crashes == []


def test_a_leg_there_and_one_that_was_are_one_suspect() -> None:
    side, before, again = Side(), Leg(1, LegRole.PREFILL, A), Leg(2, LegRole.DECODE, A, adopted=True)
    one = side.live(before, again)
    side.cancel(one, before)
    assert side.suspects.of(A, [2], "reset") == {}
    assert len(one.life.crashes) == 1
