"""Goodput of routing policies on public traces: every policy tuned with the same budget, the same seeds and targets.

    python -m benchmarks.policies --traces benchmarks/traces --cells all --out build/policies

A cell is a model, a trace, an inter-token target and a link. For every policy in it, `TRIES` configurations (pool
ratios, thresholds, chunk sizes) are tried on one seed; ours and the baselines within 30 % of the best one are then
measured on `--seeds` other seeds (`*`: not measured, tuning's figure). In brackets: of the longest tenth. Goodput
is the rate at which attainment falls through 90 %, for both readings of inter-token latency, from one set of runs.
Every run is appended to OUT/runs-CELL.jsonl: one that was stopped goes on where it was. `--report` only adds up.

The simulator is the fast one (docs/simulator.md); cost models are rooflines, not measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import parse, provenance, table
from simulator.fast import FastCluster
from simulator.outcome import METRICS, Outcome, attainment, counted
from simulator.policies import by_name
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, at_rate, read, window

WORKERS = 8
TRIES = 4
GOAL = 0.9
CLOSE = 0.7  # baselines that reach so much of the best one's rate in tuning are measured on all seeds
STEP = 1.05  # rates are powers of it, so that runs are shared between tuning, metrics and policies alike
T_95 = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
    10: 2.26,
    12: 2.20,
}  # Student, two-sided 95 %, by count


@dataclass(frozen=True)
class Cell:
    model: str
    trace: str
    itl: str
    itl_ms: float
    link_gbytes_per_s: float

    @property
    def name(self) -> str:
        return f"{self.model}-{self.trace}-{self.itl}-{self.link_gbytes_per_s:g}"


MODELS = {"8b": ("h200-8b", {"loose": 50.0, "tight": 12.0}), "70b": ("h200x4-70b", {"loose": 100.0, "tight": 22.0})}
TRACES = {
    "mooncake": ("mooncake_conversation_0-30min.jsonl", 600),
    "azure": ("azure2023_conv_0-30min.csv", 1500),
}
GUESS = {"8b-mooncake": 9.0, "8b-azure": 160.0, "70b-mooncake": 5.0, "70b-azure": 60.0}  # requests/s of 8 workers
LINKS = (25.0, 3.0)


def cells() -> list[Cell]:
    return [
        Cell(model, trace, itl, itl_ms, link)
        for trace in TRACES
        for model, (_, targets) in MODELS.items()
        for itl, itl_ms in targets.items()
        for link in LINKS
    ]


@dataclass(frozen=True)
class Setup:
    """One configuration of one policy."""

    policy: str
    prefill: int
    chunk: int = 2048
    adaptive: bool = True
    ours: bool = False  # prompts by due date, some put back under overload
    protect: float = 0.5  # `router.overload_protect`, of ours

    @property
    def name(self) -> str:
        return (
            f"{self.policy} {self.prefill}P{WORKERS - self.prefill}D chunk {self.chunk}"
            f"{' adaptive' if self.adaptive else ''}{' due dates' if self.ours else ''}"
            f"{f' protect {self.protect:g}' if self.ours and self.protect else ''}"
        )


def candidates() -> dict[str, list[Setup]]:
    """`TRIES` configurations each. All but ours queue prompts in the order of arrival, as engines do."""
    return {
        "aggregated, static chunks": [Setup("aggregated", 0, c, False) for c in (512, 256, 1024, 128)],
        "aggregated, adaptive chunks": [Setup("aggregated", 0, c) for c in (2048, 8192, 1024, 512)],
        "always split": [Setup("always-split", p) for p in (6, 5, 4, 7)],
        "dynamo's rule": [Setup("dynamo", p) for p in (5, 4, 6, 3)],
        "static threshold": [Setup(f"threshold:{t}", p) for t, p in ((8192, 3), (16384, 2), (4096, 4), (32768, 1))],
        "ours": [Setup("diptych", p, ours=True) for p in (0, 1, 2, 3)],
    }


BASELINES = [name for name in candidates() if name != "ours"]


class Runs:
    """Runs of one cell, kept in a file."""

    def __init__(self, cell: Cell, traces: Path, out: Path, until: float) -> None:
        self.cell = cell
        self._path = out / f"runs-{cell.name}.jsonl"
        self._until = until
        self._folder = traces
        self._windows: dict[int, Trace] = {}
        self.known: dict[tuple[str, int, int], dict[str, Any]] = {}
        for path in [self._path, out / f"runs-{cell.model}-{cell.trace}-{cell.itl}-local.jsonl"]:
            if path.exists():
                for line in path.read_text().splitlines():
                    row = json.loads(line)
                    self.known[row["setup"], row["seed"], row["rate_index"]] = row
        self._local = out / f"runs-{cell.model}-{cell.trace}-{cell.itl}-local.jsonl"

    def trace(self, seed: int) -> Trace:
        if seed not in self._windows:
            file, count = TRACES[self.cell.trace]
            rng = random.Random(f"{seed}/trace")
            self._windows[seed] = window(read(self._folder / file, rng), count, rng)
        return self._windows[seed]

    def look(self, setup: Setup, seed: int, rate_index: int) -> dict[str, Any]:
        key = (setup.name, seed, rate_index)
        row = self.known.get(key)
        if row is None:
            if time.monotonic() > self._until:
                raise TimeoutError
            row = self.known[key] = self._run(setup, seed, rate_index)
            # What never crosses a link is the same on every link.
            with (self._local if setup.prefill == 0 else self._path).open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def _run(self, setup: Setup, seed: int, rate_index: int) -> dict[str, Any]:
        cell = self.cell
        spec = spec_of(cell, setup)
        cluster = FastCluster(spec, spec.costs(), by_name(setup.policy), seed)
        outcomes = cluster.run(at_rate(self.trace(seed), STEP**rate_index))
        return {
            "setup": setup.name,
            "seed": seed,
            "rate_index": rate_index,
            "attainment": {m: attainment(outcomes, cell.itl_ms, m) for m in METRICS},
            "longest_tenth": {m: longest_tenth(outcomes, cell.itl_ms, m) for m in METRICS},
            "split_share": sum(o.split for o in outcomes) / len(outcomes),
            "cached_share": sum(o.cached_tokens for o in outcomes) / sum(o.prompt_tokens for o in outcomes),
        }

    def attained(self, setup: Setup, seed: int, metric: str) -> Callable[[int], float]:
        return lambda index: self.look(setup, seed, index)["attainment"][metric]


def longest_tenth(outcomes: Sequence[Outcome], itl_ms: float, metric: str) -> float:
    """Attainment of the tenth with the longest prompts: 90 % of all can be had by giving those up."""
    part = sorted(counted(outcomes), key=lambda o: o.prompt_tokens)
    part = part[-max(1, len(part) // 10) :]
    return sum(o.met(itl_ms, metric) for o in part) / len(part)


def spec_of(cell: Cell, setup: Setup) -> ClusterSpec:
    return ClusterSpec(
        cost_model=MODELS[cell.model][0],
        prefill=PoolSpec(workers=setup.prefill),
        decode=PoolSpec(
            workers=WORKERS - setup.prefill,
            max_batch_tokens=setup.chunk,
            adaptive_chunks=setup.adaptive,
        ),
        nic_gbytes_per_s=cell.link_gbytes_per_s,
        itl_target_ms=cell.itl_ms,
        overload="put_back" if setup.ours else "arrival",
        overload_protect=setup.protect,
    )


def crossing(attained: Callable[[int], float], start: int) -> float:
    """Rate index (with a fraction) at which attainment falls through the goal; -inf: hopeless within a factor of 20."""
    low, step = start, 2
    while attained(low) < GOAL:
        low -= step
        step *= 2
        if start - low > 60:
            return float("-inf")
    high, step = low + 2, 2
    while attained(high) >= GOAL:
        low, step = high, step * 2
        high = low + step
        if high - start > 60:
            return float(low)
    while high - low > 1:
        middle = (low + high) // 2
        if attained(middle) >= GOAL:
            low = middle
        else:
            high = middle
    a, b = attained(low), attained(high)
    return low + (a - GOAL) / (a - b) if a > b else float(low)


def tune(runs: Runs, setups: list[Setup], metric: str, start: int) -> tuple[Setup, float]:
    """The best configuration on seed 0, which is not reported, and the rate index that it reaches there."""
    best, best_at = setups[0], crossing(runs.attained(setups[0], 0, metric), start)
    for setup in setups[1:TRIES]:
        attained = runs.attained(setup, 0, metric)
        base = start if best_at == float("-inf") else int(best_at)
        if best_at > float("-inf") and attained(base + 1) < GOAL:
            continue  # it does not reach what another one reaches
        at = crossing(attained, base)
        if at > best_at:
            best, best_at = setup, at
    return best, best_at


def measure(runs: Runs, policy: str, best: Setup, tuned_at: float, metric: str, seeds: Sequence[int]) -> dict[str, Any]:
    """On seeds that it was not tuned on; without seeds, what it reached in tuning."""
    base = int(tuned_at) if tuned_at > float("-inf") else 0
    at = {seed: crossing(runs.attained(best, seed, metric), base) for seed in seeds} if seeds else {0: tuned_at}
    rates = [STEP**x if x > float("-inf") else 0.0 for x in at.values()]
    found = [runs.look(best, seed, int(x)) for seed, x in at.items() if x > float("-inf")]
    split = statistics.fmean(r["split_share"] for r in found) if found else 0.0
    longest = statistics.fmean(r["longest_tenth"][metric] for r in found) if found else 0.0
    return {
        "policy": policy,
        "setup": best.name,
        "seeds": len(seeds),
        "rates": rates,
        "split_share": split,
        "longest_tenth": longest,
    }


def interval(values: list[float]) -> float:
    """Half width of the 95 % confidence interval of the mean."""
    n = len(values)
    return T_95.get(n, 2.1) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against the best baseline, pairwise by seed."""
    by_policy = {r["policy"]: r for r in rows}
    measured = [by_policy[b] for b in BASELINES if by_policy[b]["seeds"]]
    ours, best = by_policy["ours"], max(measured, key=lambda r: statistics.fmean(r["rates"]))
    ratios = [a / b if b else float("inf") for a, b in zip(ours["rates"], best["rates"], strict=True)]
    mean, half = (statistics.fmean(ratios), interval(ratios)) if all(map(float_is_finite, ratios)) else (0.0, 0.0)
    return {"best_baseline": best["policy"], "ratio": mean, "ratio_ci": half, "at_or_above": mean + half >= 1.0}


