"""Pools and money: how many workers of which role, what a million tokens costs, and when renting beats an API.

    1. for every split of `workers` into prefill and decode: the goodput rate (the whole simulator, one seed)
    2. the best split, on the other seeds: requests/s per cluster within the targets
    3. workers for the wanted rate: in whole clusters of that shape, at a planned utilisation
    4. cost per million tokens = GPU hours x price / tokens served in that time; input and output share the bill by the
       GPU time that they take (a prompt token's step time against an output token's)
    5. break-even: the monthly tokens at which the same mix costs as much through an API price list

Pure arithmetic but for the simulations, which are a function given to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simulator.cost_model import CostModel
from simulator.outcome import highest_rate
from simulator.traces import Trace

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars. `api_*` per million tokens; a cached input token of an API may cost less."""

    gpu_hour: float
    api_input: float = 0.0
    api_output: float = 0.0
    api_cached_input: float | None = None
    utilisation: float = 0.7  # of the goodput rate that is bought, over a day: demand is not flat


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of a mean request."""

    input_tokens: float
    output_tokens: float
    cached_share: float = 0.0

    @classmethod
    def of(cls, trace: Trace, cached_share: float = 0.0) -> Mix:
        n = len(trace.requests)
        return cls(
            sum(r.prompt_tokens for r in trace.requests) / n,
            sum(r.output_tokens for r in trace.requests) / n,
            cached_share,
        )


@dataclass(frozen=True, slots=True)
class PoolPlan:
    prefill: int
    decode: int
    goodput_requests_per_s: float
    split_share: float
    cached_share: float


@dataclass(frozen=True, slots=True)
class Bill:
    """Dollars per million tokens, and what the volume has to be."""

    clusters: int
    gpus: int
    month_dollars: float
    per_million_input: float
    per_million_output: float
    per_million_blended: float
    api_per_million_blended: float
    break_even_million_tokens_a_month: float  # inf: an API is always cheaper
    break_even_requests_per_s: float


def pool_plans(
    workers: int,
    attained: Callable[[int, float], tuple[float, float, float]],
    guess: float,
    goal: float,
    on_plan: Callable[[PoolPlan], None] | None = None,
) -> list[PoolPlan]:
    """Every split of the workers, the best first. `attained(prefill, rate)` is (attainment, split, cached share)."""
    plans = []
    for prefill in range(workers):
        seen: dict[float, tuple[float, float, float]] = {}

        def look(rate: float, prefill: int = prefill, seen: dict[float, tuple[float, float, float]] = seen) -> float:
            seen[rate] = attained(prefill, rate)
            return seen[rate][0]

        best = max((p.goodput_requests_per_s for p in plans), default=0.0)
        if best and look(best) < goal:
            rate = 0.0  # no better than what is known: not worth finding out how much worse
        else:
            rate, _ = highest_rate(look, best or guess, goal=goal)
        nearest = min(seen, key=lambda r: abs(r - (rate or best)))
        plan = PoolPlan(prefill, workers - prefill, rate, *seen[nearest][1:])
        plans.append(plan)
        if on_plan is not None:
            on_plan(plan)
    return sorted(plans, key=lambda p: -p.goodput_requests_per_s)


def bill(plan: PoolPlan, mix: Mix, costs: CostModel, prices: Prices, gpus_per_worker: int, wanted_per_s: float) -> Bill:
    """What serving `wanted_per_s` (the peak) costs in clusters of the plan's shape."""
    if plan.goodput_requests_per_s <= 0:
        raise ValueError("the cluster meets its targets at no rate; loosen them, or use faster workers")
    clusters = max(1, math.ceil(wanted_per_s / plan.goodput_requests_per_s - 1e-9))
    gpus = clusters * (plan.prefill + plan.decode) * gpus_per_worker
    month = gpus * prices.gpu_hour * HOURS_PER_MONTH
    served_per_s = min(wanted_per_s, clusters * plan.goodput_requests_per_s) * prices.utilisation
    requests = served_per_s * 3600 * HOURS_PER_MONTH
    input_share = input_time_share(mix, costs)
    million = 1e6
    per_input = month * input_share / (requests * mix.input_tokens) * million
    per_output = month * (1 - input_share) / (requests * mix.output_tokens) * million
    tokens = mix.input_tokens + mix.output_tokens
    blended = month / (requests * tokens) * million
    cached_price = prices.api_cached_input if prices.api_cached_input is not None else prices.api_input
    api_request = (
        mix.input_tokens * ((1 - mix.cached_share) * prices.api_input + mix.cached_share * cached_price)
        + mix.output_tokens * prices.api_output
    ) / million
    # One cluster is the least that can be rented; with fewer requests its rent exceeds the API's bill.
    rent = month / clusters
    even_requests = rent / api_request if api_request > 0 else math.inf
    most_requests = plan.goodput_requests_per_s * prices.utilisation * 3600 * HOURS_PER_MONTH
    if even_requests > most_requests:
        even_requests = math.inf
    return Bill(
        clusters,
        gpus,
        month,
        per_input,
        per_output,
        blended,
        api_request / tokens * million,
        even_requests * tokens / million,
        even_requests / (3600 * HOURS_PER_MONTH),
    )


def input_time_share(mix: Mix, costs: CostModel, batch: int = 32) -> float:
    """Of a request's step time, what its prompt takes; its answer shares steps with `batch` others."""
    computed = max(1, round(mix.input_tokens * (1 - mix.cached_share)))
    prompt_ms = costs.step.prompt_ms(computed, 8192)
    context = mix.input_tokens + mix.output_tokens / 2
    answer_ms = mix.output_tokens * costs.step.decode_ms(batch, batch * context) / batch
    return prompt_ms / (prompt_ms + answer_ms)


def in_words(plan: PoolPlan, bought: Bill, mix: Mix, prices: Prices, wanted_per_s: float) -> Sequence[str]:
    """The assumptions of the arithmetic; the simulator adds its own."""
    words = [
        f"Peak demand {wanted_per_s:g} requests/s; over a month {prices.utilisation:.0%} of it is served on average.",
        f"A mean request: {mix.input_tokens:,.0f} input tokens ({mix.cached_share:.0%} of them cached), "
        f"{mix.output_tokens:,.0f} output tokens.",
        f"{bought.gpus} GPUs at ${prices.gpu_hour:g} an hour, {HOURS_PER_MONTH:g} hours a month, rented all the time; "
        "no staff, network, storage or failures in the price.",
        "Clusters are whole and alike: "
        f"{plan.prefill} prefill and {plan.decode} decode workers, {plan.goodput_requests_per_s:.3g} requests/s each.",
        "Input and output share the bill by the step time that they take, answers in batches of 32.",
    ]
    if prices.api_input or prices.api_output:
        cached = f", ${prices.api_cached_input:g} cached input." if prices.api_cached_input is not None else "."
        listed = f"${prices.api_input:g} input, ${prices.api_output:g} output a million tokens{cached}"
        words += [
            f"API price list: {listed}",
            "Break-even: one cluster's rent against the API's bill for the same requests.",
        ]
    return words
