"""A path's state, by what pulls and probes do."""

from __future__ import annotations

import itertools

import pytest

from kv_transfer.handoff import PeerId
from kv_transfer.paths import PathMonitor, PathState
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, PullStatus

P = PeerId("p", 1)


class Watched:
    def __init__(self) -> None:
        self.orders: list[PullOrder] = []
        self.monitor = PathMonitor(self.orders.append, itertools.count(1))
        self.monitor.attached(P, 0.0)

    @property
    def state(self) -> PathState:
        (path,) = self.monitor.paths()
        return path.state

    def probe(self, status: PullStatus, now: float, *, final: bool = True) -> PullOrder:
        """The next probe is due by `now`, and ends so."""
        self.monitor.tick(now)
        order = self.orders.pop()
        assert self.monitor.on_transport(PullOutcome(order.pull_id, status, final, "because", 0.002), now)
        return order


def test_an_idle_path_is_probed_by_pulls_of_nothing() -> None:
    w = Watched()
    assert w.state is PathState.UNPROVEN
    order = w.probe(PullStatus.ARRIVED, 0.0)
    assert (order.source, order.local_blocks, order.remote_blocks) == (P, (), ())
    assert w.state is PathState.OK
    w.monitor.tick(0.5)
    assert w.orders == [], "not before it is due"
    assert w.monitor.next_deadline() == 1.0
    w.monitor.observe(P, PullOutcome(99, PullStatus.ARRIVED, True, "", 0.1), 0.9)
    w.monitor.tick(1.5)
    assert w.orders == [], "a pull that arrived says as much as a probe"


def test_two_failures_break_a_path_and_two_successes_mend_it() -> None:
    w = Watched()
    w.probe(PullStatus.ARRIVED, 0.0)
    w.probe(PullStatus.TIMED_OUT, 1.0)
    assert w.state is PathState.OK, "once is no pattern"
    w.probe(PullStatus.TIMED_OUT, 1.3)
    assert w.state is PathState.BROKEN
    (path,) = w.monitor.paths()
    assert (path.failures, path.detail) == (2, "timeout: because")
    w.probe(PullStatus.ARRIVED, 2.6)
    assert w.state is PathState.BROKEN
    w.probe(PullStatus.ARRIVED, 3.7)
    assert w.state is PathState.OK


@pytest.mark.parametrize("status", [PullStatus.FENCED, PullStatus.ABANDONED])
def test_what_says_nothing_about_the_path_changes_nothing(status: PullStatus) -> None:
    w = Watched()
    w.probe(PullStatus.ARRIVED, 0.0)
    for _ in range(5):
        w.monitor.observe(P, PullOutcome(99, status, True, "", 0.1), 0.5)
    assert w.state is PathState.OK


def test_a_lost_stream_breaks_the_path_until_it_is_back() -> None:
    w = Watched()
    w.probe(PullStatus.ARRIVED, 0.0)
    w.monitor.lost(P, "silent", 1.0)
    assert w.state is PathState.BROKEN
    w.monitor.tick(9.0)
    assert w.orders == [], "nobody is there"
    w.monitor.attached(P, 10.0)
    assert w.state is PathState.UNPROVEN
    w.probe(PullStatus.ARRIVED, 10.0)
    assert w.state is PathState.OK
    w.monitor.gone(P)
    assert w.monitor.paths() == ()


def test_probes_that_never_end_are_bounded() -> None:
    w = Watched()
    orders = []
    for second in range(10):
        w.monitor.tick(float(second))
        orders += w.orders
        w.orders.clear()
    assert len(orders) == 2
    for order in orders:
        w.monitor.on_transport(PullOutcome(order.pull_id, PullStatus.TIMED_OUT, False), 10.0)
    w.monitor.tick(11.0)
    assert w.orders == [], "given up is not over"
    for order in orders:
        w.monitor.on_transport(PullFinal(order.pull_id), 12.0)
    w.monitor.tick(13.0)
    assert len(w.orders) == 1


def test_other_pulls_are_not_taken_for_probes() -> None:
    w = Watched()
    assert not w.monitor.on_transport(PullOutcome(12345, PullStatus.ARRIVED, True), 0.0)
