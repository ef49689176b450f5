"""One span per request, with its phases as children, through the OpenTelemetry API. Costs next to nothing when off.

    generate [arrived .. ended]        GenAI attributes, the parts of the time to first token, route, rule, outcome
      queue         arrived .. dispatched
      first_token   dispatched .. first token        the workers' `sequence` spans hang below `generate`, beside these
      handoff_gap   first token .. second            of a split request
      decode        first (split: second) .. last token
      recovery      fault known .. next token        one for each, with what was done

Phases are drawn at the end from the request's own timeline, so that no token touches tracing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry import propagate, trace

from router.errors import Failure
from router.lifecycle import Life
from router.request import Finish

_tracer = trace.get_tracer("diptych.router")
_FINISHED = frozenset(finish.value for finish in Finish)


class RequestTrace:
    """Ends by `end` or `refuse`. A context that is malformed is ignored: the request begins a trace of its own."""

    def __init__(self, request_id: str, carrier: Mapping[str, str] | None) -> None:
        context = propagate.extract(carrier) if carrier else None
        self._span = _tracer.start_span("generate", context=context, kind=trace.SpanKind.SERVER)
        self.traceparent = ""
        if self._span.is_recording():
            self._context = trace.set_span_in_context(self._span)
            self._span.set_attribute("diptych.request_id", request_id)
            headers: dict[str, str] = {}
            propagate.inject(headers, context=self._context)
            self.traceparent = headers.get("traceparent", "")

    @property
    def trace_id(self) -> str:
        """Empty when the request is not traced."""
        return self.traceparent.split("-")[1] if self.traceparent else ""

    def refuse(self, failure: Failure) -> None:
        """Before any work."""
        if self._span.is_recording():
            self._fail(failure.code.name, failure.message)
            self._span.end()

    def end(self, life: Life) -> None:
        span, times = self._span, life.times
        if not span.is_recording():
            return
        # The timeline is monotonic; a span wants wall-clock nanoseconds.
        offset_ns = time.time_ns() - int((times.ended or 0.0) * 1e9)

        def draw(name: str, start: float | None, end: float | None, **attributes: str | float) -> None:
            if start is not None and end is not None:
                child = _tracer.start_span(
                    name,
                    context=self._context,
                    start_time=int(start * 1e9) + offset_ns,
                    attributes={f"diptych.{key}": value for key, value in attributes.items()},
                )
                child.end(end_time=int(end * 1e9) + offset_ns)

        split = life.route.split
        draw("queue", life.request.arrived, times.dispatched)
        draw("first_token", times.dispatched, times.first_token)
        if split:
            draw("handoff_gap", times.first_token, times.second_token, adopt_ms=life.adopt_ms)
        draw("decode", times.second_token if split else times.first_token, times.last_token)
        for recovery in life.breakdown.recoveries:
            draw("recovery", recovery.at, recovery.until or times.ended, kind=recovery.kind.value)
        span.set_attributes(_attributes(life))
        if life.outcome not in _FINISHED:
            self._fail(life.outcome, "")
        span.end()

    def _fail(self, error_type: str, message: str) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(trace.StatusCode.ERROR, message[:200] or error_type)


def _attributes(life: Life) -> dict[str, str | int | float | tuple[str, ...]]:
    sampling, route = life.request.sampling, life.route
    attributes: dict[str, str | int | float | tuple[str, ...]] = {
        "gen_ai.operation.name": life.request.operation,
        "gen_ai.provider.name": "diptych",
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.response.finish_reasons": (life.outcome,),
        "gen_ai.usage.input_tokens": len(life.request.prompt),
        "gen_ai.usage.cache_read.input_tokens": life.cached_tokens,
        "gen_ai.usage.output_tokens": life.answered_tokens,
        "diptych.route": "split" if route.split else "local",
        "diptych.rule": route.rule,
        "diptych.decode_worker": route.decode.worker_id,
        "diptych.prefill_worker": route.prefill.worker_id if route.prefill else "",
        "diptych.outcome": life.outcome,
        "diptych.recoveries": life.recoveries,
        "diptych.transfer.bytes": life.breakdown.pulled_bytes,
        "diptych.transfer.ms": life.breakdown.transfer_ms,
        "diptych.kv_early_share": life.kv_early_share,
    }
    for part, milliseconds in life.ttft_parts_ms().items():
        attributes[f"diptych.ttft.{part}_ms"] = milliseconds
    if life.times.first_token is not None:
        attributes["diptych.ttft_ms"] = (life.times.first_token - life.request.arrived) * 1e3
    return attributes
