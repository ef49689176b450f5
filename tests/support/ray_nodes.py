"""A Ray cluster over several hosts of one machine (tests/support/netns.py): a node in each namespace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.netns import Hosts
from tests.support.processes import free_port

HOSTS = ("a", "b", "c")
WORKERS_A_HOST = 2


class Nodes:
    """Ray on several hosts: the head in the hub, with routers and scaler; workers on the others."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self.hosts, self.directory = hosts, directory
        self._port = free_port()
        self._ray = [str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats", "--block"]
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        hub = self.hosts.hub_address
        head = ["--head", "--port", str(self._port), "--include-dashboard", "false", '--resources={"router": 9}']
        self._spawn("head", [], *head, "--node-ip-address", hub)
        self._until(lambda: self._alive(), "the head of Ray")
        for name, address in self.hosts.addresses.items():
            there = ["ip", "netns", "exec", self.hosts.namespace(name)]
            have = f'--resources={{"worker": {WORKERS_A_HOST}}}'
            self._spawn(name, there, "--address", f"{hub}:{self._port}", "--node-ip-address", address, have)

    def _spawn(self, name: str, there: list[str], *arguments: str) -> None:
        small = ["--object-store-memory", str(80 << 20), "--num-cpus", "1", "--temp-dir", str(self.directory / name)]
        with (self.directory / f"{name}.log").open("wb") as out:
            command = [*there, *self._ray, *arguments, *small]
            self._running.append(
                subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            )

    def _alive(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex((self.hosts.hub_address, self._port)) == 0

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not start"
            time.sleep(0.2)

    def settings(self) -> dict[str, Any]:
        hub = self.hosts.hub_address
        pool = {"resources": {"worker": 1}}
        return {
            "router": {"host": hub, "internal_host": hub},
            "worker": {"host": "0.0.0.0"},
            "transport": {"ucx_net_devices": "eth0", "ucx_tls": "tcp"},
            "prefill": pool,
            "decode": pool,
            "ray": {"address": f"{hub}:{self._port}", "authentication": "none", "router_resources": {"router": 1}},
            "security": {"insecure_ok": True},
        }

    def stop(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


@contextlib.contextmanager
def nodes_on(hosts: Hosts, directory: Path) -> Iterator[Nodes]:
    short = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))  # Ray's sockets have long names
    nodes = Nodes(hosts, short)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()
        for path in short.glob("*.log"):
            shutil.copy(path, directory / path.name)
        shutil.rmtree(short, ignore_errors=True)
