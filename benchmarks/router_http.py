"""The HTTP front: router CPU per streamed token and time to first token, beside routers written in Rust.

Each front streams chat completions (SSE) from a backend that gives every stream a token every 10 ms: ours from the fake
worker over gRPC, the others from a plain OpenAI mock over HTTP, as each is built to. Front, backend and client are
processes of their own; CPU is the front's, from /proc, over a window of steady streaming. TTFT is of one-token requests
sent one after another while the streams run, and includes the wait for the backend's next step (5 ms in the mean);
"direct" asks the mock without a router. Everything is on that a user gets: limits, metrics, detokenization.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.children import DIRECT, Child, wait_until
from benchmarks.report import median, parse, save, table
from benchmarks.router import PERIOD_MS, START_S, cpu_s, free_port

STREAMS = (64, 256, 512)
MODEL = "smollm2-135m-instruct"
TOKEN = 260  # " the": text with every token, as the mock has it
RUST = ("vllm-router==0.1.17", "sglang-router==0.3.2", "smg==1.13.0")
_RUST_NEEDS = ("setproctitle", "aiohttp", "fastapi", "orjson", "requests", "uvicorn", "pyyaml")


class Stream(asyncio.Protocol):
    """One streamed request on a connection of its own."""

    def __init__(self, max_tokens: int, window: Window) -> None:
        self._window = window
        self._max_tokens = max_tokens
        self._tail = b""
        self.first_s: float | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True,
            "max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        data = json.dumps(body).encode()
        self._sent = time.monotonic()
        transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(data), data)
        )

    def data_received(self, data: bytes) -> None:
        tokens = data.count(b'"content":" the')
        if tokens and self.first_s is None:
            self.first_s = time.monotonic() - self._sent
        self._window.tokens += tokens
        self._tail = (self._tail + data)[-40:]
        if b"[DONE]" in self._tail:
            self._end()
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Window:
    tokens = 0


def tree_cpu_s(pid: int) -> float:
    """Of a process and its children: a launcher may start another."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return cpu_s(pid) + sum(tree_cpu_s(int(child)) for child in children)


