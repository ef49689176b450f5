"""Requests that would take workers down, on real processes: what they cost the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import generate_pb2

from tests.cluster.conftest import PACE
from tests.support.poisonable_worker import KILLS, NO_NUMBERS, RAISES
from tests.support.processes import Cluster
from tests.support.prompts import reference_greedy, tokens_of

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
ANSWER_TOKENS = 24

pytestmark = pytest.mark.timeout(400)


class PoisonableCluster(Cluster):
    def start_worker(self, role: str, worker_id: str) -> None:
        self.processes.spawn(worker_id, "tests.support.poisonable_worker", self._worker_config(role, worker_id))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    cluster = PoisonableCluster(
        tmp_path_factory.mktemp("poison"),
        small_model,
        prefill=1,
        decode=2,
        engine={"num_blocks": 160, "async_scheduling": "on"},
        transport={"ucx_net_devices": "lo"},
        pace=PACE,
        forked=True,
    )
    try:
        yield cluster.start(240.0)
    finally:
        cluster.stop()


class Bystanders:
    """Answers under way on every worker, on both routes."""

    def __init__(self, cluster: Cluster, tokenizer: Any) -> None:
        self._cluster = cluster
        self._prompts = [tokens_of(tokenizer, 40 + 7 * i, seed=i) for i in range(4)]
        self._expected = [reference_greedy(str(cluster.model), prompt, ANSWER_TOKENS) for prompt in self._prompts]

    def __enter__(self) -> Bystanders:
        self._threads = ThreadPoolExecutor(8)
        sampling = generate_pb2.SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        salt = f"{time.monotonic()}"
        self._replies = [
            self._threads.submit(
                self._cluster.ask, self._cluster.request(prompt, sampling, (SPLIT, LOCAL)[i % 2], cache_salt=salt)
            )
            for i, prompt in enumerate(self._prompts)
        ]
        time.sleep(0.1)
        return self

    def __exit__(self, *_: Any) -> None:
        self._threads.shutdown()

    def assert_exact(self) -> None:
        for reply, expected in zip(self._replies, self._expected, strict=True):
            got = reply.result(60)
            assert got.token_ids[: len(expected)] == expected
            assert got.finished.recoveries == 0

    def ends(self) -> list[str]:
        """`exact`, or the error's message."""
        found: list[str] = []
        for reply, expected in zip(self._replies, self._expected, strict=True):
            try:
                assert reply.result(60).token_ids[: len(expected)] == expected
                found.append("exact")
            except grpc.RpcError as error:
                found.append(f"{error.code().name}: {error.details()}")  # type: ignore[attr-defined]
        return found


@pytest.fixture(scope="module")
def bystanders(cluster: Cluster, tokenizer: Any) -> Bystanders:
    return Bystanders(cluster, tokenizer)


def pids(cluster: Cluster) -> dict[str, int]:
    assert not cluster.processes.ended()
    return {name: process.pid for name, process in cluster.processes.running.items()}


def ended(cluster: Cluster, count: int) -> dict[str, int]:
    """A process is gone a moment after its connections."""
    deadline = time.monotonic() + 20
    while len(cluster.processes.ended()) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return cluster.processes.ended()


def asked(cluster: Cluster, placement: int, **sampling: Any) -> tuple[str, str]:
    """Code and message of a request's error."""
    request = cluster.request([9, 8, 7] * 20, generate_pb2.SamplingParams(**sampling), placement)
    with pytest.raises(grpc.RpcError) as refused:
        cluster.ask(request)
    error: Any = refused.value
    return error.code().name, error.details()


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_the_query_of_death_is_refused_by_its_range(cluster: Cluster, bystanders: Bystanders, placement: int) -> None:
    before = pids(cluster)
    with bystanders:
        code, message = asked(cluster, placement, temperature=1, top_p=0.9, repetition_penalty=1e-38)
        bystanders.assert_exact()
    assert code == "INVALID_ARGUMENT"
    assert "[0.01, 100]" in message
    assert pids(cluster) == before
    cluster.assert_nothing_left()


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
@pytest.mark.parametrize(
    ("seed", "words"), [(RAISES, "this row cannot be computed"), (NO_NUMBERS, "the model computed no finite logits")]
)
def test_what_cannot_be_computed_ends_alone(
    cluster: Cluster, bystanders: Bystanders, placement: int, seed: int, words: str
) -> None:
    before = pids(cluster)
    with bystanders:
        code, message = asked(cluster, placement, temperature=1, seed=seed, max_tokens=8)
        bystanders.assert_exact()
    assert code == "INTERNAL"
    assert words in message
    assert pids(cluster) == before
    cluster.assert_nothing_left()


def test_what_kills_processes_kills_two_and_no_third(cluster: Cluster, bystanders: Bystanders) -> None:
    with bystanders:
        code, message = asked(cluster, LOCAL, temperature=1, seed=KILLS, max_tokens=8)
        others = bystanders.ends()
    assert code == "INTERNAL"
    assert "running on two workers that crashed" in message
    dead = ended(cluster, 2)
    assert len(dead) == 2, dead
    assert all(end == "exact" or "two workers that crashed" in end or "UNAVAILABLE" in end for end in others), others
    for name in dead:
        cluster.processes.kill(name)
        cluster.start_worker(name.split("-")[0], name)
    cluster.wait_ready(1, 2, 240.0)
    with bystanders:
        bystanders.assert_exact()
    cluster.assert_nothing_left()
