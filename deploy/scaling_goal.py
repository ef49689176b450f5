"""How many workers of each role are wanted: by the policy, and by whoever changes the cluster by hand. Pure.

What the policy decided is the goal. What nobody told us to do is somebody's wish: a deployment's count that is not what
it was set to (a changed configuration), a worker whose role is not what it was given (`diptych switch`, `scale`,
`drain`). The goal follows, the policy sees a count that it did not decide, and keeps it for `hand_hold_s`. So it does
with what `diptych scale` asks for beyond the workers that are ready, which a router keeps for us.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deploy.fleet import Member
from deploy.pools import Home, role_of
from deploy.scaling_plan import Goal, RoleChange

_Key = tuple[str, int]
_MOST_KNOWN = 4096


class Goals:
    def __init__(self) -> None:
        self.goal: Goal | None = None
        self._targets: dict[Home, int] = {}  # as we know that they are
        self._roles: dict[_Key, str] = {}  # as they were at the last look
        self._ours: dict[_Key, RoleChange] = {}  # and what we have told since
        self._wishes: dict[str, int] = {}  # the last one that each router has told

    def look(self, members: Sequence[Member], targets: Mapping[Home, int]) -> Goal:
        ready = [m for m in members if m.ready]
        if self.goal is None:
            counts = Counter(m.role for m in members if m.ready or m.starts)
            self.goal = Goal(counts["prefill"], counts["decode"], counts["standby"])
        else:
            for home, count in targets.items():
                self.goal = self.goal.changed(role_of(home), count - self._targets.get(home, count))
            for m in ready:
                known = self._known(m)
                if known != m.role:
                    self.goal = self.goal.changed(known, -1).changed(m.role, 1)
        self._targets = dict(targets)
        now = {(m.worker_id, m.epoch): m.role for m in ready}
        # Who is lost for a while comes back as it was.
        if len(self._roles) > _MOST_KNOWN:
            self._roles, self._ours = {}, {key: c for key, c in self._ours.items() if key in now}
        self._roles |= now
        return self.goal

    def wished(self, clusters: Sequence[Any]) -> Goal:
        """After `look`: with what somebody has asked a router for meanwhile. The newest word counts."""
        assert self.goal is not None
        heard = {c.router.router_id: c for c in clusters if c.HasField("wish")}
        new = [c.wish for name, c in heard.items() if self._wishes.get(name) != c.wish.number]
        self._wishes |= {name: c.wish.number for name, c in heard.items()}
        if new:
            wish = min(new, key=lambda w: w.age_ms)
            counts = {role: getattr(wish, role) for role in ("prefill", "decode") if wish.HasField(role)}
            self.goal = replace(self.goal, **counts)
        return self.goal

    def decided(self, goal: Goal) -> None:
        self.goal = goal

    def told(self, home: Home, count: int) -> None:
        """Ours, so nobody else's wish."""
        self._targets[home] = count

    def switched(self, change: RoleChange) -> None:
        """Told, and perhaps not heard yet, or never."""
        self._ours[change.worker_id, change.epoch] = change

    def _known(self, m: Member) -> str:
        """The role that it has if nobody else has changed it."""
        key = m.worker_id, m.epoch
        ours = self._ours.get(key)
        if ours is not None:
            if m.role == ours.before:
                return m.role
            del self._ours[key]
            return ours.role
        return self._roles.get(key, role_of(m.home) or m.role)
