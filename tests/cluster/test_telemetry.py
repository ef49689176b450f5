"""What a collector, a scraper and the client itself see of requests on a real cluster. The last test kills a worker."""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import cluster_pb2, generate_pb2
from prometheus_client.parser import text_string_to_metric_families

from settings.telemetry.catalog import TTFT_PARTS, Kind, Source, of_source
from tests.support.collector import Collector, Span
from tests.support.processes import Cluster, Reply
from tests.support.prompts import tokens_of

PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, small_model: Path, collector: Collector) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("observed"),
        small_model,
        engine={"num_blocks": 160, "max_batch_tokens": 128},
        # So that the last of a prompt is under way when its first token is there.
        transport={"ucx_net_devices": "lo", "slow_bytes_per_s": 500e3},
        forked=True,
        pace="25 3",  # a transfer begins before a prompt of 300 tokens is computed
    )
    cluster.processes.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
    }
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def _ask(
    cluster: Cluster, request: generate_pb2.GenerateRequest, flags: str = "01"
) -> tuple[str, Iterator[generate_pb2.GenerateResponse]]:
    trace_id = secrets.token_hex(16)
    metadata = (("traceparent", f"00-{trace_id}-{PARENT}-{flags}"),)
    return trace_id, cluster.stub.Generate(request, timeout=60, metadata=metadata)


def _reply(responses: Iterator[generate_pb2.GenerateResponse]) -> Reply:
    reply = Reply()
    for response in responses:
        reply.take(response)
    return reply


def _connected(collector: Collector, cluster: Cluster, trace_id: str, wanted: set[tuple[str, str]]) -> list[Span]:
    """The spans of a trace, once the wanted (service, name) are there. Every one hangs below the client's span."""

    def there() -> bool:
        return wanted <= {(s.service, s.name) for s in collector.of_trace(trace_id)}

    try:
        cluster.wait_until(there, 20, "the spans")
    except AssertionError:
        seen = sorted((s.service, s.name) for s in collector.of_trace(trace_id))
        raise AssertionError(f"missing {wanted - set(seen)}, there are {seen}") from None
    spans = collector.of_trace(trace_id)
    by_id = {s.span_id: s for s in spans}
    for span in spans:
        above = span
        while above.parent_id != PARENT:
            above = by_id[above.parent_id]
        assert above.name == "generate"
        assert span.start_ns <= span.end_ns
    return spans


def _one(spans: list[Span], name: str, service: str = "") -> Span:
    (found,) = [s for s in spans if s.name == name and service in s.service]
    return found


def _parts(timings: generate_pb2.Timings) -> dict[str, float]:
    return {part: getattr(timings, f"{part}_ms") for part in TTFT_PARTS}


def _check_parts(reply: Reply, root: Span) -> dict[str, float]:
    """In the last response and in the trace: they sum to the time to first token within a millisecond."""
    timings = reply.finished.timings
    parts = _parts(timings)
    assert sum(parts.values()) == pytest.approx(timings.ttft_ms, abs=1.0)
    assert min(parts.values()) >= 0.0
    assert parts["prefill"] > 0.0
    assert parts["admission"] + parts["decide"] == pytest.approx(timings.queue_ms, abs=1e-6)
    traced = {part: root.attributes[f"diptych.ttft.{part}_ms"] for part in TTFT_PARTS}
    assert traced == pytest.approx(parts)
    assert root.attributes["diptych.ttft_ms"] == pytest.approx(timings.ttft_ms)
    return parts


