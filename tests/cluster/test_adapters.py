"""LoRA adapters over real processes: split and local, alone and mixed, with more adapters than slots."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from diptych.v1 import generate_pb2

from tests.support.adapters import merged_model, saved_adapter
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
NAMES = ("ann", "bob", "cid")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = saved_model(tmp_path_factory.mktemp("model"), "Llama", num_key_value_heads=2)
    saved_tokenizer(model)
    home = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(NAMES):
        adapter = saved_adapter(model, home / name, 70 + i, rank=2 + i, size=0.3)
        merged_model(model, adapter).save_pretrained(merged_of(model, name))
    adapters = {"models": {name: str(home / name) for name in NAMES}, "slots": 2}
    engine = {"kernels": "torch", "num_blocks": 64, "block_tokens": 8, "max_batch_tokens": 64, "adapters": adapters}
    engine |= {"max_running_sequences": 16}
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"), model, engine=engine, transport={"ucx_net_devices": "lo"}, forked=True
    )
    try:
        yield cluster.start(200.0)
    finally:
        cluster.stop()


def merged_of(model: Path, name: str) -> Path:
    return model.with_name(f"merged-{name}") if name else model


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(length)]


def ask(cluster: Cluster, prompt: list[int], placement: int, name: str) -> Reply:
    sampling = generate_pb2.SamplingParams(max_tokens=8, ignore_eos=True)
    return cluster.ask(cluster.request(prompt, sampling, placement, model=name))


def expected(cluster: Cluster, prompt: list[int], name: str) -> list[int]:
    return reference_greedy(str(merged_of(cluster.model, name)), prompt, 8)


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_each_name_answers_with_its_adapter(cluster: Cluster, placement: int) -> None:
    """One prompt under every name, twice: what one has left in the caches is never another's."""
    prompt = prompt_of(45, seed=placement)
    wanted = {name: expected(cluster, prompt, name) for name in ("", *NAMES)}
    assert len(set(map(tuple, wanted.values()))) == 4
    for _ in range(2):
        for name, tokens in wanted.items():
            reply = ask(cluster, prompt, placement, name)
            assert reply.token_ids[: len(tokens)] == tokens, name
            assert reply.split is (placement == SPLIT)
    cluster.assert_nothing_left()


def test_many_at_once(cluster: Cluster) -> None:
    asked = [(prompt_of(20 + 7 * i, seed=i), ("", *NAMES)[i % 4], (SPLIT, LOCAL)[i // 4 % 2]) for i in range(8)]
    found: dict[int, Reply] = {}

    def run(i: int) -> None:
        prompt, name, placement = asked[i]
        found[i] = ask(cluster, prompt, placement, name)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for i, (prompt, name, _) in enumerate(asked):
        tokens = expected(cluster, prompt, name)
        assert found[i].token_ids[: len(tokens)] == tokens, (i, name)
    cluster.assert_nothing_left()


def test_models_are_listed_and_others_are_unknown(cluster: Cluster) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http_port}/v1/models", timeout=20) as answer:
        listed = {one["id"]: one.get("parent") for one in json.load(answer)["data"]}
    own = next(iter(listed))
    assert listed == {own: None, **dict.fromkeys(NAMES, own)}
    with pytest.raises(grpc.RpcError) as refused:
        ask(cluster, [5, 6, 7], LOCAL, "dan")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    assert "model 'dan' is not served here" in refused.value.details()  # type: ignore[attr-defined]
