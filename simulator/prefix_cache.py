"""A worker's prefix cache, by block name, beside its running sequences. As engine/block_pool.py, without block ids.

What runs comes first: cached blocks fill the rest of the memory and are evicted, the least recently used first and of
one prompt the tail first, when running sequences need their place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """`used_tokens` are those of running sequences, named blocks that they share counted once each."""

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self.used_tokens = 0
        self._held: dict[int, int] = {}  # name -> holders
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody holds these; next to be evicted first
        self.stored: dict[int, int] = {}  # since last taken: name -> the one before it in its prompt, 0 = none
        self.removed: dict[int, None] = {}

    @property
    def free_tokens(self) -> int:
        """Allocatable, cached ones included."""
        return self.capacity_tokens - self.used_tokens

    def match(self, names: Sequence[int]) -> int:
        """How many leading blocks are here."""
        count = 0
        held, idle = self._held, self._idle
        for name in names:
            if name not in held and name not in idle:
                break
            count += 1
        return count

    def idle_tokens(self, names: Sequence[int]) -> int:
        """Of these blocks, how many tokens only the cache holds: using them takes their room."""
        idle = self._idle
        return sum(name in idle for name in names) * self.block_tokens

    def hold(self, names: Sequence[int], parent: int = 0) -> int:
        """One more holder each; the first follows `parent`. Returns the tokens that this added to `used_tokens`."""
        held, idle, removed, stored = self._held, self._idle, self.removed, self.stored
        fresh = 0
        for name in names:
            holders = held.get(name, 0)
            held[name] = holders + 1
            if not holders:
                fresh += 1
                if name in idle:
                    del idle[name]
                elif name in removed:
                    del removed[name]
                else:
                    stored[name] = parent
            parent = name
        added = fresh * self.block_tokens
        self.used_tokens += added
        return added

    def release(self, names: Sequence[int]) -> None:
        """One holder less each, the tail first."""
        held, idle = self._held, self._idle
        left = 0
        for name in reversed(names):
            holders = held[name] - 1
            if holders:
                held[name] = holders
            else:
                del held[name]
                idle[name] = None
                left += 1
        self.used_tokens -= left * self.block_tokens

    def use(self, tokens: int) -> None:
        """Running sequences take (or, negative, give back) that many tokens without a name."""
        self.used_tokens += tokens
        if tokens > 0:
            self.make_room()

    def make_room(self) -> None:
        idle = self._idle
        if not idle:
            return
        limit = max(0, (self.capacity_tokens - self.used_tokens) // self.block_tokens)
        while len(idle) > limit:
            name, _ = idle.popitem(last=False)
            if name in self.stored:
                del self.stored[name]
            else:
                self.removed[name] = None

    def take_events(self) -> tuple[dict[int, int], list[int]]:
        """(stored, each with the one before it; removed), net, since last asked."""
        events = self.stored, list(self.removed)
        self.stored, self.removed = {}, {}
        return events

    def check(self) -> None:
        assert not self._held.keys() & self._idle.keys()
        assert self.used_tokens >= len(self._held) * self.block_tokens
        assert len(self._idle) * self.block_tokens <= max(0, self.free_tokens)
