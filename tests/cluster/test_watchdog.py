"""A worker that hangs is found, says so, and goes; one that is idle or busy for long is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import cluster_pb2, generate_pb2, worker_pb2, worker_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from elastic_worker.server import build_core, metric_readers
from settings.file import validate_settings
from tests.cluster.conftest import LIMITS
from tests.support.processes import Cluster, Reply
from tests.support.prompts import tokens_of
from tests.support.stalling_worker import StallingWorker
from tests.support.tiers import tiered
from worker.server import WorkerStalled
from worker.settings import WorkerSettings


@pytest.fixture
def cluster(decode_only: Cluster) -> Iterator[Cluster]:
    yield decode_only
    decode_only.assert_nothing_left()


def log_of(cluster: Cluster, name: str) -> str:
    return (cluster.directory / f"{name}.log").read_text(errors="replace")


def test_idle_and_long_prompts_are_no_stalls(cluster: Cluster, tokenizer: Any) -> None:
    time.sleep(LIMITS["stall_s"] + 2.0)
    prompt = tokens_of(tokenizer, 4000, seed=1)
    begun = time.monotonic()
    cluster.ask(cluster.request(prompt, generate_pb2.SamplingParams(max_tokens=2)), 100)
    assert time.monotonic() - begun > LIMITS["stall_s"], "the prompt must keep the engine for longer than the limit"
    assert " is stuck" not in log_of(cluster, "decode-0")
    assert cluster.serving()
    cluster.assert_nothing_left()


PARAMS = generate_pb2.SamplingParams(max_tokens=90, ignore_eos=True)


@pytest.fixture(scope="module")
def answers(decode_only: Cluster, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the healthy worker answers when nothing happens."""
    prompts = [tokens_of(tokenizer, 24, seed=40 + i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda prompt: decode_only.ask(decode_only.request(prompt, PARAMS), 90), prompts))
    return [(prompt, reply.token_ids) for prompt, reply in zip(prompts, replies, strict=True)]


@pytest.mark.parametrize(
    ("part", "code", "words"),
    tiered(
        [("engine", 2, "the engine is inside one step for")],
        [
            ("transport", 2, "the transport thread is inside one call for"),
            ("loop", 4, "the asyncio loop has not turned for 3 s"),
        ],
    ),
)
def test_a_worker_that_hangs_is_gone_and_its_requests_end_elsewhere(
    cluster: Cluster, answers: list[tuple[list[int], list[int]]], part: str, code: int, words: str
) -> None:
    name = f"hanging-{part}"
    cluster.processes.environment["STALL_AT"] = part
    cluster.processes.spawn(name, "tests.support.stalling_worker", cluster._worker_config("decode", name))
    cluster.wait_ready(0, 2)
    replies = [Reply() for _ in answers]

    def read(reply: Reply, call: Any) -> None:
        for response in call:
            reply.take(response)

    threads = [
        threading.Thread(target=read, args=(reply, cluster.stream(cluster.request(prompt, PARAMS), 90)), daemon=True)
        for reply, (prompt, _) in zip(replies, answers, strict=True)
    ]
    for thread in threads:
        thread.start()
    cluster.wait_until(lambda: all(len(r.token_ids) > 1 for r in replies), 30, "tokens of all four")
    process = cluster.processes.running.pop(name)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == code, log_of(cluster, name)
    for thread in threads:
        thread.join(60)
    assert [r.token_ids for r in replies] == [expected for _, expected in answers]
    recoveries = [r.finished.recoveries for r in replies]
    assert 1 in recoveries, "some of them began on the worker that hung"
    assert max(recoveries) == 1
    log = log_of(cluster, name)
    assert words in log
    assert "Thread 0x" in log, "stacks"
    cluster.wait_until(lambda: len(cluster.ready(cluster_pb2.ROLE_DECODE)) == 1, 10, "one decode worker")
    cluster.assert_nothing_left()


# One worker in this process: what its peers see, and how it stops. Under Ray Serve it lives on for a while like this.


@pytest.fixture
async def stalling(small_model: Path) -> AsyncIterator[StallingWorker]:
    settings = validate_settings(
        {
            "engine": {"model": str(small_model), "dtype": "float32", "threads": 1, "num_blocks": 64},
            "transport": {"ucx_net_devices": "lo"},
            "worker": {**LIMITS, "router_addresses": [], "drain_s": 20.0, "worker_id": "stuck"},
        },
        WorkerSettings,
        "test",
    )
    worker = StallingWorker("decode", settings)
    await worker.start(build_core, metric_readers)
    try:
        yield worker
    finally:
        begun = time.monotonic()
        # Whatever comes of it, it is stopped: its guard would end this process when the test's loop has ended.
        try:
            drained = await worker.drain()
        finally:
            await worker.stop()
            took_s = time.monotonic() - begun
            worker.release.set()
            ended = await asyncio.to_thread(worker.step_loop.stop, 10.0)
            await asyncio.to_thread(worker._transport.close, 10.0)
        assert drained is False
        assert ended
        assert took_s < 8.0, "a stuck thread is not waited for"


async def end_of(stream: Any) -> grpc.StatusCode:
    """A stream's status comes after its messages."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await stream.read() is not grpc.aio.EOF:
            pass
    return await stream.code()


@pytest.mark.parametrize("part", ["engine", "turn", "transport"])
async def test_a_stuck_worker_says_so_until_it_is_stopped(stalling: StallingWorker, part: str) -> None:
    async with grpc.aio.insecure_channel(stalling.address) as channel, asyncio.timeout(60):
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]

        async def status() -> str:
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        assert await status() == "SERVING"
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        stream = stub.Connect()
        await stream.write(worker_pb2.ConnectRequest(router_id="r"))
        assert (await stream.read()).worker_id == "stuck"
        stalling.stall(part)
        if part == "engine":
            start = worker_pb2.ConnectRequest()
            sampling = worker_pb2.ResolvedSampling(max_tokens=4, top_p=1.0, repetition_penalty=1.0)
            start.starts.add(sequence_id=1, request_id="x", prompt=bytes(4 * 4), sampling=sampling)
            await stream.write(start)

        error = await asyncio.shield(stalling.failed)
        assert isinstance(error, WorkerStalled)
        assert ("transport" if part == "transport" else "engine") in str(error)
        assert await end_of(stream) is grpc.StatusCode.UNAVAILABLE
        assert "worker stuck broke: the" in await stream.details()
        await asyncio.shield(stalling.withdrawn)
        assert await status() == "NOT_SERVING"
        again = stub.Connect()
        assert await end_of(again) is grpc.StatusCode.UNAVAILABLE, "nobody is taken any more"
        assert "worker stuck broke: the" in await again.details()
