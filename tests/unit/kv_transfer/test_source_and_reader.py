"""The handoff protocol, both sides, one message at a time."""

from __future__ import annotations

import pytest

from engine.block_pool import BlockPool
from kv_transfer.handoff import (
    BlocksAnnounced,
    FinalAnnounced,
    Follow,
    PeerId,
    RefusalReason,
    Refused,
    Release,
    Renew,
    Room,
)
from kv_transfer.reader import HandoffBroken, HandoffCaughtUp, HandoffComplete, HandoffReader, NeedBlocks, Running
from kv_transfer.source import HandoffSource
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, PullStatus

P, D, D2 = PeerId("p", 1), PeerId("d", 1), PeerId("d2", 1)


class SourceSide:
    def __init__(self, **options: float) -> None:
        self.pool = BlockPool(16)
        values = {"lease_s": 10.0, "max_leases": 8, "max_leased_blocks": 10, "follow_wait_s": 5.0} | options
        self.source = HandoffSource(self.pool, **values)  # type: ignore[arg-type]

    def said(self) -> list[object]:
        return [m for _, m in self.source.take_messages()]

    def serve(self, handoff_id: str, count: int, now: float = 0.0) -> list[int]:
        """Open, announce `count` blocks, finish; the sequence lets go of its blocks."""
        assert self.source.open(handoff_id, now) is None
        blocks = self.pool.allocate(count) or []
        assert self.source.announce(handoff_id, 0, blocks, now) is None
        self.source.finish(handoff_id, count * 4, (7,), now)
        self.pool.unpin(blocks)
        return blocks


def test_a_follower_hears_everything_whenever_it_comes() -> None:
    for when in ("before", "between", "after"):
        s = SourceSide()
        if when == "before":
            s.source.on_message(D, Follow("h"), 0.0)
        s.source.open("h", 0.0)
        blocks = s.pool.allocate(2) or []
        s.source.announce("h", 0, blocks[:1], 0.0)
        if when == "between":
            s.source.on_message(D, Follow("h"), 0.0)
        s.source.announce("h", 1, blocks[1:], 0.0)
        s.source.finish("h", 8, (7,), 0.0)
        if when == "after":
            s.source.on_message(D, Follow("h"), 0.0)
        announced, final = [], []
        for message in s.said():
            (announced if isinstance(message, BlocksAnnounced) else final).append(message)
        assert [b for a in announced for b in a.block_ids] == blocks
        assert final == [FinalAnnounced("h", 8, (7,))]


def test_release_frees_and_the_end_is_remembered() -> None:
    s = SourceSide()
    s.serve("h", 2)
    s.source.on_message(D, Follow("h"), 0.0)
    s.said()
    s.source.on_message(D, Release("h", adopted=True), 1.0)
    assert s.pool.is_idle()
    assert s.source.is_idle()
    assert s.source.released_total == 1
    s.source.on_message(D2, Follow("h"), 2.0)
    assert s.said() == [Refused("h", RefusalReason.CANCELLED, "the handoff was released")]


def test_a_silent_reader_loses_the_lease_and_a_renewing_one_does_not() -> None:
    s = SourceSide()
    s.serve("h", 2)
    s.source.on_message(D, Follow("h"), 0.0)
    s.said()
    s.source.on_message(D, Renew("h"), 8.0)
    s.source.tick(12.0)
    assert s.said() == []
    assert s.source.next_deadline() == 18.0
    s.source.tick(18.0)
    (refused,) = s.said()
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.EXPIRED
    assert s.pool.is_idle()


def test_only_the_follower_may_release() -> None:
    s = SourceSide()
    s.serve("h", 2)
    s.source.on_message(D, Follow("h"), 0.0)
    s.source.on_message(D2, Release("h", adopted=True), 1.0)
    assert s.source.active_leases == 1


def test_the_lease_can_be_given_to_another_reader() -> None:
    s = SourceSide()
    blocks = s.serve("h", 2)
    s.source.on_message(D, Follow("h"), 0.0)
    s.said()
    s.source.on_reader_lost(D, 1.0)
    s.source.on_message(D2, Follow("h"), 2.0)
    said = s.source.take_messages()
    assert [p for p, _ in said] == [D2, D2]
    assert said[0][1].block_ids == tuple(blocks)  # type: ignore[union-attr]


def test_an_unknown_handoff_is_refused_after_a_while() -> None:
    s = SourceSide()
    s.source.on_message(D, Follow("never"), 0.0)
    s.source.tick(4.9)
    assert s.said() == []
    s.source.tick(5.0)
    (refused,) = s.said()
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.UNKNOWN_HANDOFF


