"""What a client leaves out is no demand of its: without max_tokens an answer is as long as fits, on every door."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from router.access.gate import ANYBODY
from router.access.keys import KeyEntry, KeyTable, new_key
from router.config import RouterConfig
from tests.support.in_process_router import GENERATE, InProcessRouter
from tests.support.raw_http import Http

POOL_TOKENS = 8 * 32
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def small(model_path: Path) -> Iterator[InProcessRouter]:
    """A KV pool smaller than the context, as on most GPUs."""
    config = RouterConfig(model=str(model_path), grpc_port=0, http_port=0, internal_port=0)
    router = InProcessRouter(config, total_blocks=8)
    try:
        yield router
    finally:
        router.close()


@pytest.fixture
def http(small: InProcessRouter) -> Iterator[Http]:
    assert small.router.http is not None
    yield Http(small.router.http.port)
    small.becomes_empty()


def body(path: str, **more: Any) -> dict[str, Any]:
    prompt = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "hello"}, RESPONSES: {"input": "hello"}}[path]
    return {"model": "smollm2-135m-instruct", "ignore_eos": True, **prompt, **more}


def tokens_of(answer: dict[str, Any]) -> tuple[int, int]:
    usage = answer["usage"]
    return usage.get("prompt_tokens", usage.get("input_tokens")), usage.get(
        "completion_tokens", usage.get("output_tokens")
    )


def test_the_models_length_is_what_can_be_used(http: Http) -> None:
    assert http.get("/v1/models").json["data"][0]["max_model_len"] == POOL_TOKENS
    assert http.post("/tokenize", {"prompt": "hello"}).json["max_model_len"] == POOL_TOKENS


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_an_answer_fills_the_pool_where_that_is_smaller_than_the_context(http: Http, path: str) -> None:
    said = http.post(path, body(path))
    assert said.status == 200, said.json
    assert sum(tokens_of(said.json)) == POOL_TOKENS


def test_completions_have_their_own_default_where_it_fits(http: Http) -> None:
    assert tokens_of(http.post(COMPLETIONS, body(COMPLETIONS)).json)[1] == 16
    said = http.post(COMPLETIONS, body(COMPLETIONS, prompt=[5] * (POOL_TOKENS - 3)))
    assert tokens_of(said.json) == (POOL_TOKENS - 3, 3)


def test_grpc_too(small: InProcessRouter) -> None:
    ask = small.public.unary_stream(
        GENERATE,
        request_serializer=generate_pb2.GenerateRequest.SerializeToString,
        response_deserializer=generate_pb2.GenerateResponse.FromString,
    )
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[5] * 100), sampling=generate_pb2.SamplingParams(ignore_eos=True)
    )
    answer = list(ask(request, timeout=10.0))
    assert answer[-1].finished.usage.completion_tokens == POOL_TOKENS - 100


def test_what_a_client_demands_is_refused_with_the_limit_that_it_met(http: Http) -> None:
    said = http.post(CHAT, body(CHAT, max_tokens=POOL_TOKENS))
    assert said.status == 400
    assert f"the limit of the largest decode worker's KV pool of {POOL_TOKENS}" in said.json["error"]["message"]


@pytest.fixture
def limited(small: InProcessRouter) -> Iterator[dict[str, str]]:
    """Headers of a key that may use fewer tokens a minute than the context has."""
    key, key_id, sha256 = new_key(secrets.token_bytes(38))
    entry = KeyEntry.model_validate({"id": key_id, "sha256": sha256, "tenant": "t", "tokens_per_minute": 120})
    gate = small.router.dispatcher.gate
    gate.keys = KeyTable([entry])
    try:
        yield {"authorization": f"Bearer {key}"}
    finally:
        gate.keys = None
        assert gate.current() is ANYBODY


@pytest.mark.parametrize("n", [1, 3])
def test_a_key_with_fewer_tokens_a_minute_gets_an_answer_of_so_many(
    http: Http, limited: dict[str, str], n: int
) -> None:
    said = http.post(CHAT, body(CHAT, n=n), **limited)
    assert said.status == 200, said.json
    prompt, answers = tokens_of(said.json)
    assert prompt + answers <= 120
    assert prompt + answers > 120 - n


def test_several_answers_are_one_request(http: Http, small: InProcessRouter) -> None:
    def figures() -> tuple[int, int, int, int]:
        dispatcher = small.router.dispatcher
        counts = dispatcher.counts
        return dispatcher.requests_total, sum(counts.outcomes.values()), counts.input_tokens, counts.output_tokens

    before = figures()
    usage = http.post(CHAT, body(CHAT, n=4, max_tokens=5)).json["usage"]
    small.becomes_empty()
    grown = tuple(b - a for a, b in zip(before, figures(), strict=True))
    assert grown == (1, 1, usage["prompt_tokens"], 20)


def test_what_was_refused_is_seen_beside_what_failed(http: Http) -> None:
    before = http.get("/ui/cluster").json["router"]
    for _ in range(3):
        assert http.post(CHAT, body(CHAT, max_tokens=10_000)).status == 400
    time.sleep(0.55)  # the page's figures are made anew twice a second
    after = http.get("/ui/cluster").json["router"]
    grown = {name: int(after[name]) - int(before[name]) for name in ("refused_total", "errors_total", "requests_total")}
    assert grown == {"refused_total": 3, "errors_total": 0, "requests_total": 0}
