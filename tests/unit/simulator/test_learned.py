"""What simulated workers learn of their steps, held to the engine's own estimator."""

from __future__ import annotations

import random
import statistics
from dataclasses import astuple, replace

import pytest

from engine.step_cost import StepCostEstimate, StepShape
from router.placement.policy import (
    Placement,
    PolicyParams,
    PoolsView,
    Rejection,
    RequestFacts,
    Route,
    WorkerView,
    decide,
)
from simulator.cost_model import preset
from simulator.exact import ExactCluster
from simulator.fast import FastCluster
from simulator.learned import LeapEstimate, learned_steps
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest

STEP = preset("h200-8b").step


def steps(count: int, seed: int) -> list[tuple[StepShape, float]]:
    """Decodes with a chunk beside them now and then, some pauses of the machine, and a machine that slows down."""
    rng = random.Random(seed)
    found: list[tuple[StepShape, float]] = []
    for i in range(count):
        n, context = rng.randrange(1, 20), rng.randrange(1000, 90_000)
        chunk = rng.choice((0, 0, 0, 300, 1100))
        shape = StepShape(n + (chunk > 0), n + chunk, context, chunk * (rng.randrange(9000) + chunk / 2), chunk)
        ms = STEP.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)
        found.append((shape, ms * rng.uniform(0.95, 1.05) * (30 if i % 97 == 5 else 1) * (2 if i > count / 2 else 1)))
    return found


@pytest.mark.parametrize("warm", [True, False])
def test_one_step_at_a_time_is_the_engines_own_estimator(warm: bool) -> None:
    engines = learned_steps(STEP, 2048, decodes=True) if warm else StepCostEstimate()
    ours = LeapEstimate(engines)
    for shape, ms in steps(400, 1):
        engines.observe(shape, ms)
        ours.observe(shape, ms)
        assert astuple(ours.cost()) == pytest.approx(astuple(engines.cost()), rel=1e-9, abs=1e-15)
        assert ours.relative_error == pytest.approx(engines.relative_error, rel=1e-9)
        assert ours.known_prompt_tokens == engines.known_prompt_tokens


def test_a_run_of_like_steps_teaches_what_its_steps_would() -> None:
    engines = learned_steps(STEP, 2048, decodes=True)
    ours, rng = LeapEstimate(engines), random.Random(2)
    off: list[float] = []
    for _ in range(120):
        n, context, count = rng.randrange(1, 20), rng.randrange(1000, 90_000), rng.choice((1, 2, 6, 40, 300))
        chunk = rng.choice((0, 400, 1100)) if count < 7 else 0
        start, end = context, context + n * (count - 1)
        pairs = chunk * (2000 + chunk / 2)
        for i in range(count):
            shape = StepShape(n + (chunk > 0), n + chunk, start + n * i, pairs, chunk)
            engines.observe(shape, STEP.ms(shape.sequences, shape.tokens, shape.context_tokens, pairs))
        middle = (start + end) / 2
        ms = STEP.ms(n + (chunk > 0), n + chunk, middle, pairs)
        ours.observe_run(n + (chunk > 0), n + chunk, middle, pairs, chunk, ms, count)
        for shape in (StepShape(8, 8, 40_000, 0.0, 0), StepShape(9, 1008, 40_000, 1000 * 2500.0, 1000)):
            of = shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs
            off.append(abs(ours.cost().ms(*of) / engines.cost().ms(*of) - 1))
    assert statistics.median(off) < 0.002
    assert max(off) < 0.1
    assert ours.relative_error == pytest.approx(engines.relative_error, abs=0.02)


class Heard:
    """Everything here, and what the router believed of the decode worker each time."""

    name = "heard"

    def __init__(self) -> None:
        self.views: list[WorkerView] = []

    def place(
        self, facts: RequestFacts, view: PoolsView, params: PolicyParams, now: float, rng: random.Random
    ) -> Route | Rejection:
        self.views.append(view.decode[0])
        return decide(replace(facts, placement=Placement.LOCAL), view, params, now, rng)


def test_the_router_hears_the_same_of_fast_workers_and_of_exact_ones() -> None:
    """Long prompts beside decodes teach a worker other coefficients than it came with: chunks and placements follow."""
    rng, at = random.Random(5), 0.0
    requests: list[TraceRequest] = []
    for _ in range(150):
        at += rng.expovariate(4.0)
        requests.append(TraceRequest(at, int(300 + rng.paretovariate(1.1) * 500) % 30_000, rng.randrange(20, 300)))
    spec = ClusterSpec(prefill=PoolSpec(workers=0), decode=PoolSpec(workers=1))
    heard: list[list[WorkerView]] = []
    for kind in (FastCluster, ExactCluster):
        policy = Heard()
        kind(spec, spec.costs(), policy, 1).run(Trace("made", requests))
        heard.append(policy.views[10:])
    for name, mean_within, median_within in (
        ("itl_ms", 0.01, 0.01),
        ("decode_step_ms", 0.005, 0.002),
        ("chunk_tokens", 0.01, 0.01),
        ("chunk_ms", 0.01, 0.01),
        ("step_constant_ms", 0.005, 0.002),
        ("token_ms", 0.01, 0.01),
        ("backlog_tokens", 0.02, 0.02),
        ("free_blocks", 0.002, 0.001),
    ):
        fast, exact = ([float(getattr(view, name)) for view in views] for views in heard)
        assert statistics.fmean(fast) == pytest.approx(statistics.fmean(exact), rel=mean_within), name
        off = [abs(a - b) / b for a, b in zip(fast, exact, strict=True) if b]
        assert statistics.median(off) < median_within, name
    by_start = learned_steps(STEP, 2048, decodes=True).cost().per_token_ms
    assert min(view.token_ms for view in heard[1]) < 0.9 * by_start, "standing still would not do"
