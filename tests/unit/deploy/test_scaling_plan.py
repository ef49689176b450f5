"""From wanted counts to what is done next, step by step, against a small model of Serve and the workers."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

import pytest

from deploy.fleet import Member
from deploy.pools import role_of
from deploy.scaling_goal import Goals
from deploy.scaling_plan import Goal, Plan, plan
from scaling.observation import Stage


@dataclass
class Model:
    """Serve as it is: it stops the first in its order, and what starts is ready at the next tick."""

    members: list[Member]
    targets: dict[str, int]
    made: int = 0

    @classmethod
    def of(cls, prefill: int, decode: int, standby: int = 0) -> Model:
        model = cls([], {"prefill": prefill, "decode": decode, "standby": standby})
        model.tick()
        model.tick()
        return model

    def tick(self) -> None:
        self.members = [self._ready(m) if m.starts else m for m in self.members]
        for home, target in self.targets.items():
            mine = [m for m in self.members if m.home == home]
            for _ in range(target - len(mine)):
                self.made += 1
                self.members.append(
                    Member("", 0, home, role_of(home), Stage.STARTING, replica_id=f"{home}-{self.made}")
                )
            mine.sort(key=lambda m: m.order)
            stopped = {m.replica_id for m in mine[: max(0, len(mine) - target)]}
            self.members = [m for m in self.members if m.replica_id not in stopped]
            # The newest is the first to go.
            rest = [m for m in reversed(self.members) if m.home == home]
            places = {m.replica_id: i for i, m in enumerate(rest)}
            self.members = [replace(m, order=places.get(m.replica_id, m.order)) for m in self.members]

    def _ready(self, m: Member) -> Member:
        stage = Stage.STANDBY if m.role == "standby" else Stage.READY
        return replace(m, worker_id=m.replica_id, epoch=1, stage=stage, empty=True)

    def apply(self, todo: Plan) -> None:
        self.targets.update(todo.targets)
        for change in todo.changes:
            stage = Stage.STANDBY if change.role == "standby" else Stage.READY
            self.members = [
                replace(m, role=change.role, stage=stage) if m.worker_id == change.worker_id else m
                for m in self.members
            ]

    def roles(self) -> tuple[int, int, int]:
        ready = [m.role for m in self.members if m.ready]
        return ready.count("prefill"), ready.count("decode"), ready.count("standby")

    def until_done(self, goal: Goal, ticks: int = 20, stay: Collection[str] = ()) -> None:
        for _ in range(ticks):
            todo = plan(self.members, self.targets, goal, stay=stay)
            if todo.done and self.roles() == (goal.prefill, goal.decode, goal.standby):
                return
            self.apply(todo)
            self.tick()
        raise AssertionError(f"{goal} was not reached: {self.members}, {self.targets}")


def test_groups_beside_the_one_that_is_scaled_keep_their_counts() -> None:
    """decode/old stays at two, though it could be stopped first; decode/new grows, and shrinks again."""
    model = Model([], {"prefill": 1, "decode/old": 2, "decode/new": 1})
    model.tick()
    model.tick()
    assert model.roles() == (1, 3, 0)
    for goal, new in ((Goal(1, 5), 3), (Goal(1, 3), 1), (Goal(2, 4), 2)):
        model.until_done(goal, stay={"decode/old"})
        assert model.targets == {"prefill": goal.prefill, "decode/old": 2, "decode/new": new}


def test_what_has_not_started_of_a_group_that_stays_is_not_taken_back() -> None:
    members = [Member("", 0, home, "decode", Stage.STARTING, replica_id=home) for home in ("decode/old", "decode/new")]
    todo = plan(members, {"decode/old": 1, "decode/new": 1}, Goal(0, 1), stay={"decode/old"})
    assert todo.targets == {"decode/new": 0}


def test_more_are_asked_for_where_the_role_is_at_home() -> None:
    model = Model.of(1, 1)
    assert plan(model.members, model.targets, Goal(3, 2)).targets == {"prefill": 3, "decode": 2}
    model.until_done(Goal(3, 2))
    assert model.targets == {"prefill": 3, "decode": 2, "standby": 0}


def test_a_shift_changes_roles_and_no_count() -> None:
    model = Model.of(2, 1)
    todo = plan(model.members, model.targets, Goal(1, 2))
    assert [(c.before, c.role) for c in todo.changes] == [("prefill", "decode")]
    assert not todo.targets


def test_the_worker_that_leaves_becomes_a_standby_and_is_taken_off_when_it_is_empty() -> None:
    model = Model.of(1, 3)
    busy = [replace(m, empty=m.role != "decode", busy=5.0 - m.order) for m in model.members]
    todo = plan(busy, model.targets, Goal(1, 1))
    assert [(c.before, c.role) for c in todo.changes] == [("decode", "standby")] * 2
    assert not todo.targets
    assert len(todo.leaving) == 2
    model.members = busy
    model.apply(todo)
    waits = plan(model.members, model.targets, Goal(1, 1))
    assert not waits.changes
    assert not waits.targets
    first = next(m for m in model.members if m.role == "standby" and m.order == 0)
    model.members = [replace(m, empty=True) if m is first else m for m in model.members]
    assert plan(model.members, model.targets, Goal(1, 1)).targets == {"decode": 2}
    model.tick()
    assert plan(model.members, model.targets, Goal(1, 1)).targets == {"decode": 2}


def test_who_does_not_get_empty_is_taken_off_after_a_while() -> None:
    members = [
        Member("p", 1, "prefill", "prefill", Stage.READY),
        Member("d", 1, "decode", "decode", Stage.READY, order=1),
        Member("s", 1, "decode", "standby", Stage.STANDBY, age_s=61.0),
    ]
    assert plan(members, {"prefill": 1, "decode": 2}, Goal(1, 1)).targets == {"decode": 1}


def test_serve_would_stop_the_wrong_one_so_roles_are_changed_first() -> None:
    """The only one that Serve may stop first of each home is a decode worker; a prefill worker is too many."""
    members = [
        Member("old", 1, "prefill", "prefill", Stage.READY, order=1, replica_id="old"),
        Member("new", 1, "prefill", "decode", Stage.READY, order=0, replica_id="new"),
        Member("other", 1, "prefill", "prefill", Stage.READY, order=2, replica_id="other"),
    ]
    todo = plan(members, {"prefill": 3}, Goal(1, 1))
    assert [(c.worker_id, c.role) for c in todo.changes] == [("old", "decode"), ("new", "standby")]


def test_what_has_not_started_is_not_started() -> None:
    model = Model.of(1, 1)
    model.targets["decode"] = 3
    model.tick()
    todo = plan(model.members, model.targets, Goal(1, 1))
    assert todo.targets == {"decode": 1}
    assert not todo.changes


def test_who_leaves_is_called_back() -> None:
    members = [
        Member("p", 1, "prefill", "prefill", Stage.READY),
        Member("d", 1, "decode", "decode", Stage.READY, order=1),
        Member("s", 1, "decode", "standby", Stage.STANDBY, empty=False),
    ]
    todo = plan(members, {"prefill": 1, "decode": 2}, Goal(1, 2))
    assert [(c.worker_id, c.role) for c in todo.changes] == [("s", "decode")]


def test_to_zero_and_back() -> None:
    model = Model.of(2, 1)
    model.until_done(Goal(0, 0))
    assert model.targets == {"prefill": 0, "decode": 0, "standby": 0}
    model.until_done(Goal(1, 1))


def test_standbys_start_in_their_deployment_or_as_decode_workers() -> None:
    model = Model.of(1, 1)
    assert plan(model.members, model.targets, Goal(1, 1, 2)).targets == {"standby": 2}
    model.until_done(Goal(1, 1, 2))
    without = Model.of(1, 1)
    del without.targets["standby"]
    without.until_done(Goal(1, 1, 1))
    assert without.targets == {"prefill": 1, "decode": 2}


def test_a_ready_worker_is_no_standby_for_one_that_still_starts() -> None:
    members = [
        Member("p", 1, "prefill", "prefill", Stage.READY),
        Member("d", 1, "decode", "decode", Stage.READY),
        Member("", 0, "decode", "decode", Stage.STARTING, replica_id="new"),
    ]
    assert not plan(members, {"prefill": 1, "decode": 2}, Goal(1, 1, 1)).changes


@pytest.mark.parametrize("seed", range(40))
def test_any_goal_is_reached_from_any_other_and_no_role_is_ever_empty(seed: int) -> None:
    rng = random.Random(seed)
    model = Model.of(rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 2))
    for _ in range(6):
        goal = Goal(rng.randint(1, 4), rng.randint(1, 4), rng.randint(0, 2))
        before = len(model.members)
        for _ in range(20):
            todo = plan(model.members, model.targets, goal)
            for change in todo.changes:
                model.apply(Plan((change,)))
                assert min(model.roles()[:2]) > 0, (goal, todo)
            model.apply(replace(todo, changes=()))
            assert sum(model.targets.values()) <= max(before, goal.total)
            if todo.done:
                break
            model.tick()
        model.until_done(goal)


# What others do.


def test_a_count_and_a_role_that_we_did_not_set_are_adopted() -> None:
    goals, model = Goals(), Model.of(2, 2)
    assert goals.look(model.members, model.targets) == Goal(2, 2)
    model.targets["decode"] = 3
    assert goals.look(model.members, model.targets) == Goal(2, 3)
    changed = [replace(m, role="decode") if m.role == "prefill" and m.order == 0 else m for m in model.members]
    assert goals.look(changed, model.targets) == Goal(1, 4)
    assert goals.look(changed, model.targets) == Goal(1, 4)


def test_what_we_did_is_nobodys_wish() -> None:
    goals, model = Goals(), Model.of(2, 2)
    goals.look(model.members, model.targets)
    goals.decided(Goal(3, 1))
    todo = plan(model.members, model.targets, Goal(3, 1))
    (change,) = todo.changes
    goals.switched(change)
    model.apply(todo)
    assert goals.look(model.members, model.targets) == Goal(3, 1)
    goals.told("prefill", 3)
    model.targets["prefill"] = 3
    assert goals.look(model.members, model.targets) == Goal(3, 1)


def test_a_switch_that_is_heard_late_or_never_is_no_wish() -> None:
    goals, model = Goals(), Model.of(2, 2)
    goals.look(model.members, model.targets)
    goals.decided(Goal(3, 1))
    todo = plan(model.members, model.targets, Goal(3, 1))
    goals.switched(todo.changes[0])
    assert goals.look(model.members, model.targets) == Goal(3, 1)
    model.apply(todo)
    assert goals.look(model.members, model.targets) == Goal(3, 1)
    back = [replace(m, role="decode") if m.home == "decode" else m for m in model.members]
    assert goals.look(back, model.targets) == Goal(2, 2), "and that was somebody's"


def test_a_worker_that_was_lost_and_comes_back_as_it_was_is_no_wish() -> None:
    goals, model = Goals(), Model.of(2, 2)
    model.members = [replace(m, role="decode") if m.home == "prefill" and m.order == 0 else m for m in model.members]
    assert goals.look(model.members, model.targets) == Goal(1, 3)
    assert goals.look([m for m in model.members if m.home == "decode"], model.targets) == Goal(1, 3)
    assert goals.look(model.members, model.targets) == Goal(1, 3)


def test_a_replacement_that_begins_with_its_homes_role_is_no_wish() -> None:
    goals, model = Goals(), Model.of(2, 2)
    goals.look(model.members, model.targets)
    model.members = [replace(m, worker_id=f"{m.worker_id}-again") for m in model.members]
    assert goals.look(model.members, model.targets) == Goal(2, 2)
