"""Goodput beside what the longest prompts get of it: the curve of `router.overload_protect`, and equal attainment.

    python -m benchmarks.fairness --traces FOLDER --cells mooncake-later,servegen-large --minutes 25

Baselines (two configurations each, tuned on seed 0) and ours, by `PROTECTS`, on other seeds. Of each: the rate at which
attainment falls through 90 %, and the attainment of the longest tenth of the prompts there. Then, for each baseline
and seed, ours at *equal attainment*: the highest rate at which 90 % of all are in time and of the longest tenth no
fewer than the baseline has at its own rate. Runs are kept as those of benchmarks/policies.py; the curve is also drawn
(OUT/fairness.svg). Fast simulator, rooflines: not measured on a GPU.

Traces that no part of the policy was tuned on, for FOLDER: conversation_trace.jsonl and synthetic_trace.jsonl
from github.com/kvcache-ai/Mooncake (FAST25-release/traces), of the former what is after half an hour;
language_m-large_1h.json, as the one of benchmarks/traces from ServeGen's data/language/m-large, its busiest hour.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.policies import GOAL, STEP, TRACES, WORKERS, Cell, Runs, Setup, crossing, interval
from benchmarks.report import parse, provenance, table
from simulator.traces import Trace, read, window

METRIC = "mean"
PROTECTS = (0.0, 0.5, 0.75, 0.25, 1.0)  # in the order of what is wanted most, if time runs out
UNSEEN = {  # file, requests of a window, from which second on
    "mooncake-later": ("conversation_trace.jsonl", 600, 1800.0),
    "mooncake-synthetic": ("synthetic_trace.jsonl", 600, 0.0),
    "servegen-large": ("language_m-large_1h.json", 1500, 0.0),
    **{name: (file, count, 0.0) for name, (file, count) in TRACES.items()},
}
GUESS = {"mooncake-later": 18.0, "mooncake-synthetic": 14.0, "servegen-large": 300.0, "mooncake": 14.0, "azure": 190.0}
BASELINES = {
    "aggregated, static chunks": [Setup("aggregated", 0, c, False) for c in (512, 256)],
    "aggregated, adaptive chunks": [Setup("aggregated", 0, c) for c in (2048, 1024)],
    "static threshold": [Setup("threshold:32768", 1), Setup("threshold:16384", 2)],
}
OURS = [Setup("diptych", p, ours=True) for p in (0, 1)]


class UnseenRuns(Runs):
    def trace(self, seed: int) -> Trace:
        if seed not in self._windows:
            file, count, from_s = UNSEEN[self.cell.trace]
            rng = random.Random(f"{seed}/trace")
            whole = read(self._folder / file, rng)
            whole = replace(whole, requests=[r for r in whole.requests if r.arrival_s >= from_s])
            self._windows[seed] = window(whole, count, rng)
        return self._windows[seed]

    def longest(self, setup: Setup, seed: int, rate_index: float) -> float:
        """Attainment of the longest tenth at a rate between two that were looked at."""
        low = int(rate_index // 1)
        a, b = (self.look(setup, seed, i)["longest_tenth"][METRIC] for i in (low, low + 1))
        return a + (b - a) * (rate_index - low)

    def fair(self, setup: Setup, seed: int, least: float) -> Callable[[int], float]:
        """As `attained`, and below the goal as soon as the longest tenth gets less than `least`."""

        def both(index: int) -> float:
            row = self.look(setup, seed, index)
            return GOAL + min(row["attainment"][METRIC] - GOAL, row["longest_tenth"][METRIC] - least)

        return both


def best_of(runs: Runs, setups: Sequence[Setup], start: int) -> tuple[Setup, int]:
    found = [(crossing(runs.attained(s, 0, METRIC), start), -i) for i, s in enumerate(setups)]
    at, place = max(found)
    return setups[-place], int(at) if at > float("-inf") else start


def run_cell(runs: UnseenRuns, seeds: Sequence[int], result: dict[str, Any]) -> None:
    guess = GUESS[runs.cell.trace]
    start = next(i for i in range(-200, 400) if STEP**i >= guess)
    theirs: dict[str, list[tuple[float, float]]] = {}
    for policy, setups in BASELINES.items():
        setup, at = best_of(runs, setups, start)
        theirs[policy] = []
        for seed in seeds:
            x = crossing(runs.attained(setup, seed, METRIC), at)
            theirs[policy].append((x, runs.longest(setup, seed, x)))
        result["baselines"][policy] = row_of(setup, theirs[policy])
    ours, at = best_of(runs, OURS, start)
    for protect in PROTECTS:
        setup = replace(ours, protect=protect)
        points: list[tuple[float, float]] = []
        for seed in seeds:
            x = crossing(runs.attained(setup, seed, METRIC), at)
            points.append((x, runs.longest(setup, seed, x)))
        row = row_of(setup, points)
        row["over"], row["fair"] = {}, {}
        for policy, reached in theirs.items():
            pairs = list(zip(seeds, points, reached, strict=True))
            row["over"][policy] = ratio([STEP ** (x - other) for _, (x, _), (other, _) in pairs])
            row["fair"][policy] = ratio(
                [
                    STEP ** (crossing(runs.fair(setup, seed, least), int(other)) - other)
                    for seed, _, (other, least) in pairs
                ]
            )
        result["ours"][f"{protect:g}"] = row


def row_of(setup: Setup, points: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "setup": setup.name,
        "rates": [STEP**x for x, _ in points],
        "rate": statistics.fmean(STEP**x for x, _ in points),
        "longest_tenth": statistics.fmean(longest for _, longest in points),
    }


def ratio(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "ci": interval(values), "by_seed": values}


def report(cells: list[dict[str, Any]]) -> None:
    lines: list[list[Any]] = []
    for cell in cells:
        best = max(cell["baselines"], key=lambda b: cell["baselines"][b]["rate"], default="")
        for policy, row in cell["baselines"].items():
            name = f"{policy}{' (best)' if policy == best else ''}: {row['setup']}"
            lines.append([cell["name"], name, f"{row['rate']:.1f}", f"{row['longest_tenth']:.0%}", "", "", ""])
        for protect, row in sorted(cell["ours"].items(), key=lambda item: float(item[0])):
            over, fair = row["over"][best], row["fair"][best]
            others = ", ".join(f"{x['mean']:.2f}" for policy, x in row["fair"].items() if policy != best)
            name = f"ours, protect {protect}: {row['setup']}"
            shares = [f"{row['rate']:.1f}", f"{row['longest_tenth']:.0%}", f"{over['mean']:.2f}"]
            lines.append([cell["name"], name, *shares, f"{fair['mean']:.2f} +- {fair['ci']:.2f}", others])
    table(["cell", "policy", "requests/s", "longest tenth", "over best", "at equal attainment", "of the others"], lines)


def picture(cells: list[dict[str, Any]]) -> str:
    """Goodput over the longest tenth's attainment: ours as a line by protect, baselines as rings with their initial."""
    width, height, left, right, above, below = 340, 260, 52, 12, 34, 58
    parts: list[str] = []
    for n, cell in enumerate(cells):
        rows = [*cell["ours"].values(), *cell["baselines"].values()]
        if not rows:
            continue
        shares, rates = [r["longest_tenth"] for r in rows], [r["rate"] for r in rows]
        first, last = min(shares) - 0.05, max(shares) + 0.05
        least, most = min(rates) * 0.93, max(rates) * 1.05

        def x_of(share: float, x0: int = n * width, first: float = first, last: float = last) -> float:
            return x0 + left + (share - first) / (last - first) * (width - left - right)

        def y_of(rate: float, least: float = least, most: float = most) -> float:
            return height - below - (rate - least) / (most - least) * (height - above - below)

        parts.append(f'<text x="{x_of(first):.0f}" y="18" font-weight="600">{cell["name"]}, requests/s</text>')
        for part in (0.0, 0.5, 1.0):
            x, y = x_of(first + part * (last - first)), y_of(least + part * (most - least))
            parts.append(f'<path d="M{x:.0f} {y_of(least):.0f}V{above}M{x_of(first):.0f} {y:.0f}H{x_of(last):.0f}"/>')
            share, rate = f"{first + part * (last - first):.0%}", f"{least + part * (most - least):.0f}"
            parts.append(f'<text x="{x:.0f}" y="{y_of(least) + 15:.0f}" text-anchor="middle">{share}</text>')
            parts.append(f'<text x="{x_of(first) - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{rate}</text>')
        ours = sorted(cell["ours"].items(), key=lambda item: float(item[0]))
        line = " ".join(f"{x_of(row['longest_tenth']):.1f},{y_of(row['rate']):.1f}" for _, row in ours)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="2"/>')
        for protect, row in ours:
            x, y = x_of(row["longest_tenth"]), y_of(row["rate"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2563eb"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="#2563eb">{protect}</text>')
        for initial, row in zip("abc", cell["baselines"].values(), strict=False):
            x, y = x_of(row["longest_tenth"]), y_of(row["rate"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="none" stroke="#b45309" stroke-width="2"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="#b45309">{initial}</text>')
        parts.append(f'<text x="{x_of(first):.0f}" y="{height - 28}">of the longest tenth in time</text>')
    names = ", ".join(f"{initial}: {name}" for initial, name in zip("abc", BASELINES, strict=True))
    parts.append(f'<text x="{left}" y="{height - 8}">blue: ours, by protect. {names}</text>')
    size = f'width="{width * max(2, len(cells))}" height="{height}"'
    style = 'font-family="sans-serif" font-size="10" fill="#374151"'
    body = "".join(parts).replace("<path d", '<path stroke="#e5e7eb" d')
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{white}{body}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--cells", default="mooncake,azure", help=f"with commas: {', '.join(UNSEEN)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=61)
    parser.add_argument("--out", type=Path, default=Path("build/fairness"))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long; a later run goes on")
    arguments = parse(parser, cells="azure", seeds=1, minutes=0.05)
    if arguments.smoke:
        arguments.out = Path(tempfile.mkdtemp(prefix="fairness-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = arguments.cells.split(",")
    if unknown := [name for name in names if name not in UNSEEN]:
        parser.error(f"no cell {', '.join(unknown)}; there are {', '.join(UNSEEN)}")
    until = time.monotonic() + arguments.minutes * 60
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    cells: list[dict[str, Any]] = []
    for name in names:
        cell = Cell("8b", name, "loose", 50.0, 25.0)
        result: dict[str, Any] = {"name": name, "workers": WORKERS, "baselines": {}, "ours": {}}
        cells.append(result)
        try:
            run_cell(UnseenRuns(cell, arguments.traces, arguments.out, until), seeds, result)
        except TimeoutError:
            print(f"{name}: out of time, goes on next time")
    report(cells)
    (arguments.out / "fairness.svg").write_text(picture(cells))
    found = {"benchmark": "fairness", **provenance(), "seeds": list(seeds), "cells": cells}
    (arguments.out / "fairness.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
