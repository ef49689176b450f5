"""What `diptych plan` found as values of the Helm chart (deploy/chart)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from simulator.planner import Bill, PoolPlan
from simulator.spec import ClusterSpec, PoolSpec


def as_yaml(plan: PoolPlan, bill: Bill, spec: ClusterSpec, words: Sequence[str]) -> str:
    """With what it rests on as comments. One release; `bill` says how many of them the load needs."""
    values = values_of(plan, spec)
    releases = "one release" if bill.clusters == 1 else f"{bill.clusters} releases, each"
    lines = [
        f"Pools by `diptych plan`: {releases} with {plan.prefill} prefill and {plan.decode} decode workers.",
        f"{plan.goodput_requests_per_s:.3g} requests/s within the targets, {plan.split_share:.0%} of them split.",
        "helm install diptych deploy/chart -f THIS -f YOUR-VALUES: model, resources of the pods, security are yours.",
        *words,
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(values, sort_keys=False)


def values_of(plan: PoolPlan, spec: ClusterSpec) -> dict[str, Any]:
    workers = {"prefill": (plan.prefill, spec.prefill), "decode": (plan.decode, spec.decode)}
    return {
        "cluster": {
            **{role: _pool(count, pool, spec) for role, (count, pool) in workers.items()},
            "router": {
                "itl_target_ms": spec.itl_target_ms,
                "ttft_target_ms": spec.ttft_base_s * 1e3,
                "ttft_target_stretch": spec.ttft_isolated_factor,
                "overload": spec.overload,
                "overload_protect": spec.overload_protect,
            },
        },
        # One pod more than workers: an upgrade starts a worker before one leaves.
        "groups": {
            role: {"pool": role, "minReplicas": count, "maxReplicas": count + 1} for role, (count, _) in workers.items()
        },
    }


def _pool(count: int, pool: PoolSpec, spec: ClusterSpec) -> dict[str, Any]:
    engine = {
        "max_batch_tokens": max(pool.max_batch_tokens, pool.max_running_sequences),
        "max_running_sequences": pool.max_running_sequences,
    }
    return {"replicas": count, "num_gpus": spec.gpus_per_worker, "engine": engine}
