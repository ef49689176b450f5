"""An operator's commands: what they refuse, what they do, and what they wait for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from router.breakdown import Migration
from router.errors import Code, RequestRefused
from router.operating.operator import DrainProgress, Operator
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.policy import WorkerKey
from router.record.scaled import Scaled, ScalingLog, Sized


class Room:
    """A cluster, its worker's ends of the streams, and what runs."""

    def __init__(self, *names: str) -> None:
        self.cluster = Cluster()
        self.told: list[tuple[str, str]] = []
        self.lives: dict[WorkerKey, list[Any]] = {}
        self.why_not = ""
        self.answers: Callable[[WorkerKey, Role], None] = self.says
        self.changes = itertools.count(1)
        for name in names:
            role = {"p": Role.PREFILL, "d": Role.DECODE, "s": Role.STANDBY}[name[0]]
            key = WorkerKey(name, 1)
            self.cluster.registered(WorkerInfo(key, role, "a:1", "m", "kv", 32, 1, 9, 99, 999), 0.0, leaving=False)
            self.cluster.connected(key, 0.0)
        moves: Any = SimpleNamespace(
            running_on=lambda entry: self.lives.get(entry.key, []),
            find=lambda request_id: next(
                (one for lives in self.lives.values() for one in lives if one.life.request.request_id == request_id),
                None,
            ),
            request_ids=lambda: [one.life.request.request_id for lives in self.lives.values() for one in lives],
            move=self._move,
        )
        self.scaling = ScalingLog()
        self.operator = Operator(self.cluster, moves, self.tell, asyncio.get_running_loop().time, self.scaling)

    def tell(self, key: WorkerKey, role: Role) -> None:
        self.told.append((key.worker_id, role.value))
        self.answers(key, role)

    def says(self, key: WorkerKey, role: Role) -> None:
        self.cluster.said_role(key, role, next(self.changes))

    def runs(self, request_id: str, where: str) -> Any:
        life = SimpleNamespace(
            request=SimpleNamespace(key=request_id, request_id=request_id),
            breakdown=SimpleNamespace(migrations=[]),
            migrating=None,
            over=False,
        )
        self.lives.setdefault(WorkerKey(where, 1), []).append(SimpleNamespace(life=life))
        return life

    def _move(self, live: Any, target: WorkerKey) -> str:
        if not self.why_not:
            migration = Migration(WorkerKey("d1", 1), target, "asked for", 0.0)
            live.life.breakdown.migrations.append(migration)
            migration.outcome, migration.pause_s = "done", 0.02
        return self.why_not

    def roles(self) -> dict[str, str]:
        return {e.key.worker_id: e.role.value for e in self.cluster.workers.values()}


async def refused(call: Any) -> tuple[Code, str]:
    with pytest.raises(RequestRefused) as error:
        await call
    return error.value.failure.code, error.value.failure.message


async def test_a_switch_ends_when_the_worker_has_said_so() -> None:
    room = Room("p1", "d1", "d2")
    switched, _ = await room.operator.switch("d1", Role.PREFILL)
    assert (switched.before, switched.role) == (Role.DECODE, Role.PREFILL)
    assert room.roles() == {"p1": "prefill", "d1": "prefill", "d2": "decode"}
    code, message = await refused(room.operator.switch("d2", Role.STANDBY))
    assert code is Code.FAILED_PRECONDITION
    assert "d2 is the last decode worker" in message
    await room.operator.switch("d2", Role.STANDBY, force=True)
    assert room.told == [("d1", "prefill"), ("d2", "standby")]


async def test_unknown_and_absent_workers_are_named() -> None:
    room = Room("p1", "d1", "d2")
    assert await refused(room.operator.switch("x", Role.DECODE)) == (
        Code.NOT_FOUND,
        "no worker 'x'; there are: p1, d1, d2",
    )
    room.cluster.draining(WorkerKey("d1", 1))
    code, message = await refused(room.operator.switch("d1", Role.PREFILL))
    assert (code, "it leaves" in message) == (Code.FAILED_PRECONDITION, True)
    assert not room.told


async def test_two_commands_at_once_do_not_empty_a_role() -> None:
    room = Room("p1", "d1", "d2")
    room.answers = lambda key, role: None
    first = asyncio.create_task(room.operator.switch("d1", Role.PREFILL))
    await asyncio.sleep(0)
    code, _ = await refused(room.operator.switch("d2", Role.PREFILL))
    assert code is Code.FAILED_PRECONDITION
    room.says(WorkerKey("d1", 1), Role.PREFILL)
    await first
    assert room.roles() == {"p1": "prefill", "d1": "prefill", "d2": "decode"}


