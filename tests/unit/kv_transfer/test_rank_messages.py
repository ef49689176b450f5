"""What a leader and its ranks say, there and back; and what is none of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import rank_messages as m
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_messages import Asked, pack_parts, pack_request, unpack_request
from kv_transfer.transport import AreaParts, PullFinal, PullOrder, PullOutcome, PullStatus, Slice

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
PEERS = st.builds(PeerId, st.text(max_size=20), U64, st.integers(0, 63))
NUMBERS = st.lists(U64, max_size=8).map(tuple)


def slices_of(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[Slice, ...]]:
    return st.lists(st.builds(Slice, numbers, numbers, numbers), max_size=4).map(tuple)


@given(PEERS, st.binary(max_size=50), st.lists(st.builds(AreaParts, U64, U64, slices_of(U64)), max_size=3).map(tuple))
def test_a_peer_and_what_comes_from_it(peer: PeerId, endpoint: bytes, parts: tuple[AreaParts, ...]) -> None:
    data = m.of_connect(peer, endpoint, parts or None)
    assert m.to_connect(data) == (peer, endpoint, parts or None)
    for wrong in (data[:-1], data + b"!"):
        with pytest.raises((ValueError, UnicodeDecodeError)):
            m.to_connect(wrong)


@given(st.builds(PullOrder, U64, PEERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(0, 100)))
def test_an_order(order: PullOrder) -> None:
    assert m.to_order(m.of_order(order)) == order


@given(st.builds(PullOutcome, U64, st.sampled_from(PullStatus), st.booleans(), st.text(), st.floats(0, 100)))
def test_an_outcome(outcome: PullOutcome) -> None:
    framed = m.of_event(outcome)
    size, letter = m.HEAD.unpack_from(framed)
    assert (letter, size) == (m.OUTCOME, len(framed) - m.HEAD.size)
    assert m.to_outcome(framed[m.HEAD.size :]) == outcome


def test_the_rest() -> None:
    assert m.of_event(PullFinal(5)) == m.frame(m.FINAL, (5).to_bytes(8, "little"))
    for said in ((1.0, None, True), (0.5, 2.0, False)):
        assert m.to_beat(m.of_beat(*said)[m.HEAD.size :]) == said


@given(
    U64,
    U32,
    st.lists(st.tuples(U32, U32), max_size=6),
    st.lists(slices_of(U32), min_size=1, max_size=3),
)
def test_a_source_is_asked_for_parts(
    pull_id: int, slot: int, pairs: list[tuple[int, int]], slices: list[tuple[Slice, ...]]
) -> None:
    remote, local = [r for r, _ in pairs], [x for _, x in pairs]
    parts = tuple(AreaParts(1, 1, one) for one in slices)
    message = pack_parts(pull_id, slot, remote, local, parts)
    assert unpack_request(message) == Asked(pull_id, slot, remote, local, tuple(slices))
    assert unpack_request(pack_parts(pull_id, slot, remote, [], ())) == Asked(pull_id, slot, remote, [], ())
    assert unpack_request(pack_request(pull_id, slot, remote, local)) == Asked(pull_id, slot, remote, local)
    for wrong in (message[:-4], message + b"\0\0\0\0"):
        asked = unpack_request(wrong)
        assert (asked.pull_id, asked.remote, asked.local) == (pull_id, [], [0]), "what nobody can serve"
