"""Which part of a model each rank has: together they have all of it, and nothing but replicated heads twice."""

from __future__ import annotations

import pytest

from engine.ranks.place import CannotSplit, Place
from kv_transfer.layout import FULL, Group
from kv_transfer.shards import heads_of

DEGREES = (2, 4, 8)


def places(degree: int, groups: int = 1) -> list[Place]:
    return [Place(rank, degree, groups) for rank in range(degree)]


@pytest.mark.parametrize("degree", DEGREES)
def test_kv_heads_are_those_that_a_handoff_expects(degree: int) -> None:
    for count in (1, 2, 4, 8, 16, 32):
        group = Group(FULL, (0,), count, 16, "float32")
        for place in places(degree):
            assert range(*place.kv_heads(count)) == heads_of(group, degree, place.rank)


@pytest.mark.parametrize("degree", DEGREES)
def test_query_heads_lie_where_their_keys_are(degree: int) -> None:
    for kv_heads in (1, 2, 4, 8):
        heads = 8 * kv_heads
        for place in places(degree):
            needed = {head // 8 for head in range(*place.heads(heads))}
            assert needed == set(range(*place.kv_heads(kv_heads)))


@pytest.mark.parametrize(("degree", "groups"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2)])
def test_every_part_of_every_expert_is_on_one_rank(degree: int, groups: int) -> None:
    held = [
        (expert, column)
        for place in places(degree, groups)
        for expert in range(*place.experts(11))
        for column in range(*place.inner(37))
    ]
    assert sorted(held) == [(expert, column) for expert in range(11) for column in range(37)]


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(CannotSplit, match="its 6 attention heads are no multiple of 4"):
        Place(0, 4).heads(6)
    with pytest.raises(CannotSplit, match="its 3 key and value heads are neither a multiple nor a part of 4"):
        Place(0, 4).kv_heads(3)
    with pytest.raises(CannotSplit, match="it has 3 experts, fewer than 4 groups"):
        Place(0, 4, 4).experts(3)
