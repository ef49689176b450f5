"""What a sequence keeps for speculation: where to look up drafts, and how many of the last ones were accepted."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from engine.lookup import Lookup
from kv_transfer.handoff import Acceptance

_ASSUMED = 0.5  # acceptance, where nothing was seen
_ASSUMED_WEIGHT = 1.0  # in drafts
_MEMORY = 0.9  # what a verification still counts one later
_TOKEN_MEMORY = 0.99  # and a token later
_MOST = 0.98  # nothing is certain


@dataclass(frozen=True, slots=True)
class Drafted:
    """What became of a sequence's drafts here: verifications, drafts, and those accepted and kept."""

    verified: int = 0
    proposed: int = 0
    kept: int = 0
    acceptance: Acceptance | None = None


@dataclass(slots=True)
class Drafting:
    """What a sequence keeps for it. What it has learned of acceptance goes with it where it goes on elsewhere."""

    lookup: Lookup = field(default_factory=Lookup)
    accepted: float = 0.0
    tried: float = 0.0  # drafts, up to the first that was not accepted
    at: int = 0  # tokens, when these were counted
    assumed: float = _ASSUMED
    stands: int = 0  # tokens whose KV the draft model has written in `blocks` for this sequence
    blocks: list[int] = field(default_factory=list)
    drafted: Drafted = Drafted()

    def acceptance(self, num_tokens: int) -> float:
        self._fade(num_tokens)
        found = (self.accepted + self.assumed * _ASSUMED_WEIGHT) / (self.tried + _ASSUMED_WEIGHT)
        return min(found, _MOST)

    def wrote(self, table: Items[int], stands: int) -> None:
        """The draft model's KV of the first `stands` tokens is in the blocks of `table`."""
        self.stands = stands
        self.blocks[:] = table

    def stands_in(self, table: Items[int], block_tokens: int) -> int:
        """How much of it is in these blocks: one that another has taken the place of has nothing of this sequence."""
        same = min(len(self.blocks), len(table))
        if self.blocks[:same] != table[:same]:
            same = next(i for i, (had, has) in enumerate(zip(self.blocks, table, strict=False)) if had != has)
        return min(self.stands, same * block_tokens)

    def lost_blocks(self) -> None:
        self.stands = 0
        self.blocks.clear()

    def note(self, proposed: int, accepted: int) -> None:
        self.accepted = _MEMORY * self.accepted + accepted
        self.tried = _MEMORY * self.tried + min(accepted + 1, proposed)

    def count(self, proposed: int, kept: int, method: str) -> Drafted:
        """After `note`. `kept`: of those accepted, the ones that the answer had not ended before."""
        before, learned = self.drafted, Acceptance(method, self.accepted, self.tried, self.at)
        self.drafted = Drafted(before.verified + 1, before.proposed + proposed, before.kept + kept, learned)
        return self.drafted

    def brought(self, learned: Acceptance | None) -> None:
        """From where the sequence was before. `at` may be any number."""
        if learned is not None:
            self.accepted, self.tried, self.at = learned.accepted, learned.tried, min(self.at, learned.at)

    def _fade(self, num_tokens: int) -> None:
        fade = _TOKEN_MEMORY ** (num_tokens - self.at)
        self.accepted *= fade
        self.tried *= fade
        self.at = num_tokens
