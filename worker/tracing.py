"""A worker's part of a request's trace, by the OpenTelemetry API; costs nothing for requests that are not traced."""

from __future__ import annotations

import time
from collections.abc import Iterable

from opentelemetry import propagate, trace

from worker.timeline import SequenceTrace

_tracer = trace.get_tracer("diptych.worker")


def emit(traces: Iterable[SequenceTrace], worker_id: str) -> None:
    """One span per sequence under the router's span, its phases as children. Times are monotonic seconds."""
    offset_ns = time.time_ns() - time.monotonic_ns()

    def at(moment: float) -> int:
        return int(moment * 1e9) + offset_ns

    for one in traces:
        parent = propagate.extract({"traceparent": one.traceparent})
        attributes: dict[str, str | int] = {
            "diptych.request_id": one.request_id,
            "diptych.worker_id": worker_id,
            "diptych.leg": one.leg,
            "diptych.outcome": one.outcome,
            "gen_ai.usage.input_tokens": one.prompt_tokens,
            "gen_ai.usage.output_tokens": one.output_tokens,
        }
        span = _tracer.start_span("sequence", context=parent, start_time=at(one.start), attributes=attributes)
        context = trace.set_span_in_context(span)
        for phase in one.phases:
            child = _tracer.start_span(phase.name, context=context, start_time=at(phase.start))
            for chunk in phase.chunks:
                child.add_event("chunk", {"diptych.tokens": chunk.tokens}, timestamp=at(chunk.at))
            child.end(end_time=at(phase.end))
        span.end(end_time=at(one.end))
