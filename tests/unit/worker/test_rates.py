"""Recent speeds of a worker: what the router is told of its decodes."""

from __future__ import annotations

import pytest

from engine.types import PlanItem, SamplingParams, StepPlan
from worker.rates import StepRates


def decode(sequence_id: int) -> PlanItem:
    return PlanItem(sequence_id, [1], 100, [0], True, 5, SamplingParams(), 90, [1] * 101)


def test_what_is_told_is_of_the_decodes_that_run_now() -> None:
    rates = StepRates()
    assert rates.decode_ms_now(7.0) == 0.0, "no step has been measured"
    rates.observe(StepPlan(1, tuple(decode(n) for n in range(40))), 0.050)
    assert rates.decode_ms_now(0.0) == pytest.approx(50.0), "the costs are not known yet"
    assert rates.decode_ms_now(7.0) == 7.0, "one is left: it would look slow for ever"