def float_is_finite(value: float) -> bool:
    return abs(value) != float("inf")


def run_cell(cell: Cell, traces: Path, out: Path, seeds: Sequence[int], until: float) -> None:
    runs = Runs(cell, traces, out, until)
    guess = GUESS[f"{cell.model}-{cell.trace}"] * (0.8 if cell.itl == "tight" else 1.0)
    start = next(i for i in range(-200, 400) if STEP**i >= guess)
    results: dict[str, Any] = {"cell": asdict(cell), "metrics": {}}
    for metric in METRICS:
        tuned = {p: tune(runs, setups, metric, start) for p, setups in candidates().items()}
        # Baselines far below the best one are not worth five seeds: what they reached in tuning is reported.
        least = max(tuned[b][1] for b in BASELINES) + math.log(CLOSE, STEP)
        rows = []
        for policy, (setup, at) in tuned.items():
            wanted = seeds if policy == "ours" or at >= least else ()
            rows.append(measure(runs, policy, setup, at, metric, wanted))
        results["metrics"][metric] = {"rows": rows, **compare(rows)}
    (out / f"cell-{cell.name}.json").write_text(json.dumps(results, indent=1))


def report(out: Path) -> dict[str, Any]:
    found = [json.loads(p.read_text()) for p in sorted(out.glob("cell-*.json"))]
    header = ["cell", "metric", *candidates(), "ours / best", "best baseline"]
    lines = []
    for result in found:
        cell = Cell(**result["cell"])
        for metric, m in result["metrics"].items():
            rates = [f"{statistics.fmean(r['rates']):.2f}" for r in m["rows"]]
            rates = [
                f"{x}{'' if r['seeds'] else '*'} ({r['longest_tenth']:.0%})"
                for x, r in zip(rates, m["rows"], strict=True)
            ]
            ratio = f"{m['ratio']:.3f} +- {m['ratio_ci']:.3f}"
            lines.append([cell.name, metric, *rates, ratio, m["best_baseline"]])
    table(header, lines)
    return {"cells": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--cells", default="all", help="all, or part of a cell's name; several with commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=11, help="1 to 5 were looked at while the policy was made")
    parser.add_argument("--out", type=Path, default=Path("build/policies"))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long; a later run goes on")
    parser.add_argument("--report", action="store_true", help="only add up what is there")
    arguments = parse(parser, cells="8b-azure-loose-25", seeds=0, minutes=0.05)
    if arguments.smoke:  # stops in the middle, and does not go on with what is there
        arguments.out = Path(tempfile.mkdtemp(prefix="policies-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + arguments.minutes * 60
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if not arguments.report:
        wanted = arguments.cells.split(",")
        for cell in cells():
            if arguments.cells != "all" and not any(w in cell.name for w in wanted):
                continue
            if (arguments.out / f"cell-{cell.name}.json").exists():
                continue
            began = time.monotonic()
            try:
                run_cell(cell, arguments.traces, arguments.out, seeds, until)
            except TimeoutError:
                print(f"{cell.name}: out of time, goes on next time")
                break
            print(f"{cell.name}: {time.monotonic() - began:.0f} s", flush=True)
    result = {"benchmark": "policies", **provenance(), "seeds": list(seeds), **report(arguments.out)}
    (arguments.out / "policies.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