def test_a_split_request_is_one_connected_trace(observed: Cluster, collector: Collector, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 300, seed=1)
    sampling = generate_pb2.SamplingParams(max_tokens=5, ignore_eos=True)
    trace_id, responses = _ask(observed, observed.request(prompt, sampling, generate_pb2.PLACEMENT_SPLIT))
    reply = _reply(responses)
    spans = _connected(
        collector,
        observed,
        trace_id,
        {
            ("diptych-router", "generate"),
            ("diptych-router", "queue"),
            ("diptych-router", "first_token"),
            ("diptych-router", "handoff_gap"),
            ("diptych-router", "decode"),
            ("diptych-prefill", "sequence"),
            ("diptych-prefill", "queue"),
            ("diptych-prefill", "prefill"),
            ("diptych-decode", "sequence"),
            ("diptych-decode", "transfer"),
            ("diptych-decode", "adopt"),
            ("diptych-decode", "decode"),
        },
    )
    root = _one(spans, "generate")
    parts = _check_parts(reply, root)
    assert parts["recovery"] == 0.0
    assert root.attributes["gen_ai.operation.name"] == "text_completion"
    assert (root.attributes["gen_ai.usage.input_tokens"], root.attributes["gen_ai.usage.output_tokens"]) == (300, 5)
    assert root.attributes["diptych.route"] == "split"
    assert root.attributes["diptych.transfer.bytes"] > 0
    chunks = [attributes["diptych.tokens"] for name, attributes in _one(spans, "prefill").events if name == "chunk"]
    assert sum(chunks) == 300
    assert len(chunks) > 1
    prefill, transfer = _one(spans, "prefill"), _one(spans, "transfer")
    assert transfer.start_ns < prefill.end_ns < transfer.end_ns  # one machine, one clock: the KV moved meanwhile
    timings = reply.finished.timings
    gap = _one(spans, "handoff_gap")
    assert (gap.end_ns - gap.start_ns) / 1e6 == pytest.approx(timings.handoff_gap_ms, abs=0.1)
    assert 0.0 < timings.gap_step_ms < timings.handoff_gap_ms


def test_a_local_request_is_one_connected_trace(observed: Cluster, collector: Collector, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 200, seed=2)
    sampling = generate_pb2.SamplingParams(max_tokens=4, ignore_eos=True)
    trace_id, responses = _ask(observed, observed.request(prompt, sampling, generate_pb2.PLACEMENT_LOCAL))
    reply = _reply(responses)
    spans = _connected(
        collector,
        observed,
        trace_id,
        {("diptych-router", "generate"), ("diptych-decode", "prefill"), ("diptych-decode", "decode")},
    )
    _check_parts(reply, _one(spans, "generate"))
    assert not [s for s in spans if s.service == "diptych-prefill" or s.name == "handoff_gap"]
    assert reply.finished.timings.handoff_gap_ms == 0.0


def test_a_cancelled_request_is_one_connected_trace(observed: Cluster, collector: Collector, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 60, seed=3)
    sampling = generate_pb2.SamplingParams(max_tokens=1500, ignore_eos=True)
    trace_id, call = _ask(observed, observed.request(prompt, sampling, generate_pb2.PLACEMENT_LOCAL))
    for response in call:
        if response.WhichOneof("event") == "tokens":
            call.cancel()  # type: ignore[attr-defined]
            break
    spans = _connected(
        collector,
        observed,
        trace_id,
        {("diptych-router", "generate"), ("diptych-decode", "sequence"), ("diptych-decode", "decode")},
    )
    assert _one(spans, "generate").attributes["diptych.outcome"] == "cancelled"
    assert _one(spans, "sequence").attributes["diptych.outcome"] == "cancelled"
    observed.assert_nothing_left()


def test_what_is_not_sampled_or_refused_or_malformed(observed: Cluster, collector: Collector) -> None:
    sampling = generate_pb2.SamplingParams(max_tokens=2)
    unsampled, responses = _ask(observed, observed.request("hello", sampling), flags="00")
    assert _reply(responses).token_ids
    bad = observed.request("hello", generate_pb2.SamplingParams(max_tokens=10**6))
    refused, responses = _ask(observed, bad)
    with pytest.raises(grpc.RpcError) as error:
        list(responses)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata = (("traceparent", "00-" + "z" * 400), ("tracestate", "=" * 600))
    assert list(observed.stub.Generate(observed.request("hello", sampling), timeout=60, metadata=metadata))
    (root,) = _connected(collector, observed, refused, {("diptych-router", "generate")})
    assert root.attributes["error.type"] == "INVALID_ARGUMENT"
    assert not collector.of_trace(unsampled)


