"""Scaling policies in the simulator: the GPU-hours that it takes to keep a stated share of the requests in time.

    python -m benchmarks.scaling                      # every trace, every scaler
    python -m benchmarks.scaling --only sine --seeds 3

Every scaler sees the same observations every 5 s, and requests are routed by the same decide(); a worker takes 45 s to
start (10 % more or less). GPU time counts from the moment that a worker has its place until it is gone, drain included.
The first tenth of the requests is not counted, nor is GPU time before it.

What is compared: **the goal** is 99 % of the requests in time, or the most that any fixed pools within the budget
reach, if that is less. Of those that reach it the one with the fewest GPU-hours is better; of those that do not, the
one with more in time. Requests in time for each GPU-hour, alone, reward not serving: pools that miss every peak are the
cheapest for each request that they do serve. That figure is shown too, and the fixed pools that are best by it.

    fixed         the best fixed pools, found by a search in hindsight
    serve         Ray Serve's request-count autoscaling; the best of several settings, in hindsight
    planner       a throughput planner with a window of 180 s and a load loop of 5 s, blind to queues, as published
    planner, tuned      the same that sees queues; the best of several settings, in hindsight
    thresholds    load thresholds with role shifts; the best of several settings, in hindsight
    planned       the best plan found that knows the trace, start times included: a search among plans, no optimum
    bound         below this nobody can be, whatever they foresee (simulator/bound.py); no schedule reaches it

Ours has one setting for all traces, the others' are chosen for each: on the first seed, and played on all.
regret = ours / the fewest GPU-hours of all that were played and reach the goal, less 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import parse, save, table
from benchmarks.scaling_cases import BUDGET, START_S, Case, cases
from scaling.config import ScalingConfig
from scaling.weighing import Pair, Terms
from simulator.bound import least_gpu_s
from simulator.cost_model import CostModel
from simulator.elastic import ElasticCluster, Scaler
from simulator.outcome import attainment, counted
from simulator.scalers import (
    Clairvoyant,
    Fixed,
    Ours,
    Profile,
    Scheduled,
    ServeCounts,
    Thresholds,
    ThroughputPlanner,
)
from simulator.spec import ClusterSpec, PoolSpec

GOAL = 0.99
METRIC = "mean"
SETTLE_S = 240.0  # moves so long after a change belong to it
HOPELESS_LIVE = 3000  # with so many requests at once far more than a hundredth is late
Result = dict[str, Any]
Plan = list[tuple[float, Pair]]
Choice = tuple[Any, ...]  # a scaler's settings


def key(result: Result, goal: float) -> tuple[float, float]:
    """The greater the better."""
    reached = min(round(result["attainment"], 3), goal)
    return reached, -result["gpu_hours"] if reached >= goal else result["in_time_per_gpu_hour"]


def by_ratio(result: Result) -> tuple[float, float]:
    """As it is often compared; 90 % are to be in time."""
    return min(result["attainment"], 0.9), result["in_time_per_gpu_hour"]


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
        self.goal = GOAL
        self.plan: Plan = []  # as the last play went

    def play(self, scaler: Scaler, start: Pair | None = None, most_live: int = 0) -> Result:
        prefill, decode = start or self.case.start
        spec = self.spec.model_copy(
            update={
                "prefill": self.spec.prefill.model_copy(update={"workers": prefill}),
                "decode": self.spec.decode.model_copy(update={"workers": decode}),
            }
        )
        began = time.process_time()
        cluster = ElasticCluster(spec, self.costs, scaler, self.case.platform, self.seed, most_live)
        outcomes = cluster.run(self.trace)
        story = cluster.story
        self.plan = [(d.at, d.pair) for d in story.decisions]
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
            "gpu_hours": hours,
            "in_time_per_gpu_hour": met / hours if hours else 0.0,
            "gpus": story.gpu_s / story.counted_s if story.counted_s else 0.0,
            "moves_per_hour": sum(n for _, n in moved) / (story.counted_s / 3600) if story.counted_s else 0.0,
            "converged_s": statistics.fmean(settled) if settled else None,
            "most_held": story.most_held,
            "refused": sum(o.refused for o in outcomes),
            "unfinished": sum(not o.finished for o in outcomes),
            "given_up": cluster.given_up,
            "ttft_p99_s": sorted(o.ttft_s for o in done)[len(done) * 99 // 100] if done else math.inf,
            "cpu_s": time.process_time() - began,
        }

    # Who is compared.

    def ours(self, **changes: Any) -> Result:
        config = ScalingConfig.model_validate({"budget_gpus": BUDGET, **changes})
        return self.play(Ours(config, Terms(self.spec.itl_target_ms)))

    def fixed(self, looks: int) -> tuple[Result, Result]:
        """The best by the goal, which this sets, and the best by the ratio. Up until it is reached, then down."""
        seen: dict[Pair, Result] = {}
        most = min(BUDGET, self.case.platform.places_at(0.0))

        def look(pair: Pair) -> Result:
            if pair not in seen:
                name = f"fixed {pair[0]}+{pair[1]}"
                seen[pair] = self.play(Fixed(pair, name), pair, HOPELESS_LIVE)
            return seen[pair]

        def steps(at: Pair, moves: Sequence[Pair]) -> list[Pair]:
            pairs = [(at[0] + a, at[1] + b) for a, b in moves]
            return [p for p in pairs if min(p) >= 1 and sum(p) <= most]

        profile = Profile.of(self.costs, self.spec, self.prompts, self.answers)
        rate = self.trace.requests_per_s
        prefill = max(1, math.ceil(rate * self.prompts / profile.prefill_tokens_per_s))
        decode = max(1, math.ceil(rate * self.answers / profile.decode_tokens_per_s))
        at = min(prefill, most - 1), min(decode, most - min(prefill, most - 1))
        while round(look(at)["attainment"], 3) < GOAL and len(seen) < looks:
            more = steps(at, [(1, 0), (0, 1)]) or [p for p in steps(at, [(1, -1), (-1, 1)]) if p not in seen]
            if not more:
                break
            at = max(more, key=lambda p: key(look(p), GOAL))
        self.goal = min(GOAL, round(max(r["attainment"] for r in seen.values()), 3))
        while len(seen) < looks:
            at = max(seen, key=lambda p: key(seen[p], self.goal))
            new = [p for p in steps(at, [(-1, 0), (0, -1), (-1, 1), (1, -1)]) if p not in seen]
            if not new:
                break
            look(new[0])
        return max(seen.values(), key=lambda r: key(r, self.goal)), max(seen.values(), key=by_ratio)

    def baseline(self, kind: str, choice: Choice, most_live: int = 0) -> Result:
        if kind == "serve":
            n = Profile.of(self.costs, self.spec, self.prompts, self.answers, 0.8).sequences
            target, share, up_s, down_s = choice
            scaler: Scaler = ServeCounts(target, round(n * share), BUDGET, up_s, down_s)
        elif kind == "thresholds":
            scaler = Thresholds(self.costs, self.spec, BUDGET, *choice)
        else:
            window_s, queues = choice
            scaler = ThroughputPlanner(self.costs, self.spec, BUDGET, window_s=window_s, queues=queues)
        return self.play(scaler, most_live=most_live)

    def tuned(self, kind: str) -> Choice:
        """The best of its settings, on this seed."""
        found = {choice: self.baseline(kind, choice, HOPELESS_LIVE) for choice in CHOICES[kind]}
        return max(found, key=lambda c: key(found[c], self.goal))

    def planned(self, looks: int, others: Sequence[Plan]) -> Result:
        """The best of several plans that know the trace, then of changes to it, one stretch of time after another."""
        found: list[tuple[tuple[float, float], Result, Plan]] = []

        def look(scaler: Scaler) -> None:
            result = self.play(scaler, most_live=HOPELESS_LIVE)
            found.append((key(result, self.goal), result, self.plan))

        for spare in (0.25, 1.0):
            look(Clairvoyant(self.trace, self.costs, self.spec, BUDGET, START_S, spare))
        for plan in others:
            look(Scheduled("planned", [(at - START_S, pair) for at, pair in plan]))
        stretches = 5
        for i in range(looks):
            _, best, plan = max(found, key=lambda f: f[0])
            low, high = (self.duration_s * (i % stretches + edge) / stretches for edge in (0, 1))
            less = -1 if best["attainment"] >= self.goal else 1
            larger = sum(p for _, (p, _) in plan) > sum(d for _, (_, d) in plan)
            change = (less, 0) if larger == (i // stretches % 2 == 0) else (0, less)
            changed = [
                (at, (max(1, p + change[0]), max(1, d + change[1])) if low <= at < high else (p, d))
                for at, (p, d) in plan
            ]
            look(Scheduled("planned", [step for step in changed if sum(step[1]) <= BUDGET]))
        result = max(found, key=lambda f: f[0])[1]
        return {**result, "scaler": "the best plan found"}

    def bound(self) -> float:
        return least_gpu_s(self.trace, self.costs, self.spec, self.goal) / 3600


CHOICES: dict[str, list[Choice]] = {
    # Ongoing prompts of a worker, share of its sequences, seconds before it grows and before it shrinks.
    "serve": [(1.0, 0.7, 30.0, 600.0), (1.0, 0.7, 10.0, 60.0), (2.0, 0.9, 10.0, 60.0)],
    # Window, whether it sees queues.
    "planner": [(180.0, False)],
    "planner, tuned": [(180.0, True), (60.0, True), (60.0, False)],
    # Seconds between two removals.
    "thresholds": [(30.0,), (120.0,)],
}


def compare(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """By kind, the results of all seeds."""
    chosen: dict[str, Choice] = {}
    found: dict[str, list[Result]] = {}
    bounds, goals = [], []

    def keep(kind: str, result: Result) -> None:
        found.setdefault(kind, []).append(result)
        print(case.name, kind, result, file=sys.stderr, flush=True)

    for seed in range(1, arguments.seeds + 1):
        game = Game(case, seed, arguments.share)
        for kind, result in _plays(game, chosen, arguments):
            keep(kind, result)
        bounds.append(game.bound())
        goals.append(game.goal)
    rows = {kind: mean(results) for kind, results in found.items()}
    goal, bound = statistics.fmean(goals), statistics.fmean(bounds)
    reach = [r["gpu_hours"] for r in rows.values() if round(r["attainment"], 3) >= round(goal, 3)]
    for row in rows.values():
        row["reaches_goal"] = round(row["attainment"], 3) >= round(goal, 3)
        row["regret"] = row["gpu_hours"] / min(reach) - 1 if reach and row["reaches_goal"] else None
        row["over_bound"] = row["gpu_hours"] / bound - 1
    return {"goal": goal, "bound_gpu_hours": bound, "scalers": rows}


def _plays(game: Game, chosen: dict[str, Choice], a: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    kinds = [kind for kind in a.kinds.split(",") if kind]

    def wanted(kind: str) -> bool:
        return not kinds or kind in kinds

    if wanted("fixed"):
        by_goal, ratio = game.fixed(a.looks)
        yield "fixed", by_goal
        yield "fixed, by the ratio", ratio
    yield "ours", game.ours(**{k: float(v) for k, v in (item.split("=") for item in a.set.split(",") if item)})
    mine = game.plan
    for kind, choices in CHOICES.items():
        if wanted(kind):
            if kind not in chosen:
                chosen[kind] = game.tuned(kind) if len(choices) > 1 and a.looks > 1 else choices[0]
            yield kind, game.baseline(kind, chosen[kind], HOPELESS_LIVE if kind != "planner" else 2 * HOPELESS_LIVE)
    if wanted("planned"):
        yield "planned", game.planned(max(1, a.looks - 3), [mine])


def mean(rows: Sequence[Result]) -> Result:
    """`converged_s` is absent where nothing changes for good."""
    names = [k for k, v in rows[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return {
        "scaler": ", ".join(dict.fromkeys(r["scaler"] for r in rows)),
        "converged_s": None,
        "given_up": any(r["given_up"] for r in rows),
    } | {k: statistics.fmean(r[k] for r in rows) for k in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--only", default="", help="names of traces, with commas")
    parser.add_argument("--name", default="", help="of the result's file, for a part of the traces")
    parser.add_argument("--kinds", default="", help="of scalers beside ours, separated by commas; empty = all")
    parser.add_argument("--set", default="", help="settings of ours: margin=1,hold_s=20")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--looks", type=int, default=9, help="fixed pools to look at; three fewer changes of the best plan"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of each trace's duration")
    a = parse(parser, only="sine,flip", seeds=1, looks=1, share=0.05)
    found: dict[str, Any] = {}
    lines = []
    for case in cases(a.traces):
        if a.only and case.name not in a.only.split(","):
            continue
        found[case.name] = compare(case, a)
        for kind, r in found[case.name]["scalers"].items():
            settled = "-" if r["converged_s"] is None else f"{r['converged_s']:.0f}"
            regret = "misses" if r["regret"] is None else f"{r['regret']:.1%}"
            lines.append(
                [
                    f"{case.name}: {kind}", r["scaler"], f"{r['attainment']:.1%}", f"{r['gpu_hours']:.3f}", regret,
                    f"{r['over_bound']:.0%}", f"{r['in_time_per_gpu_hour']:.0f}", f"{r['gpus']:.2f}",
                    f"{r['moves_per_hour']:.0f}", settled,
                ]
            )  # fmt: skip
        # After every case: a long run that is broken off has what it found.
        save(
            f"scaling{a.name and '-'}{a.name}",
            {"budget_gpus": BUDGET, "start_s": START_S, "metric": METRIC, "seeds": a.seeds, "cases": found},
        )
    header = [
        "case",
        "scaler",
        "in time",
        "GPU-hours",
        "regret",
        "over bound",
        "per GPU-hour",
        "GPUs",
        "moves/h",
        "conv s",
    ]
    table(header, lines)


if __name__ == "__main__":
    main()
