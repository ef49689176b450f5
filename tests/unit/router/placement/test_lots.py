"""Lots and weights: who is spared when not all prompts can be in time."""

from __future__ import annotations

import math
import statistics

import pytest
from pydantic import ValidationError

from router.config import RouterConfig
from router.placement.lots import lot_of, weight_of


def test_a_lot_is_the_request_s_own_and_no_client_can_tell_it() -> None:
    assert lot_of("a", "secret") == lot_of("a", "secret")
    assert len({lot_of("a", "secret"), lot_of("b", "secret"), lot_of("a", "other")}) == 3
    lots = [lot_of(f"r{i}", "secret") for i in range(2000)]
    assert min(lots) > 0
    assert max(lots) <= 1
    assert statistics.fmean(lots) == pytest.approx(0.5, abs=0.03)


def test_at_0_all_weigh_the_same_and_then_lots_count_more_and_more() -> None:
    assert weight_of(0.001, 0.0) == 1.0
    assert weight_of(0.25, 0.5) == 0.25
    assert weight_of(0.5, 0.75) == pytest.approx(0.125)
    for protect in (0.0, 0.3, 0.5, 0.9, 0.999, 1.0):
        assert weight_of(1.0, protect) == 1.0
        assert weight_of(2.0**-10, protect) * 1e-3 > 0, "of the least lot and work, something is left"
        assert weight_of(0.4, protect) <= weight_of(0.6, protect)


def test_at_1_the_lot_decides_however_long_a_prompt_is() -> None:
    assert 1000.0 * weight_of(0.8, 1.0) < 1.0 * weight_of(0.9, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan, math.inf])
def test_a_share_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="overload_protect"):
        RouterConfig(overload_protect=value)
