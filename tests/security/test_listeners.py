"""`diptych status --listeners` against the sockets that are really open."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from typing import Any

import psutil
from rich.console import Console

from deploy.status_view import render_listeners
from settings.listeners import listening
from tests.security.test_doors import eventually
from tests.support.processes import Cluster


def open_ports(pid: int) -> set[tuple[str, int]]:
    """Of a process and its children, by psutil: another pair of eyes than the product's."""
    found = set()
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        for one in process.net_connections(kind="tcp"):
            if one.status == psutil.CONN_LISTEN:
                found.add((one.laddr.ip.removeprefix("::ffff:"), one.laddr.port))
    return found


def said(listeners: Any) -> set[tuple[str, int]]:
    return {(one.address.rsplit(":", 1)[0].strip("[]"), int(one.address.rsplit(":", 1)[1])) for one in listeners}


def test_every_open_port_is_listed_with_who_may_use_it(cluster: Cluster) -> None:
    def reported() -> dict[str, Any]:
        state = cluster.cluster()
        return {"router": state.router.listeners} | {w.worker_id: w.listeners for w in state.workers}

    processes = cluster.processes.running
    eventually(lambda: all(said(reported()[name]) == open_ports(p.pid) for name, p in processes.items()))
    for name, found in reported().items():
        assert found, name
        assert {one.protocol for one in found} <= {
            "gRPC", "gRPC (internal)", "gRPC (worker)", "HTTP", "HTTP (metrics)", "UCX (KV)"
        }  # fmt: skip
        assert all(one.address.startswith("127.") for one in found), "loopback unless told otherwise"
        for one in found:
            if one.protocol not in ("UCX (KV)", "HTTP (metrics)"):  # which on loopback ask for nothing
                assert one.encrypted
                assert "none" not in one.authentication
    by_protocol = {one.protocol: one.authentication for one in reported()["router"]}
    assert by_protocol == {
        "gRPC": "API key", "HTTP": "API key", "HTTP (metrics)": "none",
        "gRPC (internal)": "mutual TLS and cluster secret",
    }  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=200).print(render_listeners(cluster.cluster()))
    assert f"127.0.0.1:{cluster.port}" in shown.getvalue()
    assert "prefill-0" in shown.getvalue()


def test_the_kernels_table_is_read_rightly() -> None:
    with contextlib.ExitStack() as stack:
        mine = set()
        for family, host in (
            (socket.AF_INET, "127.0.0.2"),
            (socket.AF_INET6, "::1"),
            (socket.AF_INET6, "::ffff:127.0.0.1"),
        ):
            s = stack.enter_context(socket.socket(family))
            s.bind((host, 0))
            s.listen()
            mine.add((f"[{host}]" if host == "::1" else host.removeprefix("::ffff:"), s.getsockname()[1]))
        stack.enter_context(socket.socket()).bind(("127.0.0.1", 0))  # bound, and not listening
        assert mine == {(host, port) for host, port in listening(os.getpid()) if (host, port) in mine}
        assert len(listening(os.getpid())) == len(set(listening(os.getpid())))
