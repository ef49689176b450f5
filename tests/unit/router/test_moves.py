"""Which answers go on elsewhere, and when a move that failed is tried again: `Moves` over a real cluster and lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from router.moves import Moves
from router.placement.cluster import Cluster, Promise
from router.placement.policy import WorkerKey
from tests.unit.router.placement.test_cluster import info, load, ready
from tests.unit.router.test_lifecycle import D2, D, Story

D3 = WorkerKey("d3", 1)


@dataclass
class World:
    """One answer on d, some hundred tokens in; time stands still but for `pass_s`."""

    others: tuple[WorkerKey, ...] = (D2, D3)
    limits: dict[WorkerKey, int] = field(default_factory=dict)
    old: tuple[WorkerKey, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    usual_tokens: int = 0
    emitted: int = 300
    now: float = 1.0
    balance: bool = False
    calls: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster = Cluster()
        for key in (D, *self.others):
            worker = replace(info(key.worker_id), context_limit_tokens=self.limits.get(key, 8192))
            worker = replace(worker, masks_tokens=key not in self.old)
            ready(self.cluster, worker)
            self.cluster.reported(key, replaced(load(free=90), step_ms=20.0), 0.0, frozenset())
        self.story = Story(split=False, max_tokens=4000)
        self.life = self.story.life
        request = self.life.request
        self.life.request = replace(request, sampling=replace(request.sampling, **self.sampling))
        self.life.start(0.0)
        for position in range(self.emitted):
            self.life.on_token(1, position, 50, None, 0.5)
        self.story.new()
        self.live: Any = SimpleNamespace(life=self.life)
        self.by_leg = {1: self.live}
        self.cluster.dispatched(D, 1, Promise(0, 1, 1, 0, None))
        self.moves = Moves(
            self.cluster,
            self.by_leg,
            lambda most: self.usual_tokens,
            lambda live: None,
            lambda: self.now,
            lambda delay, call: self.calls.append((self.now + delay, call)),  # type: ignore[arg-type]
            balance=self.balance,
        )

    def report(self, key: WorkerKey, *, running: int, step_ms: float) -> list[str]:
        """What was begun at it."""
        said = replaced(
            load(free=90), running_sequences=running, step_ms=step_ms, decode_step_ms=step_ms, last_sequence_id=1
        )
        self.cluster.reported(key, said, self.now, frozenset())
        self.moves.reported(key)
        return self.pass_s(0.0)

    def drain(self) -> None:
        self.cluster.draining(D)
        self.moves.wanted()
        self.pass_s(0.0)

    def pass_s(self, seconds: float) -> list[str]:
        """What was begun meanwhile."""
        end = self.now + seconds
        while self.calls and min(self.calls)[0] <= end:
            self.calls.sort(key=lambda c: c[0])
            self.now, call = self.calls.pop(0)
            call()
        self.now = end
        return [line for line in self.story.new() if "start" in line]

    def fail(self) -> None:
        """The move that is under way."""
        leg = max(self.story.open_legs)
        self.life.on_worker_lost(leg, "no reason", self.now)


def replaced(report: SimpleNamespace, **values: float) -> Any:
    return SimpleNamespace(**(vars(report) | values))


def test_what_ran_long_is_believed_to_run_on_though_nobody_knows_how_long_answers_are() -> None:
    world = World()
    world.drain()
    assert world.life.migrating is not None


@pytest.mark.parametrize(("emitted", "usual", "goes"), [(5, 0, False), (5, 200, True), (190, 200, True)])
def test_the_rest_of_an_answer_is_guessed_from_the_usual_and_from_its_own_age(
    emitted: int, usual: int, goes: bool
) -> None:
    world = World(emitted=emitted, usual_tokens=usual)
    world.drain()
    assert (world.life.migrating is not None) is goes


def test_a_move_that_failed_is_tried_elsewhere_first_and_there_again_later() -> None:
    world = World()
    world.drain()
    migration = world.life.migrating
    assert migration is not None
    first = migration.target
    world.story.new()
    world.fail()
    assert world.pass_s(0.4) == []
    (line,) = world.pass_s(0.2)
    assert f"on {first.worker_id}" not in line
    other = world.life.migrating
    assert other is not None
    world.fail()
    world.pass_s(5.0)
    assert world.life.migrating is not None, "it is tried as long as its worker leaves"


def test_the_only_other_worker_is_tried_again() -> None:
    world = World(others=(D2,))
    world.drain()
    for _ in range(5):
        assert world.life.migrating is not None
        world.fail()
        assert world.life.migrating is None
        world.pass_s(10.2)
    assert world.life.migrating is not None


def test_it_does_not_go_back_to_where_it_came_from() -> None:
    world = World(others=(D2,))
    assert world.moves.move(world.live, D2) == ""
    leg = max(world.story.open_legs)
    world.by_leg[leg] = world.live
    world.cluster.dispatched(D2, leg, Promise(0, 1, 1, 0, None))
    world.life.on_adopted(leg, f"r/{leg}", 1.0, 1.0, world.now)
    world.life.on_end(1, None, 0, world.now)
    world.story.new()
    world.cluster.draining(D2)
    world.moves.wanted()
    assert world.pass_s(5.0) == []
    assert world.pass_s(6.0), "unless its worker leaves, and time has passed"


def test_a_worker_whose_context_would_end_it_early_is_none_for_it() -> None:
    world = World(limits={D2: 2000, D3: 5000})
    assert "context limit of d2" in world.moves.move(world.live, D2)
    world.drain()
    assert world.life.migrating is not None
    assert world.life.migrating.target == D3


def test_a_worker_that_does_not_know_what_it_asks_for_is_none_for_it() -> None:
    assert World(old=(D2,)).moves.move(World(old=(D2,)).live, D2) == ""
    world = World(old=(D2,), sampling={"bad_words": ((7,),)})
    assert "older version" in world.moves.move(world.live, D2)
    world.drain()
    assert world.life.migrating is not None
    assert world.life.migrating.target == D3


def slow_and_quick(**options: Any) -> World:
    """d is three times slower than d2, with answers on both; d3 is nearly as slow as d."""
    world = World(balance=True, **options)
    world.report(D2, running=3, step_ms=20.0)
    world.report(D3, running=6, step_ms=50.0)
    world.now += 1.0
    return world


def test_an_answer_leaves_a_slow_worker_for_a_quick_one_if_that_is_wanted() -> None:
    for balance in (False, True):
        world = slow_and_quick()
        world.moves._balance = balance
        world.report(D, running=7, step_ms=60.0)
        assert (world.life.migrating is not None) is balance
    assert world.life.migrating is not None
    assert world.life.migrating.target == D2
    assert world.life.migrating.why == "its worker is slower than another"


@pytest.mark.parametrize(
    ("running", "step_ms", "emitted", "goes"),
    [
        (7, 60.0, 300, True),
        (7, 30.0, 300, False),  # not so much slower than d2 with one more
        (1, 60.0, 300, False),  # it is alone: its worker is slow for another reason
        (7, 60.0, 10, False),  # hardly begun, and nobody knows how long answers are
    ],
)
def test_a_move_that_only_makes_an_answer_quicker_must_win_much(
    running: int, step_ms: float, emitted: int, goes: bool
) -> None:
    world = slow_and_quick(emitted=emitted)
    world.report(D, running=running, step_ms=step_ms)
    assert (world.life.migrating is not None) is goes


def test_an_idle_worker_is_taken_for_a_quick_one_whatever_it_measured_last() -> None:
    world = World(balance=True, others=(D2,))
    world.report(D2, running=0, step_ms=80.0)
    world.now += 1.0
    world.report(D, running=4, step_ms=60.0)
    assert world.life.migrating is not None


def test_an_answer_that_left_a_slow_worker_does_not_go_back_when_that_is_the_quick_one() -> None:
    world = World(balance=True, others=(D2,))
    world.report(D2, running=3, step_ms=20.0)
    world.now += 1.0
    world.report(D, running=7, step_ms=60.0)
    leg = max(world.story.open_legs)
    world.by_leg[leg] = world.live
    world.cluster.dispatched(D2, leg, Promise(0, 1, 1, 0, None))
    world.life.on_adopted(leg, f"r/{leg}", 1.0, 1.0, world.now)
    world.life.on_end(1, None, 0, world.now)
    world.story.new()
    for _ in range(40):
        world.pass_s(1.0)
        world.report(D, running=2, step_ms=20.0)
        assert world.report(D2, running=9, step_ms=90.0) == []
