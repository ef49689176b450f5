"""Protobuf of the public services to and from what the router works with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from diptych.v1 import cluster_pb2, generate_pb2, scaling_pb2
from google.protobuf.message import DecodeError

from grammar.structured import Structured
from grammar.wire import structured_from_wire
from router.admission import RawRequest, RawSampling, check_counts
from router.beams import beams_of
from router.breakdown import Breakdown
from router.errors import Code, refuse
from router.lifecycle import Life
from router.placement.cluster import WorkerEntry, WorkerState
from router.placement.mixing import Mixing
from router.placement.policy import Placement, Route
from router.placement.revisions import revision_of
from router.record.history import Decided, Explained
from router.record.moved import Moved
from router.record.scaled import Point, Scaled, ScalingLog, Sized, Wish
from router.request import Beams, Finish
from router.text.chat import Chat, ChatMessage, ToolCall
from router.wire import EARLY_STOPPING_TO_WIRE, ROLES_TO_WIRE
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
        allowed_token_ids=len(s.allowed_token_ids),
        bad_words=len(s.bad_words),
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
            prompt_logprobs=optional("prompt_logprobs"),
            ignore_eos=s.ignore_eos,
            logit_bias=dict(s.logit_bias),
            allowed_token_ids=tuple(s.allowed_token_ids),
            bad_words=tuple(s.bad_words),
            include_stop=s.include_stop_str_in_output,
            skip_special=optional("skip_special_tokens") is not False,
            structured=_structured(s.structured) if s.HasField("structured") else None,
            beams=_beams(m) if m.HasField("beam_search") else None,
        ),
        priority=m.priority,
        deadline_ms=m.deadline_ms,
        cache_salt=m.cache_salt,
        placement=_PLACEMENTS[m.placement],
        prompt_cache_key=m.prompt_cache_key,
        emitted_token_ids=m.emitted_token_ids,
        revision=m.revision if m.emitted_token_ids else "",
        truncate_prompt_tokens=m.truncate_prompt_tokens if m.HasField("truncate_prompt_tokens") else None,
    )


_EARLY_STOPPING: dict[int, bool | str] = {number: word for word, number in EARLY_STOPPING_TO_WIRE.items()}


def _beams(m: generate_pb2.GenerateRequest) -> Beams:
    asked = m.beam_search
    if asked.early_stopping not in _EARLY_STOPPING:
        known = ", ".join(generate_pb2.EarlyStopping.keys())
        why = f"early_stopping {asked.early_stopping} does not exist; use one of {known}"
        raise refuse(Code.INVALID_ARGUMENT, why, field="early_stopping")
    penalty = asked.length_penalty if asked.HasField("length_penalty") else None
    return beams_of(max(1, m.n), m.best_of or None, penalty, _EARLY_STOPPING[asked.early_stopping])


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
    return Chat(
        messages,
        m.tools_json,
        m.chat_template_kwargs_json,
        generation_prompt=m.add_generation_prompt if m.HasField("add_generation_prompt") else None,
        continue_final=m.continue_final_message,
    )


def _structured(m: generate_pb2.StructuredOutput) -> Structured:
    found = structured_from_wire(m)
    if found is None:
        raise refuse(
            Code.INVALID_ARGUMENT,
            "structured names no format; set json_schema, json_object (true), regex, lark or choice, or leave it out",
            field="structured",
        )
    return found


def prompt_logprobs_to_wire(life: Life) -> generate_pb2.PromptLogprobs | None:
    """None: it has none, or not all of them."""
    if life.prompt_logprobs is None or not life.prompt_logprobs.complete:
        return None
    scores = life.prompt_logprobs.scores()
    return generate_pb2.PromptLogprobs(
        position=1,
        token_ids=np.asarray(life.request.prompt[1:]).tolist(),
        logprobs=scores.own.tolist(),
        ranks=scores.ranks.tolist(),
        alternatives=scores.ids.shape[1],
        top_token_ids=scores.ids.reshape(-1).tolist(),
        top_logprobs=scores.values.reshape(-1).tolist(),
    )


def route_to_wire(route: Route | Decided, mix: Mixing | None = None) -> generate_pb2.Route:
    return generate_pb2.Route(
        placement=generate_pb2.PLACEMENT_SPLIT if route.split else generate_pb2.PLACEMENT_LOCAL,
        decode_worker=route.decode.worker_id,
        prefill_worker=route.prefill.worker_id if route.prefill else "",
        rule=route.rule,
        estimates=[generate_pb2.Estimate(name=k, value=v) for k, v in route.estimates.items()],
        mixed_weights=() if mix is None else mix.mixed,
    )


def started_to_wire(life: Life) -> generate_pb2.Started:
    return generate_pb2.Started(
        request_id=life.request.request_id,
        route=route_to_wire(life.route, life.breakdown.mix),
        prompt_tokens=len(life.request.prompt),
        seed=life.request.sampling.seed,
        text=life.resumed_text,
        revision=life.request.answered_by,
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


def _speculation(breakdown: Breakdown) -> generate_pb2.Speculation | None:
    found = breakdown.speculation
    return None if found is None else generate_pb2.Speculation(**dataclasses.asdict(found))


def finished_to_wire(life: Life, reason: Finish) -> generate_pb2.Finished:
    return generate_pb2.Finished(
        reason=FINISH_TO_WIRE[reason],
        usage=generate_pb2.Usage(
            prompt_tokens=len(life.request.prompt),
            cached_tokens=life.cached_tokens,
            completion_tokens=len(life.emitted),
        ),
        timings=timings_to_wire(life),
        route=route_to_wire(life.route, life.breakdown.mix),
        recoveries=life.recoveries,
        speculation=_speculation(life.breakdown),
    )


# For the eye.


def listeners_to_wire(found: Iterable[Listener]) -> list[cluster_pb2.Listener]:
    return [cluster_pb2.Listener(**dataclasses.asdict(one)) for one in found]


def worker_to_wire(entry: WorkerEntry, now: float) -> cluster_pb2.Worker:
    info = entry.info
    return cluster_pb2.Worker(
        worker_id=info.key.worker_id,
        epoch=info.key.epoch,
        role=ROLES_TO_WIRE[entry.role],
        address=info.address,
        state=_STATES[entry.state],
        load=entry.load or cluster_pb2.WorkerLoad(total_blocks=info.total_blocks, free_blocks=info.total_blocks),
        transport=info.transport,
        attention_backend=info.attention_backend,
        device=info.device,
        trial=info.trial,
        metrics_address=info.metrics_address,
        report_age_ms=(now - entry.reported_at) * 1e3 if entry.reported_at else 0.0,
        dispatched_requests=len(entry.legs),
        listeners=listeners_to_wire(info.listeners),
        revision=revision_of(info),
        group=info.group,
    )


def migration_to_wire(moved: Moved, now: float) -> cluster_pb2.Migration:
    migration, took_s = moved.migration, moved.took_s
    message = cluster_pb2.Migration(
        request_id=moved.request_id,
        source_worker=migration.source.worker_id,
        target_worker=migration.target.worker_id,
        reason=migration.why,
        outcome=migration.outcome,
        pulled_bytes=migration.pulled_bytes,
        age_ms=(now - migration.at) * 1e3,
        took_ms=0.0 if took_s is None else took_s * 1e3,
        frozen_ms=0.0 if migration.frozen_at is None else (migration.frozen_at - migration.at) * 1e3,
    )
    if migration.pause_s is not None:
        message.pause_ms = migration.pause_s * 1e3
    return message


def explained_to_wire(explained: Explained, now: float) -> cluster_pb2.Explanation:
    message = cluster_pb2.Explanation(
        request=cluster_pb2.RecentRequest(
            request_id=explained.request_id,
            route=route_to_wire(explained.decisions[-1], explained.breakdown.mix),
            prompt_tokens=explained.prompt_tokens,
            completion_tokens=explained.completion_tokens,
            timings=_timings(explained, explained.arrived, split=explained.decisions[-1].split),
            outcome=explained.outcome,
            cached_tokens=explained.cached_tokens,
            recoveries=explained.recoveries,
            age_ms=(now - explained.arrived) * 1e3,
            migrations=sum(m.done for m in explained.breakdown.migrations),
            speculation=_speculation(explained.breakdown),
        ),
        migrations=[migration_to_wire(Moved(explained.request_id, m), now) for m in explained.breakdown.migrations],
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
            route=route_to_wire(life.route, life.breakdown.mix),
            prompt_tokens=len(life.request.prompt),
            completion_tokens=len(life.emitted),
            timings=timings_to_wire(life),
            outcome=life.outcome,
            cached_tokens=life.cached_tokens,
            recoveries=life.recoveries,
            age_ms=(now - life.request.arrived) * 1e3,
            migrations=sum(m.done for m in life.breakdown.migrations),
            speculation=_speculation(life.breakdown),
        )
        for life in lives
    ]


# Scaling.

_MOST_DECISION_BYTES = 32 << 10
_LONGEST_AGE_MS, _LONGEST_INTERVAL_S = 86_400_000.0, 3600.0
_MOST_NAME_CHARS = 200
_MOST_DECISIONS = 384


def scaled_from_wire(m: scaling_pb2.ScalingDecision, now: float) -> Scaled:
    """Raises RequestRefused for what cannot be a decision."""
    m.DiscardUnknownFields()
    problem, field = _scaling_problem(m)
    if problem:
        raise refuse(Code.INVALID_ARGUMENT, problem, field=f"decision.{field}" if field else "decision")
    before, wanted, ready = (Sized(c.prefill, c.decode, c.standby) for c in (m.before, m.after, m.ready))
    return Scaled(
        at=now - m.age_ms / 1e3,
        decider=m.decider,
        number=m.number,
        interval_s=m.interval_s,
        rule=m.rule,
        error=m.error,
        dry_run=m.outcome == scaling_pb2.SCALING_OUTCOME_DRY_RUN,
        changes=before[:2] != wanted[:2] or bool(m.shifted or m.woken or m.started or m.stopped or m.withdrawn),
        wanted=wanted,
        ready=ready,
        held_gpus=m.numbers.get("held_gpus", 0.0),
        budget_gpus=m.numbers.get("budget_gpus", 0.0),
        message=m,
    )


def scaled_from_bytes(data: bytes, late_s: float, now: float) -> Scaled:
    """`late_s`: how long it lay somewhere on its way. Raises RequestRefused."""
    try:
        message = scaling_pb2.ScalingDecision.FromString(data[: _MOST_DECISION_BYTES + 1])
    except DecodeError:
        raise refuse(Code.INVALID_ARGUMENT, "this is no ScalingDecision; send such a message") from None
    message.age_ms += max(0.0, late_s) * 1e3
    return scaled_from_wire(message, now)


def _scaling_problem(m: scaling_pb2.ScalingDecision) -> tuple[str, str]:
    """What is wrong, and the field."""
    if m.ByteSize() > _MOST_DECISION_BYTES:
        return f"a decision of {m.ByteSize()} bytes is too large; send at most {_MOST_DECISION_BYTES}", ""
    for name in ("decider", "rule"):
        if not 0 < len(getattr(m, name)) <= _MOST_NAME_CHARS:
            return f"{name} has {len(getattr(m, name))} characters; use 1..{_MOST_NAME_CHARS}", name
    if not 0 <= m.age_ms <= _LONGEST_AGE_MS:
        return f"age_ms is {m.age_ms:g}; use 0..{_LONGEST_AGE_MS:.0f}", "age_ms"
    if not 0 < m.interval_s <= _LONGEST_INTERVAL_S:
        return f"interval_s is {m.interval_s:g}; use more than 0 and at most {_LONGEST_INTERVAL_S:.0f}", "interval_s"
    if not all(math.isfinite(value) for value in m.numbers.values()):
        return "a number is not finite; leave it out", "numbers"
    if any(math.isnan(x) for a in m.alternatives for x in (a.prefill_strain, a.decode_strain, a.takes_s)):
        return "an alternative has a value that is no number; leave it out", "alternatives"
    return "", ""


def wish_to_wire(wish: Wish | None, now: float) -> cluster_pb2.ScaleWish | None:
    if wish is None:
        return None
    age_ms = (now - wish.at) * 1e3
    return cluster_pb2.ScaleWish(number=wish.number, age_ms=age_ms, prefill=wish.prefill, decode=wish.decode)


def scaling_to_wire(
    log: ScalingLog, asked: cluster_pb2.GetScalingRequest, now: float
) -> cluster_pb2.GetScalingResponse:
    found = log.last(min(asked.last or 16, _MOST_DECISIONS), notable=asked.changes_only)
    return cluster_pb2.GetScalingResponse(
        current=_scaled_to_wire(log.current, now) if log.current is not None else None,
        decisions=[_scaled_to_wire(one, now) for one in found],
        points=[_point_to_wire(point, now) for point in log.points(now)],
        decisions_total=log.told_total,
        errors_total=log.errors_total,
    )


def _scaled_to_wire(scaled: Scaled, now: float) -> scaling_pb2.ScalingDecision:
    message = scaling_pb2.ScalingDecision()
    message.CopyFrom(scaled.message)
    message.age_ms = (now - scaled.at) * 1e3
    return message


def _point_to_wire(point: Point, now: float) -> scaling_pb2.ScalingPoint:
    return scaling_pb2.ScalingPoint(
        age_ms=(now - point.at) * 1e3,
        wanted=scaling_pb2.ScalingCounts(**point.wanted._asdict()),
        ready=scaling_pb2.ScalingCounts(**point.ready._asdict()),
        held_gpus=point.held_gpus,
    )
