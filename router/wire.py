"""generate.proto, cluster.proto and worker.proto <-> the router's own values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from diptych.v1 import cluster_pb2, generate_pb2, worker_pb2
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from grammar.structured import Structured
from grammar.wire import structured_from_wire, structured_to_wire
from router.admission import RawRequest, RawSampling, check_counts
from router.breakdown import FirstStep
from router.chat import Chat, ChatMessage, ToolCall
from router.cluster import BlockEvent, Role, WorkerEntry, WorkerInfo, WorkerState
from router.dispatcher import Dispatcher
from router.errors import Code, Failure, refuse
from router.history import Decided, Explained
from router.lifecycle import Finish, LegStart, Life
from router.policy import Placement, Route, WorkerKey
from settings.listeners import Listener

_PLACEMENTS = {
    generate_pb2.PLACEMENT_UNSPECIFIED: Placement.AUTO,
    generate_pb2.PLACEMENT_AUTO: Placement.AUTO,
    generate_pb2.PLACEMENT_LOCAL: Placement.LOCAL,
    generate_pb2.PLACEMENT_SPLIT: Placement.SPLIT,
}
_PLACEMENTS_TO_WIRE = {
    Placement.LOCAL: generate_pb2.PLACEMENT_LOCAL,
    Placement.SPLIT: generate_pb2.PLACEMENT_SPLIT,
}
FINISH_TO_WIRE = {
    Finish.STOP: generate_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    Finish.CANCELLED: generate_pb2.FINISH_REASON_CANCELLED,
}
FINISH_FROM_WIRE = {
    generate_pb2.FINISH_REASON_STOP: Finish.STOP,
    generate_pb2.FINISH_REASON_LENGTH: Finish.LENGTH,
}
_ROLES = {cluster_pb2.ROLE_PREFILL: Role.PREFILL, cluster_pb2.ROLE_DECODE: Role.DECODE}
_ROLES_TO_WIRE = {role: number for number, role in _ROLES.items()}
_STATES = {
    WorkerState.CONNECTING: cluster_pb2.WORKER_STATE_CONNECTING,
    WorkerState.READY: cluster_pb2.WORKER_STATE_READY,
    WorkerState.DRAINING: cluster_pb2.WORKER_STATE_DRAINING,
    WorkerState.LOST: cluster_pb2.WORKER_STATE_LOST,
}


def request_from_wire(m: generate_pb2.GenerateRequest) -> RawRequest:
    """Raises RequestRefused for what RawRequest cannot express, or not within bounds."""
    s = m.sampling
    check_counts(
        chat_messages=len(m.chat.messages),
        stop=len(s.stop),
        stop_token_ids=len(s.stop_token_ids),
        logit_bias=len(s.logit_bias),
        choices=len(s.structured.choice.options),
    )
    if m.placement not in _PLACEMENTS:
        known = ", ".join(name for name, number in generate_pb2.Placement.items() if number in _PLACEMENTS)
        raise refuse(
            Code.INVALID_ARGUMENT, f"placement {m.placement} does not exist; use one of {known}", field="placement"
        )

    def optional(name: str) -> Any:
        return getattr(s, name) if s.HasField(name) else None

    kind = m.WhichOneof("prompt")
    return RawRequest(
        request_id=m.request_id,
        model=m.model,
        text=m.text if kind == "text" else None,
        token_ids=m.token_ids.ids if kind == "token_ids" else None,
        chat=chat_from_wire(m.chat) if kind == "chat" else None,
        sampling=RawSampling(
            temperature=optional("temperature"),
            top_p=optional("top_p"),
            top_k=optional("top_k"),
            min_p=optional("min_p"),
            max_tokens=optional("max_tokens"),
            min_tokens=optional("min_tokens"),
            stop=tuple(s.stop),
            stop_token_ids=tuple(s.stop_token_ids),
            seed=optional("seed"),
            repetition_penalty=optional("repetition_penalty"),
            presence_penalty=optional("presence_penalty"),
            frequency_penalty=optional("frequency_penalty"),
            logprobs=optional("logprobs"),
            ignore_eos=s.ignore_eos,
            logit_bias=dict(s.logit_bias),
            structured=_structured(s.structured) if s.HasField("structured") else None,
        ),
        priority=m.priority,
        deadline_ms=m.deadline_ms,
        cache_salt=m.cache_salt,
        placement=_PLACEMENTS[m.placement],
        prompt_cache_key=m.prompt_cache_key,
        emitted_token_ids=m.emitted_token_ids,
    )


def chat_from_wire(m: generate_pb2.ChatMessages) -> Chat:
    messages = [
        ChatMessage(
            c.role,
            c.content,
            c.name,
            tuple(ToolCall(t.id, t.name, t.arguments_json) for t in c.tool_calls),
            c.tool_call_id,
        )
        for c in m.messages
    ]
    return Chat(messages, m.tools_json, m.chat_template_kwargs_json)


def _structured(m: generate_pb2.StructuredOutput) -> Structured:
    found = structured_from_wire(m)
    if found is None:
        raise refuse(
            Code.INVALID_ARGUMENT,
            "structured names no format; set json_schema, json_object (true), regex, lark or choice, or leave it out",
            field="structured",
        )
    return found


def route_to_wire(route: Route | Decided) -> generate_pb2.Route:
    return generate_pb2.Route(
        placement=generate_pb2.PLACEMENT_SPLIT if route.split else generate_pb2.PLACEMENT_LOCAL,
        decode_worker=route.decode.worker_id,
        prefill_worker=route.prefill.worker_id if route.prefill else "",
        rule=route.rule,
        estimates=[generate_pb2.Estimate(name=k, value=v) for k, v in route.estimates.items()],
    )


def started_to_wire(life: Life) -> generate_pb2.Started:
    return generate_pb2.Started(
        request_id=life.request.request_id,
        route=route_to_wire(life.route),
        prompt_tokens=len(life.request.prompt),
        seed=life.request.sampling.seed,
        text=life.resumed_text,
    )


def _ms(start: float | None, end: float | None) -> float:
    return (end - start) * 1e3 if start is not None and end is not None else 0.0


def timings_to_wire(life: Life) -> generate_pb2.Timings:
    return _timings(life, life.request.arrived, split=life.route.split)


def _timings(of: Life | Explained, arrived: float, *, split: bool) -> generate_pb2.Timings:
    t = of.times
    return generate_pb2.Timings(
        **{f"{part}_ms": ms for part, ms in of.breakdown.ttft_parts_ms(arrived, t.dispatched, t.first_token).items()},
        gap_step_ms=of.breakdown.gap_step_ms if split else 0.0,
        queue_ms=_ms(arrived, t.dispatched),
        ttft_ms=_ms(arrived, t.first_token),
        handoff_gap_ms=_ms(t.first_token, t.second_token) if split else 0.0,
        decode_ms=_ms(t.first_token, t.last_token),
        total_ms=_ms(arrived, t.ended),
        kv_early_share=of.kv_early_share,
        adopt_ms=of.adopt_ms,
    )


def finished_to_wire(life: Life, reason: Finish) -> generate_pb2.Finished:
    return generate_pb2.Finished(
        reason=FINISH_TO_WIRE[reason],
        usage=generate_pb2.Usage(
            prompt_tokens=len(life.request.prompt),
            cached_tokens=life.cached_tokens,
            completion_tokens=len(life.emitted),
        ),
        timings=timings_to_wire(life),
        route=route_to_wire(life.route),
        recoveries=life.recoveries,
    )


_MAX_MESSAGE_BYTES = 1024
_MAX_LISTENERS = 256


def _shortened(message: str) -> str:
    """A status travels in the trailing metadata, up to five times over, and gRPC cuts a call off at 8 KiB of it."""
    data = message.encode()
    if len(data) <= _MAX_MESSAGE_BYTES:
        return message
    return f"{data[: _MAX_MESSAGE_BYTES - 3].decode(errors='ignore')}..."


def status_of(failure: Failure) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    message = _shortened(failure.message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=failure.code.name, domain="diptych")]
    if failure.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=failure.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if failure.retry_after_ms:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(failure.retry_after_ms)
        details.append(retry)
    packed = []
    for detail in details:
        one = any_pb2.Any()
        one.Pack(detail)
        packed.append(one)
    return status_pb2.Status(code=int(failure.code), message=message, details=packed)


# Towards workers.


def pack_tokens(tokens: Any) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def start_to_wire(
    start: LegStart, deadline_s: float, source_address: str, holder_address: str = ""
) -> worker_pb2.StartSequence:
    """Addresses of the worker that the KV comes from, and of the one that holds a prefix."""
    request, s = start.request, start.request.sampling
    message = worker_pb2.StartSequence(
        sequence_id=start.leg,
        request_id=request.request_id,
        prompt=pack_tokens(request.prompt),
        emitted=pack_tokens(start.emitted),
        sampling=worker_pb2.ResolvedSampling(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            stop_token_ids=s.stop_token_ids,
            seed=s.seed,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            logprobs=-1 if s.logprobs is None else s.logprobs,
            logit_bias=dict(s.logit_bias),
            structured=structured_to_wire(s.structured) if s.structured is not None else None,
        ),
        priority=request.priority,
        deadline_ms=max(1, int(deadline_s * 1e3)),
        cache_salt=request.cache_salt,
        serve_handoff_id=start.serve_handoff_id,
        traceparent=request.traceparent,
    )
    if start.pull is not None:
        message.pull.CopyFrom(handoff_to_wire(start.pull, source_address))
    if start.due_ms is not None:
        message.due_ms = int(max(-(2.0**31), min(start.due_ms, 2.0**31 - 1)))
    if start.prefix is not None:
        handoff_id, prefix = start.prefix
        message.prefix_pull.CopyFrom(handoff_to_wire((handoff_id, prefix.holder), holder_address))
        message.prefix_tokens = prefix.tokens
        message.prefix_wait_ms = max(1, int(min(prefix.wait_ms, 2.0**31)))
    return message


def handoff_to_wire(pull: tuple[str, WorkerKey], source_address: str) -> worker_pb2.HandoffRef:
    handoff_id, source = pull
    return worker_pb2.HandoffRef(
        handoff_id=handoff_id,
        source_worker=source.worker_id,
        source_epoch=source.epoch,
        source_address=source_address,
    )


# From workers.


def hear(dispatcher: Dispatcher, key: WorkerKey, message: worker_pb2.ConnectResponse, now: float) -> None:
    """One step of one worker: adoptions first, then tokens, then what ended. `flush` is the caller's."""
    cluster = dispatcher.cluster
    for adopted in message.adoptions:
        dispatcher.on_adopted(adopted.sequence_id, adopted.handoff_id, adopted.kv_early_share, adopted.adopt_ms)
        dispatcher.on_transferred(adopted.sequence_id, adopted.pulled_bytes, adopted.transfer_ms)
    for first in message.first_steps:
        said = FirstStep(first.held_ms, first.queue_ms, first.prefill_ms, first.prefill_wait_ms, first.send_ms)
        dispatcher.on_first_step(first.sequence_id, said)
    if message.sequence_ids:
        logprobs: dict[tuple[int, int], object] = {(p.sequence_id, p.position): p.logprobs for p in message.logprobs}
        dispatcher.on_tokens(message.sequence_ids, message.positions, message.token_ids, logprobs)
    for end in message.ends:
        if end.reason == generate_pb2.FINISH_REASON_ERROR:
            dispatcher.on_error(end.sequence_id, _code(end.code), end.error)
        else:
            reason = None if end.handed_over else FINISH_FROM_WIRE[end.reason]
            dispatcher.on_end(end.sequence_id, reason, end.cached_tokens)
    for f in message.handoff_failures:
        dispatcher.on_handoff_failed(f.sequence_id, f.handoff_id, f.reason, f.detail, f.kept_tokens)
    if message.HasField("load"):
        broken = frozenset(
            WorkerKey(p.source_worker, p.source_epoch)
            for p in message.load.paths
            if p.state == cluster_pb2.PATH_STATE_BROKEN
        )
        cluster.reported(key, message.load, now, broken)
    if message.HasField("block_events"):
        events = message.block_events
        if not cluster.block_events(key, events.first_sequence_number, block_events_from_wire(events)):
            dispatcher.resync_blocks(key)
    if message.draining:
        cluster.draining(key)


