"""What TLS, API keys, limits and the cluster secret cost: CPU of router and worker per streamed token.

Two routers, each with a fake worker of its own (benchmarks/router.py), one plain and one with everything on. Windows
alternate between them, and a ratio is taken within each pair. The worker's CPU is that of its streams alone: no model
runs. Besides: CPU of a request that answers one token, and microseconds of a ticket.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml
from diptych.v1 import generate_pb2_grpc

from benchmarks.children import Child, wait_until
from benchmarks.report import median, parse, save, table
from benchmarks.router import PERIOD_MS, START_S, Window, cpu_s, free_port, generate_stream, session_streams
from deploy.access import Access
from deploy.clients import health_over
from kv_transfer import tickets
from kv_transfer.handoff import PeerId
from settings.secret import ClusterSecret
from tests.support.secure import Secured

LOADS = (("session", 64), ("session", 512), ("generate", 64), ("generate", 256))


@dataclass
class Side:
    target: str
    access: Access
    router: int  # process ids
    worker: int

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        if not self.access.ca:
            async with grpc.aio.insecure_channel(self.target) as channel:
                yield generate_pb2_grpc.GenerateServiceStub(channel)
            return
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(self.access.ca), grpc.access_token_call_credentials(self.access.api_key)
        )
        async with grpc.aio.secure_channel(self.target, credentials) as channel:
            yield generate_pb2_grpc.GenerateServiceStub(channel)


@contextlib.contextmanager
def running(directory: Path, security: dict[str, Any], access: Access) -> Iterator[Side]:
    port, internal = free_port(), free_port()
    directory.mkdir()
    config = directory / "router.yaml"
    ports = {"grpc_port": port, "internal_port": internal, "http_port": None}
    config.write_text(yaml.safe_dump({"router": ports, "security": security}))
    router = Child("router", [sys.executable, "-m", "router", "--config", str(config)], directory)
    fake = ["tests.support.fake_worker", f"127.0.0.1:{internal}", str(PERIOD_MS), "smollm2-135m-instruct"]
    environment = os.environ | {"FAKE_WORKER_SECURITY": json.dumps(security)}
    worker = Child("worker", [sys.executable, "-m", *fake], directory, environment=environment)
    try:
        with access.channel(f"127.0.0.1:{port}", []) as channel:
            serving = lambda: health_over(channel, 1.0) == "SERVING"  # noqa: E731
            wait_until(serving, START_S, "a router that serves", router, worker)
        yield Side(f"127.0.0.1:{port}", access, router.pid, worker.pid)
    finally:
        for process in (worker, router):
            process.stop()


async def stream_cost(side: Side, kind: str, streams: int, seconds: float) -> tuple[float, float]:
    """CPU microseconds a token of router and worker."""
    max_tokens = int((seconds + 2.0) * 1000 / PERIOD_MS)
    window = Window()
    async with side.stub() as stub:
        if kind == "session":
            work = [session_streams(stub, window, streams, max_tokens)]
        else:
            work = [generate_stream(stub, window, max_tokens) for _ in range(streams)]
        under_way = asyncio.gather(*work)
        await asyncio.sleep(1.2)
        before = cpu_s(side.router), cpu_s(side.worker)
        window.open = True
        await asyncio.sleep(seconds)
        window.open = False
        after = cpu_s(side.router), cpu_s(side.worker)
        await under_way
    return (after[0] - before[0]) / window.tokens * 1e6, (after[1] - before[1]) / window.tokens * 1e6


async def request_cost(side: Side, count: int, concurrency: int) -> float:
    """CPU milliseconds of the router for one Generate that answers one token."""
    gate, window = asyncio.Semaphore(concurrency), Window()
    async with side.stub() as stub:

        async def one() -> None:
            async with gate:
                await generate_stream(stub, window, 1)

        await asyncio.gather(*(one() for _ in range(32)))
        before = cpu_s(side.router)
        await asyncio.gather(*(one() for _ in range(count)))
        return (cpu_s(side.router) - before) / count * 1e3


def ticket_us(path: Path) -> dict[str, float]:
    secret = ClusterSecret(str(path))
    source, reader, now, rounds = PeerId("prefill-0", 1), PeerId("decode-0", 2), time.time(), 20_000
    began = time.process_time()
    for _ in range(rounds):
        ticket = tickets.reference(secret, "0123456789abcdef-1", source, reader, now)
    signed = time.process_time()
    for _ in range(rounds):
        assert not tickets.check_handoff(secret, "0123456789abcdef-1", source, reader, ticket[:40], now)
    checked = time.process_time()
    return {"sign_reference": (signed - began) / rounds * 1e6, "check_handoff": (checked - signed) / rounds * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parse(parser, seconds=0.3, rounds=1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        secured = Secured(directory / "tls")
        access = secured.add_key("bench", requests_per_minute=10**6, tokens_per_minute=10**9, max_concurrent=4096)
        sides = {
            "plain": stack.enter_context(running(directory / "plain", {}, Access())),
            "secured": stack.enter_context(running(directory / "secured", secured.security, access)),
        }
        rows: dict[str, dict[str, float]] = {}
        for kind, streams in LOADS[:1] if arguments.smoke else LOADS:
            pairs: list[dict[str, tuple[float, float]]] = []
            for number in range(arguments.rounds):
                order = list(sides) if number % 2 == 0 else list(sides)[::-1]
                pairs.append({n: asyncio.run(stream_cost(sides[n], kind, streams, arguments.seconds)) for n in order})
            rows[f"{kind} {streams}"] = {
                f"{who}_{what}": value
                for i, who in enumerate(("router", "worker"))
                for what, value in (
                    ("plain_us_per_token", median([p["plain"][i] for p in pairs])),
                    ("secured_us_per_token", median([p["secured"][i] for p in pairs])),
                    ("ratio", median([p["secured"][i] / p["plain"][i] for p in pairs])),
                )
            }
        requests = [
            {n: asyncio.run(request_cost(side, 512, 64)) for n, side in sides.items()} for _ in range(arguments.rounds)
        ]
        costs = ticket_us(directory / "tls" / "cluster.secret")
    per_request = {
        "plain_ms": median([r["plain"] for r in requests]),
        "secured_ms": median([r["secured"] for r in requests]),
        "ratio": median([r["secured"] / r["plain"] for r in requests]),
    }
    table(
        ("streams", "router plain us", "secured", "ratio", "worker plain us", "secured", "ratio"),
        [(name, *(f"{row[key]:.2f}" for key in row)) for name, row in rows.items()],
    )
    print("router CPU ms per one-token request:", per_request, "ticket us:", costs)
    save("security", {"streams": rows, "per_request": per_request, "ticket_us": costs, "period_ms": PERIOD_MS})


if __name__ == "__main__":
    main()
