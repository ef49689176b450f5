"""Prompt lookup: what followed the last tokens of a sequence the last time that they came, in its prompt or answer.

A hash chain as in LZ77: `_newest` has for each pair of tokens where it ended last, `_before` for each such place the
one before. Of the newest few places the one with the longest match is copied from. A long prompt is taken in over
several looks, so that no step waits for it. Nothing of it has to move with a sequence: it is made from the tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_PLACES = 16  # looked at
_LONGEST_MATCH = 16  # more tokens do not make a better one
_TAKEN_IN = 2048  # tokens a look


class Lookup:
    """Of one sequence. Its tokens only ever grow at their end."""

    __slots__ = ("_before", "_newest")

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._before = array("i", (-1,))  # by the place of a pair's second token

    def drafts(self, tokens: Sequence[int], most: int, least_match: int) -> list[int]:
        """At most `most` tokens that may follow; none where fewer than `least_match` (2 or more) tokens match."""
        end = len(tokens)
        if end < 2 or most < 1 or not self._take_in(tokens):
            return []
        best, longest = -1, least_match - 1
        place = self._newest.get(_pair(tokens[-2], tokens[-1]), -1)
        for _ in range(_PLACES):
            if place < 0:
                break
            match = 2
            while match < _LONGEST_MATCH and match <= place and tokens[place - match] == tokens[end - 1 - match]:
                match += 1
            if match > longest:
                best, longest = place, match
                if match == _LONGEST_MATCH:
                    break
            place = self._before[place]
        if best < 0:
            return []
        found = list(tokens[best + 1 : best + 1 + most])
        period = end - 1 - best
        while len(found) < most:  # what repeats itself up to the end goes on
            found.append(found[-period])
        return found

    def _take_in(self, tokens: Sequence[int]) -> bool:
        """All pairs but the last, which nothing follows yet. False: not all of them yet."""
        before, newest = self._before, self._newest
        first = len(before)
        end = min(len(tokens) - 1, first + _TAKEN_IN)
        for place in range(first, end):
            pair = _pair(tokens[place - 1], tokens[place])
            before.append(newest.get(pair, -1))
            newest[pair] = place
        return end == len(tokens) - 1


def _pair(first: int, second: int) -> int:
    return first << 32 | second
