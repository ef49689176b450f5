"""Ray clusters of nodes that are started one by one: over several hosts of one machine (tests/support/netns.py), a node
in each namespace; or on one host that has few places.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.support.netns import Hosts
from tests.support.processes import free_port

HOSTS = ("a", "b", "c")
WORKERS_A_HOST = 2
LOOPBACK = "127.0.0.1"


class RayNodes:
    """`ray start`, once for each node."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory, self.address = directory, address
        self.port = free_port()
        self._ray = [str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats", "--block"]
        self._running: list[subprocess.Popen[bytes]] = []
        os.environ["RAY_AUTH_MODE"] = "disabled"

    def head(self, **resources: int) -> None:
        self._spawn("head", [], "--head", "--port", str(self.port), "--include-dashboard", "false",
                    "--node-ip-address", self.address, _having(resources))  # fmt: skip
        deadline = time.monotonic() + 60
        while not self._alive():
            assert time.monotonic() < deadline, "the head of Ray did not start"
            time.sleep(0.2)

    def node(self, name: str, address: str, there: Sequence[str] = (), **resources: int) -> None:
        """`there`: what goes before the command."""
        joins = ["--address", f"{self.address}:{self.port}", "--node-ip-address", address]
        self._spawn(name, there, *joins, _having(resources))

    def _spawn(self, name: str, there: Sequence[str], *arguments: str) -> None:
        small = ["--object-store-memory", str(80 << 20), "--num-cpus", "1", "--temp-dir", str(self.directory / name)]
        with (self.directory / f"{name}.log").open("wb") as out:
            command = [*there, *self._ray, *arguments, *small]
            self._running.append(
                subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            )

    def _alive(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex((self.address, self.port)) == 0

    def stop(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


def _having(resources: Mapping[str, int]) -> str:
    return f"--resources={json.dumps(resources)}"


class Nodes(RayNodes):
    """Ray on several hosts: the head in the hub, with routers and scaler; workers on the others."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        super().__init__(directory, hosts.hub_address)
        self.hosts = hosts

    def start(self) -> None:
        self.head(router=9)
        for name, address in self.hosts.addresses.items():
            there = ["ip", "netns", "exec", self.hosts.namespace(name)]
            self.node(name, address, there, worker=WORKERS_A_HOST)

    def settings(self) -> dict[str, Any]:
        hub = self.hosts.hub_address
        return {
            "router": {"host": hub, "internal_host": hub},
            "worker": {"host": "0.0.0.0"},
            "transport": {"ucx_net_devices": "eth0", "ucx_tls": "tcp"},
            **_joined(self),
            "security": {"insecure_ok": True},
        }


def _joined(nodes: RayNodes) -> dict[str, Any]:
    """Settings of a cluster whose workers each take one place."""
    pool = {"resources": {"worker": 1}}
    where = {"address": f"{nodes.address}:{nodes.port}", "authentication": "none", "router_resources": {"router": 1}}
    return {"prefill": pool, "decode": pool, "ray": where}


class FewPlaces(RayNodes):
    """One host with places for so many workers, until there are more."""

    def __init__(self, directory: Path, places: int) -> None:
        super().__init__(directory, LOOPBACK)
        self._places = places

    def start(self) -> None:
        self.head(router=9, worker=self._places)

    def more(self, places: int) -> None:
        self.node("more", LOOPBACK, worker=places)

    def settings(self) -> dict[str, Any]:
        return _joined(self)


_N = TypeVar("_N", Nodes, FewPlaces)


@contextlib.contextmanager
def started(make: Callable[[Path], _N], directory: Path) -> Iterator[_N]:
    """The nodes' logs are copied to `directory` at the end."""
    short = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))  # Ray's sockets have long names
    nodes = make(short)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()
        for path in short.glob("*.log"):
            shutil.copy(path, directory / path.name)
        shutil.rmtree(short, ignore_errors=True)
