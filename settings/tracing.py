"""OpenTelemetry: on when a collector is named, by configuration or by OTEL_EXPORTER_OTLP_ENDPOINT."""

from __future__ import annotations

import os


def set_up_tracing(service_name: str, endpoint: str = "") -> bool:
    """Returns whether tracing is on. The packages use the API only, so that off costs next to nothing."""
    endpoint = endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not endpoint:
        return False
    import atexit

    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    insecure = not endpoint.startswith("https://")
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=insecure)))
    trace.set_tracer_provider(provider)
    atexit.register(provider.shutdown)
    return True
