"""worker.proto <-> worker/messages.py. Token ids travel as packed little-endian uint32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from diptych.v1 import cluster_pb2, generate_pb2, worker_pb2

from engine.beams import BeamParams, EarlyStopping
from engine.prompt_logprobs import PromptLogprobs
from engine.types import FinishReason, SamplingParams
from grammar.wire import structured_from_wire
from kv_transfer.handoff import PeerId, TokenLogprobs
from kv_transfer.paths import PathState
from kv_transfer.wire import acceptance_of, acceptance_to_wire
from worker.messages import (
    AdaptersSaid,
    AdapterWord,
    BlockChanges,
    CancelSequence,
    Command,
    ContinueLocally,
    FollowAnother,
    Freeze,
    HandoffRef,
    KeepRunning,
    LinkOutput,
    Load,
    PrefixPull,
    ResyncBlocks,
    ServeRunning,
    SetRole,
    StartSequence,
)

_REASONS = {
    FinishReason.STOP: generate_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
}


_PATH_STATES = {
    PathState.UNPROVEN: cluster_pb2.PATH_STATE_UNPROVEN,
    PathState.OK: cluster_pb2.PATH_STATE_OK,
    PathState.BROKEN: cluster_pb2.PATH_STATE_BROKEN,
}
ROLES_TO_WIRE = {
    "prefill": cluster_pb2.ROLE_PREFILL,
    "decode": cluster_pb2.ROLE_DECODE,
    "standby": cluster_pb2.ROLE_STANDBY,
}
_ROLES = {number: name for name, number in ROLES_TO_WIRE.items()}
_GAUGES = [name for name in Load.__dataclass_fields__ if name != "paths"]


def unpack_tokens(data: bytes) -> list[int]:
    """Raises ValueError if the length is not a multiple of four."""
    return np.frombuffer(data, dtype="<u4").tolist()


def pack_tokens(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def sampling_from_wire(m: worker_pb2.ResolvedSampling) -> SamplingParams:
    return SamplingParams(
        temperature=m.temperature,
        top_p=m.top_p,
        top_k=m.top_k,
        min_p=m.min_p,
        max_tokens=m.max_tokens,
        min_tokens=m.min_tokens,
        stop_token_ids=frozenset(m.stop_token_ids),
        seed=m.seed,
        repetition_penalty=m.repetition_penalty,
        presence_penalty=m.presence_penalty,
        frequency_penalty=m.frequency_penalty,
        logprobs=None if m.logprobs < 0 else m.logprobs,
        logit_bias=tuple(sorted(m.logit_bias.items())),
        allowed_token_ids=tuple(m.allowed_token_ids),
        bad_words=tuple(tuple(word.ids) for word in m.bad_words),
        prompt_logprobs=m.prompt_logprobs if m.HasField("prompt_logprobs") else None,
    )


def start_from_wire(m: worker_pb2.StartSequence) -> StartSequence:
    return StartSequence(
        sequence_id=m.sequence_id,
        request_id=m.request_id,
        prompt=unpack_tokens(m.prompt),
        emitted=unpack_tokens(m.emitted),
        sampling=sampling_from_wire(m.sampling),
        priority=m.priority,
        deadline_s=m.deadline_ms / 1e3 if m.deadline_ms else None,
        cache_salt=m.cache_salt,
        adapter=m.adapter,
        mixed_kv=m.mixed_kv,
        acceptance=acceptance_of(m),
        serve_handoff_id=m.serve_handoff_id,
        pull=handoff_from_wire(m.pull) if m.HasField("pull") else None,
        prefix_pull=PrefixPull(handoff_from_wire(m.prefix_pull), m.prefix_tokens, m.prefix_wait_ms / 1e3)
        if m.HasField("prefix_pull")
        else None,
        due_s=m.due_ms / 1e3 if m.HasField("due_ms") else None,
        put_back_weight=m.put_back_weight if 0.0 < m.put_back_weight < 1.0 else 1.0,
        traceparent=m.traceparent,
        structured=structured_from_wire(m.sampling.structured),
        beams=_beams_from_wire(m.sampling.beams) if m.sampling.HasField("beams") else None,
    )


_EARLY_STOPPING: dict[int, EarlyStopping] = {
    generate_pb2.EARLY_STOPPING_YES: True,
    generate_pb2.EARLY_STOPPING_NEVER: "never",
}


def _beams_from_wire(m: worker_pb2.Beams) -> BeamParams:
    early = _EARLY_STOPPING.get(m.early_stopping, False)
    return BeamParams(m.width, m.answers, m.length_penalty, early)


def handoff_from_wire(m: worker_pb2.HandoffRef) -> HandoffRef:
    return HandoffRef(m.handoff_id, PeerId(m.source_worker, m.source_epoch), m.source_address, m.most_tokens)


def handoffs_named(m: worker_pb2.ConnectRequest) -> Iterable[worker_pb2.HandoffRef]:
    """All of them, whatever they are for."""
    for start in (*m.starts, *m.follows):
        for field, value in start.ListFields():
            if field.message_type is worker_pb2.HandoffRef.DESCRIPTOR:
                yield value


def commands_from_wire(m: worker_pb2.ConnectRequest) -> tuple[Command, ...]:
    """Starts before continues before cancels, so that a cancel always finds what it cancels."""
    return (
        *(start_from_wire(s) for s in m.starts),
        *(ContinueLocally(c.sequence_id, unpack_tokens(c.emitted)) for c in m.continues),
        *(FollowAnother(f.sequence_id, unpack_tokens(f.emitted), handoff_from_wire(f.pull)) for f in m.follows),
        *(ServeRunning(s.sequence_id, s.handoff_id, s.most_tokens) for s in m.serves),
        *(Freeze(f.sequence_id, f.handoff_id) for f in m.freezes),
        *(KeepRunning(k.sequence_id, k.handoff_id) for k in m.keeps),
        *(CancelSequence(c.sequence_id, c.reason, c.keep_lease) for c in m.cancels),
        *((SetRole(_ROLES[m.set_role]),) if m.set_role in _ROLES else ()),
        *((ResyncBlocks(),) if m.resync_blocks else ()),
    )


def logprobs_to_wire(value: TokenLogprobs) -> generate_pb2.TokenLogprobs:
    return generate_pb2.TokenLogprobs(
        logprob=value.logprob,
        top=[generate_pb2.TopLogprob(token_id=t, logprob=p) for t, p in value.top],
    )


def prompt_logprobs_to_wire(value: PromptLogprobs) -> generate_pb2.PromptLogprobs:
    return generate_pb2.PromptLogprobs(
        position=value.position,
        logprobs=value.own.tolist(),
        ranks=value.ranks.tolist(),
        alternatives=value.ids.shape[1],
        top_token_ids=value.ids.reshape(-1).tolist(),
        top_logprobs=value.values.reshape(-1).tolist(),
    )


def _block_events(changes: BlockChanges) -> Iterable[worker_pb2.BlockEvent]:
    if changes.cleared:
        yield worker_pb2.BlockEvent(cleared=True)
    if changes.removed:
        yield worker_pb2.BlockEvent(removed=np.asarray(changes.removed, dtype="<u8").tobytes())
    if changes.stored:
        yield worker_pb2.BlockEvent(stored=np.asarray(changes.stored, dtype="<u8").tobytes())


def said_to_wire(said: AdaptersSaid) -> worker_pb2.AdaptersSaid:
    return worker_pb2.AdaptersSaid(
        adapters=[word_to_wire(word) for word in said.adapters],
        kept=[worker_pb2.Adapter(name=name, digest=digest) for name, digest in said.kept],
        gone=[worker_pb2.Adapter(name=name, stamp=stamp) for name, stamp in said.gone],
        changes=said.changes,
        takes_more=said.takes_more,
    )


def word_to_wire(word: AdapterWord) -> worker_pb2.Adapter:
    return worker_pb2.Adapter(
        name=word.name, digest=word.digest, directory=word.directory, stamp=word.stamp, groups=word.groups
    )


def word_from_wire(m: worker_pb2.Adapter) -> AdapterWord:
    return AdapterWord(m.name, m.digest, m.directory, m.stamp, tuple(m.groups))


def load_to_wire(load: Load) -> cluster_pb2.WorkerLoad:
    message = cluster_pb2.WorkerLoad(**{name: getattr(load, name) for name in _GAUGES})
    for path in load.paths:
        message.paths.add(
            source_worker=path.source.worker_id,
            source_epoch=path.source.epoch,
            state=_PATH_STATES[path.state],
            probe_ms=path.probe_ms,
            failures=path.failures,
            detail=path.detail,
        )
    return message


def output_to_wire(output: LinkOutput, epoch: int, now: float) -> worker_pb2.ConnectResponse:
    """One step of one link, as it leaves `now`. Block changes are contiguous; a snapshot is a message of its own."""
    message = worker_pb2.ConnectResponse(
        epoch=epoch,
        sequence_ids=output.sequence_ids,
        positions=output.positions,
        token_ids=output.token_ids,
        draining=output.draining,
    )
    for sequence_id, position, value in output.logprobs:
        message.logprobs.add(sequence_id=sequence_id, position=position, logprobs=logprobs_to_wire(value))
    for sequence_id, found in output.prompt_logprobs:
        message.prompt_logprobs.add(sequence_id=sequence_id, logprobs=prompt_logprobs_to_wire(found))
    for sequence_id, answers in output.beams:
        message.beams.add(
            sequence_id=sequence_id,
            answers=[
                worker_pb2.BeamAnswer(token_ids=pack_tokens(a.token_ids), score=a.score, stopped=a.stopped)
                for a in answers
            ],
        )
    for end in output.ends:
        message.ends.add(
            sequence_id=end.sequence_id,
            reason=generate_pb2.FINISH_REASON_ERROR if end.code else _REASONS[end.reason] if end.reason else 0,
            cached_tokens=end.cached_tokens,
            handed_over=end.reason is None and not end.code,
            error=end.error,
            code=end.code,
        )
    for failure in output.handoff_failures:
        message.handoff_failures.add(
            sequence_id=failure.sequence_id,
            reason=failure.reason,
            detail=failure.detail,
            kept_tokens=failure.kept_tokens,
            handoff_id=failure.handoff_id,
        )
    for adopted in output.adoptions:
        message.adoptions.add(
            sequence_id=adopted.sequence_id,
            pulled_bytes=adopted.pulled_bytes,
            cached_tokens=adopted.cached_tokens,
            kv_early_share=adopted.kv_early_share,
            adopt_ms=adopted.adopt_ms,
            handoff_id=adopted.handoff_id,
            transfer_ms=adopted.transfer_ms,
        )
    for sequence_id, drafted in output.drafted.items():
        message.drafted.add(
            sequence_id=sequence_id,
            verifications=drafted.verified,
            drafts=drafted.proposed,
            accepted=drafted.kept,
            acceptance=acceptance_to_wire(drafted.acceptance) if drafted.acceptance is not None else None,
        )
    for caught_up in output.caught_up:
        message.caught_up.add(sequence_id=caught_up.sequence_id, handoff_id=caught_up.handoff_id)
    for first in output.first_steps:
        message.first_steps.add(
            sequence_id=first.sequence_id,
            held_ms=first.held_s * 1e3,
            queue_ms=first.queue_s * 1e3,
            prefill_ms=first.prefill_s * 1e3,
            prefill_wait_ms=first.prefill_wait_s * 1e3,
            send_ms=max(0.0, now - first.sampled_at) * 1e3,
        )
    if output.blocks:
        message.block_events.first_sequence_number = output.blocks[0].first_sequence_number
        for changes in output.blocks:
            message.block_events.events.extend(_block_events(changes))
    if output.role is not None:
        message.role, message.role_changes = ROLES_TO_WIRE[output.role.role], output.role.changes
    if output.load is not None:
        message.load.CopyFrom(load_to_wire(output.load))
    return message
