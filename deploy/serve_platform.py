"""What resizes a cluster under Ray Serve: counts through Serve's controller, roles and looks through the routers.

Serve lets an application be scaled from outside (`external_scaler_enabled`): it keeps the counts that it is told,
starts and stops replicas, and replaces those that die. Its other way, an autoscaling policy of the application, runs
inside its controller ten times a second, where a slow or failing one of ours would hold up all of Serve; it sees
Serve's requests, of which we have none, and no roles.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray

from deploy.access import Access
from deploy.clients import RequestFailed, get_cluster, switch_role
from deploy.config import ClusterConfig
from deploy.directory import internal_addresses, keep, tell_scaling
from deploy.fleet import Replica, Served
from deploy.pools import Home
from deploy.scaler import Scaler
from deploy.scaling_plan import RoleChange
from deploy.scaling_watch import watcher_of
from scaling.report import Report
from scaling.weighing import Terms
from scaling.wire import report_to_wire
from settings.tls import Wiring

log = logging.getLogger(__name__)

_ROLES = {"prefill": "PrefillWorker", "decode": "DecodeWorker", "standby": "StandbyWorker"}
COUNTS = "scaling-counts"  # in the directory: for the next deployment of the application
_TIMEOUT_S = 10.0
_LOOK_S = 3.0
_STATES = {"STARTING": "starting", "RECOVERING": "running", "STOPPING": "stopping"}  # all others: running


class ServePlatform:
    def __init__(self, config: ClusterConfig, application: str) -> None:
        self._application = application
        self._wiring = Wiring(config.security, "router")
        self._configured = {group.home: group.replicas for group in config.groups}
        self._targets: dict[Home, int] = {}

    def served(self) -> Served:
        details: Any = ray.get(_controller().get_serve_instance_details.remote(), timeout=_TIMEOUT_S)
        found = read_details(details, self._application, _head_node())
        self._targets = dict(found.targets)
        return found

    def clusters(self) -> list[Any]:
        found = []
        for address in internal_addresses():
            try:
                with self._channel(address) as channel:
                    found.append(get_cluster(channel, _LOOK_S))
            except RequestFailed as error:
                log.debug("router %s: %s", address, error)
        return found

    def set_count(self, home: Home, count: int) -> None:
        from ray.serve._private.common import DeploymentID

        which = DeploymentID(name=deployment_of(home), app_name=self._application)
        ray.get(_controller().update_deployment_replicas.remote(which, count), timeout=_TIMEOUT_S)
        self._targets[home] = count
        keep(COUNTS, json.dumps({"configured": self._configured, "counts": self._targets}))

    def switch(self, change: RoleChange) -> None:
        """By any router: the worker tells all of them."""
        failed: RequestFailed | None = None
        for address in internal_addresses():
            try:
                with self._channel(address) as channel:
                    switch_role(channel, change.worker_id, change.role, force=change.force)
                return
            except RequestFailed as error:
                failed = error
                if error.code not in ("UNAVAILABLE", "NOT_FOUND"):
                    break
        raise failed if failed is not None else LookupError("no router answers")

    def tell(self, report: Report) -> None:
        tell_scaling(report_to_wire(report, time.monotonic()).SerializeToString())

    def _channel(self, address: str) -> Any:
        return Access(member=self._wiring.proof).introduce(self._wiring.blocking_channel(address, "router"))


def scaler_of(config: ClusterConfig, application: str) -> Scaler:
    """For a cluster with `scaling:`. Raises TlsError."""
    decode = config.settings_of(config.scaled("decode"))
    terms = Terms(config.router.itl_target_ms, *config.gpus_of_workers)
    platform = ServePlatform(config, application)
    decider = f"the scaler on {socket.gethostname()}, process {os.getpid()}"
    scaled = {config.scaled(role).home for role in ("prefill", "decode")}
    stay = {group.home for group in config.groups if group.role != "standby"} - scaled
    scaling = config.scaling_of_groups()
    return Scaler(platform, scaling, terms, watcher_of(config), time.monotonic, decode.worker.drain_s, decider, stay)


def deployment_of(home: Home) -> str:
    """Its name in Serve."""
    role, _, group = home.partition("/")
    return f"{_ROLES[role]}-{group}" if group else _ROLES[role]


def home_of(deployment: str) -> Home | None:
    name, _, group = deployment.partition("-")
    role = next((role for role, known in _ROLES.items() if known == name), None)
    return f"{role}/{group}" if role is not None and group else role


def read_details(details: dict[str, Any], application: str, head_node: str) -> Served:
    """Of Serve's own description of itself. Raises LookupError while the application is not there."""
    applications = details.get("applications", {})
    if application not in applications:
        raise LookupError(f"Serve has no application {application!r} yet")
    on_node: Counter[str] = Counter()
    for app in applications.values():
        for deployment in app["deployments"].values():
            on_node.update(r["node_id"] for r in deployment["replicas"] if r["state"] == "RUNNING" and r.get("node_id"))
    targets, replicas = {}, []
    for name, deployment in applications[application]["deployments"].items():
        home = home_of(name)
        if home is None:
            continue
        targets[home] = deployment["target_num_replicas"]
        for r in deployment["replicas"]:
            replicas.append(
                Replica(
                    home,
                    r["replica_id"],
                    _STATES.get(str(getattr(r["state"], "value", r["state"])), "running"),  # type: ignore[arg-type]
                    bool(r.get("node_id")),
                    r.get("node_id") or "",
                    r.get("node_ip") or "",
                    r.get("pid") or 0,
                    r.get("start_time_s") or 0.0,
                )
            )
    return Served(targets, tuple(replicas), on_node, head_node)


def counts_to_deploy(config: ClusterConfig, read: Callable[[str], str]) -> dict[Home, int]:
    """Of workers, when the application is deployed again: what the scaler had told, unless the configured counts have
    changed, which somebody did by hand. `read`: of the directory.
    """
    configured = {group.home: group.replicas for group in config.groups}
    if not config.scaling.resizes:
        return configured
    least, scaling = {}, config.scaling_of_groups()
    for role, bounds in (("prefill", scaling.prefill), ("decode", scaling.decode)):
        ours = config.scaled(role)
        others = config.pools[role].replicas - ours.replicas
        least[ours.home] = max(1, bounds.min - others)
    counts = {home: max(n, least.get(home, 0)) for home, n in configured.items()}
    try:
        known = json.loads(read(COUNTS) or "{}")
    except Exception as error:  # there is no directory yet, or no Ray
        log.debug("no counts of an earlier deployment: %s", error)
        return counts
    if known.get("configured") != configured:
        return counts
    return {home: max(known["counts"].get(home, n), least.get(home, 0)) for home, n in configured.items()}


def _controller() -> Any:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    return client._controller


def _head_node() -> str:
    for node in ray.nodes():
        if node.get("Alive") and "node:__internal_head__" in node.get("Resources", {}):
            return node["NodeID"]
    return ""
