"""Block ids count through the areas of a memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transport import AreaIndex, KvArea, KvMemory, unlike

# ids [0, 3) | [3, 4) | [4, 9)
AREAS = (KvArea(4096, 100, 3), KvArea(8192, 7, 1), KvArea(16384, 1 << 33, 5))
MEMORY = KvMemory(AREAS, "cpu", np.zeros(9, dtype=np.uint64), lambda _: memoryview(b""))
INDEX = AreaIndex(AREAS)


def test_an_id_lies_in_one_area_and_its_bytes_are_of_that_area() -> None:
    assert [MEMORY.area_of(block) for block in range(9)] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert MEMORY.num_blocks == 9
    assert MEMORY.bytes_of(()) == 0
    assert MEMORY.bytes_of((8, 0, 3, 2)) == (1 << 33) + 100 + 7 + 100
    assert MEMORY.bytes_of(range(4, 9)) == 5 << 33


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=6), st.data())
def test_counting_agrees_with_a_list_of_all_blocks(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    index = AreaIndex([KvArea(64, size, count) for size, count in shapes])
    all_blocks = [(area, size) for area, (size, count) in enumerate(shapes) for _ in range(count)]
    ids = data.draw(st.lists(st.integers(0, len(all_blocks) - 1), max_size=10))
    assert index.num_blocks == len(all_blocks)
    assert index.areas_of(ids) == [all_blocks[i][0] for i in ids]
    assert index.bytes_of(ids) == sum(all_blocks[i][1] for i in ids)


def test_what_is_no_id_of_a_block_is_not_held() -> None:
    assert INDEX.holds(())
    assert INDEX.holds((0, 8))
    for ids in ((9,), (0, -1), (1 << 32,), (8, 9)):
        assert not INDEX.holds(ids)


@pytest.mark.parametrize(
    ("own", "their", "why"),
    [
        ((), (), None),
        ((2, 3, 8), (0, 3, 4), None),
        ((2, 3), (0, 4), "block 3 lies in area 1 and the peer's block 4 in area 2"),
        ((9,), (0,), "a block is out of range"),
        ((0,), (9,), "the peer's block is out of range"),
        ((0,), (-1,), "the peer's block is out of range"),
        ((0, 1), (0,), "2 blocks for 1"),
    ],
)
def test_a_pair_is_copied_within_one_area(own: tuple[int, ...], their: tuple[int, ...], why: str | None) -> None:
    found = unlike(INDEX, own, INDEX, their)
    assert found is None if why is None else found is not None and why in found
