"""n answers to one prompt over real processes: the tokens of n single requests, one handoff, nothing left."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import cluster_pb2, generate_pb2

from tests.support.processes import Cluster
from tests.support.prompts import tokens_of

N, SEED = 8, 1000

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("forks")
    cluster = Cluster(
        directory,
        small_model,
        engine={"num_blocks": 256},
        transport={"ucx_net_devices": "lo"},
        router={"recovery_wait_s": 60.0},  # the only decode worker is killed, and started again
        pace="30 0.5",
        forked=True,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def sent(cluster: Cluster, body: dict[str, Any], placement: str = "auto") -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.http_port, timeout=120)
    headers = {"content-type": "application/json", "x-diptych-placement": placement}
    connection.request("POST", "/v1/completions", json.dumps({"return_token_ids": True, "top_k": 12, **body}), headers)
    return connection


def choices(cluster: Cluster, body: dict[str, Any], placement: str = "auto") -> list[dict[str, Any]]:
    connection = sent(cluster, body, placement)
    try:
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    assert "choices" in answer, answer
    return answer["choices"]


def asked(cluster: Cluster, body: dict[str, Any], placement: str = "auto") -> list[list[int]]:
    return [choice["token_ids"] for choice in choices(cluster, body, placement)]


def singles(cluster: Cluster, body: dict[str, Any]) -> list[list[int]]:
    """Each with a salt of its own: nothing is found cached."""
    seeds = range(SEED, SEED + N)
    return [asked(cluster, {**body, "seed": seed, "cache_salt": f"{seed}"}, "local")[0] for seed in seeds]


def handoffs(cluster: Cluster) -> int:
    return sum(w.load.handoffs_total for w in cluster.cluster().workers if w.role == cluster_pb2.ROLE_DECODE)


def body_of(tokenizer: Any, max_tokens: int) -> dict[str, Any]:
    prompt = tokens_of(tokenizer, 150, seed=max_tokens)
    return {"prompt": prompt, "max_tokens": max_tokens, "seed": SEED, "temperature": 0.9, "ignore_eos": True}


@pytest.mark.parametrize("placement", ["split", "local"])
def test_they_are_n_single_requests(forks: Cluster, tokenizer: Any, placement: str) -> None:
    body = body_of(tokenizer, 16)
    before = handoffs(forks)
    answers = asked(forks, {**body, "n": N, "cache_salt": placement}, placement)
    assert answers == singles(forks, body)
    wanted = before + (placement == "split")
    forks.wait_until(lambda: handoffs(forks) >= wanted, 60.0, "the workers' reports")
    assert handoffs(forks) == wanted
    forks.assert_nothing_left()


def test_the_best_of_them_is_one_of_them(forks: Cluster, tokenizer: Any) -> None:
    body = body_of(tokenizer, 16)
    (best,) = asked(forks, {**body, "best_of": N})
    scored = choices(forks, {**body, "n": N, "logprobs": 0})
    assert best == max(scored, key=lambda c: sum(c["logprobs"]["token_logprobs"]))["token_ids"]


def test_over_grpc(forks: Cluster, tokenizer: Any) -> None:
    body = body_of(tokenizer, 16)
    sampling = generate_pb2.SamplingParams(max_tokens=16, seed=SEED, temperature=0.9, top_k=12, ignore_eos=True)
    request = forks.request(body["prompt"], sampling, generate_pb2.PLACEMENT_SPLIT, n=N, cache_salt="grpc")
    answers: list[list[int]] = [[] for _ in range(N)]
    for response in forks.stream(request, 120.0):
        answers[response.answer] += response.tokens.token_ids
    assert answers == asked(forks, {**body, "n": N})
    forks.assert_nothing_left()


def test_the_decode_worker_is_killed_under_them(forks: Cluster, tokenizer: Any) -> None:
    body = body_of(tokenizer, 160)
    expected = singles(forks, body)
    answers: list[list[list[int]]] = []
    asking = threading.Thread(target=lambda: answers.append(asked(forks, {**body, "n": N}, "split")))
    asking.start()
    forks.wait_until(lambda: decoding(forks) == N, 60.0, "all answers decode")
    forks.kill("decode-0")
    forks.start_worker("decode", "decode-0")
    asking.join(120.0)
    assert answers == [expected]
    forks.wait_ready(1, 1)
    forks.assert_nothing_left()


def decoding(cluster: Cluster) -> int:
    return sum(w.load.running_sequences for w in cluster.cluster().workers if w.role == cluster_pb2.ROLE_DECODE)


def test_clients_that_leave(forks: Cluster, tokenizer: Any) -> None:
    rng = random.Random(5)
    body = body_of(tokenizer, 64)
    for i in range(12):
        connection = sent(forks, {**body, "n": N, "cache_salt": f"leaves {i}"}, rng.choice(("split", "local")))
        time.sleep(rng.choice((0.0, 0.05, 0.2)))
        connection.close()
    forks.assert_nothing_left()
