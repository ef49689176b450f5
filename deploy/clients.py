"""The command line's side of the stubs. Small and synchronous, without retries; programs use `diptych.client`."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from diptych.client import addresses_of
from diptych.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    generate_pb2,
    generate_pb2_grpc,
    scaling_pb2,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.access import Access, AccessError, access_from
from deploy.config import ClusterConfig
from settings.addresses import from_here, join
from settings.tls import Wiring

_COMMAND_S = 60.0
_TELL_S = 5.0
_CONNECT_S = 2.0  # to one router, before another is tried
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]

PLACEMENTS = {
    "auto": generate_pb2.PLACEMENT_AUTO,
    "local": generate_pb2.PLACEMENT_LOCAL,
    "split": generate_pb2.PLACEMENT_SPLIT,
}
ROLE_NAMES = {
    cluster_pb2.ROLE_PREFILL: "prefill",
    cluster_pb2.ROLE_DECODE: "decode",
    cluster_pb2.ROLE_STANDBY: "standby",
}
ROLES = {name: number for number, name in ROLE_NAMES.items()}
STATE_NAMES = {
    cluster_pb2.WORKER_STATE_CONNECTING: "connecting",
    cluster_pb2.WORKER_STATE_READY: "ready",
    cluster_pb2.WORKER_STATE_DRAINING: "draining",
    cluster_pb2.WORKER_STATE_LOST: "lost",
}
SCALING_OUTCOMES = {
    scaling_pb2.SCALING_OUTCOME_DRY_RUN: "dry run",
    scaling_pb2.SCALING_OUTCOME_UNCHANGED: "unchanged",
    scaling_pb2.SCALING_OUTCOME_APPLIED: "applied",
    scaling_pb2.SCALING_OUTCOME_FAILED: "failed",
}
PATH_BROKEN = cluster_pb2.PATH_STATE_BROKEN
FINISH_NAMES = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


class RequestFailed(Exception):
    """`code` is the gRPC status name; the message names cause and fix."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def channel_to(target: str, access: Access | None = None) -> grpc.Channel:
    """To a router's public port; of several ("a:8100,b:8100") to one that is there. Raises AccessError."""
    *others, last = shuffled(target)
    access = access or access_from()
    for address in others:
        channel = access.channel(address, _OPTIONS)
        try:
            grpc.channel_ready_future(channel).result(_CONNECT_S)
            return channel
        except grpc.FutureTimeoutError:
            channel.close()
    return access.channel(last, _OPTIONS)


def shuffled(target: str) -> list[str]:
    """Whoever calls once begins anywhere. Raises AccessError."""
    try:
        addresses = list(addresses_of(target))
    except ValueError as error:
        raise AccessError(f"--{error}") from None
    random.shuffle(addresses)
    return addresses


def inside_channel(config: ClusterConfig, address: str = "") -> grpc.Channel:
    """To a router of a cluster of this machine, on the port that is for its workers. Raises TlsError."""
    wiring = Wiring(config.security, "router")
    address = address or join(from_here(config.router.internal_host), config.router.internal_port)
    channel = wiring.blocking_channel(address, "router", _OPTIONS)
    return Access(member=wiring.proof).introduce(channel)


def health_of(target: str, timeout_s: float) -> str:
    """SERVING, NOT_SERVING, or UNREACHABLE. Raises AccessError."""
    with channel_to(target) as channel:
        return health_over(channel, timeout_s)


def health_over(channel: grpc.Channel, timeout_s: float) -> str:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(), timeout=timeout_s
        )
    except grpc.RpcError:
        return "UNREACHABLE"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def all_ready(config: ClusterConfig, internal: str = "") -> bool:
    """The router with this internal address would answer, and every worker that was asked for has joined it."""
    with inside_channel(config, internal) as channel:
        if health_over(channel, 1.0) != "SERVING":
            return False
        try:
            workers = get_cluster(channel, 2.0).workers
        except RequestFailed:
            return False
    ready = [ROLE_NAMES.get(w.role) for w in workers if w.state == cluster_pb2.WORKER_STATE_READY]
    return all(ready.count(role) >= pool.replicas for role, pool in config.pools.items())


