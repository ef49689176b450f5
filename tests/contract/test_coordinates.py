"""Every element of KV stands, after a handoff, where its layer, head and token say, and nothing else has changed.

Two memories of one layout, of different numbers of blocks and with other ids for everything. The source is full of
coordinates: those of the sequence, and elsewhere those of a stranger. The reader is full of poison. It reserves room as
an engine does, hears of the blocks as a prompt is computed, pulls them, and then looks element by element at what it
has. What moves it are the real ends of a handoff, over a real transport.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.kv_groups import KvGroups
from kv_transfer.handoff import Room
from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.reader import HandoffBroken, HandoffComplete, HandoffReader, NeedBlocks
from kv_transfer.source import HandoffSource
from kv_transfer.transport import PullOrder
from tests.support import coordinates as c
from tests.support.wired import READER, SOURCE, InProcess, Nixl, Wired

_STRANGER = 1024  # its tokens count from here
Shapes = list[tuple[int, int]]  # of areas: blocks, bytes of each
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


def content(layout: KvLayout, number: int, index: int, num_tokens: int) -> np.ndarray:
    if layout.groups[number].rule.state:
        return c.state_of(layout, number, num_tokens)
    return c.block_of(layout, number, index)


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
        self.sequence: Any = SimpleNamespace(tables=[[] for _ in layout.groups])
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
            wired.pool.blocks[block][:] = c.packed(content(self.layout, number, i, self.num_tokens), size, turn)

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
) -> None:
    """From the source's memory into the reader's; then look at every element."""
    computing = Computing(layout, num_tokens, rng, digests=fault is None)
    receiving = Receiving(layout, num_tokens, rng, cached=cached, fault=fault)
    wired = make(computing.areas, receiving.areas, c.POISON_BYTE)
    seen: list[list[np.ndarray]] = []
    try:
        computing.meet(wired)
        receiving.meet(wired)
        for turn in range(c.passes(layout)):
            computing.fill(wired, turn)
            receiving.fill(wired, turn)
            complete = one_handoff(wired, computing, receiving, f"h{turn}", rng.randrange(len(computing.computed)))
            assert complete.pulled_bytes == wired.pool.memory().bytes_of(list(receiving.moved))
            wired.pool.check()
            seen.append([block.copy() for block in wired.pool.blocks])
    finally:
        wired.close()
    look_at_blocks(receiving, seen)
    look_as_a_token_does(receiving, seen)
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


def look_at_blocks(receiving: Receiving, seen: list[list[np.ndarray]]) -> None:
    """Each block is as it must be: whole and right, or poison."""
    layout, there = receiving.layout, receiving.cached | receiving.moved
    for number, _, ids in by_group(layout, receiving.areas):
        for block in ids:
            found = codes_of(layout, number, seen, block)
            expected = np.full_like(found, c.POISON)
            if block in there:
                assert there[block][0] == number
                expected = content(layout, *there[block], receiving.num_tokens).reshape(-1)
            wrong = np.flatnonzero(found != expected)
            if len(wrong):
                at = int(wrong[0])
                raise AssertionError(
                    f"block {block}, group {number}, element {at}: found {c.told(int(found[at]))}, "
                    f"expected {c.told(int(expected[at]))}; {len(wrong)} of {len(found)} are wrong"
                )


def look_as_a_token_does(receiving: Receiving, seen: list[list[np.ndarray]]) -> None:
    """The next token finds, by its table, every earlier token that its rule names."""
    layout, num_tokens, size = receiving.layout, receiving.num_tokens, receiving.layout.block_tokens
    for number, group in enumerate(layout.groups):
        table = receiving.rooms[number].table
        if group.rule.state:
            assert (codes_of(layout, number, seen, table[0]) == c.state_of(layout, number, num_tokens)).all()
            continue
        layers, planes, kv_heads, elements = np.ix_(
            group.layers, range(group.planes), range(group.kv_heads), range(group.width)
        )
        for token in range(group.rule.first(num_tokens), num_tokens):
            assert table[token // size] >= 0
            block = codes_of(layout, number, seen, table[token // size]).reshape(group.block_shape(size))
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


# The tests.


def in_process(source: Shapes, reader: Shapes, poison: int) -> Wired:
    wired = InProcess(source, reader, poison)
    wired.network.blocks_per_step = 2
    return wired


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_is_where_its_coordinate_says(name: str) -> None:
    for num_tokens in LENGTHS:
        hand_over(in_process, LAYOUTS[name], num_tokens, random.Random(f"{name} {num_tokens}"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_the_reader_has_already_is_not_moved(name: str) -> None:
    for num_tokens in LENGTHS:
        full = num_tokens // LAYOUTS[name].block_tokens
        for cached in {full // 2, full} - {0}:
            hand_over(in_process, LAYOUTS[name], num_tokens, random.Random(f"{name} {num_tokens}"), cached=cached)


RULES = st.one_of(
    st.just(FULL),
    st.builds(Rule, window=st.integers(1, 40)),
    st.builds(Rule, chunk=st.integers(1, 40)),
    st.builds(Rule, window=st.integers(0, 20), values=st.integers(1, 4)),
)


@st.composite
def layouts(draw: st.DrawFn) -> KvLayout:
    """Layers dealt out to the groups in any order; a state comes last, if there is one."""
    rules = draw(st.lists(RULES, min_size=1, max_size=4))
    if draw(st.booleans()):
        rules.append(Rule(state=True))
    dealt = draw(st.lists(st.integers(0, len(rules) - 1), max_size=4))
    owners = draw(st.permutations([*range(len(rules)), *dealt]))
    groups = []
    for number, rule in enumerate(rules):
        layers = tuple(layer for layer, owner in enumerate(owners) if owner == number)
        kv_heads, width = draw(st.integers(1, 3)), draw(st.integers(4, 6))
        dtype = draw(st.sampled_from(["float32", "bfloat16", "uint8"]))
        if rule.state:
            groups.append(state(layers, width))
        else:
            groups.append(Group(rule, layers, 1 if rule.values else kv_heads, width, dtype))
    return layout(draw(st.sampled_from([1, 2, 4, 5, 16])), *groups)


@settings(max_examples=50)
@given(layouts(), st.integers(1, 90), st.integers(0, 1 << 30))
@example(layout(4, heads(Rule(window=1), [0]), state([1])), 8, 0)
def test_any_layout(kv_layout: KvLayout, num_tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    cached = rng.randrange(num_tokens // kv_layout.block_tokens + 1)
    hand_over(in_process, kv_layout, num_tokens, rng, cached=cached)


@pytest.mark.parametrize(
    ("mode", "name", "num_tokens"),
    [
        ("read", "state beside windows", 29),
        ("read", "windows of two sizes", 75),
        ("write", "latent beside heads", 29),
        ("write", "chunks beside full", 23),
    ],
)
def test_every_element_over_nixl(mode: str, name: str, num_tokens: int) -> None:
    def over_nixl(source: Shapes, reader: Shapes, poison: int) -> Wired:
        return Nixl(mode, source, reader, poison)

    hand_over(over_nixl, LAYOUTS[name], num_tokens, random.Random(name))


def test_only_what_is_looked_at_is_moved() -> None:
    """Of a window two blocks or three, of a chunk what it has so far, of a state one blob: however long the prompt."""
    for num_tokens, window_blocks, chunk_blocks in ((7, 2, 2), (8, 2, 0), (64, 2, 0), (65, 3, 1), (74, 3, 1)):
        full = -(-num_tokens // 4)
        for name, of_second in (
            ("windows beside full", window_blocks),
            ("chunks beside full", chunk_blocks),
            ("state beside full", 1),
        ):
            receiving = Receiving(LAYOUTS[name], num_tokens, random.Random(name))
            assert len(receiving.moved) == full + of_second


# A test that cannot fail is worth nothing: each fault spoils what is pulled, or what it is pulled from.


def swapped(wired: Wired, layout: KvLayout, order: PullOrder) -> PullOrder:
    first, second, *others = order.local_blocks
    return replace(order, local_blocks=(second, first, *others))


def left_out(wired: Wired, layout: KvLayout, order: PullOrder) -> PullOrder:
    return replace(
        order,
        remote_blocks=order.remote_blocks[:-1],
        local_blocks=order.local_blocks[:-1],
        generations=order.generations[:-1],
    )


def one_too_many(wired: Wired, layout: KvLayout, order: PullOrder) -> PullOrder:
    poison = (block for block, content in enumerate(wired.pool.blocks) if (content == c.POISON_BYTE).all())
    free = next(block for block in poison if block not in order.local_blocks)
    return replace(
        order,
        remote_blocks=(*order.remote_blocks, order.remote_blocks[0]),
        local_blocks=(*order.local_blocks, free),
        generations=(*order.generations, order.generations[0]),
    )


def another_block(wired: Wired, layout: KvLayout, order: PullOrder) -> PullOrder:
    """Of this sequence or of a stranger."""
    others = order.remote_blocks[1:]
    other = next(block for block in range(10) if block not in order.remote_blocks)
    assert isinstance(wired, InProcess)
    generations = (int(wired.source_pool.generations[other]), *order.generations[1:])
    return replace(order, remote_blocks=(other, *others), generations=generations)


def turned(axis: int) -> Fault:
    """Layers, planes, heads, slots or elements of one block are the other way round."""

    def spoil(wired: Wired, layout: KvLayout, order: PullOrder) -> PullOrder:
        assert isinstance(wired, InProcess)
        group = layout.groups[0]
        shape = (*group.block_shape(layout.block_tokens), c.element_bytes(layout, group))
        elements = wired.source_pool.blocks[order.remote_blocks[0]].reshape(shape)
        elements[:] = np.flip(elements, axis).copy()
        return order

    return spoil


@pytest.mark.parametrize(
    "fault",
    [swapped, left_out, one_too_many, another_block, *map(turned, range(5))],
    ids=["swapped", "left out", "one too many", "another", "layers", "planes", "heads", "slots", "elements"],
)
@pytest.mark.parametrize("name", ["windows of other heads", "state beside full"])
def test_what_is_wrong_is_seen(name: str, fault: Fault) -> None:
    def of_whole_pulls(wired: Wired, layout: KvLayout, order: PullOrder) -> PullOrder:
        in_first_group = max(order.local_blocks) < wired.pool.areas[0].num_blocks
        return fault(wired, layout, order) if in_first_group and len(order.local_blocks) == 5 else order

    with pytest.raises(AssertionError, match="are wrong"):
        hand_over(in_process, LAYOUTS[name], 75, random.Random(name), fault=of_whole_pulls)
