"""The endpoint, collectors that are not there, and log lines."""

from __future__ import annotations

import errno
import http.client
import io
import json
import logging
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge

from deploy.certificates import make_all
from settings.file import SettingsError
from settings.security import SecurityConfig
from settings.telemetry import endpoint as endpoint_module
from settings.telemetry import setup
from settings.telemetry.catalog import Kind, Source, of_source
from settings.telemetry.config import TelemetryConfig
from settings.telemetry.endpoint import MetricsEndpoint, MetricsEndpointError
from settings.telemetry.logs import JsonFormatter, TextFormatter
from settings.telemetry.setup import Metrics
from settings.tls import Wiring

READERS = {m.name: (list) for m in of_source(Source.PREFILL) if m.kind is not Kind.HISTOGRAM}


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    registry = CollectorRegistry()
    Gauge("answer", "of all", registry=registry).set(42)
    served = MetricsEndpoint(registry, "127.0.0.1", 0, lambda: [{"targets": ["a:1"], "labels": {"role": "decode"}}])
    yield served
    served.close()


def _get(served: MetricsEndpoint, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}{path}", timeout=5) as answer:
        return answer.read()


def test_the_endpoint_answers_what_it_has_and_nothing_else(endpoint: MetricsEndpoint) -> None:
    assert b"answer 42.0" in _get(endpoint, "/metrics")
    assert json.loads(_get(endpoint, "/targets")) == [{"targets": ["a:1"], "labels": {"role": "decode"}}]
    for path in ("/", "/../etc/passwd", "/metrics/x"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _get(endpoint, path)
        assert refused.value.code == 404
        refused.value.close()


def test_a_port_in_use_is_named_with_its_key(endpoint: MetricsEndpoint) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MetricsEndpointError, match=r"telemetry\.metrics_port"):
            MetricsEndpoint(CollectorRegistry(), "127.0.0.1", port)


def test_idle_strangers_hold_a_bounded_number_of_connections(endpoint: MetricsEndpoint) -> None:
    idle = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(endpoint_module._MAX_CONNECTIONS)]
    try:
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=5) as one_more:
            assert one_more.recv(1) == b""  # closed at once: no thread was spent on it
    finally:
        for connection in idle:
            connection.close()


def test_a_dead_collector_delays_neither_recording_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "_LAST_S", 0.2)
    with socket.socket() as silent:  # it accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = TelemetryConfig(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", metrics_port=None)
        metrics = Metrics(config, Source.PREFILL, "p-0", READERS)
        for _ in range(1000):
            metrics.record("diptych.queue.duration", 0.01)
        metrics.close()  # returns: the test's own timeout is the bound
    assert metrics.port is None


def test_the_standard_variables_choose_where_signals_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:4317")
    config = TelemetryConfig()
    assert setup._endpoint(config, "TRACES") == "http://traces:4317"
    assert setup._endpoint(config, "METRICS") == "http://all:4317"
    assert setup._endpoint(TelemetryConfig(otlp_endpoint="http://own:4317"), "METRICS") == "http://own:4317"
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert setup._endpoint(config, "METRICS") == ""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert setup._endpoint(config, "TRACES") == ""


def _logged(formatter: logging.Formatter) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("router.dispatcher")
    logger.addHandler(handler)
    try:
        raise RuntimeError("broke\nin two lines")
    except RuntimeError:
        logger.exception("request %s failed\nbadly", "r1", extra={"request_id": "r1", "leg": 7})
    return stream.getvalue()


def test_a_json_log_line_is_one_line_and_names_what_it_is_about() -> None:
    text = _logged(JsonFormatter("diptych-router"))
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line["message"] == "request r1 failed\nbadly"
    assert (line["level"], line["logger"], line["service"]) == ("error", "router.dispatcher", "diptych-router")
    assert (line["request_id"], line["leg"]) == ("r1", 7)
    assert "RuntimeError: broke" in line["exception"]
    assert line["time"].endswith("Z")


def test_a_text_log_line_names_it_too() -> None:
    assert "[request_id=r1 leg=7]" in _logged(TextFormatter())


def test_inside_the_cluster_the_endpoint_shows_and_demands_its_certificates(tmp_path: Path) -> None:
    make_all(tmp_path, [], 1.0)
    section = yaml.safe_load((tmp_path / "security.yaml").read_text())
    wiring = Wiring(SecurityConfig.model_validate(section.get("security", section)), "router")
    registry = CollectorRegistry()
    Gauge("answer", "of all", registry=registry).set(42)
    served = MetricsEndpoint(registry, "127.0.0.1", 0, tls=wiring.https())
    assert wiring.config.internal_tls is not None
    own = wiring.config.internal_tls.worker
    assert own is not None
    member = ssl.create_default_context(cafile=wiring.config.internal_tls.ca)
    member.check_hostname = False
    member.load_cert_chain(own.certificate, own.key)
    stranger = ssl.create_default_context(cafile=wiring.config.internal_tls.ca)
    stranger.check_hostname = False
    url = f"https://127.0.0.1:{served.port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5, context=member) as answer:
            assert b"answer 42.0" in answer.read()
        with pytest.raises((urllib.error.URLError, OSError)):
            urllib.request.urlopen(url, timeout=5, context=stranger)
        with pytest.raises((urllib.error.URLError, OSError, http.client.HTTPException)):
            _get(served, "/metrics")  # plain text to a TLS port
    finally:
        served.close()


@pytest.mark.parametrize(
    ("name", "value", "endpoint", "words"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "http://collector:4318", "set it to grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http://collector:4318", "set it to grpc"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf", "http://collector:4318", "set it to grpc"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "", "set it to otlp, or to none"),
        ("OTEL_METRICS_EXPORTER", "console", "", "set it to otlp, or to none"),
    ],
)
def test_what_the_environment_asks_for_and_we_do_not_have_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, endpoint: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} is {value}.*{words}"):
        setup.check_telemetry(TelemetryConfig(otlp_endpoint=endpoint))


def test_what_we_have_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    setup.check_telemetry(TelemetryConfig())  # nothing is sent anywhere
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    setup.check_telemetry(TelemetryConfig(otlp_endpoint="http://collector:4317"))
    assert setup._options("http://[::1]:4317") == setup._options("localhost:4317") == (("grpc.enable_http_proxy", 0),)
    assert setup._options("https://collector:4317") == ()


def test_without_a_file_descriptor_the_endpoint_does_not_spin(
    endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits is still in the queue: asked again at once, it would be the same a million times."""
    slept: list[float] = []
    server = endpoint._server

    class Exhausted:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(endpoint_module.time, "sleep", slept.append)
    listener, exhausted = server.socket, Exhausted()
    try:
        server.socket = exhausted  # type: ignore[assignment]
        with pytest.raises(OSError, match="Too many open files"):
            server.get_request()
    finally:
        server.socket = listener
    assert slept == [0.5]
