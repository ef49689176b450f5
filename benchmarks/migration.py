"""A decode worker leaves under load: its answers go on elsewhere, against waiting for them. And a worker takes another
part under load.

One prefill and two decode workers, real processes; several long answers, half of them on the worker that gets SIGTERM:

    moved     its answers migrate (the default)
    waited    `router.migrate: false`: it leaves when the last answer has ended

`emptied` is the time from SIGTERM until its process has left. `pause` is the time between the last token of the one
worker and the first of the other, as the router has it, in milliseconds and in steps (of the median length); `gap` is
what the client sees: the longest time between two tokens from SIGTERM on, of an answer that moved; beside it the
longest of those that stayed (they share two processors with everything else). `moved twice` are bytes beyond the blocks
that stood when the target took over, and those of an answer's second move. Every answer is compared with the
undisturbed one.

Switches, with as many answers running on both decode workers:

    to prefill   decode-1, and prefill-0 stands by: from the command until the first token of a prompt that decode-1
                 alone can compute for others now; and the tokens of known prompts in its cache before and after
    to decode    prefill-0, a standby until then: from the command until an answer that is to move there runs there
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

from benchmarks.report import median, parse, save, table
from settings.model_path import resolve_model
from tests.support.chaos.cases import LOCAL, SPLIT, Case
from tests.support.chaos.clients import Attempt, Ledger, generate, record_answers
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.moving import Operator, Seen, migrations
from tests.support.chaos.verdict import judge, percentile
from tests.support.prompts import tokens_of

DEADLINE_S = 600.0
BLOCK_TOKENS = 16
KNOWN_PROMPTS, KNOWN_TOKENS = 3, 320


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


def moves_of(cluster: ChaosCluster, since: float) -> list[Seen]:
    """That arrived and whose pause is known."""
    seen = [m for m in migrations(cluster, 0) if m.began >= since - 0.05]
    return [m for m in seen if m.said.outcome == "done" and m.said.HasField("pause_ms")]


def moved_twice(moves: Sequence[Seen], attempts: Sequence[Attempt], block_bytes: int) -> int:
    by_id = {a.request_id: a for a in attempts}
    bytes_, moved = 0, set()
    for move in sorted(moves, key=lambda m: m.began):
        attempt = by_id[move.said.request_id]
        had_it = move.began + move.said.took_ms / 1e3
        stood = len(attempt.case.prompt) + sum(t <= had_it + 0.1 for t in attempt.arrivals)
        beyond = move.said.pulled_bytes - -(-stood // BLOCK_TOKENS) * block_bytes
        bytes_ += move.said.pulled_bytes if attempt.request_id in moved else max(0, beyond)
        moved.add(attempt.request_id)
    return bytes_


class Round:
    """All cases at once; it begins when each has some tokens."""

    def __init__(self, cluster: ChaosCluster, ledger: Ledger, cases: Sequence[Case], salt: str) -> None:
        known = len(ledger.all())
        self._threads = [
            threading.Thread(target=generate, args=(cluster, ledger, case, 0, DEADLINE_S, salt), daemon=True)
            for case in cases
        ]
        for thread in self._threads:
            thread.start()
        wait_for(lambda: len(ledger.all()) >= known + len(cases))
        self.attempts = ledger.all()[known:]
        wait_for(lambda: all(len(a.arrivals) >= 16 for a in self.attempts))

    def end(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE_S)


def leave(
    cluster: ChaosCluster, ledger: Ledger, cases: Sequence[Case], round_number: int, block_bytes: int
) -> dict[str, Any]:
    """The worker with most of the answers leaves, and comes back."""
    running = Round(cluster, ledger, cases, f"{round_number}")
    attempts = running.attempts
    by_worker: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_worker.setdefault(attempt.route.decode_worker, []).append(attempt)
    victim = max(by_worker, key=lambda name: len(by_worker[name]))
    leaving, staying = by_worker[victim], [a for a in attempts if a not in by_worker[victim]]
    at, since = time.monotonic(), time.time_ns()
    cluster.drain(victim, DEADLINE_S)
    emptied_s = time.monotonic() - at
    moves = moves_of(cluster, at)
    running.end()
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
        "pauses_ms": [m.said.pause_ms for m in moves],
        "bytes": sum(m.said.pulled_bytes for m in moves),
        "twice": moved_twice(moves, attempts, block_bytes),
        "gaps_ms": [max(gaps_ms(a, at - 0.1), default=0.0) for a in moved],
        "others_ms": [max(gaps_ms(a, at - 0.1, window), default=0.0) for a in staying],
    }


def switch(
    cluster: ChaosCluster, ledger: Ledger, cases: Sequence[Case], known: Sequence[Case], number: int
) -> dict[str, Any]:
    """`known`: prompts whose prefixes decode-1 alone will have."""
    operator = Operator(cluster, Ledger())

    def ask(case: Case, placement: int) -> Attempt:
        asked = Case(case.name, case.prompt, case.sampling, placement, salt=f"known {number}")
        done = generate(cluster, ledger, asked, 0, 60.0, "")
        assert done.outcome == "complete", str(done)
        return done

    def cached(attempts: Sequence[Attempt]) -> int:
        return sum(a.finished.usage.cached_tokens for a in attempts)

    operator.switch("decode-0", "standby", 0)
    for case in known:
        ask(case, LOCAL)
    hits_before = cached([ask(case, LOCAL) for case in known])
    operator.switch("decode-0", "decode", 0)
    running = Round(cluster, ledger, cases, f"switch {number}")
    began = time.monotonic()
    operator.switch("decode-1", "prefill", 0)
    operator.switch("prefill-0", "standby", 0)
    split = [ask(case, SPLIT) for case in known]
    to_prefill_s = split[0].arrivals[0] - began
    assert {a.route.prefill_worker for a in split} == {"decode-1"}
    began = time.monotonic()
    operator.switch("prefill-0", "decode", 0)
    outcome, to_decode_s = "", float("nan")
    for attempt in running.attempts:
        if not attempt.outcome:
            outcome = operator.migrate(attempt, "prefill-0")
            if outcome == "done":
                to_decode_s = time.monotonic() - began
                break
    if outcome != "done":
        print(f"no answer was moved to prefill-0 in time: {outcome}", flush=True)
    operator.switch("prefill-0", "prefill", 0)
    operator.switch("decode-1", "decode", 0)
    running.end()
    return {
        "to_prefill_s": to_prefill_s,
        "to_decode_s": to_decode_s,
        "hits_before": hits_before,
        "hits_after": cached(split),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="of each kind, one kind after the other")
    parser.add_argument("--answers", type=int, default=8, help="at once")
    parser.add_argument("--tokens", type=int, default=800, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    arguments = parse(parser, rounds=1, answers=2, tokens=150, prompt_tokens=40)
    model = Path(resolve_model("embedded"))
    from diptych.v1 import generate_pb2
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    params = generate_pb2.SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
    cases = [
        Case(f"{i}", tuple(tokens_of(tokenizer, arguments.prompt_tokens, seed=i)), params, LOCAL)
        for i in range(arguments.answers)
    ]
    few = generate_pb2.SamplingParams(max_tokens=4, ignore_eos=True)
    known = [
        Case(f"known {i}", tuple(tokens_of(tokenizer, KNOWN_TOKENS, seed=1000 + i)), few, LOCAL)
        for i in range(KNOWN_PROMPTS)
    ]
    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block_bytes = BLOCK_TOKENS * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4  # float32
    per_answer = -(-(arguments.prompt_tokens + arguments.tokens) // 16) + 8
    figures: dict[str, Any] = {}
    switches: list[dict[str, Any]] = []
    wrong = errors = 0
    for kind, migrate in (("moved", True), ("waited", False)):
        with tempfile.TemporaryDirectory() as directory:
            cluster = ChaosCluster(
                Path(directory),
                model,
                prefill=1,
                decode=2,
                routers=1,
                engine={"num_blocks": per_answer * arguments.answers + 200, "block_tokens": BLOCK_TOKENS},
                router={"migrate": migrate},
                worker={"drain_s": DEADLINE_S},
                forked=arguments.smoke,
            )
            ledger = Ledger()
            try:
                cluster.start(300.0)
                answers = record_answers(cluster, [*cases, *known])
                rounds = []
                for number in range(arguments.rounds):
                    rounds.append(leave(cluster, ledger, cases, number, block_bytes))
                    told = rounds[-1]
                    print(
                        f"{kind}: emptied in {told['emptied_s']:.2f} s, {told['moved']} of {told['on_it']} moved, "
                        f"pauses {[round(p) for p in told['pauses_ms']]} ms",
                        flush=True,
                    )
                for number in range(arguments.rounds if migrate else 0):
                    switches.append(switch(cluster, ledger, cases, known, number))
                    told = ", ".join(f"{name} {value:.3g}" for name, value in switches[-1].items())
                    print(f"switched: {told}", flush=True)
                verdict = judge(ledger.all(), [], answers)
                cluster.assert_nothing_left()
            finally:
                cluster.stop()
        wrong += len(verdict.wrong) + len(verdict.positions)
        errors += sum(verdict.errors.values())
        emptied = sorted(r["emptied_s"] for r in rounds)
        ended = sorted(r["ended_s"] for r in rounds)
        step_ms = percentile(sorted(g for r in rounds for g in r["steps_ms"]), 50)
        pauses = sorted(p for r in rounds for p in r["pauses_ms"]) or [0.0]
        gaps = sorted(p for r in rounds for p in r["gaps_ms"]) or [0.0]
        others = sorted(p for r in rounds for p in r["others_ms"]) or [0.0]
        figures[kind] = {
            "rounds": len(rounds),
            "on_it": sum(r["on_it"] for r in rounds),
            "moved": sum(r["moved"] for r in rounds),
            "emptied_p50_s": round(percentile(emptied, 50), 2),
            "emptied_max_s": round(emptied[-1], 2),
            "last_answer_p50_s": round(percentile(ended, 50), 2),
            "step_p50_ms": round(step_ms, 1),
            "pause_p50_ms": round(percentile(pauses, 50), 1),
            "pause_p99_ms": round(percentile(pauses, 99), 1),
            "pause_p50_steps": round(percentile(pauses, 50) / step_ms, 1),
            "pause_p99_steps": round(percentile(pauses, 99) / step_ms, 1),
            "gap_p50_ms": round(percentile(gaps, 50), 1),
            "gap_p99_ms": round(percentile(gaps, 99), 1),
            "stayed_gap_p99_ms": round(percentile(others, 99), 1),
            "moved_mb": round(sum(r["bytes"] for r in rounds) / 1e6, 2),
            "moved_twice_mb": round(sum(r["twice"] for r in rounds) / 1e6, 2),
        }
    names = list(figures["moved"])
    table(("", *figures), [(name, *(figures[kind][name] for kind in figures)) for name in names])
    switched = {
        f"{name}_{word}": round(pick([r[name] for r in switches]), 3)
        for name in ("to_prefill_s", "to_decode_s")
        for word, pick in (("p50", median), ("max", max))
    }
    switched |= {name: sum(r[name] for r in switches) for name in ("hits_before", "hits_after")}
    table(("a role switch under load", ""), list(switched.items()))
    save(
        "migration",
        {
            "answers": arguments.answers,
            "tokens": arguments.tokens,
            "prompt_tokens": arguments.prompt_tokens,
            **figures,
            "switch": switched,
            "errors": errors,
            "wrong": wrong,
        },
    )
    print(f"errors {errors}, wrong {wrong}")


if __name__ == "__main__":
    main()
