"""The simulator against itself, and its speed.

    python -m benchmarks.simulator agreement --workers 64 --requests 3000     fast workers against exact ones
    python -m benchmarks.simulator speed --workers 1000 --requests 1000000    on one core

Agreement: the same trace, seeds and policies through both; ratios of the means over all seeds. One early difference
sends two runs different ways (another worker is chosen, other prefixes are cached): requests differ, means agree.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import save, table
from simulator.exact import ExactCluster
from simulator.fast import FastCluster
from simulator.outcome import METRICS, attainment, counted, quantiles
from simulator.policies import by_name
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, at_rate, read, repeated, window

TRACE = "mooncake_conversation_0-30min.jsonl"


def _trace(folder: Path, requests: int, seed: int) -> Trace:
    rng = random.Random(f"{seed}/trace")
    return window(repeated(read(folder / TRACE, rng), requests), requests, rng)


def agreement(folder: Path, workers: int, requests: int, seeds: int, rate: float) -> dict[str, Any]:
    rows = []
    for policy, prefill in (("aggregated", 0), ("always-split", workers // 2), ("diptych", workers // 4)):
        spec = ClusterSpec(
            prefill=PoolSpec(workers=prefill, max_batch_tokens=8192),
            decode=PoolSpec(workers=workers - prefill),
        )
        figures: dict[str, list[dict[str, float]]] = {}
        for seed in range(1, seeds + 1):
            played = at_rate(_trace(folder, requests, seed), rate * workers)
            for kind in (FastCluster, ExactCluster):
                began = time.process_time()
                outcomes = kind(spec, spec.costs(), by_name(policy), seed).run(played)
                done = [o for o in counted(outcomes) if o.finished]
                ttft, itl = (
                    quantiles([o.ttft_s * 1e3 for o in done]),
                    quantiles([o.tpot_ms for o in done if o.output_tokens > 1]),
                )
                span = played.duration_s
                figures.setdefault(kind.__name__, []).append(
                    {
                        **{f"ttft_{q}_ms": ttft[q] for q in ("mean", "p50", "p90")},
                        **{f"itl_{q}_ms": itl[q] for q in ("mean", "p50", "p90")},
                        **{
                            f"goodput_{m}": attainment(outcomes, spec.itl_target_ms, m) * len(outcomes) / span
                            for m in METRICS
                        },
                        "cpu_s": time.process_time() - began,
                    }
                )
                print(policy, seed, kind.__name__, figures[kind.__name__][-1], file=sys.stderr, flush=True)
        fast, exact = (
            {k: statistics.fmean(f[k] for f in figures[name]) for k in figures[name][0]}
            for name in ("FastCluster", "ExactCluster")
        )
        rows.append({"policy": policy, "fast": fast, "exact": exact, "ratio": {k: fast[k] / exact[k] for k in fast}})
    names = [k for k in rows[0]["ratio"] if k != "cpu_s"]
    table(["fast / exact", *names], [[r["policy"], *(f"{r['ratio'][n]:.3f}" for n in names)] for r in rows])
    return {"workers": workers, "requests": requests, "seeds": seeds, "requests_per_s": rate * workers, "rows": rows}


def speed(folder: Path, workers: int, requests: int, rate: float) -> dict[str, Any]:
    spec = ClusterSpec(
        prefill=PoolSpec(workers=workers // 4, max_batch_tokens=8192),
        decode=PoolSpec(workers=workers - workers // 4),
        report_every_s=1.0,
    )
    played = at_rate(_trace(folder, requests, 1), rate * workers)
    cluster = FastCluster(spec, spec.costs(), by_name("diptych"), 1)
    wall, cpu = time.perf_counter(), time.process_time()
    outcomes = cluster.run(played, lambda ended: None)
    return {
        "workers": workers,
        "requests": requests,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "virtual_s": cluster.loop.now,
        "events": cluster.loop.events_total,
        "finished": sum(o.finished for o in outcomes),
        "split_share": sum(o.split for o in outcomes) / len(outcomes),
        "attainment": attainment(outcomes, spec.itl_target_ms, "mean"),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["agreement", "speed"])
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.75, help="requests/s per worker")
    a = parser.parse_args()
    if a.what == "agreement":
        save("simulator_agreement", agreement(a.traces, a.workers, a.requests, a.seeds, a.rate))
    else:
        save("simulator_speed", speed(a.traces, a.workers, a.requests, a.rate))


if __name__ == "__main__":
    main()
