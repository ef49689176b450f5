"""What Serve says of replicas and routers of workers, made one list; and who Serve would stop first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diptych.v1 import cluster_pb2

from deploy.fleet import Fleet, Member, Replica, Served, observed
from scaling.observation import Observation, Pool, Stage, WorkerSeen

ROLES = {
    "prefill": cluster_pb2.ROLE_PREFILL,
    "decode": cluster_pb2.ROLE_DECODE,
    "standby": cluster_pb2.ROLE_STANDBY,
}
READY, LEAVES = cluster_pb2.WORKER_STATE_READY, cluster_pb2.WORKER_STATE_DRAINING
LOST = cluster_pb2.WORKER_STATE_LOST


def replica(home: str, pid: int, state: Any = "running", **more: Any) -> Replica:
    given = {"pid": pid, "host": "10.0.0.1", "node": "n1", **more}
    return Replica(home, f"{home[0]}{pid}", state, **given)


def worker(
    name: str, role: str, state: int = READY, host: str = "10.0.0.1", live: int = 0, **load: int
) -> cluster_pb2.Worker:
    return cluster_pb2.Worker(
        worker_id=name,
        epoch=1,
        role=ROLES[role],  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        address=f"{host}:9",
        dispatched_requests=live,
        load=cluster_pb2.WorkerLoad(**load),  # type: ignore[arg-type]
    )


def cluster(*workers: cluster_pb2.Worker) -> cluster_pb2.Cluster:
    return cluster_pb2.Cluster(workers=workers)


def by_id(members: Sequence[Member]) -> dict[str, Member]:
    return {m.replica_id: m for m in members}


def test_a_worker_starts_works_and_leaves() -> None:
    fleet, targets = Fleet(), {"prefill": 0, "decode": 1}
    assert fleet.look(Served({"prefill": 0, "decode": 0}, ()), [cluster()], 0.0) == []

    (asked,) = fleet.look(Served(targets, ()), [cluster()], 1.0)
    assert (asked.stage, asked.role, asked.worker_id) == (Stage.STARTING, "decode", "")
    waits = Served(targets, (replica("decode", 0, "starting", placed=False),))
    assert fleet.look(waits, [cluster()], 2.0)[0].stage is Stage.UNSCHEDULABLE
    assert fleet.look(waits, [cluster()], 12.0)[0].age_s == 10.0
    starts = Served(targets, (replica("decode", 7, "starting"),))
    assert fleet.look(starts, [cluster()], 13.0)[0].stage is Stage.STARTING
    runs = Served(targets, (replica("decode", 7),))
    assert fleet.look(runs, [cluster()], 20.0)[0].stage is Stage.STARTING, "no router has it yet"
    (ready,) = fleet.look(runs, [cluster(worker("decode-host-7", "decode", live=1))], 22.0)
    assert (ready.stage, ready.worker_id, ready.empty) == (Stage.READY, "decode-host-7", False)
    assert ready.started_in_s == 9.0, "since its process was there"
    stops = Served({"prefill": 0, "decode": 0}, (replica("decode", 7, "stopping"),))
    (left,) = fleet.look(stops, [cluster(worker("decode-host-7", "decode", LEAVES))], 30.0)
    assert left.stage is Stage.DRAINING


def test_how_long_the_first_ones_took_was_not_seen() -> None:
    fleet = Fleet()
    fleet.look(Served({"decode": 1}, (replica("decode", 7, "starting"),)), [cluster()], 0.0)
    (ready,) = fleet.look(
        Served({"decode": 1}, (replica("decode", 7),)), [cluster(worker("decode-host-7", "decode"))], 5.0
    )
    assert ready.started_in_s == 0.0


def test_a_role_is_what_the_worker_says_and_a_home_where_it_was_started() -> None:
    served = Served({"prefill": 2}, (replica("prefill", 1), replica("prefill", 2)))
    seen = cluster(worker("prefill-host-1", "decode"), worker("prefill-host-2", "standby"))
    found = by_id(Fleet().look(served, [seen], 0.0))
    assert (found["p1"].home, found["p1"].role, found["p1"].stage) == ("prefill", "decode", Stage.READY)
    assert (found["p2"].role, found["p2"].stage) == ("standby", Stage.STANDBY)


def test_one_router_that_has_lost_a_worker_does_not_make_it_new() -> None:
    served = Served({"decode": 1}, (replica("decode", 7),))
    clusters = [cluster(worker("decode-h-7", "decode", LOST)), cluster(worker("decode-h-7", "decode", live=2))]
    (member,) = Fleet().look(served, clusters, 0.0)
    assert (member.stage, member.empty) == (Stage.READY, False)


def test_equal_process_ids_of_two_hosts_are_told_apart() -> None:
    served = Served(
        {"decode": 2}, (replica("decode", 7, host="a"), replace(replica("decode", 7, host="b"), replica_id="d8"))
    )
    seen = cluster(worker("decode-x-7", "decode", host="b", live=1), worker("decode-y-7", "decode", host="a"))
    found = by_id(Fleet().look(served, [seen], 0.0))
    assert (found["d7"].worker_id, found["d8"].worker_id) == ("decode-y-7", "decode-x-7")


def test_a_worker_that_serve_did_not_start_works_and_has_no_home() -> None:
    (member,) = Fleet().look(Served({"decode": 0}, ()), [cluster(worker("mine", "decode"))], 0.0)
    assert (member.home, member.stage) == ("", Stage.READY)


def test_serve_stops_first_what_is_not_running_then_the_newest_of_the_emptiest_node() -> None:
    replicas = (
        replica("decode", 1, node="head", started_s=9),
        replica("decode", 2, node="full", started_s=8),
        replica("decode", 3, node="bare", started_s=1),
        replica("decode", 4, node="bare", started_s=2),
        replica("decode", 5, "starting", node="bare"),
    )
    served = Served({"decode": 5}, replicas, {"head": 1, "full": 3, "bare": 2}, "head")
    members = sorted(Fleet().look(served, [cluster()], 0.0), key=lambda m: m.order)
    assert [m.replica_id for m in members] == ["d5", "d4", "d3", "d2", "d1"]
    fewer = Served({"decode": 3}, replicas, served.on_node, "head")
    gone = [m.replica_id for m in Fleet().look(fewer, [cluster()], 0.0) if m.stage is Stage.DRAINING]
    assert sorted(gone) == ["d4", "d5"], "they are as good as gone"


def test_the_policy_sees_who_works_as_the_routers_do_and_the_others_as_serve_does() -> None:
    seen = Observation(
        50.0,
        5.0,
        (
            WorkerSeen("p", Pool.PREFILL, Stage.READY, 30.0, backlog_tokens=9),
            WorkerSeen("d", Pool.DECODE, Stage.READY, 30.0),
        ),
    )
    members = [
        Member("p", 1, "prefill", "prefill", Stage.READY, started_in_s=7.0),
        Member("d", 1, "decode", "decode", Stage.DRAINING, age_s=2.0),
        Member("", 0, "decode", "decode", Stage.UNSCHEDULABLE, replica_id="r", age_s=40.0),
    ]
    workers = {w.worker_id: w for w in observed(seen, members, (1, 2)).workers}
    assert (workers["p"].backlog_tokens, workers["p"].started_in_s) == (9, 7.0)
    assert (workers["d"].stage, workers["d"].age_s) == (Stage.DRAINING, 2.0)
    assert (workers["r"].stage, workers["r"].age_s, workers["r"].pool) == (Stage.UNSCHEDULABLE, 40.0, Pool.DECODE)
    assert observed(seen, members, (1, 2)).decode_target == 2
