"""Models whose layers keep different things, or whose weights are rounded, over real processes: split and local, over
two turns, after a kill -9.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import cluster_pb2, generate_pb2

from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.families import SMALL_LATENT, longrope
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy
from tests.support.rounded import model_with_rounded_weights

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
WINDOW, ORIGINAL = 40, 64
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "windows beside full, sinks, experts": (
        "GptOss",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
    "windows beside full, soft caps": ("Gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "windows alone": ("Mistral", {"sliding_window": WINDOW}),
    "two rotary tables": ("Phi3", longrope(ORIGINAL)),
    "states beside full, convolutions": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "latent": ("DeepseekV3", SMALL_LATENT),
    "weights in 4 bits": ("Llama", {"num_key_value_heads": 2}),
    "experts in 4 bits": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 200, "num_key_value_heads": 2},
    ),
}
ROUNDED = {"weights in 4 bits": ("int4", ("attention", "head", "mlp")), "experts in 4 bits": ("int4", ("mlp",))}

pytestmark = pytest.mark.timeout(240)


QUICK = next(iter(FAMILIES))
PARAMS = [pytest.param(name, marks=() if name == QUICK else pytest.mark.long) for name in FAMILIES]


@pytest.fixture(scope="module", params=PARAMS)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    family, changes = FAMILIES[request.param]
    model = saved_model(tmp_path_factory.mktemp("model"), family, num_hidden_layers=4, **changes)
    saved_tokenizer(model)
    engine: dict[str, Any] = {"kernels": "torch"}
    if request.param in ROUNDED:
        quantization, groups = ROUNDED[request.param]
        engine = {"quantization": quantization, "quantized_groups": list(groups)}
        model_with_rounded_weights(model, quantization, groups).save_pretrained(rounded_of(model))
    cluster = Cluster(
        tmp_path_factory.mktemp("layouts"),
        model,
        decode=2,
        engine={
            "num_blocks": 64,
            "block_tokens": 8,
            "max_batch_tokens": 64,
            "max_running_sequences": 16,
            **engine,
        },
        transport={"ucx_net_devices": "lo", "digest": True},
        forked=True,
        pace="10 0.1",  # so that a kill comes before the end
    )
    try:
        yield cluster.start(120.0)
    finally:
        cluster.stop()


def rounded_of(model: Path) -> Path:
    return model.with_name(f"{model.name}-rounded")


def reference_of(cluster: Cluster) -> str:
    """The model that the cluster serves, for transformers: with rounded weights, if it rounds them."""
    rounded = rounded_of(cluster.model)
    return str(rounded if rounded.exists() else cluster.model)


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(length)]


def ask(cluster: Cluster, prompt: list[int], placement: int, tokens: int, **fields: Any) -> Reply:
    sampling = generate_pb2.SamplingParams(max_tokens=tokens)
    return cluster.ask(cluster.request(prompt, sampling, placement, **fields))


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_answers_are_those_of_plain_transformers(cluster: Cluster, placement: int) -> None:
    """Prompts of less than one window to three, and of an original context, each with a second turn behind what the
    cache has of the first.
    """
    for length in (5, WINDOW, ORIGINAL, 3 * WINDOW + 1):
        prompt = prompt_of(length, seed=length)
        for _ in range(2):
            expected = reference_greedy(reference_of(cluster), prompt, 24)
            reply = ask(cluster, prompt, placement, 24)
            assert reply.token_ids[: len(expected)] == expected, length
            assert reply.split is (placement == SPLIT)
            assert not reply.finished.recoveries
            prompt = [*prompt, *reply.token_ids, 7, 8, 9]
    cluster.assert_nothing_left()


def test_an_answer_survives_its_decode_worker(cluster: Cluster) -> None:
    prompts = [prompt_of(90 + i, seed=i) for i in range(4)]
    expected = [reference_greedy(reference_of(cluster), prompt, 100) for prompt in prompts]
    replies = [Reply() for _ in prompts]
    begun = threading.Semaphore(0)

    def run(i: int) -> None:
        request = cluster.request(
            prompts[i], generate_pb2.SamplingParams(max_tokens=100, ignore_eos=True), (SPLIT, LOCAL)[i % 2]
        )
        for response in cluster.stream(request):
            replies[i].take(response)
            begun.release()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for _ in range(12):
        assert begun.acquire(timeout=60)
    busiest = max(cluster.ready(cluster_pb2.ROLE_DECODE), key=lambda w: w.dispatched_requests)
    cluster.kill(busiest.worker_id)
    for thread in threads:
        thread.join(60)
    assert any(reply.finished and reply.finished.recoveries for reply in replies), "the kill came too late"
    for reply, tokens in zip(replies, expected, strict=True):
        assert reply.token_ids[: len(tokens)] == tokens
    cluster.start_worker("decode", busiest.worker_id)
    cluster.wait_ready(1, 2)
    cluster.assert_nothing_left()
