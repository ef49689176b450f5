"""Several answers to one prompt: it is computed once, and handed over once (docs/decisions/0027-forks.md).

The first answer is placed like any request. The others have no leg yet. They look at what becomes of the first:

    it decodes, and has a token   they begin on its worker, whose prefix cache holds the prompt's whole blocks: shared
                                  by reference count. What is in the last block each computes for itself.
    it ended with its first one   each goes its own way; the prompt is cached where it was computed
    it was cancelled              the next one goes first, and the others wait for that one
    it failed                     they fail: it was the prompt that could not be answered
    it was searched for           the search has found them, too (router/beam_life.py)

Once it has begun, an answer is a request like any other, and knows nothing of the others: it is cancelled, moved and
recovered alone, and a worker frees a shared block with the last sequence that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from router.beam_life import BeamLife
from router.legs import LegRole
from router.lifecycle import Life
from router.live import CallLater, Live
from router.placement.policy import Route, WorkerKey
from router.planner import Planner
from router.record.counts import RouterCounts
from router.request import Finish, Request

NOBODY: frozenset[WorkerKey] = frozenset()
_AT_ONCE = 16
COMPLETE = (Finish.STOP.value, Finish.LENGTH.value)


def stands_at(life: Life) -> WorkerKey | None:
    """Where the KV of its prompt is, for the answer to go on from; None: nowhere yet."""
    if not life.answered_tokens:
        return None
    if life.over:  # complete: its blocks are cached, wherever it has decoded
        decoded = life.answered_tokens > 1 or not life.route.split
        return life.route.decode if life.outcome in COMPLETE and decoded else None
    return next((leg.worker for leg in life.legs if leg.role is LegRole.DECODE and leg.adopted), None)


class Forks:
    def __init__(
        self,
        lives: dict[str, Live],
        planner: Planner,
        counts: RouterCounts,
        tell: Callable[[Live, Callable[[Life, float], None]], None],
        flush: Callable[[], None],
        call_later: CallLater,
    ) -> None:
        self._lives = lives
        self._planner = planner
        self._counts = counts
        self._tell = tell
        self._flush = flush
        self._call_later = call_later

    def first_of(self, request: Request) -> Live | None:
        """The answer that this one is to wait for; None: for nobody."""
        first = self._lives.get(request.beside) if request.beside and not request.emitted else None
        if first is None or first.life.over or first.life.request.prompt is not request.prompt:
            return None  # of another prompt: the id is in use again
        if isinstance(first.life, BeamLife):
            return first
        return first if self._planner.has_whole_blocks(first.life.route.decode, request) else None

    @staticmethod
    def waiting(request: Request, first: Live) -> tuple[Request, Route]:
        """As it is while it waits: of the same revision, and on its way to the same worker."""
        life = first.life
        route = Route(life.route.decode, None, "waits_for_its_prompt", life.route.estimates)
        return replace(request, revision=life.request.revision), route

    def look(self, first: Live) -> None:
        """Something has changed for an answer that others wait for."""
        life = first.life
        if isinstance(life, BeamLife) and not life.over:
            return
        at = stands_at(life)
        moves_whole = self._planner.keeps_all(life.route.decode)
        if not life.over and at is None and (moves_whole or not life.answered_tokens):
            return
        waiting, first.waiting = [live for live in first.waiting if not live.life.over], []
        failure = life.failure
        if failure is not None:
            for live in waiting:
                self._tell(live, lambda life, now: life.fail(failure, now))
        elif life.outcome == Finish.CANCELLED.value:
            # A client that leaves cancels all its answers in a row: nobody is to begin in between.
            self._call_later(0.0, lambda: self._next(waiting))
        elif isinstance(life, BeamLife):
            for live in waiting:
                self._tell(live, lambda other, now: other.given(life, now) if isinstance(other, BeamLife) else None)
        else:
            for live in waiting:
                live.life.breakdown.mix = life.breakdown.mix.copy()
            self._begin_all(waiting, at if moves_whole else None)

    def _next(self, waiting: Sequence[Live]) -> None:
        left = [live for live in waiting if not live.life.over]
        if left:
            left[0].waiting = left[1:]
            self._begin(left[0], None)
        self._flush()

    def _begin_all(self, waiting: Sequence[Live], beside: WorkerKey | None) -> None:
        """In turns: other requests are not to wait for the placement of so many."""
        for live in waiting[:_AT_ONCE]:
            if not live.life.over:
                self._begin(live, beside)
        later = waiting[_AT_ONCE:]
        if later:
            self._call_later(0.0, lambda: self._go_on(later, beside))

    def _go_on(self, waiting: Sequence[Live], beside: WorkerKey | None) -> None:
        self._begin_all(waiting, beside)
        self._flush()

    def _begin(self, live: Live, beside: WorkerKey | None) -> None:
        self._tell(live, lambda life, now: self._place(life, beside, now))

    def _place(self, life: Life, beside: WorkerKey | None, now: float) -> None:
        request = life.request
        placed = self._planner.place(request, 0, NOBODY) if beside is None else self._planner.beside(request, beside)
        if isinstance(placed, Route):
            self._counts.placed(placed)
        life.placed(placed, now)
