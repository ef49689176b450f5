"""The Ray Serve application: `import_path: deploy.app:build`, with cluster.yaml's content as args.

Serve owns replicas: placement, start, health, restart, scaling. Requests do not pass through it. Each replica runs its
process's `serve(...)` on a thread with an event loop of its own, so that Serve's loop never stalls a stream.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import ray
from ray import serve

import elastic_worker.server
import router.server
from deploy.config import ClusterConfig
from deploy.directory import RouterLookup, RouterPresence, tell_phase, tell_refusal
from deploy.ray_access import keep_serve_on_loopback, shown_to_ray
from engine.model_check import ModelLoadError
from kv_transfer.nixl_agent import NixlUnavailable
from router.server import RouterStartError
from settings.addresses import is_everywhere, join
from settings.file import validate_settings
from settings.listeners import declare, listening
from settings.phases import tell_phases_to
from settings.telemetry.config import LoggingConfig
from settings.telemetry.logs import set_up_logging
from settings.telemetry.setup import end_tracing, set_up_tracing
from worker.server import WorkerStartError
from worker.settings import WorkerSettings

T = TypeVar("T")

_DRAIN_SLACK_S = 15.0


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

    def _launch(self, name: str, coroutine: Coroutine[Any, Any, Any], config: LoggingConfig) -> None:
        set_up_logging(config, f"diptych-{name}")
        keep_serve_on_loopback()
        for _, port in listening(os.getpid()):  # nothing of ours is open yet
            declare(port, "Ray", shown_to_ray(), encrypted=False)
        tell_phases_to(lambda what: tell_phase(f"{name}-{os.getpid()}", what))
        self._thread = LoopThread(name)
        try:
            self._server = self._thread.submit(coroutine).result()
        except (RouterStartError, WorkerStartError, ModelLoadError, NixlUnavailable) as error:
            tell_refusal(name if name == "router" else f"{name} worker", str(error))
            raise

    async def _leave(self) -> None:
        """Serve waits for this before it ends the process; streams that Serve knows nothing of run to their end."""
        if getattr(self, "_server", None) is None:
            return
        server, self._server = self._server, None
        await asyncio.wrap_future(self._thread.submit(server.drain()))
        await asyncio.wrap_future(self._thread.submit(server.stop()))
        self._thread.stop()
        end_tracing()


@serve.deployment(name="Router")
class Router(_Replica):
    """The ingress of the Serve application by name only: clients dial its gRPC port."""

    def __init__(self, config: dict[str, Any], *pools: Any) -> None:
        cluster = ClusterConfig.model_validate(config)
        telemetry = cluster.telemetry.of_router()
        set_up_tracing("diptych-router", telemetry)
        self._launch(
            "router", router.server.serve(cluster.router_config(), cluster.security, telemetry), cluster.logging
        )
        host = cluster.router.internal_host
        if is_everywhere(host):
            host = ray.util.get_node_ip_address()
        self._presence = RouterPresence(join(host, self._server.internal_port))

    def check_health(self) -> None:
        """Serving or not is the health service's word; here only: is the process in order?"""

    async def __del__(self) -> None:
        presence = getattr(self, "_presence", None)
        if presence is not None:
            presence.stop()
        await self._leave()


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
        self._launch(self.role, served, parsed.logging)

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


@serve.deployment(name="PrefillWorker")
class PrefillWorker(_Worker):
    role = "prefill"


@serve.deployment(name="DecodeWorker")
class DecodeWorker(_Worker):
    role = "decode"


@serve.deployment(name="StandbyWorker")
class StandbyWorker(_Worker):
    role = "standby"


def build(args: dict[str, Any]) -> serve.Application:
    """Raises SettingsError for a configuration that does not fit."""
    config = validate_settings(args, ClusterConfig, "serve application args")
    common: dict[str, Any] = {
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    pools = []
    deployments = {"prefill": PrefillWorker, "decode": DecodeWorker, "standby": StandbyWorker}
    for role, pool in config.pools.items():
        deployment = deployments[role]
        if pool.replicas == 0:
            continue
        settings = config.worker_settings(role)
        options = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, "resources": pool.resources}
        pools.append(
            deployment.options(
                num_replicas=pool.replicas,
                ray_actor_options=options,
                graceful_shutdown_timeout_s=settings.worker.drain_s + _DRAIN_SLACK_S,
                max_surge_percent=100,  # a new worker is ready before an old one drains
                **common,
            ).bind(settings.model_dump(mode="json"))
        )
    return Router.options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": config.ray.router_resources},
        graceful_shutdown_timeout_s=config.router.drain_s + _DRAIN_SLACK_S,
        **common,
    ).bind(config.model_dump(mode="json"), *pools)
