"""Peaks that came faster than a worker starts: such loads recur, and nothing that is started then comes in time. Pure.

What a peak needed is kept as a floor: for a few start times after one that came alone, and for longer than the longest
time between them once they recur. A floor starts nobody; it only keeps those that are there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from scaling.demand import Load

_SURPRISE = 1.3  # strained so much at once with everybody at work: nobody who is started now comes in time
_AGAIN = 0.7  # of a peak that is kept: so much is a peak again, although it strains nobody
_LEVEL_STARTS = 4.0  # what lasts longer is no peak: starts can follow it
_ALONE_STARTS = 6.0  # a peak that came alone is kept for so many start times
_LONGER = 1.5  # than the longest time between two peaks: so long the next one is waited for
_MOST_STARTS = 20.0
_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Peak:
    began: float
    ended: float  # when it last strained the pools
    load: Load  # of what arrived, without any backlog: the most of both pools together


@dataclass(frozen=True, slots=True)
class Floor:
    load: Load
    left_s: float


def noted(
    peaks: tuple[Peak, ...], now: float, load: Load, strained: float, start_s: float, *, settled: bool
) -> tuple[Peak, ...]:
    """`load` is what comes. `settled`: whoever is asked for is at work, so that a strain is the load's doing."""
    last = peaks[-1] if peaks else None
    kept = floor(peaks, now, start_s)
    again = kept is not None and _both(load) >= _AGAIN * _both(kept.load)
    if last is not None and now - last.ended <= start_s:
        if not again and strained <= 1.0:
            return peaks
        if now - last.began > _LEVEL_STARTS * start_s:
            return peaks[:-1]
        return *peaks[:-1], replace(last, ended=now, load=max(load, last.load, key=_both))
    if not again and (strained < _SURPRISE or not settled):
        return peaks
    return (*peaks, Peak(now, now, load))[-_REMEMBERED:]


def floor(peaks: tuple[Peak, ...], now: float, start_s: float) -> Floor | None:
    """What is kept, and for how long more."""
    if not peaks:
        return None
    most_s, last = _MOST_STARTS * start_s, peaks[-1].ended
    between_s = [b.began - a.ended for a, b in itertools.pairwise(peaks)]
    recurred_s = max((s for s in between_s if s <= most_s), default=0.0)
    left_s = last + min(most_s, max(_ALONE_STARTS * start_s, _LONGER * recurred_s)) - now
    if left_s <= 0:
        return None
    return Floor(max((p.load for p in peaks if last - p.ended <= most_s), key=_both), left_s)


def _both(load: Load) -> float:
    return load.prefill + load.decode
