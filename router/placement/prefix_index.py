"""Which worker's cache holds which prefix. Advisory: a false hit costs time, never correctness.

Blocks are known by their hints (kv_transfer/prefix_hint.py): positive 64-bit numbers, each with that of the block
before it (0: the first of a prompt). Per block, two sets of workers as bit masks:

    held   reported, and not reported gone since
    whole  held, and every block before it too: what a prompt can be continued from

A worker that evicts a middle block loses `whole` on all that follows, and has it back when that block is back.
So `whole` only shrinks along a prompt, and where a worker drops out is found by bisection: a prompt of 8,192 blocks
costs some dozens of looks instead of 8,192.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

W = TypeVar("W", bound=Hashable)

_MAX_LEVELS = 64  # different depths that one lookup tells apart; workers that hold less than all these count as none


class _Block:
    __slots__ = ("children", "held", "hint", "parent", "whole")

    def __init__(self, hint: int, parent: _Block | None = None, held: int = 0, whole: int = 0) -> None:
        self.hint = hint
        self.parent = parent
        self.held = held
        self.whole = whole
        self.children: _Block | set[_Block] | None = None  # most have one

    def followers(self) -> Iterable[_Block]:
        children = self.children
        if children is None:
            return ()
        return children if isinstance(children, set) else (children,)

    def attach(self, child: _Block) -> None:
        child.parent = self
        if self.children is None:
            self.children = child
        elif isinstance(self.children, set):
            self.children.add(child)
        else:
            self.children = {self.children, child}

    def detach(self, child: _Block) -> None:
        if isinstance(self.children, set):
            self.children.discard(child)
        elif self.children is child:
            self.children = None


class PrefixHits(Mapping[W, int]):
    """Leading tokens that workers hold, deepest first. A snapshot to decide by: ask at once, keep nothing."""

    __slots__ = ("_levels", "_places", "_seen", "_workers", "block_tokens")

    def __init__(
        self, levels: list[tuple[int, int]], places: dict[W, int], workers: dict[int, W], block_tokens: int
    ) -> None:
        self._levels = levels  # (blocks, workers that hold exactly so many)
        self._seen: list[int] = []  # by level: workers that hold so many or more
        self._places = places
        self._workers = workers
        self.block_tokens = block_tokens

    def get(self, key: W, default: Any = 0) -> Any:
        place = self._places.get(key)
        if place is None or not self._levels:
            return default
        blocks, mask = self._levels[-1]
        if mask >> place & 1:  # most hold a common beginning and no more
            return blocks * self.block_tokens
        seen = self._seen or self._sum_up()
        if not seen[-1] >> place & 1:
            return default
        low, high = 0, len(seen) - 1
        while low < high:
            middle = (low + high) // 2
            if seen[middle] >> place & 1:
                high = middle
            else:
                low = middle + 1
        return self._levels[low][0] * self.block_tokens

    def _sum_up(self) -> list[int]:
        total = 0
        for _, mask in self._levels:
            total |= mask
            self._seen.append(total)
        return self._seen

    def top(self, limit: int) -> list[tuple[W, int]]:
        """The workers that hold most."""
        found: list[tuple[W, int]] = []
        for blocks, mask in self._levels:
            tokens = blocks * self.block_tokens
            if len(found) == limit:
                return found
            if mask.bit_count() == 1:  # as among the deepest: these masks are long, and each look at one costs
                found.append((self._workers[mask.bit_length() - 1], tokens))
                continue
            while mask:
                if len(found) == limit:
                    return found
                lowest = mask & -mask
                found.append((self._workers[lowest.bit_length() - 1], tokens))
                mask ^= lowest
        return found

    def __getitem__(self, key: W) -> int:
        tokens = self.get(key, None)
        if tokens is None:
            raise KeyError(key)
        return tokens

    def __iter__(self) -> Iterator[W]:
        return (self._workers[bit.bit_length() - 1] for _, mask in self._levels for bit in _bits_of(mask))

    def __len__(self) -> int:
        return sum(mask.bit_count() for _, mask in self._levels)

    def __bool__(self) -> bool:
        return bool(self._levels)


class PrefixIndex(Generic[W]):
    def __init__(self) -> None:
        self._places: dict[W, int] = {}
        self._bits: dict[W, int] = {}  # 1 << place
        self._workers: dict[int, W] = {}  # by place
        self._blocks: dict[int, _Block] = {}
        self._held: dict[W, set[int]] = {}
        self._free: list[int] = []  # places of workers that are gone

    def stored(self, worker: W, hints: Iterable[int], parent: int = 0) -> None:
        """`hints` follow one another, the first follows `parent`. In any order of calls."""
        # A simulated hour is some hundred million blocks, so the two common cases are written out: a block that
        # nobody knew, and one without followers here.
        bit = self._bit(worker)
        mine, blocks = self._held[worker], self._blocks
        above = parent
        last: _Block | None = None  # that of `above`, where it is at hand; `lit`: it is whole for the worker
        lit = True
        old, new = 0, bit
        old_whole, new_whole = 0, bit
        for hint in hints:
            if hint in mine:
                above, last = hint, None
                continue
            mine.add(hint)
            block = blocks.get(hint)
            if block is None:
                if above and above != hint:
                    if last is None:
                        last = blocks.get(above)
                        if last is None:
                            last = blocks[above] = _Block(above)
                        lit = bool(last.whole & bit)
                    block = _Block(hint, last, bit, bit if lit else 0)
                    if last.children is None:
                        last.children = block
                    else:
                        last.attach(block)
                else:
                    lit, block = True, _Block(hint, None, bit, bit)
                blocks[hint] = block
                above, last = hint, block
                continue
            if not (block.held or block.parent):
                self._place(hint, above)
            if block.held != old:
                old, new = block.held, block.held | bit
            block.held = new  # one number for a whole run: masks of thousands of workers are long
            before = block.parent
            if before is None:
                lit = True
            elif before is not last:
                lit = bool(before.whole & bit)
            if lit:
                children = block.children
                if children is None or (isinstance(children, _Block) and children.hint not in mine):
                    if block.whole != old_whole:
                        old_whole = block.whole
                        new_whole = new if old_whole == old else old_whole | bit
                    block.whole = new_whole
                else:
                    self._light(block, bit)
            above, last = hint, block

    def removed(self, worker: W, hints: Iterable[int]) -> None:
        bit = self._bits.get(worker)
        if bit is None:
            return
        held, blocks = self._held[worker], self._blocks
        for hint in hints:
            if hint not in held:
                continue
            held.discard(hint)
            block = blocks[hint]
            if block.children is None:
                rest = block.held ^ bit
                if block.whole & bit:
                    block.whole = rest if block.whole == block.held else block.whole ^ bit
                block.held = rest
                if not rest:
                    self._forget(block)
            else:
                self._drop(block, bit)

    def cleared(self, worker: W) -> None:
        """Forget what a worker holds; it may go on reporting."""
        bit = self._bits.get(worker)
        if bit is not None:
            hints, self._held[worker] = self._held[worker], set()
            for hint in hints:
                self._drop(self._blocks[hint], bit)

    def gone(self, worker: W) -> None:
        self.cleared(worker)
        bit = self._bits.pop(worker, None)
        if bit is not None:
            del self._held[worker]
            place = self._places.pop(worker)
            del self._workers[place]
            heapq.heappush(self._free, place)

    def match(self, hints: Sequence[int] | Any, block_tokens: int = 1) -> PrefixHits[W]:
        """Who holds how many leading tokens of a prompt with these hints (an array or a sequence)."""
        levels: list[tuple[int, int]] = []
        known = self._blocks.get
        end = len(hints)
        first = known(int(hints[0])) if end else None
        rest = first.whole if first is not None else 0
        while rest and len(levels) < _MAX_LEVELS:
            # The deepest block that anybody left holds: in [low, end).
            low, high, found = 0, end, rest
            while high - low > 1:
                middle = (low + high) // 2
                block = known(int(hints[middle]))
                mask = block.whole & rest if block is not None else 0
                if mask:
                    low, found = middle, mask
                else:
                    high = middle
            levels.append((low + 1, found))
            rest &= ~found
            end = low
        return PrefixHits(levels, self._places, self._workers, block_tokens)

    def matched_blocks(self, hints: Sequence[int]) -> dict[W, int]:
        """For every worker with at least the first block: how many leading blocks it holds."""
        return dict(self.match(hints))

    def __len__(self) -> int:
        return len(self._blocks)

    # Inside.

    def _bit(self, worker: W) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            # The lowest free one: masks stay short.
            place = heapq.heappop(self._free) if self._free else len(self._workers)
            bit = self._bits[worker] = 1 << place
            self._places[worker] = place
            self._workers[place] = worker
            self._held[worker] = set()
        return bit

    def _place(self, hint: int, parent: int) -> _Block:
        """The block, where it belongs. Its parent may not have been reported yet; what was said first of it holds."""
        blocks = self._blocks
        block = blocks.get(hint)
        if block is None:
            block = blocks[hint] = _Block(hint)
        elif block.held or block.parent is not None:
            return block
        if parent and parent != hint:
            above = blocks.get(parent)
            if above is None:
                above = blocks[parent] = _Block(parent)
            above.attach(block)
        return block

    def _light(self, block: _Block, bit: int) -> None:
        """`block` is whole for a worker, and so is what follows and was held already."""
        waiting = [block]
        while waiting:
            block = waiting.pop()
            whole = block.whole | bit
            block.whole = block.held if whole == block.held else whole
            for child in block.followers():
                if child.held & bit and not child.whole & bit:
                    waiting.append(child)

    def _drop(self, block: _Block, bit: int) -> None:
        block.held &= ~bit
        waiting = [block] if block.whole & bit else []
        while waiting:
            b = waiting.pop()
            b.whole &= ~bit
            for child in b.followers():
                if child.whole & bit:
                    waiting.append(child)
        if not block.held:
            self._forget(block)

    def _forget(self, block: _Block) -> None:
        """What nobody holds is kept only while something is known that follows it."""
        last: _Block | None = block
        while last is not None and not last.held and not last.children:
            above = last.parent
            del self._blocks[last.hint]
            if above is not None:
                above.detach(last)
            last = above

    def check(self) -> None:
        """Assert the picture at the top."""
        for hint, block in self._blocks.items():
            above = block.parent
            expected = block.held if above is None else block.held & above.whole
            assert block.whole == expected, f"block {hint:x}: whole is not held and whole above"
            assert block.held or block.children, f"block {hint:x} is kept for nothing"
            assert above is None or self._blocks.get(above.hint) is above
        for worker, hints in self._held.items():
            assert all(self._blocks[h].held & self._bits[worker] for h in hints)


def _bits_of(mask: int) -> Iterable[int]:
    while mask:
        lowest = mask & -mask
        yield lowest
        mask ^= lowest
