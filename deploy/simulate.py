"""`diptych simulate` and `diptych plan`: the simulator from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.console import err, fail, out
from deploy.plan_values import as_yaml
from settings.file import SettingsError, read_settings, validate_settings
from simulator.cost_model import CostModel, CostModelError
from simulator.outcome import METRICS
from simulator.planner import Mix, PoolPlan, Prices, bill, in_words, pool_plans
from simulator.policies import Policy, PolicyError, by_name
from simulator.report import write
from simulator.run import assumptions, describe, load_trace, over_seeds, run_once
from simulator.spec import ClusterSpec
from simulator.traces import Trace, TraceError, at_rate, repeated, shortened

TraceFile = Annotated[Path, typer.Option("--trace", help="Trace file: Mooncake, Azure, ServeGen or plain lengths")]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="YAML file with the cluster; every key has a default")
]
PolicyName = Annotated[
    str, typer.Option("--policy", help="diptych, aggregated, always-split, dynamo or threshold:TOKENS")
]
Requests = Annotated[int, typer.Option(min=10, help="Consecutive requests from the trace, for each seed")]
Shorten = Annotated[float, typer.Option(min=1, help="Divide prompt and answer lengths by this")]
_PLAN_LEAST_S = 60.0
_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    TextColumn("{task.percentage:.0f}%"),
    TimeElapsedColumn(),
)


def _inputs(
    trace: Path, cluster: Path | None, policy: str, seeds: int, requests: int, shorten: float, jitter: bool
) -> tuple[list[Trace], ClusterSpec, CostModel, Policy]:
    try:
        spec = read_settings(cluster, ClusterSpec).beside(cluster) if cluster is not None else ClusterSpec()
        return (
            [shortened(load_trace(trace, s, requests, jitter=jitter), shorten) for s in range(1, seeds + 1)],
            spec,
            spec.costs(),
            by_name(policy),
        )
    except (SettingsError, TraceError, CostModelError, PolicyError) as error:
        fail(str(error))


def _make(directory: Path | None) -> None:
    """Now, not after the whole run."""
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {directory}: {error.strerror}; name a folder that can be written")


def simulate(
    trace: TraceFile,
    cluster: ClusterFile = None,
    policy: PolicyName = "diptych",
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Number of seeds; each uses a different part of the trace")
    ] = 3,
    requests: Requests = 1000,
    rates: Annotated[
        str, typer.Option(help="Requests/s, separated by commas; empty = from the cluster file, or the trace")
    ] = "",
    shorten: Shorten = 1.0,
    jitter: Annotated[bool, typer.Option(help="Spread Mooncake's timestamps within their bins of 3 s")] = True,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Write report.json and report.html here")] = None,
) -> None:
    """Replay a trace on a simulated cluster, in virtual time, with the router's own decisions."""
    traces, spec, costs, chosen = _inputs(trace, cluster, policy, seeds, requests, shorten, jitter)
    try:
        points: list[float | None] = [float(r) for r in rates.split(",")] if rates else [spec.requests_per_s]
    except ValueError:
        fail(f"--rates is {rates!r}; give numbers with commas between them, such as 4,8,12")
    if any(p is not None and p <= 0 for p in points):
        fail(f"--rates is {rates!r}; every rate must be above 0")
    _make(out_dir)
    curve: list[dict[str, Any]] = []
    with Progress(*_COLUMNS, console=err) as progress:
        total = len(points) * sum(len(t.requests) for t in traces)
        task = progress.add_task("simulating", total=total)
        for point in points:
            done_before = progress.tasks[task].completed
            run = 0

            def on_done(ended: int) -> None:
                progress.update(task, completed=done_before + run + ended)  # noqa: B023

            rows = []
            for seed, part in enumerate(traces, start=1):
                rows.append(over_seeds(spec, costs, chosen, [part], point, on_done) | {"seed": seed})
                run += len(part.requests)
                on_done(0)
            curve.append(_mean_row(rows))
    _print_curve(curve)
    words = assumptions(spec, costs, traces[0])
    if not jitter:
        words.append("Timestamps were replayed as recorded, with Mooncake's bursts every 3 s.")
    if shorten != 1:
        words.append(f"Lengths are those of the trace divided by {shorten:g}.")
    out.print(*(f"- {w}" for w in words), sep="\n", soft_wrap=True)
    if out_dir is not None:
        last = points[-1]
        played = at_rate(traces[0], last) if last else traces[0]
        outcomes, samples = run_once(spec, costs, chosen, played, 1, samples=100)
        result = {
            "trace": traces[0].name,
            "policy": chosen.name,
            "cluster": describe(spec),
            "spec": spec.model_dump(),
            "seeds": seeds,
            "curve": curve,
            "assumptions": words,
        }
        out.print("wrote " + ", ".join(str(p) for p in write(out_dir, result, outcomes, samples)), soft_wrap=True)


