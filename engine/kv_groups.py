"""Block tables of sequences over the groups of a layout (kv_transfer/layout.py): who gets a block, and when it goes.

    full, latent     a block for every block_tokens tokens, for all known tokens at once
    window, chunk    the same, but taken when they are computed, and given back when no later token looks at them
    state            two slots a sequence: a step reads one and writes the other, so a step that failed can be repeated

A prefix hit is the longest boundary of blocks at which every group can go on: full groups have all blocks before it,
windows and chunks those that the next token looks at, states a snapshot. Snapshots are slots of their own, written in
passing at the last boundary of a prompt's chunk, where a slot is free, and found by the name of the block before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from engine.adapters.slots import AdapterSlots
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from kv_transfer.handoff import Room
from kv_transfer.layout import GONE, Rule, StateUse

_SLOTS = 2


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)


@dataclass(frozen=True, slots=True)
class Hit:
    """A cached beginning of `blocks` blocks: what each group's table begins with, and the state's snapshot or GONE."""

    blocks: int
    tables: tuple[list[int], ...]
    snapshot: int = GONE

    def held(self) -> list[int]:
        found = [block for table in self.tables for block in table if block != GONE]
        return found if self.snapshot == GONE else [*found, self.snapshot]


class KvGroups:
    def __init__(
        self, rules: Items[Rule], pool: BlockPool, block_tokens: int, adapters: AdapterSlots | None = None
    ) -> None:
        """`adapters`: whose slots come and go with a sequence's blocks."""
        if len(rules) != len(pool.blocks_by_group):
            raise ValueError(f"the layout has {len(rules)} groups and the pool {len(pool.blocks_by_group)}")
        self.rules = tuple(rules)
        self.pool = pool
        self.adapters = adapters
        self._block_tokens = block_tokens
        self.alone = len(rules) == 1 and not _special(rules[0])  # one group, which keeps everything
        self._kept = [g for g, rule in enumerate(rules) if not _special(rule)]
        self.leaving = [g for g, rule in enumerate(rules) if rule.leaves]
        states = [g for g, rule in enumerate(rules) if rule.state]
        if len(states) > 1 or states == [0]:
            raise ValueError("a layout has one state group at most, after a group that has blocks")
        self.state = states[0] if states else None

    # Room.

    def lacks(self, num_tokens: int, beside: int = 0, share: int = 1) -> str:
        """Why a sequence of so many tokens can never run here, with so many blocks beside its own; "" if it can.
        `share`: 2, if it may have half of the pool at most.
        """
        size = self._block_tokens
        for rule, has in zip(self.rules, self.pool.blocks_by_group, strict=True):
            if rule.state:
                needed = _SLOTS
            elif rule.leaves:
                needed = min(blocks_for(num_tokens, size), blocks_for(rule.reach, size) + 1)
            else:
                needed = blocks_for(num_tokens, size)
            needed += beside
            if needed > has // share:
                of = "" if len(self.rules) == 1 else f" of the group {rule}"
                may = "" if share == 1 else f", of which one request may take {has // share},"
                return f"prompt and max_tokens need {needed} KV blocks{of} and the pool has {has}{may}"
        return ""

    def first_blocks(self, num_tokens: int) -> int:
        """Of the first group, that a sequence of so many tokens holds at a time."""
        total = blocks_for(num_tokens, self._block_tokens)
        rule = self.rules[0]
        return min(total, blocks_for(rule.reach, self._block_tokens) + 1) if rule.leaves else total

    @property
    def loaded_adapters(self) -> tuple[str, ...]:
        return () if self.adapters is None else self.adapters.loaded

    def has_slot(self, sequence: Sequence) -> bool:
        """For its adapter, if it has one."""
        digest = sequence.spec.adapter
        return not digest or (self.adapters is not None and self.adapters.has_room(digest))

    def _take_slot(self, sequence: Sequence) -> None:
        if sequence.spec.adapter and self.adapters is not None:
            sequence.adapter = self.adapters.take(sequence.spec.adapter)
            assert sequence.adapter is not None, "has_slot was not asked"

    def give_slot_back(self, sequence: Sequence) -> None:
        """It computes nothing more; its blocks may stay."""
        if sequence.adapter is not None and self.adapters is not None:
            self.adapters.give_back(sequence.adapter)
            sequence.adapter = None

    def has_free(self, blocks: int) -> bool:
        """In every group."""
        return all(self.pool.free_in(group) >= blocks for group in range(len(self.rules)))

    def has_room(self, sequence: Sequence, hit: Hit, beside: int) -> bool:
        """Whether `admit` would find room, and leave `beside` blocks free in every group. Takes nothing."""
        total = blocks_for(len(sequence.tokens), self._block_tokens)
        for group, rule in enumerate(self.rules):
            table = hit.tables[group]
            needed = total - len(table)
            if rule.leaves:
                needed = min(total - hit.blocks, blocks_for(rule.reach, self._block_tokens))
            found = sum(block != GONE and not self.pool.references(block) for block in table)  # free as yet
            if self.pool.free_in(group) < found + needed + beside:
                return False
        return True

    def admit(self, sequence: Sequence, hit: Hit) -> bool:
        """The hit's blocks, fresh ones for all known tokens where a group keeps them, and its adapter's slot. All or
        nothing.
        """
        if not self.has_slot(sequence):
            return False
        held = hit.held()
        self.pool.pin(held)
        tables = [list(table) for table in hit.tables]
        total = blocks_for(len(sequence.tokens), self._block_tokens)
        taken: list[int] = list(held)
        for group in self._kept:
            fresh = self.pool.allocate(total - len(tables[group]), group)
            if fresh is None:
                self.pool.unpin(reversed(taken))
                return False
            tables[group] += fresh
            taken += fresh
        for group in self.leaving:  # what it computes in first; the rest when it comes to it
            reach = blocks_for(self.rules[group].reach, self._block_tokens)
            if self.pool.free_in(group) < min(total - hit.blocks, reach):
                self.pool.unpin(reversed(taken))
                return False
        if self.state is not None:
            slots = self.pool.allocate(_SLOTS, self.state)
            if slots is None:
                self.pool.unpin(reversed(taken))
                return False
            tables[self.state] = slots
            sequence.snapshot = hit.snapshot
            sequence.has_state = False
        self._take_slot(sequence)
        sequence.tables = tables
        sequence.num_computed = sequence.computed_from = hit.blocks * self._block_tokens
        sequence.num_published = hit.blocks
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` tokens, in every group. All or nothing."""
        total = blocks_for(num_tokens, self._block_tokens)
        taken: list[tuple[list[int], list[int]]] = []
        for group, table in enumerate(sequence.tables):
            missing = total - len(table)
            if group == self.state or missing <= 0:
                continue
            fresh = self.pool.allocate(missing, group)
            if fresh is None:
                for _, blocks in taken:
                    self.pool.unpin(reversed(blocks))
                return False
            taken.append((table, fresh))
        for table, fresh in taken:
            table += fresh
        return True

    def room_for_chunk(self, sequence: Sequence, start: int, count: int) -> int:
        """How many of `count` tokens from `start` on can be computed now; groups that keep all have their blocks."""
        size = self._block_tokens
        for group in self.leaving:
            table = sequence.tables[group]
            reachable = (len(table) + self.pool.free_in(group)) * size
            count = min(count, reachable - start)
        if count <= 0:
            return 0
        total = blocks_for(start + count, size)
        for group in self.leaving:
            table = sequence.tables[group]
            fresh = self.pool.allocate(max(0, total - len(table)), group)
            assert fresh is not None, "counted a moment ago"
            table += fresh
        return count

    def leave_behind(self, sequence: Sequence) -> None:
        """Gives back what no token from the sequence's next one on looks at."""
        for group in self.leaving:
            table = sequence.tables[group]
            first = min(self.rules[group].first_block(sequence.num_computed, self._block_tokens), len(table))
            at = first - 1
            gone: list[int] = []
            while at >= 0 and table[at] != GONE:
                gone.append(table[at])
                table[at] = GONE
                at -= 1
            if gone:
                self.pool.unpin(gone)  # the tail first

    def release(self, sequence: Sequence) -> None:
        """Everything that it holds, the tail first."""
        for table in sequence.tables:
            self.pool.unpin(block for block in reversed(table) if block != GONE)
        if sequence.snapshot != GONE:
            self.pool.unpin((sequence.snapshot,))
        sequence.tables = [[] for _ in self.rules]
        sequence.snapshot = GONE
        sequence.has_state = False
        self.give_slot_back(sequence)

    def tables(self, sequence: Sequence) -> tuple[tuple[int, ...], ...]:
        """As they are now; of a state the slot that holds it."""
        return tuple(tuple(t[:1]) if g == self.state else tuple(t) for g, t in enumerate(sequence.tables))

    # The prefix cache.

    def find(self, names: Items[bytes]) -> Hit:
        """The longest boundary within `names` at which every group can go on. Nothing is pinned."""
        if self.alone:
            blocks = self.pool.match(names)
            return Hit(len(blocks), (blocks,))
        kept = {group: self.pool.match(names, group) for group in self._kept}
        longest = min(map(len, kept.values()), default=len(names))
        found: list[Items[int | None]] = [
            kept[g] if g in kept else [self.pool.lookup(name, g) for name in names[:longest]]
            for g in range(len(self.rules))
        ]
        runs = {group: _runs(found[group]) for group in self.leaving}
        size = self._block_tokens
        for boundary in range(longest, 0, -1):
            enough = all(
                boundary - self.rules[g].first_block(boundary * size, size) <= run[boundary] for g, run in runs.items()
            )
            if enough and (self.state is None or found[self.state][boundary - 1] is not None):
                return self._hit(boundary, found)
        return Hit(0, tuple([] for _ in self.rules))

    def _hit(self, boundary: int, found: Items[Items[int | None]]) -> Hit:
        tables: list[list[int]] = []
        snapshot = GONE
        for group, rule in enumerate(self.rules):
            if rule.state:
                slot = found[group][boundary - 1]
                assert slot is not None
                snapshot = slot
                tables.append([])
                continue
            first = rule.first_block(boundary * self._block_tokens, self._block_tokens)
            looked_at = [block for block in found[group][first:boundary] if block is not None]
            assert len(looked_at) == boundary - first
            tables.append([GONE] * first + looked_at)
        return Hit(boundary, tuple(tables), snapshot)

    def publish(self, sequence: Sequence, names: Items[bytes], hints: Items[int]) -> None:
        """The sequence's full blocks, `num_published` of which were published before."""
        for group, table in enumerate(sequence.tables):
            if group == self.state:
                continue
            for i in range(sequence.num_published, len(names)):
                if table[i] != GONE:
                    self.pool.publish(table[i], names[i], hints[i], hints[i - 1] if i else 0)
        sequence.num_published = len(names)

    # Receiving.

    def reserve(
        self, sequence: Sequence, names: Items[bytes], num_tokens: int, least: int | None = None
    ) -> tuple[Room, ...] | None:
        """Room for `num_tokens` tokens' KV as the next token looks at it, and for as few as `least`; what is cached
        comes first, and its adapter has a slot from now on. All or nothing.
        """
        if not self.has_slot(sequence):
            return None
        size = self._block_tokens
        total = blocks_for(num_tokens, size)
        begins_with = num_tokens if least is None else least
        tables: list[list[int]] = []
        rooms: list[Room] = []
        taken: list[int] = []
        for group, rule in enumerate(self.rules):
            if rule.state:
                needed = _SLOTS
                first, cached = 0, []
            else:
                first = rule.first_block(begins_with, size)
                cached = self.pool.match(names[first:], group)
                needed = total - first - len(cached)
            self.pool.pin(cached)
            taken += cached
            fresh = self.pool.allocate(needed, group)
            if fresh is None:
                self.pool.unpin(reversed(taken))
                return None
            taken += fresh
            if rule.state:
                tables.append(fresh)
                rooms.append(Room((fresh[0],), 0, 0))
            else:
                tables.append([GONE] * first + cached + fresh)
                rooms.append(Room(tuple(tables[-1]), first, first + len(cached)))
        self._take_slot(sequence)
        sequence.tables = tables
        return tuple(rooms)

    def trim(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives back what was reserved beyond its first `num_tokens` tokens, and what no token after them looks at."""
        self.shorten(sequence, num_tokens)
        self.leave_behind(sequence)

    def shorten(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives back what is beyond its first `num_tokens` tokens."""
        total = blocks_for(num_tokens, self._block_tokens)
        for group, table in enumerate(sequence.tables):
            if group != self.state and len(table) > total:
                self.pool.unpin(reversed(table[total:]))
                del table[total:]

    def there_already(self, rooms: Items[Room]) -> int:
        """How many leading blocks need not be received, in any group."""
        return min(room.skip for room, rule in zip(rooms, self.rules, strict=True) if not rule.state)

    # Steps.

    def use_of_state(self, sequence: Sequence, start: int, count: int, *, prompt: bool) -> StateUse | None:
        """Slots of the next step. A snapshot's slot is the step's until `landed`."""
        if self.state is None:
            return None
        slots = sequence.tables[self.state]
        source = slots[0] if sequence.has_state else sequence.snapshot
        after = (start + count) // self._block_tokens * self._block_tokens - start
        if prompt and after > 0 and self.pool.free_in(self.state) > _SLOTS:  # nobody is kept out by it
            fresh = self.pool.allocate(1, self.state)
            assert fresh is not None
            return StateUse(source, slots[1], after, fresh[0])
        return StateUse(source, slots[1])

    def landed(self, sequence: Sequence, use: StateUse, names: Items[bytes]) -> None:
        """The step is done: its target holds the state. `names`: of the blocks before its snapshot, if that is good."""
        assert self.state is not None
        slots = sequence.tables[self.state]
        slots[0], slots[1] = slots[1], slots[0]
        sequence.has_state = True
        if sequence.snapshot != GONE:
            self.pool.unpin((sequence.snapshot,))
            sequence.snapshot = GONE
        if use.snapshot != GONE and names:
            self.pool.publish(use.snapshot, names[-1])
        self.passed_over(use)

    def passed_over(self, use: StateUse | None) -> None:
        """The step that had this use is over, whoever it was for."""
        if use is not None and use.snapshot != GONE:
            self.pool.unpin((use.snapshot,))

    def written(self, tables: Items[Items[int]], start: int, count: int, use: StateUse | None) -> Iterable[int]:
        """Blocks that a step writes for one sequence."""
        first, last = start // self._block_tokens, (start + count - 1) // self._block_tokens
        for group, table in enumerate(tables):
            if group != self.state:
                yield from table[first : last + 1]
        if use is not None:
            yield use.target


def _special(rule: Rule) -> bool:
    return rule.leaves or rule.state


def _runs(found: Items[int | None]) -> list[int]:
    """By boundary: how many blocks right before it are there."""
    runs = [0]
    for block in found:
        runs.append(0 if block is None else runs[-1] + 1)
    return runs
