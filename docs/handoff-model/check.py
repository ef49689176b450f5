"""Checks the handoff model with spin: the protocol must hold, and without any one of its rules it must not.

    python docs/handoff-model/check.py                  the table; exit 0 when every line is as expected
    python docs/handoff-model/check.py --deep           also the larger state spaces (minutes, a few GB)
    python docs/handoff-model/check.py --trace NO_FENCE the counterexample, step by step

Needs `spin` and a C compiler. Exit 1: a line is not as expected. Exit 2: a tool is missing or broken.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).resolve().with_name("handoff.pml")
MEMORY_MB = 3500
TIMEOUT_S = 1200


# What a violated assertion of the model means: by a fragment of it; the first that occurs counts.
HOLDS = "no objection"
FOREIGN_KV = "KV that is not the request's own was used"
LANDS = "a local block was given out while bytes could land in it"
GIVEN_BACK_TWICE = "a block was given back more often than taken"
CUT_SHORT = "a lease ended under a prompt that is being computed"
LEASE_STAYS = "a lease never ends"
REQUEST_STAYS = "a request never ends"
ENDLESS = "a run never ends"
MEANINGS = [
    ("d_content", FOREIGN_KV),
    ("x_local[((k", LANDS),
    ("d_table[((k", "a local block was given out twice"),
    ("s_table[((k", "a source block was given out while in use"),
    ("announced[k]", "a leased source block was given out"),
    ("s_references[leased", GIVEN_BACK_TWICE),
    ("s_references[s_table", GIVEN_BACK_TWICE),
    ("d_references[d_table", GIVEN_BACK_TWICE),
    ("d_references[x_local", GIVEN_BACK_TWICE),
    ("request[i]", REQUEST_STAYS),
    ("lease[i]", LEASE_STAYS),
    ("lease[", CUT_SHORT),
    ("prompt[i]", "a prompt never ends"),
    ("x_count[((i", "a pull is never final"),
    ("waiting_follow", "a follow waits for ever"),
    ("references[k]", "a block is never free again"),
    ("non-progress cycle", ENDLESS),
]


@dataclass(frozen=True)
class Run:
    name: str
    switches: tuple[str, ...]
    finding: str = HOLDS  # expected
    cycles: bool = False  # look for endless runs as well
    deep: bool = False


@dataclass(frozen=True)
class Outcome:
    finding: str
    states: int
    depth: int
    memory_mb: float
    seconds: float


def _protocol(name: str, *switches: str, cycles: bool = False, deep: bool = False) -> Run:
    return Run(name, switches, cycles=cycles, deep=deep)


def _without(switch: str, finding: str, *budget: str, cycles: bool = False) -> Run:
    return Run(switch, (switch, *budget), finding, cycles)


RUNS = [
    _protocol("any one fault", "FAULTS=1"),
    _protocol("a cancel, a renewal", "CANCELS=1", "RENEWALS=1"),
    _protocol("larger pools", "NS=3", "ND=3"),
    _protocol("the source writes", "WRITE_MODE", "SOURCE_RETURNS", "FAULTS=1"),
    _protocol("every run ends", "CANCELS=1", cycles=True),
    _protocol("a fault and a cancel", "FAULTS=1", "CANCELS=1", deep=True),
    _protocol("two cancels, larger pools", "CANCELS=2", "NS=3", "ND=3", deep=True),
    _protocol("every run with a fault ends", "FAULTS=1", cycles=True, deep=True),
    # Rules of the protocol.
    _without("NO_FENCE", FOREIGN_KV),
    _without("FENCE_FIRST", FOREIGN_KV),
    _without("FREE_ON_EXPIRY_WITHOUT_GENERATION", FOREIGN_KV),
    _without("GENERATION_AFTER_WRITE", FOREIGN_KV),
    _without("EAGER_ADOPT", FOREIGN_KV),
    _without("NO_QUARANTINE", LANDS, "CANCELS=1"),
    _without("REUSE_EPOCH", FOREIGN_KV, "FAULTS=1"),
    _without("RELEASE_TWICE", GIVEN_BACK_TWICE),
    _without("RELEASE_ENDS_OPEN", CUT_SHORT),
    _without("EXPIRE_OPEN", CUT_SHORT),
    _without("NO_EXPIRY", LEASE_STAYS),
    _without("FORGET_EARLY_FOLLOW", REQUEST_STAYS),
    _without("FORGET_ENDED", REQUEST_STAYS),
    _without("FORGET_CANCEL_BETWEEN_LEGS", REQUEST_STAYS, "CANCELS=1"),
    _without("SILENT_LOSS", REQUEST_STAYS, "FAULTS=1"),
    _without("ENDLESS_RENEWAL", ENDLESS, "RENEWALS=1", cycles=True),
    # What the protocol takes for granted.
    _without("SHARED_HANDOFF_ID", FOREIGN_KV),
    _without("SOURCE_GONE_FOR_GOOD", REQUEST_STAYS, "WRITE_MODE", "FAULTS=1"),
]


class ToolError(Exception):
    """A tool is missing or did not do its work; the message says what to do."""


def compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return name
    raise ToolError(
        "no C compiler (cc, gcc, clang) is on the PATH; install one: apt-get install gcc, or brew install gcc"
    )


def spin() -> str:
    if shutil.which("spin"):
        return "spin"
    raise ToolError("spin is not on the PATH; install it: apt-get install spin, or brew install spin")


def _call(command: list[str], where: Path) -> str:
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ToolError(f"{command[0]} took longer than {TIMEOUT_S} s") from None
    output = done.stdout + done.stderr
    if done.returncode and Path(command[0]).name != "pan":  # pan's status says less than its report
        raise ToolError(f"{' '.join(command)} failed:\n{output.strip()}")
    return output


def verify(run: Run, where: Path) -> Outcome:
    defines = [f"-D{switch}" for switch in run.switches]
    _call([spin(), "-a", *defines, str(MODEL)], where)
    kind = "-DNP" if run.cycles else "-DSAFETY"
    # Everything shares memory here, so partial order reduction finds nothing and costs time.
    optimize = "-O1" if run.finding == HOLDS else "-O0"  # a counterexample is found sooner than -O1 compiles
    options = ["-w", optimize, "-DNOREDUCE", f"-DMEMLIM={MEMORY_MB}", kind, *(["-DCOLLAPSE"] if run.deep else [])]
    _call([compiler(), *options, "-o", "pan", "pan.c"], where)
    started = time.monotonic()
    report = _call([str(where / "pan"), "-m100000", "-w24", *(["-l"] if run.cycles else [])], where)
    seconds = time.monotonic() - started
    found = [
        re.search(pattern, report)
        for pattern in (
            r"errors: (\d+)",
            r"(\d+) states, stored",
            r"depth reached (\d+)",
            r"([\d.]+)\s+total actual memory usage",
        )
    ]
    errors, states, depth, memory = (m.group(1) if m else "" for m in found)
    if not (errors and states and depth and memory):
        raise ToolError(f"pan ended without a report:\n{report.strip()}")
    wrong = re.search(r"pan:\d+: (.*)", report)
    finding = HOLDS if wrong is None and errors == "0" else _meaning(wrong.group(1) if wrong else report)
    if finding == HOLDS and "Search not completed" in report:
        raise ToolError(f"the search for {run.name!r} was cut off:\n{report.strip()}")
    return Outcome(finding, int(states), int(depth), float(memory), seconds)


def _meaning(violated: str) -> str:
    return next((meaning for part, meaning in MEANINGS if part in violated), violated)


def trace(run: Run) -> str:
    """The model's own words (its printf) along the counterexample."""
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        outcome = verify(run, where)
        if outcome.finding == HOLDS:
            return f"{run.name}: no counterexample"
        defines = [f"-D{switch}" for switch in run.switches]
        replay = _call([spin(), "-k", str(where / f"{MODEL.name}.trail"), "-t", "-T", *defines, str(MODEL)], where)
    lines = [line.strip() for line in replay.splitlines()]
    said = [line for line in lines if re.match(r"(router|source|reader|pull|stream): ", line)]
    return "\n".join([*said, f"=> {outcome.finding}"])


