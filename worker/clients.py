"""Registration: "here I am", to every router, for as long as the worker lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
from diptych.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

from settings.listeners import listeners
from settings.tasks import vital
from settings.tls import INSECURE, Wiring
from settings.versions import OURS, spoken
from worker.messages import AdaptersSaid, RoleSaid
from worker.wire import ROLES_TO_WIRE, said_to_wire

log = logging.getLogger(__name__)

_RPC_TIMEOUT_S = 2.0
_RETRY_S = 0.5
_OTHER_VERSION_S = 5.0
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """What a worker tells routers about itself. `role` is "prefill", "decode" or "standby": what it starts with."""

    worker_id: str
    epoch: int
    role: str
    address: str
    model: str
    layout_fingerprint: str
    block_tokens: int
    block_bytes: int
    total_blocks: int
    context_limit_tokens: int
    vocab_size: int
    transport: str
    attention_backend: str
    device: str
    metrics_address: str = ""
    model_identity: str = ""
    fixed_bytes: int = 0
    trial: str = ""
    dtype: str = ""
    original_context_tokens: int = 0  # longer sequences share no KV with shorter ones; 0: they do
    kept_tokens: int = 0
    group: str = ""  # of its pool
    unquantized_identity: str = ""
    pairing_fingerprint: str = ""
    weights: str = ""  # their scheme


class Registration:
    """Keeps one worker registered with the routers that `addresses()` names, as that set changes."""

    def __init__(
        self,
        card: WorkerCard,
        addresses: Callable[[], Iterable[str]],
        wiring: Wiring = INSECURE["worker"],
        role: Callable[[], RoleSaid | None] = lambda: None,
        adapters: Callable[[], AdaptersSaid] = AdaptersSaid,
    ) -> None:
        """`role`, `adapters`: as they are now; no role: the card's."""
        self._adapters = adapters
        self._telling: asyncio.Task[None] | None = None
        self._card = card
        self._role = role
        self._wiring = wiring
        self._addresses = addresses
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._routers: dict[str, str] = {}  # that take requests, by the address where we are registered
        self.leaving = False

    def start(self) -> None:
        self._watch = vital(self._follow_addresses(), "following the routers' addresses")

    async def leave(self) -> None:
        """Tell every router that no new work is wanted; heartbeats go on saying so."""
        self.leaving = True
        await asyncio.gather(*(self._register_once(address) for address in list(self._tasks)), return_exceptions=True)

    def soon(self) -> None:
        """Something has changed that routers should not hear of with the next heartbeat only."""
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_all())

    async def _tell_all(self) -> None:
        await asyncio.sleep(0)  # what else changes now
        await asyncio.gather(*(self._register_once(address) for address in list(self._tasks)), return_exceptions=True)

    async def stop(self) -> None:
        tasks = [*self._tasks.values(), *filter(None, (self._watch, self._telling))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _follow_addresses(self) -> None:
        while True:
            wanted = set(self._addresses())
            for address in wanted - self._tasks.keys():
                self._tasks[address] = vital(self._keep(address), f"registering with router {address}")
            for address in self._tasks.keys() - wanted:
                self._tasks.pop(address).cancel()
                self._routers.pop(address, None)
            await asyncio.sleep(1.0)

    async def _keep(self, address: str) -> None:
        complaint = ""
        while True:
            try:
                await self._until_new_certificate(address)
                complaint = ""
            except Exception as error:  # certificates that cannot be read, among others: a worker must stay findable
                if repr(error) != complaint:
                    complaint = repr(error)
                    log.exception("registering with router %s failed here; trying again", address)
                await asyncio.sleep(_RETRY_S)

    async def _until_new_certificate(self, address: str) -> None:
        known, complaint, began = False, "", time.monotonic()
        opened_with = self._wiring.stamp()
        async with self._wiring.channel(address, "router", _OPTIONS) as channel:
            stub = worker_pb2_grpc.RegistryServiceStub(channel)
            while opened_with == self._wiring.stamp():  # a new certificate takes a new channel
                try:
                    answer = await stub.Register(self._request(), timeout=_RPC_TIMEOUT_S, metadata=self._wiring.proof())
                    why = OURS.why_not(spoken(answer), "this worker", f"the router at {address}")
                    if why and why != complaint:
                        log.error("not registered: %s", why)
                    elif not why and not known:
                        took_s = time.monotonic() - began
                        log.info("registered with router %s at %s, after %.1f s", answer.router_id, address, took_s)
                    known, complaint = not why, why
                    self._heard(address, "" if why or answer.leaving else answer.router_id)
                    wait_s = _OTHER_VERSION_S if why else max(answer.heartbeat_ms, 100) / 1e3
                except grpc.aio.AioRpcError as error:
                    said = f"{error.code().name} {error.details()}"
                    if said != complaint and (known or error.code() is not grpc.StatusCode.UNAVAILABLE):
                        log.warning("router %s: %s", address, said)
                        complaint = said
                    if known:
                        known, began = False, time.monotonic()
                    self._heard(address, "")
                    wait_s = _RETRY_S
                await asyncio.sleep(wait_s)

    def _heard(self, address: str, router_id: str) -> None:
        if router_id:
            self._routers[address] = router_id
        else:
            self._routers.pop(address, None)

    async def _register_once(self, address: str) -> None:
        async with self._wiring.channel(address, "router") as channel:
            await worker_pb2_grpc.RegistryServiceStub(channel).Register(
                self._request(), timeout=_RPC_TIMEOUT_S, metadata=self._wiring.proof()
            )

    def _request(self) -> worker_pb2.RegisterRequest:
        card = self._card
        role = self._role() or RoleSaid(card.role)
        said = self._adapters()
        return worker_pb2.RegisterRequest(
            worker_id=card.worker_id,
            epoch=card.epoch,
            role=ROLES_TO_WIRE[role.role],
            role_changes=role.changes,
            address=card.address,
            model=card.model,
            layout_fingerprint=card.layout_fingerprint,
            block_tokens=card.block_tokens,
            block_bytes=card.block_bytes,
            total_blocks=card.total_blocks,
            context_limit_tokens=card.context_limit_tokens,
            vocab_size=card.vocab_size,
            transport=card.transport,
            attention_backend=card.attention_backend,
            device=card.device,
            leaving=self.leaving,
            listeners=[
                cluster_pb2.Listener(
                    address=one.address,
                    protocol=one.protocol,
                    authentication=one.authentication,
                    encrypted=one.encrypted,
                )
                for one in listeners()
            ],
            metrics_address=card.metrics_address,
            model_identity=card.model_identity,
            fixed_bytes=card.fixed_bytes,
            trial=card.trial,
            dtype=card.dtype,
            routers=sorted(set(self._routers.values())),
            protocol=OURS.version,
            oldest_protocol=OURS.oldest,
            original_context_tokens=card.original_context_tokens,
            kept_tokens=card.kept_tokens,
            adapters=[worker_pb2.Adapter(name=word.name, digest=word.digest) for word in said.adapters],
            adapters_said=said_to_wire(said),
            group=card.group,
            masks_tokens=True,
            scores_prompts=True,
            searches_beams=True,
            unquantized_identity=card.unquantized_identity,
            pairing_fingerprint=card.pairing_fingerprint,
            weights=card.weights,
        )
