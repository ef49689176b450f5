"""`diptych plan --tp`: which tensor-parallel degree each pool should have, by arithmetic and then by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from simulator.cost_model import CostModelError, preset, preset_of
from simulator.degrees import Figures, Split, figures, splits
from simulator.outcome import highest_rate
from simulator.planner import Mix
from simulator.policies import Policy
from simulator.run import over_seeds
from simulator.spec import ClusterSpec
from simulator.traces import Trace, repeated


@dataclass(frozen=True, slots=True)
class Simulated:
    split: Split
    goodput_requests_per_s: float
    split_share: float


def degrees_of(text: str) -> list[int]:
    """Raises ValueError, with the fix."""
    try:
        degrees = sorted({int(one) for one in text.split(",")})
    except ValueError:
        degrees = []
    if not degrees or not set(degrees) <= {1, 2, 4, 8}:
        raise ValueError(f"--tp is {text!r}; give degrees out of 1, 2, 4 and 8 with commas between them, such as 1,2,4")
    return degrees


def compare(
    spec: ClusterSpec,
    policy: Policy,
    trace: Trace,
    degrees: Sequence[int],
    devices: int,
    metric: str,
    goal: float,
    least_s: float,
    on_done: Callable[[int, int], None],
) -> tuple[list[Figures], list[Simulated]]:
    """Raises CostModelError, ValueError. `on_done`: pairs simulated, of how many."""
    if "/" in spec.cost_model or "." in spec.cost_model:
        raise CostModelError("a measured cost model is of one degree; --tp needs a preset, such as h200-8b")
    mix = Mix.of(trace)
    most = spec.decode.max_running_sequences
    found = figures(spec.cost_model, degrees, mix, spec.itl_target_ms, spec.prefill.max_batch_tokens, most)
    pairs = splits(found, mix, devices)
    if not pairs:
        raise ValueError(f"{devices} devices are too few for a prefill and a decode worker; raise --workers")
    simulated: list[Simulated] = []
    for done, split in enumerate(pairs, 1):
        simulated.append(_simulated(spec, policy, trace, split, metric, goal, least_s))
        on_done(done, len(pairs))
    return found, sorted(simulated, key=lambda s: -s.goodput_requests_per_s)


def _simulated(
    spec: ClusterSpec, policy: Policy, trace: Trace, split: Split, metric: str, goal: float, least_s: float
) -> Simulated:
    """Each device has a NIC of its own. Targets are those of the cluster's own cost model, the same for all pairs."""
    cluster = spec.model_copy(
        update={
            role: pool.model_copy(
                update={
                    "workers": workers,
                    "cost_model": preset_of(spec.cost_model, degree),
                    "nic_gbytes_per_s": spec.nic_gbytes_per_s * degree,
                }
            )
            for role, pool, workers, degree in (
                ("prefill", spec.prefill, split.prefill, split.prefill_degree),
                ("decode", spec.decode, split.decode, split.decode_degree),
            )
        }
    )
    costs = spec.costs()
    shares: dict[float, float] = {}

    def look(rate: float) -> float:
        played = repeated(trace, math.ceil(rate * least_s)) if rate * least_s > len(trace.requests) else trace
        row = over_seeds(cluster, costs, policy, [played], rate)
        shares[rate] = row["split_share"]
        return row["attainment"][metric]

    rate, _ = highest_rate(look, max(split.requests_per_s / 2, 0.01), goal=goal)
    return Simulated(split, rate, shares[min(shares, key=lambda r: abs(r - rate))])


def figures_table(found: Sequence[Figures], itl_target_ms: float) -> Table:
    table = Table(box=None)
    for name in (
        "TP",
        "TTFT ms",
        "of it sums",
        "prompt tokens/s/GPU",
        f"batch within {itl_target_ms:g} ms",
        "ITL ms",
        "of it sums",
        "output tokens/s/GPU",
        "KV tokens",
    ):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            str(one.degree),
            f"{one.ttft_ms:,.0f}",
            f"{one.prompt_exchange_share:.0%}",
            f"{one.prompt_tokens_per_s:,.0f}",
            str(one.batch),
            f"{one.itl_ms:.1f}",
            f"{one.decode_exchange_share:.0%}",
            f"{one.output_tokens_per_s:,.0f}",
            f"{one.kv_tokens:,}",
        )
    return table


def pairs_table(simulated: Sequence[Simulated]) -> Table:
    table = Table(box=None)
    for name in ("prefill", "decode", "GPUs", "by arithmetic", "requests/s within the targets", "per GPU", "split"):
        table.add_column(name, justify="right")
    for one in simulated:
        s = one.split
        table.add_row(
            f"{s.prefill} x TP {s.prefill_degree}",
            f"{s.decode} x TP {s.decode_degree}",
            str(s.devices),
            f"{s.requests_per_s:.3g}",
            f"{one.goodput_requests_per_s:.3g}",
            f"{one.goodput_requests_per_s / s.devices:.3g}",
            f"{one.split_share:.0%}",
        )
    return table


def words(spec: ClusterSpec, found: Sequence[Figures], trace: Trace) -> list[str]:
    source = preset(preset_of(spec.cost_model, found[-1].degree)).source
    return [
        f"Step times: {source}.",
        "All-reduces: two a layer, as a ring over NVLink at its published rate, and 10 us for each; nothing overlaps.",
        "TTFT is of a mean prompt alone on a worker; the batch is the largest that keeps the ITL target, fits the KV "
        "and is allowed (max_running_sequences).",
        f"Pairs are simulated with the workers that the arithmetic gives, a NIC of {spec.nic_gbytes_per_s:g} GB/s for "
        "each GPU, and the same targets for all.",
        f"Trace: {trace.name}, {len(trace.requests):,} requests; other rates by stretching time.",
    ]


def as_json(found: Sequence[Figures], simulated: Sequence[Simulated], said: Sequence[str]) -> dict[str, Any]:
    return {
        "degrees": [asdict(one) for one in found],
        "pairs": [asdict(one) for one in simulated],
        "assumptions": [*said],
    }
