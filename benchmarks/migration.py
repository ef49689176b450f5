"""A decode worker leaves under load: its answers go on elsewhere, against waiting for them.

One prefill and two decode workers, real processes; several long answers, half of them on the worker that gets SIGTERM:

    moved     its answers migrate (the default)
    waited    `router.migrate: false`: it leaves when the last answer has ended

`emptied` is the time from SIGTERM until its process has left. `pause` is what a client sees of a move: the longest time
between two tokens from SIGTERM on, of an answer that moved; beside it the longest of those that stayed (they share two
processors with everything else), and the median time of a step. Every answer is compared with the undisturbed one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import parse, save, table
from settings.model_path import resolve_model
from tests.support.chaos.cases import LOCAL, Case
from tests.support.chaos.clients import Attempt, Ledger, generate, record_answers
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.verdict import judge, percentile
from tests.support.prompts import tokens_of

DEADLINE_S = 600.0


def wait_for(condition: Any, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the answers never came so far")
        time.sleep(0.005)


def gaps_ms(attempt: Attempt, since: float, until: float = math.inf) -> list[float]:
    """Between tokens that came one after the other; those of one message count as one."""
    times = sorted({t for t in attempt.arrivals if since <= t <= until})
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]


def leave(cluster: ChaosCluster, ledger: Ledger, cases: Sequence[Case], round_number: int) -> dict[str, Any]:
    """All cases at once; when each has some tokens, the worker with most of them leaves, and comes back."""
    known = len(ledger.all())
    threads = [
        threading.Thread(target=generate, args=(cluster, ledger, case, 0, DEADLINE_S, f"{round_number}"), daemon=True)
        for case in cases
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(ledger.all()) == known + len(cases))
    attempts = ledger.all()[known:]
    wait_for(lambda: all(len(a.arrivals) >= 16 for a in attempts))
    by_worker: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_worker.setdefault(attempt.route.decode_worker, []).append(attempt)
    victim = max(by_worker, key=lambda name: len(by_worker[name]))
    leaving, staying = by_worker[victim], [a for a in attempts if a not in by_worker[victim]]
    at, since = time.monotonic(), time.time_ns()
    cluster.drain(victim, DEADLINE_S)
    emptied_s = time.monotonic() - at
    for thread in threads:
        thread.join(DEADLINE_S)
    ended_s = time.monotonic() - at
    cluster.start_again(victim)
    cluster.wait_whole(90.0, {victim: since})
    moved = [a for a in leaving if a.finished is not None and a.finished.route.decode_worker != victim]
    window = at + emptied_s + 1.0  # afterwards nothing moves any more
    return {
        "emptied_s": emptied_s,
        "ended_s": ended_s,
        "on_it": len(leaving),
        "moved": len(moved),
        "steps_ms": [g for a in attempts for g in gaps_ms(a, at)],
        "pauses_ms": [max(gaps_ms(a, at - 0.1), default=0.0) for a in moved],
        "others_ms": [max(gaps_ms(a, at - 0.1, window), default=0.0) for a in staying],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="of each kind, by turns")
    parser.add_argument("--answers", type=int, default=8, help="at once")
    parser.add_argument("--tokens", type=int, default=1500, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    arguments = parse(parser, rounds=1, answers=2, tokens=150)
    model = Path(resolve_model("embedded"))
    from diptych.v1 import generate_pb2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    params = generate_pb2.SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
    cases = [
        Case(f"{i}", tuple(tokens_of(tokenizer, arguments.prompt_tokens, seed=i)), params, LOCAL)
        for i in range(arguments.answers)
    ]
    per_answer = -(-(arguments.prompt_tokens + arguments.tokens) // 16) + 8
    figures: dict[str, Any] = {}
    rows: list[tuple[Any, ...]] = []
    wrong = errors = 0
    for kind, migrate in (("moved", True), ("waited", False)):
        with tempfile.TemporaryDirectory() as directory:
            cluster = ChaosCluster(
                Path(directory),
                model,
                prefill=1,
                decode=2,
                routers=1,
                engine={"num_blocks": per_answer * arguments.answers},
                router={"migrate": migrate},
                worker={"drain_s": DEADLINE_S},
            )
            ledger = Ledger()
            try:
                cluster.start()
                answers = record_answers(cluster, cases)
                rounds = []
                for number in range(arguments.rounds):
                    rounds.append(leave(cluster, ledger, cases, number))
                    told = rounds[-1]
                    print(
                        f"{kind}: emptied in {told['emptied_s']:.2f} s, {told['moved']} of {told['on_it']} moved, "
                        f"pauses {[round(p) for p in told['pauses_ms']]} ms",
                        flush=True,
                    )
                verdict = judge(ledger.all(), [], answers)
                cluster.assert_nothing_left()
            finally:
                cluster.stop()
        wrong += len(verdict.wrong) + len(verdict.positions)
        errors += sum(verdict.errors.values())
        emptied = sorted(r["emptied_s"] for r in rounds)
        steps = sorted(g for r in rounds for g in r["steps_ms"])
        pauses = sorted(p for r in rounds for p in r["pauses_ms"]) or [0.0]
        others = sorted(p for r in rounds for p in r["others_ms"]) or [0.0]
        figures[kind] = {
            "rounds": len(rounds),
            "answers_on_it": sum(r["on_it"] for r in rounds),
            "answers_moved": sum(r["moved"] for r in rounds),
            "emptied_p50_s": round(percentile(emptied, 50), 2),
            "emptied_max_s": round(emptied[-1], 2),
            "step_p50_ms": round(percentile(steps, 50), 1),
            "pause_p50_ms": round(percentile(pauses, 50), 1),
            "pause_p99_ms": round(percentile(pauses, 99), 1),
            "stayed_longest_p50_ms": round(percentile(others, 50), 1),
            "stayed_longest_p99_ms": round(percentile(others, 99), 1),
        }
        rows.append((kind, *figures[kind].values()))
    table(("kind", *figures["moved"]), rows)
    save(
        "migration",
        {
            "answers": arguments.answers,
            "tokens": arguments.tokens,
            "prompt_tokens": arguments.prompt_tokens,
            **figures,
            "errors": errors,
            "wrong": wrong,
        },
    )
    print(f"errors {errors}, wrong {wrong}")


if __name__ == "__main__":
    main()
