"""Tools that know nothing of us and ask the router what it is: grpcurl and buf."""

from __future__ import annotations

import json

import pytest
from diptych.v1 import generate_pb2

from tests.clients.environments import environment, run
from tests.support.processes import Cluster


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(300)
def test_grpcurl_lists_describes_and_calls(cluster: Cluster) -> None:
    grpcurl = str(environment("reflection") / "grpcurl")
    listed = run([grpcurl, "-plaintext", cluster.target, "list"], 30).split()
    assert {"diptych.v1.GenerateService", "diptych.v1.ClusterService", "inference.GRPCInferenceService"} <= set(listed)
    described = run([grpcurl, "-plaintext", cluster.target, "describe", "diptych.v1.GenerateRequest"], 30)
    assert "repeated uint32 emitted_token_ids = 12" in described
    body = json.dumps({"text": "Once upon a time", "sampling": {"max_tokens": 6}})
    said = run([grpcurl, "-plaintext", "-d", body, cluster.target, "diptych.v1.GenerateService/Generate"], 60)
    decoder, at, text = json.JSONDecoder(), 0, ""
    while at < len(said.strip()):
        message, at = decoder.raw_decode(said, at)
        at += len(said[at:]) - len(said[at:].lstrip())
        text += message.get("tokens", {}).get("text", "")
    sampling = generate_pb2.SamplingParams(max_tokens=6)
    assert text == cluster.ask(cluster.request("Once upon a time", sampling)).text


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(300)
def test_buf_curl(cluster: Cluster) -> None:
    buf = str(environment("reflection") / "buf")
    url = f"http://{cluster.target}/diptych.v1.ClusterService/GetCluster"
    said = json.loads(run([buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", "{}", url], 60))
    assert said["cluster"]["router"]["serving"] is True
    assert len(said["cluster"]["workers"]) == 2
