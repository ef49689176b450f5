"""The retry budget: one for all requests, so that a fault is not answered by a storm.

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
