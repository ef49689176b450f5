"""Metrics and traces of one process, started and stopped. What a collector does, or does not do, never slows serving:

spans and points wait in bounded queues, export runs on threads of its own, what does not fit is dropped, and stopping
waits `_LAST_S` for the last of it at most.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry

from settings.file import SettingsError
from settings.security import is_loopback
from settings.telemetry.catalog import Source
from settings.telemetry.config import TelemetryConfig
from settings.telemetry.endpoint import MetricsEndpoint, Targets, Tls
from settings.telemetry.instruments import Instruments, Reader
from settings.tls import DIRECT

log = logging.getLogger(__name__)

_LAST_S = 2.0


def set_up_tracing(service_name: str, config: TelemetryConfig, instance: str = "") -> bool:
    """Returns whether tracing is on. The packages use the API only, so that off costs next to nothing.

    Raises SettingsError.
    """
    endpoint = _endpoint(config, "TRACES")
    if not endpoint:
        return False
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    ratio = config.trace_ratio
    provider = TracerProvider(
        resource=_resource(service_name, instance),
        sampler=None if ratio is None else ParentBasedTraceIdRatio(ratio),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=_insecure(endpoint), channel_options=_options(endpoint))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return True


def end_tracing() -> None:
    """The last spans, within a bound."""
    _bounded(getattr(trace.get_tracer_provider(), "shutdown", lambda: None), "traces")


class Metrics:
    """`close` at the end. `port` is that of the endpoint, None without one."""

    def __init__(
        self,
        config: TelemetryConfig,
        source: Source,
        instance: str,
        readers: Mapping[str, Reader],
        targets: Targets | None = None,
        tls: Tls = None,
    ) -> None:
        """`tls` is used beyond loopback. Raises MetricsEndpointError when the port cannot be had."""
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import MetricReader

        self.registry = CollectorRegistry()
        metric_readers: list[MetricReader] = [PrometheusMetricReader(scope_info_enabled=False, registry=self.registry)]
        endpoint = _endpoint(config, "METRICS")
        if endpoint:
            metric_readers.append(_otlp_reader(endpoint))
        self._provider = MeterProvider(
            metric_readers, resource=_resource(f"diptych-{source}", instance), shutdown_on_exit=False
        )
        self._endpoint: MetricsEndpoint | None = None
        try:
            instruments = Instruments(self._provider.get_meter("diptych"), source, readers)
            if is_loopback(config.metrics_host):
                tls = None
            if config.metrics_port is not None:
                self._endpoint = MetricsEndpoint(self.registry, config.metrics_host, config.metrics_port, targets, tls)
        except BaseException:
            self.close()
            raise
        self.record = instruments.record

    @property
    def port(self) -> int | None:
        return None if self._endpoint is None else self._endpoint.port

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        _bounded(self._provider.shutdown, "metrics")


def _otlp_reader(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    return PeriodicExportingMetricReader(
        OTLPMetricExporter(endpoint=endpoint, insecure=_insecure(endpoint), channel_options=_options(endpoint))
    )


def check_telemetry(config: TelemetryConfig) -> None:
    """Raises SettingsError for what the environment asks for and nothing here does."""
    for signal in ("TRACES", "METRICS"):
        _endpoint(config, signal)


def _endpoint(config: TelemetryConfig, signal: str) -> str:
    """Where a signal goes; empty: nowhere. As the OTEL_* variables say, unless the settings name a collector."""
    exporter = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower()
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return ""
    if exporter not in ("", "otlp"):
        raise SettingsError(
            f"OTEL_{signal}_EXPORTER is {exporter}, and {signal.lower()} leave by OTLP only; set it to otlp, or to none"
        )
    own, common = f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
    endpoint = config.otlp_endpoint or os.environ.get(own, "") or os.environ.get(common, "")
    name = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    name = name if os.environ.get(name) else "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(name, "").strip().lower()
    if endpoint and protocol not in ("", "grpc"):
        raise SettingsError(
            f"{name} is {protocol}, and OTLP is spoken over gRPC only here; set it to grpc and the endpoint to the "
            f"collector's port for that, usually 4317 (now {endpoint})"
        )
    return endpoint


def _options(endpoint: str) -> Any:
    """No proxy stands between a process and its own machine."""
    host = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}").hostname or ""
    return DIRECT if is_loopback(host) else ()


def _insecure(endpoint: str) -> bool:
    return not endpoint.startswith("https://")


def _resource(service_name: str, instance: str) -> Resource:
    attributes = {"service.name": service_name}
    if instance:
        attributes["service.instance.id"] = instance
    return Resource.create(attributes)


def _bounded(call: Callable[[], object], what: str) -> None:
    """The collector may be gone, and its exporter patient."""
    thread = threading.Thread(target=call, name=f"last {what}", daemon=True)
    thread.start()
    thread.join(_LAST_S)
    if thread.is_alive():
        log.warning("the last %s did not reach the collector within %g s", what, _LAST_S)
