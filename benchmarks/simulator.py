"""The simulator against itself, and its speed.

    python -m benchmarks.simulator agreement --workers 64 --requests 1000 --seeds 12    fast workers against exact ones
    python -m benchmarks.simulator speed --workers 1000 --requests 1000000              on one core

Agreement, of two kinds:

    same placements    fast workers are told what was decided in the exact run: request by request the same load, so
                       what differs is what workers do and report
    own placements     each decides for itself. One early difference sends two runs different ways (another worker is
                       chosen, other prefixes are cached), and runs of one simulator that differ by a seed of the policy
                       alone are 3 % (tokens) to 8 % (share split) apart. So for each exact run there are `FAST_RUNS`
                       fast ones, and intervals (95 %, of the mean over seeds) say what the rest is worth.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.policies import interval
from benchmarks.report import parse, save, table
from router.placement.policy import PolicyParams, PoolsView, Rejection, RequestFacts, Route
from simulator.exact import ExactCluster
from simulator.fast import FastCluster
from simulator.outcome import METRICS, Outcome, attainment, counted, quantiles
from simulator.policies import Policy, as_told, by_name
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, at_rate, read, repeated, window

FAST_RUNS = 8
TRACE = "mooncake_conversation_0-30min.jsonl"


def _trace(folder: Path, requests: int, seed: int) -> Trace:
    rng = random.Random(f"{seed}/trace")
    return window(repeated(read(folder / TRACE, rng), requests), requests, rng)


class Scripted:
    """Places requests as another run has placed them, with estimates of its own view."""

    name = "scripted"

    def __init__(self, script: Sequence[Route | Rejection]) -> None:
        self._script = iter(script)

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        then = next(self._script)
        if isinstance(then, Rejection):
            return then
        decode = view.decode.find(then.decode)
        assert decode is not None, "nothing is lost in these runs"
        prefill = None if then.prefill is None else view.prefill.find(then.prefill)
        return as_told(facts, view, decode, prefill, params, now, rng)


class Noted:
    """Another policy, and what it has decided."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy, policy.name
        self.script: list[Route | Rejection] = []

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        self.script.append(self.policy.place(facts, view, params, now, rng))
        return self.script[-1]


def _figures(outcomes: list[Outcome], spec: ClusterSpec) -> dict[str, float]:
    done = [o for o in counted(outcomes) if o.finished]
    ttft = quantiles([o.ttft_s * 1e3 for o in done])
    itl = quantiles([o.tpot_ms for o in done if o.output_tokens > 1])
    return {
        **{f"ttft_{q}_ms": ttft[q] for q in ("mean", "p50", "p90")},
        **{f"itl_{q}_ms": itl[q] for q in ("mean", "p50", "p90")},
        **{f"goodput_{m}": attainment(outcomes, spec.itl_target_ms, m) for m in METRICS},
        "predicted_ttft_mean_ms": statistics.fmean(o.predicted_ttft_ms for o in done),
        "split_share": sum(o.split for o in done) / len(done),
    }


def _ratio(fast: list[dict[str, float]], exact: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """(of the means over all seeds, half width of its 95 % interval by the ratios of single seeds)."""
    found: dict[str, tuple[float, float]] = {}
    for name in exact[0]:
        below = statistics.fmean(e[name] for e in exact)
        if below:
            ratio = statistics.fmean(f[name] for f in fast) / below
            # Of the differences rather than of ratios of single seeds: some seeds have few requests split.
            half = interval([f[name] - ratio * e[name] for f, e in zip(fast, exact, strict=True)]) / below
            found[name] = ratio, half
    return found


def agreement(
    folder: Path, workers: int, requests: int, seeds: int, rate: float, policies: Sequence[str]
) -> dict[str, Any]:
    rows = []
    pools = {"aggregated": 0, "always-split": workers // 2, "diptych": workers // 4}
    for policy in policies:
        prefill = pools[policy]
        spec = ClusterSpec(
            prefill=PoolSpec(workers=prefill, max_batch_tokens=8192),
            decode=PoolSpec(workers=workers - prefill),
        )
        costs = spec.costs()
        exact: list[dict[str, float]] = []
        same: list[dict[str, float]] = []
        own: list[dict[str, float]] = []
        for seed in range(1, seeds + 1):
            played = at_rate(_trace(folder, requests, seed), rate * workers)
            noted = Noted(by_name(policy))
            exact.append(_figures(ExactCluster(spec, costs, noted, seed).run(played), spec))
            same.append(_figures(FastCluster(spec, costs, Scripted(noted.script), seed).run(played), spec))
            runs = [
                _figures(FastCluster(spec, costs, by_name(policy), 1000 * run + seed).run(played), spec)
                for run in range(FAST_RUNS)
            ]
            own.append({name: statistics.fmean(r[name] for r in runs) for name in runs[0]})
            print(policy, seed, exact[-1], own[-1], file=sys.stderr, flush=True)
        for kind, fast in (("same placements", same), ("own placements", own)):
            rows.append({"policy": policy, "kind": kind, "exact": exact, "fast": fast, "ratio": _ratio(fast, exact)})
    names = list(rows[-1]["ratio"])
    table(
        ["fast / exact", *names],
        [
            [f"{r['policy']}, {r['kind']}", *("{:.3f} +- {:.3f}".format(*r["ratio"].get(n, (0, 0))) for n in names)]
            for r in rows
        ],
    )
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
    parser.add_argument("--policies", nargs="*", default=["aggregated", "always-split", "diptych"])
    parser.add_argument("--rate", type=float, default=0.75, help="requests/s per worker")
    a = parse(parser, workers=8, requests=60, seeds=1, policies=["diptych"])
    if a.what == "agreement":
        save("simulator_agreement", agreement(a.traces, a.workers, a.requests, a.seeds, a.rate, a.policies))
    else:
        save("simulator_speed", speed(a.traces, a.workers, a.requests, a.rate))


if __name__ == "__main__":
    main()
