"""Router CPU per streamed token and per request, and the latency that it adds.

Router, fake worker (one token every 10 ms for each sequence; an unpaced one coalesces and flatters) and client are
processes of their own. CPU is the router's, from /proc, over a window of steady streaming. Latency is from the
worker's sending a token to the client's having it, clocks shared.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import yaml
from diptych.v1 import generate_pb2, generate_pb2_grpc

from benchmarks.children import Child, wait_until
from benchmarks.report import parse, save, table
from deploy.clients import health_of
from tests.support.fake_worker import age_s

STREAMS = (1, 64, 256, 512)
PERIOD_MS = 10
START_S = 90.0
HZ = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpu_s(pid: int) -> float:
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / HZ


def request(max_tokens: int) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=generate_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
    )


class Window:
    """What was seen between two moments."""

    def __init__(self) -> None:
        self.open = False
        self.tokens = 0
        self.ages: list[float] = []

    def saw(self, token_ids: Any) -> None:
        if self.open:
            self.tokens += len(token_ids)
            self.ages.append(age_s(token_ids[-1]))


async def generate_stream(stub: Any, window: Window, max_tokens: int) -> None:
    async for response in stub.Generate(request(max_tokens)):
        if response.WhichOneof("event") == "tokens" and response.tokens.token_ids:
            window.saw(response.tokens.token_ids)


async def session_streams(stub: Any, window: Window, streams: int, max_tokens: int) -> None:
    ended = 0
    done = asyncio.Event()

    async def requests() -> AsyncIterator[generate_pb2.SessionRequest]:
        starts = [generate_pb2.StartRequest(handle=h, request=request(max_tokens)) for h in range(1, streams + 1)]
        yield generate_pb2.SessionRequest(starts=starts)
        await done.wait()

    async for response in stub.Session(requests()):
        if response.handles:
            window.saw(response.token_ids)
        ended += sum(e.WhichOneof("event") in ("finished", "error") for e in response.events)
        if ended == streams:
            done.set()


async def measure(target: str, pid: int, kind: str, streams: int, seconds: float) -> dict[str, float]:
    max_tokens = int((seconds + 2.5) * 1000 / PERIOD_MS)
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        window = Window()
        if kind == "session":
            work = [session_streams(stub, window, streams, max_tokens)]
        else:
            work = [generate_stream(stub, window, max_tokens) for _ in range(streams)]
        running = asyncio.gather(*work)
        await asyncio.sleep(1.5)
        before, begun = cpu_s(pid), time.monotonic()
        window.open = True
        await asyncio.sleep(seconds)
        window.open = False
        used, elapsed = cpu_s(pid) - before, time.monotonic() - begun
        await running
    ages = sorted(window.ages)
    return {
        "tokens_per_s": window.tokens / elapsed,
        "offered_tokens_per_s": streams * 1000 / PERIOD_MS,
        "router_cpu_share": used / elapsed,
        "cpu_us_per_token": used / window.tokens * 1e6,
        "latency_p50_ms": ages[len(ages) // 2] * 1e3,
        "latency_p99_ms": ages[len(ages) * 99 // 100] * 1e3,
    }


async def per_request(target: str, pid: int, kind: str, count: int, concurrency: int) -> float:
    """Router CPU ms of one request that answers one token."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        window = Window()
        before = cpu_s(pid)
        if kind == "session":
            for _ in range(count // concurrency):
                await session_streams(stub, window, concurrency, 1)
        else:
            gate = asyncio.Semaphore(concurrency)

            async def one() -> None:
                async with gate:
                    await generate_stream(stub, window, 1)

            await asyncio.gather(*(one() for _ in range(count)))
        return (cpu_s(pid) - before) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parse(parser, seconds=0.5)
    port, internal = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "router.yaml"
        config.write_text(yaml.safe_dump({"router": {"grpc_port": port, "http_port": 0, "internal_port": internal}}))
        router = Child("router", [sys.executable, "-m", "router", "--config", str(config)], Path(directory))
        worker = ["tests.support.fake_worker", f"127.0.0.1:{internal}", str(PERIOD_MS), "smollm2-135m-instruct"]
        fake = Child("worker", [sys.executable, "-m", *worker], Path(directory))
        target = f"127.0.0.1:{port}"
        streams = STREAMS[:2] if arguments.smoke else STREAMS
        try:
            wait_until(lambda: health_of(target, 1.0) == "SERVING", START_S, "a router that serves", router, fake)
            figures: dict[str, dict[str, dict[str, float]]] = {}
            requests: dict[str, float] = {}
            for kind in ("session", "generate"):
                figures[kind] = {
                    str(n): asyncio.run(measure(target, router.pid, kind, n, arguments.seconds)) for n in streams
                }
                requests[kind] = asyncio.run(per_request(target, router.pid, kind, 512, 64))
        finally:
            for process in (fake, router):
                process.stop()
    table(
        ("streams", "tokens/s", "of offered", "router CPU", "us/token", "latency p50 ms", "p99 ms"),
        [
            (
                f"{kind} {n}",
                f"{f['tokens_per_s']:.0f}",
                f"{f['tokens_per_s'] / f['offered_tokens_per_s']:.0%}",
                f"{f['router_cpu_share']:.0%}",
                f"{f['cpu_us_per_token']:.1f}",
                f"{f['latency_p50_ms']:.1f}",
                f"{f['latency_p99_ms']:.1f}",
            )
            for kind, rows in figures.items()
            for n, f in rows.items()
        ],
    )
    print("CPU per one-token request:", ", ".join(f"{k} {v:.2f} ms" for k, v in requests.items()))
    save("router", {"streams": figures, "cpu_ms_per_request": requests, "period_ms": PERIOD_MS})


if __name__ == "__main__":
    main()
