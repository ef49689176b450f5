"""kill -9, and SIGSTOP, of ranks at random moments under load: what clients saw, what was left, how long it took.

Two prefill and two decode workers behind a router, of 1 to `--ranks` ranks, begun as users begin them (`--forked`: from
a process that has imported torch, in a tenth of the time). A tiny random model in float32, at the pace of a large one.
Every rank of every worker is struck once before any is struck again; a quarter of the strikes are stops. Greedy answers
are compared with transformers, sampled ones with what was answered undisturbed.

    ended         from the strike until the last process of the worker is gone. A stop is noticed by the worker's own
                  watchdog (`--stall-s`), or, of a leader, by the router
    serves again  from the strike until the worker, started again at once, is ready at the router
    gap           the longest that a client waited for its next token, or its first, between the two; of the hit: of the
                  requests that were on the worker

The same `--seed` strikes in the same order. `--after FILE` goes on where the run of that result ended, and counts both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import parse, save, table
from settings.model_path import resolve_model
from tests.support.chaos.clients import Ledger, Load, record_answers
from tests.support.chaos.cluster import leaked_shared_memory, shared_memory
from tests.support.chaos.rank_kills import (
    RanksCluster,
    Striker,
    as_rows,
    cases_of,
    dead_sockets,
    plan,
    wrong_references,
)
from tests.support.chaos.verdict import judge, percentile
from tests.support.checkpoints import small_model

_COUNTS = ("complete", "went_on_elsewhere", "errors_said", "wrong", "lost_silently")
_DEADLINE_S = 60.0


def measured(directory: Path, model: Path, tokenizer: Any, arguments: argparse.Namespace, skip: int) -> dict[str, Any]:
    memory = shared_memory()
    cases = cases_of(tokenizer)
    cluster = cluster_of(directory, model, arguments)
    try:
        cluster.start(300.0)
        answers = record_answers(cluster, cases)
        wrong = wrong_references(model, cases, answers)
        ledger = Ledger()
        load = Load(cluster, ledger, cases, arguments.seed, generate_clients=3, deadline_s=_DEADLINE_S).start()
        striker = Striker(cluster, ledger)
        strikes = itertools.islice(plan(arguments.seed, cluster.ranks), skip, skip + arguments.kills)
        try:
            striker.run(strikes, lambda line: print(line, flush=True))
        finally:
            stuck = load.stop()
        verdict = judge(ledger.all(), striker.injected, answers)
        left = [what for one in striker.struck for what in one.left]
        left += dead_sockets(cluster)
        cluster.assert_nothing_left()
    finally:
        cluster.stop()
    left += cluster.left_processes()
    left += leaked_shared_memory(memory, [pid for _, pid in cluster.spawned])
    for problem in (*wrong, *verdict.problems(), *left):
        print(problem)
    attempts = ledger.all()
    return {
        "complete": verdict.complete,
        "went_on_elsewhere": sum(bool(a.finished and a.finished.recoveries) for a in attempts),
        "errors_said": sum(verdict.errors.values()) - len(verdict.dishonest),
        "wrong": len(wrong) + len(verdict.wrong) + len(verdict.positions),
        "lost_silently": len(verdict.late) + len(verdict.dishonest) + len(stuck),
        "left_over": left,
        "strikes": as_rows(striker.struck),
    }


def cluster_of(directory: Path, model: Path, arguments: argparse.Namespace) -> RanksCluster:
    most = arguments.ranks
    return RanksCluster(
        directory,
        model,
        prefill=2,
        decode=2,
        routers=1,
        engine={"num_blocks": 160, "max_batch_tokens": 256},
        transport={"ucx_net_devices": "lo"},
        worker={"stall_s": arguments.stall_s, "transport_stall_s": arguments.stall_s},
        router={"itl_target_ms": 50.0},
        pace="15 0.4",
        forked=arguments.forked,
        ranks={"prefill-0": most, "prefill-1": 1, "decode-0": most, "decode-1": min(2, most)},
    )


def show(result: dict[str, Any]) -> None:
    strikes = result["strikes"]
    rows, figures = [], {}
    kinds = {
        "kill of a rank": lambda s: s["how"] == "kill" and s["rank"],
        "kill of a leader": lambda s: s["how"] == "kill" and not s["rank"],
        "stop of a rank": lambda s: s["how"] == "stop" and s["rank"],
        "stop of a leader": lambda s: s["how"] == "stop" and not s["rank"],
        "all": lambda s: True,
    }
    for kind, belongs in kinds.items():
        own = [s for s in strikes if belongs(s)]
        cells = []
        for name in ("ended_s", "serves_s", "hit_gap_s", "gap_s"):
            values = sorted(s[name] for s in own)
            found = {f"p{p}": percentile(values, p) for p in (50, 99)} if values else {}
            figures.setdefault(kind, {})[name] = found
            cells.append(" / ".join(f"{v:.2f}" for v in found.values()))
        rows.append((kind, len(own), *cells))
    table(("s, p50 / p99", "strikes", "ended", "serves again", "gap of the hit", "longest gap"), rows)
    result["seconds"] = figures
    left = len(result["left_over"])
    print(", ".join(f"{name.replace('_', ' ')} {result[name]}" for name in _COUNTS) + f", left over {left}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="of the largest workers: 2 or 4")
    parser.add_argument("--stall-s", type=float, default=4.0)
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--after", type=Path, help="a result to go on from")
    arguments = parse(parser, kills=1, forked=True)
    if arguments.forked:
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # of whom they are forked: no threads
    before = json.loads(arguments.after.read_text()) if arguments.after else {}
    from transformers import AutoTokenizer

    embedded = Path(resolve_model("embedded"))
    with tempfile.TemporaryDirectory() as directory:
        model = small_model(Path(directory) / "model", embedded)
        tokenizer = AutoTokenizer.from_pretrained(model)
        result = measured(Path(directory), model, tokenizer, arguments, len(before.get("strikes", [])))
    if before:
        for name in (*_COUNTS, "left_over"):
            result[name] = before[name] + result[name]
        result["strikes"] = before["strikes"] + result["strikes"]
    show(result)
    settings = {name: getattr(arguments, name) for name in ("seed", "ranks", "stall_s", "forked")}
    save("rank_kills", {**settings, **result})
    return 1 if result["wrong"] or result["lost_silently"] or result["left_over"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
