"""Moving bytes: the one seam between deciding what to pull and pulling it.

A pull has two ends. Its *outcome* says whether the blocks may be used; its *finality* says that no byte of it can
land any more. They differ when a pull is given up: releasing a transfer does not stop it, so the local blocks stay
pinned until the transport says final.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from kv_transfer.handoff import PeerId


@dataclass(frozen=True, slots=True)
class KvArea:
    """The pool of one group. Its block i occupies [base_address + i * block_bytes, + block_bytes)."""

    base_address: int
    block_bytes: int
    num_blocks: int


class AreaIndex:
    """Which area a block id lies in. Ids count through the areas: the first of area k is the sum of the counts before.

    area 0: ids [0, 10) | area 1: [10, 14) | area 2: [14, 30)
    """

    def __init__(self, areas: Sequence[KvArea]) -> None:
        self._block_bytes = [area.block_bytes for area in areas]
        self._ends = list(itertools.accumulate(area.num_blocks for area in areas))
        self.num_blocks = self._ends[-1]

    def holds(self, block_ids: Sequence[int]) -> bool:
        """All of them are ids of blocks."""
        return not block_ids or (min(block_ids) >= 0 and max(block_ids) < self.num_blocks)

    def areas_of(self, block_ids: Sequence[int]) -> list[int]:
        if len(self._ends) == 1:
            return [0] * len(block_ids)
        return [bisect.bisect_right(self._ends, block) for block in block_ids]

    def bytes_of(self, block_ids: Sequence[int]) -> int:
        if len(self._ends) == 1:
            return len(block_ids) * self._block_bytes[0]
        return sum(self._block_bytes[area] for area in self.areas_of(block_ids))


def unlike(own: AreaIndex, own_ids: Sequence[int], their: AreaIndex, their_ids: Sequence[int]) -> str | None:
    """Why the pairs (own_ids[i], their_ids[i]) cannot be copied, in whichever direction; None: they can."""
    for whose, index, ids in (("a block", own, own_ids), ("the peer's block", their, their_ids)):
        if not index.holds(ids):
            return f"the id of {whose} is out of range: {min(ids)} to {max(ids)}, of {index.num_blocks} blocks"
    if len(own_ids) != len(their_ids):
        return f"{len(own_ids)} blocks for {len(their_ids)} of the peer"
    own_areas, their_areas = own.areas_of(own_ids), their.areas_of(their_ids)
    if own_areas == their_areas:
        return None
    at = next(i for i, (a, b) in enumerate(zip(own_areas, their_areas, strict=True)) if a != b)
    return (
        f"block {own_ids[at]} lies in area {own_areas[at]} and the peer's block {their_ids[at]} in area "
        f"{their_areas[at]}: what belongs to one group of layers was paired with what belongs to another"
    )


class Slice(NamedTuple):
    """A run of bytes of a block, at the reader and at the source."""

    reader_offset: int
    source_offset: int
    num_bytes: int

    @property
    def at_reader(self) -> range:
        return range(self.reader_offset, self.reader_offset + self.num_bytes)

    def outside(self, reader_bytes: int, source_bytes: int) -> bool:
        """It does not lie within blocks of these sizes."""
        return (
            min(self.reader_offset, self.source_offset) < 0
            or self.num_bytes < 1
            or self.reader_offset + self.num_bytes > reader_bytes
            or self.source_offset + self.num_bytes > source_bytes
        )


@dataclass(frozen=True, slots=True)
class AreaParts:
    """What a pull moves of a block of one area, where the two memories hold different parts of the model: `slices`
    between a reader's block of `reader_bytes` and a source's of `source_bytes`. None: nothing comes from there.
    """

    reader_bytes: int
    source_bytes: int
    slices: tuple[Slice, ...]

    @property
    def is_whole(self) -> bool:
        """Block by block, as between equal memories."""
        return self.slices == (Slice(0, 0, self.reader_bytes),) and self.reader_bytes == self.source_bytes


Parts = tuple[AreaParts, ...]  # by area
Slices = tuple[tuple[Slice, ...], ...]  # by area


def misfit(own: Sequence[int], theirs: Sequence[int], parts: Parts | None) -> str:
    """Why nothing can be moved between memories whose blocks have these sizes, by area; empty: it can be."""
    if parts is None:
        return "" if list(own) == list(theirs) else f"blocks of {_listed(theirs)} bytes, ours have {_listed(own)}"
    for whose, sizes, agreed in (
        ("ours", own, [part.reader_bytes for part in parts]),
        ("theirs", theirs, [part.source_bytes for part in parts]),
    ):
        if list(sizes) != agreed:
            return f"{whose} are blocks of {_listed(sizes)} bytes, agreed were {_listed(agreed)}"
    for area, part in enumerate(parts):
        for one in part.slices:
            if one.outside(part.reader_bytes, part.source_bytes):
                return f"{one} lies outside a block of area {area}"
    return ""


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def not_agreed(parts: Parts | None, areas: Iterable[int]) -> str:
    """Why blocks of these areas do not come from a peer with which `parts` are agreed; empty: they do."""
    if parts is not None:
        for area in areas:
            if not parts[area].slices:
                return f"nothing of area {area} comes from this rank of the peer"
    return ""


@dataclass(frozen=True, slots=True)
class KvMemory:
    """A worker's KV pools as a transport sees them. Mapped for the life of the process, never moved.

    One area for each group of the layout, in its order; block ids count through them. `generations` is a host array of
    uint64, one per block, raised by the pool's owner before a block is reused. `read_block` returns one block's bytes
    (digest mode).
    """

    areas: tuple[KvArea, ...]
    device: str  # "cpu" or "cuda:N"
    generations: np.ndarray
    read_block: Callable[[int], memoryview]
    index: AreaIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", AreaIndex(self.areas))

    @property
    def num_blocks(self) -> int:
        return self.index.num_blocks

    def area_of(self, block_id: int) -> int:
        return self.index.areas_of((block_id,))[0]

    def bytes_of(self, block_ids: Sequence[int]) -> int:
        """What a pull into these blocks moves."""
        return self.index.bytes_of(block_ids)


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Copy source blocks `remote_blocks[i]` into `local_blocks[i]`; then check generations[i] (and digests[i]).

    The two blocks of a pair lie in areas of one number; else nothing is moved, and it is a TRANSPORT_ERROR.
    Without blocks it is a probe: it arrives if the source's generations can be read. Without `local_blocks` it moves
    nothing and is the fence alone; without `generations` it is the data alone, which may not be used before a fence.
    """

    pull_id: int
    source: PeerId
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[int, ...]
    timeout_s: float


