"""What an API key may use: requests and tokens a minute, requests at once. Pure; `now` is an argument.

A bucket holds one minute's worth and fills evenly, so that a key which was idle may spend a minute's worth at once. A
request takes its prompt and its longest possible answer when it begins; at its end what was not used goes back, so that
a limit is never exceeded.

Each router counts for itself. Of several, each gives an equal part of a key's limits, so that all together keep them;
no part is less than one request or token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Allowance:
    """0 = unlimited. `routers`: by how many it was divided."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0
    routers: int = 1

    def shared_by(self, routers: int) -> Allowance:
        if routers <= 1:
            return self
        requests, tokens, at_once = (
            limit and max(1, limit // routers)
            for limit in (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)
        )
        return Allowance(requests, tokens, at_once, routers)

    @property
    def here(self) -> str:
        """In a refusal."""
        return f" at each of {self.routers} routers" if self.routers > 1 else ""


@dataclass(frozen=True, slots=True)
class OverLimit:
    """`retry_after_s` 0: waiting alone does not help, or nobody knows for how long."""

    what: str
    retry_after_s: float = 0.0


class TokensLeft(NamedTuple):
    """What a key may still use: at this moment, and with a full bucket."""

    now: int
    a_minute: int


class Bucket:
    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self._at = now

    def set_rate(self, per_minute: int, now: float) -> None:
        self._fill(now)
        if per_minute > self.per_minute:
            self.level += per_minute - self.per_minute
        self.per_minute = per_minute
        self.level = min(self.level, per_minute)

    def _fill(self, now: float) -> None:
        if now > self._at:
            self.level = min(float(self.per_minute), self.level + (now - self._at) * self.per_minute / 60)
            self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Until it holds so much. `amount` is at most `per_minute`."""
        self._fill(now)
        return max(0.0, (amount - self.level) * 60 / self.per_minute)

    def left(self, now: float) -> int:
        self._fill(now)
        return max(0, int(self.level))

    def take(self, amount: float) -> None:
        self.level -= amount

    def give_back(self, amount: float, now: float) -> None:
        self._fill(now)
        self.level = min(float(self.per_minute), self.level + amount)


@dataclass(slots=True)
class _Use:
    allowance: Allowance
    requests: Bucket
    tokens: Bucket
    live: int = 0
    refused_total: int = 0


class RateLimits:
    """By key id. A request is `begin`, `take_tokens` once they are counted, `end`."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    def begin(self, key_id: str, allowance: Allowance, now: float, *, again: bool = False) -> OverLimit | None:
        """None: it counts as live until `end`. `again`: a further answer to a request that was counted."""
        use = self._uses.get(key_id)
        if use is None:
            use = self._uses[key_id] = _Use(
                allowance, Bucket(allowance.requests_per_minute, now), Bucket(allowance.tokens_per_minute, now)
            )
        elif use.allowance != allowance:
            use.allowance = allowance
            use.requests.set_rate(allowance.requests_per_minute, now)
            use.tokens.set_rate(allowance.tokens_per_minute, now)
        over = self._over(use, now, again)
        if over is not None:
            use.refused_total += 1
            return over
        if allowance.requests_per_minute and not again:
            use.requests.take(1)
        use.live += 1
        return None

    @staticmethod
    def _over(use: _Use, now: float, again: bool) -> OverLimit | None:
        allowance = use.allowance
        if allowance.max_concurrent and use.live >= allowance.max_concurrent:
            return OverLimit(f"{use.live} requests of this key are live, which is its limit{allowance.here}", 1.0)
        if allowance.requests_per_minute and not again:
            wait_s = use.requests.wait_s(1, now)
            if wait_s > 0:
                what = f"this key may send {allowance.requests_per_minute} requests a minute{allowance.here}"
                return OverLimit(what, wait_s)
        return None

    def tokens_left(self, key_id: str, now: float) -> TokensLeft | None:
        """Of a key with something live; None: it has no limit."""
        use = self._uses[key_id]
        limit = use.allowance.tokens_per_minute
        return TokensLeft(use.tokens.left(now), limit) if limit else None

    def take_tokens(self, key_id: str, tokens: int, now: float) -> OverLimit | None:
        """Prompt and longest answer. None: taken. After a refusal the request is still to be ended."""
        use = self._uses[key_id]
        limit = use.allowance.tokens_per_minute
        if not limit:
            return None
        if tokens > limit:
            use.refused_total += 1
            return OverLimit(
                f"prompt and longest answer are {tokens} tokens and this key may use {limit} a minute"
                f"{use.allowance.here}; ask for fewer (max_tokens)"
            )
        wait_s = use.tokens.wait_s(tokens, now)
        if wait_s > 0:
            use.refused_total += 1
            return OverLimit(f"this key may use {limit} tokens a minute{use.allowance.here}", wait_s)
        use.tokens.take(tokens)
        return None

    def end(self, key_id: str, unused_tokens: int, now: float) -> None:
        use = self._uses[key_id]
        use.live -= 1
        assert use.live >= 0
        if unused_tokens and use.allowance.tokens_per_minute:
            use.tokens.give_back(unused_tokens, now)

    def forget_all_but(self, key_ids: Mapping[str, object]) -> None:
        """Of keys that are gone nothing is kept, once nothing of theirs is live."""
        self._uses = {k: use for k, use in self._uses.items() if k in key_ids or use.live}

    def live(self, key_id: str) -> int:
        use = self._uses.get(key_id)
        return 0 if use is None else use.live
