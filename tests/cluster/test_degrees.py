"""Pools of different degree over real processes, all pairs of 1, 2 and 4 ranks: split and local, over two turns, many
at once, sampled with a seed. How answers move between such workers: test_degrees_moves.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from tests.support.degrees import ENGINE, WINDOW, Degree, DegreesCluster, alone, made_model, prompt_of
from tests.support.processes import Reply
from tests.support.prompts import reference_greedy

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
# By family, for 1, 2 and 4 ranks: the groups that its experts are in.
GROUPS = {
    "heads": {1: 1, 2: 1, 4: 1},
    "experts": {1: 1, 2: 2, 4: 2},
    "windows beside full": {1: 1, 2: 1, 4: 2},
    "latent": {1: 1, 2: 2, 4: 2},
}
Pair = tuple[str, Degree, Degree]  # of a prefill worker and of a decode worker
PAIRS: list[Pair] = [
    (family, (prefill, groups[prefill]), (decode, groups[decode]))
    for family, groups in GROUPS.items()
    for prefill in groups
    for decode in groups
    if (prefill, decode) != (1, 1)
] + [
    ("one head", (2, 1), (1, 1)),
    ("one head", (1, 1), (4, 1)),
    ("experts", (4, 1), (2, 1)),
    ("experts", (2, 1), (4, 4)),
    ("windows beside full", (2, 2), (4, 1)),
    ("latent", (4, 1), (2, 1)),
]
QUICK = ("heads", (2, 1), (1, 1))

pytestmark = pytest.mark.timeout(300)


def _named(pair: Pair) -> str:
    family, *degrees = pair
    prefill, decode = (f"{ranks}" + (f"x{groups}" if groups > 1 else "") for ranks, groups in degrees)
    return f"{family.replace(' ', '_')}-{prefill}_to_{decode}"


PARAMS = [pytest.param(pair, id=_named(pair), marks=() if pair == QUICK else pytest.mark.long) for pair in PAIRS]


@pytest.fixture(scope="module", params=PARAMS)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DegreesCluster]:
    name, prefill, decode = request.param
    cluster = DegreesCluster(
        tmp_path_factory.mktemp("degrees"),
        made_model(tmp_path_factory.mktemp("model"), name),
        engine=ENGINE,
        transport={"ucx_net_devices": "lo"},
        forked=True,
        worker_module="tests.support.ranked_worker",
        degrees={"prefill-0": prefill, "decode-0": decode},
    )
    try:
        cluster.start(120.0)
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.parametrize("placement", [SPLIT, LOCAL], ids=["split", "local"])
def test_answers_are_those_of_plain_transformers(cluster: DegreesCluster, placement: int) -> None:
    for length in (5, 3 * WINDOW + 1):
        prompt = prompt_of(length, seed=length)
        for _ in range(2):
            expected = reference_greedy(str(cluster.model), prompt, 16)
            for reply in cluster.undisturbed(prompt, placement, 16):
                assert reply.token_ids[: len(expected)] == expected, length
                assert reply.split is (placement == SPLIT)
            prompt = [*prompt, *expected, 7, 8, 9]
    cluster.assert_nothing_left()


def test_sampling_with_a_seed_is_that_of_one_process(cluster: DegreesCluster) -> None:
    fields: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7, "repetition_penalty": 1.1}
    prompt = prompt_of(50, seed=3)
    expected = alone(cluster.model, prompt, 24, **fields)
    for placement in (SPLIT, LOCAL):
        for reply in cluster.undisturbed(prompt, placement, 24, ignore_eos=True, **fields):
            assert reply.token_ids == expected
            assert reply.split is (placement == SPLIT)


def test_many_at_once(cluster: DegreesCluster) -> None:
    prompts = [prompt_of(60 + 7 * i, seed=i) for i in range(6)]
    expected = [reference_greedy(str(cluster.model), prompt, 24) for prompt in prompts]
    replies: dict[int, Reply] = {}

    def run(i: int) -> None:
        replies[i] = cluster.answer(prompts[i], (SPLIT, SPLIT, LOCAL)[i % 3], 24)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, tokens in enumerate(expected):
        assert replies[i].token_ids[: len(tokens)] == tokens, i
    cluster.assert_nothing_left()
