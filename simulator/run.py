"""A cluster, a trace and a policy, over rates and seeds: what `diptych simulate` and the planner run."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulator.cost_model import CostModel
from simulator.exact import ExactCluster
from simulator.fast import FastCluster
from simulator.flights import Sample
from simulator.outcome import METRICS, Outcome, summary
from simulator.policies import Policy
from simulator.spec import ClusterSpec
from simulator.traces import Trace, at_rate, read, window


def load_trace(path: Path, seed: int, requests: int, *, jitter: bool = True) -> Trace:
    """A seed's window of the trace, with its jitter. Raises TraceError."""
    rng = random.Random(f"{seed}/trace")
    trace = read(path, rng, jitter=jitter)
    return window(trace, requests, rng) if requests else trace


def run_once(
    spec: ClusterSpec,
    costs: CostModel,
    policy: Policy,
    trace: Trace,
    seed: int,
    *,
    crashes: Sequence[tuple[float, int]] = (),
    on_done: Callable[[int], None] | None = None,
    samples: int = 0,
) -> tuple[list[Outcome], list[Sample]]:
    """Outcomes in the order of arrival, and about so many samples of the pools (fast workers only)."""
    if spec.fidelity == "exact":
        return ExactCluster(spec, costs, policy, seed, crashes=crashes).run(trace, on_done), []
    every_s = trace.duration_s / samples if samples else 0.0
    cluster = FastCluster(spec, costs, policy, seed, crashes=crashes, sample_every_s=every_s)
    return cluster.run(trace, on_done), cluster.samples


def over_seeds(
    spec: ClusterSpec,
    costs: CostModel,
    policy: Policy,
    traces: Sequence[Trace],
    requests_per_s: float | None,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """One row of the curve: means over the seeds, and the spread of attainment."""
    rows = []
    for seed, trace in enumerate(traces, start=1):
        played = at_rate(trace, requests_per_s) if requests_per_s else trace
        outcomes, _ = run_once(spec, costs, policy, played, seed, on_done=on_done)
        rows.append(summary(outcomes, spec.itl_target_ms))
    return merged(rows)


def merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every figure over runs; `attainment_spread` is the standard deviation of attainment."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            keys = {k for v in values for k in v}
            return {k: mean([v[k] for v in values if k in v]) for k in sorted(keys)}
        return statistics.fmean(values)

    result = {key: mean([row[key] for row in rows]) for key in rows[0]}
    result["attainment_spread"] = {
        m: statistics.stdev([r["attainment"][m] for r in rows]) if len(rows) > 1 else 0.0 for m in METRICS
    }
    result["seeds"] = len(rows)
    return result


def assumptions(spec: ClusterSpec, costs: CostModel, trace: Trace) -> list[str]:
    """Everything that a figure of this run rests on, in words."""
    capacity = spec.kv_capacity_tokens or costs.kv_capacity_tokens
    return [
        f"Step times: {costs.name}, {costs.source}.",
        f"KV memory of a worker: {capacity:,} tokens of {costs.kv_bytes_per_token:,} bytes.",
        f"Links: {spec.nic_gbytes_per_s:g} GB/s for each worker, each way; {spec.handoff_ms:g} ms more for a handoff.",
        f"The router's view of a worker is up to {spec.report_every_s:g} s old; {spec.router_ms:g} ms to reach one.",
        f"Targets: first token within {spec.ttft_base_s:g} s + {spec.ttft_isolated_factor:g} x the prompt's time on an "
        f"idle worker; between tokens {spec.itl_target_ms:g} ms. Refused and unfinished requests are misses.",
        f"Trace: {trace.name}, {len(trace.requests):,} requests, {trace.requests_per_s:.3g} a second as recorded; "
        "other rates by stretching time, which changes how long cached prefixes live as well.",
        "The first tenth of the requests is warm-up and not counted.",
        "Answers end where the trace says; blocks that decoding fills are not found by later prompts.",
    ]


def describe(spec: ClusterSpec) -> str:
    chunks = "within the inter-token target" if spec.decode.adaptive_chunks else f"of {spec.decode.max_batch_tokens}"
    return (
        f"{spec.prefill.workers} prefill and {spec.decode.workers} decode workers ({spec.fidelity}), "
        f"{spec.cost_model}, chunks {chunks}, prompts by {'due date' if spec.overload == 'put_back' else 'arrival'}"
    )