def _code(number: int) -> Code:
    try:
        return Code(number)
    except ValueError:
        return Code.INTERNAL


def info_from_wire(m: worker_pb2.RegisterRequest) -> WorkerInfo:
    """Raises RequestRefused for a worker that cannot be one."""
    if m.role not in _ROLES:
        raise refuse(Code.INVALID_ARGUMENT, f"role {m.role} does not exist; use 1 (prefill), 2 (decode)", field="role")
    for name in ("worker_id", "address", "block_tokens", "total_blocks", "context_limit_tokens", "vocab_size"):
        if not getattr(m, name):
            raise refuse(Code.INVALID_ARGUMENT, f"the registration has no {name}; a worker names it", field=name)
    return WorkerInfo(
        key=WorkerKey(m.worker_id, m.epoch),
        role=_ROLES[m.role],
        address=m.address,
        model=m.model,
        layout_fingerprint=m.layout_fingerprint,
        block_tokens=m.block_tokens,
        block_bytes=m.block_bytes,
        total_blocks=m.total_blocks,
        context_limit_tokens=m.context_limit_tokens,
        vocab_size=m.vocab_size,
        transport=m.transport,
        attention_backend=m.attention_backend,
        device=m.device,
        listeners=tuple(
            Listener(one.address, one.protocol, one.authentication, one.encrypted)
            for one in m.listeners[:_MAX_LISTENERS]
        ),
        metrics_address=m.metrics_address,
    )


