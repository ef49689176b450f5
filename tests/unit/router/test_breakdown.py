"""The parts of a time to first token, and the cost of tokens."""

from __future__ import annotations

import pytest

from router.breakdown import Breakdown, FirstStep, RecoveryKind
from router.record.counts import CostWindow, PoolUse


def test_the_parts_sum_to_the_time_to_first_token() -> None:
    b = Breakdown(admitted=10.002)
    b.legs = {1: 10.003, 2: 10.003}
    b.first_step(1, FirstStep(held_ms=0, queue_ms=20, prefill_ms=50, prefill_wait_ms=5, send_ms=2), emitted=0)
    parts = b.ttft_parts_ms(arrived=10.0, dispatched=10.003, first_token=10.1)
    assert parts == pytest.approx(
        {
            "admission": 2,
            "decide": 1,
            "recovery": 0,
            "network": 20,
            "worker_queue": 20,
            "prefill": 50,
            "prefill_wait": 5,
            "worker_send": 2,
        }
    )
    assert sum(parts.values()) == pytest.approx(100)


def test_attempts_that_brought_nothing_are_a_part_of_their_own() -> None:
    """The first leg died after 40 ms; the one that took over had waited 10 ms for KV that did not come."""
    b = Breakdown(admitted=0.0)
    b.legs = {1: 0.0, 2: 0.040}
    b.recovered(RecoveryKind.PLACED_ANEW, 0.040)
    b.first_step(2, FirstStep(held_ms=10, queue_ms=5, prefill_ms=30, prefill_wait_ms=0, send_ms=1), emitted=0)
    b.went_on(0.1, before=0.04)
    parts = b.ttft_parts_ms(arrived=0.0, dispatched=0.0, first_token=0.1)
    assert parts["recovery"] == pytest.approx(50)
    assert sum(parts.values()) == pytest.approx(100)
    assert [(r.kind, r.at, r.until) for r in b.recoveries] == [(RecoveryKind.PLACED_ANEW, 0.040, 0.1)]
    assert not b.recovering


def test_the_readers_first_step_is_a_part_of_the_gap_and_not_of_the_first_token() -> None:
    b = Breakdown(admitted=0.0, legs={1: 0.0, 2: 0.0})
    b.first_step(1, FirstStep(0, 1, 2, 0, 0), emitted=0)
    b.first_step(2, FirstStep(held_ms=90, queue_ms=3, prefill_ms=4, prefill_wait_ms=1, send_ms=1), emitted=1)
    assert b.gap_step_ms == 8
    assert b.ttft_parts_ms(0.0, 0.0, 0.01)["prefill"] == 2


def test_without_a_worker_s_word_the_rest_is_unexplained_and_without_a_token_there_are_no_parts() -> None:
    b = Breakdown(admitted=0.0)
    assert b.ttft_parts_ms(0.0, 0.0, None) == {}
    assert b.ttft_parts_ms(0.0, 0.0, 0.1)["network"] == pytest.approx(100)


def _use(ready: int, price: float, input_s: float, output_s: float, idle: float) -> PoolUse:
    return PoolUse(ready, price, input_s, output_s, idle)


def test_cost_charges_idle_time_in_proportion_to_the_busy_time() -> None:
    """One prefill worker at 36 and two decode workers at 18 an hour: 0.01 a second each pool.

    In 10 s decode spent a quarter of its steps on prompts. 0.1 + 0.025 go to 1,000 input tokens, 0.075 to 100.
    """
    window = CostWindow(window_s=60)
    window.look(0.0, {"prefill": _use(1, 36, 0, 0, 1.0), "decode": _use(2, 18, 0, 0, 0.0)}, 0, 0)
    assert window.per_million == {}
    window.look(10.0, {"prefill": _use(1, 36, 4, 0, 1.0), "decode": _use(2, 18, 1, 3, 0.0)}, 1000, 100)
    assert window.per_million == pytest.approx({"input": 0.125 / 1000 * 1e6, "output": 0.075 / 100 * 1e6})
    assert window.rate_per_hour == pytest.approx({"input": 45.0, "output": 27.0})


def test_cost_slides_and_says_nothing_of_what_was_not_produced() -> None:
    window = CostWindow(window_s=10)
    for second in range(30):
        tokens = min(second, 15) * 10
        window.look(float(second), {"decode": _use(1, 3600, 0, second, 0.0)}, 0, tokens)
    assert window.per_million == {}  # nothing came in the last ten seconds
    assert window.rate_per_hour == pytest.approx({"input": 0.0, "output": 3600.0})
    free = CostWindow()
    free.look(0.0, {"decode": _use(1, 0, 0, 0, 0.0)}, 0, 0)
    free.look(1.0, {"decode": _use(1, 0, 0, 1, 0.0)}, 10, 10)
    assert free.per_million == {}  # no price was told
