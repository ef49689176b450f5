"""`diptych up` on Ray loses replica processes under load: answers go on, and Serve brings the replicas back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, generate_pb2_grpc

from tests.support.process_tree import descendants
from tests.support.processes import Reply, free_port
from tests.support.prompts import reference_greedy, tokens_of

ROOT = Path(__file__).resolve().parents[2]
DIPTYCH = str(Path(sys.executable).parent / "diptych")
ROLES = {"DecodeWorker": cluster_pb2.ROLE_DECODE, "PrefillWorker": cluster_pb2.ROLE_PREFILL}
SETTINGS = {
    "engine": {"num_blocks": 80, "dtype": "float32", "threads": 1},
    "transport": {"ucx_net_devices": "lo", "digest": True},
    "router": {"itl_target_ms": 20.0},
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
    """Ask the same two questions for ever; every answer is compared, every error kept."""

    def __init__(self, channel: grpc.Channel, questions: list[tuple[Any, list[int]]]) -> None:
        self._stub = generate_pb2_grpc.GenerateServiceStub(channel)
        self._questions = questions
        self._stopping = threading.Event()
        self.complete, self.moved = 0, 0
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(3)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        count = 0
        while not self._stopping.is_set():
            question, expected = self._questions[(count + number) % len(self._questions)]
            count += 1
            request = generate_pb2.GenerateRequest()
            request.CopyFrom(question)
            request.cache_salt = f"{number}/{count}"  # nothing is answered from a cache
            reply = Reply()
            try:
                for response in self._stub.Generate(request, timeout=40):
                    reply.take(response)
            except grpc.RpcError as error:
                self.errors.append(f"{error.code().name} {error.details()}")  # type: ignore[attr-defined]
                time.sleep(0.5)
                continue
            self.complete += 1
            self.moved += bool(reply.finished.recoveries)
            if reply.token_ids != expected:
                self.wrong.append(f"{reply.token_ids} where {expected} was due")

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()  # before the channel is closed, whatever has failed

    def stop(self) -> bool:
        self._stopping.set()
        for thread in self._threads:
            thread.join(45)
        return not any(t.is_alive() for t in self._threads)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_replicas_that_are_killed_come_back(tmp_path: Path, model_path: Path, tokenizer: Any) -> None:
    port = free_port()
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "model": str(model_path)}))
    command = [DIPTYCH, "up", "--config", str(path), "--grpc-port", str(port), "--internal-port", str(free_port())]
    command += ["--http-port", str(free_port())]
    questions = []
    for length, placement in ((40, generate_pb2.PLACEMENT_LOCAL), (500, generate_pb2.PLACEMENT_AUTO)):
        prompt = tokens_of(tokenizer, length, seed=length)
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=prompt),
            sampling=generate_pb2.SamplingParams(max_tokens=12, ignore_eos=True),
            placement=placement,
        )
        questions.append((request, reference_greedy(str(model_path), prompt, 12)))
    with (tmp_path / "err").open("w") as errors:
        up = subprocess.Popen([*command, "--ray"], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert up.stdout is not None
    try:
        line = up.stdout.readline()
        assert line.startswith("ready: "), (line, (tmp_path / "err").read_text()[-3000:])
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
            cluster = cluster_pb2_grpc.ClusterServiceStub(channel)

            def ready(role: int) -> set[tuple[str, int]]:
                state = cluster.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5).cluster
                found = [w for w in state.workers if w.role == role and w.state == cluster_pb2.WORKER_STATE_READY]
                return {(w.worker_id, w.epoch) for w in found}

            def at_work(role: int, pids: set[int]) -> int:
                """The process of a worker that has requests now. Its id ends with the process id."""
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    state = cluster.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5).cluster
                    for w in state.workers:
                        pid = int(w.worker_id.rsplit("-", 1)[1])
                        if w.role == role and w.dispatched_requests and pid in pids:
                            return pid
                    time.sleep(0.01)
                raise AssertionError("no request ever ran on such a worker")

            clients = stack.enter_context(Clients(channel, questions))
            for name, role in ROLES.items():
                complete = clients.complete
                until(lambda: clients.complete >= complete + 3, 40, "answers before the kill")  # noqa: B023
                replicas = {p.pid: c for p, c in descendants(up.pid).items() if c.startswith("ray::") and name in c}
                # A busy machine may leave the router without news of a worker for a moment.
                until(lambda: len(ready(role)) == len(replicas), 40, f"as many {name}s ready as run")  # noqa: B023
                before = ready(role)
                os.kill(at_work(role, set(replicas)), signal.SIGKILL)
                killed = time.monotonic()
                complete = clients.complete
                until(lambda: len(ready(role) - before) == 1 and len(ready(role)) == len(before), 90, f"{name} back")  # noqa: B023
                print(f"{name}: replica back after {time.monotonic() - killed:.1f} s", flush=True)
                assert clients.complete > complete, "answers went on meanwhile"
            assert clients.stop(), "a client hangs"
            print(f"{clients.complete} complete, {clients.moved} moved, errors {clients.errors}")
            assert not clients.wrong
            assert not clients.errors, "a worker of each kind, or another way, was there all the time"
            assert clients.moved, "no request was on a replica that was killed: the test shows nothing"
            until(lambda: _empty(cluster), 20, "nothing left")
    finally:
        up.send_signal(signal.SIGTERM)
        code = up.wait(60)
        up.stdout.close()
    assert code == 0, (tmp_path / "err").read_text()[-3000:]


def _empty(cluster: Any) -> bool:
    state = cluster.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5).cluster
    ready = [w for w in state.workers if w.state == cluster_pb2.WORKER_STATE_READY]
    return state.router.live_requests == 0 and all(
        w.load.free_blocks == w.load.total_blocks and not w.load.leased_blocks and not w.load.quarantined_blocks
        for w in ready
    )
