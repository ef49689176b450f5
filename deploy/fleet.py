"""The workers of a live cluster, as Serve and the routers together know them. Pure.

Serve knows how many were asked for, which start, which stop and on which node they are; the routers know which are
ready, their role and their load. A worker and its replica are one process: same process id, same host.

    Serve: STARTING, no place yet    unschedulable
    Serve: STARTING, or RUNNING and no router has it ready yet    starting
    a router has it ready            ready, or standby by its role
    Serve: STOPPING, or more than were asked for    draining

A worker's *home* is the deployment that started it (deploy/pools.py); empty: not started by Serve. Roles change; homes
do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deploy.clients import ROLE_NAMES, STATE_NAMES
from deploy.pools import Home, role_of
from scaling.observation import Observation, Pool, Stage, WorkerSeen
from settings.addresses import host_of


@dataclass(frozen=True, slots=True)
class Replica:
    """What Serve says of one."""

    home: Home
    replica_id: str
    state: Literal["starting", "running", "stopping"]
    placed: bool = True  # it has a node
    node: str = ""
    host: str = ""
    pid: int = 0
    started_s: float = 0.0  # by Serve's clock


@dataclass(frozen=True, slots=True)
class Served:
    """What Serve says of the application."""

    targets: Mapping[Home, int]  # of the deployments that there are
    replicas: tuple[Replica, ...]
    on_node: Mapping[str, int] = field(default_factory=dict)  # running replicas of whatever deployment
    head_node: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that there is, or that was asked for."""

    worker_id: str  # empty while it starts
    epoch: int
    home: Home
    role: str  # while it starts: what it starts with
    stage: Stage
    busy: float = 0.0
    empty: bool = False  # nothing is owed to anybody
    replica_id: str = ""
    order: int = 0  # among those of its home: Serve stops 0 first
    age_s: float = 0.0
    started_in_s: float = 0.0

    @property
    def starts(self) -> bool:
        return self.stage in (Stage.STARTING, Stage.UNSCHEDULABLE)

    @property
    def ready(self) -> bool:
        return self.stage in (Stage.READY, Stage.STANDBY)


