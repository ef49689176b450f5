"""What each further router costs: the block events of one worker, at 1, 2 and 4 routers.

Every router has the whole prefix index, so every worker tells every router of each block that its cache gains or
loses. One process, no sockets: the worker's end makes and serializes each step's message for every router; the routers'
end parses it and applies it to an index. CPU is this process's own (`time.process_time`). A step ends one prompt that
is new but for a shared beginning, and the cache gives up as many blocks as it gains.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque

from diptych.v1 import worker_pb2

from benchmarks.report import parse, save, table
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.view import WorkerKey
from router.wire import block_events_from_wire
from worker.messages import BlockChanges, LinkOutput
from worker.wire import output_to_wire

ROUTERS = (1, 2, 4)
BLOCK_TOKENS = 32
PROMPT_BLOCKS = 64  # new ones of a prompt: 2048 tokens
CACHE_BLOCKS = 16_384
TOKENS_PER_S = 20_000  # of prompts, to say what it comes to


def router(key: WorkerKey) -> Cluster:
    cluster = Cluster()
    info = WorkerInfo(key, Role.PREFILL, "host:1", "m", "kv", BLOCK_TOKENS, 1 << 20, CACHE_BLOCKS, 1 << 20, 128_000)
    cluster.registered(info, 0.0, leaving=False)
    cluster.connected(key, 0.0)
    return cluster


class Cache:
    """Blocks by hints, in the order in which they leave again."""

    def __init__(self) -> None:
        self._rng = random.Random(0)
        self._held: deque[int] = deque()
        self._number = 0

    def step(self) -> BlockChanges:
        """A prompt more, and what had to go for it."""
        hints = [self._rng.getrandbits(64) | 1 for _ in range(PROMPT_BLOCKS)]
        self._held.extend(hints)
        removed = [self._held.popleft() for _ in range(len(self._held) - CACHE_BLOCKS)]
        stored = tuple(zip(hints, [0, *hints[:-1]], strict=True))
        changes = BlockChanges(self._number, removed=tuple(removed), stored=stored)
        self._number += changes.num_events
        return changes


def measure(routers: int, steps: int) -> dict[str, float]:
    key, cache = WorkerKey("p-0", 1), Cache()
    clusters = [router(key) for _ in range(routers)]
    worker_s = router_s = 0.0
    sent = 0
    warm_up = CACHE_BLOCKS // PROMPT_BLOCKS  # until blocks leave, too
    for number in range(warm_up + steps):
        changes = cache.step()
        began = time.process_time()
        messages: list[bytes] = []
        for _ in clusters:
            output = LinkOutput()
            output.add_blocks([changes])
            messages.append(output_to_wire(output, 1, 0.0).SerializeToString())
        written = time.process_time()
        for cluster, data in zip(clusters, messages, strict=True):
            events = worker_pb2.ConnectResponse.FromString(data).block_events
            assert cluster.block_events(key, events.first_sequence_number, block_events_from_wire(events))
        if number >= warm_up:
            worker_s += written - began
            router_s += time.process_time() - written
            sent += sum(map(len, messages))
    blocks = steps * PROMPT_BLOCKS
    a_second = TOKENS_PER_S / BLOCK_TOKENS
    return {
        "routers": routers,
        "bytes_per_block_and_router": sent / blocks / routers,
        "worker_us_per_block": worker_s / blocks * 1e6,
        "router_us_per_block": router_s / blocks / routers * 1e6,
        "worker_sends_kbyte_per_s": sent / blocks * a_second / 1e3,
        "worker_cpu_share": worker_s / blocks * a_second,
        "router_cpu_share_per_worker": router_s / blocks / routers * a_second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parse(parser, steps=20)
    rows = [measure(routers, arguments.steps) for routers in ROUTERS]
    header = ("routers", "bytes/block each", "worker us/block", "router us/block", "worker sends kB/s", "worker CPU")
    shown = [
        (
            int(r["routers"]),
            f"{r['bytes_per_block_and_router']:.1f}",
            f"{r['worker_us_per_block']:.2f}",
            f"{r['router_us_per_block']:.2f}",
            f"{r['worker_sends_kbyte_per_s']:.0f}",
            f"{r['worker_cpu_share']:.2%}",
        )
        for r in rows
    ]
    table(header, shown)
    print(f"a block is gained and another lost; the last two at {TOKENS_PER_S} new prompt tokens a second")
    save("router_count", {"tokens_per_s": TOKENS_PER_S, "block_tokens": BLOCK_TOKENS, "rows": rows})


if __name__ == "__main__":
    main()
