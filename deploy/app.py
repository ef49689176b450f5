"""The Ray Serve application: `import_path: deploy.app:build`, with cluster.yaml's content as args.

Serve owns replicas: placement, start, health, restart, scaling. Requests do not pass through it. Each replica runs its
process's `serve(...)` on a thread with an event loop of its own, so that Serve's loop never stalls a stream.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import ray
from ray import serve

import elastic_worker.server
import router.server
from deploy import leaving
from deploy.alike import cannot_share_kv
from deploy.config import ClusterConfig
from deploy.directory import RouterLookup, RouterPresence, kept, somebody_is_there, tell_phase, tell_refusal
from deploy.pools import placing, too_few_gpus
from deploy.ray_access import keep_serve_on_loopback, shown_to_ray
from deploy.routers import Place, elsewhere, is_free, place
from deploy.serve_platform import counts_to_deploy, deployment_of, scaler_of
from engine.model_check import ModelLoadError
from kv_transfer.nixl_agent import NixlUnavailable
from router.server import RouterStartError
from settings.addresses import is_everywhere, join
from settings.file import SettingsError, validate_settings
from settings.listeners import declare, listening
from settings.phases import phase, tell_phases_to
from settings.telemetry.config import LoggingConfig
from settings.telemetry.logs import set_up_logging
from settings.telemetry.setup import end_tracing, set_up_tracing
from worker.server import WorkerStartError
from worker.settings import WorkerSettings

T = TypeVar("T")

_DRAIN_SLACK_S = 15.0
_LOOK_S = 0.5
_LEAST_WAIT_S = 0.05
_SCALERS_SHARE = 0.1  # of what a router reserves


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5.0)


class _Replica:
    """Start, health and drain, the same for the three."""

    _thread: LoopThread
    _server: Any
    _pod: leaving.PodWatch | None

    def _launch(self, name: str, start: Callable[[], Any], config: LoggingConfig) -> None:
        """`start`: the server, once `_thread` runs."""
        set_up_logging(config, f"diptych-{name}")
        keep_serve_on_loopback()
        for _, port in listening(os.getpid()):  # nothing of ours is open yet
            declare(port, "Ray", shown_to_ray(), encrypted=False)
        tell_phases_to(lambda what: tell_phase(f"{name}-{os.getpid()}", what))
        self._thread = LoopThread(name)
        try:
            self._server = start()
        except (RouterStartError, WorkerStartError, ModelLoadError, NixlUnavailable) as error:
            tell_refusal(name if name == "router" else f"{name} worker", str(error))
            raise
        self._pod = leaving.watch(lambda: self._thread.submit(self._server.drain()).result())

    async def _leave(self) -> None:
        """Serve waits for this before it ends the process; streams that Serve knows nothing of run to their end."""
        if getattr(self, "_server", None) is None:
            return
        server, self._server = self._server, None
        if self._pod is not None:
            self._pod.close()
        await asyncio.wrap_future(self._thread.submit(server.drain()))
        await asyncio.wrap_future(self._thread.submit(server.stop()))
        self._thread.stop()
        end_tracing()


@serve.deployment(name="Router")
class Router(_Replica):
    """The ingress of the Serve application by name only: clients dial its gRPC port."""

    def __init__(self, config: dict[str, Any], *pools: Any) -> None:
        cluster = ClusterConfig.model_validate(config)
        set_up_tracing("diptych-router", cluster.telemetry.of_router())
        self._launch("router", lambda: self._start(cluster), cluster.logging)
        server, inside = self._server, _seen_from_outside(cluster.router.internal_host)
        public = join(_seen_from_outside(cluster.router.host), server.port)
        self._presence = RouterPresence(join(inside, server.internal_port), public, self._told_of_scaling)

    def _told_of_scaling(self, message: bytes, late_s: float) -> None:
        if self._server is not None:
            self._thread.loop.call_soon_threadsafe(self._server.told_of_scaling, message, late_s)

    def _start(self, cluster: ClusterConfig) -> Any:
        """On the first of the configured ports that no other router of this machine has. One that leaves keeps its own
        until it has drained; they are worth waiting for, since clients know them.
        """
        config, telemetry = cluster.router_config(), cluster.telemetry.of_router()
        places = [place(number, config, telemetry) for number in range(config.replicas)]
        deadline = time.monotonic() + config.drain_s + _DRAIN_SLACK_S
        while True:
            for one in places:
                if not is_free(one):
                    continue
                try:
                    return self._serve(one, cluster)
                except RouterStartError:
                    if is_free(one):
                        raise  # it is not for the ports that another one was quicker to take
            if time.monotonic() > deadline or not somebody_is_there():
                return self._serve(places[0] if config.replicas == 1 else elsewhere(places[-1]), cluster)
            phase("waiting for the ports of a router that leaves")
            time.sleep(_LOOK_S)

    def _serve(self, one: Place, cluster: ClusterConfig) -> Any:
        return self._thread.submit(router.server.serve(one.router, cluster.security, one.telemetry)).result()

    def check_health(self) -> None:
        """Serving or not is the health service's word; here only: is the process in order?"""

    async def __del__(self) -> None:
        await self._leave()
        presence = getattr(self, "_presence", None)
        if presence is not None:
            presence.leave()


