"""Resizes a live cluster: looks, decides as scaling/policy.py says, and does it. One for a cluster.

    look     what Serve and the routers say (fleet.py); changes that somebody else made are adopted (scaling_goal.py)
    decide   every `interval_s`; the routers are told every decision, and what became of it
    act      the next steps towards the goal (scaling_plan.py), every second until it is reached

Whatever goes wrong here, the cluster stays as it is: the error is logged, told to the routers, and it is tried again.
What it remembers is lost with its process; the next one begins with the counts that it finds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol

from deploy.fleet import Fleet, Served, observed
from deploy.pools import Home
from deploy.scaling_goal import Goals
from deploy.scaling_plan import Goal, Plan, RoleChange, plan
from deploy.scaling_watch import Watcher
from scaling.config import ScalingConfig
from scaling.decision import Decision
from scaling.policy import decide
from scaling.report import Counts, Report
from scaling.state import ScalingState
from scaling.weighing import Terms

log = logging.getLogger(__name__)

_ACT_S = 1.0


class Platform(Protocol):
    """Each raises whatever it likes."""

    def served(self) -> Served: ...

    def clusters(self) -> list[Any]:
        """A Cluster message of each router that answers."""
        ...

    def set_count(self, home: Home, count: int) -> None: ...

    def switch(self, change: RoleChange) -> None:
        """Returns when the worker has its role."""
        ...

    def tell(self, report: Report) -> None:
        """All routers. Nobody is waited for."""
        ...


class Scaler:
    def __init__(
        self,
        platform: Platform,
        config: ScalingConfig,
        terms: Terms,
        watcher: Watcher,
        clock: Callable[[], float],
        patience_s: float = 60.0,
        decider: str = "the scaler",
        stay: Collection[Home] = (),
    ) -> None:
        """`stay`: whose counts are not ours: groups of a pool beside the one that is scaled."""
        self._platform, self._config, self._terms, self._watcher = platform, config, terms, watcher
        self._clock, self._patience_s = clock, patience_s
        self._fleet, self._goals, self._state = Fleet(), Goals(), ScalingState()
        self._decide_at = clock()
        self._decider, self._number, self._stay = decider, 0, stay
        self._report: Report | None = None
        self._complaint = self._said = ""

    def step(self) -> float:
        """One look, and what follows from it. Returns after how long the next one is due. Raises nothing."""
        now = self._clock()
        due = now >= self._decide_at
        if due:
            self._decide_at = now + self._config.interval_s
        try:
            done = self._step(now, due)
            self._complaint = ""
        except Exception as error:
            self._failed(error, due)
            done = False
        left_s = max(0.0, self._decide_at - self._clock())
        return left_s if done else min(left_s, _ACT_S)

    def _step(self, now: float, due: bool) -> bool:
        """Whether the goal is reached."""
        self._report = None
        served, clusters = self._platform.served(), self._platform.clusters()
        members = self._fleet.look(served, clusters, now)
        if not clusters:  # who works and what comes is not known
            raise LookupError("no router answers")
        goal = self._goals.look(members, served.targets)
        seen = self._watcher.look(clusters, now) if due else None
        if seen is not None:
            goal = self._goals.wished(clusters)  # only here: the policy keeps it within limits
            seen = observed(seen, members, (goal.prefill, goal.decode))
            decision, self._state = decide(seen, self._state, self._config, self._terms)
            if not self._config.dry_run:
                goal = Goal(decision.prefill, decision.decode, decision.standbys)
                self._goals.decided(goal)
            self._number += 1
            self._report = Report.of(decision, seen, self._decider, self._number, self._config.interval_s)
            if decision.changes or decision.rule != self._said:
                log.info("scaling: %d + %d (%s): %s", *decision.pair, decision.rule, decision.why)
            self._said = decision.rule
            self._platform.tell(self._report)
        if self._config.dry_run:
            return True
        todo = plan(members, served.targets, goal, self._patience_s, self._stay)
        self._act(todo, served.targets)
        return todo.done

    def _act(self, todo: Plan, before: Mapping[Home, int]) -> None:
        for home, count in todo.targets.items():
            log.info("scaling: %s workers: %d, were %d", home, count, before[home])
            self._platform.set_count(home, count)
            self._goals.told(home, count)
        for change in todo.changes:
            log.info("scaling: %s is to be %s, was %s", change.worker_id, change.role, change.before)
            self._goals.switched(change)
            self._platform.switch(change)

    def _failed(self, error: Exception, due: bool) -> None:
        why = f"{type(error).__name__}: {error}"
        if why != self._complaint:
            log.warning("scaling: the counts stay as they are: %s", why, exc_info=not isinstance(error, LookupError))
        elif not due:
            return
        self._complaint = why
        if self._goals.goal is None and isinstance(error, LookupError):
            return  # the cluster is about to start: there is nothing to size yet
        report = self._report
        if report is None:  # it has not come to a decision
            goal = self._goals.goal or Goal(0, 0)
            stay = Decision(
                self._clock(), goal.prefill, goal.decode, goal.standby, "error", "the counts stay as they are"
            )
            counts = Counts(goal.prefill, goal.decode, goal.standby)
            self._number += 1
            report = Report(stay, self._decider, self._number, self._config.interval_s, counts, counts)
        try:
            self._platform.tell(replace(report, error=why))
        except Exception as unheard:
            log.debug("scaling: nobody could be told: %s", unheard)