async def measure(port: int, pid: int | None, streams: int, seconds: float) -> dict[str, float]:
    """`pid` None: nothing stands between client and backend."""
    loop, window = asyncio.get_running_loop(), Window()
    max_tokens = int((1.0 + 2 * seconds) * 1000 / PERIOD_MS) + streams // 5

    async def stream(tokens: int) -> Stream:
        return (await loop.create_connection(lambda: Stream(tokens, window), "127.0.0.1", port))[1]

    running = [await stream(max_tokens) for _ in range(streams)]
    await asyncio.sleep(1.0)
    before, begun, used = window.tokens, time.monotonic(), 0.0 if pid is None else tree_cpu_s(pid)
    await asyncio.sleep(seconds)
    used = 0.0 if pid is None else tree_cpu_s(pid) - used
    tokens, elapsed = window.tokens - before, time.monotonic() - begun
    firsts, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        probe = await stream(1)
        await probe.done
        assert probe.first_s is not None, "a request without an answer"
        firsts.append(probe.first_s * 1e3)
        await asyncio.sleep(random.uniform(0.01, 0.02))  # at any moment of the backend's step
    async with asyncio.timeout(60):
        await asyncio.gather(*(s.done for s in running))
    assert window.tokens >= streams, "streams without tokens"
    firsts.sort()
    return {
        "tokens_per_s": tokens / elapsed,
        "offered_tokens_per_s": streams * 1000 / PERIOD_MS,
        "cpu_us_per_token": used / tokens * 1e6,
        "ttft_p50_ms": firsts[len(firsts) // 2],
        "ttft_p99_ms": firsts[len(firsts) * 99 // 100],
    }


@contextlib.contextmanager
def processes(directory: str, *commands: tuple[str, Sequence[str]]) -> Iterator[list[Child]]:
    """Each in a session of its own: a launcher may start others, which end with it."""
    started: list[Child] = []
    try:
        for name, command in commands:
            started.append(Child(name, command, Path(directory), own_session=True))
        yield started
    finally:
        for process in started:
            process.stop()


def wait_for(port: int, *of: Child) -> None:
    """Until a request is answered."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": True}

    def answered() -> bool:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with DIRECT.open(request, timeout=5) as answer:
                return b"[DONE]" in answer.read()
        except (OSError, http.client.HTTPException):
            return False

    wait_until(answered, START_S, f"an answer on port {port}", *of)


@contextlib.contextmanager
def diptych(directory: str) -> Iterator[tuple[int, int]]:
    grpc_port, http_port, internal = free_port(), free_port(), free_port()
    config = Path(directory) / "router.yaml"
    ports = {"grpc_port": grpc_port, "http_port": http_port, "internal_port": internal}
    config.write_text(yaml.safe_dump({"router": ports}))
    worker = ("-m", "tests.support.fake_worker", f"127.0.0.1:{internal}", str(PERIOD_MS), MODEL, str(TOKEN))
    with processes(
        directory,
        ("router", (sys.executable, "-m", "router", "--config", str(config))),
        ("worker", (sys.executable, *worker)),
    ) as (router, fake):
        wait_for(http_port, router, fake)
        yield http_port, router.pid


@contextlib.contextmanager
def rust(directory: str, venv: Path, name: str) -> Iterator[tuple[int, int]]:
    port, backend, metrics = free_port(), free_port(), free_port()
    launch = [] if name == "vllm-router" else ["launch"]
    command = [
        str(venv / "bin" / name), *launch, "--worker-urls", f"http://127.0.0.1:{backend}", "--host", "127.0.0.1",
        "--port", str(port), "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(metrics),
        "--max-concurrent-requests", "8192",
    ]  # fmt: skip
    mock = (sys.executable, "-m", "benchmarks.openai_mock", str(backend), str(PERIOD_MS), MODEL)
    with processes(directory, (f"{name}-mock", mock)) as (answering,):
        wait_for(backend, answering)
        with processes(directory, (name, command)) as (front,):
            wait_for(port, front, answering)
            yield port, front.pid


@contextlib.contextmanager
def direct(directory: str) -> Iterator[tuple[int, None]]:
    port = free_port()
    command = (sys.executable, "-m", "benchmarks.openai_mock", str(port), str(PERIOD_MS), MODEL)
    with processes(directory, ("mock", command)) as (mock,):
        wait_for(port, mock)
        yield port, None


def install(venv: Path) -> None:
    """Wheels alone: what they name as requirements is more than routing needs."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "-q"]
    subprocess.run([*pip, "--no-deps", *RUST], check=True)
    subprocess.run([*pip, *_RUST_NEEDS], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="Fronts, separated by commas; empty = all")
    parser.add_argument("--venv", default="", help="Where the Rust routers are, or go; empty = a temporary directory")
    arguments = parse(parser, seconds=0.3, repeats=1, only="direct,diptych")
    names = ["direct", "diptych", *(r.split("==")[0] for r in RUST)]
    if arguments.only:
        names = [name for name in names if name in arguments.only.split(",")]
    wanted = STREAMS[:1] if arguments.smoke else STREAMS
    with tempfile.TemporaryDirectory() as directory:
        venv = Path(arguments.venv or f"{directory}/venv")
        if set(names) - {"direct", "diptych"} and not venv.exists():
            install(venv)
        runs: dict[str, dict[str, list[dict[str, float]]]] = {n: {str(s): [] for s in wanted} for n in names}
        for _ in range(arguments.repeats):
            for name in names:
                starts = {"direct": direct, "diptych": diptych}
                front: Any = starts[name](directory) if name in starts else rust(directory, venv, name)
                with front as (port, pid):
                    for streams in wanted:
                        figures = asyncio.run(measure(port, pid, streams, arguments.seconds))
                        runs[name][str(streams)].append(figures)
                        print(name, streams, {k: round(v, 1) for k, v in figures.items()}, file=sys.stderr, flush=True)
    figures = {
        name: {s: {k: median([r[k] for r in repeats]) for k in repeats[0]} for s, repeats in by_streams.items()}
        for name, by_streams in runs.items()
    }
    rows = []
    for name, by_streams in figures.items():
        for streams, f in by_streams.items():
            base = figures.get("direct", {}).get(streams, {})
            added = [f[k] - base.get(k, 0.0) for k in ("ttft_p50_ms", "ttft_p99_ms")]
            share = f["tokens_per_s"] / f["offered_tokens_per_s"]
            rows.append(
                (f"{name} {streams}", f"{f['tokens_per_s']:.0f}", f"{share:.0%}", f"{f['cpu_us_per_token']:.1f}",
                 f"{f['ttft_p50_ms']:.1f} / {f['ttft_p99_ms']:.1f}", f"{added[0]:+.1f} / {added[1]:+.1f}")
            )  # fmt: skip
    table(("streams", "tokens/s", "of offered", "us/token", "TTFT p50 / p99 ms", "added ms"), rows)
    save("router-http", {"fronts": figures, "period_ms": PERIOD_MS, "repeats": arguments.repeats,
                         "versions": RUST, "load": os.getloadavg()})  # fmt: skip


if __name__ == "__main__":
    main()
