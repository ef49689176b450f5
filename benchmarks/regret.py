"""Regret against hindsight: how many more requests could have met both targets, had each been placed otherwise.

    python -m benchmarks.regret --cells 8b-mooncake-loose-25,8b-azure-loose-25 --seeds 3 --looks 120

For a cell of benchmarks.policies and a seed: a window of the trace is played at about the rate where decide() attains
90 %. Then a seeded local search over the choices, request by request (split or local, which workers): most tries change
requests that missed a target or began just before one that did; the whole window is played again with the choices
pinned, and a change is kept if more requests meet both targets, or as many with less time above them.

    regret = (best found - ours) / best found

The search knows the future, and finds only part of what there is: true regret is at least this, and a policy that does
not know the future cannot reach zero. Queues inside workers keep their order; nobody is refused or put off.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.policies import GUESS, TRACES, Cell, Setup, cells, spec_of
from benchmarks.report import parse, save, table
from router.placement.policy import PolicyParams, PoolsView, Rejection, RequestFacts, Route
from simulator.fast import FastCluster
from simulator.outcome import Outcome
from simulator.policies import Adaptive, Policy, as_told
from simulator.traces import Trace, at_rate, read, window

WANTED = ("8b-mooncake-loose-25", "8b-mooncake-tight-3", "8b-azure-loose-25", "70b-mooncake-loose-25")
GOAL = 0.9
METRIC = "mean"
REQUESTS = {"mooncake": 150, "azure": 1500}  # long enough for a queue at the rate where 90 % are in time
PREFILL = 2
TARGETED = 0.8  # of the tries look near a miss
NEAR = 6  # requests before it, on the same workers or not


@dataclass(frozen=True)
class Choice:
    """Workers by index, over decode then prefill; `prefill` -1: computed on the decode worker."""

    decode: int
    prefill: int


class Pinned:
    """Places the n-th request as chosen. Estimates and promises are those of decide()."""

    name = "pinned"

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = iter(choices)

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        choice = next(self._choices)
        prefill = view.prefill[choice.prefill - len(view.decode)] if choice.prefill >= 0 else None
        return as_told(facts, view, view.decode[choice.decode], prefill, params, now, rng)


class Game:
    """One cell, one window."""

    def __init__(self, cell: Cell, trace: Trace, seed: int) -> None:
        self.cell, self.trace, self.seed = cell, trace, seed
        self.spec = spec_of(cell, Setup("diptych", PREFILL, ours=True))
        self.costs = self.spec.costs()
        self.looks = 0

    def play(self, policy: Policy, trace: Trace) -> list[Outcome]:
        self.looks += 1
        return FastCluster(self.spec, self.costs, policy, self.seed).run(trace)

    def met(self, outcomes: Sequence[Outcome]) -> int:
        return sum(o.met(self.cell.itl_ms, METRIC) for o in outcomes)

    def score(self, outcomes: Sequence[Outcome]) -> tuple[int, float]:
        """More requests in time, then less time above the targets, bounded for each."""
        above = 0.0
        for o in outcomes:
            ttft = max(0.0, o.ttft_s / o.ttft_target_s - 1.0) if o.first_token_s >= 0 else 3.0
            above += min(3.0, ttft) + min(3.0, max(0.0, o.tpot_ms / self.cell.itl_ms - 1.0))
        return self.met(outcomes), -above

    def at_goal(self, guess: float) -> tuple[Trace, list[Outcome]]:
        """The window at the rate where attainment is nearest to the goal, of six rates looked at."""
        low, high, rate = 0.0, 0.0, guess
        best: tuple[float, Trace, list[Outcome]] | None = None
        for _ in range(6):
            played = at_rate(self.trace, rate)
            outcomes = self.play(Adaptive(), played)
            share = self.met(outcomes) / len(outcomes)
            if best is None or abs(share - GOAL) < best[0]:
                best = abs(share - GOAL), played, outcomes
            if share >= GOAL:
                low = rate
            else:
                high = rate
            rate = (low * high) ** 0.5 if low and high else rate * (1.4 if low else 1 / 1.4)
        assert best is not None
        return best[1], best[2]


def search(game: Game, played: Trace, ours: Sequence[Outcome], looks: int, rng: random.Random) -> dict[str, Any]:
    decodes, prefills = game.spec.decode.workers, game.spec.prefill.workers
    choices = [Choice(o.decode, o.prefill) for o in ours]
    outcomes = game.play(Pinned(choices), played)  # by the same route each; what was learned of it may differ a little
    replayed = game.met(outcomes)
    best = game.score(outcomes)
    kept = 0
    for _ in range(looks):
        misses = [o.number for o in outcomes if not o.met(game.cell.itl_ms, METRIC)]
        tried = list(choices)
        for _ in range(rng.choice((1, 1, 2, 4))):
            near = misses and rng.random() < TARGETED
            number = max(0, rng.choice(misses) - rng.randrange(NEAR)) if near else rng.randrange(len(choices))
            old = tried[number]
            what = rng.randrange(3)
            if what == 0:
                new = Choice(old.decode, decodes + rng.randrange(prefills) if old.prefill < 0 else -1)
            elif what == 1 or old.prefill < 0:
                new = replace(old, decode=rng.randrange(decodes))
            else:
                new = replace(old, prefill=decodes + rng.randrange(prefills))
            tried[number] = new
        found = game.play(Pinned(tried), played)
        score = game.score(found)
        if score >= best:
            kept += score > best
            best, choices, outcomes = score, tried, found
    changed = sum(a != Choice(o.decode, o.prefill) for a, o in zip(choices, ours, strict=True))
    return {"replayed": replayed, "best": max(best[0], game.met(ours)), "kept": kept, "changed": changed}


def regret(cell: Cell, folder: Path, requests: int, seed: int, looks: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}/trace")
    trace = window(read(folder / TRACES[cell.trace][0], rng), requests, rng)
    game = Game(cell, trace, seed)
    began = time.process_time()
    played, ours = game.at_goal(GUESS[f"{cell.model}-{cell.trace}"])
    found = search(game, played, ours, looks, random.Random(f"{seed}/search"))
    met = game.met(ours)
    row = {
        "cell": cell.name,
        "seed": seed,
        "requests": len(ours),
        "requests_per_s": played.requests_per_s,
        "ours": met,
        **found,
        "regret": (found["best"] - met) / found["best"],
        "cpu_s": time.process_time() - began,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--cells", default=",".join(WANTED), help="names, with commas")
    parser.add_argument("--requests", type=int, help=f"of a window; by trace: {REQUESTS}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--looks", type=int, default=120, help="windows played by each search")
    a = parse(parser, cells=WANTED[0], requests=20, seeds=1, looks=2)
    names = a.cells.split(",")
    rows = [
        regret(cell, a.traces, a.requests or REQUESTS[cell.trace], seed, a.looks)
        for cell in cells()
        if cell.name in names
        for seed in range(1, a.seeds + 1)
    ]
    lines = []
    for name in dict.fromkeys(r["cell"] for r in rows):
        of = [r for r in rows if r["cell"] == name]
        shares = [f"{statistics.fmean(r[k] / r['requests'] for r in of):.1%}" for k in ("ours", "best")]
        spread = " ".join(f"{r['regret']:.1%}" for r in of)
        lines.append([name, *shares, f"{statistics.fmean(r['regret'] for r in of):.1%}", spread])
    table(["cell", "ours in time", "best found", "regret", "by seed"], lines)
    save("regret", {"looks": a.looks, "prefill_workers": PREFILL, "metric": METRIC, "rows": rows})


if __name__ == "__main__":
    main()
