"""`diptych up` on Ray loses replica processes under load, routers too: answers go on, and Serve brings them back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from diptych.client import Client, RequestFailed
from diptych.v1 import admin_pb2, admin_pb2_grpc, cluster_pb2, cluster_pb2_grpc, generate_pb2

from tests.support.process_tree import descendants
from tests.support.processes import free_port
from tests.support.prompts import reference_greedy, tokens_of

ROOT = Path(__file__).resolve().parents[2]
DIPTYCH = str(Path(sys.executable).parent / "diptych")
ROLES = {"DecodeWorker": cluster_pb2.ROLE_DECODE, "PrefillWorker": cluster_pb2.ROLE_PREFILL}
SETTINGS = {
    "engine": {"num_blocks": 80, "dtype": "float32", "threads": 1},
    "transport": {"ucx_net_devices": "lo", "digest": True},
    "router": {"itl_target_ms": 20.0},
    "telemetry": {"metrics_port": 0},
    "decode": {"replicas": 2},
    "prefill": {"replicas": 1},
}


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - begun


class Clients:
    """Ask the same questions for ever, each thread of all routers; every answer is compared, every error kept."""

    def __init__(self, routers: list[str], questions: list[tuple[Any, list[int]]]) -> None:
        self._routers = routers
        self._questions = questions
        self._stopping = threading.Event()
        self.complete, self.moved, self.sent_on = 0, 0, 0
        self.wrong: list[str] = []
        self.errors: list[str] = []
        count = 3 if questions else 0
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        count = 0
        with Client(self._routers) as client:
            while not self._stopping.is_set():
                question, expected = self._questions[(count + number) % len(self._questions)]
                count += 1
                request = generate_pb2.GenerateRequest()
                request.CopyFrom(question)
                request.cache_salt = f"{number}/{count}"  # nothing is answered from a cache
                try:
                    answer = client.generate(request, timeout_s=40)
                except RequestFailed as error:
                    self.errors.append(str(error))
                    time.sleep(0.5)
                    continue
                self.complete += 1
                self.moved += bool(answer.recoveries)
                self.sent_on += bool(answer.retries)
                if answer.token_ids != expected:
                    self.wrong.append(f"{answer.token_ids} where {expected} was due")

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()  # before the cluster is, whatever has failed

    def last(self) -> None:
        """Nothing is asked any more."""
        self._stopping.set()

    def stop(self) -> bool:
        self.last()
        for thread in self._threads:
            thread.join(45)
        return not any(t.is_alive() for t in self._threads)


@contextlib.contextmanager
def on_ray(
    directory: Path, model: Path, routers: int = 1, given: dict[str, Any] = SETTINGS
) -> Iterator[tuple[int, list[str]]]:
    """`diptych up --ray`: its process, and where its routers are. It must leave by itself in the end."""
    path = directory / "cluster.yaml"
    settings = {**given, "router": {**given["router"], "replicas": routers}, "model": str(model)}
    path.write_text(yaml.safe_dump(settings))
    command = [DIPTYCH, "up", "--config", str(path), "--grpc-port", str(free_port())]
    command += ["--internal-port", str(free_port()), "--http-port", str(free_port())]
    with (directory / "err").open("w") as errors:
        up = subprocess.Popen([*command, "--ray"], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert up.stdout is not None
    try:
        line = up.stdout.readline()
        assert line.startswith("ready: "), (line, (directory / "err").read_text()[-3000:])
        addresses = line.split()[1].split(",")
        assert len(addresses) == routers
        yield up.pid, addresses
    finally:
        up.send_signal(signal.SIGTERM)
        code = up.wait(60)
        up.stdout.close()
    assert code == 0, (directory / "err").read_text()[-3000:]


def questions(tokenizer: Any, model: Path, *, max_tokens: int, lengths: tuple[int, ...]) -> list[tuple[Any, list[int]]]:
    """By turns computed where they are answered, and as the router sees fit; with the right answers."""
    found = []
    for number, length in enumerate(lengths):
        prompt = tokens_of(tokenizer, length, seed=length)
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=prompt),
            sampling=generate_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            placement=(generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_AUTO)[number % 2],
        )
        found.append((request, reference_greedy(str(model), prompt, max_tokens)))
    return found


def pinned(asked: tuple[Any, list[int]]) -> tuple[Any, list[int]]:
    request = generate_pb2.GenerateRequest()
    request.CopyFrom(asked[0])
    request.placement = generate_pb2.PLACEMENT_SPLIT
    return request, asked[1]


class Seen:
    """What a router shows of its workers."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = cluster_pb2_grpc.ClusterServiceStub(channel)

    def knows_all(self) -> bool:
        """It answers, and every worker has registered with it."""
        with contextlib.suppress(grpc.RpcError):
            return [w.state for w in self.state().workers] == [cluster_pb2.WORKER_STATE_READY] * 3
        return False

    def state(self) -> Any:
        return self._stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5).cluster

    def ready(self, role: int | None = None) -> set[tuple[str, int]]:
        """With this role; None: with any."""
        ready = [w for w in self.state().workers if w.state == cluster_pb2.WORKER_STATE_READY]
        found = [w for w in ready if role is None or w.role == role]
        return {(w.worker_id, w.epoch) for w in found}

    def is_empty(self) -> bool:
        state = self.state()
        ready = [w for w in state.workers if w.state == cluster_pb2.WORKER_STATE_READY]
        return state.router.live_requests == 0 and all(
            w.load.free_blocks == w.load.total_blocks and not w.load.leased_blocks and not w.load.quarantined_blocks
            for w in ready
        )


