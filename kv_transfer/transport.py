"""Moving bytes: the one seam between deciding what to pull and pulling it.

A pull has two ends. Its *outcome* says whether the blocks may be used; its *finality* says that no byte of it can
land any more. They differ when a pull is given up: releasing a transfer does not stop it, so the local blocks stay
pinned until the transport says final.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kv_transfer.handoff import PeerId


@dataclass(frozen=True, slots=True)
class KvArea:
    """The pool of one group. Its block i occupies [base_address + i * block_bytes, + block_bytes)."""

    base_address: int
    block_bytes: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class KvMemory:
    """A worker's KV pools as a transport sees them. Mapped for the life of the process, never moved.

    Block ids count through the areas. `generations` is a host array of uint64, one per block, raised by the pool's
    owner before a block is reused. `read_block` returns one block's bytes (digest mode).
    """

    areas: tuple[KvArea, ...]
    device: str  # "cpu" or "cuda:N"
    generations: np.ndarray
    read_block: Callable[[int], memoryview]

    @property
    def num_blocks(self) -> int:
        return sum(area.num_blocks for area in self.areas)

    @property
    def base_address(self) -> int:
        return self.areas[0].base_address

    @property
    def block_bytes(self) -> int:
        return self.areas[0].block_bytes


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Copy source blocks `remote_blocks[i]` into `local_blocks[i]`; then check generations[i] (and digests[i]).

    Without blocks it is a probe: it arrives if the source's generations can be read.
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

    def connect(self, peer: PeerId, endpoint: bytes) -> None:
        """Returns at once; wires up ahead of need. Failure shows as PEER_LOST of later pulls. Idempotent."""
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
