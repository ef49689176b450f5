"""A worker process: engine thread, transport, gRPC server and registration, started and stopped in order.

Start: load the model -> register KV memory -> engine thread -> listen -> warm up -> register with the routers -> watch.
Break: the engine fails, or the watchdog finds something stuck -> NOT_SERVING, streams end with the cause, `failed`.
Stop:  drain (no new work; what is here ends; leases are pulled) -> close streams -> engine thread -> transport.
       The KV memory stays mapped until the process is gone: a peer may still be reading it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from diptych.v1 import handoff_pb2_grpc, worker_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.adapters.slots import slots_of
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.grammar import GrammarCompiler
from engine.overlap import launcher_of
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.speculation import limits_of
from kv_transfer.clients import PeerLinks
from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerHello, PeerId
from kv_transfer.layout import KvLayout
from kv_transfer.rank_link import RankFailed
from kv_transfer.ranked import RankedTransport
from kv_transfer.service import HandoffServicer
from kv_transfer.tickets import Wallet
from settings.addresses import cannot_listen, host_of, is_everywhere, join
from settings.descriptors import bounded_connections
from settings.health import HealthService
from settings.listeners import declare
from settings.model_path import ModelPathError, pinned_model
from settings.phases import SERVES, phase
from settings.process import PauseWatch, print_stacks
from settings.security import is_loopback
from settings.tasks import vital
from settings.telemetry.catalog import Source
from settings.telemetry.endpoint import MetricsEndpointError
from settings.telemetry.instruments import Reader
from settings.telemetry.setup import Metrics
from settings.tls import TlsError, Wiring, server_options
from worker.adapters import LiveAdapters
from worker.clients import Registration, WorkerCard
from worker.core import WorkerCore
from worker.grammars import CompiledGrammars
from worker.loop import StepLoop
from worker.loop_guard import LoopGuard
from worker.messages import (
    Drain,
    Outbox,
    ReaderLost,
    ReaderMessages,
    RoleSaid,
    SourceAttached,
    SourceGone,
    SourceLost,
    SourceMessages,
    Transported,
)
from worker.metrics import adapter_readers, expert_readers, readers
from worker.service import WorkerServicer
from worker.settings import WorkerSettings
from worker.tracing import emit
from worker.transport import open_transport
from worker.warm_up import warm_up
from worker.watchdog import Facts, Health, Limits, Watchdog, step_limit_s

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 << 20
_LOOK_EVERY_S = 1.0
_WITHDRAW_S = 1.0  # for those who read their streams; the others are cut off


RoleReaders = Callable[[Any], dict[str, Reader]]  # of the role's own core


class WorkerStartError(Exception):
    """The worker cannot start; the message names cause and fix."""


class WorkerStalled(Exception):
    """The watchdog's verdict: what is stuck, since when, and what it may be."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a role builds its core from."""

    engine: EngineCore
    pool: BlockPool
    runner: ModelRunner
    transport: RankedTransport
    settings: WorkerSettings