def pid_of(worker_id: str) -> int:
    return int(worker_id.rsplit("-", 1)[1])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_replicas_that_are_killed_come_back(tmp_path: Path, model_path: Path, tokenizer: Any) -> None:
    asked = questions(tokenizer, model_path, max_tokens=12, lengths=(40, 500))
    split = [pinned(asked[1])]
    with on_ray(tmp_path, model_path, routers=2) as (up, addresses), contextlib.ExitStack() as stack:
        both = [Seen(stack.enter_context(grpc.insecure_channel(address))) for address in addresses]
        seen = both[0]

        def at_work(role: int, pids: set[int]) -> int:
            """The process of a worker that has requests now."""
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                for w in seen.state().workers:
                    if w.role == role and w.dispatched_requests and pid_of(w.worker_id) in pids:
                        return pid_of(w.worker_id)
                time.sleep(0.01)
            raise AssertionError("no request ever ran on such a worker")

        with Clients(addresses, asked) as clients:
            for name, role in ROLES.items():
                complete = clients.complete
                until(lambda: clients.complete >= complete + 3, 40, "answers before the kill")  # noqa: B023
                replicas = {p.pid: c for p, c in descendants(up).items() if c.startswith("ray::") and name in c}
                niceness = {os.getpriority(os.PRIO_PROCESS, pid) for pid in (up, *replicas)}
                assert len(niceness) == 1, "Ray's own 15 is not ours"
                # A busy machine may leave the router without news of a worker for a moment.
                until(lambda: len(seen.ready(role)) == len(replicas), 40, f"as many {name}s ready as run")  # noqa: B023
                before = seen.ready(role)
                # Whether a prompt is split is the router's choice, and at any time it may choose to split none.
                with Clients(addresses[:1], split if role == cluster_pb2.ROLE_PREFILL else []) as more:
                    pid = at_work(role, set(replicas))
                    more.last()
                    os.kill(pid, signal.SIGKILL)
                assert not more.wrong
                assert not more.errors
                took = wait_back(seen, role, before)
                print(f"{name}: replica back after {took:.1f} s", flush=True)
                assert clients.complete > complete, "answers went on meanwhile"
            routers = [p.pid for p, c in descendants(up).items() if c.startswith("ray::") and ":Router" in c]
            assert len(routers) == 2
            for pid in routers:
                complete, sent_on = clients.complete, clients.sent_on
                os.kill(pid, signal.SIGKILL)
                until(lambda: clients.complete >= complete + 3, 40, "answers of the other router")  # noqa: B023
                took = until(lambda: all(one.knows_all() for one in both), 90, "the router back, with all workers")
                print(f"router back {took:.1f} s later, {clients.sent_on - sent_on} requests sent on", flush=True)
            assert clients.stop(), "a client hangs"
            print(f"{clients.complete} complete, {clients.moved} moved, errors {clients.errors}")
            assert not clients.wrong
            assert not clients.errors, "a worker of each kind, or another way, was there all the time"
            assert clients.moved, "no request was on a replica that was killed: the test shows nothing"
            for one in both:
                until(one.is_empty, 20, "nothing left")


