"""Several routers as one: calls are spread, who is gone is passed over, and every call finds one."""

from __future__ import annotations

import random

import pytest
from diptych.client import Client, Retrying, addresses_of
from diptych.client._answering import Answering, RetryBudget, Trouble
from diptych.client._routers import Routers
from diptych.v1 import generate_pb2 as pb

GONE = Trouble("UNAVAILABLE", "Socket closed", by_server=False)
LEAVING = Trouble("UNAVAILABLE", "this router is leaving", by_server=True, retry_after_s=0.2)
FULL = Trouble("RESOURCE_EXHAUSTED", "overloaded", by_server=True, retry_after_s=1.0)
CANCELLED = Trouble("CANCELLED", "Locally cancelled", by_server=False)


def test_addresses_as_people_write_them() -> None:
    assert addresses_of("a:8100") == ("a:8100",)
    assert addresses_of("a:8100, b:8100") == ("a:8100", "b:8100")
    assert addresses_of(["a:8100", "b:8100,[::1]:8100", "a:8100"]) == ("a:8100", "b:8100", "[::1]:8100")
    assert addresses_of("ipv4:10.0.0.1:80,10.0.0.2:80") == ("ipv4:10.0.0.1:80,10.0.0.2:80",), "gRPC's own list"
    for wrong in ("", "a:8100,", ()):
        with pytest.raises(ValueError, match="name one router or several"):
            addresses_of(wrong)
    with pytest.raises(ValueError, match="name one router or several"):
        Client("a:8100,,b:8100")


def test_calls_go_in_turn_and_to_who_has_fewest() -> None:
    routers = Routers(3, random.Random(1))
    taken = [routers.take(0.0) for _ in range(6)]
    assert sorted(taken[:3]) == sorted(taken[3:]) == [0, 1, 2]
    routers.give_back(taken[1], None, 0.0)
    assert routers.take(0.0) == taken[1]


def test_a_router_that_left_is_passed_over_until_it_may_be_back() -> None:
    routers = Routers(2, random.Random(0))
    first = routers.take(0.0)
    assert routers.give_back(first, GONE, 0.0), "the other one may answer at once"
    other = routers.take(0.1)
    assert other != first
    assert routers.take(0.1) == other, "though it has a call already"
    assert not routers.give_back(other, LEAVING, 0.2), "nobody is left: wait"
    assert {routers.take(0.2), routers.take(0.2)} == {0, 1}, "one is asked all the same"
    assert routers.give_back(first, GONE, 2.3), "the other one may be back"


def test_what_the_caller_did_and_what_all_would_say_is_no_router_s_fault() -> None:
    routers = Routers(2, random.Random(0))
    for trouble in (FULL, CANCELLED, None):
        number = routers.take(0.0)
        assert not routers.give_back(number, trouble, 0.0)
    assert {routers.take(0.0), routers.take(0.0)} == {0, 1}


def test_an_answer_goes_on_elsewhere_without_a_pause() -> None:
    a = Answering(pb.GenerateRequest(text="hi"), 100.0, Retrying(), RetryBudget(Retrying()), random.Random(0), 0.0)
    a.attempt(0.0)
    assert a.trouble(LEAVING, 0.0, elsewhere=True) == 0.0
    assert a.trouble(GONE, 0.0) > 0.0