class Fleet:
    """Remembers since when, and how long starts took."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, Stage], float] = {}
        self._first: dict[str, float] = {}  # replicas whose start was seen
        self._took_s: dict[str, float] = {}
        self._looked = False

    def look(self, served: Served, clusters: Sequence[Any], now: float) -> list[Member]:
        """`clusters`: one Cluster message of each router that answers."""
        workers = _merged(clusters)
        of_replica = _paired(served.replicas, workers)
        members = []
        for replica in served.replicas:
            key = of_replica.get(replica.replica_id)
            members.append(self._member(replica, workers[key] if key is not None else None, now))
        members += [_foreign(w) for key, w in workers.items() if key not in of_replica.values() and w.ready]
        members = _ordered(members, served)
        for home, target in served.targets.items():
            alive = [m for m in members if m.home == home and m.stage is not Stage.DRAINING]
            # What was asked for and is not there yet; what Serve is about to stop.
            for i in range(target - len(alive)):
                members.append(Member("", 0, home, role_of(home), Stage.STARTING, replica_id=f"{home}#{i}"))
            going = {m.replica_id for m in sorted(alive, key=lambda m: m.order)[: max(0, len(alive) - target)]}
            members = [replace(m, stage=Stage.DRAINING) if m.replica_id in going else m for m in members]
        members = [self._aged(m, now) for m in members]
        self._forget(members)
        self._looked = True
        return members

    def _member(self, replica: Replica, worker: _Worker | None, now: float) -> Member:
        known = replica.replica_id
        if replica.state == "starting" and self._looked:
            self._first.setdefault(known, now)
        if replica.state == "stopping":
            stage = Stage.DRAINING
        elif worker is not None and worker.ready:
            stage = Stage.STANDBY if worker.role == "standby" else Stage.READY
            if known in self._first and known not in self._took_s:
                self._took_s[known] = now - self._first[known]
        elif worker is not None and worker.leaves:
            stage = Stage.DRAINING
        else:
            stage = Stage.STARTING if replica.placed else Stage.UNSCHEDULABLE
        if worker is None:
            return Member("", 0, replica.home, role_of(replica.home), stage, replica_id=known)
        return Member(
            worker.worker_id,
            worker.epoch,
            replica.home,
            worker.role,
            stage,
            worker.busy,
            worker.empty,
            known,
            started_in_s=self._took_s.get(known, 0.0),
        )

    def _aged(self, member: Member, now: float) -> Member:
        since = self._since.setdefault((_name(member), member.stage), now)
        return replace(member, age_s=now - since)

    def _forget(self, members: Sequence[Member]) -> None:
        there = {(_name(m), m.stage) for m in members}
        self._since = {key: at for key, at in self._since.items() if key in there}
        names = {m.replica_id for m in members}
        self._first = {name: at for name, at in self._first.items() if name in names}
        self._took_s = {name: s for name, s in self._took_s.items() if name in names}


def observed(seen: Observation, members: Sequence[Member], targets: tuple[int, int]) -> Observation:
    """What routers say of those that work, with what Serve says of the others."""
    by_key = {m.worker_id: m for m in members if m.worker_id}
    workers = []
    for w in seen.workers:
        member = by_key.pop(w.worker_id, None)
        if member is not None and member.ready:
            w = replace(w, started_in_s=member.started_in_s)
        elif member is not None:
            w = replace(w, stage=member.stage, pool=_pool(member.role), age_s=member.age_s)
        workers.append(w)
    named = {w.worker_id for w in workers}
    for m in members:
        if not m.worker_id or m.worker_id not in named:
            workers.append(WorkerSeen(m.worker_id or m.replica_id, _pool(m.role), m.stage, m.age_s))
    return replace(seen, workers=tuple(workers), prefill_target=targets[0], decode_target=targets[1])


def _pool(role: str) -> Pool | None:
    return None if role == "standby" else Pool(role)


def _name(member: Member) -> str:
    return member.replica_id or member.worker_id


# What the routers say.


@dataclass(slots=True)
class _Worker:
    worker_id: str
    epoch: int
    host: str
    role: str
    ready: bool = False  # for some router
    leaves: bool = False
    busy: float = 0.0
    empty: bool = True  # for all of them


def _merged(clusters: Sequence[Any]) -> dict[tuple[str, int], _Worker]:
    """Of two routers that see different things of a worker, the one that has it ready is right."""
    found: dict[tuple[str, int], _Worker] = {}
    for cluster in clusters:
        for w in cluster.workers:
            state, role = STATE_NAMES.get(w.state, ""), ROLE_NAMES.get(w.role)
            if role is None or state not in ("connecting", "ready", "draining"):
                continue
            one = found.setdefault((w.worker_id, w.epoch), _Worker(w.worker_id, w.epoch, host_of(w.address), role))
            load = w.load
            if state == "ready":
                one.ready, one.role = True, role
            one.leaves |= state == "draining"
            one.busy = max(one.busy, float(load.context_tokens + load.prefill_backlog_tokens))
            owed = load.running_sequences or load.waiting_sequences or load.active_leases or w.dispatched_requests
            one.empty &= not owed
    return found


def _paired(replicas: Sequence[Replica], workers: Mapping[tuple[str, int], _Worker]) -> dict[str, tuple[str, int]]:
    """Replica id -> worker. A worker's id ends with its process id, which containers of two hosts may share."""
    of_pid: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for key in workers:
        of_pid[key[0].rpartition("-")[2]].append(key)
    found = {}
    for replica in replicas:
        keys = of_pid.get(str(replica.pid), [])
        here = [key for key in keys if workers[key].host == replica.host]
        keys = here or (keys if len(keys) == 1 else [])
        if replica.pid and keys:
            found[replica.replica_id] = max(keys, key=lambda key: key[1])  # the newest incarnation
    return found


def _foreign(w: _Worker) -> Member:
    """It works, and is nobody's to stop."""
    stage = Stage.STANDBY if w.role == "standby" else Stage.READY
    return Member(w.worker_id, w.epoch, "", w.role, stage, w.busy, w.empty)


def _ordered(members: Sequence[Member], served: Served) -> list[Member]:
    """Serve stops first what is not running yet, then on nodes that run nothing else of its, the newest first; the
    head node last. It takes no wishes, so this is foreseen and not told; where it comes out otherwise, the worker that
    was emptied goes on and the other one drains as any that stops.
    """
    replicas = {r.replica_id: r for r in served.replicas}

    def rank(member: Member) -> tuple[bool, bool, int, str, float]:
        r = replicas.get(member.replica_id)
        if r is None or r.state != "running":
            return False, False, 0, "", 0.0
        return True, r.node == served.head_node, served.on_node.get(r.node, 0), r.node, -r.started_s

    order: dict[Home, int] = defaultdict(int)
    result = []
    for member in sorted(members, key=rank):
        result.append(replace(member, order=order[member.home]))
        order[member.home] += 1
    return result
