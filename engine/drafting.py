"""What a sequence keeps for speculation: where to look up drafts, and how many of the last ones were accepted."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.lookup import Lookup

_ASSUMED = 0.5  # acceptance, where nothing was seen
_ASSUMED_WEIGHT = 1.0  # in drafts
_MEMORY = 0.9  # what a verification still counts one later
_TOKEN_MEMORY = 0.99  # and a token later
_MOST = 0.98  # nothing is certain


@dataclass(slots=True)
class Drafting:
    """What a sequence keeps for it. Nothing of it moves with the sequence: it is learned again."""

    lookup: Lookup = field(default_factory=Lookup)
    accepted: float = 0.0
    tried: float = 0.0  # drafts, up to the first that was not accepted
    at: int = 0  # tokens, when these were counted

    def acceptance(self, num_tokens: int) -> float:
        self._fade(num_tokens)
        found = (self.accepted + _ASSUMED * _ASSUMED_WEIGHT) / (self.tried + _ASSUMED_WEIGHT)
        return min(found, _MOST)

    def note(self, proposed: int, accepted: int) -> None:
        self.accepted = _MEMORY * self.accepted + accepted
        self.tried = _MEMORY * self.tried + min(accepted + 1, proposed)

    def _fade(self, num_tokens: int) -> None:
        fade = _TOKEN_MEMORY ** (num_tokens - self.at)
        self.accepted *= fade
        self.tried *= fade
        self.at = num_tokens
