"""A rank's transport behind a pair of sockets: the same words go through, and nobody waits when the rank is gone."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.rank_link import LinkedRank, RankFailed, serve_rank
from kv_transfer.transport import AreaParts, PullFinal, PullOrder, PullOutcome, PullStatus, Slice, TransportEvent
from tests.support.kv_pool import Pool

RANK, PEER = PeerId("reader", 3, 1), PeerId("source", 9, 2)
ORDER = PullOrder(1 << 50, PEER, (3, 4), (5, 6), (7, 8), (), 2.5)
PARTS = (AreaParts(64, 128, (Slice(0, 64, 32), Slice(32, 96, 32))), AreaParts(8, 8, ()))


class There:
    """The transport in the rank's process: says what it was told."""

    name = "fake"
    last_turn = 0.0
    oldest_pull_since: float | None = None
    alive = True

    def __init__(self, peer: PeerId, config: TransportConfig, deliver: Callable[[TransportEvent], None]) -> None:
        self.made = (peer, config)
        self.deliver = deliver
        self.told: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def describe(self) -> str:
        return "a fake, läuft"

    def register(self, memory: Any) -> None:
        self.memory = memory

    def endpoint(self) -> bytes:
        return b"\x00endpoint\xff"

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *told: self.told.put((name, *told))


class Linked:
    def __init__(self) -> None:
        self.events: queue.SimpleQueue[TransportEvent] = queue.SimpleQueue()
        ours, self.theirs = socket.socketpair()
        self.pool = Pool([(4, 64), (2, 8)])
        self.rank = LinkedRank(ours, RANK, self.events.put)
        self.config = TransportConfig(pull_mode="write", pull_timeout_s=4.0)
        self.thread = threading.Thread(target=serve_rank, args=(self.theirs, self.pool.memory(), self._make))

    def _make(self, *given: Any) -> There:
        self.there = There(*given)
        return self.there

    def open(self) -> None:
        self.thread.start()
        self.rank.open(self.config)


@pytest.fixture
def linked() -> Iterator[Linked]:
    one = Linked()
    one.open()
    yield one
    one.rank.close(5.0)
    one.thread.join(5.0)
    assert not one.thread.is_alive()
    one.theirs.close()


def test_words_go_through(linked: Linked) -> None:
    rank, there = linked.rank, linked.there
    assert there.made == (RANK, linked.config)
    assert (rank.name, rank.describe(), rank.endpoint()) == ("fake", "a fake, läuft", b"\x00endpoint\xff")
    rank.connect(PEER, b"where", PARTS)
    rank.connect(replace(PEER, rank=0), b"there", None)
    rank.submit(ORDER)
    rank.abandon(ORDER.pull_id)
    rank.reachable(PEER)
    rank.disconnect(PEER)
    rank.forget(PEER)
    assert [there.told.get(timeout=5) for _ in range(7)] == [
        ("connect", PEER, b"where", PARTS),
        ("connect", replace(PEER, rank=0), b"there", None),
        ("submit", ORDER),
        ("abandon", ORDER.pull_id),
        ("reachable", PEER),
        ("disconnect", PEER),
        ("forget", PEER),
    ]
    said = [PullOutcome(ORDER.pull_id, PullStatus.ABANDONED, False, "why", 0.5), PullFinal(ORDER.pull_id)]
    for event in said:
        there.deliver(event)
    assert [linked.events.get(timeout=5) for _ in said] == said


def test_a_stamp_that_stands_still_does_so_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog takes every stamp that moves for progress; a beat takes its time."""
    monkeypatch.setattr("kv_transfer.rank_link._BEAT_EVERY_S", 0.01)
    one = Linked()
    one.open()
    try:
        one.there.last_turn, one.there.oldest_pull_since = 12.25, 11.5
        stamps, until = [(0.0, 0.0)], time.monotonic() + 10.0
        while stamps[-1] != (12.25, 11.5) and time.monotonic() < until:
            stamps.append((one.rank.last_turn, one.rank.oldest_pull_since or 0.0))
        for _ in range(5):
            time.sleep(0.02)  # a beat or two
            assert (one.rank.last_turn, one.rank.oldest_pull_since) == (12.25, 11.5)
    finally:
        one.rank.close(5.0)
        one.thread.join(5.0)
        one.theirs.close()


def test_when_the_rank_is_gone_everything_ends(linked: Linked) -> None:
    rank = linked.rank
    for number in range(3):
        rank.submit(replace(ORDER, pull_id=number))
        linked.there.told.get(timeout=5)
    linked.there.deliver(PullOutcome(0, PullStatus.ARRIVED, True))
    linked.there.deliver(PullOutcome(1, PullStatus.TIMED_OUT, False))
    assert [linked.events.get(timeout=5).pull_id for _ in range(2)] == [0, 1]
    linked.theirs.shutdown(socket.SHUT_RDWR)
    assert linked.events.get(timeout=5) == PullFinal(1)
    lost = linked.events.get(timeout=5)
    assert isinstance(lost, PullOutcome)
    assert (lost.pull_id, lost.status, lost.final) == (2, PullStatus.PEER_LOST, True)
    assert "rank 1 of this worker is gone" in lost.detail
    assert not rank.alive
    rank.submit(ORDER)
    late = linked.events.get(timeout=5)
    assert isinstance(late, PullOutcome)
    assert late.status is PullStatus.PEER_LOST


def test_a_rank_that_cannot_open_says_why() -> None:
    linked = Linked()

    def refuse(*_: Any) -> There:
        raise RuntimeError("no NIXL here")

    linked._make = refuse  # type: ignore[method-assign]
    linked.thread = threading.Thread(target=serve_rank, args=(linked.theirs, linked.pool.memory(), refuse))
    with pytest.raises(RankFailed, match="rank 1 cannot open its KV transport: no NIXL here"):
        linked.open()
    linked.thread.join(5.0)
    linked.theirs.close()
    linked.rank.close(1.0)


def test_a_rank_that_ends_before_it_opens_is_an_error_at_once() -> None:
    linked = Linked()
    linked.theirs.close()
    with pytest.raises(RankFailed, match="is gone"):
        linked.rank.open(linked.config)
    linked.rank.close(1.0)
