"""What it would cost to weigh fewer workers in a decision: microseconds, and what the answers of a simulation say.

    taskset -c 0 python -m benchmarks.candidates

A pool of more than `LOOK_AT_ALL` workers is not looked at in full: a decision weighs those that hold the prompt's
prefix and some at random (router/placement/estimates.py). For numbers of both: the time of decide() among 4,096 workers
(benchmarks/decide.py), and Mooncake's conversations on 20 prefill and 60 decode workers at two rates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import router.placement.estimates as estimates
from benchmarks.decide import measure
from benchmarks.report import parse, save, table
from simulator.policies import by_name
from simulator.run import load_trace, over_seeds
from simulator.spec import ClusterSpec, PoolSpec

TRIED = ((3, 3), (3, 2), (2, 2), (3, 1))  # holders, others
RATES = (150.0, 190.0)  # requests/s
WORKERS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=51)
    a = parse(parser, requests=40, seeds=1)
    spec = ClusterSpec(
        prefill=PoolSpec(workers=20, max_batch_tokens=8192), decode=PoolSpec(workers=60, max_batch_tokens=2048)
    )
    costs, policy = spec.costs(), by_name("diptych")
    file = a.traces / "mooncake_conversation_0-30min.jsonl"
    traces = [load_trace(file, seed, a.requests) for seed in range(a.first_seed, a.first_seed + a.seeds)]
    rows = []
    for holders, others in TRIED[:1] if a.smoke else TRIED:
        estimates._HOLDERS, estimates._RANDOM_BESIDE_HOLDERS = holders, others
        decide_us = measure(64 if a.smoke else WORKERS, 16, 40)["decide_us"]
        for rate in RATES[:1] if a.smoke else RATES:
            found = over_seeds(spec, costs, policy, traces, rate)
            rows.append(
                {
                    "holders": holders, "others": others, "decide_us": decide_us, "requests_per_s": rate,
                    "ttft_mean_ms": found["ttft_ms"]["mean"], "attainment": found["attainment"],
                    "cached_share": found["cached_share"],
                }
            )  # fmt: skip
    table(
        ("holders", "others", "decide us", "requests/s", "mean TTFT ms", "met, mean", "met, worst", "cached"),
        [
            (
                r["holders"], r["others"], f"{r['decide_us']:.1f}", f"{r['requests_per_s']:g}",
                f"{r['ttft_mean_ms']:.0f}", f"{r['attainment']['mean']:.2%}", f"{r['attainment']['worst']:.2%}",
                f"{r['cached_share']:.1%}",
            )
            for r in rows
        ],
    )  # fmt: skip
    save("candidates", {"requests": a.requests, "seeds": a.seeds, "first_seed": a.first_seed, "rows": rows})


if __name__ == "__main__":
    main()
