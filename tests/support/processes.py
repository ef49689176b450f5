"""A cluster of real processes without Ray: one router, any number of workers, each killable."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    role_overrides: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port, self.internal_port = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    # Life.

    def start(self, timeout_s: float = 90.0) -> Cluster:
        self.spawn("router", self._router_config())
        for role, count in (("prefill", self.prefill), ("decode", self.decode)):
            for i in range(count):
                self.start_worker(role, f"{role}-{i}")
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self.generate = generate_pb2_grpc.GenerateServiceStub(self.channel)
        self.wait_ready(self.prefill, self.decode, timeout_s)
        return self

    def start_worker(self, role: str, worker_id: str) -> None:
        self.spawn(f"{role}_worker", self._worker_config(role, worker_id), name=worker_id)

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM to all, workers first; whoever does not leave in time is killed and reported."""
        if hasattr(self, "channel"):
            self.channel.close()
        names = sorted(self.processes, key=lambda n: n == "router")
        for name in names:
            self.processes[name].send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        stuck = []
        for name in names:
            try:
                self.processes[name].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.processes[name].kill()
                self.processes[name].wait()
                stuck.append(name)
        assert not stuck, f"did not leave on SIGTERM within {timeout_s} s: {stuck}\n{self.logs()}"

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def spawn(self, module: str, config: Mapping[str, Any], name: str = "") -> None:
        name = name or module
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(config)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(path)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    # Looks.

    def cluster(self) -> cluster_pb2.Cluster:
        stub = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        return stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5).cluster

    def serving(self) -> bool:
        try:
            answer = health_pb2_grpc.HealthStub(self.channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=2
            )
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

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

    def wait_until(self, condition: Any, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}\n{self.logs()}"
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
                for w in cluster.workers
                if w.state == cluster_pb2.WORKER_STATE_READY
            )

        try:
            self.wait_until(empty, timeout_s, "an empty cluster")
        except AssertionError as error:
            raise AssertionError(f"{error}\nleft: {self.cluster()}") from None

    def logs(self, tail: int = 3000) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-tail:]}"
            for path in sorted(self.directory.glob("*.log"))
        )

    # Configurations.

    def _router_config(self) -> dict[str, Any]:
        return {
            "router": {
                "model": str(self.model),
                "grpc_port": self.port,
                "internal_port": self.internal_port,
                **self.router,
            }
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
                "router_addresses": [f"127.0.0.1:{self.internal_port}"],
                **self.worker,
                **override.get("worker", {}),
            },
        }
