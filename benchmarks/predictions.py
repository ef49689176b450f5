"""How good the router's estimates are on a live cluster: predicted against actual, and what hindsight would flip.

Two prefill and two decode workers with the small model, on this machine. A mixed load comes as a Poisson process: short
and long prompts, chats whose turns go on from one another, answers of different lengths. Every request's `Explain` is
asked for when it has ended.

Hindsight: a decision is called flipped when its alternative (the other way on the same decode worker), its estimate
scaled by the median error of that way in this run, would have cost less than what the taken way actually cost, by more
than 10 %. That is regret as far as the router can know it; nobody runs a request both ways at once.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2
from transformers import AutoTokenizer

from benchmarks.report import parse, save, table
from settings.model_path import embedded_model_path
from tests.support.processes import Cluster
from tests.support.prompts import tokens_of


@dataclass(frozen=True)
class Asked:
    request_id: str
    prompt: list[int]
    max_tokens: int


def percentiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {"p50": statistics.median(values), "p90": values[min(len(values) - 1, int(len(values) * 0.9))]}


def run(seconds: float, per_s: float, seed: int, settle_s: float) -> list[cluster_pb2.Explanation]:
    rng = random.Random(seed)
    model = embedded_model_path()
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    text = tokens_of(tokenizer, 12_000, seed)
    chats: list[list[int]] = []
    lock = threading.Lock()
    asked: list[str] = []

    def next_prompt(number: int) -> Asked:
        start = rng.randrange(8_000)
        kind = rng.random()
        with lock:
            if kind < 0.3 and chats:
                history = rng.choice(chats)
                prompt = [*history, *text[start : start + rng.randint(10, 60)]][:1500]
            elif kind < 0.65:
                prompt = text[start : start + rng.randint(8, 80)]
            else:
                prompt = text[start : start + rng.randint(200, 900)]
        return Asked(f"q{number}", prompt, rng.choice((4, 16, 16, 32)))

    def ask(cluster: Cluster, one: Asked) -> None:
        sampling = generate_pb2.SamplingParams(max_tokens=one.max_tokens, ignore_eos=True)
        reply = cluster.ask(cluster.request(one.prompt, sampling, request_id=one.request_id), 120.0)
        with lock:
            asked.append(one.request_id)
            chats.append([*one.prompt, *reply.token_ids])
            del chats[:-8]

    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(
            Path(directory), model, prefill=2, decode=2, engine={"num_blocks": 512, "dtype": "bfloat16"},
            transport={"ucx_net_devices": "lo"}, router={"itl_target_ms": 300.0},
        )  # fmt: skip
        try:
            cluster.start(240.0)
            begun = time.monotonic()
            due, number, threads = begun, 0, []
            while due < begun + seconds:
                time.sleep(max(0.0, due - time.monotonic()))
                thread = threading.Thread(target=ask, args=(cluster, next_prompt(number)), daemon=True)
                thread.start()
                threads.append(thread)
                number += 1
                due += rng.expovariate(per_s)
            for thread in threads:
                thread.join(120.0)
            stub = cluster_pb2_grpc.ClusterServiceStub(cluster.channel)
            found = [stub.Explain(cluster_pb2.ExplainRequest(request_id=i), timeout=5).explanation for i in list(asked)]
        finally:
            cluster.stop()
    first = min(-e.request.age_ms for e in found)
    return [e for e in found if -e.request.age_ms > first + settle_s * 1e3]


def errors(found: list[cluster_pb2.Explanation], name: str) -> list[float]:
    """|predicted - actual| / actual."""
    pairs = [p for e in found for p in e.predictions if p.name == name and p.actual_ms > 0]
    return [abs(p.predicted_ms - p.actual_ms) / p.actual_ms for p in pairs]


def flipped(found: list[cluster_pb2.Explanation]) -> float:
    def ratio(e: cluster_pb2.Explanation) -> float | None:
        ttft = next((p for p in e.predictions if p.name == "ttft_ms"), None)
        return ttft.actual_ms / ttft.predicted_ms if ttft is not None and ttft.predicted_ms > 0 else None

    def way(route: Any) -> bool:
        return bool(route.prefill_worker)

    by_way: dict[bool, list[float]] = {True: [], False: []}
    for e in found:
        value = ratio(e)
        if value is not None:
            by_way[way(e.decisions[0].route)].append(value)
    scale = {w: statistics.median(v) if v else 1.0 for w, v in by_way.items()}
    judged = flips = 0
    for e in found:
        decision, value = e.decisions[0], ratio(e)
        other = next(
            (a for a in decision.alternatives if bool(a.prefill_worker) != way(decision.route)
             and a.decode_worker == decision.route.decode_worker), None,
        )  # fmt: skip
        if other is None or value is None:
            continue
        judged += 1
        # What both would have spent on D's steps is the same, and taken out.
        step = next(x.value for x in decision.route.estimates if x.name == "step_cost_ms")
        actual, instead = (decision.cost_ms - step) * value, (other.cost_ms - step) * scale[bool(other.prefill_worker)]
        flips += instead < 0.9 * actual
    return flips / judged if judged else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--requests-per-s", type=float, default=1.2)
    parser.add_argument("--settle-s", type=float, default=15.0, help="Left out at the beginning")
    parser.add_argument("--seed", type=int, default=1)
    a = parse(parser, seconds=8.0, requests_per_s=2.0, settle_s=1.0)
    found = run(a.seconds, a.requests_per_s, a.seed, a.settle_s)
    result: dict[str, Any] = {
        name: {"count": len(values), **percentiles(values)}
        for name in ("ttft_ms", "handoff_ms", "itl_ms")
        if (values := errors(found, name))
    }
    actual = [p.actual_ms for e in found for p in e.predictions if p.name == "ttft_ms"]
    result["actual_ttft_ms"] = percentiles(actual)
    result["requests"] = len(found)
    result["split_share"] = sum(bool(e.decisions[0].route.prefill_worker) for e in found) / len(found)
    result["prefix_pulls"] = sum(bool(e.decisions[0].prefix_holder) for e in found)
    result["flipped_share"] = flipped(found)
    table(
        ("relative error", "count", "p50", "p90"),
        [
            (n, r["count"], f"{r['p50']:.0%}", f"{r['p90']:.0%}")
            for n, r in result.items()
            if isinstance(r, dict) and "count" in r
        ],
    )
    print(f"split {result['split_share']:.0%}, hindsight would flip {result['flipped_share']:.0%}")
    save("predictions", {**result, "seconds": a.seconds, "requests_per_s": a.requests_per_s})


if __name__ == "__main__":
    main()
