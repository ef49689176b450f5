"""Split, local and plain transformers say the same, token for token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2

from tests.support.processes import Cluster
from tests.support.prompts import reference_greedy, text_of, tokens_of
from tests.support.tiers import tiered

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
# At the borders of blocks, of chunks and of what is split by itself.
QUICK = (1, 2, 31, 32, 33, 64, 100, 257, 513)
LENGTHS = (*QUICK, 3, 63, 65, 128, 200, 350, 512, 1500)
CHATS = ("Why is the sky blue?", "Write a short poem about boats.", "Name three rivers.", "What is 12 + 30?")


def chat_tokens(tokenizer: Any, text: str) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("lengths", "chats"), tiered([(QUICK, CHATS[:2])], [(LENGTHS, CHATS)]), ids=["some", "all"])
def test_greedy_is_exact_for_raw_and_chat_prompts_concurrently(
    cluster: Cluster, tokenizer: Any, model_path: Path, lengths: tuple[int, ...], chats: tuple[str, ...]
) -> None:
    max_tokens = 12
    sampling = generate_pb2.SamplingParams(max_tokens=max_tokens)
    raw = [tokens_of(tokenizer, length, seed=length) for length in lengths]
    requests, prompts = [], []
    for i, prompt in enumerate(raw):
        for placement in (SPLIT, LOCAL):
            # A salt of its own: neither route may live on what the other cached.
            requests.append(cluster.request(prompt, sampling, placement, cache_salt=f"{len(lengths)}-{placement}-{i}"))
            prompts.append(prompt)
    for text in chats:
        for placement in (SPLIT, LOCAL):
            request = generate_pb2.GenerateRequest(sampling=sampling, placement=placement)
            request.chat.messages.add(role="user", content=text)
            requests.append(request)
            prompts.append(chat_tokens(tokenizer, text))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda r: cluster.ask(r, 120.0), requests))
    references: dict[tuple[int, ...], list[int]] = {}
    for request, prompt, reply in zip(requests, prompts, replies, strict=True):
        key = tuple(prompt)
        if key not in references:
            references[key] = reference_greedy(str(model_path), prompt, max_tokens)
        assert reply.token_ids == references[key], f"{len(prompt)} tokens, placement {request.placement}"
        assert reply.split is (request.placement == SPLIT)
        assert reply.finished.recoveries == 0
        assert reply.started.prompt_tokens == len(prompt)


def test_seeded_sampling_is_the_same_split_and_local(cluster: Cluster, tokenizer: Any) -> None:
    sampling = generate_pb2.SamplingParams(
        max_tokens=16, temperature=0.9, top_p=0.95, top_k=40, min_p=0.01, seed=11, repetition_penalty=1.1,
        presence_penalty=0.3, frequency_penalty=0.2,
    )  # fmt: skip
    for length in (5, 130, 600):
        prompt = tokens_of(tokenizer, length, seed=length)
        split = cluster.ask(cluster.request(prompt, sampling, SPLIT, cache_salt="a"))
        local = cluster.ask(cluster.request(prompt, sampling, LOCAL, cache_salt="b"))
        assert split.token_ids == local.token_ids
        other = generate_pb2.SamplingParams()
        other.CopyFrom(sampling)
        other.seed = 12
        assert cluster.ask(cluster.request(prompt, other, LOCAL)).token_ids != local.token_ids


def test_logprobs_are_the_same_split_and_local(cluster: Cluster, tokenizer: Any) -> None:
    sampling = generate_pb2.SamplingParams(max_tokens=4, logprobs=3)
    prompt = tokens_of(tokenizer, 80, seed=4)
    split = cluster.ask(cluster.request(prompt, sampling, SPLIT, cache_salt="a"))
    local = cluster.ask(cluster.request(prompt, sampling, LOCAL, cache_salt="b"))
    assert len(split.logprobs) == len(local.logprobs) == 4
    for a, b, token in zip(split.logprobs, local.logprobs, split.token_ids, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert a.top[0].token_id == token
        assert [t.token_id for t in a.top] == [t.token_id for t in b.top]


def test_text_is_what_the_tokens_say(cluster: Cluster, tokenizer: Any) -> None:
    sampling = generate_pb2.SamplingParams(max_tokens=24)
    for prompt in ("Emoji: 😀😃😄😁😆😅", "Das Wetter ist schön, größer, süß:", text_of(20, 3)):
        reply = cluster.ask(cluster.request(prompt, sampling, SPLIT))
        assert reply.text == tokenizer.decode(reply.token_ids, skip_special_tokens=True)


def test_a_stop_string_ends_text_and_tokens(cluster: Cluster) -> None:
    prompt = "Count: one two three four five six seven eight nine ten one two three"
    free = cluster.ask(cluster.request(prompt, generate_pb2.SamplingParams(max_tokens=12), LOCAL))
    stop = free.text[5:9]
    for placement in (SPLIT, LOCAL):
        sampling = generate_pb2.SamplingParams(max_tokens=12, stop=[stop])
        reply = cluster.ask(cluster.request(prompt, sampling, placement))
        assert reply.finished.reason == generate_pb2.FINISH_REASON_STOP
        assert reply.text == free.text[: free.text.index(stop)]
        assert reply.token_ids == free.token_ids[: len(reply.token_ids)]


def test_max_tokens_one_never_needs_the_second_worker(cluster: Cluster, tokenizer: Any, model_path: Path) -> None:
    prompt = tokens_of(tokenizer, 90, seed=9)
    reply = cluster.ask(cluster.request(prompt, generate_pb2.SamplingParams(max_tokens=1), SPLIT))
    assert reply.token_ids == reference_greedy(str(model_path), prompt, 1)
    assert reply.finished.reason == generate_pb2.FINISH_REASON_LENGTH


def test_a_second_request_finds_the_first_ones_prefix(cluster: Cluster, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 200, seed=77)
    sampling = generate_pb2.SamplingParams(max_tokens=3)
    first = cluster.ask(cluster.request(prompt, sampling, SPLIT, cache_salt="prefix"))
    again = cluster.ask(cluster.request(prompt, sampling, SPLIT, cache_salt="prefix"))
    foreign = cluster.ask(cluster.request(prompt, sampling, SPLIT, cache_salt="other tenant"))
    assert [r.finished.usage.cached_tokens for r in (first, again, foreign)] == [0, 192, 0]
    assert first.token_ids == again.token_ids == foreign.token_ids


def test_the_next_turn_of_a_chat_finds_the_answer_too(cluster: Cluster, tokenizer: Any) -> None:
    """What decode wrote is cached like what it read: only what came after it is computed."""
    sampling = generate_pb2.SamplingParams(max_tokens=30, ignore_eos=True)
    prompt = tokens_of(tokenizer, 100, seed=51)
    first = cluster.ask(cluster.request(prompt, sampling, LOCAL, cache_salt="chat"))
    second_prompt = [*prompt, *first.token_ids, *tokens_of(tokenizer, 20, seed=52)]
    second = cluster.ask(cluster.request(second_prompt, sampling, LOCAL, cache_salt="chat"))
    assert second.finished.usage.cached_tokens == 128, "129 tokens were computed: four whole blocks"
    alone = cluster.ask(cluster.request(second_prompt, sampling, LOCAL, cache_salt="another tenant"))
    assert alone.finished.usage.cached_tokens == 0
    assert second.token_ids == alone.token_ids
    changed = [(second_prompt[0] + 1) % 1000, *second_prompt[1:]]
    other = cluster.ask(cluster.request(changed, sampling, LOCAL, cache_salt="chat"))
    assert other.finished.usage.cached_tokens == 0, "a changed first token hits nothing"


def test_a_prefix_is_pulled_from_the_other_pool_and_the_answer_is_the_same(
    cluster: Cluster, tokenizer: Any, model_path: Path
) -> None:
    """Turn one on decode alone, turn two computed by prefill: it pulls what decode holds, answer included."""

    def pulls() -> int:
        return sum(w.load.prefix_pulls_total for w in cluster.cluster().workers)

    before = pulls()
    for attempt in range(3):  # two workers that meet for the first time may be too slow for what is to be saved
        salt = f"pull-{attempt}"
        sampling = generate_pb2.SamplingParams(max_tokens=8, ignore_eos=True)
        prompt = tokens_of(tokenizer, 400, seed=60 + attempt)
        first = cluster.ask(cluster.request(prompt, sampling, LOCAL, cache_salt=salt))
        second_prompt = [*prompt, *first.token_ids, *tokens_of(tokenizer, 30, seed=70)]
        second = cluster.ask(cluster.request(second_prompt, sampling, SPLIT, cache_salt=salt))
        assert second.token_ids == reference_greedy(str(model_path), second_prompt, 8)[: len(second.token_ids)]
        if second.finished.usage.cached_tokens:
            break
    assert second.finished.usage.cached_tokens == 384
    cluster.wait_until(lambda: pulls() > before, 10.0, "the pull is reported")


def test_a_decision_can_be_explained_afterwards(cluster: Cluster, tokenizer: Any) -> None:
    stub = cluster_pb2_grpc.ClusterServiceStub(cluster.channel)
    sampling = generate_pb2.SamplingParams(max_tokens=12, ignore_eos=True)
    cluster.ask(cluster.request(tokens_of(tokenizer, 300, seed=81), sampling, SPLIT, request_id="explain-me"))
    explanation = stub.Explain(cluster_pb2.ExplainRequest(request_id="explain-me"), timeout=5).explanation
    assert explanation.request.outcome == "length"
    (decision,) = explanation.decisions
    assert decision.route.rule == "pinned_split"
    assert decision.cost_ms > 0
    assert any(not a.prefill_worker for a in decision.alternatives), "what running it locally would have cost"
    assert {p.name for p in explanation.predictions} == {"ttft_ms", "handoff_ms", "itl_ms"}
    assert all(p.predicted_ms > 0 and p.actual_ms > 0 for p in explanation.predictions)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Explain(cluster_pb2.ExplainRequest(request_id="never seen"), timeout=5)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_timings_and_route_are_reported(cluster: Cluster, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 800, seed=21)
    reply = cluster.ask(cluster.request(prompt, generate_pb2.SamplingParams(max_tokens=6), SPLIT))
    assert reply.split, reply.started.route
    assert reply.started.route.rule == "pinned_split"
    assert {e.name for e in reply.started.route.estimates} >= {"local_ttft_ms", "split_ttft_ms", "transfer_ms"}
    timings = reply.finished.timings
    assert 0 < timings.ttft_ms < timings.total_ms
    assert timings.handoff_gap_ms > 0
    assert 0 <= timings.kv_early_share <= 1
    assert timings.total_ms == pytest.approx(timings.ttft_ms + timings.decode_ms, abs=50)
    short = cluster.ask(cluster.request(prompt[:20], generate_pb2.SamplingParams(max_tokens=3)))
    e = {e.name: e.value for e in short.started.route.estimates}
    limit_ms = e["max_local_stall_ms"]  # above it the machine is slow, and splitting may be right
    if e["local_ttft_ms"] <= limit_ms and e["local_cost_ms"] <= e["split_cost_ms"] + limit_ms:
        assert not short.split
        assert short.started.route.rule == "short_on_decode"
    assert (short.finished.timings.handoff_gap_ms > 0) == short.split