async def test_a_worker_that_is_lost_meanwhile_ends_the_command() -> None:
    room = Room("p1", "d1", "d2")
    room.answers = lambda key, role: room.cluster.lost(key) and None
    code, message = await refused(room.operator.switch("d1", Role.PREFILL))
    assert code is Code.UNAVAILABLE
    assert "d1 was lost" in message


async def test_a_drain_tells_what_is_left_until_nothing_is() -> None:
    room = Room("p1", "d1", "d2")
    key = WorkerKey("d1", 1)
    moved, ended = room.runs("long", "d1"), room.runs("short", "d1")
    told: list[DrainProgress] = []
    async for said in room.operator.drain("d1", interval_s=0.02):
        told.append(said)
        if len(told) == 1:
            assert (said.left, said.migrated, said.ended, said.done) == (2, 0, 0, False)
            moved.breakdown.migrations.append(Migration(key, WorkerKey("d2", 1), "x", 0.0, outcome="done"))
            ended.over = True
            room.lives.clear()
    assert told[-1].done
    assert (told[-1].left, told[-1].migrated, told[-1].ended) == (0, 1, 1)
    assert room.roles()["d1"] == "standby"


async def test_a_drain_has_an_end_that_names_what_is_left() -> None:
    room = Room("p1", "d1", "d2")
    room.runs("long", "d1")
    with pytest.raises(RequestRefused, match="1 answers are left on d1"):
        async for _ in room.operator.drain("d1", timeout_s=0.05, interval_s=0.02):
            pass


async def test_an_answer_moves_by_hand() -> None:
    room = Room("p1", "d1", "d2")
    room.runs("r1", "d1")
    code, message = await refused(room.operator.migrate("nope", "d2"))
    assert (code, message) == (Code.NOT_FOUND, "no request 'nope' runs on a worker; those that do: r1")
    assert (await refused(room.operator.migrate("r1", "nope")))[0] is Code.NOT_FOUND
    room.why_not = "p1 does not decode, or is not ready"
    code, message = await refused(room.operator.migrate("r1", "p1"))
    assert code is Code.FAILED_PRECONDITION
    assert "r1: p1 does not decode" in message
    room.why_not = ""
    migration = await room.operator.migrate("r1", "d2")
    assert (migration.outcome, migration.pause_s) == ("done", 0.02)


async def test_counts_are_reached_or_nothing_happens() -> None:
    room = Room("p1", "d1", "d2", "s1")
    would, _ = await room.operator.scale({Role.PREFILL: 2}, dry_run=True)
    assert [s.key.worker_id for s in would] == ["s1"]
    for wanted in ({Role.PREFILL: 9}, {Role.DECODE: 0}):
        code, _ = await refused(room.operator.scale(wanted))
        assert code is Code.FAILED_PRECONDITION
    assert not room.told
    await room.operator.scale({Role.PREFILL: 3, Role.DECODE: 1})
    assert sorted(room.roles().values()) == ["decode", "prefill", "prefill", "prefill"]
    assert room.operator.counts() == {Role.PREFILL: 3, Role.DECODE: 1, Role.STANDBY: 0}
    await room.operator.scale({Role.DECODE: 0}, force=True)
    assert room.operator.counts() == {Role.PREFILL: 3, Role.DECODE: 0, Role.STANDBY: 1}


def told(at: float, *, dry_run: bool = False) -> Scaled:
    counts = Sized(1, 1, 0)
    return Scaled(at, "the scaler", 1, 5.0, "enough", "", dry_run, False, counts, counts, 2.0, 4.0, None)


async def test_more_workers_than_are_ready_are_asked_of_whoever_starts_them() -> None:
    """Of one that acts and has spoken lately: who only says what it would do starts nobody."""
    room = Room("p1", "d1")
    clock = asyncio.get_running_loop().time
    scaling, operator = room.scaling, room.operator
    scaling.take(told(at=clock(), dry_run=True))
    scaling.take(told(at=clock() - 60.0))
    assert (await refused(operator.scale({Role.DECODE: 3})))[0] is Code.FAILED_PRECONDITION
    scaling.take(told(at=clock()))
    assert await operator.scale({Role.DECODE: 3}, dry_run=True) == ([], "the scaler")
    assert scaling.wish(clock()) is None
    assert await operator.scale({Role.DECODE: 3}) == ([], "the scaler")
    wish = scaling.wish(clock())
    assert wish is not None
    assert (wish.number, wish.prefill, wish.decode) == (1, None, 3)
    assert not room.told
    await operator.scale({Role.PREFILL: 2, Role.DECODE: 3})
    assert scaling.wish(clock()).number == 2  # type: ignore[union-attr]
    assert scaling.wish(clock() + 1e4) is None