def test_leases_are_bounded_and_the_refusal_ends_the_handoff() -> None:
    s = SourceSide()
    s.source.open("h", 0.0)
    s.source.on_message(D, Follow("h"), 0.0)
    blocks = s.pool.allocate(11) or []
    refused = s.source.announce("h", 0, blocks, 0.0)
    assert refused is not None
    assert s.said() == [refused]
    assert s.source.is_idle()
    s.pool.unpin(blocks)
    assert s.pool.is_idle()


def test_a_handoff_id_is_used_once() -> None:
    s = SourceSide()
    s.serve("h", 1)
    assert s.source.open("h", 0.0) is not None
    s.source.on_message(D, Follow("h"), 0.0)
    s.source.on_message(D, Release("h", adopted=True), 0.0)
    assert s.source.open("h", 0.0) is not None


class ReaderSide:
    def __init__(self, **options: float) -> None:
        self.pool = BlockPool(16)
        self.orders: list[PullOrder] = []
        self.abandoned: list[int] = []
        values = {
            "block_bytes": 64,
            "pull_timeout_s": 5.0,
            "announce_timeout_s": 20.0,
            "renew_every_s": 3.0,
            "max_blocks_per_pull": 2,
            "max_quarantined_blocks": 4,
        } | options
        self.reader = HandoffReader(self.pool, self.orders.append, self.abandoned.append, **values)  # type: ignore[arg-type]

    def begin(self, blocks: int = 3, skip: int = 0) -> list[int]:
        """Follow, first announcement, room."""
        self.reader.begin(1, "h", P, 12, deadline=100.0, now=0.0)
        assert self.reader.take_messages() == [(P, Follow("h"))]
        self.announce(0, 1)
        assert self.reader.take_events() == [NeedBlocks(1)]
        table = self.pool.allocate(blocks) or []
        self.reader.provide(1, [Room(tuple(table), 0, skip)], 0.0)
        return table

    def announce(self, first: int, count: int, generation: int = 5) -> None:
        ids = tuple(range(first, first + count))
        self.reader.on_message(P, BlocksAnnounced("h", first, ids, (generation,) * count), 0.0)

    def final(self, now: float = 1.0) -> None:
        self.reader.on_message(P, FinalAnnounced("h", 12, (7,)), now)

    def arrive(self, at: int, status: PullStatus = PullStatus.ARRIVED, *, final: bool = True) -> None:
        self.reader.on_transport(PullOutcome(self.orders[at].pull_id, status, final, "", 0.1), 2.0)

    def broken(self) -> HandoffBroken:
        (event,) = self.reader.take_events()
        assert isinstance(event, HandoffBroken)
        return event


def test_blocks_are_pulled_as_announced_and_adopted_when_all_arrived() -> None:
    r = ReaderSide()
    table = r.begin()
    r.announce(1, 2)
    assert [o.local_blocks for o in r.orders] == [(table[0],), (table[1], table[2])]
    assert [o.generations for o in r.orders] == [(5,), (5, 5)]
    r.arrive(0)
    r.final(now=1.0)
    assert r.reader.take_events() == []
    r.arrive(1)
    (complete,) = r.reader.take_events()
    assert complete == HandoffComplete(1, 12, (7,), (), 3 * 64, pytest.approx(1 / 3), pytest.approx(1000.0))
    assert r.reader.take_messages() == [(P, Release("h", adopted=True))]
    assert r.reader.is_idle()
    r.pool.unpin(table)
    assert r.pool.is_idle()


def test_what_the_own_cache_has_is_not_pulled() -> None:
    r = ReaderSide()
    table = r.begin(blocks=3, skip=2)
    assert r.orders == []
    r.announce(1, 2)
    assert [o.local_blocks for o in r.orders] == [(table[2],)]
    assert [o.remote_blocks for o in r.orders] == [(2,)]


def test_a_whole_cached_prompt_pulls_nothing() -> None:
    r = ReaderSide()
    r.begin(blocks=1, skip=1)
    r.final()
    (complete,) = r.reader.take_events()
    assert isinstance(complete, HandoffComplete)
    assert complete.pulled_bytes == 0