def block_events_from_wire(m: worker_pb2.BlockEvents) -> list[BlockEvent]:
    """Bytes beyond the last whole entry say nothing."""
    events: list[BlockEvent] = []
    for event in m.events:
        match event.WhichOneof("event"):
            case "stored":
                events.append(("stored", _runs(event.stored)))
            case "removed":
                removed = event.removed
                events.append(("removed", np.frombuffer(removed[: len(removed) // 8 * 8], dtype="<u8").tolist()))
            case _:
                events.append(("cleared", None))
    return events


def _runs(data: bytes) -> list[tuple[int, list[int]]]:
    """Blocks that follow one another, joined: (the hint before the first, hints)."""
    rows = np.frombuffer(data[: len(data) // 16 * 16], dtype="<u8").tolist()
    runs: list[tuple[int, list[int]]] = []
    last = -1
    for hint, before in zip(rows[::2], rows[1::2], strict=True):
        if before != last:
            runs.append((before, []))
        runs[-1][1].append(hint)
        last = hint
    return runs


# For the eye.


def listeners_to_wire(found: Iterable[Listener]) -> list[cluster_pb2.Listener]:
    return [cluster_pb2.Listener(**dataclasses.asdict(one)) for one in found]


def worker_to_wire(entry: WorkerEntry, now: float) -> cluster_pb2.Worker:
    info = entry.info
    return cluster_pb2.Worker(
        worker_id=info.key.worker_id,
        epoch=info.key.epoch,
        role=_ROLES_TO_WIRE[info.role],
        address=info.address,
        state=_STATES[entry.state],
        load=entry.load or cluster_pb2.WorkerLoad(total_blocks=info.total_blocks, free_blocks=info.total_blocks),
        transport=info.transport,
        attention_backend=info.attention_backend,
        device=info.device,
        metrics_address=info.metrics_address,
        report_age_ms=(now - entry.reported_at) * 1e3 if entry.reported_at else 0.0,
        dispatched_requests=len(entry.legs),
        listeners=listeners_to_wire(info.listeners),
    )


def explained_to_wire(explained: Explained, now: float) -> cluster_pb2.Explanation:
    message = cluster_pb2.Explanation(
        request=cluster_pb2.RecentRequest(
            request_id=explained.request_id,
            route=route_to_wire(explained.decisions[-1]),
            prompt_tokens=explained.prompt_tokens,
            completion_tokens=explained.completion_tokens,
            timings=_timings(explained, explained.arrived, split=explained.decisions[-1].split),
            outcome=explained.outcome,
            cached_tokens=explained.cached_tokens,
            recoveries=explained.recoveries,
            age_ms=(now - explained.arrived) * 1e3,
        ),
        predictions=[
            cluster_pb2.Prediction(name=p.name, predicted_ms=p.predicted_ms, actual_ms=p.actual_ms)
            for p in explained.predictions
        ],
    )
    for decided in explained.decisions:
        decision = message.decisions.add(route=route_to_wire(decided), cost_ms=decided.cost_ms)
        if decided.pull is not None:
            decision.prefix_holder = decided.pull.holder.worker_id
            decision.prefix_tokens = decided.pull.tokens
        for other in decided.alternatives:
            decision.alternatives.add(
                placement=_PLACEMENTS_TO_WIRE[other.placement],
                decode_worker=other.decode.worker_id,
                prefill_worker=other.prefill.worker_id if other.prefill else "",
                ttft_ms=other.ttft_ms,
                cost_ms=other.cost_ms,
            )
    return message


def recent_to_wire(lives: Iterable[Life], now: float) -> list[cluster_pb2.RecentRequest]:
    return [
        cluster_pb2.RecentRequest(
            request_id=life.request.request_id,
            route=route_to_wire(life.route),
            prompt_tokens=len(life.request.prompt),
            completion_tokens=len(life.emitted),
            timings=timings_to_wire(life),
            outcome=life.outcome,
            cached_tokens=life.cached_tokens,
            recoveries=life.recoveries,
            age_ms=(now - life.request.arrived) * 1e3,
        )
        for life in lives
    ]
