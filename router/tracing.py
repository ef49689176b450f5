"""One span per request, with its phases as children, through the OpenTelemetry API. Costs next to nothing when off.

Phases are drawn at the end from the request's own timeline, so that no token touches tracing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry import propagate, trace

from router.lifecycle import Life

_tracer = trace.get_tracer("diptych.router")


class RequestTrace:
    def __init__(self, request_id: str, carrier: Mapping[str, str] | None) -> None:
        context = propagate.extract(carrier) if carrier else None
        self._span = _tracer.start_span("generate", context=context, kind=trace.SpanKind.SERVER)
        self._context = trace.set_span_in_context(self._span)
        self.traceparent = ""
        if self._span.is_recording():
            self._span.set_attribute("diptych.request_id", request_id)
            headers: dict[str, str] = {}
            propagate.inject(headers, context=self._context)
            self.traceparent = headers.get("traceparent", "")

    def end(self, life: Life) -> None:
        if not self._span.is_recording():
            return
        span, times = self._span, life.times
        # The timeline is monotonic; a span wants wall-clock nanoseconds.
        offset_ns = time.time_ns() - int((times.ended or 0.0) * 1e9)

        def at(moment: float) -> int:
            return int(moment * 1e9) + offset_ns

        phases = (
            ("queue", life.request.arrived, times.dispatched),
            ("first_token", times.dispatched, times.first_token),
            ("handoff_gap" if life.route.split else "second_token", times.first_token, times.second_token),
            ("decode", times.second_token, times.last_token),
        )
        for name, start, end in phases:
            if start is not None and end is not None:
                child = _tracer.start_span(name, context=self._context, start_time=at(start))
                child.end(end_time=at(end))
        span.set_attribute("diptych.route", "split" if life.route.split else "local")
        span.set_attribute("diptych.rule", life.route.rule)
        span.set_attribute("diptych.outcome", life.outcome)
        span.set_attribute("diptych.recoveries", life.recoveries)
        span.set_attribute("gen_ai.usage.input_tokens", len(life.request.prompt))
        span.set_attribute("gen_ai.usage.output_tokens", len(life.emitted))
        span.end()
