"""Many seeds: `make soak SEEDS=10000 SEED_BASE=0`. One, with its story: `python -m tests.scenarios.soak --trace 17`."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections import Counter

from settings.processors import usable
from tests.scenarios.scenario import Outcome, ScenarioFailed, run


def _one(seed: int) -> Outcome | str:
    try:
        return run(seed)
    except ScenarioFailed as error:
        return str(error)


def soak(base: int, count: int, jobs: int) -> int:
    """Returns the number of seeds that failed."""
    began, done, failed = time.monotonic(), 0, 0
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    switches: Counter[str] = Counter()
    recoveries = split = beside = virtual = 0.0
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for result in pool.imap_unordered(_one, range(base, base + count), chunksize=8):
            done += 1
            if isinstance(result, str):
                failed += 1
                print(f"\n{result}\n", flush=True)
            else:
                outcomes += result.outcomes
                faults.update(f.split()[1] for f in result.faults)
                recoveries += result.recoveries
                split += result.split
                beside += result.beside
                moves += result.moves
                switches += result.switches
                virtual += result.virtual_s
            if done % 250 == 0 or done == count:
                rate = done / (time.monotonic() - began)
                print(f"{done}/{count} seeds, {failed} failed, {rate:.0f} seeds/s", flush=True)
    print(f"requests: {sum(outcomes.values())} ({', '.join(f'{k} {n}' for k, n in outcomes.most_common())})")
    print(f"split {split:.0f}, recoveries {recoveries:.0f}, virtual time {virtual / 3600:.1f} h")
    print(f"further answers to a prompt that began beside the first: {beside:.0f}")
    print(f"moves: {', '.join(f'{k} {n}' for k, n in moves.most_common(20))}")
    print(f"switches: {', '.join(f'{k} {n}' for k, n in switches.most_common())}")
    print(f"faults: {', '.join(f'{k} {n}' for k, n in faults.most_common())}")
    return failed


def main() -> None:
    logging.disable(logging.CRITICAL)  # of crashes, which are what it is for
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--seed-base", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=usable())
    parser.add_argument("--trace", type=int, help="one seed, with everything that happens")
    arguments = parser.parse_args()
    if arguments.trace is not None:
        try:
            print(run(arguments.trace, trace=print))
        except ScenarioFailed as error:
            sys.exit(str(error))
        return
    sys.exit(1 if soak(arguments.seed_base, arguments.seeds, arguments.jobs) else 0)


if __name__ == "__main__":
    main()
