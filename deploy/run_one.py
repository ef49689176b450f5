"""`diptych run ROLE --config cluster.yaml`: one router or worker of a cluster, as a plain process.

Each reads the whole cluster's file and takes what concerns it. Workers find the routers by a DNS name that stands for
all of them (a headless Service), asked again every second: routers come and go.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from deploy.alike import cannot_share_kv, started
from deploy.config import ClusterConfig
from deploy.console import fail
from settings.addresses import apart, is_everywhere, join
from settings.file import SettingsError, read_settings
from worker.settings import WorkerSettings

_EVERY_S = 1.0
ROLES = ("router", "prefill", "decode", "standby")


class RoutersByName:
    """`addresses()` returns at once, with what was known last. A name that is not known keeps what was."""

    def __init__(self, target: str, resolve: Callable[[str, int], list[str]] | None = None) -> None:
        """Raises ValueError."""
        self._host, self._port = apart(target)
        self._resolve = resolve or _resolve
        self._known: list[str] = []
        self._stop = threading.Event()
        self.once()
        threading.Thread(target=self._follow, name="routers", daemon=True).start()

    def addresses(self) -> list[str]:
        return self._known

    def once(self) -> None:
        with contextlib.suppress(OSError):
            self._known = self._resolve(self._host, self._port) or self._known

    def stop(self) -> None:
        self._stop.set()

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.once()


def _resolve(host: str, port: int) -> list[str]:
    return sorted({join(str(found[4][0]), port) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})


def of_worker(config: ClusterConfig, role: str, advertise_host: str, group: str = "") -> WorkerSettings:
    """Raises SettingsError."""
    settings = config.worker_settings(role, group)
    problem = cannot_share_kv(config, {*started(config), config.group(role, group).home})
    if problem:
        raise SettingsError(problem)
    if advertise_host and is_everywhere(settings.worker.host) and not settings.worker.advertise_host:
        worker = settings.worker.model_copy(update={"advertise_host": advertise_host})
        settings = settings.model_copy(update={"worker": worker})
    return settings


def run_one(
    role: Annotated[str, typer.Argument(help="router, prefill, decode or standby")],
    config: Annotated[Path, typer.Option(help="cluster.yaml")],
    routers: Annotated[
        str, typer.Option(help="NAME:PORT where workers register; the name may stand for several routers")
    ] = "",
    group: Annotated[str, typer.Option(help="Group of its pool, where cluster.yaml has several")] = "",
    advertise_host: Annotated[str, typer.Option(help="Host that others connect to, where it listens on all")] = "",
) -> None:
    """Run one process of a cluster, without Ray. SIGTERM drains it; a second one does not wait."""
    if role not in ROLES:
        fail(f"the role is {role!r}; use {', '.join(ROLES)}")
    try:
        if routers:
            apart(routers)
    except ValueError as error:
        fail(f"--routers: {error}; for example diptych-routers:8101")
    try:
        cluster = read_settings(config, ClusterConfig)
        if role == "router":
            from router.__main__ import RouterSettings, run_router

            run_router(
                RouterSettings(
                    router=cluster.router_config(),
                    security=cluster.security,
                    telemetry=cluster.telemetry.of_router(),
                    logging=cluster.logging,
                )
            )
        settings = of_worker(cluster, role, advertise_host, group)
    except SettingsError as error:
        fail(str(error))
    import elastic_worker.server
    from worker.main import run_worker

    found = RoutersByName(routers).addresses if routers else None
    run_worker(role, settings, lambda r, s: elastic_worker.server.serve(r, s, found))
