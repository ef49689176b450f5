from __future__ import annotations

import math

import pytest

from simulator.cost_model import preset
from simulator.planner import HOURS_PER_MONTH, Mix, PoolPlan, Prices, bill, input_time_share, pool_plans

COSTS = preset("h200-8b")
MIX = Mix(2000.0, 200.0)
PLAN = PoolPlan(1, 3, 10.0, 0.3, 0.0)


def test_the_parts_of_the_bill_add_up_to_the_rent() -> None:
    b = bill(PLAN, MIX, COSTS, Prices(2.0, utilisation=0.5), gpus_per_worker=1, wanted_per_s=15.0)
    assert (b.clusters, b.gpus) == (2, 8)
    assert b.month_dollars == pytest.approx(8 * 2.0 * HOURS_PER_MONTH)
    requests = 15.0 * 0.5 * 3600 * HOURS_PER_MONTH
    total = requests * (2000 * b.per_million_input + 200 * b.per_million_output) / 1e6
    assert total == pytest.approx(b.month_dollars)
    assert requests * 2200 * b.per_million_blended / 1e6 == pytest.approx(b.month_dollars)


def test_break_even_is_where_both_bills_are_equal() -> None:
    prices = Prices(2.0, api_input=0.5, api_output=1.5)
    b = bill(PLAN, MIX, COSTS, prices, 1, 10.0)
    requests = b.break_even_requests_per_s * 3600 * HOURS_PER_MONTH
    api = requests * (2000 * 0.5 + 200 * 1.5) / 1e6
    assert api == pytest.approx(b.month_dollars / b.clusters)
    assert b.break_even_million_tokens_a_month == pytest.approx(requests * 2200 / 1e6)
    cheap = bill(PLAN, MIX, COSTS, Prices(2.0, api_input=0.0001, api_output=0.0001), 1, 10.0)
    assert math.isinf(cheap.break_even_requests_per_s), "more than a cluster can serve: never"


def test_cached_input_of_an_api_has_its_own_price() -> None:
    mix = Mix(1000.0, 100.0, cached_share=0.5)
    prices = Prices(2.0, api_input=1.0, api_output=2.0, api_cached_input=0.1)
    b = bill(PLAN, mix, COSTS, prices, 1, 10.0)
    assert b.api_per_million_blended == pytest.approx((500 * 1.0 + 500 * 0.1 + 100 * 2.0) / 1100)


def test_a_cluster_that_meets_no_target_has_no_bill() -> None:
    with pytest.raises(ValueError, match="at no rate"):
        bill(PoolPlan(1, 1, 0.0, 0, 0), MIX, COSTS, Prices(1.0), 1, 1.0)


def test_long_prompts_take_a_larger_share_of_the_time() -> None:
    assert input_time_share(Mix(20_000, 100), COSTS) > input_time_share(Mix(1000, 100), COSTS) > 0
    assert input_time_share(Mix(1000, 1000), COSTS) < 0.5


def test_the_best_shape_wins_and_hopeless_ones_cost_one_look() -> None:
    limits = {0: 3.0, 1: 8.0, 2: 5.0, 3: 1.0}
    looks: dict[int, int] = {}

    def attained(prefill: int, rate: float) -> tuple[float, float, float]:
        looks[prefill] = looks.get(prefill, 0) + 1
        return (1.0 if rate <= limits[prefill] else 0.5), 0.4, 0.1

    plans = pool_plans(4, attained, 2.0, 0.9)
    assert (plans[0].prefill, plans[0].decode) == (1, 3)
    assert plans[0].goodput_requests_per_s == pytest.approx(8.0, rel=0.05)
    assert looks[2] == looks[3] == 1
