"""Beam searches over real processes: split and local say the same, streams too, and nothing is left."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.client import Client
from diptych.v1 import cluster_pb2, generate_pb2

from tests.support.processes import Cluster
from tests.support.prompts import tokens_of

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def beams(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("beams"),
        small_model,
        engine={"num_blocks": 128},
        transport={"ucx_net_devices": "lo"},
        router={"recovery_wait_s": 60.0},  # the only decode worker is killed, and started again
        pace="30 0.5",
        forked=True,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def sent(cluster: Cluster, body: dict[str, Any], placement: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.http_port, timeout=120)
    headers = {"content-type": "application/json", "x-diptych-placement": placement}
    asked = {"use_beam_search": True, "n": 2, "best_of": 4, "return_token_ids": True, **body}
    connection.request("POST", "/v1/completions", json.dumps(asked), headers)
    return connection


def said(cluster: Cluster, body: dict[str, Any], placement: str) -> str:
    connection = sent(cluster, body, placement)
    try:
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def asked(cluster: Cluster, body: dict[str, Any], placement: str) -> list[list[int]]:
    answer = json.loads(said(cluster, body, placement))
    assert "choices" in answer, answer
    return [choice["token_ids"] for choice in answer["choices"]]


def body_of(tokenizer: Any, max_tokens: int) -> dict[str, Any]:
    return {"prompt": tokens_of(tokenizer, 150, seed=max_tokens), "max_tokens": max_tokens, "length_penalty": 0.7}


def searching(cluster: Cluster) -> int:
    return sum(w.load.running_sequences for w in cluster.cluster().workers if w.role == cluster_pb2.ROLE_DECODE)


def test_local_and_split_and_streamed_and_over_grpc(beams: Cluster, tokenizer: Any) -> None:
    body = body_of(tokenizer, 12)
    first = asked(beams, {**body, "cache_salt": "a"}, "local")
    assert len(first) == 2
    assert first[0] != first[1]
    assert asked(beams, {**body, "cache_salt": "b"}, "split") == first
    lines = said(beams, {**body, "stream": True}, "split").splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed: list[list[int]] = [[], []]
    for event in events:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice.get("token_ids") or []
    assert streamed == first
    sampling = generate_pb2.SamplingParams(max_tokens=12)
    request = beams.request(body["prompt"], sampling, generate_pb2.PLACEMENT_SPLIT, n=2, best_of=4)
    request.beam_search.length_penalty = 0.7
    over_grpc: list[list[int]] = [[], []]
    for response in beams.stream(request, 120.0):
        over_grpc[response.answer] += response.tokens.token_ids
    assert over_grpc == first
    with Client(f"127.0.0.1:{beams.port}") as client:
        answer = client.generate(body["prompt"], max_tokens=12, beams=4, length_penalty=0.7)
    assert answer.token_ids == first[0]
    beams.assert_nothing_left()


def test_the_decode_worker_is_killed_under_a_search(beams: Cluster, tokenizer: Any) -> None:
    body = body_of(tokenizer, 60)
    expected = asked(beams, body, "local")
    answers: list[list[list[int]]] = []
    asking = threading.Thread(target=lambda: answers.append(asked(beams, {**body, "cache_salt": "k"}, "split")))
    asking.start()
    beams.wait_until(lambda: searching(beams) >= 4, 60.0, "the beams run")
    beams.kill("decode-0")
    beams.start_worker("decode", "decode-0")
    asking.join(120.0)
    assert answers == [expected]
    beams.wait_ready(1, 1)
    beams.assert_nothing_left()


def test_clients_that_leave_and_more_searches_than_fit(beams: Cluster, tokenizer: Any) -> None:
    body = body_of(tokenizer, 40)
    expected = asked(beams, body, "local")
    answers: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(asked(beams, {**body, "cache_salt": f"{i}"}, "auto")))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for i in range(6):
        connection = sent(beams, {**body, "cache_salt": f"leaves {i}"}, ("split", "local")[i % 2])
        time.sleep((0.0, 0.05, 0.2)[i % 3])
        connection.close()
    for thread in threads:
        thread.join(200.0)
    assert answers == [expected] * 4
    too_large = json.loads(said(beams, {**body, "max_tokens": 2000, "best_of": 16}, "local"))
    assert "KV blocks" in too_large["error"]["message"], too_large
    beams.assert_nothing_left()
