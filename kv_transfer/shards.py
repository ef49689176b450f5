"""Which rank of a worker holds which part of its KV, and what a rank reads from the ranks of another worker.

A worker of degree T has T ranks, each a process with a device. All have the same block ids and the same block tables;
of a block, each rank holds its own part:

    heads           rank r: the model's KV heads [r * H // T, (r + 1) * H // T); where there are fewer heads than ranks,
                    head r * H // T, and so several ranks hold the same one
    latent, state   whole, on every rank

That is a property of a group, not of a model: one model may have all three kinds.

    source, T = 2     rank 0 [0 1]       rank 1 [2 3]
                            /    \\            /    \\
    reader, T = 4      r 0 [0]  r 1 [1]  r 2 [2]  r 3 [3]

`pieces_of` says for every rank of a reader which piece comes from which rank of the source, down to the bytes of a
block. It is asked once, by the reader, when two workers meet; what it says is then passed on and never found out a
second time. Everything is said in the model's own numbers of heads and layers: there is no arithmetic on degrees
anywhere else. `missing` is the proof: what has arrived is complete if, by that arithmetic, nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kv_transfer.layout import Group, KvLayout
from kv_transfer.transport import AreaParts, Slice

MAX_DEGREE = 64


def heads_of(group: Group, degree: int, rank: int) -> range:
    """The KV heads that a rank holds, by the model's numbers. A latent vector and a state count as one head."""
    if not 0 <= rank < degree:
        raise ValueError(f"rank {rank} of {degree}")
    if group.kind != "heads":
        return range(group.kv_heads)
    first = rank * group.kv_heads // degree
    return range(first, max(first + 1, (rank + 1) * group.kv_heads // degree))


def part_of(group: Group, degree: int, rank: int) -> Group:
    """The group as it is in this rank's memory."""
    return replace(group, kv_heads=len(heads_of(group, degree, rank)))


def block_bytes_of(layout: KvLayout, degree: int, rank: int) -> tuple[int, ...]:
    """Of a block in this rank's memory, by group."""
    return tuple(part_of(group, degree, rank).block_bytes(layout.block_tokens) for group in layout.groups)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank of a reader gets of every block of a group from one rank of the source: these heads of these
    layers, by the model's numbers. `slices`: where they lie in a block, at the reader and at the source.
    """

    source_rank: int
    group: int
    layers: tuple[int, ...]
    heads: range
    slices: tuple[Slice, ...]

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self.slices)


Plan = tuple[tuple[Piece, ...], ...]  # by rank of the reader


def pieces_of(layout: KvLayout, source_degree: int, reader_degree: int, load: Sequence[int] = ()) -> Plan:
    """Where several ranks of the source hold a head, the one with the least to send does; `load`: what each has to send
    besides, in any unit of bytes.
    """
    for degree in (source_degree, reader_degree):
        if not 1 <= degree <= MAX_DEGREE:
            raise ValueError(f"a worker of {degree} ranks; the limit is {MAX_DEGREE}")
    sends = [*load] if load else [0] * source_degree
    plan: list[list[Piece]] = [[] for _ in range(reader_degree)]
    # What only one rank holds first: what may come from any of several is then spread around it.
    for number in sorted(range(len(layout.groups)), key=lambda n: layout.groups[n].kind != "heads"):
        group = layout.groups[number]
        held = [heads_of(group, source_degree, rank) for rank in range(source_degree)]
        for rank in range(reader_degree):
            needed = heads_of(group, reader_degree, rank)
            head = needed.start
            while head < needed.stop:
                holders = [s for s in range(source_degree) if head in held[s]]
                source = min(holders, key=lambda s: (sends[s], s != rank, s))
                heads = range(head, min(needed.stop, held[source].stop))
                slices = slices_of(group, layout.block_tokens, heads, needed, held[source])
                piece = Piece(source, number, group.layers, heads, slices)
                plan[rank].append(piece)
                sends[source] += piece.num_bytes
                head = heads.stop
    return tuple(map(tuple, plan))


def slices_of(group: Group, block_tokens: int, heads: range, at_reader: range, at_source: range) -> tuple[Slice, ...]:
    """`heads` of a block, between a memory that holds the heads `at_reader` and one that holds those `at_source`."""
    if group.rule.state:
        return (Slice(0, 0, group.width),)
    rows = len(group.layers) * group.planes
    head_bytes = group.block_bytes(block_tokens) // (rows * group.kv_heads)
    if heads == at_reader == at_source:
        return (Slice(0, 0, rows * len(heads) * head_bytes),)
    return tuple(
        Slice(
            (row * len(at_reader) + heads.start - at_reader.start) * head_bytes,
            (row * len(at_source) + heads.start - at_source.start) * head_bytes,
            len(heads) * head_bytes,
        )
        for row in range(rows)  # a layer's keys, then its values
    )


def parts_from(
    layout: KvLayout, pieces: Sequence[Piece], rank: int, reader_degree: int, source: int, source_degree: int
) -> tuple[AreaParts, ...]:
    """What this rank of the reader moves from one rank of the source, as a transport has to know it: by area."""
    own, their = block_bytes_of(layout, reader_degree, rank), block_bytes_of(layout, source_degree, source)
    return tuple(
        AreaParts(
            own[number],
            their[number],
            tuple(s for p in pieces if (p.group, p.source_rank) == (number, source) for s in p.slices),
        )
        for number in range(len(layout.groups))
    )


def missing(
    layout: KvLayout,
    degree: int,
    arrived: Sequence[Iterable[Piece]],
    groups: Iterable[int] | None = None,
) -> str:
    """What the ranks of a reader need of a block and have not got; empty: nothing is missing. `arrived` is by rank.

    Needed are, for each rank, all layers of each of `groups` (None: all) with the heads that the rank computes with,
    and every byte that it keeps of a block. What arrived is added up by layer and head, and by byte.
    """
    if len(arrived) != degree:
        return f"{len(arrived)} ranks say what arrived, the worker has {degree}"
    for rank in range(degree):
        pieces = list(arrived[rank])
        for number in range(len(layout.groups)) if groups is None else groups:
            group = layout.groups[number]
            of_group = [piece for piece in pieces if piece.group == number]
            needed = heads_of(group, degree, rank)
            for layer in group.layers:
                gap = _gap([p.heads for p in of_group if layer in p.layers], needed)
                if gap:
                    return f"rank {rank} lacks heads {gap.start} to {gap.stop - 1} of layer {layer}, group {number}"
            size = part_of(group, degree, rank).block_bytes(layout.block_tokens)
            gap = _gap([s.at_reader for p in of_group for s in p.slices], range(size))
            if gap:
                return f"rank {rank} lacks bytes {gap.start} to {gap.stop - 1} of a block of group {number}"
    return ""


def _gap(ranges: Iterable[range], needed: range) -> range:
    """The first part of `needed` that lies in none of them; empty: all of it lies in some."""
    reached = needed.start
    for one in sorted(ranges, key=lambda r: r.start):
        if one.start > reached:
            return range(reached, min(one.start, needed.stop))
        reached = max(reached, one.stop)
        if reached >= needed.stop:
            break
    return range(reached, needed.stop)


def unsound(layout: KvLayout, source_degree: int, reader_degree: int, plan: Plan) -> str:
    """Why a plan must not be used; empty: it may. It leaves nothing out, takes only what a rank has, and writes no byte
    twice and none outside a block.
    """
    why = missing(layout, reader_degree, plan)
    if why:
        return why
    for rank, pieces in enumerate(plan):
        own = block_bytes_of(layout, reader_degree, rank)
        written = [0] * len(own)
        for piece in pieces:
            group, source = layout.groups[piece.group], piece.source_rank
            if not 0 <= source < source_degree:
                return f"rank {rank} reads from rank {source}, and the source has {source_degree}"
            held = heads_of(group, source_degree, source)
            if piece.heads.start not in held or piece.heads.stop - 1 not in held:
                return f"heads {piece.heads.start} to {piece.heads.stop - 1} are not all on rank {source} of the source"
            size = part_of(group, source_degree, source).block_bytes(layout.block_tokens)
            for one in piece.slices:
                if one.outside(own[piece.group], size):
                    return f"rank {rank}: {one} lies outside a block of group {piece.group}"
            written[piece.group] += piece.num_bytes
        if written != list(own):
            return f"rank {rank} would write {written} bytes of its blocks, which have {list(own)}"
    return ""