def _scrape(address: str) -> dict[str, list[Any]]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {sample.name: family.samples for family in families for sample in family.samples}


def test_every_process_is_scraped_and_found_through_the_router(observed: Cluster, collector: Collector) -> None:
    router = observed.cluster().router.metrics_address
    with urllib.request.urlopen(f"http://{router}/targets", timeout=10) as answer:
        targets = {entry["labels"]["diptych_role"]: entry["targets"][0] for entry in json.load(answer)}
    assert targets.keys() == {"router", "prefill", "decode"}
    assert targets["router"] == router
    workers = {w.role: w.metrics_address for w in observed.cluster().workers}
    assert targets["decode"] == workers[cluster_pb2.ROLE_DECODE]

    def value(name: str, source: str = "router", **labels: str) -> float:
        samples = _scrape(targets[source])[name]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    assert value("diptych_requests_total", outcome="length") >= 2
    assert value("diptych_requests_total", outcome="cancelled") == 1
    assert value("diptych_errors_total", error_type="INVALID_ARGUMENT", stage="refused") == 1
    assert value("diptych_decisions_total", route="split") >= 1
    assert value("gen_ai_server_time_to_first_token_seconds_count", route="split") >= 1
    ttft = value("gen_ai_server_time_to_first_token_seconds_sum")
    assert value("diptych_ttft_part_seconds_total") == pytest.approx(ttft, abs=0.01)
    assert value("diptych_workers", role="decode", state="ready") == 1
    assert value("diptych_serving") == 1
    adopted = value("diptych_handoffs_total", "decode", outcome="adopted")
    assert adopted >= 1
    assert value("diptych_leases_total", "prefill", outcome="released") >= adopted  # lent prefixes have leases too
    assert value("diptych_tokens_computed_total", "prefill") >= 300
    assert value("diptych_transfer_io_bytes_total", "decode") > 0
    assert value("diptych_step_duration_seconds_count", "decode") > 4
    assert value("diptych_kv_blocks", "decode", state="total") == 160

    here = (Source.ROUTER, Source.PREFILL, Source.DECODE)
    histograms = {(f"diptych-{s}", m.name) for s in here for m in of_source(s) if m.kind is Kind.HISTOGRAM}
    adopting = {
        ("diptych-prefill", f"diptych.{name}.duration") for name in ("transfer", "adopt")
    }  # nobody hands it any
    moving = {("diptych-router", "diptych.migration.pause")}  # nothing moves

    def missing() -> set[tuple[str, str]]:
        return histograms - adopting - moving - collector.metrics

    try:
        observed.wait_until(lambda: not missing(), 20, "all histograms by OTLP")
    except AssertionError:
        raise AssertionError(f"by OTLP never came {missing()}") from None


def test_a_failed_over_request_is_one_connected_trace(observed: Cluster, collector: Collector, tokenizer: Any) -> None:
    """Its prefill worker is killed while it computes: decode computes the rest."""
    prompt = tokens_of(tokenizer, 800, seed=4)
    sampling = generate_pb2.SamplingParams(max_tokens=4, ignore_eos=True)
    trace_id, responses = _ask(observed, observed.request(prompt, sampling, generate_pb2.PLACEMENT_SPLIT))
    reply = Reply()
    reply.take(next(responses))  # started
    observed.wait_until(
        lambda: any(w.load.leased_blocks for w in observed.ready(cluster_pb2.ROLE_PREFILL)), 20, "a chunk"
    )
    observed.kill("prefill-0")
    for response in responses:
        reply.take(response)
    assert reply.finished.recoveries >= 1
    spans = _connected(
        collector,
        observed,
        trace_id,
        {
            ("diptych-router", "generate"),
            ("diptych-router", "recovery"),
            ("diptych-decode", "sequence"),
            ("diptych-decode", "prefill"),
            ("diptych-decode", "decode"),
        },
    )
    parts = _check_parts(reply, _one(spans, "generate"))
    assert parts["recovery"] > 0.0
    assert _one(spans, "recovery").attributes["diptych.kind"] == "computed_rest"
