"""A router that is asked to leave while it serves: live answers are whole, new calls are sent elsewhere."""

from __future__ import annotations

import re
from typing import Any

import grpc
import pytest
from diptych.v1 import generate_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy, tokens_of

MAX_TOKENS = 60

STARTS = {
    "router": ("loading the tokenizer", "waiting for a decode worker"),
    "prefill-0": ("loading the model", "trying the model", "opening the KV transport"),
    "decode-0": ("loading the model", "trying the model", "opening the KV transport"),
}


def test_each_process_says_where_its_start_went(restarting: Cluster) -> None:
    """In one line, when it is ready: its parts are the whole, and what takes long is named."""
    for name, phases in STARTS.items():
        log = (restarting.directory / f"{name}.log").read_text()
        (*_, line) = re.findall(r"start: ready after ([\d.]+) s: (.+)", log)
        spent = {what: float(s) for what, s in re.findall(r"([A-Za-z][\w ]*?) ([\d.]+)(?:, |$)", line[1])}
        assert float(line[0]) == pytest.approx(sum(spent.values()), abs=0.06 * len(spent)), line
        for what in phases:
            assert f"start: {what}" in log
            assert what in spent or spent["the rest"] < 0.5, line
        assert name == "router" or re.search(r"registered with router \S+ at \S+, after \d", log)


@pytest.mark.timeout(180)
def test_a_rolling_restart_of_the_router_loses_no_request(restarting: Cluster, tokenizer: Any) -> None:
    cluster, prompt = restarting, tokens_of(tokenizer, 120, 5)
    expected = reference_greedy(str(cluster.model), prompt, MAX_TOKENS)
    request = cluster.request(
        prompt,
        generate_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
        generate_pb2.PLACEMENT_SPLIT,
    )
    live = Reply()
    for response in cluster.stream(request):
        live.take(response)
        if len(live.token_ids) == 3:
            cluster.terminate("router")
            error = refused_within(cluster, request, 5.0)
    assert live.token_ids == expected, "the live answer is finished first"
    status = rpc_status.from_call(error)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(d.Is(retry.DESCRIPTOR) and d.Unpack(retry) for d in status.details)
    assert cluster.processes.running.pop("router").wait(20) == 0
    cluster.processes.spawn("router", "router", cluster._router_config())
    cluster.wait_ready(1, 1, 30.0)
    assert cluster.ask(request).token_ids == expected
    cluster.assert_nothing_left()


def refused_within(cluster: Cluster, request: generate_pb2.GenerateRequest, timeout_s: float) -> Any:
    """Asks until a new call is refused, which must be with UNAVAILABLE."""
    errors: list[Any] = []

    def refused() -> bool:
        try:
            cluster.ask(request)
        except grpc.RpcError as error:
            errors.append(error)
        return bool(errors)

    cluster.wait_until(refused, timeout_s, "a refusal")
    assert errors[0].code() is grpc.StatusCode.UNAVAILABLE
    assert "leaving" in errors[0].details()
    return errors[0]
