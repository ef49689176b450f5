"""Which requests a worker had when it crashed, and which of them are given up (router/placement/crashes.py)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from router.errors import Code, Failure
from router.legs import LegRole
from router.lifecycle import Life
from router.live import Live
from router.placement import crashes
from router.placement.cluster import Cluster, WorkerState
from router.placement.policy import WorkerKey
from router.record.counts import RouterCounts

_TOLD = 32  # of one crash, in the log

log = logging.getLogger(__name__)


class Suspects:
    def __init__(
        self,
        by_leg: Mapping[int, Live],
        cluster: Cluster,
        counts: RouterCounts,
        tell: Callable[[Live, Callable[[Life, float], None]], None],
        clock: Callable[[], float],
    ) -> None:
        self._by_leg = by_leg
        self._cluster = cluster
        self._counts = counts
        self._tell = tell
        self._clock = clock
        self._cancelled: deque[tuple[float, WorkerKey, int, Live]] = deque()

    def cancelled(self, worker: WorkerKey, leg: int) -> None:
        """Word of it is on its way: the worker may be computing it in its next step."""
        live, now = self._by_leg.get(leg), self._clock()
        while self._cancelled and now - self._cancelled[0][0] > crashes.UNDER_WAY_S:
            self._cancelled.popleft()
        if live is not None and not live.life.over and _computes(live.life, leg):
            self._cancelled.append((now, worker, leg, live))

    def of(self, worker: WorkerKey, legs: Iterable[int], why: str) -> dict[int, str]:
        """By leg, why a request is given up that a crashed worker had. Of all of them: word that one had begun may be
        lost with the worker.
        """
        now = self._clock()
        lives = {leg: live.life for leg in legs if (live := self._by_leg.get(leg)) is not None}
        there = {id(life) for life in lives.values()}
        left: dict[int, Live] = {}
        for at, key, leg, live in self._cancelled:
            if key == worker and now - at <= crashes.UNDER_WAY_S and id(live.life) not in there:
                left[leg] = live
                there.add(id(live.life))
        batch = lives | {leg: live.life for leg, live in left.items()}
        given_up = self._given_up(worker, batch, why, now)
        for leg, live in left.items():
            if leg in given_up:
                failure = Failure(Code.INTERNAL, given_up[leg])
                self._tell(live, lambda life, now, failure=failure: life.fail(failure, now))
        return given_up

    def _given_up(self, worker: WorkerKey, lives: Mapping[int, Life], why: str, now: float) -> dict[int, str]:
        batch = {leg: life for leg, life in lives.items() if not life.over and not life.only_arrives(leg)}
        if not batch:
            return {}

        def heard_since(crash: crashes.Crash) -> bool:
            entry = self._cluster.workers.get(crash.worker)
            if entry is None or entry.state is WorkerState.LOST:
                return False
            return entry.heard_at > crash.at + crashes.UNDER_WAY_S

        guilty = {id(life) for life in crashes.crashed(worker, list(batch.values()), now, heard_since)}
        told: list[str] = []
        for life in batch.values():
            end = ", given up" if id(life) in guilty else ""
            told.append(f"{life.request.request_id} ({self._counts.crashed(life.request)}{end})")
        names = ", ".join(told[:_TOLD])
        log.error("worker %s crashed (%s); it had %d requests: %s", worker.worker_id, why, len(told), names)
        return {leg: crashes.why_given_up(life) for leg, life in batch.items() if id(life) in guilty}


def _computes(life: Life, leg_number: int) -> bool:
    """A leg that waits for KV of another worker has computed nothing."""
    return any(leg.number == leg_number and (leg.role is LegRole.PREFILL or leg.adopted) for leg in life.legs)