class _Worker(_Replica):
    role = ""  # that it starts with

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = WorkerSettings.model_validate(settings)
        set_up_tracing(f"diptych-{self.role}", parsed.telemetry)
        if is_everywhere(parsed.worker.host) and not parsed.worker.advertise_host:
            address = ray.util.get_node_ip_address()
            parsed = parsed.model_copy(update={"worker": parsed.worker.model_copy(update={"advertise_host": address})})
        self._lookup = RouterLookup()
        served = elastic_worker.server.serve(self.role, parsed, self._lookup.addresses)
        self._launch(self.role, lambda: self._thread.submit(served).result(), parsed.logging)

    def check_health(self) -> None:
        """Serve replaces a replica that raises here. (A stuck event loop ends the process itself.)"""
        server = self._server
        if server is None:
            return
        if server.failed.done():
            raise RuntimeError(f"{server.worker_id} broke: {server.failed.result()}")
        if not server.step_loop.alive:
            raise RuntimeError(f"{server.worker_id}: the engine thread has ended")

    async def __del__(self) -> None:
        await self._leave()
        lookup = getattr(self, "_lookup", None)
        if lookup is not None:
            lookup.stop()


@serve.deployment(name="Scaler")
class ClusterScaler:
    """Sizes the pools (deploy/scaler.py). Whatever happens to it, the pools stay as they are."""

    def __init__(self, config: dict[str, Any]) -> None:
        cluster = ClusterConfig.model_validate(config)
        set_up_logging(cluster.logging, "diptych-scaler")
        keep_serve_on_loopback()
        self._stop = threading.Event()
        self._scaler = scaler_of(cluster, serve.get_replica_context().app_name)
        self._thread = threading.Thread(target=self._run, name="scaler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._stop.wait(max(_LEAST_WAIT_S, self._scaler.step()))

    def check_health(self) -> None:
        """Serve replaces it when this raises."""
        if not self._thread.is_alive():
            raise RuntimeError("the scaler's thread has ended; its log says why")

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()


@serve.deployment(name="PrefillWorker")
class PrefillWorker(_Worker):
    role = "prefill"


@serve.deployment(name="DecodeWorker")
class DecodeWorker(_Worker):
    role = "decode"


@serve.deployment(name="StandbyWorker")
class StandbyWorker(_Worker):
    role = "standby"


def _seen_from_outside(host: str) -> str:
    return ray.util.get_node_ip_address() if is_everywhere(host) else host


def build(args: dict[str, Any]) -> serve.Application:
    """Raises SettingsError for a configuration that does not fit."""
    config = validate_settings(args, ClusterConfig, "serve application args")
    common: dict[str, Any] = {
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    pools: list[serve.Application] = []
    counts = counts_to_deploy(config, kept if ray.is_initialized() else lambda _: "")
    problem = cannot_share_kv(config, {home for home, count in counts.items() if count})
    if problem:
        raise SettingsError(problem)
    deployments = {"prefill": PrefillWorker, "decode": DecodeWorker, "standby": StandbyWorker}
    for group in config.groups:
        settings = config.settings_of(group)
        if counts[group.home] == 0:
            continue
        problem = too_few_gpus(group, settings.engine.tensor_parallel, settings.engine.device)
        if problem:
            raise SettingsError(problem)
        pools.append(
            deployments[group.role]
            .options(
                name=deployment_of(group.home),
                num_replicas=counts[group.home],
                **placing(group, settings.engine.tensor_parallel),
                graceful_shutdown_timeout_s=settings.worker.drain_s + _DRAIN_SLACK_S,
                max_surge_percent=group.surge,  # rounded up to whole workers: one, up to a hundred
                **common,
            )
            .bind(settings.model_dump(mode="json"))
        )
    beside = config.ray.router_resources
    if config.scaling.on:
        # Where a router is, which leaves it room: it has a router's certificate.
        where = {"num_cpus": 0, "resources": {name: min(1.0, n) * _SCALERS_SHARE for name, n in beside.items()}}
        scaler = ClusterScaler.options(num_replicas=1, ray_actor_options=where, **common)
        pools.append(scaler.bind(config.model_dump(mode="json")))
        beside = {name: n * (1 - _SCALERS_SHARE) if n <= 1 else n for name, n in beside.items()}
    apart: dict[str, Any] = {"max_replicas_per_node": 1} if config.ray.router_resources else {}  # each its own ports
    return Router.options(
        num_replicas=config.router.replicas,
        **apart,
        ray_actor_options={"num_cpus": 0, "resources": beside},
        graceful_shutdown_timeout_s=config.router.drain_s + _DRAIN_SLACK_S,
        **common,
    ).bind(config.model_dump(mode="json"), *pools)
