"""Every element of KV stands, after a handoff, where its layer, head and token say, and nothing else has changed.

Two memories of one layout, of different numbers of blocks and with other ids for everything. The source is full of
coordinates: those of the sequence, and elsewhere those of a stranger. The reader is full of poison. It pulls what a
token after the prompt looks at, in pulls that mix the groups, and then reads element by element what it has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.transport import PullStatus
from tests.support import coordinates as c
from tests.support.wired import InProcess, Nixl, Wired

_STRANGER = 1024  # its tokens count from here
_BLOCKS_PER_PULL = 5


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
    "state": layout(4, state(range(3))),
    "state beside full": layout(4, heads(FULL, [3, 7]), state([0, 1, 2, 4, 5, 6])),
    "state beside windows": layout(
        4, heads(FULL, [3], 1), heads(WINDOW, [1, 2], 3, 2, "bfloat16"), state([0, 4], 3), latent([5], 7)
    ),
}
LENGTHS = (1, 3, 4, 7, 8, 9, 16, 17, 29, 64, 75)


@dataclass(frozen=True, slots=True)
class Places:
    """Where a side keeps a sequence: by group its table (for a state, of one slot). -1: not there."""

    tables: list[list[int]]

    @classmethod
    def shuffled(cls, layout: KvLayout, num_tokens: int, areas: list[tuple[int, int]], rng: random.Random) -> Places:
        tables, first = [], 0
        for group, (count, _) in zip(layout.groups, areas, strict=True):
            needed = 1 if group.rule.state else -(-num_tokens // layout.block_tokens)
            tables.append([first + i for i in rng.sample(range(count), needed)])
            first += count
        return cls(tables)


def sizes(layout: KvLayout, num_tokens: int, spare: Sequence[int]) -> list[tuple[int, int]]:
    """Blocks by group, with some to spare, and the bytes of each."""
    blocks = -(-num_tokens // layout.block_tokens)
    return [
        ((1 if group.rule.state else blocks) + spare[i % len(spare)], group.block_bytes(layout.block_tokens))
        for i, group in enumerate(layout.groups)
    ]


def first_index(layout: KvLayout, number: int, num_tokens: int) -> int:
    rule = layout.groups[number].rule
    return 0 if rule.state else rule.first_block(num_tokens, layout.block_tokens)


def handed_over(layout: KvLayout, num_tokens: int, theirs: Places, own: Places) -> list[tuple[int, int]]:
    """Pairs of ids: of each group the blocks from the first one on that a token after the prompt looks at."""
    pairs = []
    for number, (remote, local) in enumerate(zip(theirs.tables, own.tables, strict=True)):
        first = first_index(layout, number, num_tokens)
        pairs += zip(remote[first:], local[first:], strict=True)
    return pairs


def content(layout: KvLayout, number: int, index: int, num_tokens: int) -> np.ndarray:
    if layout.groups[number].rule.state:
        return c.state_of(layout, number, num_tokens)
    return c.block_of(layout, number, index)


def fill(wired: Wired, layout: KvLayout, num_tokens: int, areas: list[tuple[int, int]], at: Places, turn: int) -> None:
    """The sequence where `at` says, a stranger everywhere else."""
    first = 0
    for number, (group, (count, _)) in enumerate(zip(layout.groups, areas, strict=True)):
        table, size = at.tables[number], c.element_bytes(layout, group)
        for block in range(first, first + count):
            if block in table:
                codes = content(layout, number, table.index(block), num_tokens)
            elif group.rule.state:
                codes = c.state_of(layout, number, _STRANGER + block - first)
            else:
                codes = c.block_of(layout, number, _STRANGER // layout.block_tokens + block - first)
            wired.write(block, c.packed(codes, size, turn))
        first += count


Pairs = list[tuple[int, int]]
Fault = Callable[[KvLayout, Pairs, Wired], Pairs]


def hand_over(
    make: Callable[..., Wired],
    layout: KvLayout,
    num_tokens: int,
    rng: random.Random,
    fault: Fault | None = None,
) -> None:
    """From the source's memory into the reader's; then look at every element."""
    source_areas, reader_areas = sizes(layout, num_tokens, (2, 4, 3)), sizes(layout, num_tokens, (5, 1, 2))
    theirs = Places.shuffled(layout, num_tokens, source_areas, rng)
    own = Places.shuffled(layout, num_tokens, reader_areas, rng)
    generations = {block: rng.randrange(1 << 40) for table in theirs.tables for block in table}
    pairs = handed_over(layout, num_tokens, theirs, own)
    rng.shuffle(pairs)
    wired = make(source_areas, reader_areas, c.POISON_BYTE)
    seen: list[list[np.ndarray]] = []
    try:
        for block, generation in generations.items():
            wired.set_generation(block, generation)
        for turn in range(c.passes(layout)):
            fill(wired, layout, num_tokens, source_areas, theirs, turn)
            pulled = pairs if fault is None else fault(layout, pairs, wired)
            numbers = []
            for at in range(0, len(pulled), _BLOCKS_PER_PULL):
                remote, local = map(list, zip(*pulled[at : at + _BLOCKS_PER_PULL], strict=True))
                digests = [wired.digest(block) for block in remote]
                fence = [generations.get(block, 0) for block in remote]
                numbers.append(wired.order(remote, local, generations=fence, digests=digests))
            for number in numbers:
                outcome = wired.outcome(number)
                assert outcome.status is PullStatus.ARRIVED, outcome
            wired.pool.check()
            seen.append([block.copy() for block in wired.pool.blocks])
    finally:
        wired.close()
    look_at_blocks(layout, num_tokens, reader_areas, own, seen)
    look_as_a_token_does(layout, num_tokens, reader_areas, own, seen)


def codes_of(layout: KvLayout, number: int, seen: list[list[np.ndarray]], block: int) -> np.ndarray:
    return c.unpacked([turn[block] for turn in seen], c.element_bytes(layout, layout.groups[number]))


def look_at_blocks(
    layout: KvLayout, num_tokens: int, areas: list[tuple[int, int]], own: Places, seen: list[list[np.ndarray]]
) -> None:
    """Each block is as it must be: whole and right, or poison."""
    block = 0
    for number, (count, _) in enumerate(areas):
        moved = own.tables[number][first_index(layout, number, num_tokens) :]
        for _ in range(count):
            found = codes_of(layout, number, seen, block)
            expected = np.full_like(found, c.POISON)
            if block in moved:
                expected = content(layout, number, own.tables[number].index(block), num_tokens).reshape(-1)
            wrong = np.flatnonzero(found != expected)
            if len(wrong):
                at = int(wrong[0])
                raise AssertionError(
                    f"block {block}, group {number}, element {at}: found {c.told(int(found[at]))}, "
                    f"expected {c.told(int(expected[at]))}; {len(wrong)} of {len(found)} are wrong"
                )
            block += 1


def look_as_a_token_does(
    layout: KvLayout, num_tokens: int, areas: list[tuple[int, int]], own: Places, seen: list[list[np.ndarray]]
) -> None:
    """The next token finds, by its table, every earlier token that its rule names. Says nothing of `first_block`."""
    size = layout.block_tokens
    for number, group in enumerate(layout.groups):
        table = own.tables[number]
        if group.rule.state:
            assert (codes_of(layout, number, seen, table[0]) == c.state_of(layout, number, num_tokens)).all()
            continue
        layers, planes, kv_heads, elements = np.ix_(
            group.layers, range(group.planes), range(group.kv_heads), range(group.width)
        )
        for token in range(group.rule.first(num_tokens), num_tokens):
            block = codes_of(layout, number, seen, table[token // size]).reshape(group.block_shape(size))
            expected = c.coordinate(number, layers, planes, kv_heads, token, elements)
            assert (block[:, :, :, token % size] == expected).all(), (number, token)


def in_process(*areas: object) -> Wired:
    wired = InProcess(*areas)  # type: ignore[arg-type]
    wired.network.blocks_per_step = 2
    return wired


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_is_where_its_coordinate_says(name: str) -> None:
    for num_tokens in LENGTHS:
        hand_over(in_process, LAYOUTS[name], num_tokens, random.Random(f"{name} {num_tokens}"))


GROUPS = st.builds(
    lambda rule, kv_heads, width, dtype: (rule, kv_heads, width, dtype),
    st.one_of(
        st.just(FULL),
        st.builds(Rule, window=st.integers(1, 40)),
        st.builds(Rule, chunk=st.integers(1, 40)),
        st.builds(Rule, window=st.integers(0, 20), values=st.integers(1, 4)),
        st.just(Rule(state=True)),
    ),
    st.integers(1, 3),
    st.integers(4, 6),
    st.sampled_from(["float32", "bfloat16", "uint8"]),
)


@st.composite
def layouts(draw: st.DrawFn) -> KvLayout:
    """Layers dealt out to the groups in any order."""
    drawn = draw(st.lists(GROUPS, min_size=1, max_size=4))
    dealt = draw(st.lists(st.integers(0, len(drawn) - 1), max_size=4))
    owners = draw(st.permutations([*range(len(drawn)), *dealt]))
    groups = []
    for number, (rule, kv_heads, width, dtype) in enumerate(drawn):
        layers = tuple(layer for layer, owner in enumerate(owners) if owner == number)
        if rule.state:
            groups.append(state(layers, width))
        else:
            groups.append(Group(rule, layers, 1 if rule.values else kv_heads, width, dtype))
    return layout(draw(st.sampled_from([1, 2, 4, 5, 16])), *groups)


@settings(max_examples=60)
@given(layouts(), st.integers(1, 90), st.integers(0, 1 << 30))
@example(layout(4, heads(Rule(window=1), [0]), state([1])), 8, 0)
def test_any_layout(kv_layout: KvLayout, num_tokens: int, seed: int) -> None:
    hand_over(in_process, kv_layout, num_tokens, random.Random(seed))


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
    def over_nixl(*areas: object) -> Wired:
        return Nixl(mode, *areas)  # type: ignore[arg-type]

    hand_over(over_nixl, LAYOUTS[name], num_tokens, random.Random(name))


def test_only_what_is_looked_at_is_moved() -> None:
    """Of a window two blocks or three, of a chunk what it has so far, of a state one blob: however long the prompt."""
    windows, chunks, states = LAYOUTS["windows beside full"], LAYOUTS["chunks beside full"], LAYOUTS["state"]
    lengths = ((7, 2, 2), (8, 2, 0), (64, 2, 0), (65, 3, 1), (74, 3, 1), (76, 2, 1))
    for num_tokens, window_blocks, chunk_blocks in lengths:
        full = -(-num_tokens // 4)
        for moved_layout, of_second in ((windows, window_blocks), (chunks, chunk_blocks)):
            areas = sizes(moved_layout, num_tokens, (0,))
            places = Places.shuffled(moved_layout, num_tokens, areas, random.Random(1))
            assert len(handed_over(moved_layout, num_tokens, places, places)) == full + of_second
        places = Places.shuffled(states, num_tokens, sizes(states, num_tokens, (3,)), random.Random(1))
        assert len(handed_over(states, num_tokens, places, places)) == 1


# A test that cannot fail is worth nothing: each fault spoils what is pulled, or what it is pulled from.


def swapped(layout: KvLayout, pairs: Pairs, wired: Wired) -> Pairs:
    (a, b), (c, d), *others = sorted(pairs)  # the first two lie in the first area
    return [(a, d), (c, b), *others]


def left_out(layout: KvLayout, pairs: Pairs, wired: Wired) -> Pairs:
    return pairs[:-1]


def one_too_many(layout: KvLayout, pairs: Pairs, wired: Wired) -> Pairs:
    locals_ = {local for _, local in pairs}
    free = next(block for block in range(wired.pool.areas[0].num_blocks) if block not in locals_)
    return [*pairs, (min(pairs)[0], free)]


def a_strangers(layout: KvLayout, pairs: Pairs, wired: Wired) -> Pairs:
    """The right place and group, another sequence."""
    (remote, local), *others = sorted(pairs)
    used = {remote for remote, _ in pairs}
    return [(next(block for block in range(remote + len(pairs)) if block not in used), local), *others]


def turned(axis: int) -> Fault:
    """Layers, planes, heads, slots or elements of one block are the other way round."""

    def spoil(layout: KvLayout, pairs: Pairs, wired: Wired) -> Pairs:
        assert isinstance(wired, InProcess)
        group = layout.groups[0]
        shape = (*group.block_shape(layout.block_tokens), c.element_bytes(layout, group))
        elements = wired.source_pool.blocks[min(pairs)[0]].reshape(shape)
        elements[:] = np.flip(elements, axis).copy()
        return pairs

    return spoil


@pytest.mark.parametrize(
    "fault",
    [swapped, left_out, one_too_many, a_strangers, *map(turned, range(5))],
    ids=["swapped", "left out", "one too many", "a stranger's", "layers", "planes", "heads", "slots", "elements"],
)
@pytest.mark.parametrize("name", ["windows of other heads", "state beside full"])
def test_what_is_wrong_is_seen(name: str, fault: Fault) -> None:
    with pytest.raises(AssertionError, match="are wrong"):
        hand_over(in_process, LAYOUTS[name], 29, random.Random(name), fault)
