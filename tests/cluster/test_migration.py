"""Long answers on a worker that leaves, over real processes: they go on elsewhere, exact, and it has left in moments;
also when the worker that they leave is killed in the middle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import cluster_pb2, generate_pb2

from tests.support.processes import Cluster, Reply
from tests.support.prompts import tokens_of

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
TOKENS = 200
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.95, "seed": 11},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"logprobs": 2},
]

pytestmark = pytest.mark.timeout(300)

# Steps take the embedded model's time on a good core. Links are slow, so that a move takes about a second: long enough
# for a worker to be killed in the middle of it, short beside the seconds that an answer has left.
PACE, LINK_BYTES_PER_S = "30 0.5", 100e3


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, small_model: Path, tokenizer: Any) -> Iterator[Answers]:
    cluster = Cluster(
        tmp_path_factory.mktemp("migration"),
        small_model,
        decode=2,
        engine={"num_blocks": 400},
        forked=True,
        pace=PACE,
        transport={"ucx_net_devices": "lo", "digest": True, "slow_bytes_per_s": LINK_BYTES_PER_S},
    )
    try:
        yield Answers(cluster.start(), tokenizer)
    finally:
        cluster.stop()


class Answers:
    """The same requests, before and while a worker leaves."""

    def __init__(self, cluster: Cluster, tokenizer: Any) -> None:
        self.cluster = cluster
        self._requests = [
            cluster.request(
                tokens_of(tokenizer, 40 + 40 * n, seed=n),
                generate_pb2.SamplingParams(max_tokens=TOKENS, ignore_eos=True, **kind),
                (SPLIT, LOCAL)[n % 2],
            )
            for n, kind in enumerate(KINDS)
        ]
        self.expected = self._begin()
        self._join(self.expected)
        self.replies: list[Reply] = []

    def _begin(self) -> list[Reply]:
        replies = [Reply() for _ in self._requests]
        self.ended_at = [0.0] * len(replies)

        def run(n: int) -> None:
            for response in self.cluster.stream(self._requests[n], 200.0):
                replies[n].take(response)
            self.ended_at[n] = time.monotonic()

        self._threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(replies))]
        for thread in self._threads:
            thread.start()
        return replies

    def begin(self) -> None:
        """All run, and have some tokens."""
        self.replies = self._begin()
        self.cluster.wait_until(lambda: all(len(r.token_ids) > 20 for r in self.replies), 60.0, "tokens of all")

    def _join(self, replies: list[Reply]) -> None:
        for thread in self._threads:
            thread.join(200.0)
        assert all(reply.finished is not None for reply in replies), self.cluster.logs()

    def busiest(self) -> tuple[str, str]:
        """And the other one."""
        workers = sorted(self.cluster.ready(cluster_pb2.ROLE_DECODE), key=lambda w: -w.dispatched_requests)
        return workers[0].worker_id, workers[1].worker_id

    def on(self, worker_id: str) -> list[int]:
        return [n for n, reply in enumerate(self.replies) if reply.started.route.decode_worker == worker_id]

    def assert_exact(self) -> None:
        self._join(self.replies)
        for reply, expected in zip(self.replies, self.expected, strict=True):
            assert reply.token_ids == expected.token_ids
            assert reply.text == expected.text
            assert len(reply.logprobs) == len(expected.logprobs)
            assert reply.finished.usage.completion_tokens == TOKENS
            assert reply.finished.usage.prompt_tokens == expected.finished.usage.prompt_tokens


def wait_until_something_arrives(cluster: Cluster, target: str) -> None:
    """At the target it is held until its KV is there."""

    def held() -> bool:
        worker = next(w for w in cluster.cluster().workers if w.worker_id == target)
        return worker.load.waiting_sequences > 0

    cluster.wait_until(held, 30.0, f"an answer on its way to {target}")


def test_a_worker_that_leaves_hands_its_answers_on(answers: Answers) -> None:
    cluster = answers.cluster
    answers.begin()
    leaving, other = answers.busiest()
    on_it = answers.on(leaving)
    assert on_it
    process, began = cluster.processes.running[leaving], time.monotonic()
    cluster.terminate(leaving)
    process.wait(60.0)
    left_s = time.monotonic() - began
    cluster.kill(leaving)  # it is gone already: nobody is to wonder why
    answers.assert_exact()
    waiting_s = max(answers.ended_at[n] for n in on_it) - began
    moved = [n for n in on_it if answers.replies[n].finished.route.decode_worker == other]
    print(f"left after {left_s:.1f} s, its {len(on_it)} answers ended after {waiting_s:.1f} s, {len(moved)} moved")
    assert len(moved) >= len(on_it) - 1, "the last one may have had nothing left worth a move"
    assert left_s < waiting_s * 0.7
    for n in on_it:
        assert answers.replies[n].finished.recoveries == 0
    cluster.start_worker("decode", leaving)
    cluster.wait_ready(1, 2)
    cluster.assert_nothing_left()


def test_a_source_that_is_killed_in_the_middle_costs_no_token(answers: Answers) -> None:
    cluster = answers.cluster
    answers.begin()
    leaving, other = answers.busiest()
    cluster.terminate(leaving)
    wait_until_something_arrives(cluster, other)
    cluster.kill(leaving)
    cluster.start_worker("decode", leaving)
    answers.assert_exact()
    assert any(reply.finished.recoveries for reply in answers.replies), "the kill came too late"
    cluster.wait_ready(1, 2)
    cluster.assert_nothing_left()