def check(runs: list[Run]) -> bool:
    width = max(len(run.name) for run in runs)
    print(f"{'run':{width}}  {'must':5}  {'states':>9}  {'depth':>5}  {'MB':>5}  {'s':>5}  finding")
    good = True
    for run in runs:
        with tempfile.TemporaryDirectory() as name:
            outcome = verify(run, Path(name))
        as_expected = outcome.finding == run.finding
        good &= as_expected
        print(
            f"{run.name:{width}}  {'hold' if run.finding == HOLDS else 'fail':5}  {outcome.states:9,}  "
            f"{outcome.depth:5}  {outcome.memory_mb:5.0f}  {outcome.seconds:5.1f}  {outcome.finding}"
            f"{'' if as_expected else f'   <== expected: {run.finding}'}",
            flush=True,
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the handoff model with spin.")
    parser.add_argument("--deep", action="store_true", help="also the larger state spaces")
    parser.add_argument("--trace", metavar="SWITCH", help="print the counterexample of one removed rule")
    arguments = parser.parse_args()
    try:
        _ = spin(), compiler()  # both before anything else
        if arguments.trace:
            named = [run for run in RUNS if run.name == arguments.trace]
            if not named:
                parser.error(f"{arguments.trace} is none of {', '.join(r.name for r in RUNS if r.finding != HOLDS)}")
            print(trace(named[0]))
            return 0
        good = check([run for run in RUNS if arguments.deep or not run.deep])
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    print("every line is as expected" if good else "the model and its expectations disagree")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
