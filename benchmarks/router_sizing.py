"""What a router needs, for docs/sizing.md: cores for each request a second and MiB for each stream, at 100 workers.

The shape is the one that others publish: 100 workers, prompts of 100k tokens, answers of 1k. Router, workers (fakes in
one process: registrations, streams and load reports are real) and client are processes of their own. CPU and memory are
the router's, from /proc. Rates that this machine cannot offer are computed: cores = idle + rate x CPU s of a request.
With --rate such requests arrive evenly, whole, and what the router takes is measured while as many end as begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import yaml
from diptych.v1 import generate_pb2, generate_pb2_grpc

from benchmarks.children import Child, wait_until
from benchmarks.report import parse, save, table
from benchmarks.router import START_S, cpu_s, free_port
from deploy.clients import channel_to, get_cluster, health_of
from settings.model_path import embedded_model_path
from settings.security import SecurityConfig
from settings.tls import Wiring
from tests.support.fake_worker import join

WORKERS, PROMPT_TOKENS, ANSWER_TOKENS, STEP_MS = 100, 100_000, 1000, 20
RATE = 100.0  # requests/s that are asked about
CONTEXT = 1 << 18
MODEL = "long-context"


def rss_mib(pid: int) -> float:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


async def workers(router: str, count: int, model: str) -> None:
    """`count` fakes, half of each role."""
    wiring = Wiring(SecurityConfig(), "worker")
    kept = []
    for number in range(count):
        role = ("prefill", "decode")[number % 2]
        name, limit = f"{role}-{number}", CONTEXT
        kept.append(
            await join(router, wiring, STEP_MS / 1e3, model, worker_id=name, role=role, context_limit_tokens=limit)
        )
    await asyncio.Event().wait()


def long_context(directory: Path) -> Path:
    """The embedded model's tokenizer, under a configuration that takes such prompts. A router reads no weights."""
    made, found = directory / MODEL, embedded_model_path()
    made.mkdir()
    for path in [*found.glob("*.json"), *found.glob("*.jinja")]:
        shutil.copy(path, made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return made


def prompt(kind: str, seed: int, tokens: int) -> dict[str, Any]:
    rng = random.Random(seed)
    if kind == "ids":
        return {"token_ids": generate_pb2.TokenIds(ids=[rng.randrange(100, 40_000) for _ in range(tokens)])}
    words = ["the", "quick", "router", "sends", "every", "prompt", "to", "one", "of", "many", "workers", "and", "waits"]
    return {"text": " ".join(rng.choice(words) for _ in range(tokens))}


async def ask(stub: Any, kind: str, seed: int, tokens: int, answer: int) -> int:
    sampling = generate_pb2.SamplingParams(max_tokens=answer, ignore_eos=True)
    wanted = generate_pb2.GenerateRequest(
        sampling=sampling, placement=generate_pb2.PLACEMENT_LOCAL, **prompt(kind, seed, tokens)
    )
    seen = 0
    async for response in stub.Generate(wanted):
        if response.WhichOneof("event") == "tokens":
            seen += len(response.tokens.token_ids)
    return seen


async def requests(
    target: str, pid: int, kind: str, count: int, tokens: int, answer: int, idle: float
) -> dict[str, float]:
    """All at once. CPU of a request beyond what the idle router needs, and what memory each stream holds on top."""
    async with grpc.aio.insecure_channel(target, [("grpc.max_send_message_length", 64 << 20)]) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        await ask(stub, kind, -1, tokens, 8)
        cpu, memory, most, began = cpu_s(pid), rss_mib(pid), 0.0, time.monotonic()
        running = asyncio.gather(*(ask(stub, kind, seed, tokens, answer) for seed in range(count)))
        while not running.done():
            most = max(most, rss_mib(pid))
            await asyncio.wait([running], timeout=0.2)
        assert await running == [answer] * count
        used = cpu_s(pid) - cpu - idle * (time.monotonic() - began)
        return {"cpu_s": max(0.0, used) / count, "mib": (most - memory) / count}


async def offered(target: str, pid: int, rate: float, seconds: float, tokens: int, answer: int) -> dict[str, float]:
    """An open loop: whole requests by token ids. Measured from when the first answers have ended."""
    settling_s = 1.25 * answer * STEP_MS / 1e3
    async with grpc.aio.insecure_channel(target, [("grpc.max_send_message_length", 64 << 20)]) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        begun, ended, running = 0, 0, set[asyncio.Task[int]]()
        started, measured, cpu, before = time.monotonic(), 0.0, 0.0, (0, 0)
        while (now := time.monotonic()) - started < settling_s + seconds:
            if not measured and now - started >= settling_s:
                measured, cpu, before = now, cpu_s(pid), (begun, ended)
            while begun < (now - started) * rate:
                running.add(asyncio.create_task(ask(stub, "ids", begun, tokens, answer)))
                begun += 1
            await asyncio.sleep(1 / rate)
            done = {task for task in running if task.done()}
            assert all(task.result() == answer for task in done)
            ended, running = ended + len(done), running - done
        lasted = now - measured
        found = {
            "asked_per_s": rate,
            "begun_per_s": (begun - before[0]) / lasted,
            "ended_per_s": (ended - before[1]) / lasted,
            "cores": (cpu_s(pid) - cpu) / lasted,
            "mib": rss_mib(pid),
            "streams": float(len(running)),
        }
        await asyncio.gather(*running)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--requests", type=int, default=16, help="at once")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="requests/s that are offered, one by one")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate, once answers end")
    parser.add_argument("--prompt", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--serve", default="", help="used by itself: run the workers, for the router at this address")
    arguments = parse(parser, workers=4, requests=2, prompt=1000, seconds=1.0)
    if arguments.serve:
        asyncio.run(workers(arguments.serve, arguments.workers, MODEL))
    port, internal = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "router.yaml"
        settings = {"grpc_port": port, "http_port": None, "internal_port": internal, "max_backlog_s": 1e6}
        model = str(long_context(Path(directory)))
        config.write_text(yaml.safe_dump({"router": {**settings, "model": model}}))
        router = Child("router", [sys.executable, "-m", "router", "--config", str(config)], Path(directory))
        own = [sys.executable, "-m", "benchmarks.router_sizing", "--serve", f"127.0.0.1:{internal}"]
        fakes = Child("workers", [*own, "--workers", str(arguments.workers)], Path(directory))
        target = f"127.0.0.1:{port}"

        def all_there() -> bool:
            if health_of(target, 1.0) != "SERVING":
                return False
            with channel_to(target) as channel:
                return len(get_cluster(channel, 5.0).workers) == arguments.workers

        try:
            wait_until(all_there, START_S, f"{arguments.workers} workers", router, fakes)
            memory, cpu, began = rss_mib(router.pid), cpu_s(router.pid), time.monotonic()
            time.sleep(1.0 if arguments.smoke else 10.0)
            idle = (cpu_s(router.pid) - cpu) / (time.monotonic() - began)
            figures: dict[str, dict[str, float]] = {}
            for name, kind, answer in (
                ("prompt alone, token ids", "ids", 1),
                ("whole request, token ids", "ids", ANSWER_TOKENS),
                ("prompt alone, text", "text", 1),
            ):
                answer = min(answer, 20) if arguments.smoke else answer
                figures[name] = asyncio.run(
                    requests(target, router.pid, kind, arguments.requests, arguments.prompt, answer, idle)
                )
            steady = [
                asyncio.run(
                    offered(target, router.pid, rate, arguments.seconds, arguments.prompt,
                            20 if arguments.smoke else ANSWER_TOKENS)
                )
                for rate in (arguments.rate or ([2.0] if arguments.smoke else []))
            ]  # fmt: skip
        finally:
            for process in (fakes, router):
                process.stop()
    rows = [
        (name, f"{f['cpu_s'] * 1e3:.0f}", f"{f['mib']:.1f}", f"{idle + RATE * f['cpu_s']:.1f}")
        for name, f in figures.items()
    ]
    table(("request", "CPU ms", "MiB at most", f"cores at {RATE:g}/s (computed)"), rows)
    if steady:
        heads = ("asked/s", "begun/s", "ended/s", "cores", "MiB", "streams")
        table(heads, [tuple(f"{value:.2f}" for value in one.values()) for one in steady])
    print(
        f"{arguments.workers} workers, idle: {idle:.3f} cores, {memory:.0f} MiB; prompts of {arguments.prompt} tokens"
    )
    save(
        "router_sizing",
        {
            "workers": arguments.workers,
            "prompt_tokens": arguments.prompt,
            "answer_tokens": ANSWER_TOKENS,
            "step_ms": STEP_MS,
            "idle_cores": idle,
            "idle_mib": memory,
            "requests": figures,
            "steady": steady,
        },
    )


if __name__ == "__main__":
    main()
