"""The list of metrics, and what the exporter makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from settings.telemetry.catalog import CATALOG, MAX_LABEL_SETS, Kind, Source, of_source
from settings.telemetry.instruments import Instruments, Reader


def _readers(source: Source) -> dict[str, Reader]:
    def reader(labels: tuple[str, ...]) -> Reader:
        return lambda: [(1.0, dict.fromkeys(labels, "x"))]

    return {m.name: reader(m.labels) for m in of_source(source) if m.kind is not Kind.HISTOGRAM}


def _scraped(source: Source, readers: Mapping[str, Reader]) -> dict[str, set[str]]:
    """Series by name -> label names, as a scrape gives them."""
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(scope_info_enabled=False, registry=registry)])
    instruments = Instruments(provider.get_meter("test"), source, readers)
    for metric in of_source(source):
        if metric.kind is Kind.HISTOGRAM:
            instruments.record(metric.name, 0.5, dict.fromkeys(metric.labels, "x"))
    text = generate_latest(registry).decode()
    provider.shutdown()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    found.pop("target_info")
    return found


@pytest.mark.parametrize("source", Source)
def test_the_names_of_the_catalog_are_those_that_are_scraped(source: Source) -> None:
    scraped = _scraped(source, _readers(source))
    expected = {name: set(m.prometheus_labels) for m in of_source(source) for name in m.series}
    assert scraped.keys() == expected.keys()
    assert {name: labels - {"le"} for name, labels in scraped.items()} == expected


def test_names_and_units_of_the_conventions() -> None:
    known = {value for name, value in vars(gen_ai_metrics).items() if name.startswith("GEN_AI_")}
    ours = {m.name for m in CATALOG if m.name.startswith("gen_ai.")}
    assert ours <= known
    assert {"gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"} <= ours
    assert len({m.name for m in CATALOG}) == len(CATALOG)
    assert all(m.help.endswith(".") and (m.kind is Kind.HISTOGRAM) == bool(m.buckets) for m in CATALOG)


def test_a_process_that_forgets_a_metric_does_not_start() -> None:
    meter = MeterProvider(shutdown_on_exit=False).get_meter("test")
    readers = _readers(Source.DECODE)
    del readers["diptych.paths"]
    with pytest.raises(ValueError, match=r"without a reader \['diptych.paths'\]"):
        Instruments(meter, Source.DECODE, readers)
    readers["diptych.invented"] = readers["diptych.handoffs"]
    with pytest.raises(ValueError, match=r"diptych\.invented"):
        Instruments(meter, Source.DECODE, readers)


def test_labels_without_bound_are_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    readers = _readers(Source.DECODE)
    readers["diptych.handoffs"] = lambda: [(1.0, {"outcome": str(i)}) for i in range(MAX_LABEL_SETS + 5)]
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(scope_info_enabled=False, registry=registry)])
    Instruments(provider.get_meter("test"), Source.DECODE, readers)
    lines = [line for line in generate_latest(registry).decode().splitlines() if line.startswith("diptych_handoffs_")]
    provider.shutdown()
    assert len(lines) == MAX_LABEL_SETS
    assert "diptych.handoffs has more than" in caplog.text
