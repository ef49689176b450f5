"""Pulled GB/s by block size and total size, same host and TCP only, by READ and by reader-driven WRITE.

Two processes, the transport as workers use it (fence included), against memcpy of the same bytes in one process. Then a
live pair of workers: how much of a 1,500-token prompt's KV had moved before prefill ended, and how long adoption took.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import hear
from benchmarks.report import median, parse, save, table
from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.transport import KvArea, KvMemory, PullOrder, PullOutcome, PullStatus

KIB, MIB = 1 << 10, 1 << 20
BLOCK_SIZES = (64 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB)
TOTALS = (MIB, 16 * MIB, 128 * MIB)
LINKS = (("same host", "", "read"), ("same host", "", "write"), ("tcp", "tcp", "read"), ("tcp", "tcp", "write"))
ORDER_BYTES = 8 * MIB
SOURCE, READER = PeerId("source", 1), PeerId("reader", 1)


def pool(total: int, block: int) -> tuple[np.ndarray, KvMemory]:
    # Whole huge pages, as a worker's pool has: where the allocator happens to begin must not decide.
    room = mmap.mmap(-1, total + 4 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(room, dtype=np.uint8)
    start = -whole.ctypes.data % (2 * MIB)
    data = whole[start : start + total].reshape(total // block, block)
    data[:] = 1
    memory = KvMemory(
        (KvArea(data.ctypes.data, block, len(data)),),
        "cpu",
        np.zeros(len(data), dtype=np.uint64),
        lambda i: memoryview(data[i]),  # type: ignore[arg-type]
    )
    return data, memory


def serve(pipe: Any, total: int, block: int, options: dict[str, Any]) -> None:
    from kv_transfer.nixl_transport import NixlTransport

    data, memory = pool(total, block)
    transport = NixlTransport(SOURCE, TransportConfig(**options), lambda event: None)
    transport.register(memory)
    pipe.send(transport.endpoint())
    transport.connect(READER, pipe.recv())
    pipe.send(True)
    pipe.recv()
    pipe.send(len(data))
    os._exit(0)


def measure(pipe: Any, total: int, block: int, options: dict[str, Any], repeats: int, digest: bool) -> None:
    """The reader, in a process of its own too: UCX reads its environment once."""
    from kv_transfer.nixl_agent import LANE_SLOTS
    from kv_transfer.nixl_transport import NixlTransport

    data, memory = pool(total, block)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    transport = NixlTransport(READER, TransportConfig(**options), events.put)
    transport.register(memory)
    pipe.send(transport.endpoint())
    transport.connect(SOURCE, pipe.recv())
    per_order = min(LANE_SLOTS, max(1, ORDER_BYTES // block))
    digests: tuple[int, ...] = ()
    if digest:
        from kv_transfer.transport_inprocess import block_digest

        digests = (block_digest(memory, 0),) * len(data)
    times = []
    for repeat in range(repeats + 2):
        begun = time.perf_counter()
        numbers = 0
        for first in range(0, len(data), per_order):
            ids = tuple(range(first, min(first + per_order, len(data))))
            order = PullOrder(
                repeat * 10000 + first, SOURCE, ids, ids, (0,) * len(ids), digests[first : first + len(ids)], 60.0
            )
            transport.submit(order)
            numbers += 1
        for _ in range(numbers):
            outcome = events.get(timeout=60)
            assert isinstance(outcome, PullOutcome)
            assert outcome.status is PullStatus.ARRIVED, outcome
        times.append(time.perf_counter() - begun)
    pipe.send(median(times[2:]))
    pipe.recv()
    os._exit(0)


def pulled_gb_per_s(total: int, block: int, tls: str, mode: str, repeats: int, digest: bool = False) -> float:
    options = {"ucx_tls": tls, "pull_mode": mode, "ucx_net_devices": "lo"}
    context = multiprocessing.get_context("spawn")
    ours_s, theirs_s = context.Pipe()
    ours_r, theirs_r = context.Pipe()
    source = context.Process(name="source", target=serve, args=(theirs_s, total, block, options))
    reader = context.Process(name="reader", target=measure, args=(theirs_r, total, block, options, repeats, digest))
    source.start()
    reader.start()
    try:
        ours_r.send(hear(ours_s, 60, "the source's address", source))
        ours_s.send(hear(ours_r, 60, "the reader's address", reader))
        assert hear(ours_s, 60, "the source's connection", source)
        return total / hear(ours_r, 120, f"a rate, {tls or 'same host'} {mode}", reader, source) / 1e9
    finally:
        for process in (reader, source):
            process.kill()
            process.join()


def memcpy_gb_per_s(total: int) -> float:
    a, b = np.ones(total, dtype=np.uint8), np.zeros(total, dtype=np.uint8)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        np.copyto(b, a)
        times.append(time.perf_counter() - begun)
    return total / median(times[1:]) / 1e9


def live_pair(prompts: int, prompt_tokens: int) -> dict[str, float]:
    """A split prompt on real workers (bfloat16, one thread each): what the handoff costs the client."""
    from diptych.v1 import generate_pb2

    from settings.model_path import resolve_model
    from tests.support.processes import Cluster

    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(
            Path(directory),
            Path(resolve_model("embedded")),
            engine={"dtype": "bfloat16", "num_blocks": 300},
            transport={"ucx_net_devices": "lo"},
        )
        try:
            cluster.start()
            timings = []
            for i in range(prompts + 1):
                ids = [1000 + (i * 7919 + j * 31) % 40000 for j in range(prompt_tokens)]
                request = cluster.request(
                    ids, generate_pb2.SamplingParams(max_tokens=8, ignore_eos=True), generate_pb2.PLACEMENT_SPLIT
                )
                timings.append(cluster.ask(request).finished.timings)
            timings = timings[1:]
        finally:
            cluster.stop()
    return {
        "prompt_tokens": prompt_tokens,
        "kv_early_share": median([t.kv_early_share for t in timings]),
        "last_chunk_to_adopted_ms": median([t.adopt_ms for t in timings]),
        "handoff_gap_ms": median([t.handoff_gap_ms for t in timings]),
        "later_gap_ms": median([(t.decode_ms - t.handoff_gap_ms) / 6 for t in timings]),
        "ttft_ms": median([t.ttft_ms for t in timings]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=5, help="of the live pair; 0 = without it")
    arguments = parse(parser, repeats=1, prompts=0)
    totals, blocks = (TOTALS[:1], BLOCK_SIZES[:2]) if arguments.smoke else (TOTALS, BLOCK_SIZES)
    memcpy = {total: memcpy_gb_per_s(total) for total in totals}
    rows, figures = [], []
    for link, tls, mode in LINKS:
        for total in totals:
            cells = []
            for block in blocks:
                if block > total:
                    cells.append("")
                    continue
                rate = pulled_gb_per_s(total, block, tls, mode, arguments.repeats)
                cells.append(f"{rate:.2f}")
                figures.append(
                    {"link": link, "mode": mode, "total_bytes": total, "block_bytes": block, "gb_per_s": round(rate, 3)}
                )
            rows.append((f"{link} {mode} {total // MIB} MiB", *cells, f"{memcpy[total]:.1f}"))
    table(("GB/s", *(f"{b // KIB} KiB" for b in blocks), "memcpy"), rows)
    digest = pulled_gb_per_s(128 * MIB, 512 * KIB, "", "read", arguments.repeats, digest=True)
    plain = pulled_gb_per_s(128 * MIB, 512 * KIB, "", "read", arguments.repeats)
    print(f"digest mode, same host, 512 KiB blocks: {digest:.2f} GB/s, without {plain:.2f} GB/s")
    live = live_pair(arguments.prompts, 1500) if arguments.prompts else {}
    if live:
        table(list(live), [[f"{v:.2f}" for v in live.values()]])
    save(
        "transfer",
        {
            "memcpy_gb_per_s": {str(k): round(v, 2) for k, v in memcpy.items()},
            "pulled": figures,
            "digest_gb_per_s": round(digest, 3),
            "without_digest_gb_per_s": round(plain, 3),
            "live_pair": live,
        },
    )


if __name__ == "__main__":
    main()
