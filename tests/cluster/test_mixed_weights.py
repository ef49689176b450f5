"""Prompts computed with the checkpoint's weights and answers with 4 bits of them (router.mixed_quantization), over real
processes: what is computed from what, and who says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diptych.v1 import cluster_pb2, generate_pb2
from rich.console import Console

from deploy.clients import get_explanation
from deploy.explain_view import render as render_explained
from deploy.status_view import render
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.processes import Cluster, Reply
from tests.support.prompts import clear_choice, reference_greedy, reference_model
from tests.support.rounded import model_with_rounded_weights

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
GROUPS = ("attention", "mlp")
SCHEME = "int4 attention+mlp"
INT4 = {"quantization": "int4", "quantized_groups": list(GROUPS)}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = saved_model(tmp_path_factory.mktemp("model"), "Llama", num_hidden_layers=4, num_key_value_heads=2)
    saved_tokenizer(model)
    model_with_rounded_weights(model, "int4", GROUPS).save_pretrained(rounded_of(model))
    cluster = Cluster(
        tmp_path_factory.mktemp("mixed"),
        model,
        decode=2,
        engine={"num_blocks": 96, "block_tokens": 8, "max_batch_tokens": 64, "max_running_sequences": 16},
        transport={"ucx_net_devices": "lo", "digest": True},
        router={"mixed_quantization": True},
        role_overrides={"decode": {"engine": INT4}},
        forked=True,
        pace="10 0.1",  # so that a kill comes before the end
    )
    try:
        yield cluster.start(120.0)
    finally:
        cluster.stop()


_model = lru_cache(maxsize=2)(reference_model)


def rounded_of(model: Path) -> Path:
    return model.with_name(f"{model.name}-rounded")


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(length)]


@torch.inference_mode()
def handed_over(cluster: Cluster, prompt: list[int], count: int, shared: int = 0) -> list[int]:
    """transformers: the prompt's KV and the first token with one model, the others with the other, on that KV.
    `shared` > 0: of the prompt's KV only so much.
    """
    plain, rounded = _model(str(cluster.model)), _model(str(rounded_of(cluster.model)))
    said = plain(torch.tensor([prompt[: shared or None]]), use_cache=True)
    if shared:
        said = rounded(torch.tensor([prompt[shared:]]), past_key_values=said.past_key_values, use_cache=True)
    tokens = [clear_choice(said.logits[0, -1])]
    while len(tokens) < count:
        said = rounded(torch.tensor([tokens[-1:]]), past_key_values=said.past_key_values, use_cache=True)
        tokens.append(clear_choice(said.logits[0, -1]))
    return tokens


def alone(cluster: Cluster, prompt: list[int], count: int) -> list[int]:
    return reference_greedy(str(rounded_of(cluster.model)), prompt, count)


def ask(cluster: Cluster, prompt: list[int], placement: int, count: int = 16, **fields: Any) -> Reply:
    sampling = generate_pb2.SamplingParams(max_tokens=count, ignore_eos=True)
    return cluster.ask(cluster.request(prompt, sampling, placement, **fields))


def schemes(reply: Reply) -> list[str]:
    return list(reply.finished.route.mixed_weights)


def test_each_answer_is_that_of_what_computed_it_and_a_mixed_one_says_so(cluster: Cluster) -> None:
    """Whatever the caches hold: KV that came from the other scheme is found by nobody who computes alone."""
    for length in (5, 41, 90):
        prompt = prompt_of(length, seed=length)
        mixed, own = handed_over(cluster, prompt, 16), alone(cluster, prompt, 16)
        assert mixed != own
        for placement in (SPLIT, LOCAL, SPLIT, LOCAL):
            for _ in range(2):  # twice, for either decode worker
                reply = ask(cluster, prompt, placement)
                assert reply.split is (placement == SPLIT)
                assert reply.token_ids == (mixed if reply.split else own), length
                assert schemes(reply) == (["none", SCHEME] if reply.split else [])
                assert reply.started.revision.startswith("mixed/")
    cluster.assert_nothing_left()


def test_several_answers_to_a_prompt_are_alike(cluster: Cluster) -> None:
    """The further ones go on from the first one's KV, which was handed over."""
    prompt = prompt_of(50, seed=3)
    first, others = handed_over(cluster, prompt, 12), handed_over(cluster, prompt, 12, shared=48)
    sampling = generate_pb2.SamplingParams(max_tokens=12, ignore_eos=True)
    answers: dict[int, Reply] = {}
    for response in cluster.stream(cluster.request(prompt, sampling, SPLIT, n=3)):
        answers.setdefault(response.answer, Reply()).take(response)
    assert len(answers) == 3
    for number, reply in answers.items():
        assert reply.token_ids == (others if number else first)
        assert schemes(reply) == ["none", SCHEME]
    cluster.assert_nothing_left()