class RunningWorker:
    """A started worker. `drain` then `stop`; `failed` is set when it broke or got stuck, and `withdrawn` follows."""

    def __init__(self, role: str, settings: WorkerSettings) -> None:
        self.role = role
        self.settings = settings
        config = settings.worker
        started_as = f"{role}-{config.group}" if config.group else role
        self.worker_id = config.worker_id or f"{started_as}-{socket.gethostname()}-{os.getpid()}"
        self.epoch = time.time_ns()
        self.peer = PeerId(self.worker_id, self.epoch)
        self.address = ""
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.withdrawn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._health_of: dict[str, float] = dict.fromkeys(("engine", "transport", "pulls"), 0.0)

    async def start(
        self,
        build_core: Callable[[WorkerParts], WorkerCore],
        role_readers: RoleReaders,
        router_addresses: Callable[[], Iterable[str]] | None = None,
    ) -> None:
        config = self.settings.worker
        phase("finding the model")
        self.wiring = self._wire()
        server = self._bind()
        await asyncio.to_thread(self._pin_model)
        await asyncio.to_thread(self._load)
        self.core = build_core(self._parts)
        self.core.role = RoleSaid(self.role)
        layers = self._runner.adapter_layers
        if layers is not None:
            self.core.adapter_load_ms = lambda: layers.load_ms
        compiler = GrammarCompiler(self.settings.engine.model, self._limits.vocab_size)
        self._grammars = self.core.grammars = CompiledGrammars(compiler, lambda compiled: self.step_loop.post(compiled))
        self.step_loop = StepLoop(
            self.core,
            self._runner,
            self._deliver_soon,
            self._crashed_soon,
            launcher=self._launcher,
            improve=self._runner.improve,
            forget=self._runner.forget,
        )
        phase("opening its ports")
        await self._listen(server)
        self._metrics = self._open_metrics(role_readers)
        if config.warm_up:
            phase("warming up")
            rates, step_cost = self.core.rates, self.core.engine.step_cost
            blocks, rules = self._runner.num_blocks, self.layout.rules
            await asyncio.to_thread(warm_up, self._runner, self._limits, blocks, rules, rates, step_cost)
        self._grammars.prepare()
        self._registration = Registration(
            self._card(),
            router_addresses or (lambda: config.router_addresses),
            self.wiring,
            lambda: self.core.role,
            self._adapters.said,
        )
        self._adapters.announce = self._registration.soon
        watchdog = Watchdog(self._watch_limits())
        self.step_loop.start()
        self._registration.start()
        self._guard = LoopGuard(config.stall_s)
        self._guard.start()
        self._watching = vital(self._watch(watchdog), "the worker's watch")
        self._watching_adapters = vital(self._watch_adapters(), "the watch of adapters")
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("%s worker %s serves at %s", self.role, self.worker_id, self.address)
        phase(SERVES)

    async def drain(self) -> bool:
        """Take no new work and wait until nothing is owed to anybody. False: not within `drain_s`."""
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._registration.leave()
        self.step_loop.post(Drain())
        deadline = self._loop.time() + self.settings.worker.drain_s
        while self._loop.time() < deadline:
            if self.failed.done():
                return False  # its streams are broken already
            if await self._ask(lambda core: core.is_idle()):
                return True
            await asyncio.sleep(0.05)
        log.warning("%s: not drained within %g s", self.worker_id, self.settings.worker.drain_s)
        return False

    async def stop(self) -> None:
        self._guard.stop()
        self._watching.cancel()
        self._watching_adapters.cancel()
        self._adapters.close()
        self._grammars.close()
        await self._registration.stop()
        why = f"worker {self.worker_id} leaves"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await asyncio.gather(self._service.close(why), self._handoffs.close(why))
        await self._server.stop(grace=0.5)
        await self._links.stop()
        patience_s = 1.0 if self.failed.done() else 5.0  # who is stuck will not come
        if not await asyncio.to_thread(self.step_loop.stop, 2 * patience_s):
            log.error("%s: the engine thread is stuck and ends with the process", self.worker_id)
        await asyncio.to_thread(self._transport.close, patience_s)
        if self._transport.alive:
            log.error("%s: the transport thread is stuck and ends with the process", self.worker_id)
        await asyncio.to_thread(self._runner.close)
        await asyncio.to_thread(self._metrics.close)

    # Parts.

    def _wire(self) -> Wiring:
        """Certificates and secrets, before anything listens. Raises WorkerStartError."""
        problems = self.settings.security.exposed(
            [
                ("worker.host", self.settings.worker.host, "internal"),
                ("telemetry.metrics_host", self.settings.telemetry.metrics_host, "internal"),
            ]
        )
        if problems:
            raise WorkerStartError("\n".join(problems))
        try:
            return Wiring(self.settings.security, "worker")
        except TlsError as error:
            raise WorkerStartError(str(error)) from None

    def _bind(self) -> grpc.aio.Server:
        """First of all: a port in use is known before a model is loaded."""
        config, limits = self.settings.worker, self.settings.security.limits
        given = bounded_connections({"security.limits.max_connections": limits.max_connections})
        limits = limits.model_copy(update={"max_connections": given["security.limits.max_connections"]})
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                # A router or reader whose host vanished: what it had here ends.
                ("grpc.keepalive_time_ms", 5000),
                ("grpc.keepalive_timeout_ms", 5000),
                ("grpc.http2.ping_timeout_ms", 5000),
                # Routers ping every two seconds, also over streams that are silent.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
                *server_options(limits, public=False),
            ]
        )
        try:
            port = self.wiring.listen(server, join(config.host, config.port), public=False)
        except RuntimeError as error:
            why = cannot_listen(config.host, config.port, "worker.host", "worker.port")
            raise WorkerStartError(f"{why} (0 = any)") from error
        declare(port, "gRPC (worker)", self.wiring.internal_authentication(), encrypted=self.wiring.internal_tls)
        self.address = join(config.advertise_host or config.host, port)
        return server

    def _pin_model(self) -> None:
        """A hub's branch may move: from here on everything reads one commit of it. Raises WorkerStartError."""
        engine = self.settings.engine
        try:
            model = pinned_model(engine.model)
        except ModelPathError as error:
            raise WorkerStartError(str(error)) from None
        self.settings = self.settings.model_copy(update={"engine": engine.model_copy(update={"model": model})})

    def _load(self) -> None:
        settings = self.settings
        adapters = settings.engine.adapters
        self._runner = ModelRunner(settings.engine)
        self._launcher = launcher_of(settings.engine.async_scheduling, self._runner)
        facts = self._runner.facts
        if self._runner.leader is not None:
            self._runner.leader.watch(self._crashed_soon)
        self.layout = KvLayout(
            facts.identity,
            settings.engine.block_tokens,
            facts.groups,
            facts.weights,
            facts.unquantized,
        )
        self._limits = EngineLimits(
            block_tokens=settings.engine.block_tokens,
            max_batch_tokens=settings.engine.max_batch_tokens,
            max_running_sequences=settings.engine.max_running_sequences,
            max_waiting_sequences=settings.engine.max_waiting_sequences,
            context_limit_tokens=facts.context_limit_tokens,
            vocab_size=facts.vocab_size,
            itl_target_ms=settings.engine.itl_target_ms or None,
            original_context_tokens=facts.original_context_tokens,
        )
        phase("opening the KV transport")
        try:
            self._transport = open_transport(
                self.peer,
                self.layout,
                self._transport_config(),
                self._runner.memory(),
                () if self._runner.leader is None else self._runner.leader.kv_links,
                lambda event: self.step_loop.post(Transported(event)),
            )
        except RankFailed as error:
            raise WorkerStartError(str(error)) from None
        pool = BlockPool(self._runner.num_blocks, self._runner.generations)
        self._parts = WorkerParts(
            EngineCore(
                self._limits,
                pool,
                self.layout.fingerprint(),
                rules=self.layout.rules,
                speculation=limits_of(settings.engine.speculation, self._runner.draft_limits),
                adapters=slots_of(adapters.slots, self._runner.adapters, enabled=adapters.enabled),
            ),
            pool,
            self._runner,
            self._transport,
            settings,
        )

    def _transport_config(self) -> TransportConfig:
        """UCX listens where this worker does: on loopback, unless told otherwise."""
        given = self.settings.transport
        if given.ucx_net_devices or not is_loopback(self.settings.worker.host) or sys.platform != "linux":
            return given
        return given.model_copy(update={"ucx_net_devices": "lo"})

    async def _listen(self, server: grpc.aio.Server) -> None:
        transport = self._transport
        own = PeerHello(
            self.peer, self.layout.fingerprint(), transport.name, transport.endpoint(), self.layout.pairing()
        )
        post, wallet = self.step_loop.post, Wallet()
        self._links = PeerLinks(
            own,
            on_hello=self._source_attached,
            on_messages=lambda peer, messages: post(SourceMessages(peer, messages)),
            on_lost=self._source_lost,
            on_gone=self._source_gone,
            on_pong=self._transport.reachable,
            wiring=self.wiring,
            wallet=wallet,
        )
        self._handoffs = HandoffServicer(
            own,
            on_hello=lambda hello: self._transport.connect(hello.peer, hello.endpoint),
            on_messages=lambda peer, messages: post(ReaderMessages(peer, messages)),
            on_lost=lambda peer: post(ReaderLost(peer)),
            on_ping=self._transport.reachable,
            wiring=self.wiring,
        )
        self._adapters = LiveAdapters(self.settings.engine.adapters, self._runner.adapter_layers, self._ask)
        self._service = WorkerServicer(
            self.worker_id, self.epoch, post, self._introduce, self.wiring, wallet, self._adapters
        )
        self._health = HealthService()
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._service, server)
        handoff_pb2_grpc.add_HandoffServiceServicer_to_server(self._handoffs, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._server = server
        await server.start()

    def _open_metrics(self, role_readers: RoleReaders) -> Metrics:
        read = {
            **readers(self.core, lambda: self._health_of, self.wiring.expiries),
            **expert_readers(self._runner.expert_load),
            **adapter_readers(self._adapters.counts, lambda: self._adapters.loads, self.core),
            **role_readers(self.core),
        }
        try:
            metrics = Metrics(self.settings.telemetry, Source(self.role), self.worker_id, read, tls=self.wiring.https())
        except MetricsEndpointError as error:
            raise WorkerStartError(str(error)) from error
        self.metrics_address = ""
        if metrics.port is not None:
            host = self.settings.telemetry.metrics_host
            if is_everywhere(host):
                host = host_of(self.address)
            self.metrics_address = join(host, metrics.port)
            log.info(
                "metrics at %s://%s/metrics", "https" if self.wiring.internal_tls else "http", self.metrics_address
            )
        return metrics

    def _introduce(self, peer: PeerId, address: str | None, mixes: bool) -> None:
        if peer.worker_id == self.worker_id:
            return
        if address is None:
            self._links.doubt(peer)
        else:
            self._links.introduce(peer, address, mixes=mixes)

    def _source_attached(self, hello: PeerHello) -> None:
        self._transport.connect(hello.peer, hello.endpoint)
        self.step_loop.post(SourceAttached(hello.peer, hello.layout_fingerprint != self.layout.fingerprint()))

    def _source_lost(self, peer: PeerId, reason: str) -> None:
        self._transport.disconnect(peer)  # until it is attached again, which also looks after the endpoint
        self.step_loop.post(SourceLost(peer, reason))

    def _source_gone(self, peer: PeerId) -> None:
        self._transport.forget(peer)
        self.step_loop.post(SourceGone(peer))

    def _card(self) -> WorkerCard:
        facts = self._runner.facts
        return WorkerCard(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=self.role,
            address=self.address,
            model=self.settings.engine.served_model_name or facts.name,
            layout_fingerprint=self.layout.fingerprint(),
            block_tokens=self.settings.engine.block_tokens,
            block_bytes=self.layout.growing_bytes,
            fixed_bytes=self.layout.fixed_bytes,
            total_blocks=self._runner.num_blocks[0],
            context_limit_tokens=facts.context_limit_tokens,
            vocab_size=facts.vocab_size,
            transport=self._transport.describe(),
            attention_backend=self._runner.describe_path() + self._overlap(),
            device=self._runner.describe_device(),
            metrics_address=self.metrics_address,
            model_identity=facts.identity,
            trial=str(self._runner.verdicts),
            dtype=" ".join(filter(None, ("+".join(sorted({g.dtype for g in self.layout.groups})), facts.scheme))),
            original_context_tokens=facts.original_context_tokens,
            kept_tokens=self.layout.kept_tokens,
            group=self.settings.worker.group,
            unquantized_identity=facts.unquantized,
            pairing_fingerprint=self.layout.pairing(),
            weights=facts.weights,
        )

    def _overlap(self) -> str:
        """A state is read by the next step as this one leaves it."""
        return ", overlapping steps" if self._launcher and not any(rule.state for rule in self.layout.rules) else ""

    # From the engine thread to the loop, one call for a whole step.

    def _deliver_soon(self, outbox: Outbox) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outbox)

    def _deliver(self, outbox: Outbox) -> None:
        try:
            self._service.deliver(outbox.links)
            self._handoffs.send(outbox.to_readers)
            self._links.send(outbox.to_sources)
        except Exception as error:  # somebody waits for what was lost here
            log.exception("messages of the engine were not delivered")
            self._break(error)
        for name, value, labels in outbox.observations:
            self._metrics.record(name, value, labels)
        if outbox.traces:
            emit(outbox.traces, self.worker_id)

    def _crashed_soon(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._break, error)

    # Breaking.

    def _break(self, error: BaseException) -> None:
        """Nobody computes here any more: break every stream now, so that routers and readers know at once."""
        if self.failed.done():
            return
        self.failed.set_result(error)
        self._withdrawing = asyncio.create_task(self._withdraw(f"worker {self.worker_id} broke: {error}"))
        self._withdrawing.add_done_callback(lambda _: self.withdrawn.done() or self.withdrawn.set_result(None))

    async def _withdraw(self, why: str) -> None:
        """The port goes on answering, NOT_SERVING and the cause, until the process ends."""
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            async with asyncio.timeout(_WITHDRAW_S):
                await asyncio.gather(
                    self._service.close(why),
                    self._handoffs.close(why),
                    self._registration.stop(),
                    self._links.stop(),
                )
        except TimeoutError:
            await self._server.stop(grace=0)  # somebody does not read

    # Watching.

    async def _watch(self, watchdog: Watchdog) -> None:
        suspected = ""
        pauses = PauseWatch(_LOOK_EVERY_S, _LOOK_EVERY_S, self._loop.time())
        while True:
            pauses.look(self._loop.time())
            self._guard.beat()
            if not self.failed.done():
                try:
                    suspected = self._look(watchdog, suspected)
                except Exception as error:  # a worker that nobody watches must not serve
                    log.exception("the watchdog failed")
                    self._break(error)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _watch_adapters(self) -> None:
        slots = self.core.adapters
        while slots is not None:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._adapters.look(frozenset(slots.lost))

    def _look(self, watchdog: Watchdog, suspected: str) -> str:
        """Returns the part that is suspected now."""
        verdict = watchdog.look(time.monotonic(), self._facts())
        name, why = self.worker_id, verdict.reason
        self._health_of = {part: float(verdict.health) * (part == verdict.part) for part in self._health_of}
        if verdict.health is Health.STALLED:
            self._break(WorkerStalled(why))
            log.critical("%s is stuck: %s. It ends now; stacks of all threads are on stderr", name, why)
            print_stacks()
        elif verdict.health is Health.SUSPECT and verdict.part != suspected:
            log.warning("%s may be stuck: %s. To see where: py-spy dump --pid %d", name, why, os.getpid())
        elif verdict.health is Health.OK and suspected:
            log.info("%s: the %s makes progress again", name, suspected)
        return verdict.part

    def _facts(self) -> Facts:
        engine, transport = self.step_loop, self._transport
        return Facts(
            engine_alive=engine.alive,
            engine_turn=engine.last_turn,
            step_since=engine.step_since,
            transport_alive=transport.alive,
            transport_turn=transport.last_turn,
            oldest_pull_since=transport.oldest_pull_since,
            late_ranks="" if self._runner.leader is None else self._runner.leader.waiting_for(),
            transport_of=transport.silent_rank,
        )

    def _watch_limits(self) -> Limits:
        config = self.settings.worker
        measured = self.core.rates.prefill_tokens_per_s
        step_s = step_limit_s(config.stall_s, self._limits.max_batch_tokens, measured)
        if step_s > config.stall_s:
            log.info("a full step takes about %.1f s here, so a step counts as stuck after %.0f s", step_s / 4, step_s)
        return Limits(step_s, config.transport_stall_s, self.settings.transport.pull_timeout_s)

    # Looks.

    async def _ask(self, question: Callable[[WorkerCore], bool]) -> bool:
        """Ask the core on its own thread."""
        answer: asyncio.Future[bool] = self._loop.create_future()

        def look(core: WorkerCore) -> None:
            value = question(core)
            self._loop.call_soon_threadsafe(lambda: answer.done() or answer.set_result(value))

        self.step_loop.call(look)
        try:
            async with asyncio.timeout(5.0):
                return await answer
        except TimeoutError:
            return False


async def start_worker(
    role: str,
    settings: WorkerSettings,
    build_core: Callable[[WorkerParts], WorkerCore],
    role_readers: RoleReaders,
    router_addresses: Callable[[], Iterable[str]] | None = None,
) -> RunningWorker:
    """Raises ModelLoadError or WorkerStartError, with cause and fix, before anything is registered."""
    worker = RunningWorker(role, settings)
    await worker.start(build_core, role_readers, router_addresses)
    return worker
