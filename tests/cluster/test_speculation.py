"""Speculation on one side of a split or on the other, over real processes: no token changes, and answers say what came
of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from deploy.clients import get_explanation
from deploy.explain_view import render, to_dict
from tests.model.test_kv_rounding import greedy
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
LOOKUP: dict[str, Any] = {"method": "lookup"}
DRAFT: dict[str, Any] = {"method": "draft", "model": "the same"}
PAIRS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, str]] = {  # prefill, decode, kv_dtype
    "decode looks up, KV in 8 bits": (None, LOOKUP, "int8"),
    "decode looks up": (None, LOOKUP, "model"),
    "prefill looks up": (LOOKUP, None, "model"),
    "decode has a draft model": (None, DRAFT, "model"),
    "prefill has a draft model": (DRAFT, None, "model"),
}
QUICK = next(iter(PAIRS))

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == QUICK else pytest.mark.long) for name in PAIRS]
)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = saved_model(tmp_path_factory.mktemp("model"), "Llama", num_hidden_layers=2, num_key_value_heads=2)
    saved_tokenizer(model)
    *methods, kv_dtype = PAIRS[request.param]
    settings = [
        {} if m is None else {"speculation": {**m, **({"model": str(model)} if m is DRAFT else {})}} for m in methods
    ]
    cluster = Cluster(
        tmp_path_factory.mktemp("speculation"),
        model,
        engine={
            "num_blocks": 96,
            "block_tokens": 8,
            "max_batch_tokens": 64,
            "max_running_sequences": 16,
            "kv_dtype": kv_dtype,
        },
        transport={"ucx_net_devices": "lo", "digest": True},
        role_overrides={role: {"engine": one} for role, one in zip(("prefill", "decode"), settings, strict=True)},
        forked=True,
        pace="10 0.1",  # a step costs what a hundred tokens do: drafts pay
    )
    try:
        yield cluster.start(120.0)
    finally:
        cluster.stop()


def prompt_of(length: int, seed: int) -> list[int]:
    """It repeats itself."""
    return [3 + (i % 11 * 7 + seed * 101) % 280 for i in range(length)]


def speculates(cluster: Cluster, role: str) -> bool:
    return "speculation" in cluster.role_overrides[role]["engine"]


def expected_of(cluster: Cluster, prompt: list[int], count: int) -> list[int]:
    if cluster.engine["kv_dtype"] == "model":
        return reference_greedy(str(cluster.model), prompt, count)
    return greedy(cluster.model, prompt, count, "int8")


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_no_token_changes_and_the_answer_says_what_was_drafted(cluster: Cluster, placement: int) -> None:
    accepted = 0
    for length in (23, 64, 90):
        prompt = prompt_of(length, seed=length)
        expected = expected_of(cluster, prompt, 40)
        sampling = generate_pb2.SamplingParams(max_tokens=40, ignore_eos=True)
        reply: Reply = cluster.ask(cluster.request(prompt, sampling, placement))
        assert reply.split is (placement == SPLIT)
        assert reply.token_ids[: len(expected)] == expected, length
        said = reply.finished.speculation
        assert said.accepted <= said.drafts
        assert (said.verifications == 0) is (said.drafts == 0)
        accepted += said.accepted
        explanation = get_explanation(cluster.channel, reply.started.request_id, 5.0)
        assert ("tokens a step" in render(explanation)) is reply.finished.HasField("speculation")
        if (shown := to_dict(explanation)["speculation"]) is not None:
            assert shown["accepted"] == said.accepted
            assert shown["tokens_a_step"] == pytest.approx(40 / (40 - said.accepted))
    assert (accepted > 0) is speculates(cluster, "decode"), "prefill's method drafts nothing for what it hands over"
    cluster.assert_nothing_left()
