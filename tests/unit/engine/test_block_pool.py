from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool


def test_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.free_blocks == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.allocate(1) is None


def test_generation_is_raised_before_a_block_is_given_out_again() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1) or ()
    first = pool.generation(block)
    pool.unpin([block])
    assert pool.generation(block) == first, "a freed block may still be read by its leaseholder"
    pool.allocate(1)
    assert pool.generation(block) > first


def test_a_free_block_keeps_its_name_until_it_is_reused() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or ()
    pool.publish(block, b"a")
    pool.unpin([block])
    assert pool.lookup(b"a") == block
    pool.allocate(1)  # takes the nameless one first
    assert pool.lookup(b"a") == block
    pool.allocate(1)
    assert pool.lookup(b"a") is None
    assert pool.take_events().stored == (), "stored and removed since last asked: nobody needs to hear"


def test_tails_are_evicted_before_heads() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3) or []
    for i, block in enumerate(table):
        pool.publish(block, bytes([i]))
    pool.unpin(reversed(table))
    pool.allocate(1)
    assert pool.match([b"\0", b"\1", b"\2"]) == table[:2]


def test_giving_back_twice_is_caught() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.unpin(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.unpin(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Against a model: a list of held tables."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.held: list[list[int]] = []
        self.names = 0

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.free_blocks
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks:
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish_and_free(self, data: st.DataObject) -> None:
        table = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        for block in table:
            if data.draw(st.booleans()):
                self.names += 1
                self.pool.publish(block, self.names.to_bytes(4, "little"))
        self.pool.unpin(reversed(table))

    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        names = self.pool.names()
        if names:
            block = self.pool.lookup(names[data.draw(st.integers(0, len(names) - 1))])
            assert block is not None
            self.pool.pin([block])
            self.held.append([block])

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        held = {b for table in self.held for b in table}
        assert self.pool.free_blocks == 8 - len(held)

    def teardown(self) -> None:
        for table in self.held:
            self.pool.unpin(table)
        assert self.pool.is_idle()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
