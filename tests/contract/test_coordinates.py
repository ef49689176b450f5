"""Every element of KV stands, after a handoff, where its layer, head and token say, and nothing else has changed.

Two memories of one layout, of different numbers of blocks and with other ids for everything. The source is full of
coordinates: those of the sequence, and elsewhere those of a stranger. The reader is full of poison. It reserves room as
an engine does, hears of the blocks as a prompt is computed, pulls them, and then looks element by element at what it
has. What moves it are the real ends of a handoff, over a real transport.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.transport import PullOrder
from tests.support import coordinates as c
from tests.support.two_sides import LAYOUTS, LENGTHS, Fault, Receiving, Shapes, hand_over, heads, layout, state
from tests.support.wired import InProcess, Nixl, Wired


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
