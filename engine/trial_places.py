"""Where the excerpts of the trial at start lie (engine/position_trial.py), and what each has before it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.made_up import Loud, Past
from kv_transfer.layout import Rule

_STEPS = (8, 3, 1)  # an excerpt's tokens, as the engine computes them
_FIRST_STEPS = (70, 9, 1)  # of the one at the beginning: over more than one block, and more than one tile of rows
STEPS = len(_STEPS)
_TOKENS = sum(_STEPS)
_FEW_HELD, _MORE_HELD = 24, 300  # the second: over the border of a split
_MOST_HELD = 33_000  # bounds time and memory
_BEYOND = 58  # tokens held that a window has left: its edge moves from one block into the next, whatever their size
_CUT_OFF = 8  # at the edge of a window, values are larger by so many-th of its length: each counts among the others
_MOST_LENGTHS = 6
_SHORTEST_LENGTH = 16
_NAMES_A_LENGTH = re.compile("position|window|chunk|scale|length|context|original")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an excerpt lies: its first position, and what it has before it."""

    first: int
    past: Past

    @property
    def end(self) -> int:
        return self.first + self.past.num_tokens

    def rows(self) -> list[tuple[int, int]]:
        """Rows [start, end) of the excerpt that each step computes."""
        steps = _FIRST_STEPS if self.past.num_tokens > _TOKENS else _STEPS
        ends = [min(self.past.num_tokens, end) for end in itertools.accumulate(steps, initial=0)]
        return list(itertools.pairwise(ends))


def named_lengths(described: Mapping[str, Any], limit: int) -> list[int]:
    """Numbers in a configuration that may be lengths, in order; shorter than `limit`."""
    found: set[int] = set()

    def look(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                look(inner, str(key))
        elif isinstance(value, int | float) and _NAMES_A_LENGTH.search(name) and _SHORTEST_LENGTH <= value < limit:
            found.add(int(value))

    look(described, "")
    return sorted(found)[:_MOST_LENGTHS]


def places(
    limit: int, lengths: Sequence[int], rules: Sequence[Rule], ends: Sequence[int] = (), *, holds: bool
) -> list[Place]:
    """In order of positions; the first is the beginning. `ends`: where some have to end. Without `holds` nothing is
    made up.
    """
    count = min(_TOKENS, limit)
    last = limit - count
    windows = sorted({rule.window for rule in rules if rule.window})
    chunks = sorted({rule.chunk for rule in rules if rule.chunk})
    found: dict[tuple[int, int], Place] = {}

    def add(first: int, wanted: Sequence[int], loud: Callable[[int], tuple[Loud, ...]] = lambda _: ()) -> None:
        """With the first of the wanted numbers of held tokens behind which all rules act as at the position itself."""
        for held in wanted if holds else (0,):
            if held <= min(first, _MOST_HELD) and all(_alike(rule, first, held, count) for rule in rules):
                found[first, held] = Place(first, Past(held, count, loud(held)))
                return

    beginning = Place(0, Past(0, min(sum(_FIRST_STEPS), limit)))
    ends = (*ends, *(n for n in lengths if n < beginning.end))  # the beginning goes beyond these
    starts = [*(n - count // 2 for n in (*lengths, *windows, *chunks, limit)), *(end - count for end in ends)]
    for first in (min(last, max(0, start)) for start in starts):
        if first:
            add(first, [min(first, _FEW_HELD), *(first % c for c in chunks), first])
    for window in windows:
        for first in {max(0, window - count // 2), last}:
            held = min(first, window + _BEYOND)
            add(first, [held, first], lambda held, window=window: _edge(window, held, count))
    for chunk in chunks:
        border = last // chunk * chunk - count // 2
        if border > 0:
            add(border, [chunk - count // 2])
    if last > _FEW_HELD:
        loud = _spoken if windows or chunks else lambda _: ()
        add(last, [min(last, _MORE_HELD), *(last % c for c in chunks), last], loud)
    found.pop((0, 0), None)
    return [beginning, *(found[key] for key in sorted(found))]


def _alike(rule: Rule, first: int, held: int, count: int) -> bool:
    """Whether tokens at `first` look, of the held ones and their own, at those that they would look at at `held`."""
    return all(max(0, rule.first(first + i) - (first - held)) == rule.first(held + i) for i in range(count))


def _edge(window: int, held: int, count: int) -> tuple[Loud, ...]:
    """Values around the first tokens that each looks at: they count as if there were few others."""
    first, last = held - window + 1, held + count - window
    start, end = max(0, first - 2), min(held, last + 3)
    return (Loud(start, end, values=max(1.0, min(1024.0, window / _CUT_OFF)), greeted=True),) if start < end else ()


def _spoken(held: int) -> tuple[Loud, ...]:
    """Keys that are heard from far: what is done to high scores shows in how they share the attention."""
    return tuple(Loud(held - back, held - back + 1, keys=3.0) for back in (37, 33, 23, 9) if back <= held)
