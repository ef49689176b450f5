"""The online fit of step costs: it finds the truth, stays sane on anything, and a pause does not throw it."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from engine.step_cost import StepCost, StepCostEstimate, StepShape, shape_of
from engine.types import PlanItem, SamplingParams

TRUTH = StepCost(15.0, 1.2, 0.33, 0.0005, 0.00002)


def item(start: int, count: int) -> PlanItem:
    return PlanItem(1, [0] * count, start, [], True, 0, SamplingParams(), start + count, [])


def random_shape(rng: random.Random) -> StepShape:
    items = [item(rng.randrange(1, 3000), 1) for _ in range(rng.randrange(0, 33))]
    items += [item(rng.randrange(0, 4096), rng.randrange(2, 513)) for _ in range(rng.randrange(0, 3))]
    return shape_of(items or [item(0, 64)])


def cost_of(cost: StepCost, shape: StepShape) -> float:
    return cost.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)


def test_a_shape_counts_what_the_formula_names() -> None:
    shape = shape_of([item(100, 1), item(7, 1), item(0, 1), item(0, 64), item(64, 32)])
    # A one-token prompt is a prompt; a decode reads its own token too.
    assert shape == StepShape(5, 99, 101 + 8, 0.5 + 64 * 32 + 32 * (64 + 16), 97)


def test_it_finds_the_coefficients_of_an_exact_machine() -> None:
    rng, estimate = random.Random(1), StepCostEstimate()
    for _ in range(300):
        shape = random_shape(rng)
        estimate.observe(shape, cost_of(TRUTH, shape))
    found = estimate.cost()
    assert math.isclose(found.per_token_ms, TRUTH.per_token_ms, rel_tol=0.02)
    assert math.isclose(found.per_sequence_ms, TRUTH.per_sequence_ms, rel_tol=0.1)
    assert math.isclose(found.constant_ms, TRUTH.constant_ms, rel_tol=0.1)
    assert estimate.relative_error < 0.01


def test_noise_and_pauses_pass_by() -> None:
    """10 % of noise, and one step in thirty takes five times as long."""
    rng, estimate = random.Random(2), StepCostEstimate()
    errors = []
    for i in range(600):
        shape = random_shape(rng)
        true = cost_of(TRUTH, shape)
        if i >= 100:
            errors.append(abs(cost_of(estimate.cost(), shape) / true - 1))
        estimate.observe(shape, true * rng.gauss(1, 0.1) * (5 if rng.random() < 1 / 30 else 1))
    errors.sort()
    assert errors[len(errors) // 2] < 0.08
    assert errors[len(errors) * 9 // 10] < 0.25


def test_it_follows_a_machine_that_becomes_slower() -> None:
    rng, estimate = random.Random(3), StepCostEstimate()
    for slowdown in (1, 3):
        for _ in range(200):
            shape = random_shape(rng)
            estimate.observe(shape, slowdown * cost_of(TRUTH, shape))
    shape = random_shape(rng)
    assert math.isclose(cost_of(estimate.cost(), shape), 3 * cost_of(TRUTH, shape), rel_tol=0.1)


def test_what_recent_steps_do_not_show_is_kept() -> None:
    rng, estimate = random.Random(4), StepCostEstimate()
    for _ in range(200):
        shape = random_shape(rng)
        estimate.observe(shape, cost_of(TRUTH, shape))
    for step in range(5000):
        shape = shape_of([item(500 + step, 1)] * 16)
        estimate.observe(shape, cost_of(TRUTH, shape) * rng.gauss(1, 0.05))
    mixed = shape_of([item(5500, 1)] * 16 + [item(0, 512)])
    assert math.isclose(cost_of(estimate.cost(), mixed), cost_of(TRUTH, mixed), rel_tol=0.25)


def test_a_clock_that_stands_teaches_nothing() -> None:
    estimate = StepCostEstimate()
    estimate.observe(shape_of([item(0, 64)]), 0.0)
    assert (estimate.steps, estimate.known_prompt_tokens, estimate.cost()) == (0, 0, StepCost())


shapes = st.builds(
    StepShape,
    sequences=st.integers(1, 4096),
    tokens=st.integers(1, 1 << 17),
    context_tokens=st.integers(0, 1 << 26),
    attention_pairs=st.floats(0, 1e12),
    prompt_tokens=st.integers(0, 1 << 17),
)


@given(st.lists(st.tuples(shapes, st.floats(1e-3, 1e7)), max_size=60))
def test_any_steps_leave_finite_costs_of_at_least_zero(steps: list[tuple[StepShape, float]]) -> None:
    estimate = StepCostEstimate()
    for shape, duration_ms in steps:
        estimate.observe(shape, duration_ms)
        cost = estimate.cost()
        for value in (cost.constant_ms, cost.per_token_ms, cost.per_sequence_ms, cost.per_context_token_ms):
            assert math.isfinite(value)
            assert value >= 0
        assert 0 <= estimate.relative_error <= 1
        assert math.isfinite(cost_of(cost, shape))
