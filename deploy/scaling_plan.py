"""From the counts that are wanted to what is done next. Pure; called again and again until nothing is left to do.

    more      the deployment of the role that lacks somebody is told to have more workers
    roles     who is too many in one role takes the other; a standby takes what is still missing
    fewer     what has not started is not started. Otherwise the worker that leaves is named: it becomes a standby, so
              that routers send it nothing and its long answers move away; once it is empty, its deployment is told to
              have one worker less

A worker that leaves and has not been taken off yet can be called back: it is a standby like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deploy.fleet import Member
from deploy.pools import Home, role_of

ROLES = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Goal:
    """How many workers there should be of each role, those included that still start."""

    prefill: int
    decode: int
    standby: int = 0

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.standby

    def of(self, role: str) -> int:
        return getattr(self, role)

    def changed(self, role: str, by: int) -> Goal:
        return replace(self, **{role: max(0, self.of(role) + by)})


@dataclass(frozen=True, slots=True)
class RoleChange:
    worker_id: str
    epoch: int
    before: str
    role: str
    force: bool = False  # also the last one of its role: there shall be none


@dataclass(frozen=True, slots=True)
class Plan:
    """`targets`: only of the deployments whose count changes. `leaving`: named, and not empty yet."""

    changes: tuple[RoleChange, ...] = ()
    targets: Mapping[Home, int] = field(default_factory=dict)
    leaving: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return not (self.changes or self.targets or self.leaving)


def plan(
    members: Sequence[Member],
    targets: Mapping[Home, int],
    goal: Goal,
    patience_s: float = 60.0,
    stay: Collection[Home] = (),
) -> Plan:
    """`patience_s`: after so long a leaving worker is taken off although it is not empty; its end drains it again.
    `stay`: homes whose counts are left alone; their workers may take another role all the same.
    """
    ready = [m for m in members if m.ready]
    starts = [m for m in members if m.starts]
    told = dict(targets)
    surplus = len(ready) + len(starts) - goal.total
    have = Counter(m.role for m in (*ready, *starts))

    # What has not started yet.
    for member in sorted(starts, key=lambda m: have[m.role] <= goal.of(m.role)):
        may = bool(member.home) and member.home not in stay
        if surplus > 0 and may and not member.worker_id and told[member.home] > 0:
            told[member.home] -= 1
            have[member.role] -= 1
            surplus -= 1

    ours = {home: n for home, n in told.items() if home not in stay}
    leaving = _leaving(ready, goal, have, ours, surplus)
    gone = {m.replica_id for m in leaving}
    staying = [m for m in ready if m.replica_id not in gone or not m.home]
    changes = _roles(staying, leaving, goal, have)

    waited_for = []
    for home in told:
        # Serve takes the first ones: whoever is behind one that is not empty waits with it.
        queue = sorted((m for m in leaving if m.home == home), key=lambda m: m.order)
        for number, member in enumerate(queue):
            off = member.role == "standby" and (member.empty or member.age_s > patience_s)
            if not off:
                waited_for += [m.worker_id for m in queue[number:]]
                break
            told[home] -= 1

    for role in (*ROLES, "standby"):
        home = _grows(role, ours) or _grows("decode", ours)
        lacking = goal.of(role) - have[role]
        if surplus < 0 and lacking > 0 and home is not None:
            more = min(lacking, -surplus)
            told[home] += more
            surplus += more
    return Plan(tuple(changes), {h: n for h, n in told.items() if n != targets[h]}, tuple(waited_for))


def _grows(role: str, homes: Collection[Home]) -> Home | None:
    return next((home for home in homes if role_of(home) == role), None)


def _leaving(
    ready: Sequence[Member], goal: Goal, have: Counter[str], told: Mapping[Home, int], count: int
) -> list[Member]:
    """Of those that Serve would stop first: a standby, then one of a role that has too many, then the least busy."""
    queues = {
        home: sorted((m for m in ready if m.home == home), key=lambda m: m.order) for home, n in told.items() if n > 0
    }
    left = Counter(have)
    found: list[Member] = []
    while len(found) < count:
        heads = [queue[0] for queue in queues.values() if queue]
        if not heads:
            break
        one = min(heads, key=lambda m: (m.role != "standby", left[m.role] <= goal.of(m.role), m.busy, m.replica_id))
        queues[one.home].pop(0)
        left[one.role] -= 1
        found.append(one)
    return found


def _roles(staying: Sequence[Member], leaving: Sequence[Member], goal: Goal, have: Counter[str]) -> list[RoleChange]:
    """Roles that lack somebody are filled before any is emptied. `have` is brought up to date."""
    have.subtract(Counter(m.role for m in leaving))
    # Last of all those that Serve would stop next.
    idle = [m for m in sorted(staying, key=lambda m: (-m.order, m.worker_id)) if m.role == "standby"]
    busy = {r: [m for m in sorted(staying, key=lambda m: (m.busy, m.worker_id)) if m.role == r] for r in ROLES}
    fill: list[RoleChange] = []
    for role, other in (ROLES, ROLES[::-1]):
        while have[role] < goal.of(role):
            if have[other] > goal.of(other) and len(busy[other]) > min(1, goal.of(other)):
                one = busy[other].pop(0)
            elif idle and have["standby"] > 0:
                one = idle.pop(0)
            else:
                break
            fill.append(RoleChange(one.worker_id, one.epoch, one.role, role))
            have[one.role] -= 1
            have[role] += 1
    rest: list[RoleChange] = []
    for role in ROLES:
        while have[role] > goal.of(role) and len(busy[role]) > goal.of(role):  # of those that start none is of use yet
            one = busy[role].pop(0)
            rest.append(RoleChange(one.worker_id, one.epoch, role, "standby", force=goal.of(role) == 0))
            have[role] -= 1
            have["standby"] += 1
    for one in leaving:
        if one.role != "standby":
            rest.append(RoleChange(one.worker_id, one.epoch, one.role, "standby", force=goal.of(one.role) == 0))
    return [*fill, *rest]
