"""Which rank holds what, and what each reads: said by heads, layers and bytes, and proved to leave nothing out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.shards import (
    Piece,
    Plan,
    block_bytes_of,
    heads_of,
    missing,
    part_of,
    parts_from,
    pieces_of,
    unsound,
)
from kv_transfer.transport import Slice

DEGREES = (1, 2, 4, 8)
LATENT, STATE = Rule(values=4), Rule(state=True)


def heads(count: int, layers: Sequence[int] = (0, 1), rule: Rule = FULL) -> Group:
    return Group(rule, tuple(layers), count, 4, "float32")


def layout(*groups: Group) -> KvLayout:
    return KvLayout("model", 2, groups)


MIXED = layout(
    heads(2, [1, 5]),
    heads(8, [0, 4], Rule(window=8)),
    Group(LATENT, (2,), 1, 6, "bfloat16"),
    Group(STATE, (3, 6), 1, 40, "float32"),
)


@pytest.mark.parametrize(
    ("count", "degree", "held"),
    [
        (8, 1, [range(8)]),
        (8, 2, [range(4), range(4, 8)]),
        (8, 8, [range(i, i + 1) for i in range(8)]),
        (2, 4, [range(1), range(1), range(1, 2), range(1, 2)]),  # 0 0 1 1, not 0 1 0 1
        (1, 4, [range(1)] * 4),
        (3, 2, [range(1), range(1, 3)]),
        (3, 4, [range(1), range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_a_rank_holds_neighbouring_heads(count: int, degree: int, held: list[range]) -> None:
    group = heads(count)
    assert [heads_of(group, degree, rank) for rank in range(degree)] == held
    assert [part_of(group, degree, rank).kv_heads for rank in range(degree)] == [len(one) for one in held]


def test_whole_on_every_rank_is_a_matter_of_the_group() -> None:
    for rank in range(4):
        assert [heads_of(group, 4, rank) for group in MIXED.groups] == [
            range(rank * 2 // 4, rank * 2 // 4 + 1),
            range(rank * 2, rank * 2 + 2),
            range(1),
            range(1),
        ]
        assert block_bytes_of(MIXED, 4, rank)[2:] == block_bytes_of(MIXED, 1, 0)[2:]


def test_a_rank_that_is_none_is_an_error() -> None:
    for degree, rank in ((2, 2), (2, -1), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            heads_of(heads(2), degree, rank)
    for source, reader in ((0, 1), (1, 65)):
        with pytest.raises(ValueError, match="limit"):
            pieces_of(MIXED, source, reader)


def test_from_two_ranks_to_one_and_back() -> None:
    """Blocks of two layers, keys and values, two heads of 32 bytes."""
    one = layout(heads(2))
    (pieces,) = pieces_of(one, 2, 1)
    assert [(p.source_rank, p.heads) for p in pieces] == [(0, range(1)), (1, range(1, 2))]
    assert pieces[0].slices == tuple(Slice(row * 64, row * 32, 32) for row in range(4))
    assert pieces[1].slices == tuple(Slice(row * 64 + 32, row * 32, 32) for row in range(4))
    back = pieces_of(one, 1, 2)
    assert [[(p.source_rank, p.heads) for p in pieces] for pieces in back] == [[(0, range(1))], [(0, range(1, 2))]]
    assert back[1][0].slices == tuple(Slice(row * 32, row * 64 + 32, 32) for row in range(4))


def test_between_equal_degrees_blocks_move_whole_from_the_same_rank() -> None:
    for degree in DEGREES:
        sizes = [block_bytes_of(MIXED, degree, rank) for rank in range(degree)]
        for rank, pieces in enumerate(pieces_of(MIXED, degree, degree)):
            for piece in pieces:
                assert piece.slices == (Slice(0, 0, sizes[rank][piece.group]),)
                if MIXED.groups[piece.group].kv_heads == 8:
                    assert piece.source_rank == rank
            for source in range(degree):
                parts = parts_from(MIXED, pieces, rank, degree, source, degree)
                assert all(part.is_whole or not part.slices for part in parts)


def test_what_every_rank_has_comes_from_one_and_the_work_is_spread() -> None:
    one = layout(Group(LATENT, (0,), 1, 6, "bfloat16"))
    assert [[p.source_rank for p in pieces] for pieces in pieces_of(one, 4, 4)] == [[0], [1], [2], [3]]
    assert [[p.source_rank for p in pieces] for pieces in pieces_of(one, 4, 2)] == [[0], [1]]
    assert [[p.source_rank for p in pieces] for pieces in pieces_of(one, 2, 4)] == [[0], [1], [0], [1]]
    assert [[p.source_rank for p in pieces] for pieces in pieces_of(one, 4, 1, load=[9, 9, 1, 9])] == [[2]]
    few = layout(heads(2))  # ranks 0 and 1 hold head 0, ranks 2 and 3 head 1
    assert [p.source_rank for p in pieces_of(few, 4, 1, load=[5, 0, 0, 5])[0]] == [1, 2]


@st.composite
def layouts(draw: st.DrawFn) -> KvLayout:
    groups = []
    for number in range(draw(st.integers(1, 3))):
        layers = tuple(range(number, 6, 3))[: draw(st.integers(1, 2))]
        kind = draw(st.sampled_from(["heads", "window", "latent", "state"]))
        match kind:
            case "latent":
                groups.append(Group(LATENT, layers, 1, draw(st.integers(4, 7)), "bfloat16"))
            case "state":
                groups.append(Group(STATE, layers, 1, 8 * len(layers), "float32"))
            case _:
                rule = FULL if kind == "heads" else Rule(window=5)
                groups.append(Group(rule, layers, draw(st.integers(1, 16)), draw(st.integers(1, 3)), "float16"))
    return KvLayout("model", draw(st.sampled_from([1, 2, 16])), tuple(groups))


@given(layouts(), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4, 8]))
def test_every_plan_is_sound_and_nothing_less_is(kv_layout: KvLayout, source: int, reader: int) -> None:
    plan = pieces_of(kv_layout, source, reader)
    assert unsound(kv_layout, source, reader, plan) == ""
    for rank, pieces in enumerate(plan):
        for piece in pieces:
            without = with_pieces(plan, rank, [p for p in pieces if p != piece])
            assert missing(kv_layout, reader, without)
            assert unsound(kv_layout, source, reader, without)


def with_pieces(plan: Plan, rank: int, pieces: Sequence[Piece]) -> Plan:
    return (*plan[:rank], tuple(pieces), *plan[rank + 1 :])


def test_each_way_of_being_wrong_has_its_words() -> None:
    one = layout(heads(4))
    plan = pieces_of(one, 2, 2)
    piece = plan[1][0]

    def spoilt(**changes: object) -> str:
        return unsound(one, 2, 2, with_pieces(plan, 1, [replace(piece, **changes)]))  # type: ignore[arg-type]

    (whole,) = piece.slices
    assert spoilt() == ""
    assert spoilt(layers=(0,)) == "rank 1 lacks heads 2 to 3 of layer 1, group 0"
    assert spoilt(heads=range(2, 3)) == "rank 1 lacks heads 3 to 3 of layer 0, group 0"
    assert spoilt(heads=range(2)) == "rank 1 lacks heads 2 to 3 of layer 0, group 0"
    assert spoilt(slices=(Slice(0, 0, whole.num_bytes // 4),)).startswith("rank 1 lacks bytes 64 to 255")
    assert "lies outside a block" in spoilt(slices=(Slice(0, 1, whole.num_bytes),))
    assert "lies outside a block" in spoilt(slices=(whole, Slice(whole.num_bytes, 0, 1)))
    assert "would write [264]" in spoilt(slices=(whole, Slice(0, 0, 8)))
    assert spoilt(source_rank=0) == "heads 2 to 3 are not all on rank 0 of the source"
    assert spoilt(source_rank=2) == "rank 1 reads from rank 2, and the source has 2"
    assert missing(one, 2, plan[:1]) == "1 ranks say what arrived, the worker has 2"


def test_only_the_groups_that_moved_are_asked_for() -> None:
    plan = pieces_of(MIXED, 2, 1)
    windows = [tuple(p for p in plan[0] if p.group == 1)]
    assert missing(MIXED, 1, windows, [1]) == ""
    assert "group 0" in missing(MIXED, 1, windows)
