"""Moves of running answers, as they are wanted: looks at who leaves, who is short of KV and who is slow; begins them.

A look follows a cause (a worker leaves, changes its part, reports that it is nearly full or takes longer steps than
another) and is repeated while there is one. A move that fails costs its answer nothing: it is tried again, elsewhere
first, and ever later. Where an answer came from it does not go back to soon.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from router.legs import LegRole
from router.lifecycle import Life
from router.live import CallLater, Live
from router.placement.cluster import Cluster, Role, WorkerEntry, WorkerState
from router.placement.moves import Candidate, Move, Offers, Reason, Source, behind, choose, priced
from router.placement.view import WorkerKey
from router.record.moved import MoveLog

_LOOK_EVERY_S = 0.1
_COOL_DOWN_S = 10.0  # for moves that only make things better
_TRIES = 3  # of those
_RETRY_S = 0.5  # after the first that failed; twice that after the next
_NOT_THERE_S = 2.0  # where it has just failed
_TAKES_AT_MOST_S = 30.0
_NEARLY_FULL = 0.03  # of the pool is free: the next thing that happens is a preemption
_RELIEVED = 0.1
_BALANCE_EVERY_S = 1.0
_BETTERING = (Reason.PRESSURE, Reason.BALANCE)


@dataclass(slots=True)
class _Record:
    """What was tried with one answer."""

    came_from: WorkerKey | None = None
    target: WorkerKey | None = None
    last: float = float("-inf")
    failed: int = 0  # since it last arrived anywhere

    def waits(self, reason: str, now: float) -> bool:
        if reason in _BETTERING and (self.failed >= _TRIES or now - self.last < _COOL_DOWN_S):
            return True
        return self.failed > 0 and now - self.last < min(_COOL_DOWN_S, _RETRY_S * 2 ** (self.failed - 1))

    def not_to(self, reason: str, now: float) -> frozenset[WorkerKey]:
        them: set[WorkerKey] = set()
        if self.target is not None and self.failed and now - self.last < _NOT_THERE_S:
            them.add(self.target)
        if self.came_from is not None and (reason in _BETTERING or now - self.last < _COOL_DOWN_S):
            them.add(self.came_from)
        return frozenset(them)


class Moves:
    def __init__(
        self,
        cluster: Cluster,
        by_leg: Mapping[int, Live],
        expected_tokens: Callable[[int], int],
        begun: Callable[[Live], None],
        clock: Callable[[], float],
        call_later: CallLater,
        *,
        unasked: bool = True,
        balance: bool = False,
    ) -> None:
        """`expected_tokens`: of an answer that may have so many; 0: unknown. `begun`: its effects are to be sent. Not
        `unasked`: only by hand. `balance`: also off workers that are only slow.
        """
        self._cluster = cluster
        self._by_leg = by_leg
        self._expected = expected_tokens
        self._begun = begun
        self._clock = clock
        self._call_later = call_later
        self._records: dict[str, _Record] = {}  # by request; of those that live
        self._unasked = unasked
        self._balance = balance and unasked
        self._balanced_at = float("-inf")
        self._looking = False
        self.log = MoveLog()

    def wanted(self) -> None:
        """There may be a cause."""
        if self._unasked:
            self._look_in(0.0)

    def _look_in(self, delay_s: float) -> None:
        if not self._looking:
            self._looking = True
            self._call_later(delay_s, self._look)

    def reported(self, key: WorkerKey) -> None:
        """A worker's load came: a cheap look at whether it is nearly full, and now and then at who is slow."""
        entry = self._cluster.workers.get(key)
        if entry is None or self._looking:
            return
        if self._is_full(entry) or (self._balance and self._clock() - self._balanced_at >= _BALANCE_EVERY_S):
            self.wanted()

    def find(self, request_id: str) -> Live | None:
        """Of those that have a worker."""
        return next((one for one in self._by_leg.values() if one.life.request.request_id == request_id), None)

    def request_ids(self) -> Iterable[str]:
        return dict.fromkeys(live.life.request.request_id for live in self._by_leg.values())

    def forget(self, request_key: str) -> None:
        self.log.settle()
        self._records.pop(request_key, None)

    def move(self, live: Live, target: WorkerKey) -> str:
        """By hand. Empty: under way; else why not."""
        entry, there = self._cluster.workers.get(live.life.route.decode), self._cluster.view().decode.find(target)
        if there is None:
            return f"{target.worker_id} does not decode, or is not ready"
        if entry is None:
            return "its worker is gone"
        if entry.info.layout_fingerprint != there.layout_fingerprint:
            return f"{target.worker_id} has another KV layout"
        one = self._candidate(live)
        if target in one.not_to:
            if live.life.request.sampling.masks_tokens and not self._cluster.workers[target].info.masks_tokens:
                return f"{target.worker_id} is of an older version and does not know allowed_token_ids and bad_words"
            adapter = live.life.request.adapter
            if adapter and not self._cluster.workers[target].info.has_adapter(adapter):
                return f"{target.worker_id} does not have its adapter"
            return f"the context limit of {target.worker_id} is less than the answer may reach"
        source = self._source(entry, Reason.ASKED, (), all_of_them=True)
        move = priced(one, source, there, at_any_price=True)
        assert move is not None
        return self._begin(live, move)

    def _look(self) -> None:
        self._looking = False
        now = self._clock()
        sources: list[Source] = []
        lives: dict[str, Live] = {}
        again = self.log.settle()
        for life, migration in self.log.under_way():
            if migration.frozen_at is None and now - migration.at > _TAKES_AT_MOST_S:
                live = self._by_leg[life.legs[0].number]
                life.stay(f"its KV had not arrived after {_TAKES_AT_MOST_S:g} s")
                self._begun(live)
        moving = [migration for _, migration in self.log.under_way()]
        under_way = Counter(migration.source for migration in moving)
        view, slow = self._cluster.view(), set[WorkerKey]()
        if self._balance and now - self._balanced_at >= _BALANCE_EVERY_S:
            slow, self._balanced_at = behind(view.decode), now
        for entry in self._cluster.workers.values():
            if entry.state in (WorkerState.LOST, WorkerState.CONNECTING):
                continue
            reason = self._reason(entry, slow) if self._unasked else ""
            if not reason:
                continue
            candidates: list[Candidate] = []
            decodes = False
            for live in self.running_on(entry):
                decodes = decodes or _decodes(live, entry.key)
                one = self._candidate_of(live, reason, now)
                if one is not None:
                    candidates.append(one)
                    lives[one.key] = live
            again = again or (decodes and reason not in _BETTERING)
            sources.append(self._source(entry, reason, candidates, under_way=under_way[entry.key]))
        offers = Offers(view.decode, {migration.target for migration in moving}, view.broken_paths)
        for move in choose(sources, offers):
            self._begin(lives[move.key], move)
        if again:
            self._look_in(_LOOK_EVERY_S)

    def _reason(self, entry: WorkerEntry, slow: Collection[WorkerKey]) -> str:
        if not entry.legs:
            return ""
        if entry.state is WorkerState.DRAINING:
            return Reason.LEAVES
        if entry.role is not Role.DECODE:
            return Reason.SWITCHES
        if self._is_full(entry):
            return Reason.PRESSURE
        return Reason.BALANCE if entry.key in slow else ""

    def _is_full(self, entry: WorkerEntry) -> bool:
        load = entry.load
        if load is None or entry.role is not Role.DECODE or load.running_sequences < 2:
            return False
        return load.free_blocks - load.waiting_blocks < _NEARLY_FULL * entry.info.total_blocks

    def running_on(self, entry: WorkerEntry) -> Iterable[Live]:
        for leg in list(entry.legs):
            live = self._by_leg.get(leg)
            if live is not None and not live.life.over:
                yield live

    def _source(
        self,
        entry: WorkerEntry,
        reason: str,
        candidates: Iterable[Candidate],
        *,
        under_way: int = 0,
        all_of_them: bool | None = None,
    ) -> Source:
        load, info = entry.load, entry.info
        relief = 0
        if load is not None:
            missing = _RELIEVED * info.total_blocks - (load.free_blocks - load.waiting_blocks)
            relief = int(missing) * info.block_tokens
        return Source(
            entry.key,
            info.layout_fingerprint,
            reason,
            0.0 if load is None else load.decode_step_ms or load.step_ms,
            under_way,
            reason not in _BETTERING if all_of_them is None else all_of_them,
            list(candidates),
            relief,
            0 if load is None else load.running_sequences,
        )

    def _candidate_of(self, live: Live, reason: str, now: float) -> Candidate | None:
        if not live.life.movable:
            return None
        record = self._records.get(live.life.request.key) or _Record()
        moves = live.life.breakdown.migrations
        if moves and moves[-1].done:
            record.failed = 0
        if record.waits(reason, now):
            return None
        return self._candidate(live, record.not_to(reason, now))

    def _candidate(self, live: Live, not_to: frozenset[WorkerKey] = frozenset()) -> Candidate:
        life = live.life
        longest, emitted = life.request.sampling.max_tokens, len(life.emitted)
        # What has outlived the usual answer is believed to have as much before it as behind it.
        left = min(longest - emitted, max(self._expected(longest) - emitted, emitted))
        return Candidate(
            life.request.key,
            len(life.request.prompt) + len(life.emitted),
            max(1, left),
            life.request.priority,
            not_to | self._unfit_for(life),
        )

    def _unfit_for(self, life: Life) -> frozenset[WorkerKey]:
        """Workers whose context limit would end it before its own worker does, or that lack what it asks for."""
        workers = self._cluster.workers
        longest = len(life.request.prompt) + life.request.sampling.max_tokens
        here = workers.get(life.route.decode)
        if here is not None:
            longest = min(longest, here.info.context_limit_tokens)
        masks, adapter = life.request.sampling.masks_tokens, life.request.adapter
        return frozenset(
            key
            for key, entry in workers.items()
            if entry.info.context_limit_tokens < longest
            or (masks and not entry.info.masks_tokens)
            or (adapter and not entry.info.has_adapter(adapter))
        )

    def _begin(self, live: Live, move: Move) -> str:
        life, now = live.life, self._clock()
        came_from = life.route.decode
        why_not = life.migrate(move.target, move.spare_tokens, move.pull_bytes, move.reason, now)
        if not why_not:
            record = self._records.setdefault(move.key, _Record())
            record.came_from, record.target, record.last = came_from, move.target, now
            record.failed += 1  # until it has arrived
            self.log.begun(life)
            self._begun(live)
            self._look_in(_LOOK_EVERY_S)
        return why_not


def _decodes(live: Live, on: WorkerKey) -> bool:
    return any(leg.role is LegRole.DECODE and leg.worker == on for leg in live.life.legs)
