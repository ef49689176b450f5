"""A decode worker of two ranks: exact, and gone as a whole when a rank is killed or stopped; its requests go on
elsewhere, and no process of it is left.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from diptych.v1 import cluster_pb2, generate_pb2

from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy, tokens_of
from tests.support.ranked_worker import ranks_of

PARAMS = generate_pb2.SamplingParams(max_tokens=60, ignore_eos=True)
STALL_S = 4.0

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """A router and a plain worker; each test adds a worker of two ranks."""
    cluster = Cluster(
        tmp_path_factory.mktemp("ranks"),
        small_model,
        prefill=0,
        engine={"num_blocks": 160, "max_batch_tokens": 128},
        transport={"ucx_net_devices": "lo"},
        worker={"stall_s": STALL_S, "transport_stall_s": 3.5},
        forked=True,
        pace="60 0.2",
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def start_ranks(cluster: Cluster, name: str, module: str) -> tuple[psutil.Process, psutil.Process]:
    """Returns the leader's process and the other rank's."""
    settings = cluster._worker_config("decode", name)
    settings["engine"]["tensor_parallel"] = 2
    cluster.processes.spawn(name, module, settings)
    cluster.wait_ready(0, 2, 120.0)
    leader = psutil.Process(cluster.processes.running[name].pid)
    (rank,) = ranks_of(leader.pid)
    return leader, rank


@pytest.mark.parametrize(
    ("victim", "how", "words"),
    [
        ("rank", signal.SIGKILL, "was killed by SIGKILL"),
        ("rank", signal.SIGSTOP, "has not moved for"),
        ("leader", signal.SIGKILL, ""),
    ],
)
def test_a_rank_that_goes_takes_its_worker_along_and_nothing_else(
    cluster: Cluster, small_model: Path, tokenizer: Any, victim: str, how: signal.Signals, words: str
) -> None:
    name = f"decode-{victim}-{how.name.lower()}"
    leader, rank = start_ranks(cluster, name, "tests.support.ranked_worker")
    prompts = [tokens_of(tokenizer, 24, seed=60 + i) for i in range(4)]
    replies = [Reply() for _ in prompts]

    def read(reply: Reply, call: Any) -> None:
        for response in call:
            reply.take(response)

    threads = [
        threading.Thread(target=read, args=(reply, cluster.stream(cluster.request(prompt, PARAMS), 120)), daemon=True)
        for reply, prompt in zip(replies, prompts, strict=True)
    ]
    for thread in threads:
        thread.start()
    cluster.wait_until(lambda: all(len(r.token_ids) > 1 for r in replies), 60, "tokens of all four")
    worker = cluster.processes.running.pop(name)
    (rank if victim == "rank" else leader).send_signal(how)
    code = worker.wait(60)
    assert code == (2 if victim == "rank" else -signal.SIGKILL), cluster.logs()
    rank.wait(10)
    for thread in threads:
        thread.join(90)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.token_ids == reference_greedy(str(small_model), prompt, 60)
    assert max(reply.finished.recoveries for reply in replies) == 1, "some of them ran on the worker of two ranks"
    assert words in (cluster.directory / f"{name}.log").read_text(errors="replace")
    cluster.wait_until(lambda: len(cluster.ready(cluster_pb2.ROLE_DECODE)) == 1, 20, "one decode worker")
    cluster.assert_nothing_left()


def test_a_worker_of_two_ranks_leaves_with_all_its_processes(cluster: Cluster) -> None:
    """Begun as users begin it."""
    _, rank = start_ranks(cluster, "decode-leaving", "decode_worker")
    worker = cluster.processes.running.pop("decode-leaving")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0, cluster.logs()
    rank.wait(10)
    cluster.wait_until(lambda: len(cluster.ready(cluster_pb2.ROLE_DECODE)) == 1, 20, "one decode worker")
    cluster.assert_nothing_left()
