"""Scaling policies in the simulator: requests in time for each GPU-hour, beside other rules and beside hindsight.

    python -m benchmarks.scaling                      # every trace, every scaler
    python -m benchmarks.scaling --only sine --seeds 3

Every scaler sees the same observations every 5 s, and requests are routed by the same decide(); a worker takes 45 s to
start (10 % more or less). GPU time counts from the moment that a worker has its place until it is gone, drain included.
The first tenth of the requests is not counted, nor is GPU time before it.

    fixed         the best fixed pools, found by a search in hindsight
    serve         Ray Serve's request-count autoscaling, with its own delay before it shrinks (600 s) or with 60 s: the
                  better one in hindsight
    planner       a throughput planner with a window of 180 s and a load loop of 5 s, blind to queues, as published;
                  and one that sees queues
    thresholds    load thresholds, with role shifts
    clairvoyant   knows the trace

"Best" is the most requests in time for each GPU-hour among those that keep 90 % in time, else the most in time.
regret = 1 - ours / the better of those two that know the trace, of requests in time for each GPU-hour. Neither is the
best that is possible: below zero means better than both.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import parse, save, table
from scaling.config import ScalingConfig
from scaling.observation import Pool
from scaling.weighing import Pair, Terms
from simulator.cost_model import CostModel
from simulator.elastic import ElasticCluster, Platform, Scaler
from simulator.outcome import attainment, counted
from simulator.scalers import Clairvoyant, Fixed, Ours, Profile, ServeCounts, Thresholds, ThroughputPlanner
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest, at_rate, read, window

GOAL = 0.9
METRIC = "mean"
BUDGET = 12
START_S = 45.0
SETTLE_S = 240.0  # moves so long after a change belong to it
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    trace: Callable[[int, float], Trace]  # of a seed, and of how long
    duration_s: float
    platform: Platform = field(default_factory=lambda: Platform(((0.0, BUDGET),), START_S))
    changes: Sequence[float] = field(default_factory=tuple)  # when the load changes for good
    start: Pair = (2, 2)


def lengths(rng: random.Random, mean: float, spread: float, most: int) -> int:
    """Log-normal."""
    sigma = math.sqrt(math.log(1 + spread**2))
    return max(1, min(most, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


def made(
    name: str, rate: Callable[[float], float], most: float, shape: Callable[[float], tuple[float, float]]
) -> Callable[[int, float], Trace]:
    """Poisson arrivals at a rate that changes; `shape(t)` are the mean lengths of prompt and answer."""

    def draw(seed: int, duration_s: float) -> Trace:
        rng = random.Random(f"{seed}/{name}")
        at, requests = 0.0, []
        while (at := at + rng.expovariate(most)) < duration_s:
            if rng.random() * most < rate(at):
                prompt, answer = shape(at)
                requests.append(TraceRequest(at, lengths(rng, prompt, 0.8, 32_000), lengths(rng, answer, 0.7, 8_000)))
        return Trace(name, requests)

    return draw


def bursts(t: float) -> float:
    """A minute of seven times the load, at irregular times."""
    return 20.0 if any(start <= t < start + 60.0 for start in (150, 370, 455, 700, 930, 1090)) else 3.0


def recorded(folder: Path, name: str, rate: float, requests: int) -> Callable[[int, float], Trace]:
    def draw(seed: int, duration_s: float) -> Trace:
        rng = random.Random(f"{seed}/trace")
        return at_rate(window(read(folder / name, rng), min(requests, round(duration_s * rate)), rng), rate)

    return draw


def cases(folder: Path) -> list[Case]:
    usual = (6000.0, 300.0)
    short = ((0.0, 6), (400.0, BUDGET))
    return [
        Case(
            "sine",
            made("sine", lambda t: 12.5 - 11.5 * math.cos(2 * math.pi * t / 900), 24.0, lambda _: usual),
            900.0,
            start=(1, 1),
        ),
        Case(
            "flip",
            made("flip", lambda _: 12.0, 12.0, lambda t: (10_000.0, 200.0) if t < 400 else (1500.0, 2000.0)),
            800.0,
            changes=(400.0,),
            start=(5, 2),
        ),
        Case(
            "no GPU to be had",
            made("no GPU", lambda t: 4.0 if t < 150 else 15.0, 15.0, lambda _: usual),
            700.0,
            Platform(short, START_S),
            (150.0, 400.0),
        ),
        Case(
            "death while shrinking",
            made("death", lambda t: 14.0 if t < 300 else 4.0, 14.0, lambda _: usual),
            600.0,
            Platform(((0.0, BUDGET),), START_S, deaths=((345.0, Pool.PREFILL), (370.0, Pool.DECODE))),
            (300.0,),
            (4, 3),
        ),
        Case("bursts", made("bursts", bursts, 20.0, lambda _: (4000.0, 250.0)), 800.0),
        Case("constant", made("constant", lambda _: 8.0, 8.0, lambda _: usual), 400.0),
        Case("mooncake x2", recorded(folder, "mooncake_conversation_0-30min.jsonl", 6.4, 2850), 440.0),
    ]


class Game:
    """One case, one seed."""

    def __init__(self, case: Case, seed: int, share: float) -> None:
        self.case, self.seed = case, seed
        self.duration_s = case.duration_s * share
        self.trace = case.trace(seed, self.duration_s)
        self.spec = ClusterSpec(prefill=PoolSpec(workers=2, max_batch_tokens=8192), decode=PoolSpec(workers=2))
        self.costs: CostModel = self.spec.costs()
        self.prompts = statistics.fmean(r.prompt_tokens for r in self.trace.requests)
        self.answers = statistics.fmean(r.output_tokens for r in self.trace.requests)

    def play(self, scaler: Scaler, start: Pair | None = None) -> Result:
        prefill, decode = start or self.case.start
        spec = self.spec.model_copy(
            update={
                "prefill": self.spec.prefill.model_copy(update={"workers": prefill}),
                "decode": self.spec.decode.model_copy(update={"workers": decode}),
            }
        )
        began = time.process_time()
        cluster = ElasticCluster(spec, self.costs, scaler, self.case.platform, self.seed)
        outcomes = cluster.run(self.trace)
        story = cluster.story
        share = attainment(outcomes, spec.itl_target_ms, METRIC)
        met = share * len(counted(outcomes))
        hours = story.gpu_s / 3600
        moved = [(at, n) for at, n in story.moves if at >= self.duration_s * 0.1]
        settled = [
            max((at - c for at, _ in story.moves if c <= at < c + SETTLE_S), default=0.0)
            for c in self.case.changes
            if c < self.duration_s
        ]
        done = [o for o in counted(outcomes) if o.finished]
        return {
            "scaler": scaler.name,
            "attainment": share,
            "in_time_per_gpu_hour": met / hours if hours else 0.0,
            "gpu_hours": hours,
            "gpus": story.gpu_s / story.counted_s if story.counted_s else 0.0,
            "moves_per_hour": sum(n for _, n in moved) / (story.counted_s / 3600) if story.counted_s else 0.0,
            "converged_s": statistics.fmean(settled) if settled else None,
            "most_held": story.most_held,
            "refused": sum(o.refused for o in outcomes),
            "unfinished": sum(not o.finished for o in outcomes),
            "ttft_p99_s": sorted(o.ttft_s for o in done)[len(done) * 99 // 100] if done else math.inf,
            "cpu_s": time.process_time() - began,
        }

    # Who is compared.

    def ours(self, **changes: Any) -> Result:
        config = ScalingConfig.model_validate({"budget_gpus": BUDGET, **changes})
        return self.play(Ours(config, Terms(self.spec.itl_target_ms)))

    def fixed(self, looks: int) -> Result:
        """From what the mean load needs, step by step to a better neighbour."""
        seen: dict[Pair, Result] = {}

        def look(pair: Pair) -> Result:
            if pair not in seen:
                seen[pair] = self.play(Fixed(pair, f"fixed {pair[0]}+{pair[1]}"), pair)
            return seen[pair]

        profile = Profile.of(self.costs, self.spec, self.prompts, self.answers)
        rate = self.trace.requests_per_s
        prefill = max(1, math.ceil(rate * self.prompts / profile.prefill_tokens_per_s))
        decode = max(1, math.ceil(rate * self.answers / profile.decode_tokens_per_s))
        at = min(prefill, BUDGET - 1), min(decode, BUDGET - min(prefill, BUDGET - 1))
        best = key(look(at))
        while len(seen) < looks:
            steps = [(-1, 0), (0, -1), (-1, 1), (1, -1)]
            if best[0] < GOAL:
                steps = [(0, 1), (1, 0), (-1, 1), (1, -1)]
            around = [(at[0] + a, at[1] + b) for a, b in steps]
            new = [p for p in around if min(p) >= 1 and sum(p) <= BUDGET and p not in seen]
            if not new:
                break
            if key(look(new[0])) > best:
                at, best = new[0], key(look(new[0]))
        return max(seen.values(), key=key)

    def serve(self, quick: bool) -> Result:
        n = Profile.of(self.costs, self.spec, self.prompts, self.answers, 0.8).sequences
        choices = [(1.0, 0.7, 600.0), (1.0, 0.7, 60.0)][: 1 if quick else 2]
        return max(
            (self.play(ServeCounts(p, round(n * share), BUDGET, down_s=down)) for p, share, down in choices), key=key
        )

    def clairvoyant(self) -> Result:
        return self.play(Clairvoyant(self.trace, self.costs, self.spec, BUDGET, START_S, 0.5))

    def all(self, kinds: Sequence[str], looks: int, quick: bool) -> Iterator[tuple[str, Result]]:
        plays: dict[str, Callable[[], Result]] = {
            "ours": self.ours,
            "fixed": lambda: self.fixed(looks),
            "serve": lambda: self.serve(quick),
            "planner": lambda: self.play(ThroughputPlanner(self.costs, self.spec, BUDGET)),
            "planner with queues": lambda: self.play(ThroughputPlanner(self.costs, self.spec, BUDGET, queues=True)),
            "thresholds": lambda: self.play(Thresholds(self.costs, self.spec, BUDGET)),
            "clairvoyant": self.clairvoyant,
        }
        for kind, play in plays.items():
            if not kinds or kind in kinds:
                yield kind, play()


def key(result: Result) -> tuple[float, float]:
    return min(result["attainment"], GOAL), result["in_time_per_gpu_hour"]


def mean(rows: Sequence[Result]) -> Result:
    names = [k for k, v in rows[0].items() if isinstance(v, int | float)]
    return {"scaler": rows[0]["scaler"], "converged_s": rows[0]["converged_s"]} | {
        k: statistics.fmean(r[k] for r in rows) for k in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--only", default="", help="names of traces, with commas")
    parser.add_argument("--name", default="", help="of the result's file, for a part of the traces")
    parser.add_argument("--kinds", default="", help="of scalers, with commas: ours,fixed,planner; empty = all")
    parser.add_argument("--set", default="", help="only ours, with these settings: margin=1,hold_s=20")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--looks", type=int, default=5, help="fixed pools to look at")
    parser.add_argument("--share", type=float, default=1.0, help="of each trace's duration")
    a = parse(parser, only="sine,flip", seeds=1, looks=1, share=0.05)
    quick = a.looks <= 1
    settings = {k: float(v) for k, v in (item.split("=") for item in a.set.split(",") if item)}
    kinds = [kind for kind in a.kinds.split(",") if kind]
    found: dict[str, dict[str, Result]] = {}
    lines = []
    for case in cases(a.traces):
        if a.only and case.name not in a.only.split(","):
            continue
        by_kind: dict[str, list[Result]] = {}
        for seed in range(1, a.seeds + 1):
            game = Game(case, seed, a.share)
            results = [("ours", game.ours(**settings))] if settings else game.all(kinds, a.looks, quick)
            for kind, result in results:
                by_kind.setdefault(kind, []).append(result)
                print(case.name, seed, kind, result, file=sys.stderr, flush=True)
        found[case.name] = {kind: mean(rows) for kind, rows in by_kind.items()}
        knowing = [r for kind, r in found[case.name].items() if kind in ("fixed", "clairvoyant")]
        best = max(knowing, key=key, default=None)
        for kind, r in found[case.name].items():
            if best is not None:
                r["regret"] = 1 - r["in_time_per_gpu_hour"] / max(1e-9, best["in_time_per_gpu_hour"])
            settled = "-" if r["converged_s"] is None else f"{r['converged_s']:.0f}"
            lines.append(
                [
                    f"{case.name}: {kind}", r["scaler"], f"{r['attainment']:.1%}", f"{r['in_time_per_gpu_hour']:.0f}",
                    f"{r['gpus']:.2f}", f"{r.get('regret', 0.0):.1%}", f"{r['moves_per_hour']:.0f}", settled,
                ]
            )  # fmt: skip
        # After every case: a long run that is broken off has what it found.
        save(
            f"scaling{a.name and '-'}{a.name}",
            {"budget_gpus": BUDGET, "start_s": START_S, "metric": METRIC, "seeds": a.seeds, "cases": found},
        )
    table(["case", "scaler", "in time", "per GPU-hour", "GPUs", "regret", "moves/h", "converged s"], lines)


if __name__ == "__main__":
    main()
