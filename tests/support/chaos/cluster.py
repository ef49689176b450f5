"""A cluster of real processes with several routers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2_grpc

from tests.support.processes import Cluster, free_port

_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass
class ChaosCluster(Cluster):
    """Several routers, with which every worker registers. Single workers may be configured differently."""

    routers: int = 2
    by_worker: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ports = [(self.port, self.internal_port)] + [(free_port(), free_port()) for _ in range(self.routers - 1)]
        self.channels: list[grpc.Channel] = []
        self.spawned: list[tuple[str, int]] = []
        self._frozen: set[str] = set()

    @property
    def workers(self) -> list[str]:
        return [f"{role}-{i}" for role, n in (("prefill", self.prefill), ("decode", self.decode)) for i in range(n)]

    def start(self, timeout_s: float = 90.0) -> ChaosCluster:
        for i in range(self.routers):
            self.start_router(i)
        for worker in self.workers:
            self.start_worker(worker.split("-")[0], worker)
        self.channels = [grpc.insecure_channel(self.target_of(i), options=_CHANNEL) for i in range(self.routers)]
        self.channel = self.channels[0]
        self.stub = generate_pb2_grpc.GenerateServiceStub(self.channel)
        self.wait_whole(timeout_s)
        return self

    def target_of(self, router: int) -> str:
        return f"127.0.0.1:{self.ports[router][0]}"

    def start_router(self, i: int) -> None:
        public, internal = self.ports[i]
        config = self._router_config()
        config["router"] |= {"grpc_port": public, "http_port": None, "internal_port": internal}
        self._spawn(f"router-{i}", "router", config)

    def start_worker(self, role: str, worker_id: str, **transport: Any) -> None:
        config = self._worker_config(role, worker_id)
        config["worker"]["router_addresses"] = self.router_addresses()
        for section, values in self.by_worker.get(worker_id, {}).items():
            config[section] |= values
        config["transport"] |= transport
        self._spawn(worker_id, "tests.support.poisonable_worker", config)

    def router_addresses(self) -> list[str]:
        return [f"127.0.0.1:{internal}" for _, internal in self.ports]

    def start_again(self, name: str, **transport: Any) -> None:
        role, number = name.split("-")
        if role == "router":
            self.start_router(int(number))
        else:
            self.start_worker(role, name, **transport)

    def _spawn(self, name: str, module: str, config: dict[str, Any]) -> None:
        self.processes.spawn(name, module, config)
        self.spawned.append((name, self.processes.running[name].pid))

    def wait_dead(self, count: int, timeout_s: float = 20.0) -> list[str]:
        """Those that ended by themselves, when they are so many."""
        deadline = time.monotonic() + timeout_s
        while len(self.processes.ended()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(self.processes.ended())

    def freeze(self, name: str) -> None:
        self._frozen.add(name)
        self.processes.running[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes.running[name].send_signal(signal.SIGCONT)
        self._frozen.discard(name)

    def drain(self, name: str, timeout_s: float) -> None:
        """SIGTERM; it must leave by itself, with code 0."""
        process = self.processes.running[name]
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{name} did not leave within {timeout_s} s\n{self.logs()}"
            time.sleep(0.02)
        del self.processes.running[name]
        assert process.returncode == 0, f"{name} left with {process.returncode}\n{self.logs()}"

    def stop(self, timeout_s: float = 30.0) -> None:
        for name in list(self._frozen & self.processes.running.keys()):
            self.thaw(name)
        for channel in self.channels:
            channel.close()
        stuck = self.processes.stop(timeout_s, last="router-0")
        assert not stuck, f"did not leave on SIGTERM within {timeout_s} s: {stuck}\n{self.logs()}"

    # Looks.

    def seen_by(self, router: int) -> cluster_pb2.Cluster:
        stub = cluster_pb2_grpc.ClusterServiceStub(self.channels[router])
        return stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=3).cluster

    def epochs(self) -> dict[str, int]:
        """Of the workers that every router sees as ready; empty while a router does not answer."""
        seen: list[dict[str, int]] = []
        for i in range(self.routers):
            try:
                state = self.seen_by(i)
            except grpc.RpcError:
                return {}
            if not state.router.serving:
                return {}
            ready = [w for w in state.workers if w.state == cluster_pb2.WORKER_STATE_READY]
            seen.append({w.worker_id: w.epoch for w in ready})
        return {w: e for w, e in seen[0].items() if all(other.get(w) == e for other in seen)}

    def wait_whole(self, timeout_s: float = 60.0, later_than: Mapping[str, int] | None = None) -> None:
        """Every worker ready at every router; those named as an incarnation later than that (in ns)."""

        def whole() -> bool:
            epochs = self.epochs()
            return all(w in epochs and epochs[w] > (later_than or {}).get(w, 0) for w in self.workers)

        self.wait_until(whole, timeout_s, "every worker ready at every router")

    def assert_nothing_left(self, timeout_s: float = 30.0) -> None:
        def problems() -> list[str]:
            out = []
            for i in range(self.routers):
                state = self.seen_by(i)
                if state.router.live_requests:
                    out.append(f"router-{i}: {state.router.live_requests} live requests")
                for w in state.workers:
                    if w.state != cluster_pb2.WORKER_STATE_READY:
                        continue
                    held = {
                        "dispatched": w.dispatched_requests,
                        "running": w.load.running_sequences,
                        "waiting": w.load.waiting_sequences,
                        "leases": w.load.active_leases,
                        "leased": w.load.leased_blocks,
                        "quarantined": w.load.quarantined_blocks,
                        "used": w.load.total_blocks - w.load.free_blocks,
                    }
                    if any(held.values()):
                        out.append(f"{w.worker_id} (by router-{i}): { {k: v for k, v in held.items() if v} }")
            return out

        deadline = time.monotonic() + timeout_s
        while left := problems():
            assert time.monotonic() < deadline, f"left after {timeout_s} s: {left}\n{self.logs()}"
            time.sleep(0.1)

    def open_files(self) -> dict[str, int]:
        return {name: len(os.listdir(f"/proc/{p.pid}/fd")) for name, p in self.processes.running.items()}

    def left_processes(self) -> list[str]:
        """Anything that still runs out of this cluster's directory."""
        left = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    line = Path(f"/proc/{entry}/cmdline").read_bytes()
                except OSError:
                    continue
                if f"--config\0{self.directory}/".encode() in line:
                    left.append(entry + ": " + line.replace(b"\0", b" ").decode())
        return left


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def leaked_shared_memory(before: set[str], pids: Sequence[int], within_s: float = 5.0) -> list[str]:
    """New files in /dev/shm that no living process maps, and System V segments that ours created.

    A process of somebody else may have made a file and not mapped it yet.
    """
    deadline = time.monotonic() + within_s
    while (leaked := _leaked_now(before, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return leaked


def _leaked_now(before: set[str], pids: Sequence[int]) -> list[str]:
    leaked = shared_memory() - before
    if leaked:
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    maps = Path(f"/proc/{entry}/maps").read_text()
                except OSError:
                    continue
                leaked -= {name for name in leaked if f"/dev/shm/{name}" in maps}
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return sorted(leaked) + [f"sysv {row[1]} of {row[4]}" for row in rows if int(row[4]) in pids]