@pytest.mark.parametrize(
    "status",
    [
        PullStatus.FENCED,
        PullStatus.DIGEST_MISMATCH,
        PullStatus.TIMED_OUT,
        PullStatus.PEER_LOST,
        PullStatus.TRANSPORT_ERROR,
    ],
)
def test_a_bad_pull_breaks_the_handoff_and_keeps_what_was_verified(status: PullStatus) -> None:
    r = ReaderSide()
    table = r.begin()
    r.announce(1, 2)
    r.arrive(0)
    r.arrive(1, status)
    broken = r.broken()
    assert broken.reason == status.value
    assert broken.kept_blocks == 1
    assert r.reader.take_messages() == [(P, Release("h", adopted=False))]
    assert r.reader.is_idle()
    r.pool.unpin(table)
    assert r.pool.is_idle()


def test_blocks_of_an_abandoned_pull_stay_pinned_until_it_is_final() -> None:
    r = ReaderSide()
    table = r.begin()
    r.announce(1, 2)
    r.reader.cancel(1, 1.0)
    assert r.abandoned == [o.pull_id for o in r.orders]
    r.pool.unpin(table)  # the sequence lets go
    assert r.reader.quarantined_blocks == 3
    assert r.pool.free_blocks == 13, "bytes may still land in them"
    r.arrive(0, PullStatus.ABANDONED, final=False)
    assert r.reader.quarantined_blocks == 3
    r.reader.on_transport(PullFinal(r.orders[0].pull_id), 2.0)
    r.arrive(1, PullStatus.ABANDONED, final=True)
    assert r.reader.quarantined_blocks == 0
    assert r.pool.is_idle()
    assert r.reader.is_idle()


def test_a_full_quarantine_takes_no_new_handoff() -> None:
    r = ReaderSide(max_quarantined_blocks=2)
    r.begin()
    r.announce(1, 2)
    r.reader.cancel(1, 1.0)
    r.reader.take_messages()
    r.reader.begin(2, "h2", P, 12, 100.0, 1.0)
    assert r.broken().reason == "no_room"


def test_refusal_loss_and_deadline_break_it() -> None:
    for trouble, reason in (
        (lambda r: r.reader.on_message(P, Refused("h", RefusalReason.EXPIRED, "x"), 1.0), "expired"),
        (lambda r: r.reader.on_source_lost(P, "gone", 1.0), "peer_lost"),
        (lambda r: r.reader.tick(100.0), "timeout"),
        (lambda r: r.reader.tick(20.0), "timeout"),
    ):
        r = ReaderSide()
        r.begin()
        trouble(r)
        assert r.broken().reason == reason
        r.reader.check()


def test_waiting_in_the_sources_queue_is_no_silence() -> None:
    r = ReaderSide()
    r.reader.begin(1, "h", P, 12, deadline=100.0, now=0.0)
    r.reader.tick(50.0)
    assert r.reader.take_events() == []
    assert (P, Renew("h")) in r.reader.take_messages()


def test_a_stranger_and_a_dead_incarnation_are_not_believed() -> None:
    r = ReaderSide()
    r.begin()
    r.reader.on_message(PeerId("p", 2), FinalAnnounced("h", 12, (9,)), 1.0)
    r.arrive(0)
    assert r.reader.take_events() == []


def test_fewer_blocks_than_the_prompt_needs_is_an_error_not_an_answer() -> None:
    r = ReaderSide()
    r.begin(blocks=3)
    r.arrive(0)
    r.final()
    assert r.broken().reason == "transport_error"


def test_what_a_running_sequence_has_left_may_be_announced_once_more() -> None:
    """After a reconnect, or a follow that came twice; and at the edge of a chunk nothing more is needed at all."""
    r = ReaderSide()
    running = Running(8, lambda tokens: [range(tokens // 4, tokens // 4)])
    r.reader.begin(1, "h", P, 24, 100.0, 0.0, running)
    r.announce(0, 1)
    table = r.pool.allocate(6) or []
    r.reader.provide(1, [Room(tuple(table), 0, 0)], 0.0)
    r.announce(3, 1)  # it has left those between
    for first in (0, 3):
        r.announce(first, 1)
    for n in range(len(r.orders)):
        r.arrive(n)
    r.reader.on_message(P, FinalAnnounced("h", 20, (7,)), 1.0)
    events = r.reader.take_events()
    assert [type(e) for e in events] == [NeedBlocks, HandoffCaughtUp, HandoffComplete]


def test_the_lease_of_a_running_sequence_says_what_room_it_has() -> None:
    s = SourceSide()
    assert s.source.open("h", 0.0) is None
    assert s.source.announce("h", 0, s.pool.allocate(9) or [], 0.0) is None
    assert s.source.promise("h", 1)
    assert not s.source.promise("h", 2)
    assert not s.source.followed("h")
    s.source.on_message(D, Follow("h"), 0.0)
    assert s.source.followed("h")
