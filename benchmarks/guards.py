"""What the fence and the digest cost: the same pulls without a fence, with it, and with digests, in turns.

Two processes on one host, read mode. "Without a fence" is a transport that this script cripples; the product has no
such switch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import time
from typing import Any
from unittest import mock

from benchmarks.children import hear
from benchmarks.report import median, parse, save, table
from benchmarks.transfer import KIB, READER, SOURCE, pool, serve
from kv_transfer.config import TransportConfig
from kv_transfer.transport import PullOrder, PullOutcome, PullStatus

VARIANTS = ("no fence", "fence", "fence and digest")
NUM_BLOCKS = (1, 4, 16)  # in one pull


def measure(pipe: Any, block: int, options: dict[str, Any], repeats: int) -> None:
    """Sends {(variant, blocks): median seconds a pull}."""
    from kv_transfer import nixl_transport
    from kv_transfer.nixl_pulls import Pulls
    from kv_transfer.transport_inprocess import block_digest

    unfenced: set[int] = set()

    class Crippled(Pulls):
        def _read_fence(self, pull: Any, peer: Any, remote_blocks: Any) -> None:
            if pull.order.pull_id in unfenced:
                self._end(pull, PullStatus.ARRIVED, "")
            else:
                super()._read_fence(pull, peer, remote_blocks)

    data, memory = pool(max(NUM_BLOCKS) * block, block)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    transport = nixl_transport.NixlTransport(READER, TransportConfig(**options), events.put)
    with mock.patch.object(nixl_transport, "Pulls", Crippled):
        transport.register(memory)
    pipe.send(transport.endpoint())
    transport.connect(SOURCE, pipe.recv())
    digests = (block_digest(memory, 0),) * len(data)
    times: dict[tuple[str, int], list[float]] = {(v, n): [] for v in VARIANTS for n in NUM_BLOCKS}
    pull_id = 0
    for repeat in range(repeats):
        for count in NUM_BLOCKS:
            ids = tuple(range(count))
            turn = repeat % len(VARIANTS)  # nobody is always first
            for variant in VARIANTS[turn:] + VARIANTS[:turn]:
                pull_id += 1
                if variant == "no fence":
                    unfenced.add(pull_id)
                own = digests[:count] if "digest" in variant else ()
                begun = time.perf_counter()
                transport.submit(PullOrder(pull_id, SOURCE, ids, ids, (0,) * count, own, 60.0))
                outcome = events.get(timeout=60)
                times[variant, count].append(time.perf_counter() - begun)
                assert isinstance(outcome, PullOutcome)
                assert outcome.status is PullStatus.ARRIVED, outcome
    pipe.send({key: median(values[len(values) // 10 :]) for key, values in times.items()})
    pipe.recv()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--block-kib", type=int, default=512)
    arguments = parse(parser, repeats=10, block_kib=64)
    block, options = arguments.block_kib * KIB, {"pull_mode": "read", "ucx_net_devices": "lo"}
    context = multiprocessing.get_context("spawn")
    ours_s, theirs_s = context.Pipe()
    ours_r, theirs_r = context.Pipe()
    source = context.Process(name="source", target=serve, args=(theirs_s, max(NUM_BLOCKS) * block, block, options))
    reader = context.Process(name="reader", target=measure, args=(theirs_r, block, options, arguments.repeats))
    source.start()
    reader.start()
    try:
        ours_r.send(hear(ours_s, 60, "the source's address", source))
        ours_s.send(hear(ours_r, 60, "the reader's address", reader))
        assert hear(ours_s, 60, "the source's connection", source)
        took = hear(ours_r, 300, "a result", reader, source)
    finally:
        for process in (reader, source):
            process.kill()
            process.join()
    rows = []
    for n in NUM_BLOCKS:
        bare, fenced, digested = (took[v, n] * 1e6 for v in VARIANTS)
        ratios = (f"{fenced / bare:.2f}", f"{digested / fenced:.2f}")
        rows.append([f"{n} x {arguments.block_kib} KiB", f"{bare:.0f}", f"{fenced:.0f}", f"{digested:.0f}", *ratios])
    table(["one pull", *(f"{v}, us" for v in VARIANTS), "fence costs", "digest costs"], rows)
    result = {f"{n} blocks": {v: round(took[v, n] * 1e6, 1) for v in VARIANTS} for n in NUM_BLOCKS}
    save("guards", {"block_kib": arguments.block_kib, "us_per_pull": result})


if __name__ == "__main__":
    main()
