"""When something is tried again: by the router, and by clients that found no room.

The retry budget: one for all requests, so that a fault is not answered by a storm.

Requests put a share of a retry in, moves beyond a request's first take a whole one out. Scheme: the retry budgets of
Finagle and Linkerd (a ratio of recent requests plus a small constant rate).
"""

from __future__ import annotations

_PER_S = 1.0  # so that a quiet cluster can still recover


class RetryBudget:
    """`share` retries per request, at most `burst` saved up."""

    def __init__(self, share: float, burst: float) -> None:
        self._share = share
        self._burst = burst
        self._left = burst
        self._at: float | None = None
        self.spent_total = 0

    def request_came(self, now: float) -> None:
        self._refill(now)
        self._left = min(self._burst, self._left + self._share)

    def may_retry(self, now: float) -> bool:
        self._refill(now)
        return self._left >= 1.0

    def retried(self, now: float) -> None:
        self._refill(now)
        self._left -= 1.0
        self.spent_total += 1

    def _refill(self, now: float) -> None:
        if self._at is not None:
            self._left = min(self._burst, self._left + (now - self._at) * _PER_S)
        self._at = now


class Crowd:
    """Who was refused for lack of room, and when each should come again: behind those who were refused before.

    Room appears as requests end. So the hint grows with the number turned away, and shrinks as they are let in.
    """

    _SHORTEST_S, _LONGEST_S = 0.2, 60.0
    _UNKNOWN_S = 1.0  # between two ends, before two have been seen
    _WEIGHT = 0.05

    def __init__(self) -> None:
        self._apart_s: float | None = None  # between two ends, in the mean
        self._ended: float | None = None
        self._ahead = 0.0
        self._at = 0.0

    def ended(self, now: float) -> None:
        if self._ended is not None:
            apart = min(now - self._ended, self._LONGEST_S)
            self._apart_s = apart if self._apart_s is None else self._apart_s + self._WEIGHT * (apart - self._apart_s)
        self._ended = now

    def come_again_s(self, now: float) -> float:
        """Of one more."""
        apart = max(self._apart_s if self._apart_s is not None else self._UNKNOWN_S, 1e-6)
        self._ahead = max(0.0, self._ahead - (now - self._at) / apart) + 1.0
        self._at = now
        return min(self._LONGEST_S, max(self._SHORTEST_S, self._ahead * apart))