def test_it_is_said_in_plain_words(cluster: Cluster) -> None:
    reply = ask(cluster, prompt_of(40, seed=9), SPLIT)
    out = StringIO()
    Console(file=out, width=200).print(render(cluster.cluster()))
    assert "mixed quantization: answers that workers of several schemes computed" in out.getvalue()
    said = render_explained(get_explanation(cluster.channel, reply.started.request_id, 5.0))
    assert f"its weights: not quantized, then {SCHEME}" in said
    log = (cluster.directory / "router.log").read_text()
    assert "router.mixed_quantization is on" in log


def test_an_answer_survives_its_decode_worker_and_says_so(cluster: Cluster) -> None:
    prompt, reply = prompt_of(70, seed=4), Reply()
    sampling = generate_pb2.SamplingParams(max_tokens=80, ignore_eos=True)
    for response in cluster.stream(cluster.request(prompt, sampling, SPLIT)):
        reply.take(response)
        if len(reply.token_ids) == 8:
            cluster.kill(reply.started.route.decode_worker)
    assert reply.finished.recoveries
    assert len(reply.token_ids) == 80
    assert reply.token_ids[:8] == handed_over(cluster, prompt, 8)
    assert schemes(reply) == ["none", SCHEME]
    cluster.start_worker("decode", reply.started.route.decode_worker)
    cluster.wait_ready(1, 2)
    cluster.assert_nothing_left()


def test_a_resumed_answer_does_not_claim_what_nobody_knows(cluster: Cluster) -> None:
    prompt = prompt_of(30, seed=5)
    first = ask(cluster, prompt, LOCAL, 6)
    sampling = generate_pb2.SamplingParams(max_tokens=12, ignore_eos=True)
    begun = {"emitted_token_ids": first.token_ids, "revision": first.started.revision}
    resumed = Reply(token_ids=list(first.token_ids))
    for response in cluster.stream(cluster.request(prompt, sampling, LOCAL, **begun)):
        resumed.take(response)
    assert resumed.token_ids == alone(cluster, prompt, 12)
    assert schemes(resumed) == ["unknown", SCHEME]


def test_one_scheme_on_both_legs_keeps_the_claim(cluster: Cluster) -> None:
    cluster.role_overrides = {"prefill": {"engine": INT4}, "decode": {"engine": INT4}}
    cluster.start_worker("prefill", "prefill-1")
    cluster.wait_ready(2, 2)
    cluster.kill("prefill-0")
    cluster.wait_until(
        lambda: [w.worker_id for w in cluster.ready(cluster_pb2.ROLE_PREFILL)] == ["prefill-1"], 30.0, "one left"
    )
    for length in (41, 60):  # the first one's KV is cached there, handed over
        prompt = prompt_of(length, seed=length)
        reply = ask(cluster, prompt, SPLIT)
        assert reply.split
        assert reply.token_ids == alone(cluster, prompt, 16)
        assert schemes(reply) == []
    cluster.assert_nothing_left()
