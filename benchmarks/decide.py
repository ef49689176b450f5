"""What a placement costs the router's event loop: naming a prompt's blocks, looking them up, deciding.

One core, one process. Prompts of 128k tokens, of which many workers hold different shares (all hold a common system
prompt, some hold more of this very prompt). Views are kept by events, as in the live router; what an event costs is
timed on its own. Medians, and beside them a plain loop, to compare machines by.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from benchmarks.report import parse, save, table
from kv_transfer.prefix_hint import hint_root, prefix_hints
from router.placement.cluster import Cluster, Promise, Role, WorkerInfo
from router.placement.policy import PolicyParams, RequestFacts, Route, WorkerKey, decide

PROMPT_TOKENS = 131_072
WORKERS = (64, 512, 4096)
BLOCKS = (16, 64)
HOLDERS = 48  # workers that hold some of the prompt, each to another depth


def cluster_of(count: int, block_tokens: int) -> Cluster:
    """Half decode, half prefill; every worker has reported."""
    rng = random.Random(count)
    cluster = Cluster()
    for i in range(count):
        key = WorkerKey(f"w{i}", 1)
        role = Role.DECODE if i % 2 else Role.PREFILL
        info = WorkerInfo(key, role, "host:1", "m", "kv", block_tokens, 1 << 20, 100_000, 1 << 20, 128_000)
        cluster.registered(info, 0.0, leaving=False)
        cluster.connected(key, 0.0)
        cluster.reported(key, report(rng), 0.0)
    return cluster


def report(rng: random.Random) -> SimpleNamespace:
    return SimpleNamespace(
        free_blocks=rng.randrange(20_000, 90_000),
        waiting_blocks=0,
        last_sequence_id=0,
        prefill_backlog_tokens=rng.randrange(20_000),
        running_sequences=rng.randrange(64),
        step_ms=rng.uniform(10, 30),
        decode_step_ms=rng.uniform(10, 30),
        chunk_tokens=2048,
        prefill_tokens_per_s=20_000.0,
        pull_bytes_per_s=2e10,
        step_constant_ms=5.0,
        step_per_sequence_ms=0.02,
        step_per_token_ms=0.04,
        step_per_attention_pair_ms=1e-6,
        step_cost_error=0.1,
    )


def fill(cluster: Cluster, hints: list[int], rng: random.Random) -> None:
    """All hold the first 1 % (a system prompt), some hold more; and each holds as many blocks of other prompts."""
    keys = list(cluster.workers)
    deep = set(rng.sample(keys, min(HOLDERS, len(keys))))
    for key in keys:
        share = rng.random() if key in deep else 0.01
        cluster.block_events(key, 0, [("stored", [(0, hints[: max(1, int(share * len(hints)))])])])
        foreign = [rng.getrandbits(64) | 1 for _ in range(256)]
        cluster.block_events(key, 1, [("stored", [(0, foreign)])])


def median_us(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def measure(workers: int, block_tokens: int, repeats: int) -> dict[str, float]:
    rng = random.Random(1)
    prompt = np.random.default_rng(3).integers(0, 128_000, PROMPT_TOKENS).astype(np.uint32)
    root = hint_root("kv", block_tokens, "")
    hints = prefix_hints(prompt, block_tokens, root)
    cluster = cluster_of(workers, block_tokens)
    fill(cluster, hints.tolist(), rng)
    view, params = cluster.view(), PolicyParams(pull_prefixes=True)
    hits = cluster.prefixes.match(hints, block_tokens)
    facts = RequestFacts(PROMPT_TOKENS, 256, cached_tokens=hits, expected_tokens=200, time_left_s=300.0)
    cold = RequestFacts(PROMPT_TOKENS, 256, expected_tokens=200, time_left_s=300.0)
    route = decide(facts, view, params, 0.05, rng)
    assert isinstance(route, Route), route
    keys = list(cluster.workers)

    def one_report() -> None:
        cluster.reported(keys[rng.randrange(len(keys))], report(rng), 0.01)

    def one_dispatch() -> None:
        cluster.dispatched(keys[0], 1, Promise(1000, 10))
        cluster.ended(keys[0], 1)

    return {
        "hash_ms": median_us(lambda: prefix_hints(prompt, block_tokens, root), repeats) / 1e3,
        "lookup_ms": median_us(lambda: cluster.prefixes.match(hints, block_tokens), repeats) / 1e3,
        "lookup_unknown_ms": median_us(lambda: cluster.prefixes.match(~hints, block_tokens), repeats) / 1e3,
        "decide_us": median_us(lambda: decide(facts, view, params, 0.05, rng), repeats * 5),
        "decide_cold_us": median_us(lambda: decide(cold, view, params, 0.05, rng), repeats * 5),
        "sum_of_range_1000_us": median_us(lambda: sum(range(1000)), repeats * 5),
        "report_us": median_us(one_report, repeats * 5),
        "dispatch_and_end_us": median_us(one_dispatch, repeats * 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parse(parser, repeats=2)
    figures = {
        f"{workers} workers, {block}-token blocks": measure(workers, block, arguments.repeats)
        for workers in (WORKERS[:1] if arguments.smoke else WORKERS)
        for block in BLOCKS
    }
    names = list(next(iter(figures.values())))
    table(
        ("128k tokens", *names),
        [(what, *(f"{row[name]:.3g}" for name in names)) for what, row in figures.items()],
    )
    save("decide", {"prompt_tokens": PROMPT_TOKENS, "figures": figures})


if __name__ == "__main__":
    main()
