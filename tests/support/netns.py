"""Hosts on one machine: network namespaces on a bridge in a namespace of its own, with links that can be cut.

    hub (bridge, 10.77.0.1) ── veth ── host a (10.77.0.2)
                            └─ veth ── host b (10.77.0.3)        cut(a, b): packets between them vanish, both still
                                                                 reach the hub, and nobody is told anything

Needs root. Nothing outside the namespaces made here is touched; `close` removes them with everything in them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence

_SUBNET = "10.77.0"


def unavailable() -> str:
    """Why there can be no namespaces here; empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    try:
        Hosts(["probe-a", "probe-b"]).close()
    except NamespaceError as error:
        return str(error)
    return ""


class NamespaceError(Exception):
    """What `ip` said."""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=20)
    if done.returncode != 0:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    def __init__(self, names: Sequence[str], owner: int | None = None) -> None:
        self._prefix = f"diptych-{owner or os.getpid()}-"
        self.hub = f"{self._prefix}hub"
        self.hub_address = f"{_SUBNET}.1"
        self.addresses = {name: f"{_SUBNET}.{i}" for i, name in enumerate(names, start=2)}
        self._ports = {name: f"port{i}" for i, name in enumerate(names)}
        if owner is not None:
            return
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    @classmethod
    def made_by(cls, owner: int, names: Sequence[str]) -> Hosts:
        """For a process that runs inside: the same hosts, to use and to cut, not to make."""
        return cls(names, owner)

    def namespace(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _build(self) -> None:
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self.hub, "address", "add", f"{self.hub_address}/24", "dev", "bridge0")
        ip("-n", self.hub, "link", "set", "bridge0", "up")
        for name, address in self.addresses.items():
            namespace, port = self.namespace(name), self._ports[name]
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("-n", self.hub, "link", "set", port, "master", "bridge0", "up")
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            ip("-n", self.hub, "link", "set", port, "type", "bridge_slave", "isolated", "off")  # or fail here

    def cut(self, a: str, b: str) -> None:
        """Both ways. A bridge passes nothing between two isolated ports."""
        for name in (a, b):
            ip("-n", self.hub, "link", "set", self._ports[name], "type", "bridge_slave", "isolated", "on")

    def cut_one_way(self, sender: str, receiver: str) -> None:
        """What `sender` sends to `receiver` goes to a hardware address that nobody has."""
        where = ("to", self.addresses[receiver], "dev", "eth0")
        ip("-n", self.namespace(sender), "neigh", "replace", *where, "lladdr", "02:00:00:00:de:ad", "nud", "permanent")

    def unplug(self, name: str) -> None:
        """Off from all others, the hub included."""
        ip("-n", self.hub, "link", "set", self._ports[name], "down")

    def plug(self, name: str) -> None:
        ip("-n", self.hub, "link", "set", self._ports[name], "up")

    def heal(self) -> None:
        for port in self._ports.values():
            ip("-n", self.hub, "link", "set", port, "type", "bridge_slave", "isolated", "off")
        for name in self.addresses:
            for address in self.addresses.values():
                with contextlib.suppress(NamespaceError):
                    ip("-n", self.namespace(name), "neigh", "del", address, "dev", "eth0")

    def close(self) -> None:
        """Ends what still runs inside, too."""
        existing = re.findall(rf"^{re.escape(self._prefix)}\S+", ip("netns", "list"), re.MULTILINE)
        for namespace in existing:
            with contextlib.suppress(NamespaceError):
                for pid in ip("netns", "pids", namespace).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", namespace)
