"""What follows a part of an answer is what would have followed: every feature, both placements, several seams."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from tests.support.processes import Cluster, Reply
from tests.support.prompts import tokens_of

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
_MAX_TOKENS = 18
_FORM = """{"type": "object", "additionalProperties": false, "required": ["rank"],
    "properties": {"rank": {"type": "integer"}}}"""
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "log-probabilities": {"logprobs": 3},
    "sampled, penalties, log-probabilities": {"temperature": 1.0, "repetition_penalty": 1.3, "logprobs": 0},
    "masks": {"allowed_token_ids": range(40, 400), "bad_words": ["the", "of a"], "temperature": 0.9},
    "bias": {"logit_bias": {260: 4.0, 28: -100.0}},
    "structured": {"structured": generate_pb2.StructuredOutput(json_schema=_FORM), "temperature": 0.8},
    "structured, log-probabilities": {"structured": generate_pb2.StructuredOutput(regex="[a-e ]{40}"), "logprobs": 1},
}


def asked(cluster: Cluster, prompt: list[int], options: dict[str, Any], placement: int, emitted: list[int]) -> Reply:
    sampling = generate_pb2.SamplingParams(**({"max_tokens": _MAX_TOKENS, "seed": 5} | options))
    request = cluster.request(prompt, sampling, placement, cache_salt=f"{placement}", emitted_token_ids=emitted)
    reply = Reply(token_ids=list(emitted))
    for response in cluster.stream(request, 60.0):
        reply.take(response)
    assert reply.finished is not None
    reply.text = reply.started.text + reply.text  # the part that was known is said at once
    return reply


@pytest.mark.parametrize("feature", FEATURES)
def test_an_answer_goes_on_as_if_nothing_had_happened(cluster: Cluster, tokenizer: Any, feature: str) -> None:
    prompt, options = tokens_of(tokenizer, 70, seed=71), FEATURES[feature]
    whole = asked(cluster, prompt, options, LOCAL, [])
    seams = sorted({1, 2, len(whole.token_ids) // 2, len(whole.token_ids) - 1} - {0, len(whole.token_ids)})
    ways = [(seam, placement) for seam in seams for placement in (SPLIT, LOCAL)]
    with ThreadPoolExecutor(len(ways)) as pool:
        resumed = list(pool.map(lambda way: asked(cluster, prompt, options, way[1], whole.token_ids[: way[0]]), ways))
    for (seam, placement), reply in zip(ways, resumed, strict=True):
        where = f"after {seam} of {len(whole.token_ids)} tokens, {'split' if placement == SPLIT else 'local'}"
        assert reply.token_ids == whole.token_ids, where
        assert reply.text == whole.text, where
        assert reply.split is (placement == SPLIT), where
        assert reply.finished.reason == whole.finished.reason, where
        assert reply.finished.usage.completion_tokens == len(whole.token_ids), where
        assert len(reply.logprobs) == (len(whole.token_ids) - seam if "logprobs" in options else 0), where
        for ours, theirs in zip(reply.logprobs, whole.logprobs[seam:], strict=bool(reply.logprobs)):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3), where


def test_a_stop_string_is_found_across_the_seam(cluster: Cluster, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 40, seed=72)
    free = asked(cluster, prompt, {}, LOCAL, [])
    stop = free.text[len(free.text) // 2 : len(free.text) // 2 + 6]
    whole = asked(cluster, prompt, {"stop": [stop]}, LOCAL, [])
    assert stop not in whole.text
    for seam in range(1, len(whole.token_ids)):
        for placement in (SPLIT, LOCAL):
            reply = asked(cluster, prompt, {"stop": [stop]}, placement, whole.token_ids[:seam])
            assert (reply.text, reply.finished.reason) == (whole.text, whole.finished.reason)


def test_a_whole_answer_does_not_go_on(cluster: Cluster, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 20, seed=73)
    whole = asked(cluster, prompt, {"max_tokens": 4}, LOCAL, [])
    for placement in (SPLIT, LOCAL):
        reply = asked(cluster, prompt, {"max_tokens": 4}, placement, whole.token_ids)
        assert (reply.token_ids, reply.text) == (whole.token_ids, whole.text)
        assert reply.finished.reason == whole.finished.reason
