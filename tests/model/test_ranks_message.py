"""What the ranks of a worker are told of a step arrives as it was sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.attention.interface import Chunk
from engine.ranks.message import decode, encode
from kv_transfer.layout import StateUse

numbers = st.integers(-1, (1 << 31) - 1)
states = st.none() | st.builds(StateUse, numbers, numbers, numbers, numbers)


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[int], list[int], list[Chunk], list[int]]:
    tables = st.lists(numbers, max_size=6)
    others = draw(st.integers(0, 3))
    copies = st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple)
    chunk = st.builds(Chunk, numbers, numbers, numbers, tables, st.tuples(*[tables] * others), states, copies)
    count = draw(st.integers(0, 12))
    rows = st.lists(numbers, min_size=count, max_size=count)
    return draw(rows), draw(rows), draw(st.lists(chunk, max_size=4)), draw(st.lists(numbers, max_size=4))


@given(passes())
def test_a_pass_arrives_whole(told: tuple[list[int], list[int], list[Chunk], list[int]]) -> None:
    token_ids, positions, chunks, keep = told
    heard = decode(encode(token_ids, positions, chunks, keep))
    assert (heard.token_ids, heard.positions, heard.chunks, heard.keep) == told
