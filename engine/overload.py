"""Whose turn it is among prompts with due dates, and who is put back when not all can be in time. Pure.

    in time      all by due date: if any order keeps every prompt in time, this one does
    overload     whenever somebody would be late, the prompt with the most work left among those up to it goes to the
                 back, until the rest is in time: no other choice keeps more prompts in time (Moore and Hodgson, 1968)
    by weight    a prompt's work may count for less, by a weight that its router drew (router/placement/lots.py): then
                 it is not always the longest one. One goes for one: what counts for most if that is enough, else the
                 one that would be late
    hopeless     one that would be late if it had the worker to itself goes to the back at once

It is decided anew each time, so a prompt returns as soon as there is time for it. Those that are put back share what
the others leave, the earliest due date first, and every `TURN_STEPS`th step with prompts begins with them. So nothing
starves: whatever comes, one of them is computed within `TURN_STEPS` times the steps that it and those before it at the
back need.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

TURN_STEPS = 32


class Need(NamedTuple):
    """Of one prompt: when its first token is due (infinite: never to be put back), and the time that the rest of it
    takes on this worker, beside the decodes that run now. `weight`, 0 to 1: what that time counts for."""

    due_s: float
    left_s: float
    priority: int = 0
    weight: float = 1.0


def put_back(needs: Sequence[Need], now: float) -> set[int]:
    """Indices of those that go to the back; `needs` in the order of their turns: priority, then due date.

    All others are in time, but for those without a due date. What has a higher priority is never put back for the sake
    of what has a lower one.
    """
    back: set[int] = set()
    ends = now
    kept: list[tuple[int, float, int]] = []  # heap: the lowest priority first, of these what counts for most
    for i, (due, left, priority, weight) in enumerate(needs):
        if now + left > due:
            back.add(i)
            continue
        if due == math.inf:
            ends += left
            continue
        this = (priority, -left * weight, i)
        if ends + left <= due:
            heapq.heappush(kept, this)
            ends += left
        elif kept and kept[0] < this and ends + left - needs[kept[0][2]].left_s <= due:
            out = heapq.heapreplace(kept, this)[2]
            ends += left - needs[out].left_s
            back.add(out)
        else:
            back.add(i)
    return back
