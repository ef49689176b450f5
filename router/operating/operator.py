"""Commands of an operator: each checks, acts through the owners of what it touches, and waits for the outcome.

    switch   the worker is told; it says its role on every router's stream; the cluster's view follows (said_role)
    drain    a switch to standby; `Moves` sends long answers elsewhere, short ones end; done when nothing is left there
    migrate  `Moves.move`, by hand; the answer stays where it is if anything goes wrong
    scale    as few switches as it takes, up before down; if more workers are wanted than are ready, whoever starts and
             stops them is asked (deploy/scaler.py), where somebody does

Every refusal is a RequestRefused, and has changed nothing. Waits poll, which is cheap: commands are rare.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from router.breakdown import Migration
from router.errors import Code, RequestRefused, refuse
from router.live import Live
from router.moves import Moves
from router.operating.roles import Standing, Switch, last_of_its_role, needed, plan
from router.placement.cluster import Cluster, Role, WorkerEntry, WorkerState
from router.placement.view import WorkerKey
from router.record.scaled import ScalingLog

log = logging.getLogger(__name__)

_LOOK_S = 0.01
_CONFIRMED_S = 10.0  # a worker hears of its role between two steps
_MIGRATED_S = 40.0  # `Moves` gives up earlier
_QUIET_S = 0.3  # so long nothing may be reported of a drained worker: reports come every 0.1 s
_NAMED = 8


@dataclass(slots=True)
class DrainProgress:
    """Of this router's answers that were on the worker since the drain began. `running`: there, of all routers."""

    worker_id: str
    left: int = 0
    migrating: int = 0
    migrated: int = 0
    ended: int = 0
    running: int = 0
    done: bool = False
    elapsed_s: float = 0.0


@dataclass(slots=True)
class _Drained:
    key: WorkerKey
    began: float
    lives: dict[str, Live] = field(default_factory=dict)

    def progress(self, entry: WorkerEntry, here: Iterable[Live], now: float) -> DrainProgress:
        said = DrainProgress(self.key.worker_id, elapsed_s=now - self.began)
        left = {live.life.request.key: live for live in here}
        self.lives.update(left)
        for name, live in self.lives.items():
            if name in left:
                said.left += 1
                migration = live.life.migrating
                said.migrating += migration is not None and migration.source == self.key
            elif any(m.source == self.key and m.done for m in live.life.breakdown.migrations):
                said.migrated += 1
            else:
                said.ended += 1
        load = entry.load
        if load is not None:
            said.running = load.running_sequences + load.waiting_sequences
        return said


