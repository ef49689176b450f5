"""One order to many ranks, and one outcome of them."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kv_transfer.handoff import PeerId
from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.ranked import RankedTransport, pack_endpoints, unpack_endpoints
from kv_transfer.transport import KvArea, KvMemory, Parts, PullFinal, PullOrder, PullOutcome, PullStatus, TransportEvent

SOURCE, READER = PeerId("source", 1), PeerId("reader", 1)
LAYOUT = KvLayout(
    "model",
    4,
    (Group(FULL, (0, 1), 4, 2, "float32"), Group(Rule(values=4), (2,), 1, 6, "float32")),
)
ARRIVED = PullStatus.ARRIVED


class Rank:
    """Does nothing by itself."""

    name = "fake"
    alive = True
    last_turn = 5.0
    oldest_pull_since: float | None = None

    def __init__(self, number: int) -> None:
        self.number = number
        self.orders: list[PullOrder] = []
        self.abandoned: list[int] = []
        self.peers: dict[PeerId, Parts | None] = {}
        self.said: list[tuple[str, PeerId]] = []

    def describe(self) -> str:
        return "fake"

    def register(self, memory: KvMemory) -> None:
        assert self.number == 0

    def endpoint(self) -> bytes:
        return b"rank %d" % self.number

    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None:
        assert peer in self.peers or endpoint == b"rank %d" % peer.rank
        self.peers[peer] = parts

    def disconnect(self, peer: PeerId) -> None:
        self.said.append(("disconnect", peer))

    def reachable(self, peer: PeerId) -> None:
        self.said.append(("reachable", peer))

    def forget(self, peer: PeerId) -> None:
        self.said.append(("forget", peer))

    def submit(self, order: PullOrder) -> None:
        self.orders.append(order)

    def abandon(self, pull_id: int) -> None:
        self.abandoned.append(pull_id)

    def close(self, timeout_s: float) -> None:
        self.said.append(("close", READER))


class World:
    def __init__(self, reader: int, source: int) -> None:
        self.events: list[TransportEvent] = []
        self.transport = RankedTransport(READER, LAYOUT, reader, self.events.append)
        self.ranks = [Rank(number) for number in range(reader)]
        areas = (KvArea(4096, 64, 8), KvArea(8192, 64, 4))
        memory = KvMemory(areas, "cpu", np.zeros(12, dtype=np.uint64), lambda _: memoryview(b""))
        self.transport.attach(self.ranks, memory)
        self.transport.connect(SOURCE, pack_endpoints([b"rank %d" % number for number in range(source)]))

    def order(self, blocks: tuple[int, ...] = (1, 2), **changes: Any) -> PullOrder:
        order = PullOrder(7, SOURCE, blocks, blocks, tuple(9 for _ in blocks), (), 3.0)
        order = replace(order, **changes)
        self.transport.submit(order)
        return order

    def pending(self) -> list[tuple[int, PullOrder]]:
        found = [(rank.number, order) for rank in self.ranks for order in rank.orders]
        for rank in self.ranks:
            rank.orders.clear()
        return found

    def end(self, rank: int, order: PullOrder, status: PullStatus = ARRIVED, **options: Any) -> None:
        self.transport.hear(rank, PullOutcome(order.pull_id, status, options.pop("final", True), **options))


def test_endpoints_name_every_rank_and_one_alone_is_as_it_is() -> None:
    assert pack_endpoints([b"one"]) == b"one"
    assert unpack_endpoints(b"one") == [b"one"]
    for endpoints in ([b"a", b""], [b"a" * 1000, b"b", b"cc", b"d"]):
        assert unpack_endpoints(pack_endpoints(endpoints)) == endpoints


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"dptranks", "header"),
        (b"dptranks" + struct.pack("<I", 1), "of 1 ranks"),
        (b"dptranks" + struct.pack("<I", 1 << 31), "ranks; expected"),
        (pack_endpoints([b"aaaa", b"bbbb"])[:-1], "within rank 1"),
        (pack_endpoints([b"aaaa", b"bbbb"])[:-6], "before rank 1"),
        (pack_endpoints([b"aaaa", b"bbbb"]) + b"!", "followed by 1 bytes"),
    ],
)
def test_an_endpoint_that_cannot_be_one_says_why(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        unpack_endpoints(data)


def test_between_workers_of_one_rank_everything_passes_through_as_it_is() -> None:
    world = World(1, 1)
    order = world.order(digests=(1, 2))
    ((rank, seen),) = world.pending()
    assert rank == 0
    assert seen is order
    assert world.ranks[0].peers == {SOURCE: None}
    events = [PullOutcome(7, PullStatus.TIMED_OUT, False, "late"), PullFinal(7)]
    for event in events:
        world.transport.hear(0, event)
    assert world.events == events
    world.transport.abandon(7)
    assert world.ranks[0].abandoned == [7]


def test_each_rank_pulls_from_those_that_hold_what_it_needs_and_the_fence_comes_last() -> None:
    world = World(2, 4)
    world.order((1, 2, 9))  # two blocks of heads, one of the latent group
    data = world.pending()
    pairs = {(rank, order.source.rank): order for rank, order in data}
    of_heads = {pair for pair, order in pairs.items() if {1, 2} <= set(order.local_blocks)}
    assert of_heads == {(0, 0), (0, 1), (1, 2), (1, 3)}
    latent = [(rank, order.source.rank) for rank, order in data if 9 in order.local_blocks]
    assert [rank for rank, _ in latent] == [0, 1], "from one rank each"
    assert all(order.generations == () and order.timeout_s == 3.0 for _, order in data)
    for rank, order in data:
        assert world.events == []
        world.end(rank, order, duration_s=0.25)
    ((rank, fence),) = world.pending()
    assert (rank, fence.source, fence.local_blocks) == (0, SOURCE, ())
    assert (fence.remote_blocks, fence.generations) == ((1, 2, 9), (9, 9, 9))
    world.end(rank, fence, duration_s=0.01)
    assert world.events == [PullOutcome(7, ARRIVED, True, "", 0.25)]


def test_a_failed_fence_fails_all_of_it() -> None:
    world = World(1, 2)
    world.order()
    for rank, order in world.pending():
        world.end(rank, order)
    ((rank, fence),) = world.pending()
    world.end(rank, fence, PullStatus.FENCED, detail="block 1 is at generation 10, not 9")
    (event,) = world.events
    assert isinstance(event, PullOutcome)
    assert (event.status, event.final) == (PullStatus.FENCED, True)
    assert "generation 10" in event.detail


def test_the_first_failure_is_the_orders_at_once_and_final_when_all_are() -> None:
    world = World(2, 4)
    world.order()
    data = world.pending()
    (rank, failed), *others = data
    world.end(rank, failed, PullStatus.PEER_LOST, detail="gone")
    (event,) = world.events
    assert isinstance(event, PullOutcome)
    assert (event.status, event.final) == (PullStatus.PEER_LOST, False)
    assert event.detail == f"rank {rank} from rank {failed.source.rank}: gone"
    abandoned = [pull_id for one in world.ranks for pull_id in one.abandoned]
    assert sorted(abandoned) == sorted(order.pull_id for _, order in others)
    for other, order in others[:-1]:
        world.end(other, order, PullStatus.ABANDONED, final=False)
        world.transport.hear(other, PullFinal(order.pull_id))
    assert len(world.events) == 1, "one rank may still be written to"
    other, order = others[-1]
    world.end(other, order)
    assert world.events[1:] == [PullFinal(7)]
    assert world.pending() == [], "no fence of what has failed"


def test_what_does_not_count_changes_nothing() -> None:
    """An outcome of another rank, a second one, one of nobody: late words are counted."""
    world = World(2, 4)
    world.order()
    (rank, first), *others = world.pending()
    world.end(1 - rank, first)
    world.end(rank, replace(first, pull_id=(1 << 48) + 1000))
    assert world.transport.strays == 2
    world.end(rank, first)
    world.end(rank, first)
    assert world.transport.strays == 3
    assert world.events == []
    for other, order in others[:-1]:
        world.end(other, order)
    assert world.pending() == [], "one is still to come"
    world.end(*others[-1])
    assert len(world.pending()) == 1


def test_an_order_that_is_given_up_ends_at_once() -> None:
    world = World(1, 2)
    world.order()
    data = world.pending()
    world.transport.abandon(7)
    world.transport.abandon(7)
    assert world.events == [PullOutcome(7, PullStatus.ABANDONED, False)]
    for rank, order in data:
        world.end(rank, order, PullStatus.ABANDONED)
    assert world.events[1:] == [PullFinal(7)]


def test_a_probe_takes_every_way_that_a_pull_would() -> None:
    world = World(2, 4)
    world.order((), generations=())
    data = world.pending()
    assert {(rank, order.source.rank) for rank, order in data} >= {(0, 0), (0, 1), (1, 2), (1, 3)}
    for rank, order in data:
        assert (order.remote_blocks, order.local_blocks) == ((), ())
        world.end(rank, order)
    assert world.events == [PullOutcome(7, ARRIVED, True)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"digests": (1, 2)}, "turn transport.digest off"),
        ({"local_blocks": (1, 12)}, "out of range"),
        ({"local_blocks": (1,)}, "1 blocks for 2"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], why: str) -> None:
    world = World(2, 1)
    world.order(**changes)
    (event,) = world.events
    assert isinstance(event, PullOutcome)
    assert (event.status, event.final) == (PullStatus.TRANSPORT_ERROR, True)
    assert why in event.detail
    assert world.pending() == []


def test_a_stranger_is_the_leaders_to_refuse() -> None:
    world = World(2, 2)
    order = world.order(source=PeerId("nobody", 1))
    ((rank, seen),) = world.pending()
    assert (rank, seen) == (0, order)


def test_the_ranks_of_a_peer_are_fixed_when_it_is_met(caplog: pytest.LogCaptureFixture) -> None:
    world = World(2, 4)
    agreed = [dict(rank.peers) for rank in world.ranks]
    assert all(len(peers) == 4 for peers in agreed)
    world.transport.connect(SOURCE, pack_endpoints([b"rank 0", b"rank 1"]))
    assert "it had 4 ranks before, and now 2" in caplog.text
    world.transport.connect(SOURCE, pack_endpoints([b"rank %d" % number for number in range(4)]))
    assert [rank.peers for rank in world.ranks] == agreed
    for call in (world.transport.disconnect, world.transport.reachable, world.transport.forget):
        call(SOURCE)
    for rank in world.ranks:
        assert rank.said == [
            (word, replace(SOURCE, rank=number))
            for word in ("disconnect", "reachable", "forget")
            for number in range(4)
        ]


def test_readers_of_one_source_do_not_all_read_from_its_first_rank() -> None:
    """Of what every rank has."""
    firsts = set()
    for number in range(40):
        events: list[TransportEvent] = []
        transport = RankedTransport(PeerId(f"reader-{number}", 1), LAYOUT, 1, events.append)
        rank = Rank(0)
        memory = KvMemory((KvArea(4096, 64, 8),), "cpu", np.zeros(8, dtype=np.uint64), lambda _: memoryview(b""))
        transport.attach([rank], memory)
        transport.connect(SOURCE, pack_endpoints([b"rank %d" % one for one in range(4)]))
        firsts |= {peer.rank for peer, parts in rank.peers.items() if parts is not None and parts[1].slices}
    assert firsts == {0, 1, 2, 3}


def test_the_watchdog_sees_the_worst_of_the_ranks() -> None:
    world = World(2, 1)
    world.ranks[1].last_turn, world.ranks[1].oldest_pull_since = 3.0, 2.0
    assert (world.transport.last_turn, world.transport.oldest_pull_since) == (3.0, 2.0)
    world.ranks[1].alive = False
    assert not world.transport.alive
    world.transport.close(1.0)
    assert [rank.said for rank in world.ranks] == [[("close", READER)]] * 2