def wait_back(seen: Seen, role: int | None, before: set[tuple[str, int]]) -> float:
    def back() -> bool:
        now = seen.ready(role)
        return len(now - before) == 1 and len(now) == len(before)

    return until(back, 90, "the replica is back")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_workers_drain_switch_and_die_under_long_answers(tmp_path: Path, model_path: Path, tokenizer: Any) -> None:
    """By an operator's commands, and by kill -9 of who gives a running answer away: no answer fails, none is wrong."""
    asked = questions(tokenizer, model_path, max_tokens=300, lengths=(40, 300))
    decode, prefill = ROLES["DecodeWorker"], ROLES["PrefillWorker"]
    with on_ray(tmp_path, model_path) as (_, addresses), grpc.insecure_channel(addresses[0]) as channel:
        seen, admin = Seen(channel), admin_pb2_grpc.AdminServiceStub(channel)
        until(lambda: len(seen.ready(decode)) == 2, 40, "both decode workers")
        migrated: list[str] = []

        def busiest() -> str:
            found = [w for w in seen.state().workers if w.role == decode]
            return max(found, key=lambda w: w.dispatched_requests).worker_id

        def running_on(worker: str) -> list[str]:
            recent = [r for r in seen.state().recent if r.outcome == "running" and r.completion_tokens > 3]
            return [r.request_id for r in recent if r.route.decode_worker == worker]

        def migrate(request_id: str, target: str) -> None:
            request = admin_pb2.MigrateRequest(request_id=request_id, target_worker=target)
            with contextlib.suppress(grpc.RpcError):  # it ended first
                migrated.append(admin.Migrate(request, timeout=60).migration.outcome)

        with Clients(addresses, asked) as clients:
            for number in range(4):
                until(lambda: running_on(busiest()) != [], 40, "answers that run")
                worker = busiest()
                if number % 2:
                    to = (prefill, cluster_pb2.ROLE_STANDBY)[number // 2]
                    admin.SwitchRole(admin_pb2.SwitchRoleRequest(worker_id=worker, role=to), timeout=20)
                else:
                    (*_, last) = admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker_id=worker), timeout=60)
                    assert last.done
                    print(f"drained after {last.elapsed_ms:.0f} ms: {last.migrated} migrated, {last.ended} ended")
                admin.Scale(admin_pb2.ScaleRequest(prefill=1, decode=2), timeout=20)
                assert len(seen.ready(decode)) == 2
            until(lambda: running_on(busiest()) != [], 40, "answers that run")
            source, before = busiest(), seen.ready()
            target = next(name for name, _ in seen.ready(decode) if name != source)
            movers = [threading.Thread(target=migrate, args=(one, target)) for one in running_on(source)]
            for mover in movers:
                mover.start()
            os.kill(pid_of(source), signal.SIGKILL)
            took = wait_back(seen, None, before)  # with the role that it was deployed with
            admin.Scale(admin_pb2.ScaleRequest(prefill=1, decode=2), timeout=20)
            for mover in movers:
                mover.join(60)
            complete = clients.complete
            until(lambda: clients.complete > complete, 120, "answers after the kill")
            assert clients.stop(), "a client hangs"
            shown = seen.state().migrations
            print(f"{clients.complete} complete, {clients.moved} recovered; replica back after {took:.1f} s")
            print(f"migrations: {[(m.reason, m.outcome) for m in shown]}, by hand {migrated}")
            assert not clients.wrong
            assert not clients.errors
            assert any(m.outcome == "done" for m in shown)
            until(seen.is_empty, 20, "nothing left")