class PullStatus(enum.StrEnum):
    ARRIVED = "arrived"
    FENCED = "fenced"  # a generation differed: the source reused a block
    DIGEST_MISMATCH = "digest_mismatch"
    TIMED_OUT = "timeout"
    PEER_LOST = "peer_lost"  # not connected, dead, or another epoch
    TRANSPORT_ERROR = "transport_error"
    ABANDONED = "abandoned"  # by the reader's own wish


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """Exactly one per submitted pull. If not `final`, exactly one PullFinal follows later."""

    pull_id: int
    status: PullStatus
    final: bool
    detail: str = ""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PullFinal:
    """No byte of this pull can land any more: its local blocks may be unpinned."""

    pull_id: int


TransportEvent = PullOutcome | PullFinal


class KvTransport(Protocol):
    """Events go to the `deliver` callable given at construction, from any thread, in order per pull."""

    name: str  # both sides of a pair must run the same, for example "nixl"

    def describe(self) -> str:
        """For people: implementation, memory type, lanes, pull mode."""
        ...

    def register(self, memory: KvMemory) -> None:
        """Make the pool reachable for peers. Once, before anything else."""
        ...

    def endpoint(self) -> bytes:
        """What a peer needs to reach this pool; opaque to everybody else. Never pickle."""
        ...

    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None:
        """Returns at once; wires up ahead of need. Failure shows as PEER_LOST of later pulls. Idempotent.

        `parts`: what our pulls move of a block, where the peer's memory holds another part of the model; None: whole
        blocks. The first that were agreed stand.
        """
        ...

    def disconnect(self, peer: PeerId) -> None:
        """Forget a peer: its pulls end as PEER_LOST."""
        ...

    def submit(self, order: PullOrder) -> None:
        """Never blocks, never raises for what a peer did: every order ends in an outcome by its deadline."""
        ...

    def abandon(self, pull_id: int) -> None:
        """The outcome is no longer wanted: ends as ABANDONED at once, final when it is. Unknown ids are ignored."""
        ...

    def close(self, timeout_s: float) -> None:
        """End every pull, leave no thread behind."""
        ...
