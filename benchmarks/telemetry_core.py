"""CPU that tracing adds to one request on the router, without sockets: off, sampled at 1 %, full, in turns.

The dispatcher and its lives run as in a router, with metrics on; tokens are fed to it in steps of 64 sequences, and
nobody serializes anything, so that the ratios are upper bounds. Each mode is a process of its own, and CPU is all of
it, exporter threads included; the collector is another one. `benchmarks/telemetry.py` measures whole processes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.children import Child
from benchmarks.report import median, parse, save, table
from benchmarks.router import START_S
from settings.tls import INSECURE

MODES = {"off": "", "1 %": "0.01", "full": "1.0"}
TOKENS, STREAMS = 32, 64


class _Client:
    def started(self, life: Any) -> None: ...
    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None: ...
    def finished(self, life: Any, reason: Any) -> None: ...
    def failed(self, life: Any, failure: Any) -> None: ...
    def wake(self) -> None: ...


async def serve(seconds: float) -> float:
    """CPU us per request."""
    from router.admission import RawRequest, RawSampling
    from router.config import RouterConfig
    from router.placement.cluster import Role, WorkerInfo
    from router.placement.policy import WorkerKey
    from router.record.metrics import RouterMetrics
    from router.request import Finish
    from settings.telemetry.config import TelemetryConfig
    from tests.scenarios.nodes import _Backend, _SimDispatcher

    legs: list[int] = []

    class _Sender:
        def start(self, worker: Any, start: Any, deadline_s: float) -> None:
            legs.append(start.leg)

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    loop = asyncio.get_running_loop()
    sender: Any = _Sender()
    backend: Any = _Backend()
    dispatcher = _SimDispatcher(RouterConfig(), backend, sender, random.Random(1), time.monotonic, loop.call_later)
    metrics = RouterMetrics(TelemetryConfig(metrics_port=None), dispatcher, "bench", lambda: True, INSECURE["router"])
    key = WorkerKey("d", 1)
    info = WorkerInfo(key, Role.DECODE, "d:1", "sim", "f", 32, 1 << 20, 1 << 20, 4096, 4096)
    dispatcher.cluster.registered(info, time.monotonic(), leaving=False)
    dispatcher.cluster.connected(key, time.monotonic())
    raw = RawRequest(token_ids=list(range(5, 21)), sampling=RawSampling(max_tokens=TOKENS, ignore_eos=True))
    requests, client = 0, _Client()

    async def batch() -> None:
        legs.clear()
        for _ in range(STREAMS):
            await dispatcher.submit(raw, client)
        step = list(legs)
        for position in range(TOKENS):
            dispatcher.on_tokens(step, [position] * STREAMS, [7] * STREAMS, {})
            dispatcher.flush()
            await asyncio.sleep(0)
        for leg in step:
            dispatcher.on_end(leg, Finish.LENGTH, 0)
        dispatcher.flush()

    await batch()
    begun, until = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < until:
        await batch()
        requests += STREAMS
        await asyncio.sleep(0.02)  # a paced server leaves its exporter room
    used = time.process_time() - begun
    dispatcher.check_empty()
    metrics.close()
    return used / requests * 1e6


def one_round(directory: Path, seconds: float, collector: str, ratio: str) -> float:
    """Of a process of its own."""
    module = ["-m", "benchmarks.telemetry_core", "--seconds", str(seconds), "--child", collector, ratio]
    child = Child("router's work", [sys.executable, *module], directory, talks=True)
    try:
        return float(child.answer(START_S + 10 * seconds))
    finally:
        child.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parse(parser, rounds=1, seconds=0.1)
    if arguments.child is not None:
        from settings.telemetry.config import TelemetryConfig
        from settings.telemetry.setup import set_up_tracing

        collector, ratio = arguments.child
        if ratio:
            set_up_tracing("diptych-router", TelemetryConfig(otlp_endpoint=collector, trace_ratio=float(ratio)))
        print(asyncio.run(serve(arguments.seconds)), flush=True)
        return
    figures: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        receiver = Child("collector", [sys.executable, "-m", "tests.support.collector"], directory, talks=True)
        try:
            collector = f"http://127.0.0.1:{int(receiver.answer(START_S))}"
            for _ in range(arguments.rounds):
                for mode, ratio in MODES.items():
                    figures[mode].append(one_round(directory, arguments.seconds, collector, ratio))
        finally:
            receiver.stop()
    off = median(figures["off"])
    result = {
        mode: {
            "cpu_us_per_request": round(median(v), 1),
            "cpu_us_per_token": round(median(v) / TOKENS, 2),
            "against_off": round(median(v) / off, 3),
            "rounds": [round(x, 1) for x in v],
        }
        for mode, v in figures.items()
    }
    table(("mode", "us/request", "us/token", "ratio"), [(m, *list(r.values())[:3]) for m, r in result.items()])
    save("telemetry_core", {"router": result, "tokens_per_request": TOKENS})


if __name__ == "__main__":
    main()