@dataclass(slots=True)
class Answer:
    """One finished request, as the client saw it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    started: Any = None
    finished: Any = None
    sent_at: float = 0.0
    token_times: list[float] = field(default_factory=list)

    @property
    def split(self) -> bool:
        return self.started.route.placement == generate_pb2.PLACEMENT_SPLIT

    @property
    def tokens_per_s(self) -> float:
        decode_s = self.finished.timings.decode_ms / 1e3
        return (len(self.token_ids) - 1) / decode_s if decode_s > 0 else 0.0


def build_request(
    prompt: str,
    *,
    chat: bool,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    placement: str = "auto",
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    logit_bias: Mapping[int, float] | None = None,
    json_schema: str | None = None,
    regex: str | None = None,
    choice: Sequence[str] = (),
) -> generate_pb2.GenerateRequest:
    request = generate_pb2.GenerateRequest(placement=PLACEMENTS[placement])
    if chat:
        request.chat.messages.add(role="user", content=prompt)
    else:
        request.text = prompt
    sampling = request.sampling
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    if temperature is not None:
        sampling.temperature = temperature
    if seed is not None:
        sampling.seed = seed
    sampling.stop.extend(stop)
    sampling.ignore_eos = ignore_eos
    for token_id, bias in (logit_bias or {}).items():
        sampling.logit_bias[token_id] = bias
    if json_schema is not None:
        sampling.structured.json_schema = json_schema
    if regex is not None:
        sampling.structured.regex = regex
    if choice:
        sampling.structured.choice.options.extend(choice)
    return request


def generate(
    channel: grpc.Channel, request: generate_pb2.GenerateRequest, timeout_s: float, answer: Answer
) -> Iterator[str]:
    """Yields text as it comes and fills `answer`, which may have a beginning. Raises RequestFailed."""
    heard_chars = 0  # an attempt says the text from its beginning

    def new(text: str) -> str:
        nonlocal heard_chars
        known = len(answer.text) - heard_chars
        heard_chars += len(text)
        more = text[known:] if known > 0 else text
        answer.text += more
        return more

    answer.sent_at = answer.sent_at or time.monotonic()
    call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=timeout_s)
    try:
        for response in call:
            match response.WhichOneof("event"):
                case "started":
                    answer.started = response.started
                    yield new(response.started.text)
                case "tokens":
                    answer.token_ids += response.tokens.token_ids
                    answer.token_times += [time.monotonic()] * len(response.tokens.token_ids)
                    yield new(response.tokens.text)
                case "finished":
                    answer.finished = response.finished
    except grpc.RpcError as error:
        raise RequestFailed(error.code().name, error.details() or "no details") from None  # type: ignore[attr-defined]
    finally:
        call.cancel()


def generate_anywhere(
    target: str, request: generate_pb2.GenerateRequest, timeout_s: float, answer: Answer
) -> Iterator[str]:
    """As `generate`; what breaks at one router goes on at the next, behind what has come. Raises RequestFailed."""
    deadline = time.monotonic() + timeout_s
    addresses = shuffled(target)
    for number, address in enumerate(addresses, 1):
        try:
            with channel_to(address) as channel:
                yield from generate(channel, request, max(0.001, deadline - time.monotonic()), answer)
            return
        except RequestFailed as error:
            if error.code != "UNAVAILABLE" or number == len(addresses):
                raise
            if answer.token_ids:
                request.emitted_token_ids[:] = answer.token_ids
                request.sampling.seed = answer.started.seed
                request.revision = answer.started.revision


def get_cluster(channel: grpc.Channel, timeout_s: float) -> cluster_pb2.Cluster:
    """Raises RequestFailed."""
    try:
        return (
            cluster_pb2_grpc.ClusterServiceStub(channel)
            .GetCluster(cluster_pb2.GetClusterRequest(), timeout=timeout_s)
            .cluster
        )
    except grpc.RpcError as error:
        raise RequestFailed(error.code().name, error.details() or "no details") from None  # type: ignore[attr-defined]


def get_explanation(channel: grpc.Channel, request_id: str, timeout_s: float) -> cluster_pb2.Explanation:
    """Of the newest request, if none is named. Raises RequestFailed."""
    request = cluster_pb2.ExplainRequest(request_id=request_id)
    try:
        return cluster_pb2_grpc.ClusterServiceStub(channel).Explain(request, timeout=timeout_s).explanation
    except grpc.RpcError as error:
        raise RequestFailed(error.code().name, error.details() or "no details") from None  # type: ignore[attr-defined]


def watch_cluster(channel: grpc.Channel, interval_ms: int) -> Iterator[cluster_pb2.Cluster]:
    """Raises RequestFailed."""
    try:
        request = cluster_pb2.WatchClusterRequest(interval_ms=interval_ms)
        for response in cluster_pb2_grpc.ClusterServiceStub(channel).WatchCluster(request):
            yield response.cluster
    except grpc.RpcError as error:
        raise RequestFailed(error.code().name, error.details() or "no details") from None  # type: ignore[attr-defined]


# An operator's commands. Each raises RequestFailed.


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise RequestFailed(error.code().name, error.details() or "no details") from None  # type: ignore[attr-defined]


def switch_role(channel: grpc.Channel, worker_id: str, role: str, *, force: bool) -> admin_pb2.SwitchRoleResponse:
    request = admin_pb2.SwitchRoleRequest(worker_id=worker_id, role=ROLES[role], force=force)  # type: ignore[arg-type]
    with _told():
        return admin_pb2_grpc.AdminServiceStub(channel).SwitchRole(request, timeout=_COMMAND_S)


def drain_worker(
    channel: grpc.Channel, worker_id: str, timeout_s: float, *, force: bool
) -> Iterator[admin_pb2.DrainWorkerResponse]:
    """The last one is `done`."""
    request = admin_pb2.DrainWorkerRequest(worker_id=worker_id, force=force, timeout_ms=int(timeout_s * 1e3))
    with _told():
        yield from admin_pb2_grpc.AdminServiceStub(channel).DrainWorker(request, timeout=timeout_s + _COMMAND_S)


def migrate(channel: grpc.Channel, request_id: str, target_worker: str) -> cluster_pb2.Migration:
    request = admin_pb2.MigrateRequest(request_id=request_id, target_worker=target_worker)
    with _told():
        return admin_pb2_grpc.AdminServiceStub(channel).Migrate(request, timeout=_COMMAND_S).migration


def scale(channel: grpc.Channel, wanted: Mapping[str, int], *, force: bool, dry_run: bool) -> admin_pb2.ScaleResponse:
    request = admin_pb2.ScaleRequest(**wanted, force=force, dry_run=dry_run)
    with _told():
        return admin_pb2_grpc.AdminServiceStub(channel).Scale(request, timeout=_COMMAND_S)


def list_adapters(channel: grpc.Channel) -> Sequence[admin_pb2.ServedAdapter]:
    with _told():
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        return stub.ListAdapters(admin_pb2.ListAdaptersRequest(), timeout=_COMMAND_S).adapters


def load_adapter(
    channel: grpc.Channel, name: str, directory: str, groups: Sequence[str], timeout_s: float
) -> admin_pb2.LoadAdapterResponse:
    request = admin_pb2.LoadAdapterRequest(
        name=name, directory=directory, groups=groups, timeout_ms=int(timeout_s * 1e3)
    )
    with _told():
        return admin_pb2_grpc.AdminServiceStub(channel).LoadAdapter(request, timeout=timeout_s + _TELL_S)


def unload_adapter(channel: grpc.Channel, name: str) -> admin_pb2.UnloadAdapterResponse:
    request = admin_pb2.UnloadAdapterRequest(name=name)
    with _told():
        return admin_pb2_grpc.AdminServiceStub(channel).UnloadAdapter(request, timeout=_COMMAND_S + _TELL_S)


def tell_scaling(channel: grpc.Channel, decision: scaling_pb2.ScalingDecision) -> None:
    request = admin_pb2.TellScalingRequest(decision=decision)
    with _told():
        admin_pb2_grpc.AdminServiceStub(channel).TellScaling(request, timeout=_TELL_S)


def get_scaling(channel: grpc.Channel, last: int, *, changes_only: bool = False) -> cluster_pb2.GetScalingResponse:
    request = cluster_pb2.GetScalingRequest(last=last, changes_only=changes_only)
    with _told():
        return cluster_pb2_grpc.ClusterServiceStub(channel).GetScaling(request, timeout=_TELL_S)
