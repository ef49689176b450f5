"""A source that computes a prompt and a reader that has room for it, over memories in which every element is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from engine.block_pool import BlockPool
from engine.kv_groups import KvGroups
from kv_transfer.handoff import Room
from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.reader import HandoffBroken, HandoffComplete, HandoffReader, NeedBlocks
from kv_transfer.source import HandoffSource
from kv_transfer.transport import PullOrder
from tests.support import coordinates as c
from tests.support.wired import READER, SOURCE, Wired

_STRANGER = 1024  # its tokens count from here
Shapes = list[tuple[int, int]]  # of areas: blocks, bytes of each
Held = Sequence[Sequence[int]]  # by group: heads
Fault = Callable[[Wired, KvLayout, PullOrder], PullOrder]


def heads(rule: Rule, layers: Sequence[int], kv_heads: int = 2, width: int = 4, dtype: str = "float32") -> Group:
    return Group(rule, tuple(layers), kv_heads, width, dtype)


def latent(layers: Sequence[int], width: int = 6, dtype: str = "bfloat16", **rule: int) -> Group:
    return Group(Rule(values=width - 2, **rule), tuple(layers), 1, width, dtype)


def state(layers: Sequence[int], elements: int = 5) -> Group:
    """`elements` of four bytes a layer."""
    return Group(Rule(state=True), tuple(layers), 1, len(layers) * elements * 4, "float32")


def layout(block_tokens: int, *groups: Group) -> KvLayout:
    return KvLayout("model", block_tokens, groups)


WINDOW, CHUNK = Rule(window=8), Rule(chunk=8)
LAYOUTS = {
    "plain": layout(4, heads(FULL, range(3))),
    "plain, one of everything": layout(1, heads(FULL, [0], 1, 1, "bfloat16")),
    "plain, one byte an element": layout(8, heads(FULL, range(2), 3, 5, "uint8")),
    "keys and values in 8 bits": layout(
        4, Group(FULL, (0, 2), 3, 4, "bfloat16", "int8"), Group(WINDOW, (1,), 2, 5, "bfloat16", "fp8_values")
    ),
    "windows only": layout(4, heads(WINDOW, range(4), dtype="bfloat16")),
    "windows beside full": layout(4, heads(FULL, [5]), heads(WINDOW, range(5))),
    "full and windows by turns": layout(16, heads(FULL, [1, 3], dtype="bfloat16"), heads(Rule(window=40), [0, 2])),
    "windows of other heads": layout(4, heads(FULL, [2, 5], 2, 8), heads(WINDOW, [0, 1, 3, 4], 4, 2)),
    "a window within a block": layout(8, heads(FULL, [1]), heads(Rule(window=3), [0])),
    "windows of two sizes": layout(4, heads(FULL, [0]), heads(WINDOW, [1, 3]), heads(Rule(window=17), [2])),
    "chunks beside full": layout(4, heads(FULL, [3], 2, 4, "bfloat16"), heads(CHUNK, range(3), 2, 4, "bfloat16")),
    "chunks within a block": layout(8, heads(FULL, [0]), heads(Rule(chunk=4), [1])),
    "latent": layout(4, latent(range(4))),
    "latent with a window": layout(4, latent([0, 2]), latent([1], window=8)),
    "latent beside heads": layout(16, latent(range(3), 9), heads(FULL, [3, 4], 2, 3, "bfloat16")),
    "state beside full": layout(4, heads(FULL, [3, 7]), state([0, 1, 2, 4, 5, 6])),
    "state beside windows": layout(
        4, heads(FULL, [3], 1), heads(WINDOW, [1, 2], 3, 2, "bfloat16"), state([0, 4], 3), latent([5], 7)
    ),
}
LENGTHS = (1, 3, 4, 7, 8, 9, 16, 17, 29, 64, 75)


# Two sides.


def shapes(layout: KvLayout, num_tokens: int, spare: Sequence[int]) -> Shapes:
    """Room for the sequence in every group, and some to spare."""
    blocks = -(-num_tokens // layout.block_tokens)
    return [
        ((2 if group.rule.state else blocks) + spare[i % len(spare)], group.block_bytes(layout.block_tokens))
        for i, group in enumerate(layout.groups)
    ]


def shuffled_pool(areas: Shapes, rng: random.Random) -> BlockPool:
    """Its ids come in any order."""
    pool = BlockPool([count for count, _ in areas])
    for group, (count, _) in enumerate(areas):
        blocks = pool.allocate(count, group) or []
        rng.shuffle(blocks)
        pool.unpin(blocks)
    return pool


def content(
    layout: KvLayout, number: int, index: int, num_tokens: int, heads: Sequence[int] | None = None
) -> np.ndarray:
    if layout.groups[number].rule.state:
        return c.state_of(layout, number, num_tokens)
    return c.block_of(layout, number, index, heads)


def by_group(layout: KvLayout, areas: Shapes) -> Iterator[tuple[int, Group, range]]:
    """Number, group, and ids of its blocks."""
    first = 0
    for number, (group, (count, _)) in enumerate(zip(layout.groups, areas, strict=True)):
        yield number, group, range(first, first + count)
        first += count


class Computing:
    """The source: a prompt is computed, and announced chunk by chunk."""

    def __init__(self, layout: KvLayout, num_tokens: int, rng: random.Random, *, digests: bool) -> None:
        self.layout, self.num_tokens = layout, num_tokens
        self.areas = shapes(layout, num_tokens, (2, 4, 3))
        self.pool = shuffled_pool(self.areas, rng)
        blocks = -(-num_tokens // layout.block_tokens)
        self.tables = [
            self.pool.allocate(1 if group.rule.state else blocks, number) or []
            for number, group in enumerate(layout.groups)
        ]
        self.computed = [*sorted(rng.sample(range(1, num_tokens), min(3, num_tokens - 1))), num_tokens]
        self._digests = digests

    def meet(self, wired: Wired) -> None:
        self.source = HandoffSource(
            self.pool,
            lease_s=10.0,
            max_leases=1,
            max_leased_blocks=1 << 20,
            follow_wait_s=10.0,
            digest=wired.digest if self._digests else None,
        )
        for _, _, ids in by_group(self.layout, self.areas):
            for block in ids:
                wired.set_generation(block, self.pool.generation(block))

    def fill(self, wired: Wired, turn: int) -> None:
        """The sequence in its blocks, a stranger everywhere else."""
        for number, group, ids in by_group(self.layout, self.areas):
            table, size = self.tables[number], c.element_bytes(self.layout, group)
            for i, block in enumerate(ids):
                if block in table:
                    codes = content(self.layout, number, table.index(block), self.num_tokens)
                elif group.rule.state:
                    codes = c.state_of(self.layout, number, _STRANGER + i)
                else:
                    codes = c.block_of(self.layout, number, _STRANGER // self.layout.block_tokens + i)
                wired.write(block, c.packed(codes, size, turn))

    def announce(self, handoff_id: str) -> Iterator[None]:
        """As a prefill worker does (prefill_worker/core.py)."""
        size = self.layout.block_tokens
        announced: dict[int, int] = {}
        self.source.open(handoff_id, 0.0)
        for computed in self.computed:
            for number, group in enumerate(self.layout.groups):
                needed = group.rule.needed(self.num_tokens, size)
                end = needed.stop if computed == self.num_tokens else 0 if group.rule.state else computed // size
                first = announced.get(number, needed.start)
                if end > first:
                    blocks = self.tables[number][first:end]
                    assert self.source.announce(handoff_id, first, blocks, 0.0, number) is None
                    announced[number] = end
            yield
        self.source.finish(handoff_id, self.num_tokens, (7,), 0.0)
        yield


class Receiving:
    """The reader, with room as an engine reserves it. It has the first `cached` blocks from an earlier turn."""

    def __init__(
        self, layout: KvLayout, num_tokens: int, rng: random.Random, *, cached: int = 0, fault: Fault | None = None
    ) -> None:
        self.layout, self.num_tokens = layout, num_tokens
        self.areas = shapes(layout, num_tokens, (5, 1, 2))
        self.pool = shuffled_pool(self.areas, rng)
        self.sequence: Any = SimpleNamespace(
            tables=[[] for _ in layout.groups], spec=SimpleNamespace(adapter=""), adapter=None
        )
        self.groups = KvGroups([group.rule for group in layout.groups], self.pool, layout.block_tokens)
        names = [i.to_bytes(16) for i in range(num_tokens // layout.block_tokens)]
        self.cached: dict[int, tuple[int, int]] = {}  # by block: its group, and its place in the sequence
        for number, group in enumerate(layout.groups):
            held = [] if group.rule.state else self.pool.allocate(cached, number) or []
            for i, block in enumerate(held):
                self.pool.publish(block, names[i])
                self.cached[block] = number, i
            self.pool.unpin(reversed(held))
        rooms = self.groups.reserve(self.sequence, names, num_tokens)
        assert rooms is not None
        self.rooms: tuple[Room, ...] = rooms
        self._fault = fault

    def meet(self, wired: Wired) -> None:
        def submit(order: PullOrder) -> None:
            wired.transport.submit(order if self._fault is None else self._fault(wired, self.layout, order))

        self.reader = HandoffReader(
            self.pool,
            submit,
            wired.transport.abandon,
            block_bytes=[size for _, size in self.areas],
            pull_timeout_s=10.0,
            announce_timeout_s=10.0,
            renew_every_s=3.0,
            max_blocks_per_pull=5,
            max_quarantined_blocks=0,
        )

    def fill(self, wired: Wired, turn: int) -> None:
        for block, (number, i) in self.cached.items():
            size = c.element_bytes(self.layout, self.layout.groups[number])
            wired.keep(block, c.packed(content(self.layout, number, i, self.num_tokens), size, turn))

    def begin(self, handoff_id: str) -> None:
        self.reader.begin(1, handoff_id, SOURCE, self.num_tokens, 1000.0, 0.0)

    @property
    def moved(self) -> dict[int, tuple[int, int]]:
        """By block that must come: its group, and its place in the table."""
        return {
            room.table[i]: (number, i)
            for number, room in enumerate(self.rooms)
            for i in range(room.skip, len(room.table))
        }


def hand_over(
    make: Callable[[Shapes, Shapes, int], Wired],
    layout: KvLayout,
    num_tokens: int,
    rng: random.Random,
    *,
    cached: int = 0,
    fault: Fault | None = None,
    digests: bool = True,
) -> None:
    """From the source's memory into the reader's; then look at every element."""
    computing = Computing(layout, num_tokens, rng, digests=digests and fault is None)
    receiving = Receiving(layout, num_tokens, rng, cached=cached, fault=fault)
    wired = make(computing.areas, receiving.areas, c.POISON_BYTE)
    seen: list[list[list[np.ndarray]]] = []  # by turn, memory and block
    try:
        computing.meet(wired)
        receiving.meet(wired)
        for turn in range(c.passes(layout)):
            computing.fill(wired, turn)
            receiving.fill(wired, turn)
            complete = one_handoff(wired, computing, receiving, f"h{turn}", rng.randrange(len(computing.computed)))
            assert complete.pulled_bytes == sum(receiving.areas[number][1] for number, _ in receiving.moved.values())
            wired.check()
            seen.append([[block.copy() for block in memory.blocks] for memory in wired.memories])
    finally:
        wired.close()
    for memory, held in enumerate(wired.held):
        there = [turn[memory] for turn in seen]
        look_at_blocks(receiving, there, held)
        look_as_a_token_does(receiving, there, held)
    nothing_is_held(computing, receiving)


def one_handoff(
    wired: Wired, computing: Computing, receiving: Receiving, handoff_id: str, begin_after: int
) -> HandoffComplete:
    """`begin_after`: so many chunks are announced before anybody follows."""
    source, reader = computing.source, receiving.reader
    complete: list[HandoffComplete] = []

    def exchange() -> None:
        for _, message in reader.take_messages():
            source.on_message(READER, message, 0.0)
        for _, message in source.take_messages():
            reader.on_message(SOURCE, message, 0.0)
        arrived, wired.events[:] = list(wired.events), []
        for event in arrived:
            reader.on_transport(event, 0.0)
        for event in reader.take_events():
            match event:
                case NeedBlocks():
                    reader.provide(1, receiving.rooms, 0.0)
                case HandoffComplete():
                    complete.append(event)
                case HandoffBroken(_, reason, detail):
                    raise AssertionError(f"{reason}: {detail}")

    def look() -> bool | None:
        exchange()
        return complete != [] or None

    for number, _ in enumerate(computing.announce(handoff_id)):
        if number == begin_after:
            receiving.begin(handoff_id)
        exchange()
    wired.wait(look)
    exchange()  # the release
    return complete[0]


# Looks.


def codes_of(layout: KvLayout, number: int, seen: list[list[np.ndarray]], block: int) -> np.ndarray:
    return c.unpacked([turn[block] for turn in seen], c.element_bytes(layout, layout.groups[number]))


def look_at_blocks(receiving: Receiving, seen: list[list[np.ndarray]], held: Held | None = None) -> None:
    """Each block is as it must be: whole and right, or poison. `held`: by group, the heads that this memory has."""
    layout, there = receiving.layout, receiving.cached | receiving.moved
    for number, _, ids in by_group(layout, receiving.areas):
        for block in ids:
            found = codes_of(layout, number, seen, block)
            expected = np.full_like(found, c.POISON)
            if block in there:
                assert there[block][0] == number
                heads = None if held is None else held[number]
                expected = content(layout, *there[block], receiving.num_tokens, heads).reshape(-1)
            wrong = np.flatnonzero(found != expected)
            if len(wrong):
                at = int(wrong[0])
                raise AssertionError(
                    f"block {block}, group {number}, element {at}: found {c.told(int(found[at]))}, "
                    f"expected {c.told(int(expected[at]))}; {len(wrong)} of {len(found)} are wrong"
                )


def look_as_a_token_does(receiving: Receiving, seen: list[list[np.ndarray]], held: Held | None = None) -> None:
    """The next token finds, by its table, every earlier token that its rule names."""
    layout, num_tokens, size = receiving.layout, receiving.num_tokens, receiving.layout.block_tokens
    for number, group in enumerate(layout.groups):
        table = receiving.rooms[number].table
        if group.rule.state:
            assert (codes_of(layout, number, seen, table[0]) == c.state_of(layout, number, num_tokens)).all()
            continue
        heads = range(group.kv_heads) if held is None else held[number]
        width = group.block_shape(size)[-1]
        layers, planes, kv_heads, elements = np.ix_(group.layers, range(group.planes), heads, range(width))
        shape = (len(group.layers), group.planes, len(heads), size, width)
        for token in range(group.rule.first(num_tokens), num_tokens):
            assert table[token // size] >= 0
            block = codes_of(layout, number, seen, table[token // size]).reshape(shape)
            expected = c.coordinate(number, layers, planes, kv_heads, token, elements)
            assert (block[:, :, :, token % size] == expected).all(), (number, token)


def nothing_is_held(computing: Computing, receiving: Receiving) -> None:
    assert computing.source.is_idle()
    assert receiving.reader.is_idle()
    for table in computing.tables:
        computing.pool.unpin(table)
    receiving.pool.unpin(block for table in receiving.sequence.tables for block in table if block >= 0)
    for pool in (computing.pool, receiving.pool):
        pool.check()
        assert pool.is_idle()
