"""Who holds which KV block.

    free, no name ──allocate──> held ──publish──> held, named ──last unpin──> free, named (the prefix cache)
         ^                        │                    ^                            │
         └───────last unpin───────┘                    └───────pin (cache hit)──────┤
                                                                                    │
    held, no name <──────────────── allocate takes the least recently used ─────────┘
                                    (eviction is allocation; the generation is raised first)

Whoever got a block by `allocate` or `pin` owes exactly one `unpin`. Generations fence readers in other processes: a
block's counter is raised before the block is given out for new content.

Where a layout has several groups (kv_transfer/layout.py), each has blocks of its own; ids count through all of them,
and a name is looked for in one group.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any

from engine.types import BlockEvents


class BlockPool:
    """`generations` is written here only; pass the array that the transport has registered."""

    def __init__(self, num_blocks: int | Sequence[int], generations: MutableSequence[int] | Any | None = None) -> None:
        """`num_blocks`: by group; a number alone is of the only one."""
        counts = (num_blocks,) if isinstance(num_blocks, int) else tuple(num_blocks)
        if min(counts) < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.blocks_by_group = counts
        self.num_blocks = counts[0]  # of the first group: it stands for the tokens that there is room for
        total = sum(counts)
        self._generations: Any = [0] * total if generations is None else generations
        self._references = [0] * total
        self._names: list[bytes | None] = [None] * total
        self._group = [group for group, count in enumerate(counts) for _ in range(count)]
        firsts = [0, *itertools.accumulate(counts)]
        self._frees: list[OrderedDict[int, None]] = [
            OrderedDict((i, None) for i in range(first, end)) for first, end in itertools.pairwise(firsts)
        ]
        self._holders: list[dict[bytes, int]] = [{} for _ in counts]
        self._hints: dict[bytes, tuple[int, int]] = {}  # by name: what routers know the block by, and the one before it
        self._changes: dict[int, tuple[bool, int]] = {}  # hint -> stored (else removed), hint before; since last asked

    @property
    def free_blocks(self) -> int:
        """Allocatable now, cached ones included; of the first group, as all numbers for others to see."""
        return len(self._frees[0])

    @property
    def blocks_in_use(self) -> int:
        """Held, in all groups."""
        return len(self._references) - sum(map(len, self._frees))

    def free_in(self, group: int) -> int:
        return len(self._frees[group])

    @property
    def cached_blocks(self) -> int:
        """Findable by name, held or free."""
        return len(self._holders[0])

    def allocate(self, count: int, group: int = 0) -> list[int] | None:
        """`count` blocks for new content, or None (and no change) if there are not so many."""
        free = self._frees[group]
        if count > len(free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = free.popitem(last=False)
            self._forget_name(block)
            self._generations[block] += 1
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def pin(self, block_ids: Sequence[int]) -> None:
        """One more holder each. A free cached block leaves the free list."""
        for block in block_ids:
            if self._references[block] == 0:
                del self._frees[self._group[block]][block]
            self._references[block] += 1

    def unpin(self, block_ids: Iterable[int]) -> None:
        """One holder less each. Give a table's blocks back tail first: then the head of a prefix is evicted last."""
        for block in block_ids:
            left = self._references[block] - 1
            if left < 0:
                raise AssertionError(f"block {block} was given back more often than taken")
            self._references[block] = left
            if left == 0:
                free = self._frees[self._group[block]]
                free[block] = None
                if self._names[block] is None:
                    free.move_to_end(block, last=False)  # nothing to keep: reuse it first

    def generation(self, block_id: int) -> int:
        return int(self._generations[block_id])

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    # Prefix cache.

    def lookup(self, name: bytes, group: int = 0) -> int | None:
        return self._holders[group].get(name)

    def match(self, names: Sequence[bytes], group: int = 0) -> list[int]:
        """Blocks of the longest cached prefix. Not pinned yet."""
        blocks, holder = [], self._holders[group]
        for name in names:
            block = holder.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block_id: int, name: bytes, hint: int = 0, parent_hint: int = 0) -> None:
        """A held block's content is complete. The first holder of a name keeps it. Events tell of the first group."""
        if self._references[block_id] < 1:
            raise AssertionError(f"block {block_id} was published while free")
        group = self._group[block_id]
        holder = self._holders[group]
        if name in holder or self._names[block_id] is not None:
            return
        self._names[block_id] = name
        holder[name] = block_id
        if group == 0:
            self._hints[name] = hint, parent_hint
            self._note(name, stored=True)

    def names(self) -> list[bytes]:
        """Everything findable."""
        return list(self._holders[0])

    def hints(self) -> list[tuple[int, int]]:
        """The same by hint, each with the one before it: a snapshot for a new listener."""
        return list(self._hints.values())

    def take_events(self) -> BlockEvents:
        """Net changes since last asked."""
        changes, self._changes = self._changes, {}
        return BlockEvents(
            stored=tuple((hint, before) for hint, (stored, before) in changes.items() if stored),
            removed=tuple(hint for hint, (stored, _) in changes.items() if not stored),
        )

    def _forget_name(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            group = self._group[block]
            del self._holders[group][name]
            if group == 0:
                self._note(name, stored=False)
                del self._hints[name]

    def _note(self, name: bytes, *, stored: bool) -> None:
        hint, before = self._hints[name]
        change = self._changes.get(hint)
        if change is not None and change[0] is not stored:
            del self._changes[hint]  # there and back: nobody needs to hear of it
        else:
            self._changes[hint] = stored, before

    # Checks.

    def is_idle(self) -> bool:
        return self.blocks_in_use == 0

    def check(self) -> None:
        """Assert the picture at the top."""
        for block, references in enumerate(self._references):
            assert references >= 0
            assert (references == 0) == (block in self._frees[self._group[block]]), (
                f"block {block}: {references} holders, free list disagrees"
            )
        assert sum(map(len, self._holders)) == sum(name is not None for name in self._names)
        assert self._hints.keys() == self._holders[0].keys()
        for group, holder in enumerate(self._holders):
            for name, block in holder.items():
                assert self._names[block] == name
                assert self._group[block] == group
