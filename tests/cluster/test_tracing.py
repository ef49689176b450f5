"""One trace over router, prefill, transfer and decode, as a collector receives it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import generate_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.support.processes import Cluster
from tests.support.prompts import tokens_of

CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A real OTLP receiver that keeps what it gets: service name, span."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_a_split_request_is_one_connected_trace(
    tmp_path: Path, model_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    cluster = Cluster(tmp_path, model_path, engine={"num_blocks": 60}, transport={"ucx_net_devices": "lo"})
    try:
        cluster.start()
        request = cluster.request(
            tokens_of(tokenizer, 300, seed=1),
            generate_pb2.SamplingParams(max_tokens=5),
            generate_pb2.PLACEMENT_SPLIT,
        )
        metadata = (("traceparent", f"00-{CLIENT_TRACE}-b7ad6b7169203331-01"),)
        list(cluster.stub.Generate(request, timeout=60, metadata=metadata))
        cluster.wait_until(lambda: len(collector.spans) >= 11, 15, "the spans of all three processes")
    finally:
        cluster.stop()
        collector.server.stop(0)
    ours = [(service, span) for service, span in collector.spans if span.trace_id.hex() == CLIENT_TRACE]
    names = {(service, span.name) for service, span in ours}
    assert names >= {
        ("diptych-router", "generate"),
        ("diptych-router", "first_token"),
        ("diptych-router", "handoff_gap"),
        ("diptych-prefill", "sequence"),
        ("diptych-prefill", "prefill"),
        ("diptych-decode", "sequence"),
        ("diptych-decode", "transfer"),
        ("diptych-decode", "decode"),
    }
    (root,) = [span for _, span in ours if span.name == "generate"]
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    for _, span in ours:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if span.name == "sequence":
            assert span.parent_span_id == root.span_id
    (prefill,) = [span for service, span in ours if span.name == "prefill"]
    (transfer,) = [span for service, span in ours if span.name == "transfer"]
    assert transfer.start_time_unix_nano < prefill.end_time_unix_nano < transfer.end_time_unix_nano
