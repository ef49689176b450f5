"""The words that a reader and a source say to each other (docs/design.md, "One request")."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_GROUPS = 64  # of a layout
MOST_TRIED = 1000.0  # drafts that an Acceptance remembers
_MAX_METHOD_CHARS = 32


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """One incarnation of a worker. A restart has a larger epoch and is another peer.

    `rank`: of its processes, where it has several (kv_transfer/ranked.py). A worker speaks through its rank 0, the
    leader; only transports know the others.
    """

    worker_id: str
    epoch: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PeerHello:
    """`pairing`: what KvLayout says of it. `mixes`: a router has told it to hand KV over between schemes of weights."""

    peer: PeerId
    layout_fingerprint: str
    transport: str
    endpoint: bytes
    pairing: str = ""
    mixes: bool = False

    def fits(self, other: PeerHello, *, mixes: bool) -> bool:
        """Whether they may exchange KV. `mixes`: schemes of weights may differ."""
        if self.layout_fingerprint == other.layout_fingerprint:
            return True
        return mixes and bool(self.pairing) and self.pairing == other.pairing


# Reader to source.


@dataclass(frozen=True, slots=True)
class Follow:
    handoff_id: str


@dataclass(frozen=True, slots=True)
class Renew:
    handoff_id: str


@dataclass(frozen=True, slots=True)
class Release:
    handoff_id: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class Lend:
    """Lend what the cache holds of these blocks, from the first on (16-byte names)."""

    handoff_id: str
    names: tuple[bytes, ...]


ReaderMessage = Follow | Renew | Release | Lend

# Source to reader.


@dataclass(frozen=True, slots=True)
class BlocksAnnounced:
    """Blocks whose content is complete on the source's device; `first_index` is their place in the block table of the
    layout's group `group`. A group's announcements follow one another; the first begins where the reader begins to look
    (Rule.needed). Of a sequence that runs there may be gaps: what they leave out nobody looks at any more.
    """

    handoff_id: str
    first_index: int
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[int, ...] = ()
    group: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of the chosen token, and the best alternatives as (token_id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a sequence's drafts were worth, when it had `at` tokens: fading counts of those accepted and tried. Only who
    drafts by the same method can use it.
    """

    method: str
    accepted: float
    tried: float
    at: int

    @property
    def sound(self) -> bool:
        """It may come from anywhere."""
        short = len(self.method) <= _MAX_METHOD_CHARS
        return short and math.isfinite(self.tried) and 0.0 <= self.accepted <= self.tried <= MOST_TRIED


@dataclass(frozen=True, slots=True)
class FinalAnnounced:
    """The announced blocks hold the KV of `num_tokens` tokens; `emitted` is the answer so far (nothing if lent).

    Its last token was sampled by the source, those before it were known. `logprobs` are of the last so many tokens.
    """

    handoff_id: str
    num_tokens: int
    emitted: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    acceptance: Acceptance | None = None


class RefusalReason(enum.StrEnum):
    UNKNOWN_HANDOFF = "unknown_handoff"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    SOURCE_FAILED = "source_failed"
    FORBIDDEN = "forbidden"
    NOT_CACHED = "not_cached"  # what should be lent is not there, or not any more


@dataclass(frozen=True, slots=True)
class Refused:
    handoff_id: str
    reason: RefusalReason
    detail: str = ""


SourceMessage = BlocksAnnounced | FinalAnnounced | Refused


@dataclass(frozen=True, slots=True)
class Room:
    """A reader's block table in one group. Blocks [first, len(table)) are needed, those before `skip` are there."""

    table: tuple[int, ...]
    first: int
    skip: int


class BlockPins(Protocol):
    """The part of a block pool that leases and pulls need. A pinned block is never reused for other content."""

    def pin(self, block_ids: Sequence[int]) -> None: ...

    def unpin(self, block_ids: Sequence[int]) -> None: ...

    def generation(self, block_id: int) -> int: ...
