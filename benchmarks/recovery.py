"""Time from kill -9 of a worker to the next token of every request that it had, where another worker lives.

Two prefill and two decode workers, real processes, float32, a few requests in flight at each kill:

    decode mid-stream        the decode worker of running answers dies; another computes prompt + emitted tokens anew
    prefill before transfer  the prefill worker dies while it computes; decode computes the prompt itself
    prefill during transfer  it dies after its first token, the KV under way on a slowed link; decode computes the rest

Every answer is compared with the undisturbed one. `noticed` is the time from the kill to the router's log line that the
worker is lost; in the same turn of its loop it places the requests elsewhere. What recovery cannot do without is
computing again: `floor` is the time to the first token of as many of the same prompts at once on one idle decode
worker. No prompt is ever in a cache.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import parse, save, table
from settings.model_path import resolve_model
from tests.support.chaos.cases import LOCAL, SPLIT, Answer, Case
from tests.support.chaos.clients import Attempt, Ledger, generate, record_answers
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.verdict import judge, percentile, recovery_ms
from tests.support.prompts import tokens_of

IN_FLIGHT = 2
SLOW_BYTES_PER_S = 4e6
DEADLINE_S = 60.0


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the moment for the kill never came")
        time.sleep(0.002)


class Bench:
    def __init__(self, cluster: ChaosCluster, cases: Sequence[Case]) -> None:
        self.cluster = cluster
        self.cases = {case.name: case for case in cases}
        self.answers: dict[str, Answer] = {}
        self.ledger = Ledger()
        self._salts = itertools.count()

    def ask(self, case: Case, count: int) -> tuple[list[Attempt], list[threading.Thread]]:
        known = len(self.ledger.all())
        threads = [
            threading.Thread(
                target=generate,
                args=(self.cluster, self.ledger, case, 0, DEADLINE_S, f"{next(self._salts)}"),
                daemon=True,
            )
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(self.ledger.all()) == known + count)
        return self.ledger.all()[known:], threads

    def floor_ms(self, repeats: int = 5) -> float:
        """One prompt of its length for each worker's share of the requests in flight."""
        case = next(iter(self.cases.values()))
        times = []
        for _ in range(repeats):
            attempts, threads = self.ask(Case(case.name, case.prompt, case.sampling, LOCAL), 2 * IN_FLIGHT)
            for thread in threads:
                thread.join(DEADLINE_S + 5)
            times += [(a.arrivals[0] - a.started) * 1e3 for a in attempts]
        return sorted(times)[len(times) // 2]

    def noticed_ms(self, victim: str, killed: float) -> float:
        """Wall clock; the router's log has milliseconds."""
        lost = re.compile(rf"^(\S+ \S+) W router.clients worker {victim} lost", re.MULTILINE)
        stamps = lost.findall((self.cluster.directory / "router-0.log").read_text())
        return (datetime.datetime.strptime(stamps[-1], "%Y-%m-%d %H:%M:%S,%f").timestamp() - killed) * 1e3

    def kill(self, name: str, ripe: Callable[[Attempt], bool]) -> tuple[float, list[float]]:
        """Ask, wait for the moment, kill the worker of the first request, heal. Noticed and recovered, in ms."""
        case = self.cases[name]
        attempts, threads = self.ask(case, IN_FLIGHT)
        wait_for(lambda: all(a.route is not None for a in attempts) and ripe(attempts[0]))
        route = attempts[0].route
        victim = route.prefill_worker if name.startswith("prefill") else route.decode_worker
        at, wall = time.monotonic(), time.time()
        self.cluster.kill(victim)
        for thread in threads:
            thread.join(DEADLINE_S + 10)
        times, noticed = recovery_ms(attempts, victim, at), self.noticed_ms(victim, wall)
        since = time.time_ns()
        self.cluster.start_again(victim, **self.transport_of(victim))
        self.cluster.wait_whole(90.0, {victim: since})
        return noticed, times

    @staticmethod
    def transport_of(worker: str) -> dict[str, float]:
        return {"slow_bytes_per_s": SLOW_BYTES_PER_S} if worker.startswith("decode") else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24, help="in all, spread over the three moments")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    arguments = parse(parser, kills=1)
    model = Path(resolve_model("embedded"))
    from diptych.v1 import generate_pb2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    length = arguments.prompt_tokens
    params = generate_pb2.SamplingParams(max_tokens=16, ignore_eos=True)
    cases = [
        Case("decode mid-stream", tuple(tokens_of(tokenizer, length, seed=1)), params, LOCAL),
        Case("prefill before transfer", tuple(tokens_of(tokenizer, length, seed=2)), params, SPLIT),
        Case("prefill during transfer", tuple(tokens_of(tokenizer, length, seed=3)), params, SPLIT),
    ]
    moments: dict[str, Callable[[Attempt], bool]] = {
        "decode mid-stream": lambda a: len(a.arrivals) >= 4,
        "prefill before transfer": lambda a: time.monotonic() >= a.started + 0.05,
        "prefill during transfer": lambda a: len(a.arrivals) >= 1,
    }
    with tempfile.TemporaryDirectory() as directory:
        cluster = ChaosCluster(
            Path(directory),
            model,
            prefill=2,
            decode=2,
            routers=1,
            engine={"num_blocks": 160},
            transport={"digest": True, "ucx_net_devices": "lo"},
            by_worker={f"decode-{i}": {"transport": {"slow_bytes_per_s": SLOW_BYTES_PER_S}} for i in range(2)},
        )
        bench = Bench(cluster, cases)
        times: dict[str, list[float]] = {name: [] for name in moments}
        noticed: dict[str, list[float]] = {name: [] for name in moments}
        try:
            cluster.start()
            bench.answers = record_answers(cluster, cases)
            floor = bench.floor_ms()
            for _, name in zip(range(arguments.kills), itertools.cycle(moments), strict=False):
                after_ms, found = bench.kill(name, moments[name])
                times[name] += found
                noticed[name].append(after_ms)
                print(f"{name}: noticed {after_ms:.0f} ms, next tokens {[round(t) for t in found]} ms", flush=True)
            verdict = judge(bench.ledger.all(), [], bench.answers)
            cluster.assert_nothing_left()
        finally:
            cluster.stop()
    times["all"] = [t for values in times.values() for t in values]
    noticed["all"] = [t for values in noticed.values() for t in values]
    rows, figures = [], {}
    for name, values in times.items():
        values, seen = sorted(values), sorted(noticed[name])
        figures[name] = {
            "kills": len(seen),
            "moved_requests": len(values),
            "noticed_p50_ms": round(percentile(seen, 50), 1),
            "noticed_p99_ms": round(percentile(seen, 99), 1),
            "next_token_p50_ms": round(percentile(values, 50), 1),
            "next_token_p99_ms": round(percentile(values, 99), 1),
        }
        rows.append((name, *figures[name].values()))
    table(("killed", "kills", "moved", "noticed p50 ms", "p99 ms", "next token p50 ms", "p99 ms"), rows)
    print(f"floor: {floor:.0f} ms")
    save(
        "recovery",
        {
            "prompt_tokens": length,
            "requests_in_flight": IN_FLIGHT,
            "floor_ms": round(floor, 1),
            "recovery": figures,
            "complete": verdict.complete,
            "errors": verdict.errors,
            "wrong": len(verdict.wrong),
            "duplicates_or_gaps": len(verdict.positions),
        },
    )
    for problem in verdict.problems():
        print(problem)


if __name__ == "__main__":
    main()
