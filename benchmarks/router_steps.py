"""What a step message costs a router, by the number of decode workers: 256 streams of one session are spread over them.

Each worker sends a message of the tokens of its step every 20 ms, at its own moment. Router, workers (fakes of one
process) and client are processes of their own. CPU is the router's, from /proc, of all its threads.
With --against PATH, another checkout's router is measured in turn, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import yaml
from diptych.v1 import generate_pb2_grpc

from benchmarks.children import ROOT, Child, wait_until
from benchmarks.report import parse, save, table
from benchmarks.router import HZ, START_S, Window, cpu_s, free_port, session_streams
from deploy.clients import channel_to, get_cluster, health_of
from settings.security import SecurityConfig
from settings.tls import Wiring
from tests.support.fake_worker import join

STREAMS, STEP_MS = 256, 20
WORKERS = (1, 8, 32, 64)
MODEL = "smollm2-135m-instruct"


async def workers(router: str, count: int) -> None:
    wiring, rng, kept = Wiring(SecurityConfig(), "worker"), random.Random(1), []
    for number in range(count):
        late_s = rng.random() * STEP_MS / 1e3
        kept.append(await join(router, wiring, STEP_MS / 1e3, MODEL, worker_id=f"decode-{number}", late_s=late_s))
    await asyncio.Event().wait()


def loop_s(pid: int) -> float:
    """User and system time of its first thread, where the event loop is."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / HZ


async def stream(target: str, pid: int, count: int, seconds: float) -> dict[str, float]:
    max_tokens = int((seconds + 3.0) * 1000 / STEP_MS)
    async with grpc.aio.insecure_channel(target) as channel:
        window = Window()
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        running = asyncio.ensure_future(session_streams(stub, window, STREAMS, max_tokens))
        await asyncio.sleep(1.5)
        before, loop, begun = cpu_s(pid), loop_s(pid), time.monotonic()
        window.open = True
        await asyncio.sleep(seconds)
        window.open = False
        used, elapsed, loop = cpu_s(pid) - before, time.monotonic() - begun, loop_s(pid) - loop
        await running
    ages = sorted(window.ages)
    return {
        "tokens_per_s": window.tokens / elapsed,
        "cpu_us_per_token": used / window.tokens * 1e6,
        "cpu_us_per_step": used / (min(count, STREAMS) * elapsed * 1000 / STEP_MS) * 1e6,
        "loop_share": loop / used,
        "messages_to_the_client": len(ages) / elapsed,
        "latency_p50_ms": ages[len(ages) // 2] * 1e3,
        "latency_p99_ms": ages[len(ages) * 99 // 100] * 1e3,
    }


def measure(checkout: Path, count: int, seconds: float) -> dict[str, float]:
    port, internal = free_port(), free_port()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = directory / "router.yaml"
        settings = {"grpc_port": port, "http_port": None, "internal_port": internal}
        config.write_text(yaml.safe_dump({"router": settings}))
        router = Child("router", [sys.executable, "-m", "router", "--config", str(config)], directory, cwd=checkout)
        own = [sys.executable, "-m", "benchmarks.router_steps", "--serve", f"127.0.0.1:{internal}"]
        fakes = Child("workers", [*own, "--workers", str(count)], directory)
        target = f"127.0.0.1:{port}"

        def all_there() -> bool:
            if health_of(target, 1.0) != "SERVING":
                return False
            with channel_to(target) as channel:
                return len(get_cluster(channel, 5.0).workers) == count

        try:
            wait_until(all_there, START_S, f"{count} workers", router, fakes)
            return asyncio.run(stream(target, router.pid, count, seconds))
        finally:
            for process in (fakes, router):
                process.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3, help="the middle one counts")
    parser.add_argument("--against", type=Path, help="another checkout, whose router is measured in turn")
    parser.add_argument("--serve", default="", help="used by itself: run the workers, for the router at this address")
    arguments = parse(parser, workers=[2], seconds=0.5, repeats=1)
    if arguments.serve:
        asyncio.run(workers(arguments.serve, arguments.workers[0]))
    checkouts = {"ours": ROOT} | ({"against": arguments.against.resolve()} if arguments.against else {})
    found: dict[str, dict[str, float]] = {}
    for count in arguments.workers:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for _ in range(arguments.repeats):
            for name, checkout in checkouts.items():
                runs[name].append(measure(checkout, count, arguments.seconds))
        for name, kept in runs.items():
            found[f"{count}, {name}"] = {key: statistics.median(run[key] for run in kept) for key in kept[0]}
    columns = (
        ("tokens_per_s", "tokens/s", 0), ("cpu_us_per_token", "us a token", 1), ("cpu_us_per_step", "us a step", 0),
        ("loop_share", "loop's share", 2), ("messages_to_the_client", "messages out/s", 0),
        ("latency_p50_ms", "p50 ms", 1), ("latency_p99_ms", "p99 ms", 1),
    )  # fmt: skip
    rows: list[Any] = [(name, *(f"{f[key]:.{digits}f}" for key, _, digits in columns)) for name, f in found.items()]
    table(("workers", *(title for _, title, _ in columns)), rows)
    save("router_steps", {"streams": STREAMS, "step_ms": STEP_MS, "workers": found})


if __name__ == "__main__":
    main()
