"""Protobuf between the router and its workers: commands out, registrations and steps in."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from diptych.v1 import cluster_pb2, generate_pb2, worker_pb2

from grammar.wire import structured_to_wire
from kv_transfer.wire import acceptance_to_wire
from router.errors import Code, refuse
from router.placement.adapter_words import MOST_GROUPS, MOST_NAME, MOST_PATH, AdaptersSaid, AdapterWord, said_at_start
from router.placement.cluster import BlockEvent, Role, WorkerInfo
from router.placement.policy import WorkerKey
from router.request import Beams, Finish, LegStart
from settings.listeners import Listener
from settings.versions import OURS, spoken

FINISH_FROM_WIRE = {
    generate_pb2.FINISH_REASON_STOP: Finish.STOP,
    generate_pb2.FINISH_REASON_LENGTH: Finish.LENGTH,
}
ROLES = {
    cluster_pb2.ROLE_PREFILL: Role.PREFILL,
    cluster_pb2.ROLE_DECODE: Role.DECODE,
    cluster_pb2.ROLE_STANDBY: Role.STANDBY,
}
EARLY_STOPPING_TO_WIRE: dict[bool | str, generate_pb2.EarlyStopping] = {
    False: generate_pb2.EARLY_STOPPING_NO,
    True: generate_pb2.EARLY_STOPPING_YES,
    "never": generate_pb2.EARLY_STOPPING_NEVER,
}
ROLES_TO_WIRE = {role: number for number, role in ROLES.items()}


_MAX_LISTENERS = 256
_MAX_ADAPTERS = 4096
_MAX_DIGEST = 64
_AHEAD_NS = 24 * 3600 * 10**9  # by which clocks may differ

# Towards workers.


def pack_tokens(tokens: Any) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def start_to_wire(
    start: LegStart, deadline_s: float, source_address: str, holder_address: str = ""
) -> worker_pb2.StartSequence:
    """Addresses of the worker that the KV comes from, and of the one that holds a prefix."""
    request, s = start.request, start.request.sampling
    if s.beams is not None:
        s = s.prompt_only if start.serve_handoff_id else s.searching
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
            allowed_token_ids=s.allowed_token_ids,
            bad_words=[generate_pb2.TokenIds(ids=word) for word in s.bad_words],
            prompt_logprobs=s.prompt_logprobs,
            structured=structured_to_wire(s.structured) if s.structured is not None else None,
            beams=None if s.beams is None else _beams_to_wire(s.beams),
        ),
        priority=request.priority,
        deadline_ms=max(1, int(deadline_s * 1e3)),
        cache_salt=request.cache_salt,
        adapter=request.adapter,
        mixed_kv=start.mixed_kv,
        acceptance=acceptance_to_wire(start.acceptance) if start.acceptance is not None else None,
        serve_handoff_id=start.serve_handoff_id,
        traceparent=request.traceparent,
    )
    if start.pull is not None:
        message.pull.CopyFrom(handoff_to_wire(start.pull, source_address))
        message.pull.most_tokens = start.most_tokens
        message.pull.mixes_weights = start.mixed_kv
    if start.due_ms is not None:
        message.due_ms = int(max(-(2.0**31), min(start.due_ms, 2.0**31 - 1)))
        message.put_back_weight = start.put_back_weight
    if start.prefix is not None:
        handoff_id, prefix = start.prefix
        message.prefix_pull.CopyFrom(handoff_to_wire((handoff_id, prefix.holder), holder_address))
        message.prefix_tokens = prefix.tokens
        message.prefix_wait_ms = max(1, int(min(prefix.wait_ms, 2.0**31)))
    return message


def _beams_to_wire(beams: Beams) -> worker_pb2.Beams:
    return worker_pb2.Beams(
        width=beams.width,
        answers=beams.answers,
        length_penalty=beams.length_penalty,
        early_stopping=EARLY_STOPPING_TO_WIRE[beams.early_stopping],
    )


def handoff_to_wire(pull: tuple[str, WorkerKey], source_address: str) -> worker_pb2.HandoffRef:
    handoff_id, source = pull
    return worker_pb2.HandoffRef(
        handoff_id=handoff_id,
        source_worker=source.worker_id,
        source_epoch=source.epoch,
        source_address=source_address,
    )


# From workers.


def info_from_wire(m: worker_pb2.RegisterRequest) -> WorkerInfo:
    """Raises RequestRefused for a worker that cannot be one."""
    if why := OURS.why_not(spoken(m), "this router", f"worker {m.worker_id}"):
        raise refuse(Code.FAILED_PRECONDITION, why)
    if m.role not in ROLES:
        why = f"role {m.role} does not exist; use 1 (prefill), 2 (decode), 3 (standby)"
        raise refuse(Code.INVALID_ARGUMENT, why, field="role")
    for name in ("worker_id", "address", "block_tokens", "total_blocks", "context_limit_tokens", "vocab_size"):
        if not getattr(m, name):
            raise refuse(Code.INVALID_ARGUMENT, f"the registration has no {name}; a worker names it", field=name)
    return WorkerInfo(
        key=WorkerKey(m.worker_id, m.epoch),
        role=ROLES[m.role],
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
        model_identity=m.model_identity,
        fixed_bytes=m.fixed_bytes,
        trial=m.trial,
        role_changes=m.role_changes,
        dtype=m.dtype,
        original_context_tokens=m.original_context_tokens,
        kept_tokens=m.kept_tokens,
        adapters=said_from_wire(m.adapters_said) if m.HasField("adapters_said") else _said_once(m),
        masks_tokens=m.masks_tokens,
        group=m.group,
        scores_prompts=m.scores_prompts,
        searches_beams=m.searches_beams,
        unquantized_identity=m.unquantized_identity,
        pairing_fingerprint=m.pairing_fingerprint,
        weights=m.weights,
    )


def _is_word(m: worker_pb2.Adapter, latest: int) -> bool:
    """Stamps are times of day in ns, and every command's is later than all that were heard of: none may use them up."""
    return (
        0 < len(m.name) <= MOST_NAME
        and len(m.digest) <= _MAX_DIGEST
        and len(m.directory) <= MOST_PATH
        and len(m.groups) <= MOST_GROUPS
        and m.stamp <= latest
    )


def said_from_wire(m: worker_pb2.AdaptersSaid) -> AdaptersSaid:
    """What no command can have said is left out."""
    latest = time.time_ns() + _AHEAD_NS
    return AdaptersSaid(
        tuple(word_from_wire(one) for one in m.adapters[:_MAX_ADAPTERS] if one.digest and _is_word(one, latest)),
        tuple((one.name, one.digest) for one in m.kept[:_MAX_ADAPTERS] if one.digest and _is_word(one, latest)),
        tuple((one.name, one.stamp) for one in m.gone[:_MAX_ADAPTERS] if _is_word(one, latest)),
        m.changes,
        m.takes_more,
    )


def _said_once(m: worker_pb2.RegisterRequest) -> AdaptersSaid:
    """Of a worker from before they came and went."""
    found = (one for one in m.adapters[:_MAX_ADAPTERS] if one.digest and _is_word(one, 0))
    return said_at_start(*((one.name, one.digest) for one in found))


def word_from_wire(m: worker_pb2.Adapter) -> AdapterWord:
    return AdapterWord(m.name, m.digest, m.directory, m.stamp, tuple(m.groups))


def word_to_wire(word: AdapterWord) -> worker_pb2.Adapter:
    return worker_pb2.Adapter(
        name=word.name, digest=word.digest, directory=word.directory, stamp=word.stamp, groups=word.groups
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
