"""Pools that are absent, slow, far away, leaving or killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import cluster_pb2, generate_pb2

from tests.cluster.conftest import PACE
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy, tokens_of

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL


@contextmanager
def running(directory: Path, model: Path, **options: Any) -> Iterator[Cluster]:
    cluster = Cluster(
        directory,
        model,
        engine={"num_blocks": 160, "max_batch_tokens": 128},
        transport={"ucx_net_devices": "lo", **options.pop("transport", {})},
        forked=True,
        **options,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """Pools that TCP connects, at 150 KB/s: 600 tokens of this model have 300 KB."""
    transport = {"ucx_tls": "tcp", "pull_mode": "auto", "digest": True, "slow_bytes_per_s": 150e3}
    with running(tmp_path_factory.mktemp("far"), small_model, transport=transport, pace=PACE) as cluster:
        yield cluster


def test_the_first_token_does_not_wait_for_the_transfer(far: Cluster, tokenizer: Any) -> None:
    """It is there seconds before the KV is."""
    prompt = tokens_of(tokenizer, 600, seed=1)
    reply = far.ask(far.request(prompt, generate_pb2.SamplingParams(max_tokens=4), SPLIT))
    assert reply.token_ids == reference_greedy(str(far.model), prompt, 4)
    timings = reply.finished.timings
    assert timings.kv_early_share < 0.9
    assert timings.adopt_ms > 200, "the transfer was still under way when prefill ended"
    assert timings.handoff_gap_ms >= timings.adopt_ms * 0.9
    assert reply.arrival_s[1] - reply.arrival_s[0] > 0.2, "the client had its first token meanwhile"
    far.assert_nothing_left()


def test_over_tcp_by_reader_driven_write(far: Cluster, tokenizer: Any) -> None:
    for length in (40, 700):
        prompt = tokens_of(tokenizer, length, seed=length)
        reply = far.ask(far.request(prompt, generate_pb2.SamplingParams(max_tokens=6), SPLIT))
        assert reply.token_ids == reference_greedy(str(far.model), prompt, 6)
        assert reply.finished.recoveries == 0
    assert "pull mode write" in (far.directory / "decode-0.log").read_text()
    far.assert_nothing_left()


def test_without_a_prefill_pool_everything_runs_on_decode(decode_only: Cluster, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 500, seed=2)
    reply = decode_only.ask(decode_only.request(prompt, generate_pb2.SamplingParams(max_tokens=4)))
    assert reply.token_ids == reference_greedy(str(decode_only.model), prompt, 4)
    assert reply.started.route.rule == "no_prefill_worker"
    with pytest.raises(grpc.RpcError) as error:
        decode_only.ask(decode_only.request(prompt, placement=SPLIT))
    assert error.value.code().name == "FAILED_PRECONDITION"  # type: ignore[attr-defined]
    decode_only.assert_nothing_left()


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(call())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, result


@pytest.mark.timeout(300)
def test_workers_come_go_and_die(tmp_path: Path, small_model: Path, tokenizer: Any) -> None:
    """One story, since a cluster costs seconds: every answer exact or an explicit error."""
    prompt = tokens_of(tokenizer, 800, seed=3)
    params = generate_pb2.SamplingParams(max_tokens=24)
    expected = reference_greedy(str(small_model), prompt, 24)
    with running(tmp_path, small_model, decode=2, pace="25 1.5") as cluster:  # more than a second of prefill

        def ask(placement: int) -> Reply:
            return cluster.ask(cluster.request(prompt, params, placement, cache_salt=str(time.monotonic())), 90)

        # The prefill worker dies while it computes: decode computes the rest.
        thread, result = in_background(lambda: ask(SPLIT))
        leased = lambda: any(w.load.leased_blocks for w in cluster.ready(cluster_pb2.ROLE_PREFILL))  # noqa: E731
        cluster.wait_until(leased, 20, "a chunk is computed")
        cluster.kill("prefill-0")
        thread.join(90)
        assert isinstance(result[0], Reply), result
        assert result[0].token_ids == expected
        assert result[0].finished.recoveries == 1

        # It comes back as another incarnation under the same name and serves again.
        cluster.start_worker("prefill", "prefill-0")
        cluster.wait_ready(1, 2)
        assert ask(SPLIT).token_ids == expected

        # The decode worker dies mid-stream: the other goes on at the next position.
        reply = Reply()
        call = cluster.stream(cluster.request(prompt, params, SPLIT, cache_salt="mid"), 90)
        killed = ""
        for response in call:
            reply.take(response)
            if len(reply.token_ids) >= 4 and not killed:
                killed = reply.started.route.decode_worker
                cluster.kill(killed)
        assert reply.token_ids == expected
        assert reply.finished.recoveries == 1
        assert reply.finished.route.decode_worker != killed
        cluster.wait_until(lambda: len(cluster.ready(cluster_pb2.ROLE_DECODE)) == 1, 10, "one decode worker")

        # The last one is asked to leave mid-stream: it finishes what it has and takes no more.
        (last,) = [w.worker_id for w in cluster.ready(cluster_pb2.ROLE_DECODE)]
        long = generate_pb2.SamplingParams(max_tokens=60, ignore_eos=True)
        call = cluster.stream(cluster.request(prompt, long, LOCAL), 90)
        leaving = Reply()
        for response in call:
            leaving.take(response)
            if len(leaving.token_ids) == 3:
                cluster.terminate(last)
        assert len(leaving.token_ids) == 60
        assert leaving.token_ids[:24] == expected
        process = cluster.processes.running.pop(last)
        assert process.wait(20) == 0

        # Nobody is left to decode: an explicit, retryable error, and health says so.
        cluster.wait_until(lambda: not cluster.serving(), 10, "not serving")
        with pytest.raises(grpc.RpcError) as error:
            ask(LOCAL)
        assert error.value.code().name == "UNAVAILABLE"  # type: ignore[attr-defined]
        assert "no decode worker is ready" in error.value.details()  # type: ignore[attr-defined]
        cluster.assert_nothing_left()
