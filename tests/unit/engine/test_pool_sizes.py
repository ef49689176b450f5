"""Shares of the memory: large states leave room for tokens, and blocks that only count are not without number."""

from __future__ import annotations

from engine.kv_shape import KvShape
from engine.pool_sizes import PoolSizes
from kv_transfer.layout import FULL, Group, Rule

GIB = 1 << 30
ATTENTION = Group(FULL, (3, 7), 2, 256, "bfloat16")  # 4 KiB a token


def sizes(first: Group, state_bytes: int) -> PoolSizes:
    state = Group(Rule(state=True), (0, 1, 2), 1, state_bytes, "uint8")
    return PoolSizes(KvShape((first, state), 16), sequences=256, batch_tokens=512)


def test_large_states_take_half_of_the_memory() -> None:
    large = sizes(ATTENTION, 19 << 20)
    found = large.within(GIB)
    assert found == ((GIB - 26 * (19 << 20)) // (64 << 10), 26)


def test_small_states_take_what_all_sequences_need() -> None:
    small = sizes(ATTENTION, 64 << 10)
    assert small.within(GIB) == ((GIB >> 16) - 514, 514)


def test_a_number_of_blocks_bounds_the_slots_too() -> None:
    assert sizes(ATTENTION, 19 << 20).of(40) == (40, 40)
    assert sizes(ATTENTION, 19 << 20).of(1) == (1, 4)


def test_blocks_that_only_count_are_bounded() -> None:
    assert sizes(Group(FULL, (0,), 1, 1, "float32"), 1 << 20).within(GIB) == (1 << 17, 512)


def test_too_little_memory_is_none() -> None:
    assert sizes(ATTENTION, 19 << 20).within(64 << 20) is None
