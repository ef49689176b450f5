"""Migrations of running answers: those under way, the last that are over, and what metrics count of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from router.breakdown import DONE, Migration
from router.lifecycle import Life
from router.placement.moves import Reason

_REMEMBERED = 16
_REASONS = {
    Reason.LEAVES: "leaves",
    Reason.SWITCHES: "switches",
    Reason.PRESSURE: "pressure",
    Reason.BALANCE: "balance",
    Reason.ASKED: "asked",
}


@dataclass(frozen=True, slots=True)
class Moved:
    """`took_s`: until the target had it; None: it has not."""

    request_id: str
    migration: Migration

    @property
    def took_s(self) -> float | None:
        adopted_at = self.migration.adopted_at
        return None if adopted_at is None else adopted_at - self.migration.at


class MoveLog:
    """`on_over` hears of each, when its pause is known."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter(
            {(outcome, reason): 0 for outcome in (DONE, "stayed") for reason in _REASONS.values()}
        )
        self.pulled_bytes = 0
        self.on_over: Callable[[Migration], None] | None = None
        self._open: list[tuple[Life, Migration]] = []
        self._over: deque[Moved] = deque(maxlen=_REMEMBERED)

    def begun(self, life: Life) -> None:
        self._open.append((life, life.breakdown.migrations[-1]))

    def settle(self) -> bool:
        """Notes what is over. False: nothing is under way any more."""
        still = []
        for life, migration in self._open:
            if not life.over and not migration.over:
                still.append((life, migration))
                continue
            outcome = DONE if migration.done else "stayed"
            self.outcomes[outcome, reason_word(migration.why)] += 1
            self.pulled_bytes += migration.pulled_bytes
            self._over.appendleft(Moved(life.request.request_id, migration))
            if self.on_over is not None:
                self.on_over(migration)
        self._open = still
        return bool(still)

    def under_way(self) -> list[tuple[Life, Migration]]:
        """Whose source or target is still to do something."""
        return [(life, migration) for life, migration in self._open if life.migrating is migration]

    def __iter__(self) -> Iterator[Moved]:
        """Under way, newest first, then the last that are over."""
        for life, migration in reversed(self._open):
            yield Moved(life.request.request_id, migration)
        yield from self._over


def reason_word(why: str) -> str:
    """For metrics."""
    return _REASONS.get(why, "asked")
