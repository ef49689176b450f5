"""Every element of KV stands where its coordinate says, between workers of any number of ranks.

As tests/contract/test_coordinates.py, whose two sides these are; but source and reader have a memory for each of their
ranks, with the heads that this rank computes with. What is planted at the end are the silent corruptions that other
systems have shipped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import ranked, shards, transport_inprocess
from kv_transfer.layout import FULL, Group, KvLayout, Rule
from kv_transfer.shards import Piece, Plan
from kv_transfer.transport import Parts, PullOutcome, Slice
from tests.support.many_ranks import RanksInProcess, RanksOverNixl
from tests.support.two_sides import LAYOUTS, Shapes, hand_over, heads, latent, layout, state
from tests.support.wired import Wired

DEGREES = (1, 2, 4, 8)
PAIRS = [(source, reader) for source in DEGREES for reader in DEGREES]


def between(kv_layout: KvLayout, source: int, reader: int, num_tokens: int, seed: Any, **options: Any) -> None:
    def make(source_areas: Shapes, reader_areas: Shapes, poison: int) -> Wired:
        return RanksInProcess(kv_layout, (source, reader), source_areas, reader_areas, poison)

    hand_over(make, kv_layout, num_tokens, random.Random(seed), digests=False, **options)


KINDS = {
    "heads": lambda count: [heads(FULL, [0, 2], count, 1, "bfloat16")],
    "a window": lambda count: [heads(FULL, [1], count, 1), heads(Rule(window=6), [0, 2], count, 2, "bfloat16")],
    "other heads in a window": lambda count: [heads(FULL, [1], 17 - count, 1), heads(Rule(window=6), [0], count, 1)],
    "latent beside heads": lambda count: [latent([0, 3], 5), heads(FULL, [1, 2], count, 1)],
    "state beside heads": lambda count: [heads(FULL, [1], count, 1), state([0, 2], 3)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "reader"), PAIRS)
def test_every_element_between_any_degrees(kind: str, source: int, reader: int) -> None:
    for count in range(1, 17):
        size = (1, 2, 4)[count % 3]
        between(layout(size, *KINDS[kind](count)), source, reader, 7, f"{kind} {count}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_between_unequal_degrees(name: str) -> None:
    for source, reader in ((1, 4), (4, 1), (2, 4), (8, 2), (4, 4)):
        between(LAYOUTS[name], source, reader, 29, name)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(DEGREES),
    st.sampled_from(DEGREES),
    st.integers(1, 16),
    st.sampled_from([*KINDS]),
    st.sampled_from([1, 2, 4, 5, 16]),
    st.integers(1, 40),
    st.integers(0, 1 << 30),
)
def test_any_page_size_length_and_cache(
    source: int, reader: int, count: int, kind: str, size: int, num_tokens: int, seed: int
) -> None:
    cached = random.Random(seed).randrange(num_tokens // size + 1)
    between(layout(size, *KINDS[kind](count)), source, reader, num_tokens, seed, cached=cached)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "source", "reader", "name"),
    [
        ("read", 1, 1, "plain"),
        ("write", 1, 1, "windows beside full"),
        ("read", 2, 1, "state beside windows"),
        ("read", 1, 2, "latent beside heads"),
        ("write", 2, 2, "windows of other heads"),
        ("write", 2, 1, "plain"),
        ("write", 1, 2, "state beside windows"),
    ],
)
def test_every_element_between_processes_over_nixl(mode: str, source: int, reader: int, name: str) -> None:
    def over_nixl(source_areas: Shapes, reader_areas: Shapes, poison: int) -> Wired:
        return RanksOverNixl(mode, LAYOUTS[name], (source, reader), source_areas, reader_areas, poison)

    hand_over(over_nixl, LAYOUTS[name], 13, random.Random(name), digests=False)


# A test that cannot fail is worth nothing. Each of these was shipped by somebody.

FEW = layout(4, heads(FULL, [1, 2], 2, 2))
FOUR = layout(4, heads(FULL, [1, 2], 4, 2))
MANY = layout(4, heads(FULL, [2, 0, 1], 8, 2))
WITH_STATE = layout(4, heads(FULL, [1], 4, 2), state([0, 2], 8))
Bug = Any


def heads_by_modulo(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """Heads 0 1 2 3 0 1 2 3 on eight ranks, in place of 0 0 1 1 2 2 3 3."""
    right = shards.heads_of

    def wrong(group: Group, degree: int, rank: int) -> range:
        if group.kind != "heads" or group.kv_heads >= degree:
            return right(group, degree, rank)
        return range(rank % group.kv_heads, rank % group.kv_heads + 1)

    patch.setattr(shards, "heads_of", wrong)
    return FOUR, 8, 1


def replicated_taken_for_a_full_copy(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """A source whose ranks share heads is read from one rank alone, as if that one had all of them."""

    def wrong(kv_layout: KvLayout, source: int, reader: int, load: Sequence[int] = ()) -> Plan:
        del load
        (size,) = shards.block_bytes_of(kv_layout, source, 0)
        needed = [shards.heads_of(kv_layout.groups[0], reader, rank) for rank in range(reader)]
        return tuple((Piece(0, 0, kv_layout.groups[0].layers, n, (Slice(0, 0, size),)),) for n in needed)

    patch.setattr(ranked, "pieces_of", wrong)
    return FEW, 4, 1


def a_quarter_is_moved(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """And success is reported."""
    right = transport_inprocess.copy

    def wrong(source: np.ndarray, reader: np.ndarray, area: int, parts: Parts | None) -> None:
        assert parts is not None
        quarter = parts[area].slices[: max(1, len(parts[area].slices) // 4)]
        right(source, reader, 0, (replace(parts[area], slices=quarter),))

    patch.setattr(transport_inprocess, "copy", wrong)
    return MANY, 4, 2


def the_wrong_rank_counts(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """The first rank that has its data speaks for all."""
    right = ranked.RankedTransport._outcome

    def wrong(self: ranked.RankedTransport, fan: Any, event: PullOutcome) -> None:
        right(self, fan, event)
        if fan.pending and not fan.fenced:
            fan.pending.clear()
            self._fence(fan)

    patch.setattr(ranked.RankedTransport, "_outcome", wrong)
    right_advance = transport_inprocess.InProcessNetwork._advance

    def slow(self: Any, active: Any, now: float) -> None:
        if active.order.source.rank != 3 or now - active.started > 0.05:
            right_advance(self, active, now)

    patch.setattr(transport_inprocess.InProcessNetwork, "_advance", slow)
    return MANY, 4, 1


def past_the_end(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """Heads are counted from the model's first one in a memory that begins with a later one."""
    right = shards.slices_of

    def wrong(group: Group, tokens: int, some: range, at_reader: range, at_source: range) -> tuple[Slice, ...]:
        shift = some.start * tokens * group.width * 4
        moved = right(group, tokens, some, at_reader, range(some.start, some.start + len(at_source)))
        return tuple(Slice(s.reader_offset, s.source_offset + shift, s.num_bytes) for s in moved)

    patch.setattr(shards, "slices_of", wrong)
    return MANY, 2, 1