class Operator:
    """`tell`: sends a worker its role."""

    def __init__(
        self,
        cluster: Cluster,
        moves: Moves,
        tell: Callable[[WorkerKey, Role], None],
        clock: Callable[[], float],
        scaling: ScalingLog | None = None,
    ) -> None:
        self._cluster = cluster
        self._scaling = scaling or ScalingLog()
        self._moves = moves
        self._tell = tell
        self._clock = clock
        self._asked: dict[WorkerKey, Role] = {}  # told, and not heard of yet

    def worker(self, worker_id: str) -> WorkerEntry:
        """Its ready incarnation. Raises RequestRefused."""
        known = [e for e in self._cluster.workers.values() if e.key.worker_id == worker_id]
        if not known:
            names = _some(e.key.worker_id for e in self._cluster.workers.values())
            raise refuse(Code.NOT_FOUND, f"no worker {worker_id[:100]!r}; there are: {names}", field="worker_id")
        entry = max(known, key=lambda e: (e.state is WorkerState.READY, e.key.epoch))
        if entry.state is not WorkerState.READY:
            fix = {
                WorkerState.DRAINING: "it leaves: what it has goes elsewhere by itself",
                WorkerState.LOST: "its stream is broken; look at its log, or wait until it is back",
                WorkerState.CONNECTING: "it is being connected; repeat in a second",
            }[entry.state]
            raise refuse(Code.FAILED_PRECONDITION, f"{worker_id} is {entry.state.value}: {fix}", field="worker_id")
        return entry

    # Roles.

    async def switch(self, worker_id: str, to: Role, *, force: bool = False) -> tuple[Switch, float]:
        """What was switched, and how long that took, in seconds. Raises RequestRefused."""
        entry = self.worker(worker_id)
        self._check_last(entry, to, force)
        began, before = self._clock(), entry.role
        log.info("operator: %s is to be %s, was %s", worker_id, to.value, before.value)
        await self._switch(entry, to)
        return Switch(entry.key, before, to), self._clock() - began

    def _check_last(self, entry: WorkerEntry, to: Role, force: bool) -> None:
        others = [e for e in self._cluster.ready(entry.role) if e is not entry and self._keeps(e)]
        failure = last_of_its_role(entry.key, entry.role, to, len(others))
        if failure is not None and not force:
            raise RequestRefused(failure)

    def _keeps(self, entry: WorkerEntry) -> bool:
        return self._asked.get(entry.key, entry.role) is entry.role

    async def _switch(self, entry: WorkerEntry, to: Role) -> None:
        if entry.role is to:
            return
        self._asked[entry.key] = to
        try:
            self._tell(entry.key, to)
            if not await self._until(lambda: entry.role is to or self._is_gone(entry), _CONFIRMED_S):
                why = f"{entry.key.worker_id} was told to be {to.value} and has not said so within {_CONFIRMED_S:g} s"
                raise refuse(
                    Code.DEADLINE_EXCEEDED, f"{why}; look whether its steps go on (`diptych status`), and repeat"
                )
        finally:
            self._asked.pop(entry.key, None)
        if entry.role is not to:
            raise self._lost(entry)

    def _is_gone(self, entry: WorkerEntry) -> bool:
        return self._cluster.workers.get(entry.key) is not entry or entry.state is WorkerState.LOST

    def _lost(self, entry: WorkerEntry) -> RequestRefused:
        why = f"{entry.key.worker_id} was lost meanwhile; its requests were recovered elsewhere. Look at its log"
        return refuse(Code.UNAVAILABLE, why, field="worker_id")

    async def scale(
        self, wanted: Mapping[Role, int], *, force: bool = False, dry_run: bool = False
    ) -> tuple[list[Switch], str]:
        """What was switched; or who was asked to start workers, and nothing was. Raises RequestRefused; with
        UNAVAILABLE or DEADLINE_EXCEEDED some may have been switched.
        """
        ready = {e.key: e for role in Role for e in self._cluster.ready(role)}
        standing = [Standing(e.key, e.role, _busy(e)) for e in ready.values()]
        resizer = self._scaling.resizer(self._clock())
        if resizer and needed(standing, wanted) > len(standing):
            if not dry_run:
                log.info("operator: %s is asked for %s", resizer, {r.value: n for r, n in wanted.items()})
                self._scaling.ask(wanted.get(Role.PREFILL), wanted.get(Role.DECODE), self._clock())
            return [], resizer
        switches = plan(standing, wanted)
        if not isinstance(switches, list):
            raise RequestRefused(switches)
        leaving = {s.key: s.role for s in switches}
        for s in switches:
            others = [e for e in ready.values() if e.role is s.before and e.key not in leaving and self._keeps(e)]
            joining = sum(role is s.before for role in leaving.values())
            failure = last_of_its_role(s.key, s.before, s.role, len(others) + joining)
            if failure is not None and not force:
                raise RequestRefused(failure)
        if not dry_run:
            told = ", ".join(f"{s.key.worker_id} {s.before.value} -> {s.role.value}" for s in switches)
            log.info("operator: scale to %s: %s", {r.value: n for r, n in wanted.items()}, told or "nothing to switch")
            for s in switches:
                await self._switch(self.worker(s.key.worker_id), s.role)
        return switches, ""

    def counts(self) -> dict[Role, int]:
        return {role: len(self._cluster.ready(role)) for role in Role}

    async def drain(
        self, worker_id: str, *, force: bool = False, timeout_s: float = 300.0, interval_s: float = 0.5
    ) -> AsyncIterator[DrainProgress]:
        """The last one is `done`. Raises RequestRefused."""
        entry = self.worker(worker_id)
        self._check_last(entry, Role.STANDBY, force)
        drained = _Drained(entry.key, self._clock())
        log.info("operator: drain %s, was %s", worker_id, entry.role.value)
        drained.progress(entry, self._moves.running_on(entry), self._clock())
        await self._switch(entry, Role.STANDBY)
        quiet_since: float | None = None
        next_word = self._clock()
        while True:
            now = self._clock()
            if self._is_gone(entry):
                raise self._lost(entry)
            if entry.role is not Role.STANDBY:
                why = f"{worker_id} was given the role {entry.role.value} meanwhile; the drain ends here"
                raise refuse(Code.FAILED_PRECONDITION, why)
            said = drained.progress(entry, self._moves.running_on(entry), now)
            busy = said.left or said.running or (entry.load is not None and entry.load.active_leases)
            quiet_since = None if busy else quiet_since if quiet_since is not None else now
            said.done = quiet_since is not None and now - quiet_since >= _QUIET_S
            if said.done or now >= next_word:
                next_word = now + interval_s
                yield said
            if said.done:
                return
            if now - drained.began > timeout_s:
                raise refuse(
                    Code.DEADLINE_EXCEEDED,
                    f"after {timeout_s:g} s {said.left} answers are left on {worker_id}; it is a standby and goes on "
                    "draining: repeat to wait on, or move them by hand (`diptych migrate`)",
                )
            await asyncio.sleep(_LOOK_S)

    # Moves.

    async def migrate(self, request_id: str, target_id: str) -> Migration:
        """When it is over, however. Raises RequestRefused if it did not begin."""
        live = self._moves.find(request_id)
        if live is None:
            why = f"no request {request_id[:100]!r} runs on a worker; those that do: {_some(self._moves.request_ids())}"
            raise refuse(Code.NOT_FOUND, why, field="request_id")
        target = self.worker(target_id)
        why = self._moves.move(live, target.key)
        if why:
            fix = "it stays where it is; `diptych status` shows what runs where"
            raise refuse(Code.FAILED_PRECONDITION, f"{request_id}: {why}; {fix}", field="target_worker")
        migration = live.life.breakdown.migrations[-1]
        log.info("operator: migrate %s, %s -> %s", request_id, migration.source.worker_id, target_id)
        await self._until(lambda: migration.over or live.life.over, _MIGRATED_S)
        return migration

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = self._clock() + timeout_s
        while not condition():
            if self._clock() > deadline:
                return False
            await asyncio.sleep(_LOOK_S)
        return True


def _busy(entry: WorkerEntry) -> float:
    load = entry.load
    return len(entry.legs) if load is None else float(load.context_tokens + load.prefill_backlog_tokens)


def _some(names: Iterable[str]) -> str:
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return (", ".join(known[:_NAMED]) or "none") + more
