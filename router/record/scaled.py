"""The last scaling decisions that this router was told of: whoever decides is another process (docs/elasticity.md).

A decision is kept as it came. Of those that change nothing the last are kept, of the others more; counts over time are
kept longest. Two deciders may speak, one of which only says what it would do: the one that acts is the one that counts.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

_REMEMBERED, _CHANGES, _POINTS = 256, 128, 720
_SHOWN_POINTS, _POINTS_S = 120, 3600.0
_SILENT_INTERVALS = 3  # so long one that acts is not overruled by one that only says
_MAX_RULES = 64  # that are counted by name
_WISH_S = 120.0  # who starts workers looks every few seconds, and sees a wish once


class Sized(NamedTuple):
    prefill: int
    decode: int
    standby: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """`message`: ScalingDecision, as it came."""

    at: float
    decider: str
    number: int
    interval_s: float
    rule: str
    error: str
    dry_run: bool
    changes: bool
    wanted: Sized
    ready: Sized
    held_gpus: float
    budget_gpus: float
    message: Any

    @property
    def mode(self) -> str:
        """For metrics."""
        return "dry_run" if self.dry_run else "applied"

    @property
    def key(self) -> tuple[str, int]:
        return self.decider, self.number

    @property
    def notable(self) -> bool:
        return self.changes or bool(self.error)


class Point(NamedTuple):
    at: float
    wanted: Sized
    ready: Sized
    held_gpus: float


@dataclass(frozen=True, slots=True)
class Wish:
    """More workers than are ready; None: as many as there are."""

    number: int
    at: float
    prefill: int | None
    decode: int | None


class ScalingLog:
    """And what an operator wishes of whoever decides."""

    def __init__(self) -> None:
        self._wish: Wish | None = None
        self._asleep = False
        self.rules: Counter[tuple[str, str]] = Counter()  # (rule, "applied" or "dry_run")
        self.told_total = 0
        self.errors_total = 0
        self._last: OrderedDict[tuple[str, int], Scaled] = OrderedDict()
        self._notable: OrderedDict[tuple[str, int], Scaled] = OrderedDict()
        self._points: deque[Point] = deque(maxlen=_POINTS)
        self._current: Scaled | None = None
        self._spoke: dict[str, Scaled] = {}  # the newest, by mode

    def take(self, told: Scaled) -> None:
        known = self._last.get(told.key) or self._notable.get(told.key)
        if known is None:
            self.told_total += 1
            rule = told.rule if len(self.rules) < _MAX_RULES or (told.rule, told.mode) in self.rules else "other"
            self.rules[rule, told.mode] += 1
        if told.error and (known is None or not known.error):
            self.errors_total += 1
        _keep(self._last, told, _REMEMBERED)
        if told.notable:
            _keep(self._notable, told, _CHANGES)
        spoke = self._spoke.get(told.mode)
        if spoke is None or told.at >= spoke.at:
            self._spoke[told.mode] = told
        if self._counts(told):
            self._current = told
            if not told.dry_run:
                self._asleep = not (told.wanted.decode and told.ready.decode) and (
                    self._asleep or not (told.wanted.decode or told.wanted.prefill or told.error)
                )
            if known is None:
                self._points.append(Point(told.at, told.wanted, told.ready, told.held_gpus))

    def _counts(self, told: Scaled) -> bool:
        """Whether it is the newest word of whoever acts."""
        now = self._current
        if now is None:
            return True
        if told.at < now.at:
            return False
        return now.dry_run or not told.dry_run or told.at - now.at > _SILENT_INTERVALS * now.interval_s

    @property
    def current(self) -> Scaled | None:
        return self._current

    # What cannot be had by switching roles.

    def resizer(self, now: float) -> str:
        """Who starts and stops workers; empty: nobody that has spoken lately."""
        spoke = self._spoke.get("applied")
        alive = spoke is not None and now - spoke.at <= _SILENT_INTERVALS * spoke.interval_s
        return spoke.decider if spoke is not None and alive else ""

    def asleep(self, now: float) -> bool:
        """An idle cluster was scaled to zero, and a request will bring it back."""
        return self._asleep and bool(self.resizer(now))

    def ask(self, prefill: int | None, decode: int | None, now: float) -> None:
        self._wish = Wish(self._wish.number + 1 if self._wish is not None else 1, now, prefill, decode)

    def wish(self, now: float) -> Wish | None:
        wish = self._wish
        return wish if wish is not None and now - wish.at <= _WISH_S else None

    # For metrics, by label; read from another thread.

    def wanted(self) -> dict[str, int]:
        current = self._current
        return {} if current is None else current.wanted._asdict()

    def gpus(self) -> dict[str, float]:
        current = self._current
        return {} if current is None else {"held": current.held_gpus, "budget": current.budget_gpus}

    def ages_s(self, now: float) -> dict[str, float]:
        return {mode: now - told.at for mode, told in dict(self._spoke).items()}

    def intervals_s(self) -> dict[str, float]:
        return {mode: told.interval_s for mode, told in dict(self._spoke).items()}

    def last(self, count: int, *, notable: bool = False) -> list[Scaled]:
        """Newest first."""
        known = dict(self._notable) if notable else {**self._notable, **self._last}
        kept = [s for s in known.values() if s.notable] if notable else list(known.values())
        return sorted(kept, key=lambda s: s.at, reverse=True)[:count]

    def points(self, now: float) -> Iterator[Point]:
        """Oldest first; not more than a picture has room for."""
        lately = [p for p in self._points if now - p.at <= _POINTS_S]
        step = -(-len(lately) // _SHOWN_POINTS) or 1
        yield from reversed(lately[::-1][::step])  # the newest is always among them


def _keep(kept: OrderedDict[tuple[str, int], Scaled], told: Scaled, most: int) -> None:
    kept[told.key] = told
    while len(kept) > most:
        kept.popitem(last=False)
