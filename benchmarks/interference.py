"""What long prompts do to running answers: on the same worker with and without the chunk budget, and split.

16 answers run; then 4,096-token prompts come, the next when the last one is answered. The same two cores each time:

    whole prompts    one decode worker with 2 threads, max_batch_tokens 8192: nothing holds a prompt back
    chunks of 512    the same, max_batch_tokens 512 (and 128): static chunks
    budget           the same, 8192 and engine.itl_target_ms: chunks by measured step costs, within 0.8 of the target
    split            a prefill and a decode worker, 1 thread each on a core of its own, every long prompt handed over
    two workers      two decode workers, 1 thread each, with the budget: the same hardware as split, not split

What is equal is the machine: two cores for all engine threads. One worker of two threads has both cores for whatever is
under way; split, the answers have one core and its share of the memory's bandwidth, whether a prompt comes or not. Two
workers halve the answers of each, and a prompt disturbs eight. Router, client and gRPC threads run on the same cores.

Real processes, the real router, bfloat16. A gap is the time between two tokens of one of the 16 answers at the client,
from the first prompt's dispatch until the last one is answered. All prompts differ, so nothing is cached.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from diptych.v1 import generate_pb2

from benchmarks.report import parse, save, table
from settings.model_path import resolve_model
from tests.support.processes import Cluster

LOCAL, SPLIT = generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_SPLIT
DECODES, PROMPT_TOKENS = 16, 4096
QUIET_S = 4.0  # of decodes alone, before the first prompt


@dataclass
class Stream:
    """One running answer: when each of its tokens came."""

    arrivals: list[float] = field(default_factory=list)
    call: Any = None

    def read(self, cluster: Cluster, request: generate_pb2.GenerateRequest) -> None:
        self.call = cluster.stream(request, 600.0)
        try:
            for response in self.call:
                if response.WhichOneof("event") == "tokens":
                    self.arrivals += [time.monotonic()] * len(response.tokens.token_ids)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:  # type: ignore[attr-defined]
                raise

    def gaps_ms(self, since: float, until: float) -> list[float]:
        """Of tokens that came in between, the gap that `since` falls into included."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(b - a) * 1e3 for a, b in pairs if b > since and a < until]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(count)]


def measure(cluster: Cluster, placement: int, prompts: int, seed: int) -> dict[str, float]:
    streams, threads = [], []
    for i in range(DECODES):
        sampling = generate_pb2.SamplingParams(max_tokens=3000, ignore_eos=True)
        stream = Stream()
        request = cluster.request(ids(128, seed + i), sampling, LOCAL)
        thread = threading.Thread(target=stream.read, args=(cluster, request), daemon=True)
        thread.start()
        streams.append(stream)
        threads.append(thread)
    deadline = time.monotonic() + 60
    while min(len(s.arrivals) for s in streams) < 8:
        if time.monotonic() > deadline:
            raise TimeoutError("the answers did not begin within 60 s; the machine is too busy to measure on")
        time.sleep(0.05)

    cluster.ask(one_prompt(cluster, placement, seed + 900), 120.0)  # paths are attached, rates and costs are known
    time.sleep(1.0)
    quiet = time.monotonic()
    time.sleep(QUIET_S)
    began, ttfts = time.monotonic(), []
    for i in range(prompts):
        asked = time.monotonic()
        reply = cluster.ask(one_prompt(cluster, placement, seed + 1000 + i), 120.0)
        assert reply.split == (placement == SPLIT)
        ttfts.append((reply.arrival_s[0] - asked) * 1e3)
    ended = time.monotonic()
    for stream in streams:
        stream.call.cancel()
    for thread in threads:
        thread.join(10)
    alone = [g for s in streams for g in s.gaps_ms(quiet, began)]
    beside = [g for s in streams for g in s.gaps_ms(began, ended)]
    return {
        "decodes_alone_p50_ms": percentile(alone, 0.5),
        "decodes_alone_p99_ms": percentile(alone, 0.99),
        "gap_p50_ms": percentile(beside, 0.5),
        "gap_p99_ms": percentile(beside, 0.99),
        "gap_max_ms": max(beside),
        "prompt_ttft_ms": percentile(ttfts, 0.5),
        "decode_tokens_per_s": sum(began < t < ended for s in streams for t in s.arrivals) / (ended - began),
    }


def one_prompt(cluster: Cluster, placement: int, seed: int) -> generate_pb2.GenerateRequest:
    """Two tokens: the second one shows that the prompt's KV is where it goes on."""
    sampling = generate_pb2.SamplingParams(max_tokens=2, ignore_eos=True)
    return cluster.request(ids(PROMPT_TOKENS, seed), sampling, placement)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--itl-target-ms", type=float, default=0.0, help="0 = 2.5 times what decodes take alone")
    arguments = parse(parser, prompts=1)
    global DECODES, PROMPT_TOKENS, QUIET_S
    if arguments.smoke:
        DECODES, PROMPT_TOKENS, QUIET_S = 2, 256, 0.5
    model = Path(resolve_model(arguments.model))
    target_ms = arguments.itl_target_ms

    def run(
        name: str,
        placement: int,
        workers: tuple[int, int],
        threads: int,
        engine: dict[str, Any],
        roles: dict[str, dict[str, Any]] | None = None,
    ) -> dict[str, float]:
        prefill, decode = workers
        with tempfile.TemporaryDirectory(prefix="interference-") as directory:
            settings = {"dtype": "bfloat16", "threads": threads, "num_blocks": 1100, **engine}
            cluster = Cluster(Path(directory), model, prefill=prefill, decode=decode, engine=settings)
            if roles:
                cluster.role_overrides = {role: {"engine": fields} for role, fields in roles.items()}
            try:
                found = measure(cluster.start(), placement, arguments.prompts, 7_000_000)
            finally:
                cluster.stop()
        print(name, {key: round(value, 1) for key, value in found.items()}, flush=True)
        return found

    whole = {"max_batch_tokens": 8192}
    results = {"whole prompts": run("whole prompts", LOCAL, (0, 1), 2, whole)}
    target_ms = target_ms or 2.5 * results["whole prompts"]["decodes_alone_p50_ms"]
    for chunk in () if arguments.smoke else (512, 128):
        results[f"chunks of {chunk}"] = run(f"chunks of {chunk}", LOCAL, (0, 1), 2, {"max_batch_tokens": chunk})
    name = f"budget, target {target_ms:.0f} ms"
    budget = {**whole, "itl_target_ms": target_ms}
    if not arguments.smoke:
        results[name] = run(name, LOCAL, (0, 1), 2, budget)
    own_cores = {"prefill": {"pin_threads": "0"}, "decode": {"pin_threads": "1"}}
    results["split"] = run("split", SPLIT, (1, 1), 1, whole, own_cores)
    if not arguments.smoke:
        results["two workers"] = run("two workers", LOCAL, (0, 2), 1, budget)

    columns = (
        "decodes_alone_p50_ms",
        "gap_p50_ms",
        "gap_p99_ms",
        "gap_max_ms",
        "prompt_ttft_ms",
        "decode_tokens_per_s",
    )
    table(("16 answers, 4k prompts", *columns), [(n, *(f"{r[c]:.0f}" for c in columns)) for n, r in results.items()])
    save("interference", {"itl_target_ms": target_ms, "prompts": arguments.prompts, "results": results})


if __name__ == "__main__":
    main()
