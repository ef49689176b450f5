"""Which workers switch so that so many have each role."""

from __future__ import annotations

import random

import pytest

from router.errors import Code, Failure
from router.operating.roles import Standing, Switch, last_of_its_role, plan
from router.placement.cluster import Role
from router.placement.policy import WorkerKey

P, D, S = Role.PREFILL, Role.DECODE, Role.STANDBY


def standing(text: str) -> list[Standing]:
    """ "p1 d2:30" is a prefill worker, and a decode worker with 30 to do."""
    workers = []
    for word in text.split():
        name, _, busy = word.partition(":")
        workers.append(Standing(WorkerKey(name, 1), {"p": P, "d": D, "s": S}[name[0]], float(busy or 0)))
    return workers


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        ("p1 d1", {P: 1, D: 1}, ""),
        ("p1 d1 d2:50 d3:10", {P: 2, D: 2}, "d1>prefill"),
        ("p1 d2:50 d3:10", {P: 2, D: 1}, "d3>prefill"),
        ("p1 p2 d1 s1", {P: 1, D: 3}, "s1>decode p1>decode"),
        ("p1 d1 s1 s2", {D: 2}, "s1>decode"),
        ("p1 p2 p3 d1", {P: 1}, "p1>standby p2>standby"),
        ("p1 p2 d1:9 d2", {P: 1, D: 1}, "d2>standby p1>standby"),
        ("p1 d1", {P: 0}, "p1>standby"),
        ("", {}, ""),
    ],
)
def test_as_few_switches_as_it_takes(there: str, wanted: dict[Role, int], expected: str) -> None:
    switches = plan(standing(there), wanted)
    assert isinstance(switches, list)
    assert sorted(f"{s.key.worker_id}>{s.role.value}" for s in switches) == sorted(expected.split())


def test_more_than_there_are_is_refused_with_what_would_help() -> None:
    refused = plan(standing("p1 d1 s1"), {P: 2, D: 3})
    assert isinstance(refused, Failure)
    assert refused.code is Code.FAILED_PRECONDITION
    assert "needs 5 workers and 3 are ready (1 prefill, 1 decode, 1 standby); start 2 more" in refused.message


def test_whatever_is_there_the_counts_are_reached_and_no_role_is_empty_on_the_way() -> None:
    rng = random.Random(3)
    for _ in range(500):
        workers = [Standing(WorkerKey(f"w{i}", 1), rng.choice(list(Role)), rng.random()) for i in range(8)]
        wanted = {P: rng.randrange(1, 4), D: rng.randrange(1, 5)}
        switches = plan(workers, wanted)
        assert isinstance(switches, list)
        roles = {w.key: w.role for w in workers}
        began = {role: list(roles.values()).count(role) for role in Role}
        for s in switches:
            assert roles[s.key] is s.before
            roles[s.key] = s.role
            now = list(roles.values())
            assert all(now.count(role) >= 1 for role in (P, D) if began[role])
        assert all(list(roles.values()).count(role) == count for role, count in wanted.items())
        least = sum(max(0, wanted[r] - began[r]) for r in (P, D))
        most = least + sum(max(0, began[r] - wanted[r]) for r in (P, D))
        assert max(least, most - least) <= len(switches) <= most
        assert len({s.key for s in switches}) == len(switches)


def test_the_last_of_a_role_stays_unless_forced() -> None:
    key = WorkerKey("d1", 1)
    assert last_of_its_role(key, D, D, 0) is None
    assert last_of_its_role(key, S, D, 0) is None
    assert last_of_its_role(key, D, S, 1) is None
    refused = last_of_its_role(key, D, P, 0)
    assert refused is not None
    assert "d1 is the last decode worker" in refused.message
    assert "--force" in refused.message


def test_who_stands_by_is_filled_in_before_anybody_leaves() -> None:
    switches = plan(standing("p1 p2 p3 d1 s1"), {P: 1, D: 3})
    assert switches == [
        Switch(WorkerKey("s1", 1), S, D),
        Switch(WorkerKey("p1", 1), P, D),
        Switch(WorkerKey("p2", 1), P, S),
    ] or switches == [Switch(WorkerKey("p1", 1), P, D), Switch(WorkerKey("p2", 1), P, D)]