def ranks_worked_out_twice(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """The reader has its own idea of which rank of the source is which."""
    right = RanksInProcess.__init__

    def wrong(self: RanksInProcess, *args: Any, **options: Any) -> None:
        right(self, *args, **options)
        names = [source.peer for source in self.sources]
        for name, source in zip(names, [*self.sources[1:], self.sources[0]], strict=True):
            self.network.transports[name] = source
        for source in self.source_pools:  # the fence must not be what sees it
            source.generations[:] = 0

    patch.setattr(RanksInProcess, "__init__", wrong)
    patch.setattr(RanksInProcess, "set_generation", lambda self, block, value: _everywhere(self, block, value))
    return MANY, 4, 4


def _everywhere(self: RanksInProcess, block: int, value: int) -> None:
    for pool in self.source_pools:
        pool.generations[block] = value


def a_state_cut_in_rows(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """A state is taken for a row of equal shares, one of each rank."""
    right = shards.pieces_of

    def wrong(kv_layout: KvLayout, source: int, reader: int, load: Sequence[int] = ()) -> Plan:
        plan = right(kv_layout, source, reader, load)
        share = kv_layout.groups[1].width // source
        shares = [
            Piece(rank, 1, kv_layout.groups[1].layers, range(1), (Slice(rank * share, 0, share),))
            for rank in range(source)
        ]
        return tuple((*(p for p in pieces if p.group == 0), *shares) for pieces in plan)

    patch.setattr(ranked, "pieces_of", wrong)
    return WITH_STATE, 4, 2


def layers_by_index(patch: pytest.MonkeyPatch) -> tuple[KvLayout, int, int]:
    """The row of a layer is looked for under its number in the model."""
    right = shards.slices_of

    def wrong(group: Group, tokens: int, some: range, at_reader: range, at_source: range) -> tuple[Slice, ...]:
        rows = right(group, tokens, some, at_reader, at_source)
        if len(rows) == 1:
            return rows
        return tuple(
            replace_source(rows[i], rows[group.layers[i // group.planes] * group.planes + i % group.planes])
            for i in range(len(rows))
        )

    patch.setattr(shards, "slices_of", wrong)
    return MANY, 2, 4


def replace_source(one: Slice, other: Slice) -> Slice:
    return Slice(one.reader_offset, other.source_offset, one.num_bytes)


# How each is seen, and how if nothing were proved. What the proof refuses is not connected, or fails; a transport
# refuses what lies outside a block; the others only a look at the bytes can find.
BUGS = {
    heads_by_modulo: ("are wrong", "are wrong"),
    replicated_taken_for_a_full_copy: ("not reachable", "are wrong"),
    a_quarter_is_moved: ("are wrong", "are wrong"),
    the_wrong_rank_counts: ("lacks heads", "are wrong"),
    past_the_end: ("not reachable", "not reachable"),
    ranks_worked_out_twice: ("are wrong", "are wrong"),
    a_state_cut_in_rows: ("are wrong", "are wrong"),
    layers_by_index: ("are wrong", "are wrong"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("proved", [True, False], ids=["", "without the proof"])
def test_what_others_have_shipped_fails(bug: Bug, proved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pytest.MonkeyPatch()
    kv_layout, source, reader = bug(plain)
    plain.undo()
    between(kv_layout, source, reader, 13, 1)
    bug(monkeypatch)
    words = BUGS[bug][not proved]
    if not proved:
        monkeypatch.setattr(ranked, "unsound", lambda *_: "")
        monkeypatch.setattr(ranked, "missing", lambda *_: "")
    with pytest.raises(AssertionError, match=words):
        between(kv_layout, source, reader, 13, 1)