def _mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from simulator.run import merged

    return merged([{k: v for k, v in row.items() if k not in ("seed", "seeds", "attainment_spread")} for row in rows])


def _print_curve(curve: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in (
        "requests/s",
        "met, mean gap",
        "met, longest tenth",
        "split",
        "cached",
        "TTFT p50/p99 ms",
        "gap p50/p99 ms",
    ):
        table.add_column(name, justify="right")
    for row in curve:
        spread = row["attainment_spread"]
        table.add_row(
            f"{row['requests_per_s']:.2f}",
            *(f"{row['attainment'][m]:.1%} ± {spread[m]:.1%}" for m in METRICS),
            f"{row['split_share']:.0%}",
            f"{row['cached_share']:.0%}",
            f"{row['ttft_ms'].get('p50', 0):.0f} / {row['ttft_ms'].get('p99', 0):.0f}",
            f"{row['tpot_ms'].get('p50', 0):.1f} / {row['tpot_ms'].get('p99', 0):.1f}",
        )
    out.print(table)


def plan(
    trace: TraceFile,
    gpu_hour: Annotated[float, typer.Option(min=0.0001, help="Price of one GPU for an hour, in dollars")],
    cluster: ClusterFile = None,
    policy: PolicyName = "diptych",
    workers: Annotated[int, typer.Option(min=1, max=64, help="Workers of one cluster, both roles together")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.0001, help="Peak requests/s; unset = the trace's")] = None,
    goal: Annotated[float, typer.Option(min=0.01, max=1, help="Share of requests that must meet both targets")] = 0.9,
    metric: Annotated[str, typer.Option(help="Inter-token latency: mean, or worst (its longest tenth)")] = "mean",
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Mean demand as a share of peak demand")] = 0.7,
    prices: Annotated[
        Path | None, typer.Option(help="YAML file: api_input, api_output, api_cached_input, in $/M tokens")
    ] = None,
    requests: Requests = 600,
    shorten: Shorten = 1.0,
    tp: Annotated[
        str,
        typer.Option(
            help="Compare tensor-parallel degrees of both pools, such as 1,2,4 (presets only); --workers counts GPUs"
        ),
    ] = "",
    quantization: Annotated[
        str,
        typer.Option(help="The preset with rounded numbers: int8, int4 or fp8 for weights, kv8 for KV, or int8-kv8"),
    ] = "",
    emit: Annotated[Path | None, typer.Option(help="Write the pools here, as values of the Helm chart")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text")] = False,
) -> None:
    """Compute pool sizes, goodput and cost per million tokens from a trace, targets and a GPU price."""
    if metric not in METRICS:
        fail(f"--metric is {metric!r}; use {' or '.join(METRICS)}")
    traces, spec, costs, chosen = _inputs(trace, cluster, policy, 1, requests, shorten, True)
    if quantization:
        try:
            spec = spec.with_schemes(quantization)
            costs = spec.costs()
        except CostModelError as error:
            fail(f"--quantization {quantization}: {error}")
    if tp:
        if emit is not None or prices is not None:
            fail("--tp compares degrees only; leave out --emit and --prices, and plan again with the degrees chosen")
        _plan_degrees(spec, chosen, traces[0], tp, workers, metric, goal, as_json)
        return
    try:
        listed = _read_prices(prices)
    except SettingsError as error:
        fail(str(error))
    price = Prices(gpu_hour, utilisation=utilisation, **listed)
    wanted = rate or spec.requests_per_s or traces[0].requests_per_s

    def attained(prefill: int, at: float) -> tuple[float, float, float]:
        shape = spec.model_copy(
            update={
                "prefill": spec.prefill.model_copy(update={"workers": prefill}),
                "decode": spec.decode.model_copy(update={"workers": workers - prefill}),
            }
        )
        # A queue takes its time to fill: a burst of seconds says nothing about a rate.
        long_enough = [
            repeated(t, math.ceil(at * _PLAN_LEAST_S)) if at * _PLAN_LEAST_S > requests else t for t in traces
        ]
        row = over_seeds(shape, costs, chosen, long_enough, at)
        return row["attainment"][metric], row["split_share"], row["cached_share"]

    with Progress(*_COLUMNS, console=err) as progress:
        task = progress.add_task("pool shapes", total=workers)
        guess = workers * 1e3 / (costs.step.prompt_ms(round(Mix.of(traces[0]).input_tokens), 8192) * 2)
        plans = pool_plans(workers, attained, guess, goal, lambda _: progress.advance(task))
    best = plans[0]
    mix = Mix.of(traces[0], best.cached_share)
    try:
        bought = bill(best, mix, costs, price, spec.gpus_per_worker, wanted)
    except ValueError as error:
        fail(str(error))
    words = [
        *in_words(best, bought, mix, price, wanted),
        f"Every rate was played for at least {_PLAN_LEAST_S:g} s: {len(traces[0].requests)} requests, over and over.",
        *assumptions(spec, costs, traces[0]),
    ]
    if emit is not None:
        try:
            emit.write_text(as_yaml(best, bought, spec, words))
        except OSError as error:
            fail(f"--emit {emit}: {error.strerror}; name a file that can be written")
        err.print(f"wrote {emit}", soft_wrap=True)
    if as_json:
        result = {"plans": [_as_dict(p) for p in plans], "bill": _as_dict(bought), "assumptions": words}
        out.print_json(json.dumps(result, default=str))
        return
    out.print(
        f"{best.prefill} prefill + {best.decode} decode workers: {best.goodput_requests_per_s:.3g} requests/s with "
        f"{goal:.0%} within both targets, {best.split_share:.0%} of them split",
        soft_wrap=True,
    )
    out.print(
        f"{bought.clusters} such clusters, {bought.gpus} GPUs for {wanted:.3g} requests/s: "
        f"${bought.month_dollars:,.0f} a month"
    )
    out.print(
        f"per million tokens: input ${bought.per_million_input:.3f}, output ${bought.per_million_output:.3f}, "
        f"blended ${bought.per_million_blended:.3f}"
    )
    if listed:
        where = (
            f"from {bought.break_even_million_tokens_a_month:,.0f} million tokens a month "
            f"({bought.break_even_requests_per_s:.3g} requests/s)"
            if bought.break_even_requests_per_s != float("inf")
            else "at no volume"
        )
        out.print(f"through the API: blended ${bought.api_per_million_blended:.3f}; one cluster is cheaper {where}")
    out.print("What this rests on:", *(f"- {w}" for w in words), sep="\n", soft_wrap=True)


def _plan_degrees(
    spec: ClusterSpec, policy: Policy, trace: Trace, tp: str, devices: int, metric: str, goal: float, as_json: bool
) -> None:
    from deploy import plan_degrees as degrees

    with Progress(*_COLUMNS, console=err) as progress:
        task = progress.add_task("pairs of degrees", total=None)
        try:
            found, simulated = degrees.compare(
                spec,
                policy,
                trace,
                degrees.degrees_of(tp),
                devices,
                metric,
                goal,
                _PLAN_LEAST_S,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        except (CostModelError, ValueError) as error:
            fail(str(error))
    said = degrees.words(spec, found, trace)
    if as_json:
        out.print_json(json.dumps(degrees.as_json(found, simulated, said)))
        return
    out.print(degrees.figures_table(found, spec.itl_target_ms))
    out.print(degrees.pairs_table(simulated))
    best = simulated[0]
    out.print(
        f"TP {best.split.prefill_degree} for prefill and TP {best.split.decode_degree} for decode: "
        f"{best.goodput_requests_per_s:.3g} requests/s with {goal:.0%} within both targets",
        soft_wrap=True,
    )
    out.print("What this rests on:", *(f"- {w}" for w in said), sep="\n", soft_wrap=True)


def _as_dict(plan: PoolPlan | Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: None if v == float("inf") else v for k, v in asdict(plan).items()}


def _read_prices(path: Path | None) -> dict[str, float]:
    """Raises SettingsError."""
    from pydantic import BaseModel, ConfigDict, Field

    class PriceList(BaseModel):
        model_config = ConfigDict(extra="forbid")
        api_input: float = Field(ge=0)
        api_output: float = Field(ge=0)
        api_cached_input: float | None = Field(default=None, ge=0)

    if path is None:
        return {}
    return validate_settings(read_settings(path, PriceList).model_dump(), PriceList, str(path)).model_dump()
