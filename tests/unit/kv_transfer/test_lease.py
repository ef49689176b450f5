from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.block_pool import BlockPool
from kv_transfer.lease import LeaseEnd, LeaseTable


def table(pool: BlockPool, **limits: float) -> LeaseTable:
    values = {"lease_s": 10.0, "max_leases": 4, "max_blocks": 8} | limits
    return LeaseTable(pool, **values)  # type: ignore[arg-type]


def test_a_lease_holds_its_blocks_until_it_ends_exactly_once() -> None:
    pool = BlockPool(8)
    leases = table(pool)
    blocks = pool.allocate(3) or []
    assert leases.grant("h", 0.0)
    assert leases.extend("h", blocks, 0.0)
    pool.unpin(blocks)  # the sequence is gone; the lease alone holds them
    assert pool.free_blocks == 5
    assert leases.end("h", LeaseEnd.RELEASED)
    assert not leases.end("h", LeaseEnd.CANCELLED)
    assert pool.is_idle()
    assert leases.ended == {LeaseEnd.RELEASED: 1}


def test_an_open_lease_does_not_expire_and_a_sealed_one_does() -> None:
    pool = BlockPool(8)
    leases = table(pool)
    leases.grant("h", 0.0)
    assert leases.expire(1000.0) == []
    leases.seal("h", 1000.0)
    assert leases.next_expiry() == 1010.0
    leases.renew("h", 1005.0)
    assert leases.expire(1012.0) == []
    assert leases.expire(1015.0) == ["h"]
    assert leases.ended == {LeaseEnd.EXPIRED: 1}


def test_bounds_refuse_by_value_and_change_nothing() -> None:
    pool = BlockPool(16)
    leases = table(pool, max_leases=1, max_blocks=2)
    assert leases.grant("a", 0.0)
    assert not leases.grant("b", 0.0)
    blocks = pool.allocate(3) or []
    assert not leases.extend("a", blocks, 0.0)
    assert leases.leased_blocks == 0
    leases.check()


def test_nobody_else_takes_what_was_promised() -> None:
    pool = BlockPool(16)
    leases = table(pool, max_blocks=6)
    for lease in "abc":
        leases.grant(lease, 0.0)
    assert leases.promise("a", 4)
    assert not leases.promise("b", 3)
    assert leases.promise("b", 2)
    assert not leases.extend("c", pool.allocate(1) or [], 0.0)
    assert leases.extend("a", pool.allocate(3) or [], 0.0)
    assert not leases.extend("a", pool.allocate(2) or [], 0.0), "one more than was promised"
    leases.end("b", LeaseEnd.CANCELLED)
    assert leases.extend("c", pool.allocate(2) or [], 0.0)
    assert leases.extend("a", pool.allocate(1) or [], 0.0)
    leases.check()
    assert leases.leased_blocks == 6


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.leases = table(self.pool, max_blocks=9)
        self.now = 0.0
        self.alive: set[str] = set()
        self.count = 0

    @rule(size=st.integers(1, 4), sealed=st.booleans())
    def grant(self, size: int, sealed: bool) -> None:
        self.count += 1
        name = f"h{self.count}"
        if not self.leases.grant(name, self.now):
            assert len(self.alive) == 4
            return
        self.alive.add(name)
        blocks = self.pool.allocate(size)
        if blocks:
            self.leases.extend(name, blocks, self.now)
            self.pool.unpin(blocks)
        if sealed:
            self.leases.seal(name, self.now)

    @rule(count=st.integers(0, 6), data=st.data())
    def promise(self, count: int, data: st.DataObject) -> None:
        if self.alive:
            self.leases.promise(data.draw(st.sampled_from(sorted(self.alive))), count)

    @rule(how=st.sampled_from([LeaseEnd.RELEASED, LeaseEnd.CANCELLED]), data=st.data())
    def end(self, how: LeaseEnd, data: st.DataObject) -> None:
        if self.alive:
            name = data.draw(st.sampled_from(sorted(self.alive)))
            assert self.leases.end(name, how)
            self.alive.remove(name)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.alive -= set(self.leases.expire(self.now))

    @invariant()
    def consistent(self) -> None:
        self.leases.check()
        self.pool.check()
        assert len(self.leases) == len(self.alive)
        assert self.pool.num_blocks - self.pool.free_blocks == self.leases.leased_blocks

    def teardown(self) -> None:
        for name in self.alive:
            self.leases.end(name, LeaseEnd.CANCELLED)
        assert self.pool.is_idle()


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
