"""Pools of different degree over real processes: split and local, over two turns, many at once, sampled with a seed,
and after a rank of the source is killed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from diptych.v1 import cluster_pb2, generate_pb2

from engine.config import EngineConfig
from engine.runner import ModelRunner
from engine.types import SamplingParams
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.courses import answer_alone
from tests.support.families import SMALL_LATENT
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy
from tests.support.ranked_worker import ranks_of

SPLIT, LOCAL, AUTO = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_AUTO
WINDOW = 40
HEADS = {"num_attention_heads": 4, "initializer_range": 0.1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": ("Qwen3", {**HEADS, "num_key_value_heads": 2}),
    "one head": ("Llama", HEADS),
    "experts": ("Mixtral", {**HEADS, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "windows beside full": (
        "GptOss",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
    "latent": ("DeepseekV3", SMALL_LATENT),
}
# Ranks of a prefill worker and of a decode worker, each with the groups of its experts.
PAIRS = [
    ("heads", (2, 1), (1, 1)),
    ("heads", (1, 1), (2, 1)),
    ("heads", (2, 1), (2, 1)),
    ("one head", (2, 1), (1, 1)),
    ("experts", (1, 1), (2, 2)),
    ("windows beside full", (2, 2), (1, 1)),
    ("latent", (1, 1), (2, 1)),
]
ENGINE = {
    "num_blocks": 64,
    "block_tokens": 8,
    "max_batch_tokens": 64,
    "max_running_sequences": 16,
    "kernels": "torch",
}

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


@dataclass
class Pools:
    cluster: Cluster
    prefill: int
    decode: int


def _named(pair: tuple[str, tuple[int, int], tuple[int, int]]) -> str:
    family, (prefill, _), (decode, _) = pair
    return f"{family.replace(' ', '_')}-{prefill}_to_{decode}"


@pytest.fixture(scope="module", params=PAIRS, ids=_named)
def pools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    name, prefill, decode = request.param
    family, changes = FAMILIES[name]
    model = saved_model(tmp_path_factory.mktemp("model"), family, **changes)
    saved_tokenizer(model)
    degrees = {
        role: {"engine": {"tensor_parallel": ranks, "expert_parallel": groups}}
        for role, (ranks, groups) in (("prefill", prefill), ("decode", decode))
    }
    cluster = Cluster(
        tmp_path_factory.mktemp("degrees"),
        model,
        engine=ENGINE,
        transport={"ucx_net_devices": "lo"},
        role_overrides=degrees,
        forked=True,
        worker_module="tests.support.ranked_worker",
    )
    try:
        yield Pools(cluster.start(120.0), prefill[0], decode[0])
    finally:
        cluster.stop()


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(length)]


def ask(cluster: Cluster, prompt: list[int], placement: int, tokens: int, **sampling: Any) -> Reply:
    params = generate_pb2.SamplingParams(max_tokens=tokens, **sampling)
    return cluster.ask(cluster.request(prompt, params, placement, cache_salt=str(placement)))


@pytest.mark.parametrize("placement", [SPLIT, LOCAL], ids=["split", "local"])
def test_answers_are_those_of_plain_transformers(pools: Pools, placement: int) -> None:
    cluster = pools.cluster
    for length in (5, 3 * WINDOW + 1):
        prompt = prompt_of(length, seed=length)
        for _ in range(2):
            expected = reference_greedy(str(cluster.model), prompt, 16)
            reply = ask(cluster, prompt, placement, 16)
            assert reply.token_ids[: len(expected)] == expected, length
            assert reply.split is (placement == SPLIT)
            assert not reply.finished.recoveries, "the KV came over"
            prompt = [*prompt, *reply.token_ids, 7, 8, 9]
    cluster.assert_nothing_left()


def test_sampling_with_a_seed_is_that_of_one_process(pools: Pools) -> None:
    cluster = pools.cluster
    fields: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7, "repetition_penalty": 1.1}
    prompt = prompt_of(50, seed=3)
    runner = ModelRunner(
        EngineConfig.model_validate({**ENGINE, "model": str(cluster.model), "dtype": "float32", "threads": 1})
    )
    alone = answer_alone(runner, prompt, SamplingParams(max_tokens=24, **fields))
    for placement in (SPLIT, LOCAL):
        reply = ask(cluster, prompt, placement, 24, ignore_eos=True, **fields)
        assert reply.token_ids == alone
        assert reply.split is (placement == SPLIT)
        assert not reply.finished.recoveries


def test_many_at_once(pools: Pools) -> None:
    cluster = pools.cluster
    prompts = [prompt_of(60 + 7 * i, seed=i) for i in range(6)]
    expected = [reference_greedy(str(cluster.model), prompt, 24) for prompt in prompts]
    replies: dict[int, Reply] = {}

    def run(i: int) -> None:
        replies[i] = ask(cluster, prompts[i], (SPLIT, SPLIT, LOCAL)[i % 3], 24)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, tokens in enumerate(expected):
        assert replies[i].token_ids[: len(tokens)] == tokens, i
    cluster.assert_nothing_left()


def test_a_source_that_loses_a_rank_ends_and_costs_no_answer(pools: Pools) -> None:
    """Then decode computes prompts itself, until there is a source again."""
    cluster = pools.cluster
    source = cluster.processes.running.pop("prefill-0")
    ranks = ranks_of(source.pid)
    assert len(ranks) == pools.prefill - 1
    (ranks[-1] if ranks else source).send_signal(signal.SIGKILL)
    assert source.wait(60) == (2 if ranks else -signal.SIGKILL), cluster.logs()
    for rank in ranks:
        rank.wait(10)
    cluster.wait_until(lambda: not cluster.ready(cluster_pb2.ROLE_PREFILL), 20.0, "its end is noticed")
    prompt = prompt_of(90, seed=5)
    expected = reference_greedy(str(cluster.model), prompt, 16)
    reply = ask(cluster, prompt, AUTO, 16)
    assert reply.token_ids[: len(expected)] == expected
    cluster.start_worker("prefill", "prefill-0")
    cluster.wait_ready(1, 1, 90.0)
    reply = ask(cluster, prompt, SPLIT, 16)
    assert reply.token_ids[: len(expected)] == expected
    assert reply.split
    assert not reply.finished.recoveries
    cluster.assert_nothing_left()
