"""N talks with N-1 and N+1; further apart, the first word says what to do."""

from __future__ import annotations

import pytest
from diptych.v1 import handoff_pb2, worker_pb2

from router.errors import Code, RequestRefused
from router.wire import info_from_wire
from settings.versions import OLDEST_PROTOCOL, OURS, PROTOCOL, Speaks, spoken


def test_neighbours_understand_each_other_and_others_are_told_what_to_do() -> None:
    for ours in range(1, 5):
        for theirs in range(1, 5):
            why = Speaks(ours, ours - 1).why_not(Speaks(theirs, theirs - 1), "this router", "worker p-0")
            assert bool(why) == (abs(ours - theirs) > 1)
            assert not why or "upgrade one version at a time" in why
    assert (
        Speaks(4, 3)
        .why_not(Speaks(1, 0), "this router", "worker p-0")
        .startswith("worker p-0 speaks protocol 1 and this router understands 3 to 4;")
    )
    assert (
        Speaks(1, 0)
        .why_not(Speaks(4, 3), "this router", "worker p-0")
        .startswith("this router speaks protocol 1 and worker p-0 understands 3 to 4;")
    )


def test_what_we_speak_and_what_says_nothing() -> None:
    assert (PROTOCOL - OLDEST_PROTOCOL) == 1
    assert spoken(handoff_pb2.PeerHello()) == Speaks(0, 0)
    assert not OURS.why_not(spoken(worker_pb2.ConnectRequest()), "a", "b") or PROTOCOL > 1


def test_a_worker_of_another_time_is_refused_when_it_registers() -> None:
    request = worker_pb2.RegisterRequest(
        worker_id="p-0", protocol=PROTOCOL + 2, oldest_protocol=PROTOCOL + 1, role=worker_pb2.RegisterRequest().role
    )
    with pytest.raises(RequestRefused, match="worker p-0 understands") as error:
        info_from_wire(request)
    assert error.value.failure.code is Code.FAILED_PRECONDITION
