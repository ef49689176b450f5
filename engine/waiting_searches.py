"""How long others wait because of a beam search that waits.

A search takes its room at once, which is much. So who waits behind it passes it, at first:

    waits 10 s ── others pass ──> holds the queue for 2 s: nobody behind it begins ──> others pass for 10 s ──> ...
    after 60 s it is given up, with an error that says what it has waited for; the router may place it elsewhere

One search at a time holds the queue, and between two such times there are 10 s, whoever's they are: so searches stop
others for a sixth of the time, however many wait. Handoffs take room beside the queue, and are never stopped.
"""

from __future__ import annotations

import math

from engine.sequence import Sequence

PASS_S = 10.0
HOLD_S = 2.0
GIVE_UP_S = 60.0


class WaitingSearches:
    def __init__(self) -> None:
        self._since: dict[Sequence, float] = {}  # in the order in which they came; infinite: not looked at yet
        self._holder: Sequence | None = None
        self._hold_ends = self._next_hold = -math.inf

    def came(self, sequence: Sequence) -> None:
        if sequence.leads:
            self._since[sequence] = math.inf

    def left(self, sequence: Sequence) -> None:
        self._since.pop(sequence, None)
        if sequence is self._holder:
            self._holder = None

    def look(self, now: float) -> None:
        if not self._since:
            return
        self._since = {s: min(since, now) for s, since in self._since.items()}
        if now >= self._hold_ends:
            self._holder = None
        if self._holder is None and now >= self._next_hold:
            self._holder = next((s for s, since in self._since.items() if now - since >= PASS_S), None)
            if self._holder is not None:
                self._hold_ends = now + HOLD_S
                self._next_hold = self._hold_ends + PASS_S

    def passes(self, sequence: Sequence) -> bool:
        """Whether those behind it, which found no room, may begin."""
        return sequence.leads and sequence is not self._holder

    def given_up(self, now: float) -> list[tuple[int, str]]:
        """Numbers of those that have waited too long, and what to say."""
        return [
            (
                s.sequence_id,
                f"a search of {s.search.width} beams has waited {now - since:.0f} s for {s.search.blocks} free KV "
                f"blocks beside its prompt's, and {s.places} places among the running sequences; retry later, ask "
                "for fewer tokens or beams, or raise engine.num_blocks or engine.max_running_sequences",
            )
            for s, since in self._since.items()
            if s.search is not None and now - since >= GIVE_UP_S
        ]
