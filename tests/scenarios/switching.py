"""Roles that change while answers run: every sixth seed switches single workers and scales both pools at odd moments.

Two decode workers are always left, as two are there to begin with: what a single fault may cost stays what it is. The
next change comes when every router has heard of the last, so that none can miss all those that decode.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from router.operating.roles import Standing, last_of_its_role, plan
from router.placement.cluster import Role, WorkerEntry, WorkerState
from router.placement.view import WorkerKey
from tests.scenarios.nodes import SimRouter, SimWorker, World

_LEAST_DECODE = 2
_HEARD_S = 2.0  # a stream that broke is whole again by then, or a heartbeat has told


def has_switches(seed: int) -> bool:
    return seed % 12 in (1, 4)


@dataclass
class Switching:
    """Of one scenario. Its draws are of its own: the others stay as they are."""

    seed: int
    world: World
    busy: Callable[[], bool]  # answers are still to come
    rng: random.Random = field(init=False)
    told: Counter[str] = field(default_factory=Counter)  # "decode -> prefill"
    _queue: list[tuple[WorkerKey, Role]] = field(default_factory=list)
    _last: tuple[float, WorkerKey, Role] | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(f"switches {self.seed}")
        self.every_s = self.rng.choice((0.02, 0.1, 0.5))

    def begin(self) -> None:
        self.world.clock.at(self.every_s, self._look)

    def _look(self) -> None:
        if self.busy():
            self.world.clock.at(self.every_s * self.rng.uniform(0.5, 1.5), self._look)
            if self._is_heard():
                self._act()

    def _act(self) -> None:
        routers = list(self.world.routers.values())
        if not routers:
            return
        router = self.rng.choice(routers)
        if not self._queue:
            self._queue = self._scale(router) if self.rng.random() < 0.3 else self._one(router)
        while self._queue:
            key, role = self._queue.pop(0)
            entry = router.dispatcher.cluster.workers.get(key)
            if entry is not None and self._may(router, entry, role):
                self.told[f"{entry.role.value} -> {role.value}"] += 1
                self.world.say(f"{key.worker_id} is to be {role.value}, was {entry.role.value}")
                router.set_role(key, role)
                self._last = (self.world.clock.now, key, role)
                return

    def _one(self, router: SimRouter) -> list[tuple[WorkerKey, Role]]:
        ready = [e for role in Role for e in router.dispatcher.cluster.ready(role)]
        return [(self.rng.choice(ready).key, self.rng.choice(list(Role)))] if ready else []

    def _scale(self, router: SimRouter) -> list[tuple[WorkerKey, Role]]:
        """As `diptych scale` would; one after the other."""
        ready = [e for role in Role for e in router.dispatcher.cluster.ready(role)]
        wanted = {Role.PREFILL: self.rng.randint(0, 3), Role.DECODE: self.rng.randint(_LEAST_DECODE, 4)}
        switches = plan([Standing(e.key, e.role, len(e.legs)) for e in ready], wanted)
        return [(s.key, s.role) for s in switches] if isinstance(switches, list) else []

    def _may(self, router: SimRouter, entry: WorkerEntry, to: Role) -> bool:
        if entry.state is not WorkerState.READY or entry.role is to:
            return False
        decode = [key for key, role in self.roles().items() if role is Role.DECODE and key != entry.key]
        if entry.role is Role.DECODE and len(decode) < _LEAST_DECODE:
            return False
        others = [e for e in router.dispatcher.cluster.ready(entry.role) if e is not entry]
        return last_of_its_role(entry.key, entry.role, to, len(others)) is None or self.rng.random() < 0.3  # forced

    def roles(self) -> dict[WorkerKey, Role]:
        """By the workers' own word."""
        return {WorkerKey(p.worker_id, p.epoch): _role_of(w) for p, w in self.world.workers.items() if not w.leaving}

    def _is_heard(self) -> bool:
        if self._last is None:
            return True
        at, key, role = self._last
        seen = [r.dispatcher.cluster.workers.get(key) for r in self.world.routers.values()]
        heard = all(e is None or e.role is role for e in seen)
        if heard or self.world.clock.now - at > _HEARD_S + self.world.weather.latency_s:
            self._last = None
        return self._last is None

    # What must be true.

    def problem(self) -> str:
        """When all is quiet."""
        for router in self.world.routers.values():
            for key, role in self.roles().items():
                entry = router.dispatcher.cluster.workers.get(key)
                if entry is not None and entry.role is not role:
                    return f"{router.name} takes {key.worker_id} for {entry.role.value}, and it is {role.value}"
        return ""


def _role_of(worker: SimWorker) -> Role:
    assert worker.core.role is not None
    return Role(worker.core.role.role)
