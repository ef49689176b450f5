"""The router process: three ports, started and stopped in order.

Public port: GenerateService, ClusterService, AdminService, GRPCInferenceService (Triton clients), health, reflection.
HTTP port: router/doors/http/routes.py. Internal port: RegistryService.
Health says SERVING only while a request would be answered.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import grpc
from diptych.v1 import admin_pb2, admin_pb2_grpc, cluster_pb2, cluster_pb2_grpc, generate_pb2, worker_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from checkpoint.files import CheckpointError
from router.access.doorman import Doorman
from router.access.gate import Gate, KeyFileWatch
from router.access.sites import Sites
from router.clients import WorkerLinks
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.doors.grpc.admin import AdminServicer
from router.doors.grpc.lenient import LenientServer
from router.doors.grpc.reflection import add_reflection
from router.doors.grpc.service import ClusterServicer, GenerateServicer, RegistryServicer
from router.doors.grpc.wire import scaled_from_bytes
from router.doors.http.app import App
from router.doors.http.routes import add_routes
from router.doors.http.server import HttpServer, bind
from router.doors.http.ui import UiRoutes
from router.doors.open_inference.service import OPEN_INFERENCE, OpenInferenceServicer, add_open_inference
from router.errors import Code, Failure, RequestRefused
from router.operating.adapters import AdapterOperator
from router.operating.operator import Operator
from router.placement.cluster import Role
from router.record.metrics import RouterMetrics
from router.record.scaled import ScalingLog
from router.text.tokenizer import Tokenizer
from settings.addresses import cannot_listen, is_everywhere, join
from settings.descriptors import bounded_connections
from settings.file import SettingsError
from settings.health import HealthService
from settings.listeners import declare
from settings.model_path import ModelPathError
from settings.phases import SERVES, phase
from settings.process import PauseWatch
from settings.security import SecurityConfig, is_loopback
from settings.tasks import vital
from settings.telemetry.config import TelemetryConfig
from settings.telemetry.endpoint import MetricsEndpointError
from settings.tls import TlsError, Wiring, server_options

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 << 20  # above max_prompt_bytes, so that our error is seen and not the transport's
_WATCH_S = 0.05
_PAUSE_S = 2.0
_MEASURE_S = 1.0
# The services that health speaks of by name, beside the whole: those that answer requests.
_ANSWERING = (generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name, OPEN_INFERENCE)


class RouterStartError(Exception):
    """The router cannot start; the message names cause and fix."""


class RunningRouter:
    def __init__(
        self, config: RouterConfig, security: SecurityConfig | None = None, telemetry: TelemetryConfig | None = None
    ) -> None:
        self.config = config
        self.security = security or SecurityConfig()
        self._telemetry = telemetry or TelemetryConfig()
        self._clock: Callable[[], float] = time.monotonic
        self._serving = False
        self.scaling = ScalingLog()

    async def start(self) -> None:
        config = self.config
        self.wiring = self._wire()
        self._bound_connections()
        self.gate = Gate()
        self._key_watch = self._watch_keys()
        self._public, self.port = self._bind(
            config.host, config.grpc_port, "router.host", "router.grpc_port", public=True
        )
        self._internal, self.internal_port = self._bind(
            config.internal_host, config.internal_port, "router.internal_host", "router.internal_port", public=False
        )
        http_listener = _bind_http(config)
        encrypted, asked = self.wiring.public_files() is not None, self.wiring.public_authentication()
        declare(self.port, "gRPC", asked, encrypted=encrypted)
        declare(
            self.internal_port,
            "gRPC (internal)",
            self.wiring.internal_authentication(),
            encrypted=self.wiring.internal_tls,
        )
        if http_listener is not None:
            declare(http_listener.getsockname()[1], "HTTP", asked, encrypted=encrypted)
        try:
            phase("loading the tokenizer")
            made = partial(Tokenizer, config.model, chat_control_tokens=config.chat_control_tokens)
            tokenizer = await asyncio.to_thread(made)
        except (ModelPathError, CheckpointError) as error:
            raise RouterStartError(str(error)) from error
        host = socket.gethostname() if is_everywhere(config.host) else config.host
        router_id = config.router_id or join(host, self.port)
        self.links = WorkerLinks(router_id, self._clock, config.forget_after_s, self.wiring)
        self.dispatcher = Dispatcher(
            config,
            tokenizer,
            self.links,
            random.Random(),
            self._clock,
            asyncio.get_running_loop().call_later,
            self.gate,
        )
        phase("opening its ports")
        self.links.dispatcher = self.dispatcher
        self.dispatcher.asleep = self._asleep
        self.dispatcher.others.own_id = router_id
        self.gate.routers = self.dispatcher.others.count
        try:
            self.metrics = RouterMetrics(
                self._telemetry,
                self.dispatcher,
                router_id,
                lambda: not self.not_serving_reason(),
                self.wiring,
                self.scaling,
            )
        except MetricsEndpointError as error:
            raise RouterStartError(str(error)) from error
        self._health = HealthService()
        self._tell_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        look = ClusterServicer(
            router_id,
            self.dispatcher,
            self.scaling,
            self._clock,
            self.not_serving_reason,
            metrics_address=self.metrics.address,
        )
        self.operator = Operator(
            self.dispatcher.cluster, self.dispatcher.moves, self.links.set_role, self._clock, self.scaling
        )
        self.adapters = AdapterOperator(
            self.dispatcher.cluster, self.dispatcher.adapters, self.links.set_adapter, self._clock, time.time_ns
        )
        self._add_services(router_id, look)
        await self._internal.start()
        await self._public.start()
        self.http: HttpServer | None = None
        if http_listener is not None:
            app = App(random.Random(), config.http.cors_origins, self.gate, self._sites())
            add_routes(
                app,
                self.dispatcher,
                not_serving_reason=self.not_serving_reason,
                metrics=self.metrics.text,
                adapters=self.adapters,
            )
            UiRoutes(look.cluster, look.scaling).add_to(app)
            handshake_s = self.security.limits.handshake_s
            self.http = HttpServer(app, self._http, http_listener, self.wiring.public_files(), handshake_s)
            await self.http.start()
            log.info("HTTP on %d", self.http.port)
        phase("waiting for a decode worker")
        self._watching = vital(self._watch(), "the router's watch")
        self._telling_adapters = vital(self.adapters.run(), "telling workers of adapters")
        self._watching_keys = vital(self._key_watch.run(), "the watch of keys") if self._key_watch is not None else None
        log.info("router %s listens on %d, workers register on %d", router_id, self.port, self.internal_port)
        if self.metrics.address:
            at = f"{'https' if self.wiring.internal_tls else 'http'}://{self.metrics.address}"
            log.info("metrics at %s/metrics, all processes' endpoints listed at %s/targets", at, at)

    def _bound_connections(self) -> None:
        """No port takes more than this process has file descriptors for."""
        http, grpc_limits = self.config.http, self.security.limits
        given = bounded_connections(
            {
                "router.http.max_connections": http.max_connections if self.config.http_port is not None else 0,
                "security.limits.max_connections": grpc_limits.max_connections,
                "security.limits.max_connections, internal": grpc_limits.max_connections,
            }
        )
        of_http, public, internal = given.values()
        self._http = http.model_copy(update={"max_connections": of_http or http.max_connections})
        self._limits = {
            True: grpc_limits.model_copy(update={"max_connections": public}),
            False: grpc_limits.model_copy(update={"max_connections": internal}),
        }

    def _wire(self) -> Wiring:
        """Certificates and secrets, before anything listens. Raises RouterStartError."""
        config = self.config
        problems = self.security.exposed(exposures(config, self._telemetry))
        if problems:
            raise RouterStartError("\n".join(problems))
        if self.security.api_keys and self.security.internal_tls is None and not self.security.cluster_secret:
            log.warning(
                "clients need a key, but whoever reaches the internal port may join as a worker and read prompts; "
                "set security.internal_tls, or security.cluster_secret"
            )
        try:
            return Wiring(self.security, "router")
        except TlsError as error:
            raise RouterStartError(str(error)) from None

    def _sites(self) -> Sites | None:
        """Where a key or a certificate is asked for, a page has none; beyond loopback nobody knows our names."""
        config, tls = self.config, self.security.public_tls
        if self._key_watch is not None or (tls is not None and tls.client_ca) or not is_loopback(config.host):
            return None
        return Sites(config.http.allowed_hosts, config.http.cors_origins)

    def _watch_keys(self) -> KeyFileWatch | None:
        if not self.security.api_keys:
            return None
        try:
            return KeyFileWatch(self.security.api_keys, self.gate)
        except SettingsError as error:
            raise RouterStartError(f"security.api_keys: {error}; make a file with `diptych keys add`") from None

    def _bind(self, host: str, port: int, host_key: str, port_key: str, *, public: bool) -> tuple[grpc.aio.Server, int]:
        """Before anything is loaded: a port in use is known at once. Raises RouterStartError."""
        server = grpc.aio.server(
            interceptors=[Doorman(self.gate)] if public and self._key_watch is not None else [],
            maximum_concurrent_rpcs=self.security.limits.max_calls,
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                # Clients may look every few seconds whether we are there; by default they would be told to calm down.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 4000),
                ("grpc.so_reuseport", 0),  # or a port in use would go unnoticed
                *server_options(self._limits[public], public=public),
            ],
        )
        try:
            return server, self.wiring.listen(server, join(host, port), public=public)
        except RuntimeError as error:
            raise RouterStartError(cannot_listen(host, port, host_key, port_key)) from error

    def _add_services(self, router_id: str, look: ClusterServicer) -> None:
        self._public.add_generic_rpc_handlers((GenerateServicer(self.dispatcher).handlers(),))
        public: Any = LenientServer(self._public)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(look, public)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(self.operator, self.adapters, self.scaling, self._clock), public
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, public)
        add_open_inference(
            OpenInferenceServicer(self.dispatcher, self.not_serving_reason),
            LenientServer(self._public, self.config.max_prompt_bytes),
        )
        names = (
            *_ANSWERING,
            cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
            health.SERVICE_NAME,
        )
        add_reflection(names, public)
        internal: Any = LenientServer(self._internal)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(
            ClusterServicer(
                router_id,
                self.dispatcher,
                self.scaling,
                self._clock,
                self.not_serving_reason,
                self.wiring,
                self.metrics.address,
            ),
            internal,
        )
        inside = AdminServicer(self.operator, self.adapters, self.scaling, self._clock, self.wiring)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(inside, internal)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, internal)
        worker_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryServicer(router_id, self.dispatcher, self.links, self.config.heartbeat_s, self.wiring), internal
        )

    def told_of_scaling(self, data: bytes, late_s: float) -> None:
        """A ScalingDecision that lay for so long where this router has found it. On the event loop."""
        try:
            self.scaling.take(scaled_from_bytes(data, late_s, self._clock()))
        except RequestRefused as error:
            log.warning("a scaling decision is not recorded: %s", error)

    def _asleep(self) -> bool:
        """Nobody is there to answer, and a request will bring somebody."""
        d = self.dispatcher
        return self.scaling.asleep(self._clock()) and not d.leaving and not d.cluster.ready(Role.DECODE)

    def not_serving_reason(self) -> str:
        """Empty: a request would be answered."""
        if self.dispatcher.leaving:
            return "the router is leaving"
        if not self.dispatcher.cluster.ready(Role.DECODE) and not self.dispatcher.asleep():
            return "no decode worker is ready"
        return ""

    async def wait_ready(self, timeout_s: float) -> None:
        """Raises TimeoutError with the reason."""
        deadline = self._clock() + timeout_s
        while reason := self.not_serving_reason():
            if self._clock() > deadline:
                raise TimeoutError(f"not ready within {timeout_s:g} s: {reason}")
            await asyncio.sleep(_WATCH_S)

    def _tell_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *_ANSWERING):
            self._health.set(name, status)

    async def _watch(self) -> None:
        """Keeps the health service truthful."""
        statuses = health_pb2.HealthCheckResponse
        pauses = PauseWatch(_WATCH_S, _PAUSE_S, self._clock())
        measured = self._clock() - _MEASURE_S
        started = False
        while True:
            now = self._clock()
            if now - measured >= _MEASURE_S:
                measured = now
                self.metrics.look(now)
            pauses.look(now)
            serving = not self.not_serving_reason()
            if serving != self._serving:
                self._serving = serving
                self._tell_health(statuses.SERVING if serving else statuses.NOT_SERVING)
                log.info("router is %s", "serving" if serving else f"not serving: {self.not_serving_reason()}")
            if serving and not started:
                started = True
                phase(SERVES)
            await asyncio.sleep(_WATCH_S)

    async def drain(self) -> bool:
        """No new requests; live ones may end. False: not all did within `drain_s`."""
        self.dispatcher.leaving = True
        deadline = self._clock() + self.config.drain_s
        while self.dispatcher.live_requests:
            if self._clock() > deadline:
                return False
            await asyncio.sleep(_WATCH_S)
        return True

    async def stop(self) -> None:
        self.dispatcher.leaving = True
        self.dispatcher.fail_all(
            Failure(Code.UNAVAILABLE, "this router is leaving; retry, another one answers", retry_after_ms=200)
        )
        self._watching.cancel()
        self._telling_adapters.cancel()
        if self._watching_keys is not None:
            self._watching_keys.cancel()
        http = [self.http.stop()] if self.http is not None else []
        await asyncio.gather(self._public.stop(grace=1.0), self._internal.stop(grace=0.2), *http)
        await self.links.stop()
        self.dispatcher.close()
        await asyncio.to_thread(self.metrics.close)


def _bind_http(config: RouterConfig) -> socket.socket | None:
    """Raises RouterStartError."""
    if config.http_port is None:
        return None
    try:
        return bind(config.host, config.http_port)
    except OSError as error:
        why = cannot_listen(config.host, config.http_port, "router.host", "router.http_port", error)
        raise RouterStartError(f"{why} (0 = any, null = no HTTP)") from error


def exposures(config: RouterConfig, telemetry: TelemetryConfig) -> list[tuple[str, str, Literal["public", "internal"]]]:
    """For SecurityConfig.exposed."""
    return [
        ("router.host", config.host, "public"),
        ("router.internal_host", config.internal_host, "internal"),
        ("telemetry.metrics_host", telemetry.metrics_host, "internal"),
    ]


async def serve(
    config: RouterConfig, security: SecurityConfig | None = None, telemetry: TelemetryConfig | None = None
) -> RunningRouter:
    """Raises RouterStartError, with cause and fix."""
    router = RunningRouter(config, security, telemetry)
    await router.start()
    return router
