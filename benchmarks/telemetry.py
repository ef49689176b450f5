"""CPU per token of router and workers with tracing off, sampled at 1 %, and full, side by side in one run.

Router: three routers that differ in `telemetry` alone, each with a paced fake worker and the same load through Session
(requests of `TOKENS` tokens: many requests a token, which is what tracing costs by), in turns; medians of the rounds.
Workers: one real cluster with tracing on; the client's trace context decides which requests are traced, so that the
same processes serve all three in turns. The collector is a process of its own and takes everything over OTLP.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import yaml
from diptych.v1 import generate_pb2, generate_pb2_grpc

from benchmarks.children import Child, wait_until
from benchmarks.report import median, parse, save, table
from benchmarks.router import START_S, cpu_s, free_port
from deploy.clients import health_of
from settings.model_path import embedded_model_path
from tests.support.processes import Cluster

MODES: dict[str, float | None] = {"off": None, "1 %": 0.01, "full": 1.0}
TOKENS = 32
STREAMS = 64
PERIOD_MS = 10


def request(prompt_tokens: int, placement: Any = generate_pb2.PLACEMENT_AUTO) -> generate_pb2.GenerateRequest:
    ids = [random.randrange(5, 40000) for _ in range(prompt_tokens)]
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=ids),
        sampling=generate_pb2.SamplingParams(max_tokens=TOKENS, ignore_eos=True),
        placement=placement,
    )


async def session_load(target: str, pid: int, seconds: float) -> float:
    """`STREAMS` requests at any moment, a new one for each that ends. Returns CPU us per token."""
    tokens, handle = 0, STREAMS
    ended: asyncio.Queue[int] = asyncio.Queue()
    stop = asyncio.Event()

    async def requests() -> AsyncIterator[generate_pb2.SessionRequest]:
        nonlocal handle
        starts = [generate_pb2.StartRequest(handle=h, request=request(16)) for h in range(STREAMS)]
        yield generate_pb2.SessionRequest(starts=starts)
        while not stop.is_set():
            count = await ended.get() + sum(ended.get_nowait() for _ in range(ended.qsize()))
            starts = [generate_pb2.StartRequest(handle=handle + i, request=request(16)) for i in range(count)]
            handle += count
            yield generate_pb2.SessionRequest(starts=starts)

    async with grpc.aio.insecure_channel(target) as channel:
        call = generate_pb2_grpc.GenerateServiceStub(channel).Session(requests())

        async def read() -> None:
            nonlocal tokens
            async for response in call:
                tokens += len(response.handles)
                finished = sum(e.WhichOneof("event") == "finished" for e in response.events)
                if finished:
                    ended.put_nowait(finished)

        reading = asyncio.create_task(read())
        await asyncio.sleep(1.0)
        before, counted = cpu_s(pid), tokens
        await asyncio.sleep(seconds)
        used, seen = cpu_s(pid) - before, tokens - counted
        stop.set()
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return used / seen * 1e6


def measure_routers(directory: Path, collector: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    processes: list[Child] = []
    routers: dict[str, tuple[str, int]] = {}
    try:
        for mode, ratio in MODES.items():
            port, internal = free_port(), free_port()
            telemetry = {} if ratio is None else {"otlp_endpoint": collector, "trace_ratio": ratio}
            config = directory / f"router-{ratio}.yaml"
            ports = {"grpc_port": port, "http_port": None, "internal_port": internal}
            config.write_text(yaml.safe_dump({"router": ports, "telemetry": telemetry}))
            command = [sys.executable, "-m", "router", "--config", str(config)]
            processes.append(Child(f"router, tracing {mode}", command, directory))
            routers[mode] = f"127.0.0.1:{port}", processes[-1].pid
            worker = ["tests.support.fake_worker", f"127.0.0.1:{internal}", str(PERIOD_MS), "smollm2-135m-instruct"]
            processes.append(Child(f"worker, tracing {mode}", [sys.executable, "-m", *worker], directory))

        def serving() -> bool:
            return all(health_of(target, 1.0) == "SERVING" for target, _ in routers.values())

        wait_until(serving, START_S, "three routers that serve", *processes)
        figures: dict[str, list[float]] = {mode: [] for mode in MODES}
        for i in range(rounds):
            order = list(MODES)
            for mode in order[i % 3 :] + order[: i % 3]:
                figures[mode].append(asyncio.run(session_load(*routers[mode], seconds)))
        return figures
    finally:
        for process in processes:
            process.stop()


async def cluster_load(target: str, ratio: float | None, count: int, concurrency: int, rng: random.Random) -> int:
    """`count` requests, every second one split; a share of them traced. Returns the tokens computed for them."""
    gate = asyncio.Semaphore(concurrency)
    total = 0
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)

        async def one(number: int) -> None:
            nonlocal total
            traced = rng.random() < (ratio or 0.0)
            metadata = (("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-0{int(traced)}"),)
            placement = generate_pb2.PLACEMENT_SPLIT if number % 2 else generate_pb2.PLACEMENT_LOCAL
            async with gate:
                async for response in stub.Generate(request(48, placement), metadata=metadata):
                    if response.WhichOneof("event") == "finished":
                        total += response.finished.usage.completion_tokens

        await asyncio.gather(*(one(i) for i in range(count)))
    return total


def measure_workers(directory: Path, collector: str, rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
    cluster = Cluster(directory, embedded_model_path(), engine={"num_blocks": 512}, transport={"ucx_net_devices": "lo"})
    cluster.processes.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector}
    figures: dict[str, dict[str, list[float]]] = {"prefill-0": {}, "decode-0": {}}
    rng = random.Random(1)
    try:
        cluster.start()
        asyncio.run(cluster_load(cluster.target, None, 16, 8, rng))
        for i in range(rounds):
            order = list(MODES)
            for mode in order[i % 3 :] + order[: i % 3]:
                before = {name: cpu_s(cluster.processes.running[name].pid) for name in figures}
                tokens = asyncio.run(cluster_load(cluster.target, MODES[mode], count, 8, rng))
                for name, by_mode in figures.items():
                    used = cpu_s(cluster.processes.running[name].pid) - before[name]
                    by_mode.setdefault(mode, []).append(used / tokens * 1e6)
        return figures
    finally:
        cluster.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round of one router")
    parser.add_argument("--requests", type=int, default=24, help="of one round of the cluster; 0 = routers only")
    arguments = parse(parser, rounds=1, seconds=0.5, requests=0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        receiver = Child("collector", [sys.executable, "-m", "tests.support.collector"], directory, talks=True)
        try:
            collector = f"http://127.0.0.1:{int(receiver.answer(START_S))}"
            figures = {"router": measure_routers(directory, collector, arguments.rounds, arguments.seconds)}
            if arguments.requests:
                cluster = directory / "cluster"
                cluster.mkdir()
                figures |= measure_workers(cluster, collector, arguments.rounds, arguments.requests)
        finally:
            receiver.stop()
    result: dict[str, Any] = {}
    for process, by_mode in figures.items():
        off = median(by_mode["off"])
        result[process] = {
            mode: {
                "cpu_us_per_token": round(median(values), 2),
                "against_off": round(median(values) / off, 4),
                "rounds": [round(v, 2) for v in values],
            }
            for mode, values in by_mode.items()
        }
    table(
        ("process", *(f"{mode}: us/token (ratio)" for mode in MODES)),
        [
            (p, *(f"{m[mode]['cpu_us_per_token']} ({m[mode]['against_off']:.3f})" for mode in MODES))
            for p, m in result.items()
        ],
    )
    save("telemetry", {"processes": result, "tokens_per_request": TOKENS, "streams": STREAMS, "period_ms": PERIOD_MS})


if __name__ == "__main__":
    main()
