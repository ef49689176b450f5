"""Log-probabilities of prompts, at every door: those of plain transformers, split, local, cached, without a token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diptych.client import Client
from diptych.v1 import generate_pb2

from tests.support.processes import Cluster
from tests.support.prompts import reference_model, tokens_of
from tests.support.raw_http import Http

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL


def sampling(**values: Any) -> generate_pb2.SamplingParams:
    return generate_pb2.SamplingParams(**{"max_tokens": 4, **values})


def expected(path: Path, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = reference_model(str(path))(torch.tensor([prompt])).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def compare(found: generate_pb2.PromptLogprobs, theirs: torch.Tensor, prompt: list[int], alternatives: int) -> None:
    count = len(prompt) - 1
    assert (found.position, found.alternatives) == (1, alternatives)
    assert list(found.token_ids) == prompt[1:]
    own = theirs.gather(-1, torch.tensor(prompt[1:])[:, None])
    assert np.abs(np.asarray(found.logprobs) - own[:, 0].numpy()).max() < 1e-4
    ranks = (theirs >= own).sum(-1)
    unclear = ((theirs - own).abs() < 1e-4).sum(-1) - 1
    assert (np.abs(np.asarray(found.ranks) - ranks.numpy()) <= unclear.numpy()).all()
    best = theirs.topk(alternatives + 1, dim=-1)
    values = np.asarray(found.top_logprobs).reshape(count, alternatives)
    assert np.abs(values - best.values[:, :alternatives].numpy()).max(initial=0) < 1e-4
    clear = (best.values.diff(dim=-1).abs() > 2e-4).all(-1).numpy()
    ids = np.asarray(found.top_token_ids).reshape(count, alternatives)
    assert np.array_equal(ids[clear], best.indices[:, :alternatives].numpy()[clear])
    assert clear.mean() > 0.9


@pytest.mark.timeout(300)
def test_split_and_local_beside_others_and_with_a_cached_prefix(
    cluster: Cluster, tokenizer: Any, model_path: Path
) -> None:
    prompt = tokens_of(tokenizer, 170, seed=5)
    theirs = expected(model_path, prompt)
    plain = [cluster.request(prompt, sampling(), placement) for placement in (LOCAL, SPLIT)]
    answers = [cluster.ask(request).token_ids for request in plain]  # from here on both have it cached
    requests = [
        cluster.request(prompt, sampling(prompt_logprobs=k), placement) for placement in (LOCAL, SPLIT) for k in (0, 5)
    ]
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda r: cluster.ask(r, 120.0), [*requests, *plain]))
    for request, reply in zip([*requests, *plain], replies, strict=True):
        assert reply.split is (request.placement == SPLIT)
        assert reply.token_ids == answers[0] == answers[1]
    for request, reply in zip(requests, replies, strict=False):
        assert reply.finished.usage.cached_tokens == 0
        compare(reply.prompt_logprobs, theirs, prompt, request.sampling.prompt_logprobs)
    assert all(reply.prompt_logprobs is None for reply in replies[len(requests) :])


@pytest.mark.timeout(120)
def test_without_a_token_the_prompt_is_scored_and_nothing_is_handed_over(
    cluster: Cluster, tokenizer: Any, model_path: Path
) -> None:
    prompt = tokens_of(tokenizer, 80, seed=6)
    reply = cluster.ask(cluster.request(prompt, sampling(max_tokens=0, prompt_logprobs=1), SPLIT))
    assert (reply.token_ids, reply.text, reply.split) == ([], "", False)
    assert reply.finished.reason == generate_pb2.FINISH_REASON_LENGTH
    compare(reply.prompt_logprobs, expected(model_path, prompt), prompt, 1)
    with Client(cluster.target) as client:
        answer = client.generate(prompt, prompt_logprobs=1, max_tokens=1)
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs.logprobs == pytest.approx(reply.prompt_logprobs.logprobs, abs=1e-4)
    start = generate_pb2.StartRequest(handle=7, request=cluster.request(prompt, sampling(prompt_logprobs=0)))
    done = threading.Event()

    def asked() -> Iterator[generate_pb2.SessionRequest]:
        yield generate_pb2.SessionRequest(starts=[start])
        done.wait(60)

    kinds: list[str | None] = []
    for said in cluster.session(asked()):
        kinds += [event.WhichOneof("event") for event in said.events]
        for event in said.events:
            if event.HasField("prompt_logprobs"):
                assert event.prompt_logprobs.logprobs == pytest.approx(reply.prompt_logprobs.logprobs, abs=1e-4)
        if "finished" in kinds:
            done.set()
            break
    assert kinds == ["started", "prompt_logprobs", "finished"]


@pytest.mark.timeout(120)
def test_over_http(cluster: Cluster, tokenizer: Any, model_path: Path) -> None:
    text = "The capital of France is Paris, and that of Italy is Rome."
    prompt = tokenizer(text)["input_ids"]
    theirs = expected(model_path, prompt)
    own = theirs.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    http = Http(cluster.http_port)
    body: Any = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choice = http.post("/v1/completions", body).json["choices"][0]
    said = choice["logprobs"]
    assert said["token_logprobs"][0] is None
    assert said["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
    assert "".join(said["tokens"]) == choice["text"]
    for offset, token in zip(said["text_offset"], said["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    best = theirs.max(dim=-1)
    for place, entry in enumerate(said["top_logprobs"][1:-1]):
        assert max(entry.values()) == pytest.approx(best.values[place].item(), abs=1e-4)
    body = {"prompt": prompt, "max_tokens": 0, "prompt_logprobs": 2}
    scored = http.post("/v1/completions", body).json["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    assert [entry[str(token)]["logprob"] for entry, token in zip(scored[1:], prompt[1:], strict=True)] == pytest.approx(
        own, abs=1e-4
    )
