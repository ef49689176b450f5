"""A cluster of real processes without Ray: one router, any number of workers, each killable."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, generate_pb2_grpc

from deploy.access import Access
from deploy.clients import health_over
from deploy.processes import Processes
from settings.addresses import join
from tests.support.zygote import ForkedProcesses

EMPTY = generate_pb2.SamplingParams()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Reply:
    """One answer, asserted to be well formed: started, contiguous positions, finished."""

    started: Any = None
    finished: Any = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: Any = None
    arrival_s: list[float] = field(default_factory=list)

    @property
    def split(self) -> bool:
        return self.started.route.placement == generate_pb2.PLACEMENT_SPLIT

    def take(self, response: generate_pb2.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "started":
                assert self.started is None
                self.started = response.started
            case "tokens":
                assert self.started is not None
                assert self.finished is None
                if response.tokens.token_ids:
                    assert response.tokens.position == len(self.token_ids)
                self.token_ids += response.tokens.token_ids
                self.arrival_s += [time.monotonic()] * len(response.tokens.token_ids)
                self.text += response.tokens.text
                self.logprobs += response.tokens.logprobs
            case "prompt_logprobs":
                assert self.prompt_logprobs is None
                assert not self.token_ids
                self.prompt_logprobs = response.prompt_logprobs
            case "finished":
                assert self.finished is None
                self.finished = response.finished


@dataclass
class Cluster:
    """Start with `start()`, always end with `stop()`. Logs are files in `directory`."""

    directory: Path
    model: Path
    prefill: int = 1
    decode: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    transport: Mapping[str, Any] = field(default_factory=dict)
    worker: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    security: Mapping[str, Any] = field(default_factory=dict)
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    access: Access = field(default_factory=Access)
    role_overrides: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    host: str = "127.0.0.1"
    environment: Mapping[str, str] = field(default_factory=dict)
    forked: bool = False  # from a process that has imported torch (tests/support/zygote.py); else as users begin them
    pace: str = ""  # of the workers' steps, for a model that would be too quick (tests/support/paced_worker.py)
    worker_module: str = ""  # in place of those of the roles

    def __post_init__(self) -> None:
        self.port, self.internal_port, self.http_port = free_port(), free_port(), free_port()
        self.target = join(self.host, self.port)
        pace = {"PACE": self.pace} if self.pace else {}
        kind = ForkedProcesses if self.forked and Path("/proc/self/task").exists() else Processes
        self.processes: Processes = kind(self.directory, {"OMP_NUM_THREADS": "1", **pace, **self.environment})

    # Life.

    def start(self, timeout_s: float = 90.0) -> Cluster:
        self.processes.spawn("router", "router", self._router_config())
        for role, count in (("prefill", self.prefill), ("decode", self.decode)):
            for i in range(count):
                self.start_worker(role, f"{role}-{i}")
        self.channel = self.access.channel(self.target, [("grpc.max_receive_message_length", 64 << 20)])
        self.stub = generate_pb2_grpc.GenerateServiceStub(self.channel)
        self.wait_ready(self.prefill, self.decode, timeout_s)
        return self

    def start_worker(self, role: str, worker_id: str) -> None:
        module = self.worker_module or ("tests.support.paced_worker" if self.pace else f"{role}_worker")
        self.processes.spawn(worker_id, module, self._worker_config(role, worker_id))

    def stop(self, timeout_s: float = 30.0) -> None:
        """SIGTERM to all; whoever does not leave in time is reported."""
        if hasattr(self, "channel"):
            self.channel.close()
        stuck = self.processes.stop(timeout_s)
        assert not stuck, f"did not leave on SIGTERM within {timeout_s} s: {stuck}\n{self.logs()}"

    def kill(self, name: str) -> None:
        self.processes.kill(name)

    def terminate(self, name: str) -> None:
        self.processes.running[name].send_signal(signal.SIGTERM)

    # Requests.

    def request(
        self,
        prompt: Sequence[int] | str,
        sampling: generate_pb2.SamplingParams = EMPTY,
        placement: int = generate_pb2.PLACEMENT_AUTO,
        **fields: Any,
    ) -> generate_pb2.GenerateRequest:
        request = generate_pb2.GenerateRequest(sampling=sampling, placement=placement, **fields)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        return request

    def stream(self, request: generate_pb2.GenerateRequest, timeout_s: float = 60.0) -> Any:
        return self.stub.Generate(request, timeout=timeout_s)

    def ask(self, request: generate_pb2.GenerateRequest, timeout_s: float = 60.0) -> Reply:
        reply = Reply()
        for response in self.stream(request, timeout_s):
            reply.take(response)
        assert reply.finished is not None
        assert reply.finished.usage.completion_tokens == len(reply.token_ids)
        return reply

    def session(self, requests: Iterator[generate_pb2.SessionRequest], timeout_s: float = 60.0) -> Any:
        return self.stub.Session(requests, timeout=timeout_s)

    # Looks.

    def cluster(self) -> cluster_pb2.Cluster:
        stub = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        return stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5).cluster

    def serving(self) -> bool:
        return health_over(self.channel, 2.0) == "SERVING"

    def ready(self, role: int) -> list[cluster_pb2.Worker]:
        return [w for w in self.cluster().workers if w.role == role and w.state == cluster_pb2.WORKER_STATE_READY]

    def wait_ready(self, prefill: int, decode: int, timeout_s: float = 60.0) -> None:
        def all_there() -> bool:
            if decode and not self.serving():
                return False
            try:
                return (
                    len(self.ready(cluster_pb2.ROLE_PREFILL)) == prefill
                    and len(self.ready(cluster_pb2.ROLE_DECODE)) == decode
                )
            except grpc.RpcError:
                return False

        self.wait_until(all_there, timeout_s, f"{prefill} prefill and {decode} decode workers ready")

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not self.processes.ended(), f"{self.processes.ended()}\n{self.logs()}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def assert_nothing_left(self, timeout_s: float = 15.0) -> None:
        """No request, sequence, lease or quarantined block; every block is free again."""

        def empty() -> bool:
            cluster = self.cluster()
            return cluster.router.live_requests == 0 and all(
                not w.dispatched_requests
                and not w.load.running_sequences
                and not w.load.waiting_sequences
                and not w.load.active_leases
                and not w.load.leased_blocks
                and not w.load.quarantined_blocks
                and w.load.free_blocks == w.load.total_blocks
                and not w.load.blocks_in_use
                for w in cluster.workers
                if w.state == cluster_pb2.WORKER_STATE_READY
            )

        try:
            self.wait_until(empty, timeout_s, "an empty cluster")
        except AssertionError as error:
            raise AssertionError(f"{error}\nleft: {self.cluster()}") from None

    def logs(self) -> str:
        return self.processes.logs()

    # Configurations.

    def _router_config(self) -> dict[str, Any]:
        return {
            "router": {
                "model": str(self.model),
                "host": self.host,
                "internal_host": self.host,
                "grpc_port": self.port,
                "internal_port": self.internal_port,
                "http_port": self.http_port,
                **self.router,
            },
            "security": dict(self.security),
            "telemetry": dict(self.telemetry),
        }

    def _worker_config(self, role: str, worker_id: str) -> dict[str, Any]:
        override = self.role_overrides.get(role, {})
        return {
            "engine": {
                "model": str(self.model),
                "dtype": "float32",
                "threads": 1,
                **self.engine,
                **override.get("engine", {}),
            },
            "transport": {**self.transport, **override.get("transport", {})},
            "worker": {
                "worker_id": worker_id,
                "host": self.host,
                "router_addresses": [join(self.host, self.internal_port)],
                **self.worker,
                **override.get("worker", {}),
            },
            "security": dict(self.security),
            "telemetry": dict(self.telemetry),
        }
